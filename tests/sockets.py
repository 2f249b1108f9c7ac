"""WebSocket clients for tests: one that speaks properly, one that is only a socket and leaves as a test wants."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from tests import HANG
from tests.serving import Served


@asynccontextmanager
async def connected(server: Served, agent: str = "assistant", **options: Any) -> AsyncIterator[Peer]:
    """The stream is ours: the library leaves it open when the server closes or refuses."""
    async with await trio.open_tcp_stream(*server.address) as stream, trio.open_nursery() as nursery:
        websocket = await wrap_client_stream(nursery, stream, server.host, f"/agents/{agent}/stream", **options)
        async with websocket:
            yield Peer(websocket)


async def rejected(server: Served, agent: str = "assistant", **options: Any) -> ConnectionRejected:
    """The refusal that the server gives instead of an upgrade."""
    try:
        async with connected(server, agent, **options):
            raise AssertionError("the upgrade was accepted")
    except ExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, ExceptionGroup):
            found = found.exceptions[0]
        if isinstance(found, ConnectionRejected):
            return found
        raise


class Peer:
    """A client that sends JSON and reads JSON."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self.websocket = websocket

    async def send(self, frame: Any) -> None:
        await self.websocket.send_message(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def ask(self, text: str, **request: Any) -> None:
        await self.send({"input": {"type": "text/plain", "content": text}, **request})

    async def read(self) -> dict[str, Any]:
        with trio.fail_after(HANG):
            frame: dict[str, Any] = json.loads(await self.websocket.get_message())
            return frame

    async def read_to_final(self) -> list[dict[str, Any]]:
        """The frames up to the first final chunk."""
        frames = [await self.read()]
        while not frames[-1].get("final"):
            frames.append(await self.read())
        return frames

    async def close_code(self) -> int:
        """The code with which the server closes, whatever it says before that."""
        with trio.fail_after(HANG):
            with suppress(ConnectionClosed):
                while True:
                    await self.websocket.get_message()
        assert self.websocket.closed is not None
        return self.websocket.closed.code


class RawPeer:
    """A WebSocket client over a plain socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.received = bytearray()
        self._reading = False
        self._moved = trio.lowlevel.ParkingLot()

    async def send_text(self, text: str) -> None:
        data = text.encode()
        mask = os.urandom(4)
        size = bytes((0x80 | len(data),)) if len(data) < 126 else struct.pack("!BH", 0x80 | 126, len(data))
        await self.stream.send_all(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    async def ask(self, text: str, **request: Any) -> None:
        await self.send_text(json.dumps({"input": {"type": "text/plain", "content": text}, **request}))

    async def wait_for(self, text: bytes) -> None:
        with trio.fail_after(HANG):
            while text not in self.received:
                if self._reading:
                    await self._moved.park()
                    continue
                data = await self.stream.receive_some(65536)
                assert data, "the server closed the connection"
                self.received += data

    async def read_on(self) -> None:
        """Reads until the server closes, however it does, and answers pings."""
        self._reading = True
        with suppress(trio.BrokenResourceError):
            while data := await self.stream.receive_some(65536):
                self.received += data
                self._moved.unpark_all()
                if b"\x89\x00" in data:
                    await self.stream.send_all(b"\x8a\x80\0\0\0\0")

    async def leave(self, how: str) -> None:
        """``close``: a Close frame; ``fin``: the end of the stream; ``rst``: an abrupt reset."""
        if how == "close":
            await self.stream.send_all(b"\x88\x82\0\0\0\0" + struct.pack("!H", 1000))
        elif how == "fin":
            await self.stream.send_eof()
        else:
            self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.stream.socket.close()


async def connect_raw(url: str, agent: str = "assistant", *, receive_buffer: int | None = None) -> RawPeer:
    """The caller closes ``stream``. ``receive_buffer``: bytes that the kernel takes for a client that does not read."""
    host, _, port = url.split("://")[1].rpartition(":")
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect((host, int(port)))
    peer = RawPeer(trio.SocketStream(sock))
    key = base64.b64encode(os.urandom(16)).decode()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(peer.stream)
        await peer.stream.send_all(
            f"GET /agents/{agent}/stream HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await peer.wait_for(b"\r\n\r\n")
        assert peer.received.startswith(b"HTTP/1.1 101")
        stack.pop_all()
    return peer


@asynccontextmanager
async def raw(server: Served, agent: str = "assistant") -> AsyncIterator[RawPeer]:
    peer = await connect_raw(server.url, agent)
    async with peer.stream:
        yield peer
