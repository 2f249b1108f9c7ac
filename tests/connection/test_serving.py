"""Serving from the first to the last, and being installed in Hypercorn."""

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from hypercorn.config import Config

from hector_trio.connection import install, serve
from hector_trio.connection.serving import check_hypercorn
from tests.connection.applications import hello
from tests.hostile import Peer, asgi, get, running


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


async def test_a_server_listens_on_a_unix_socket_too(tmp_path: Path) -> None:
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
