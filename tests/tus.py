"""A client of tus 1.0 for tests, that says exactly what it is told to; and PATCHes over plain sockets that stop."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import trio

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {**TUS, "Content-Type": "application/offset+octet-stream"}


async def create(client: httpx2.AsyncClient, length: int, **headers: str) -> str:
    """The path of a new upload."""
    answer = await client.post("/uploads", headers={**TUS, "Upload-Length": str(length), **headers})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


async def patch(client: httpx2.AsyncClient, path: str, offset: int, data: Any, **headers: str) -> httpx2.Response:
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.patch(path, headers={**BYTES, "Upload-Offset": str(offset), **more}, content=data)


async def offset_of(client: httpx2.AsyncClient, path: str) -> int:
    answer = await client.head(path, headers=TUS)
    assert answer.status_code == 200
    return int(answer.headers["Upload-Offset"])


async def wait_for_offset(client: httpx2.AsyncClient, path: str, offset: int) -> int:
    """The first offset that is at least ``offset``."""
    with trio.fail_after(10):
        while (here := await offset_of(client, path)) < offset:
            pass
    return here


def checksum(data: bytes, algorithm: str = "sha1") -> str:
    return f"{algorithm} {base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"


@asynccontextmanager
async def patching(
    url: str, path: str, offset: int, announced: int, data: bytes, **headers: str
) -> AsyncIterator[trio.SocketStream]:
    """A PATCH of ``announced`` bytes of which only ``data`` has been sent."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        fields = {**BYTES, "Upload-Offset": offset, "Content-Length": announced, **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await stream.send_all(f"PATCH {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{head}\r\n".encode() + data)
        yield stream


async def leave(stream: trio.SocketStream, how: str) -> None:
    """``fin``: the end of the stream; ``rst``: an abrupt reset."""
    if how == "fin":
        await stream.send_eof()
    else:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()


async def answer_of(stream: trio.SocketStream) -> str:
    """All that the server says until it closes."""
    said = b""
    with trio.fail_after(10):
        while data := await stream.receive_some(65536):
            said += data
    return said.decode()
