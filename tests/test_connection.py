"""What no client may do to a server: end it, freeze it, fill it, or keep it from stopping."""

import errno
import json
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import trio
from hypercorn.config import Config
from quart_trio import QuartTrio

from hector_trio.connection import (
    ConnectionLimits,
    Inbox,
    check_hypercorn,
    contain,
    install,
    shutdown_begun,
    statistics,
    tune_listener,
)
from hector_trio.frames import REASONS
from tests.hostile import (
    FRAMES,
    H2_PREFACE,
    REQUESTS,
    Hostile,
    Peer,
    Running,
    accept,
    asgi,
    client_close,
    client_frame,
    forget_peak,
    get,
    open_descriptors,
    pause,
    peak_bytes,
    post,
    running,
    upgrade,
)
from tests.hostile_app import app as hostile_app

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux tells")
ROOT = Path(__file__).parent.parent
BLOCK = b"x" * 65536


class Told:
    """What a handler has seen, and when it was told to end."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        self.events: list[Any] = []
        self.ended = trio.Event()

    async def listen(self, receive: Any) -> None:
        """Take everything up to the disconnect."""
        self.started.set()
        while True:
            event = await receive()
            self.events.append(event)
            if event["type"].endswith("disconnect"):
                self.ended.set()
                return


def listener(told: Told) -> Any:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await told.listen(receive)

    return asgi(websocket=websocket)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await accept(receive, send)
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"], "bytes": event["bytes"]})


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


# ---- 1: no input ends the process, or disturbs anybody else


@dataclass
class Process:
    process: "subprocess.Popen[bytes]"
    running: Running


@pytest.fixture(scope="module")
def hypercorn() -> Iterator[Process]:
    """`hypercorn -k trio` with an application that installs the classes."""
    sock = socket.create_server(("127.0.0.1", 0))
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-w", "0", "-b", f"fd://{sock.fileno()}"]
    process = subprocess.Popen(
        [*command, "tests.hostile_app:app"],
        cwd=ROOT,
        pass_fds=[sock.fileno()],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with sock, process:
        yield Process(process, Running(sock.getsockname(), trio.Event(), trio.Event()))
        process.kill()


@pytest.mark.parametrize("hostile", REQUESTS, ids=lambda hostile: hostile.name)
async def test_hostile_bytes_end_only_their_own_connection(hypercorn: Process, hostile: Hostile) -> None:
    with trio.fail_after(20):
        async with hypercorn.running.websocket() as bystander:
            async with hypercorn.running.peer() as peer:
                with suppress(trio.BrokenResourceError):  # refused before it was complete
                    await peer.send(hostile.data)
                assert await peer.status() in hostile.statuses
            await bystander.send(client_frame(0x81, b"still here"))
            assert await bystander.frame() == (0x81, b"still here")
        assert hypercorn.process.poll() is None


async def test_hostile_bytes_leave_no_connection_behind() -> None:
    limits = ConnectionLimits(linger_timeout=0.2)
    async with running(hostile_app, limits) as server:
        for hostile in REQUESTS:
            with trio.fail_after(10):
                async with server.peer() as peer:
                    with suppress(trio.BrokenResourceError):
                        await peer.send(hostile.data)
                    await peer.status()
                    peer.reset()
        await server.until_open(0)


async def test_what_a_client_sends_before_the_101_is_delivered_after_it() -> None:
    early = client_frame(0x81, b"one") + client_frame(0x82, b"two") + client_frame(0x81, b"three")[:4]
    async with running(asgi(websocket=echo)) as server, server.peer(upgrade() + early) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 101
            assert await peer.frame() == (0x81, b"one")
            assert await peer.frame() == (0x82, b"two")
            await peer.send(client_frame(0x81, b"three")[4:])
            assert await peer.frame() == (0x81, b"three")


@pytest.mark.parametrize("early", [100, 1000])
async def test_what_comes_while_early_messages_are_taken_stays_behind_them(early: int) -> None:
    """Also when what came early ends in the middle of a frame."""
    texts = [str(number) for number in range(early + 20)]
    packed = [client_frame(0x81, text.encode()) for text in texts]
    first, rest = b"".join(packed[:early])[:-3], b"".join(packed[:early])[-3:] + b"".join(packed[early:])
    got: list[str] = []
    ended = trio.Event()

    async def collect(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        while len(scope["extensions"]["hector.send_many"]._early) < len(first):
            await pause(0.001)
        await peer.send(rest)  # on its way while what came before is taken
        await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
        while len(got) < len(texts) and (event := await receive())["type"] == "websocket.receive":
            got.append(event["text"])
        ended.set()

    limits = ConnectionLimits(max_unread_messages=2000)
    async with running(asgi(websocket=collect), limits) as server, server.peer(upgrade()) as peer:
        with trio.fail_after(5):
            await peer.send(first)
            await ended.wait()
    assert got == texts


async def test_a_hundred_continue_is_sent_and_the_body_taken() -> None:
    async def body(scope: Any, receive: Any, send: Any) -> None:
        taken = b""
        while (event := await receive())["more_body"]:
            taken += event["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": taken})

    async with running(asgi(http=body)) as server:
        head = post(b"", b"expect: 100-continue", b"connection: close", announced=3)
        async with server.peer(head) as peer:
            with trio.fail_after(5):
                assert await peer.status() == 100
                await peer.send(b"abc")
                assert b"abc" in await peer.rest()


async def test_a_hundred_continue_is_not_sent_for_a_body_that_is_refused() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        assert (await receive())["type"] == "http.disconnect"

    async with running(asgi(http=refuse), ConnectionLimits(linger_timeout=0.2)) as server:
        async with server.peer(post(b"", b"expect: 100-continue", announced=3)) as peer:
            with trio.fail_after(5):
                answer = await peer.rest()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


async def test_a_client_may_wait_for_its_hundred_continue_as_long_as_the_application_thinks() -> None:
    async def think(scope: Any, receive: Any, send: Any) -> None:
        await pause(0.5)
        while (await receive())["more_body"]:
            pass
        await hello(scope, receive, send)

    async with running(asgi(http=think), ConnectionLimits(body_timeout=0.2)) as server:
        async with server.peer(post(b"", b"expect: 100-continue", announced=3)) as peer:
            with trio.fail_after(5):
                assert await peer.status() == 100
                await peer.send(b"abc")
                assert await peer.status() == 200


async def test_an_empty_line_before_a_request_is_ignored_and_one_behind_it_leaves_the_connection_idle() -> None:
    limits = ConnectionLimits(header_timeout=0.3)
    async with running(asgi(http=hello), limits) as server, server.peer() as peer:
        with trio.fail_after(5):
            for piece in (b"\r", b"\n", get() + b"\r\n" + get() + b"\r\n"):
                await peer.send(piece)
                await pause(0.01)
            for _ in range(2):
                assert await peer.status() == 200
                assert await peer.take(5) == b"hello"
            await pause(0.6)  # no head was begun, so none is late
            await peer.send(get())
            assert await peer.status() == 200


@pytest.mark.parametrize("size", [1010, 2000, 70_000, 100_000])
async def test_a_head_that_is_too_long_is_refused_also_when_it_comes_in_one_piece(size: int) -> None:
    async with running(asgi(http=hello), ConnectionLimits(max_header_bytes=1000)) as server:
        head = get(b"/", b"x: " + b"a" * (size - len(get(b"/", b"x: "))))
        async with server.peer(head) as peer:
            with trio.fail_after(5):
                assert await peer.status() == 431
        async with server.peer(get() + get() * 100 + get(b"/", b"connection: close")) as peer:
            with trio.fail_after(5):
                assert (await peer.rest()).count(b"HTTP/1.1 200") == 102


async def test_the_lists_of_a_handshake_may_stand_on_several_lines() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][0]})
        await receive()

    lists = (b"connection: keep-alive", b"sec-websocket-protocol: one", b"sec-websocket-protocol: two")
    async with running(asgi(websocket=websocket)) as server, server.peer(upgrade(b"/", *lists)) as peer:
        with trio.fail_after(5):
            head = await peer.until(b"\r\n\r\n")
    assert b"101" in head
    assert b"sec-websocket-protocol: one\r\n" in head


REFUSALS = [
    (get(b"/", b"content-length: abc", method=b"POST"), 400, "invalid_request"),
    (post(b"abc", b"transfer-encoding: chunked"), 400, "invalid_request"),
    (upgrade(key=b"sec-websocket-key: !!!\r\n"), 400, "invalid_request"),
    (upgrade(b"/slow") + b"\x00" * 50_000, 400, "invalid_request"),
    (upgrade(version=b"8"), 426, "invalid_request"),
    (get(b"/", b"x: " + b"a" * 80_000), 431, "payload_too_large"),
    (get(b"example.org:443", method=b"CONNECT"), 501, "invalid_request"),
    (get(b"/", b"transfer-encoding: gzip", method=b"POST"), 501, "invalid_request"),
    (get(version=b"2.0"), 505, "invalid_request"),
    (b"GET / HTTP/1.1\r\n", 408, "request_timeout"),
    (post(b"a", announced=10), 408, "request_timeout"),
]


def problem_of(answer: bytes) -> dict[str, Any]:
    """The problem that a whole *answer* holds, checked against its head."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    problem: dict[str, Any] = json.loads(body)
    assert problem["status"] == int(status.split(b" ")[1])
    assert problem["type"] == f"urn:hector:problem:{problem['code']}"
    assert problem["instance"] == ""
    assert problem["title"]
    assert problem["detail"]
    assert uuid.UUID(problem["requestId"])
    assert headers[b"x-request-id"].decode() == problem["requestId"]
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == b"%d" % len(body)
    assert headers[b"connection"] == b"close"
    assert (headers.get(b"upgrade"), headers.get(b"sec-websocket-version")) == (
        (b"websocket", b"13") if problem["status"] == 426 else (None, None)
    )
    assert (b"retry-after" in headers) == (problem["status"] == 503)
    return problem


