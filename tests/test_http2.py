"""HTTP/2: what it carries, and that no peer ends the process, disturbs others, or lets memory grow."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings
from hpack import Encoder

from hector_trio.connection import ConnectionLimits
from hector_trio.connection.socket import SENDS_PER_CHECKPOINT
from hector_trio.http2 import MAX_STREAMS, PREFACE, STREAM_WINDOW, head_fault, split
from tests.connection.applications import Contexts, echo, hello, tls
from tests.hostile import Peer, Running, asgi, forget_peak, get, peak_bytes, running, upgrade
from tests.serving import serving, settings_of

__all__ = ["tls"]

ON = ConnectionLimits(http2=True)
T = TypeVar("T")
Headers = Iterable[tuple[bytes, bytes]]


class Client:
    """A client of HTTP/2 that does what a test wants."""

    def __init__(self, peer: Peer, window: int = 65535, authority: bytes = b"a") -> None:
        self.peer = peer
        self.authority = authority
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.h2.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.h2.initiate_connection()
        self.events: list[Any] = []
        self.taking = True
        """Whether windows open again when data has come."""

    async def flush(self) -> None:
        await self.peer.send(self.h2.data_to_send())

    async def ask(
        self, *more: tuple[bytes, bytes], path: bytes = b"/", method: bytes = b"GET", end: bool = True
    ) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        head = [(b":method", method), (b":path", path), (b":scheme", b"http"), (b":authority", self.authority), *more]
        self.h2.send_headers(stream_id, head, end_stream=end)
        await self.flush()
        return stream_id

    async def next(self, kind: type[T], stream_id: int | None = None) -> T:
        """The next event of a kind; others are kept. EOFError at the end of the connection."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    self.events.remove(event)
                    return event
            data = await self.peer.stream.receive_some(65536)
            if not data:
                raise EOFError(self.events)
            events = self.h2.receive_data(data)
            self.events += events
            for event in events:
                if isinstance(event, DataReceived) and self.taking:
                    assert event.stream_id is not None
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            await self.flush()

    async def status(self, stream_id: int) -> int:
        headers = (await self.next(ResponseReceived, stream_id)).headers
        assert headers is not None
        return int(dict(headers)[b":status"])

    async def body(self, stream_id: int) -> bytes:
        await self.next(StreamEnded, stream_id)
        found = [each for each in self.events if isinstance(each, DataReceived) and each.stream_id == stream_id]
        return b"".join(each.data or b"" for each in found)


@asynccontextmanager
async def speaking(server: Running, **options: Any) -> AsyncIterator[Client]:
    with trio.fail_after(20):
        async with server.peer() as peer:
            client = Client(peer, **options)
            await client.flush()
            yield client


