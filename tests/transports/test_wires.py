"""Beside Quart nothing is lost that anybody could see: whoever looks at a stream's messages sees them all."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from quart.signals import websocket_received, websocket_sent
from quart_trio import QuartTrio

from hector_trio import connection
from hector_trio.server import Serving, limits_of, listen, open_app
from hector_trio.transports.quart_app import HectorWebsocket
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, rejected


def through_quart() -> int:
    """How many WebSockets Quart has in hand."""
    gc.collect()
    return sum(type(each) is HectorWebsocket for each in gc.get_objects())


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Signals are the interpreter's, not the application's."""
    yield
    for signal in (websocket_received, websocket_sent):
        signal.receivers.clear()


async def test_a_stream_nobody_looks_at_goes_beside_quart() -> None:
    async with serving() as server, connected(server) as peer:
        await peer.ask("Count to 3")
        assert (await peer.read_to_final())[-1]["status"] == "completed"
        assert through_quart() == 0


async def test_a_receiver_of_messages_sees_each_chunk() -> None:
    seen: list[Any] = []

    async def look(message: Any) -> None:
        seen.append(message)

    async with serving(prepare=[lambda app: websocket_sent.connect(look, weak=False)]) as server:
        async with connected(server) as peer:
            await peer.ask("Count to 30")
            chunks = await peer.read_to_final()
    assert len(seen) == len(chunks)


@pytest.mark.usefixtures("either_way")
async def test_beside_the_root_path_there_is_no_stream() -> None:
    async with serving(settings_of(server={"root_path": "/below"})) as server:
        server.url = server.url.removesuffix("/below")
        assert (await rejected(server)).status_code == 404


@pytest.mark.parametrize("kind", ["receiver", "middleware"])
async def test_who_takes_time_over_each_message_holds_none_back_that_was_sent(kind: str) -> None:
    got = trio.Event()

    def prepare(app: QuartTrio) -> None:
        inner = app.asgi_app

        async def look(message: Any) -> None:
            await got.wait()

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            async def slow(message: Any) -> None:
                await send(message)
                if message["type"] == "websocket.send":
                    await got.wait()

            await inner(scope, receive, slow)

        if kind == "receiver":
            websocket_sent.connect(look, weak=False)
        else:
            app.asgi_app = wrapped  # type: ignore[method-assign]

    async with serving(prepare=[prepare]) as server, connected(server) as peer:
        await peer.ask("Count to 30")
        with trio.fail_after(5):
            first = await peer.read()
        got.set()
        assert first["seq"] == 1
        assert (await peer.read_to_final())[-1]["status"] == "completed"


async def test_a_hook_that_refuses_is_obeyed() -> None:
    def prepare(app: QuartTrio) -> None:
        @app.before_websocket
        async def refuse() -> tuple[str, int]:
            return "not you", 403

    async with serving(prepare=[prepare]) as server:
        assert (await rejected(server)).status_code == 403


async def test_a_middleware_around_everything_sees_each_chunk() -> None:
    seen: list[Any] = []
    settings = settings_of()
    stop = trio.Event()
    async with open_app(settings) as app, trio.open_nursery() as nursery:

        async def around(scope: Any, receive: Any, send: Any) -> None:
            async def look(message: Any) -> None:
                seen.append(message["type"])
                await send(message)

            await app(scope, receive, look)

        (sock,) = listen(settings.server)
        serve = partial(connection.serve, around, [sock], limits=limits_of(settings), shutdown=stop.wait)
        await nursery.start(serve)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with connected(Served(Serving([url], app.services), stop)) as peer:
            await peer.ask("Count to 30")
            chunks = await peer.read_to_final()
        stop.set()
    assert seen.count("websocket.send") == len(chunks)