@pytest.mark.parametrize(("data", "status", "code"), REFUSALS, ids=[f"{row[1]}-{n}" for n, row in enumerate(REFUSALS)])
async def test_what_no_application_answers_is_answered_with_a_problem(data: bytes, status: int, code: str) -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    limits = ConnectionLimits(header_timeout=0.2, body_timeout=0.2, linger_timeout=0.2)
    async with running(asgi(http=wait, websocket=wait), limits, graceful_timeout=0.1) as server:
        async with server.peer(data) as peer:
            with trio.fail_after(5):
                problem = problem_of(await peer.rest())
    assert (problem["status"], problem["code"]) == (status, code)


async def test_the_answer_to_a_head_has_no_body_also_when_no_application_gives_it() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    data = [get(b"/", b"transfer-encoding: chunked", b"content-length: 1", method=b"HEAD"), get(method=b"HEAD")]
    async with running(asgi(http=fail)) as server:
        for each in data:
            async with server.peer(each) as peer:
                with trio.fail_after(5):
                    answer = await peer.rest()
                    assert b"application/problem+json" in answer
                    assert answer.endswith(b"\r\n\r\n")


async def test_http2_is_refused_and_never_offered() -> None:
    async with running(asgi(http=hello)) as server, server.peer(H2_PREFACE) as peer:
        with trio.fail_after(5):
            assert (await peer.rest()).startswith(b"HTTP/1.1 505")


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def path(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    requests = b"".join(get(b"/%d" % number) for number in range(20)) + get(b"/end", b"connection: close")
    async with running(asgi(http=path)) as server, server.peer(requests) as peer:
        with trio.fail_after(5):
            answer = await peer.rest()
    places = [answer.index(b"/%d\r\n" % number) for number in range(20)]
    assert places == sorted(places)
    assert answer.endswith(b"/end\r\n0\r\n\r\n")


async def test_a_connection_goes_on_after_pipelined_requests() -> None:
    async with running(asgi(http=hello)) as server, server.peer() as peer:
        with trio.fail_after(5):
            for number in range(1, 6):
                await peer.send(get() * number)
                for _ in range(number):
                    assert await peer.status() == 200
                    assert await peer.take(5) == b"hello"


# ---- 2: the loop never freezes


@pytest.mark.parametrize("many", [False, True], ids=["send", "send_many"])
async def test_a_handler_that_only_sends_does_not_hold_the_loop_once_its_client_has_left(many: bool) -> None:
    left = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        left.set()
        while True:
            if many:
                await scope["extensions"]["hector.send_many"]([b"chunk"] * 3)
            else:
                await send({"type": "websocket.send", "text": "chunk"})

    async with running(asgi(websocket=websocket, http=hello), graceful_timeout=0.2) as server:
        with trio.fail_after(5):
            async with server.websocket() as peer:
                await left.wait()
                peer.reset()
            for _ in range(5):
                async with server.peer(get()) as other:
                    assert await other.status() == 200


# ---- 3: connections end when they should


@linux
@pytest.mark.parametrize("request_", [get(b"/", b"connection: close"), get(version=b"1.0")], ids=["close", "1.0"])
async def test_a_connection_that_is_to_close_is_closed_also_under_plain_quart_trio(request_: bytes) -> None:
    app = QuartTrio(__name__)

    @app.get("/")
    async def index() -> str:
        return "hello"

    async with running(app) as server:
        before = open_descriptors()
        for _ in range(20):
            async with server.peer(request_) as peer:
                with trio.fail_after(5):
                    assert (await peer.rest()).endswith(b"hello")
        await server.until_open(0)
        assert open_descriptors() == before


async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout() -> None:
    app = QuartTrio(__name__)

    @app.get("/")
    async def index() -> str:
        return "hello"

    async with running(app, ConnectionLimits(keep_alive_timeout=0.2)) as server:
        async with server.peer(get()) as peer:
            with trio.fail_after(5):
                assert (await peer.rest()).endswith(b"hello")
            await server.until_open(0)


@pytest.mark.parametrize("leave", ["fin", "rst", "close frame"])
async def test_a_client_that_leaves_is_told_to_the_application(leave: str) -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await told.started.wait()
            if leave == "fin":
                await peer.stream.aclose()
            elif leave == "rst":
                peer.reset()
            else:
                await peer.send(client_close(4321, b"bye"))
                assert await peer.frame() == (0x88, struct.pack("!H", 4321) + b"bye")
                assert await peer.rest() == b""
            await told.ended.wait()
    code, reason = (4321, "bye") if leave == "close frame" else (1006, "")
    assert told.events[-1] == {"type": "websocket.disconnect", "code": code, "reason": reason}


async def test_a_close_frame_without_a_code_is_answered_without_one() -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x88))
            assert await peer.frame() == (0x88, b"")
            await told.ended.wait()
    assert told.events[-1]["code"] == 1005


