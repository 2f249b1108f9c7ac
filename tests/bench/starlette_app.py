"""The peer: the same stream as a plain Starlette WebSocket under uvicorn, which stores nothing."""

from __future__ import annotations

import json
import socket
import sys
from datetime import UTC, datetime

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket


async def stream(websocket: WebSocket) -> None:
    await websocket.accept()
    request = json.loads(await websocket.receive_text())
    count, size = map(int, request["input"]["content"].split())
    text = "x" * size
    for seq in range(1, count + 1):
        await websocket.send_text(chunk(seq, "text", text, final=False))
    await websocket.send_text(chunk(count + 1, "done", "", final=True))
    await websocket.receive()


def chunk(seq: int, kind: str, content: str, *, final: bool) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps(
        {"taskId": "t", "seq": seq, "chunkType": kind, "content": content, "timestamp": now, "final": final},
        separators=(",", ":"),
    )


def main(ws: str) -> None:
    app = Starlette(routes=[WebSocketRoute("/agents/burst/stream", stream)])
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(sock.getsockname()[1], flush=True)
    uvicorn.run(app, fd=sock.fileno(), ws=ws, log_level="error", ws_per_message_deflate=False)


if __name__ == "__main__":
    main(sys.argv[1])