async def mirror(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was told."""
    body = b""
    while (event := await receive())["type"] == "http.request":
        body += event["body"]
        if not event["more_body"]:
            break
    host = dict(scope["headers"])[b"host"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"Host-Was", host)]})
    await send({"type": "http.response.body", "body": body + scope["path"].encode(), "more_body": True})
    await send({"type": "http.response.body"})


# ---- what it carries


async def test_both_protocols_are_spoken_on_one_port() -> None:
    async with running(asgi(http=hello), ON) as server:
        async with server.peer(get()) as peer:
            assert await peer.status() == 200
        async with speaking(server) as client:
            stream = await client.ask()
            assert await client.status(stream) == 200
            assert await client.body(stream) == b"hello"


async def test_a_preface_and_a_request_are_recognised_byte_by_byte() -> None:
    async with running(asgi(http=hello), ON) as server:
        with trio.fail_after(20):
            async with server.peer() as peer:
                client = Client(peer)
                for byte in client.h2.data_to_send():
                    await peer.send(bytes((byte,)))
                assert await client.status(await client.ask()) == 200
            async with server.peer() as peer:
                for byte in b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n":
                    await peer.send(bytes((byte,)))
                assert await peer.status() == 200


async def test_a_preface_is_refused_unless_http2_is_on() -> None:
    async with running(asgi(http=hello)) as server, server.peer(PREFACE) as peer:
        assert await peer.status() == 505


async def test_a_body_larger_than_every_window_comes_and_goes() -> None:
    async with running(asgi(http=mirror), ON) as server, speaking(server) as client:
        stream = await client.ask(method=b"POST", path=b"/p", end=False)
        left = body = bytes(range(256)) * 12_000
        while left:
            room = min(client.h2.local_flow_control_window(stream), client.h2.max_outbound_frame_size, len(left))
            if not room:
                event = await client.peer.stream.receive_some(65536)
                client.events += client.h2.receive_data(event)
                continue
            client.h2.send_data(stream, left[:room])
            left = left[room:]
            await client.flush()
        client.h2.end_stream(stream)
        await client.flush()
        assert await client.status(stream) == 200
        assert await client.body(stream) == body + b"/p"


async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_once() -> None:
    async with running(asgi(http=mirror), ON) as server, speaking(server) as client:
        stream = await client.ask((b"expect", b"100-continue"), method=b"POST", path=b"/p", end=False)
        headers = (await client.next(InformationalResponseReceived, stream)).headers
        assert headers == [(b":status", b"100")]
        client.h2.send_data(stream, b"body", end_stream=True)
        await client.flush()
        assert await client.body(stream) == b"body/p"
        assert not [each for each in client.events if isinstance(each, InformationalResponseReceived)]


async def test_many_streams_of_one_connection_go_on_at_once() -> None:
    async with running(asgi(http=mirror), ON) as server, speaking(server) as client:
        streams = [await client.ask(path=b"/%d" % n) for n in range(MAX_STREAMS)]
        for n, stream in enumerate(reversed(streams)):
            assert await client.body(stream) == b"/%d" % (MAX_STREAMS - 1 - n)


async def test_a_stream_beyond_those_allowed_is_refused_and_no_other_notices() -> None:
    let_go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await let_go.wait()
        await mirror(scope, receive, send)

    async with running(asgi(http=app), ON) as server, speaking(server) as client:
        await client.next(RemoteSettingsChanged)
        assert client.h2.remote_settings.max_concurrent_streams == MAX_STREAMS
        del client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS]  # as if that had come late
        open_ones = [await client.ask(method=b"POST", path=b"/wait") for _ in range(MAX_STREAMS)]
        for _ in range(200):  # 3 MiB of bodies: more than the window of all
            refused = await client.ask(method=b"POST", path=b"/more", end=False)
            client.h2.send_data(refused, b"x" * 16384, end_stream=True)
            await client.flush()
            assert (await client.next(StreamReset, refused)).error_code == ErrorCodes.REFUSED_STREAM
        client.h2.reset_stream(open_ones.pop(), ErrorCodes.CANCEL)
        one_more = await client.ask(path=b"/more")
        assert await client.body(one_more) == b"/more"
        let_go.set()
        for stream in open_ones:
            assert await client.body(stream) == b"/wait"


@pytest.mark.parametrize("already_open", [0, MAX_STREAMS])
async def test_what_is_refused_may_have_been_reset_meanwhile(already_open: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await trio.sleep_forever()
        await mirror(scope, receive, send)

    async with running(asgi(http=app), ON, graceful_timeout=0.2) as server, speaking(server) as client:
        await client.next(RemoteSettingsChanged)
        del client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS]
        waiting = [await client.ask(path=b"/wait") for _ in range(already_open)]
        for _ in range(3):  # together: all are known before the first is refused
            stream_id = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream_id, [(b":method", b"CONNECT"), (b":authority", b"a")])
            client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        for stream in waiting[:1]:
            client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        assert await client.body(await client.ask(path=b"/here")) == b"/here"


async def test_what_several_streams_say_at_once_leaves_together() -> None:
    say = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await say.wait()
        await send({"type": "http.response.body", "body": scope["path"].encode(), "more_body": True})
        await trio.sleep_forever()

    async with running(asgi(http=app), ON, graceful_timeout=0.2) as server, speaking(server) as client:
        streams = [await client.ask(path=b"/%d" % n) for n in range(20)]
        for stream in streams:
            assert await client.status(stream) == 200
        before = client.peer.segments_received()
        say.set()
        for n, stream in enumerate(streams):
            assert (await client.next(DataReceived, stream)).data == b"/%d" % n
        assert client.peer.segments_received() - before <= 2 + 20 // SENDS_PER_CHECKPOINT


async def test_trailers_end_a_response() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert "http.response.trailers" in scope["extensions"]
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]})

    async with running(asgi(http=app), ON) as server, speaking(server) as client:
        stream = await client.ask((b"te", b"trailers"))
        assert (await client.next(TrailersReceived, stream)).headers == [(b"grpc-status", b"0")]
        assert await client.body(stream) == b"x"


async def test_the_authority_is_the_host_and_cookies_are_one() -> None:
    async with running(asgi(http=mirror), ON) as server, speaking(server) as client:
        stream = await client.ask((b"cookie", b"a=1"), (b"cookie", b"b=2"))
        headers = (await client.next(ResponseReceived, stream)).headers
        assert headers is not None
        assert dict(headers)[b"host-was"] == b"a"
    _, found = split([(b":authority", b"a"), (b"cookie", b"a=1"), (b"cookie", b"b=2")])
    assert found == [(b"host", b"a"), (b"cookie", b"a=1; b=2")]


async def test_http2_is_chosen_over_tls_by_who_offers_it(tls: Contexts) -> None:
    async with running(asgi(http=hello), ON, server_context=tls[0], client_context=tls[1]) as server:
        async with speaking(server) as client:
            assert await client.status(await client.ask()) == 200


async def test_an_application_that_fails_is_answered_and_the_next_stream_is_served() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        if scope["path"] != "/":
            raise RuntimeError("on purpose")
        await hello(scope, receive, send)

    async with running(asgi(http=app), ON) as server, speaking(server) as client:
        early, late, fine = [await client.ask(path=path) for path in (b"/early", b"/late", b"/")]
        assert await client.status(early) == 500
        assert (await client.next(StreamReset, late)).error_code == ErrorCodes.INTERNAL_ERROR
        assert await client.body(fine) == b"hello"


async def test_the_rest_of_the_server_is_there_too_and_its_guard() -> None:
    async with serving(settings_of(server={"http2": True})) as served:
        with trio.fail_after(20):
            async with await trio.open_tcp_stream(*served.address) as stream:
                client = Client(Peer(stream), authority=b"localhost")
                await client.flush()
                listed = await client.ask(path=b"/agents")
                assert await client.status(listed) == 200
                assert b"assistant" in await client.body(listed)
                asked = await client.ask(
                    (b"accept", b"text/event-stream"), (b"content-type", b"application/json"),
                    path=b"/agents/assistant/tasks", method=b"POST", end=False,
                )  # fmt: skip
                client.h2.send_data(asked, b'{"input":{"type":"text/plain","content":"hi"}}', end_stream=True)
                await client.flush()
                assert await client.status(asked) == 200
                assert b'"final":true' in (await client.body(asked)).replace(b" ", b"")
                assert (
                    await client.status(await client.ask((b"origin", b"https://evil.example"), path=b"/agents")) == 403
                )
                client.authority = b"evil.example"
                assert await client.status(await client.ask(path=b"/agents")) == 403
                client.authority = b"localhost"
                stream_id = client.h2.get_next_available_stream_id()
                socket = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http")]
                path = (b":path", b"/agents/assistant/stream")
                client.h2.send_headers(stream_id, [*socket, path, (b":authority", b"localhost")])
                await client.flush()
                assert await client.status(stream_id) == 501


# ---- ends


async def test_a_cancelled_stream_ends_its_application_and_no_other() -> None:
    gone = trio.Event()
    begun = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/":
            await hello(scope, receive, send)
            return
        await receive()
        begun.set()
        assert (await receive())["type"] == "http.disconnect"
        gone.set()

    async with running(asgi(http=app), ON) as server, speaking(server) as client:
        stream = await client.ask(path=b"/wait")
        await begun.wait()
        client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        await client.flush()
        await gone.wait()
        assert await client.body(await client.ask()) == b"hello"


async def test_a_shutdown_says_goodbye_and_lets_streams_end() -> None:
    let_go = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await let_go.wait()
        await hello(scope, receive, send)

    async with running(asgi(http=app), ON) as server, speaking(server) as client:
        stream = await client.ask()
        async with speaking(server) as idle:
            server.stop.set()
            assert (await idle.next(ConnectionTerminated)).error_code == ErrorCodes.NO_ERROR
            with pytest.raises(EOFError):
                await idle.next(StreamReset)
        assert (await client.next(ConnectionTerminated)).error_code == ErrorCodes.NO_ERROR
        let_go.set()
        # h2 lets nothing be read after a GOAWAY, so the frames are looked for by hand
        data = b""
        while b"hello" not in data:
            data += await client.peer.stream.receive_some(65536)
        assert stream == 1


async def test_an_idle_connection_ends_with_goodbye() -> None:
    limits = ConnectionLimits(http2=True, keep_alive_timeout=0.1)
    async with running(asgi(http=hello), limits) as server, speaking(server) as client:
        assert (await client.next(ConnectionTerminated)).error_code == ErrorCodes.NO_ERROR


# ---- memory


async def test_a_peer_that_opens_no_window_grows_no_memory() -> None:
    chunk = b"x" * 4096
    sent = 0
    gone = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        if scope["path"] == "/":
            await hello(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                while sent < 512:
                    sent += 1
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            gone.set()

    limits = ConnectionLimits(http2=True, send_timeout=0.5)
    async with running(asgi(http=app), limits) as server, speaking(server, window=0) as client:
        stream = await client.ask(path=b"/much")
        assert await client.status(stream) == 200
        reset = await client.next(StreamReset, stream)
        await gone.wait()
        assert reset.error_code == ErrorCodes.CANCEL
        assert (
            sent <= 1 + 2 * SENDS_PER_CHECKPOINT
        )  # what is sent to nobody before the application has its turn to hear it
        other = await client.ask()
        client.h2.increment_flow_control_window(100, other)
        await client.flush()
        assert await client.body(other) == b"hello"


async def test_a_window_that_opens_slowly_is_filled_and_no_more_is_made() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(512):
            sent += 1
            await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with running(asgi(http=app), ON) as server, speaking(server, window=0) as client:
        client.taking = False
        stream = await client.ask()
        assert await client.status(stream) == 200
        for n in range(1, 9):
            client.h2.increment_flow_control_window(4096, stream)
            await client.flush()
            assert len((await client.next(DataReceived, stream)).data or b"") == 4096
            assert sent in (n, n + 1)
        client.h2.increment_flow_control_window(1 << 22, stream)
        client.h2.increment_flow_control_window(1 << 22)
        await client.flush()
        assert len(await client.body(stream)) == 504 * 4096


async def test_answers_nobody_takes_are_dropped_when_their_application_has_long_ended() -> None:
    limits = ConnectionLimits(http2=True, send_timeout=0.2)
    async with running(asgi(http=hello), limits) as server, speaking(server, window=0) as client:
        streams = [await client.ask() for _ in range(MAX_STREAMS)]
        for stream in streams:
            assert (await client.next(StreamReset, stream)).error_code == ErrorCodes.CANCEL


async def test_a_peer_that_asks_and_never_reads_is_cut_and_fills_nothing() -> None:
    block = b"x" * 60_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": block})

    limits = ConnectionLimits(http2=True, send_timeout=0.5)
    forget_peak()
    before = peak_bytes()
    async with running(asgi(http=app), limits) as server, server.peer(window=4096) as peer:
        with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
            await peer.send(PREFACE + frame(4, 0, 0, b"\0\4\x7f\xff\xff\xff") + frame(8, 0, 0, b"\x7f\xff\0\0"))
            for n in range(10_000):
                await peer.send(head(*ROOT, stream_id=2 * n + 1))
            await peer.send(b"x" * (32 << 20))
        await server.until_open(0)
    assert peak_bytes() - before < 32 << 20


async def test_what_an_application_does_not_read_is_not_taken_from_its_client() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/deaf":
            await trio.sleep_forever()
        await mirror(scope, receive, send)

    async with running(asgi(http=app), ON, graceful_timeout=0.2) as server, speaking(server) as client:
        deaf = await client.ask(method=b"POST", path=b"/deaf", end=False)
        for _ in range(4):
            client.h2.send_data(deaf, b"x" * 16380)
        await client.flush()
        other = await client.ask(method=b"POST", path=b"/o", end=False)
        client.h2.send_data(other, b"y" * 10, end_stream=True)
        await client.flush()
        assert await client.body(other) == b"y" * 10 + b"/o"
        assert client.h2.local_flow_control_window(deaf) == STREAM_WINDOW - 4 * 16380


async def test_a_body_that_never_comes_ends_its_stream() -> None:
    limits = ConnectionLimits(http2=True, body_timeout=0.1)
    async with running(asgi(http=mirror), limits) as server, speaking(server) as client:
        stream = await client.ask(method=b"POST", end=False)
        assert (await client.next(StreamReset, stream)).error_code == ErrorCodes.CANCEL
        assert await client.status(await client.ask()) == 200


# ---- hostile input


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream_id) + payload


def head(*headers: tuple[bytes, bytes], stream_id: int = 1, flags: int = 5) -> bytes:
    return frame(1, flags, stream_id, Encoder().encode(headers, huffman=False))


ROOT = [(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b":authority", b"a")]
SETTINGS = frame(4, 0, 0)
PING, PONG = frame(6, 0, 0, b"a ping.."), frame(6, 1, 0, b"a ping..")
RESETS = b"".join(head(*ROOT, stream_id=2 * n + 1) + frame(3, 0, 2 * n + 1, b"\0\0\0\x08") for n in range(3000))
BAD: dict[str, bytes] = {
    "CONNECT": head((b":method", b"CONNECT"), (b":authority", b"a")),
    "path beyond ASCII": head((b":method", b"GET"), (b":path", b"/\xff"), (b":scheme", b"http"), (b":authority", b"a")),
    "extended CONNECT": head(
        (b":method", b"CONNECT"),
        (b":protocol", b"web\xffsocket"),
        (b":path", b"/"),
        (b":scheme", b"http"),
        (b":authority", b"a"),
    ),
    "WebSocket": head((b":method", b"CONNECT"), (b":protocol", b"websocket"), *ROOT[1:]),
    "method beyond ASCII": head((b":method", b"G\xff"), *ROOT[1:]),
    "no path": head(ROOT[0], *ROOT[2:]),
    "empty path": head(ROOT[0], (b":path", b""), *ROOT[2:]),
    "no authority": head(*ROOT[:3]),
    "authority beyond ASCII": head(*ROOT[:3], (b":authority", b"\xff")),
    "two authorities": head(*ROOT, (b"host", b"b")),
    "unknown pseudo-header": head(*ROOT, (b":x", b"y")),
    "connection header": head(*ROOT, (b"connection", b"close")),
    "upper case": head(*ROOT, (b"X", b"y")),
    "NUL in a value": head(*ROOT, (b"x", b"a\0b")),
    "length that is no number": head(*ROOT, (b"content-length", b"x"), flags=4),
    "garbage": b"\xff" * 4000,
    "headers that cannot be unpacked": frame(1, 5, 1, b"\xff" * 50),
    "data of no stream": frame(0, 0, 1, b"x"),
    "data on the connection": frame(0, 0, 0, b"x"),
    "stream number that is even": head(*ROOT, stream_id=2),
    "stream of the highest number": head(*ROOT, stream_id=(1 << 31) - 1),
    "frame of more than is allowed": frame(0, 0, 1, b"x" * 20_000),
    "window of nothing": frame(8, 0, 0, b"\0\0\0\0"),
    "window that overflows": frame(8, 0, 0, b"\x7f\xff\xff\xff"),
    "settings of a bad size": frame(4, 0, 0, b"x"),
    "settings with a window beyond all": frame(4, 0, 0, b"\0\4\xff\xff\xff\xff"),
    "padding beyond the frame": frame(0, 8, 1, b"\xff"),
    "push promise": frame(5, 4, 1, b"\0\0\0\2"),
    "continuation of nothing": frame(9, 4, 1, b""),
    "continuations without end": frame(1, 0, 1, b"") + frame(9, 0, 1, b"") * 20_000,
    "head of a megabyte": frame(1, 0, 1, b"") + frame(9, 0, 1, b"\x00\x01a\x7f\x81\x7f" + b"x" * 16000) * 70,
    "head that grows when unpacked": frame(1, 4, 1, b"\x40\x01a\x7f\x81\x1e" + b"x" * 4000 + b"\xbe" * 9000),
    "streams reset at once": RESETS,
    "pings": frame(6, 0, 0, b"x" * 8) * 20_000,
    "settings": SETTINGS * 20_000,
    "priorities": frame(2, 0, 1, b"\0\0\0\0\x10") * 20_000,
    "priority of itself": frame(2, 0, 1, b"\0\0\0\1\x10"),
    "empty data": head((b":method", b"POST"), *ROOT[1:], flags=4) + frame(0, 0, 1) * 20_000,
    "windows of one byte": head(*ROOT) + frame(8, 0, 0, b"\0\0\0\1") * 20_000,
    "unknown frames": frame(0xBE, 0, 0, b"x") * 20_000,
    "more streams than are allowed": b"".join(
        head((b":method", b"POST"), *ROOT[1:], stream_id=2 * n + 1, flags=4) for n in range(2000)
    ),
    "data of streams that were refused": b"".join(
        head((b":method", b"POST"), *ROOT[1:], stream_id=2 * n + 1, flags=4) for n in range(300)
    )
    + b"".join(frame(0, 0, 2 * n + 1, b"x") for n in range(150, 300)) * 100,
    "goodbye": frame(7, 0, 0, b"\0" * 8),
    "preface again": PREFACE,
    "upgrade": upgrade(),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
async def test_hostile_frames_end_at_most_their_own_connection(data: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (echo if scope["type"] == "websocket" else mirror)(scope, receive, send)

    async with running(asgi(http=app, websocket=echo), ON, graceful_timeout=0.5) as server:
        async with speaking(server) as bystander:
            async with server.peer() as peer:
                with trio.move_on_after(1):  # what is no whole frame yet is waited for
                    try:
                        await peer.send(PREFACE + SETTINGS + data + PING)
                        await peer.until(PONG)
                    except (trio.BrokenResourceError, EOFError):
                        pass
            stream = await bystander.ask(path=b"/here")
            assert await bystander.body(stream) == b"/here"


@pytest.mark.parametrize(
    "name",
    [
        "streams reset at once", "more streams than are allowed", "pings", "settings", "priorities", "empty data",
        "windows of one byte",
    ],
)  # fmt: skip
async def test_floods_are_told_to_calm_down(name: str) -> None:
    async with running(asgi(http=mirror), ON) as server, server.peer() as peer, trio.open_nursery() as nursery:

        async def flood() -> None:
            with suppress(trio.BrokenResourceError):
                await peer.send(PREFACE + SETTINGS + BAD[name])

        nursery.start_soon(flood)
        with trio.fail_after(20):
            received = await peer.rest()
        assert struct.pack("!I", ErrorCodes.ENHANCE_YOUR_CALM) in received


@pytest.mark.parametrize(
    ("pseudo", "status"),
    [
        ({b":method": b"CONNECT"}, 501),
        ({b":method": b"GET", b":path": b"/\xff"}, 400),
        ({b":method": b"get", b":path": b"/"}, 400),
        ({b":method": b"GET", b":path": b"*"}, 400),
        ({b":method": b"OPTIONS", b":path": b"*"}, None),
        ({b":method": b"GET", b":path": b"/", b":authority": b"b"}, 400),
        ({b":method": b"GET", b":path": b"/"}, None),
    ],
)
def test_a_head_is_refused_before_an_application_sees_it(pseudo: dict[bytes, bytes], status: int | None) -> None:
    assert head_fault(pseudo, [(b"host", b"a")]) == status
    assert head_fault(pseudo, []) == (status or 400)