async def test_our_close_frame_waits_for_the_clients_and_then_the_connection_ends() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})

    limits = ConnectionLimits(linger_timeout=0.3)
    async with running(asgi(websocket=websocket), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.frame() == (0x88, struct.pack("!H", 4000) + b"enough")
            await peer.send(client_frame(0x81, b"crossing") + client_close(4000))
            assert await peer.rest() == b""
            await server.until_open(0)


async def test_a_client_that_never_answers_our_close_frame_is_left_within_the_linger_timeout() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.close"})

    async with running(asgi(websocket=websocket), ConnectionLimits(linger_timeout=0.2)) as server:
        async with server.websocket():
            await server.until_open(0)


async def test_a_head_that_is_not_completed_is_answered_408() -> None:
    async with running(asgi(http=hello), ConnectionLimits(header_timeout=0.2)) as server:
        async with server.peer(b"GET / HTTP/1.1\r\n") as slow, server.peer() as silent:
            with trio.fail_after(5):
                assert (await slow.rest()).startswith(b"HTTP/1.1 408")
                assert await silent.rest() == b""


async def test_a_trickle_does_not_extend_the_time_for_a_head() -> None:
    async with running(asgi(http=hello), ConnectionLimits(header_timeout=0.3)) as server, server.peer() as peer:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def trickle() -> None:
                    while True:
                        await peer.send(b"a")
                        await pause(0.05)

                nursery.start_soon(trickle)
                await peer.rest()
                nursery.cancel_scope.cancel()
    assert peer.received.startswith(b"HTTP/1.1 408")


async def test_a_body_that_does_not_come_is_answered_408_and_the_application_told() -> None:
    told = Told()

    async def http(scope: Any, receive: Any, send: Any) -> None:
        await told.listen(receive)

    async with running(asgi(http=http), ConnectionLimits(body_timeout=0.2)) as server:
        async with server.peer(post(b"a", announced=10)) as peer:
            with trio.fail_after(5):
                assert (await peer.rest()).startswith(b"HTTP/1.1 408")
                await told.ended.wait()


async def test_a_body_is_not_read_far_ahead_of_the_application() -> None:
    go = trio.Event()

    async def http(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        size = 0
        while (event := await receive())["more_body"]:
            size += len(event["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % size})

    size = 64 << 20
    async with running(asgi(http=http)) as server, server.peer(post(b"", b"connection: close", announced=size)) as peer:
        sent = 0
        with trio.move_on_after(0.5):
            while sent < size:
                sent += await peer.socket.send(BLOCK[: size - sent])
        assert sent < size / 2
        go.set()
        with trio.fail_after(20):
            while sent < size:
                sent += await peer.socket.send(BLOCK[: size - sent])
            assert b"%d" % size in await peer.rest()


async def test_a_stray_byte_behind_a_request_does_not_hide_that_its_client_has_left() -> None:
    told = Told()

    async def http(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await told.listen(receive)

    async with running(asgi(http=http)) as server:
        async with server.peer(get() + b"\r") as peer:
            with trio.fail_after(5):
                assert await peer.status() == 200
        with trio.fail_after(5):
            await told.ended.wait()


async def test_a_client_that_floods_a_stream_with_requests_is_reset() -> None:
    told = Told()

    async def http(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await told.listen(receive)

    async with running(asgi(http=http), ConnectionLimits(header_timeout=0.3)) as server:
        async with server.peer(get()) as peer:
            with trio.fail_after(10):
                with pytest.raises(trio.BrokenResourceError):
                    while True:
                        await peer.send(BLOCK)
                await told.ended.wait()


# ---- 4: writes are bounded, and whole


async def test_a_client_that_does_not_read_is_reset() -> None:
    cancelled = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                while True:
                    await send({"type": "websocket.send", "bytes": BLOCK})

            nursery.start_soon(flood)
            assert (await receive())["type"] == "websocket.disconnect"
            nursery.cancel_scope.cancel()
        cancelled.set()

    before = statistics().reset
    async with running(asgi(websocket=websocket), ConnectionLimits(send_timeout=0.3)) as server:
        async with server.websocket(window=4096) as peer:
            with trio.fail_after(5):
                await cancelled.wait()
            assert statistics().reset == before + 1
            with pytest.raises(trio.BrokenResourceError):
                while await peer.more():
                    pass


async def test_a_client_that_reads_slowly_but_reads_is_not_reset() -> None:
    size = 4 << 20

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.send", "bytes": b"y" * size})
        await send({"type": "websocket.close", "code": 4000})

    async with running(asgi(websocket=websocket), ConnectionLimits(send_timeout=0.3)) as server:
        async with server.websocket(window=65536) as peer:
            with trio.fail_after(20):
                while len(peer.received) < size:
                    await pause(0.01)  # altogether several times the timeout
                    await peer.more()
                assert (await peer.frame())[0] == 0x82
                assert await peer.close_code() == 4000


@pytest.mark.parametrize("many", [False, True], ids=["send", "send_many"])
async def test_a_cancelled_send_leaves_its_message_whole_and_what_follows_behind_it(many: bool) -> None:
    big = os.urandom(8 << 20)
    cancelled = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        with trio.move_on_after(0.1) as scope_:
            if many:
                await scope["extensions"]["hector.send_many"]([big, b"second"], binary=True)
            else:
                await send({"type": "websocket.send", "bytes": big})
        assert scope_.cancelled_caught
        cancelled.set()
        await send({"type": "websocket.send", "text": "after"})
        await send({"type": "websocket.close", "code": 4000})

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(10):
            await cancelled.wait()
            await peer.send(client_frame(0x89, b"1") + client_frame(0x89, b"2"))
            assert await peer.frame() == (0x82, big)
            if many:
                assert await peer.frame() == (0x82, b"second")
            got = [await peer.frame() for _ in range(2)]
            assert (0x81, b"after") in got or await peer.frame() == (0x81, b"after")
            assert await peer.close_code() == 4000


async def test_pings_to_a_full_socket_do_not_pile_up_pongs() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.send", "bytes": b"z" * (8 << 20)})
        await send({"type": "websocket.close"})

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(10):
            for number in range(1000):
                await peer.send(client_frame(0x89, b"%d" % number))
            assert (await peer.frame())[0] == 0x82
            pongs = 0
            while (frame := await peer.frame())[0] == 0x8A:
                pongs += 1
            assert frame[0] == 0x88
            assert pongs <= 2


@linux
async def test_head_and_body_of_a_small_response_leave_in_one_segment() -> None:
    async with running(asgi(http=hello)) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            await peer.until(b"hello")
            assert peer.segments_received() == 1


async def test_the_head_of_a_stream_leaves_before_its_body() -> None:
    async def http(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await Told().listen(receive)

    async with running(asgi(http=http)) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 200


@linux
async def test_the_frames_of_one_send_many_leave_in_one_segment() -> None:
    payloads = [b"", b"a" * 125, b"b" * 126, b"c" * 5000]

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await receive()
        await scope["extensions"]["hector.send_many"](payloads)
        await scope["extensions"]["hector.send_many"]([b"d" * 70_000], binary=True)
        await receive()

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        before = peer.segments_received()
        with trio.fail_after(5):
            await peer.send(client_frame(0x81, b"go"))
            first = await peer.frame()
            assert first == (0x81, b"")
            for payload in payloads[1:]:
                assert await peer.frame() == (0x81, payload)
            assert await peer.frame() == (0x82, b"d" * 70_000)
            assert peer.segments_received() - before <= 1 + 70_000 // 32_768 + 1


async def test_send_many_before_the_acceptance_is_an_error() -> None:
    raised = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(RuntimeError, match="accepted"):
            await scope["extensions"]["hector.send_many"]([b"too early"])
        raised.set()
        await send({"type": "websocket.close"})

    async with running(asgi(websocket=websocket)) as server, server.peer(upgrade()) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 403
            await raised.wait()


# ---- 5: peers that vanished are found


@linux
async def test_a_websocket_peer_that_is_silent_for_two_intervals_is_told_4101_and_reset() -> None:
    told = Told()
    before = statistics().reset
    limits = ConnectionLimits(ping_interval=0.1, linger_timeout=0.2)
    async with running(listener(told), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.close_code() == 4101
            await told.ended.wait()
            assert told.events[-1]["code"] == 4101
            await server.until_open(0)
            assert statistics().reset == before + 1
            assert peer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE


async def test_a_websocket_peer_that_answers_pings_stays() -> None:
    told = Told()
    async with running(listener(told), ConnectionLimits(ping_interval=0.1)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            for _ in range(8):
                assert await peer.frame() == (0x89, b"")
                await peer.send(client_frame(0x8A))
            assert not told.ended.is_set()


async def test_a_listener_finds_vanished_peers_by_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tune_listener(listening)
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    left, right = socket.socketpair()
    with left, right:
        tune_listener(left)


# ---- 6: unread messages


@pytest.mark.parametrize(("number", "size", "code"), [(1000, 1, 1006), (10_000, 1, 1008), (200, 60_000, 1008)])
async def test_unread_messages_hide_no_disconnect_and_are_bounded(number: int, size: int, code: int) -> None:
    go = trio.Event()
    told = Told()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await go.wait()
        await told.listen(receive)

    async with running(asgi(websocket=websocket), ConnectionLimits(linger_timeout=0.2)) as server:
        async with server.websocket() as peer:
            with trio.fail_after(10):
                with suppress(trio.BrokenResourceError):
                    for _ in range(number // 100):
                        await peer.send(client_frame(0x81, b"m" * size) * 100)
                if code == 1008:
                    assert await peer.close_code() == 1008
        assert not told.ended.is_set()
        go.set()
        with trio.fail_after(5):
            await told.ended.wait()
    assert told.events[-1]["code"] == code
    assert len(told.events) <= 1025


async def test_unread_messages_are_bounded_by_their_bytes_not_their_characters() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await trio.sleep_forever()

    limits = ConnectionLimits(max_unread_bytes=3000, linger_timeout=0.2)
    async with running(asgi(websocket=websocket), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x81, "€".encode() * 10) * 100 + client_frame(0x89, b"full"))
            assert await peer.frame() == (0x8A, b"full")
            await peer.send(client_frame(0x81, b"x"))
            assert await peer.close_code() == 1008


async def test_a_handler_that_reads_takes_any_number_of_messages_in_one_packet() -> None:
    seen: list[str] = []

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        while (event := await receive())["type"] == "websocket.receive":
            seen.append(event["text"])

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(10):
            await peer.send(b"".join(client_frame(0x81, b"%d" % number) for number in range(6000)))
            await peer.send(client_close(1000))
            assert await peer.close_code() == 1000
    assert seen == [str(number) for number in range(6000)]


# ---- 7: the end of a server is bounded


async def test_a_client_that_never_reads_does_not_hold_up_the_end() -> None:
    full = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        with trio.move_on_after(0.2):
            await send({"type": "websocket.send", "bytes": b"z" * (16 << 20)})
        full.set()
        while True:
            await send({"type": "websocket.send", "bytes": BLOCK})

    async with running(asgi(websocket=websocket), graceful_timeout=0.5) as server:
        async with server.websocket(window=4096) as peer:
            with trio.fail_after(5):
                await full.wait()
                began = trio.current_time()
                server.stop.set()
                await server.stopped.wait()
                assert trio.current_time() - began < 1.5
                with pytest.raises(trio.BrokenResourceError):
                    while await peer.more():
                        pass


async def test_what_still_runs_when_the_grace_ends_is_cancelled_and_told_1012() -> None:
    told = Told()
    async with running(listener(told), graceful_timeout=0.2) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await told.started.wait()
            server.stop.set()
            assert await peer.close_code() == 1012


async def test_at_the_end_idle_connections_close_at_once_and_requests_are_finished() -> None:
    began, go = trio.Event(), trio.Event()

    async def http(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            began.set()
            await go.wait()
        await hello(scope, receive, send)

    limits = ConnectionLimits(linger_timeout=0.3)
    async with running(asgi(http=http), limits, graceful_timeout=10) as server, AsyncExitStack() as stack:
        idle = await stack.enter_async_context(server.peer(get()))
        unused = await stack.enter_async_context(server.peer())
        busy = await stack.enter_async_context(server.peer(get(b"/slow")))
        with trio.fail_after(5):
            await idle.until(b"hello")
            await began.wait()
            server.stop.set()
            assert await idle.rest() == b""
            assert await unused.rest() == b""
            go.set()
            answer = await busy.rest()
            assert answer.endswith(b"hello")
            assert b"connection: close" in answer.lower()
            await server.stopped.wait()


async def test_the_lifespan_begins_before_and_ends_after_everything_else() -> None:
    order: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            order.append("request")
            await hello(scope, receive, send)
            return
        await receive()
        order.append("startup")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        order.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})

    async with running(app) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            await peer.until(b"hello")
    assert order == ["startup", "request", "shutdown"]


@pytest.mark.parametrize("connected", [False, True])
async def test_an_application_can_learn_of_the_end_of_its_server_before_its_connections_are_cut(
    connected: bool,
) -> None:
    told = Told()
    left: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await listener(told)(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        left.append(await shutdown_begun())
        assert not told.ended.is_set()
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(app, graceful_timeout=0.5))
        with trio.fail_after(5):
            if connected:
                peer = await stack.enter_async_context(server.websocket())
                await told.started.wait()
            server.stop.set()
            if connected:
                assert await peer.close_code() == 1012
            await server.stopped.wait()
    assert left == [0.5 if connected else inf]


async def test_the_end_of_a_server_that_is_not_ours_is_never_learned_of() -> None:
    with trio.move_on_after(0.05) as scope:
        await shutdown_begun()
    assert scope.cancelled_caught


# ---- 8: errors


async def test_an_error_in_a_websocket_is_logged_whole_and_closes_it_with_1011(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        raise ExceptionGroup("two", [ValueError("first"), KeyError("second")])

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.close_code() == 1011
    assert "ValueError: first" in caplog.text
    assert "KeyError: 'second'" in caplog.text
    assert {record.name for record in caplog.records if record.levelno >= logging.ERROR} == {"hector_trio"}


async def test_an_error_before_any_answer_is_a_500() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    async with running(asgi(http=fail, websocket=fail)) as server:
        for data in (get(), upgrade()):
            async with server.peer(data) as peer:
                with trio.fail_after(5):
                    assert problem_of(await peer.rest())["code"] == "internal_error"


async def test_an_error_in_the_middle_of_a_response_cuts_it_visibly() -> None:
    async def http(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("no")

    async with running(asgi(http=http)) as server, server.peer(get()) as peer:
        with trio.fail_after(5):
            answer = await peer.rest()
    assert answer.endswith(b"half\r\n")
    assert b"\r\n0\r\n" not in answer


def test_containing_a_group_logs_its_errors_and_raises_its_cancel(caplog: pytest.LogCaptureFixture) -> None:
    class Stop(KeyboardInterrupt):
        pass

    with pytest.raises(BaseExceptionGroup) as raised:
        contain(BaseExceptionGroup("both", [ValueError("kept"), Stop()]), "what happened")
    assert raised.group_contains(Stop)
    assert not raised.group_contains(ValueError)
    assert "what happened" in caplog.text
    assert "ValueError: kept" in caplog.text


# ---- 9: the rules of RFC 6455


@pytest.mark.parametrize(("data", "code"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
async def test_a_broken_rule_is_answered_with_its_code_and_the_connection_ends(data: bytes, code: int) -> None:
    told = Told()
    limits = ConnectionLimits(max_message_bytes=65536, linger_timeout=0.5)
    async with running(listener(told), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(data)
            first, payload = await peer.frame()
            assert (first, payload) == (0x88, struct.pack("!H", code) + REASONS[code].encode())
            await told.ended.wait()
            assert told.events == [{"type": "websocket.disconnect", "code": code, "reason": REASONS[code]}]
            assert await peer.rest() == b""
        await server.until_open(0)


async def test_a_message_of_exactly_the_limit_is_taken() -> None:
    async with running(asgi(websocket=echo), ConnectionLimits(max_message_bytes=70_000)) as server:
        async with server.websocket() as peer:
            with trio.fail_after(5):
                await peer.send(client_frame(0x82, b"a" * 70_000))
                assert await peer.frame() == (0x82, b"a" * 70_000)
                await peer.send(client_frame(0x01, "ä".encode() * 20_000) + client_frame(0x80, b"b" * 30_000))
                assert await peer.frame() == (0x81, "ä".encode() * 20_000 + b"b" * 30_000)


@linux
async def test_a_peer_that_goes_on_sending_after_1009_is_neither_buffered_nor_endured() -> None:
    forget_peak()
    before = peak_bytes()
    async with running(asgi(websocket=echo), ConnectionLimits(linger_timeout=0.5)) as server:
        async with server.websocket() as peer:
            began = trio.current_time()
            await peer.send(b"\x82\xff" + struct.pack("!Q", 1 << 30) + b"\0\0\0\0")
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                while True:
                    await peer.send(BLOCK * 4)
            assert trio.current_time() - began < 3
    assert peak_bytes() - before < 32 << 20


async def test_an_empty_message_is_a_message() -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x82) + client_frame(0x81) + client_close(1000))
            await told.ended.wait()
    assert [(event["bytes"], event["text"]) for event in told.events[:2]] == [(b"", None), (None, "")]


async def test_pings_are_answered_inside_a_fragmented_message() -> None:
    async with running(asgi(websocket=echo)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x01, b"a") + client_frame(0x89, b"p") + client_frame(0x80, b"b"))
            assert await peer.frame() == (0x8A, b"p")
            assert await peer.frame() == (0x81, b"ab")


async def test_compression_is_refused_unless_configured() -> None:
    offer = b"sec-websocket-extensions: permessage-deflate; client_max_window_bits"
    async with running(asgi(websocket=echo)) as server, server.peer(upgrade(b"/", offer)) as peer:
        with trio.fail_after(5):
            assert b"extensions" not in await peer.until(b"\r\n\r\n")


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


async def test_configured_compression_works_in_both_directions_and_around_control_frames() -> None:
    offer = b"sec-websocket-extensions: permessage-deflate"
    async with running(asgi(websocket=echo), ConnectionLimits(compression=True)) as server:
        async with server.peer(upgrade(b"/", offer)) as peer:
            with trio.fail_after(5):
                assert b"permessage-deflate" in await peer.until(b"\r\n\r\n")
                inflate = zlib.decompressobj(wbits=-15)
                await peer.send(client_frame(0x81, b"plain"))
                first, payload = await peer.frame()
                assert (first, inflate.decompress(payload + b"\0\0\xff\xff")) == (0xC1, b"plain")
                data = deflated(b"packed" * 1000)
                await peer.send(client_frame(0x41, data[:5]) + client_frame(0x89, b"p") + client_frame(0x80, data[5:]))
                assert await peer.frame() == (0x8A, b"p")
                first, payload = await peer.frame()
                assert (first, inflate.decompress(payload + b"\0\0\xff\xff")) == (0xC1, b"packed" * 1000)


@linux
async def test_a_deflate_bomb_is_1009_before_it_is_inflated() -> None:
    compressor = zlib.compressobj(wbits=-15)
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    packet = client_frame(0xC2, bomb)
    forget_peak()
    before = peak_bytes()
    async with running(asgi(websocket=echo), ConnectionLimits(compression=True)) as server:
        async with server.peer(upgrade(b"/", b"sec-websocket-extensions: permessage-deflate")) as peer:
            with trio.fail_after(10):
                assert await peer.status() == 101
                await peer.send(packet)
                assert await peer.close_code() == 1009
    assert peak_bytes() - before < 32 << 20


async def test_a_subprotocol_must_have_been_offered() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        wanted = scope["path"][1:]
        await send({"type": "websocket.accept", "subprotocol": wanted, "headers": [(b"x-a", b"b")]})
        await receive()

    offer = b"sec-websocket-protocol: one, two"
    async with running(asgi(websocket=websocket)) as server:
        with trio.fail_after(5):
            async with server.peer(upgrade(b"/two", offer)) as peer:
                head = await peer.until(b"\r\n\r\n")
                assert b"101" in head
                assert b"sec-websocket-protocol: two\r\n" in head
                assert b"x-a: b\r\n" in head
            async with server.peer(upgrade(b"/three", offer)) as peer:
                assert await peer.status() == 500


# ---- limits of the server


async def test_a_connection_beyond_the_limit_is_told_503_and_the_others_go_on() -> None:
    before = statistics().refused
    async with running(asgi(websocket=echo), ConnectionLimits(max_connections=1)) as server:
        async with server.websocket() as first:
            async with server.peer(get()) as second:
                with trio.fail_after(5):
                    problem = problem_of(await second.rest())
                assert (problem["status"], problem["code"], problem["retryable"]) == (503, "rate_limited", True)
            with trio.fail_after(5):
                await first.send(client_frame(0x81, b"a"))
                assert await first.frame() == (0x81, b"a")
            assert statistics().refused == before + 1
            assert statistics().websockets == 1


async def test_the_access_log_is_told_of_each_response() -> None:
    lines: list[tuple[str, int | None]] = []

    def log(scope: Any, status: int | None, seconds: float) -> None:
        assert seconds >= 0
        lines.append((scope["path"], status))

    async with running(asgi(http=hello, websocket=echo), access_log=log) as server:
        with trio.fail_after(5):
            async with server.peer(get(b"/a")) as peer:
                assert await peer.status() == 200
            async with server.websocket(b"/b"):
                pass
    assert lines == [("/a", 200), ("/b", 101)]


async def test_a_server_listens_on_a_unix_socket_too(tmp_path: Path) -> None:
    from hector_trio.connection import serve

    path = str(tmp_path / "s")
    stop = trio.Event()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        async with trio.open_nursery() as nursery:

            async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
                await serve(asgi(http=hello), [sock], shutdown=stop.wait, task_status=task_status)

            await nursery.start(run)
            with trio.fail_after(5):
                async with Peer(await trio.open_unix_socket(path)).stream as stream:
                    peer = Peer(stream)
                    await peer.send(get(b"/", b"connection: close"))
                    assert (await peer.rest()).endswith(b"hello")
            stop.set()


# ---- installation


def test_a_hypercorn_that_has_changed_is_named_at_import() -> None:
    def changed(self: object, other: object) -> None: ...

    check_hypercorn({changed: "self other"})
    with pytest.raises(ImportError, match=r"Hypercorn 0\.18; version .* changed: .*changed"):
        check_hypercorn({changed: "self app"})


def test_installing_twice_is_installing_once_and_switches_http2_off() -> None:
    install()
    install()
    assert Config().alpn_protocols == ["http/1.1"]
    check_hypercorn({})


# ---- the inbox


async def test_an_inbox_hands_on_in_order_and_refuses_beyond_its_limits() -> None:
    inbox: Inbox[str] = Inbox(3, 10)
    assert inbox.put("a", 4)
    assert not inbox.put("too big", 7)
    assert inbox.put("b", 6)
    assert inbox.put("c")
    assert not inbox.put("too many")
    inbox.close("end")
    inbox.close("ignored")
    assert not inbox.put("too late")
    with trio.fail_after(5):
        assert [await inbox.receive() for _ in range(5)] == ["a", "b", "c", "end", "end"]


async def test_a_cancelled_receive_takes_nothing() -> None:
    inbox: Inbox[str] = Inbox(3, 10)
    inbox.put("a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await inbox.receive()
    assert scope.cancelled_caught
    with trio.fail_after(5):
        assert await inbox.receive() == "a"


# ---- TLS


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and of a client that trusts it and would rather speak HTTP/2."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    client.set_alpn_protocols(["h2", "http/1.1"])
    return server, client


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


async def test_requests_and_websockets_work_over_tls_and_http2_is_not_chosen(tls: Contexts) -> None:
    app = asgi(http=hello, websocket=echo)
    async with running(app, server_context=tls[0], client_context=tls[1]) as server:
        with trio.fail_after(5):
            async with server.peer(get(b"/", b"connection: close")) as peer:
                assert (await peer.rest()).endswith(b"hello")
                assert isinstance(peer.stream, trio.SSLStream)
                assert peer.stream.selected_alpn_protocol() == "http/1.1"
            async with server.websocket() as peer:
                for size in (1, 1000, 500_000):
                    await peer.send(client_frame(0x82, b"m" * size))
                    assert await peer.frame() == (0x82, b"m" * size)
                await peer.send(client_close(1000))
                assert await peer.close_code() == 1000


async def test_a_tls_client_that_does_not_read_is_reset_and_holds_nothing_up(tls: Contexts) -> None:
    told = Told()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                while True:
                    await scope["extensions"]["hector.send_many"]([BLOCK] * 4, binary=True)

            nursery.start_soon(flood)
            await told.listen(receive)
            nursery.cancel_scope.cancel()

    limits = ConnectionLimits(send_timeout=0.3)
    app = asgi(websocket=websocket, http=hello)
    async with running(app, limits, server_context=tls[0], client_context=tls[1]) as server:
        async with server.websocket(window=4096), server.peer(get()) as other:
            with trio.fail_after(5):
                assert await other.status() == 200
                await told.ended.wait()


async def test_a_cancelled_send_over_tls_leaves_its_message_whole(tls: Contexts) -> None:
    big = os.urandom(8 << 20)

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        with trio.move_on_after(0.1):
            await send({"type": "websocket.send", "bytes": big})
        await send({"type": "websocket.send", "text": "after"})
        await send({"type": "websocket.close", "code": 4000})

    async with running(asgi(websocket=websocket), server_context=tls[0], client_context=tls[1]) as server:
        async with server.websocket() as peer:
            with trio.fail_after(10):
                await pause(0.2)
                assert await peer.frame() == (0x82, big)
                assert await peer.frame() == (0x81, b"after")
                assert await peer.close_code() == 4000


async def test_a_handler_that_only_sends_over_tls_does_not_hold_the_loop(tls: Contexts) -> None:
    left = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        left.set()
        while True:
            await send({"type": "websocket.send", "text": "chunk"})

    app = asgi(websocket=websocket, http=hello)
    async with running(app, graceful_timeout=0.2, server_context=tls[0], client_context=tls[1]) as server:
        with trio.fail_after(5):
            async with server.websocket() as peer:
                await left.wait()
                peer.reset()
            for _ in range(3):
                async with server.peer(get()) as other:
                    assert await other.status() == 200


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"], ids=["nothing", "http", "half"])
async def test_a_tls_handshake_that_is_none_ends_within_the_header_timeout(tls: Contexts, data: bytes) -> None:
    async with running(asgi(http=hello), ConnectionLimits(header_timeout=0.2), server_context=tls[0]) as server:
        async with server.peer(data) as peer:
            with trio.fail_after(5):
                await peer.rest()
                await server.until_open(0)
