"""A wire between a client and a server, which a test cuts: by FIN, RST or silence, at a byte or now."""

from __future__ import annotations

import math
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, NamedTuple

import trio

How = Literal["fin", "rst", "silence"]


class Cut(NamedTuple):
    """One connection is cut by ``how`` when so many bytes have passed down from the server, or up from the client."""

    how: How
    down: float = math.inf
    up: float = math.inf


class Wire:
    """Connections in order: the first of ``cuts`` is for the next one, and those beyond them are left alone."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.cuts: deque[Cut] = deque()
        self.connections = 0
        self.open: list[Connection] = []

    def cut(self, how: How) -> None:
        """Cuts everything that is open."""
        for connection in list(self.open):
            connection.cut(how)


class Connection:
    """One of them. ``down`` and ``up``: so many bytes may still pass before it is cut by ``how``."""

    def __init__(self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope, cut: Cut) -> None:
        self.how, self.down, self.up = cut
        self._near, self._far = near, far
        self._scope = scope
        self._silent = False

    async def carry(self) -> None:
        if self.down <= 0 or self.up <= 0:
            self.cut(self.how)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, self._near, self._far, "up")
            nursery.start_soon(self._pass_on, self._far, self._near, "down")

    async def _pass_on(self, source: trio.SocketStream, target: trio.SocketStream, way: Literal["down", "up"]) -> None:
        try:
            while data := bytes(await source.receive_some(65536)):
                left = getattr(self, way)
                if not self._silent:
                    await target.send_all(data[: int(min(left, len(data)))])
                    setattr(self, way, left - len(data))
                if left <= len(data):
                    self.cut(self.how)
            if not self._silent:
                await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._scope.cancel()

    def cut(self, how: How) -> None:
        """``rst``: both sides are told that it broke; ``fin``: that nothing more comes; ``silence``: nothing at all."""
        if how == "silence":
            self._silent = True
            return
        if self._scope.cancel_called:
            return
        if how == "rst":
            for stream in (self._near, self._far):
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._near.socket.close()
        self._far.socket.close()
        self._scope.cancel()


@asynccontextmanager
async def wire_to(address: tuple[str, int]) -> AsyncIterator[Wire]:
    """A wire to the server at ``address``, which need not be there all the time."""

    async def carry(near: trio.SocketStream) -> None:
        wire.connections += 1
        cut = wire.cuts.popleft() if wire.cuts else Cut("fin")
        try:
            far = await trio.open_tcp_stream(*address)
        except OSError:
            return
        async with near, far:
            with trio.CancelScope() as scope:
                connection = Connection(near, far, scope, cut)
                wire.open.append(connection)
                try:
                    await connection.carry()
                finally:
                    wire.open.remove(connection)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        wire = Wire(listener.socket.getsockname()[1])
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        yield wire
        nursery.cancel_scope.cancel()
