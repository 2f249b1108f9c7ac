"""Reads and writes that are bounded and whole, in the clear and over TLS."""

import os
import socket
from typing import Any

import pytest
import trio

from hector_trio.connection import ConnectionLimits, statistics, tune_listener
from tests.connection.applications import BLOCK, Contexts, Told, echo, hello, tls
from tests.hostile import accept, asgi, client_close, client_frame, get, pause, running

__all__ = ["tls"]


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


async def test_a_listener_finds_vanished_peers_by_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tune_listener(listening)
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    left, right = socket.socketpair()
    with left, right:
        tune_listener(left)


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
