"""What one server bounds: how many connections, and how long its end takes."""

from contextlib import AsyncExitStack
from math import inf
from typing import Any

import pytest
import trio

from hector_trio.connection import ConnectionLimits, shutdown_begun, statistics
from tests.connection.applications import BLOCK, Told, echo, hello, listener, problem_of
from tests.hostile import accept, asgi, client_frame, get, running


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
