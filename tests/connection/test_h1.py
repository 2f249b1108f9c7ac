"""What a client may send as a request, and when its connection goes on or ends."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from quart_trio import QuartTrio

from hector_trio.connection import ConnectionLimits
from tests.connection.applications import BLOCK, Told, hello, linux, problem_of
from tests.hostile import (
    H2_PREFACE,
    REQUESTS,
    Hostile,
    Running,
    asgi,
    client_frame,
    get,
    open_descriptors,
    pause,
    post,
    running,
    upgrade,
)
from tests.hostile_app import app as hostile_app

ROOT = Path(__file__).parent.parent.parent


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


async def in_one(scope: Any, receive: Any, send: Any) -> None:
    await scope["extensions"]["hector.request"].respond(200, [(b"content-length", b"2")], b"ok")


async def in_two(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def in_pieces(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"keep-alive")]})
    for piece in (b"o", b"k"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def after_some(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["more_body"]
    await in_two(scope, receive, send)


async def not_at_all(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("no")


UNREAD = {
    "length": post(b"ab", announced=5),
    "chunks": get(b"/", b"transfer-encoding: chunked", method=b"POST") + b"2\r\nab\r\n",
    "last chunk": get(b"/", b"transfer-encoding: chunked", method=b"POST") + b"2\r\nab\r\n0\r\n",
    "HTTP/1.0": post(b"ab", announced=5).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/1.0, keep-alive": post(b"ab", b"connection: keep-alive", announced=5).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HEAD": get(b"/", b"content-length: 5", method=b"HEAD") + b"ab",
    "GET": get(b"/", b"content-length: 5") + b"ab",
}


@pytest.mark.parametrize("answer", [in_one, in_two, in_pieces, after_some, not_at_all])
@pytest.mark.parametrize("data", UNREAD.values(), ids=list(UNREAD))
async def test_an_answer_before_the_whole_body_says_that_it_is_the_last(data: bytes, answer: Any) -> None:
    async with running(asgi(http=answer), ConnectionLimits(linger_timeout=0.1)) as server:
        async with server.peer(data) as peer:
            with trio.fail_after(5):
                head, _, body = (await peer.rest()).partition(b"\r\n\r\n")
    assert head.lower().count(b"\r\nconnection:") == 1
    assert b"\r\nconnection: close" in head.lower()
    assert (body == b"") is data.startswith(b"HEAD")


@pytest.mark.parametrize("answer", [in_one, in_two, in_pieces])
@pytest.mark.parametrize("split", [False, True])
async def test_an_answer_after_the_whole_body_is_not_the_last(answer: Any, split: bool) -> None:
    async def take(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await answer(scope, receive, send)

    data = post(b"abcde")
    async with running(asgi(http=take)) as server, server.peer(data[:-2] if split else data) as peer:
        with trio.fail_after(5):
            if split:
                await pause(0.01)
                await peer.send(data[-2:])
            assert b"close" not in await peer.until(b"\r\n\r\n")
            await peer.until(b"k\r\n0\r\n\r\n" if answer is in_pieces else b"ok")
            await peer.send(get(method=b"HEAD"))
            assert await peer.status() == 200


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
