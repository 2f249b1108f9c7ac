"""The peer: the same agents as plain Starlette WebSockets under uvicorn, and a POST; nothing is stored on disk."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.bench.load import TEXT, Ticks


class Ticker:
    """Wakes all agents that wait for the next tick."""

    def __init__(self) -> None:
        self.ticks = Ticks()
        self._next = asyncio.Event()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.ticks.until_next())
            self.ticks.count += 1
            self._next.set()
            self._next = asyncio.Event()

    async def wait_beyond(self, number: int) -> None:
        while self.ticks.count <= number:
            await self._next.wait()


ticker = Ticker()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def chunk(seq: int, kind: str, content: str, *, final: bool) -> str:
    return json.dumps(
        {"taskId": "t", "seq": seq, "chunkType": kind, "content": content, "timestamp": now(), "final": final},
        separators=(",", ":"),
    )


async def burst(websocket: WebSocket, count: int) -> None:
    for seq in range(1, count + 1):
        await websocket.send_text(chunk(seq, "text", TEXT, final=False))
    await websocket.send_text(chunk(count + 1, "done", "", final=True))


async def paced(websocket: WebSocket, count: int) -> None:
    before = ticker.ticks.count
    for number in range(before, before + count):
        await ticker.wait_beyond(number)
        await websocket.send_text(chunk(number - before + 1, "text", ticker.ticks.text(number + 1), final=False))
    await websocket.send_text(chunk(count + 1, "done", "", final=True))


async def idle(websocket: WebSocket, count: int) -> None:
    await websocket.send_text(chunk(1, "text", TEXT, final=False))


def stream(agent: Callable[[WebSocket, int], Awaitable[None]]) -> WebSocketRoute:
    async def answer(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            request = json.loads(await websocket.receive_text())
            await agent(websocket, int(request["input"]["content"]))
            await websocket.receive()
        except WebSocketDisconnect:
            pass

    return WebSocketRoute(f"/agents/{agent.__name__}/stream", answer)


sessions: dict[str, dict[str, Any]] = {}


async def create_session(request: Request) -> JSONResponse:
    asked = json.loads(await request.body())
    at = now()
    session = {
        "sessionId": str(uuid.uuid4()),
        "agentId": asked["agentId"],
        "createdAt": at,
        "lastActivityAt": at,
        "state": {},
        "metadata": asked.get("metadata", {}),
    }
    sessions[session["sessionId"]] = session
    return JSONResponse(session, 201, {"Location": f"/sessions/{session['sessionId']}"})


@asynccontextmanager
async def ticking(app: Starlette) -> AsyncIterator[None]:
    task = asyncio.create_task(ticker.run())
    try:
        yield
    finally:
        task.cancel()


def main(ws: str, loop: str = "asyncio") -> None:
    routes = [*map(stream, (burst, paced, idle)), Route("/sessions", create_session, methods=["POST"])]
    app = Starlette(routes=routes, lifespan=ticking)
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(sock.getsockname()[1], flush=True)
    config = uvicorn.Config(app, ws=ws, loop=loop, log_level="error", ws_per_message_deflate=False)
    uvicorn.Server(config).run([sock])  # given as ``fd``, it would be taken for a Unix socket: no TCP_NODELAY


if __name__ == "__main__":
    main(*sys.argv[1:])
