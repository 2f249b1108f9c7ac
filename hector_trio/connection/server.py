"""What the connections of one server share: its settings, its numbers, and the one task that times them."""

from __future__ import annotations

import contextvars
import ssl
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from time import time
from typing import TYPE_CHECKING, Any, cast

import trio
from hypercorn.config import Config
from hypercorn.logging import Logger
from hypercorn.trio.worker_context import WorkerContext

from hector_trio import http1
from hector_trio.connection.bounds import LOGGER, ConnectionLimits, Phase

if TYPE_CHECKING:
    from hector_trio.connection.socket import Connection

AccessLog = Callable[[Mapping[str, Any], int | None, float], None]
"""Called with the scope, the status (None: the client left first) and the seconds, for each response."""


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Counts over all servers of this process."""

    connections: int
    """Open now."""
    websockets: int
    """Open now, out of `connections`."""
    accepted: int
    """Since the start."""
    refused: int
    """Since the start, because of `max_connections`."""
    reset: int
    """Since the start: cut because the peer read too slowly, fell silent, or broke the protocol."""


class ServeConfig(Config):
    """Hypercorn's settings, as `serve` wants them."""

    def __init__(
        self, limits: ConnectionLimits, ssl_context: ssl.SSLContext | None, access_log: AccessLog | None
    ) -> None:
        self.limits = limits
        self.access = access_log
        self._ssl_context = ssl_context
        self.logger_class = _Log
        self.errorlog = LOGGER
        self.accesslog = None
        self.include_server_header = False
        self.keep_alive_max_requests = 1 << 62

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self._ssl_context


class _Log(Logger):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._access = cast(ServeConfig, config).access

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Where Hypercorn says that it runs, which whoever called ``serve`` says better."""

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        if self._access is not None:
            self._access(request, None if response is None else response["status"], request_time)


class Server:
    """What the connections of one running server share: limits, numbers, and the one task that times them."""

    def __init__(self, limits: ConnectionLimits, graceful_timeout: float, terminated: trio.Event | Any) -> None:
        self.limits = limits
        self.graceful_timeout = graceful_timeout
        self.connections: set[Connection] = set()
        self.refusing = 0
        self._terminated = terminated
        self._sweeping = False
        times = (limits.header_timeout, limits.body_timeout, limits.keep_alive_timeout, limits.ping_interval)
        self._tick = max(0.01, min(1.0, min(times) / 4, limits.linger_timeout / 4))
        self._headers: tuple[int, http1.RawHeaders] = (0, [])

    def response_headers(self, config: Config) -> http1.RawHeaders:
        """The headers that *config* gives every response, made once a second: among them is the date."""
        second = int(time())
        if self._headers[0] != second:
            self._headers = second, config.response_headers("h11")
        return self._headers[1]

    def enter(self, connection: Connection, nursery: trio.Nursery) -> None:
        self.connections.add(connection)
        counts["accepted"] += 1
        if not self._sweeping:
            self._sweeping = True
            nursery.start_soon(self._sweep, name="sweeper connections")

    async def _sweep(self) -> None:
        """Expire what is due. Ends with the last connection, so that it never holds a server up."""
        while self.connections:
            with trio.move_on_after(self._tick):
                if self._terminated.is_set():
                    await trio.sleep_forever()
                await self._terminated.wait()
            now = trio.current_time()
            closing = self._terminated.is_set()
            for connection in tuple(self.connections):
                if closing and connection.http2 is not None:
                    connection.http2.drain()
                if connection.deadline <= now or (closing and connection.idle):
                    await connection.expire()
        self._sweeping = False


_servers: weakref.WeakKeyDictionary[Any, Server] = weakref.WeakKeyDictionary()
installed = ConnectionLimits()
"""What holds for servers that Hypercorn itself starts; set by `install`."""
counts = {"accepted": 0, "refused": 0, "reset": 0}


def server_of(context: Any, config: Config) -> Server:
    server = _servers.get(context)
    if server is None:
        limits = config.limits if isinstance(config, ServeConfig) else installed
        server = _servers[context] = Server(limits, config.graceful_timeout, context.terminated)
    return server


_worker: contextvars.ContextVar[Worker] = contextvars.ContextVar("hector_trio.worker")


class Worker(WorkerContext):
    """Hypercorn's context of one server, which whatever that server starts can find."""

    def __init__(self, max_requests: int | None) -> None:
        super().__init__(max_requests)
        _worker.set(self)


async def shutdown_begun() -> float:
    """Wait, in the lifespan of an application, until its server has begun to shut down.

    Returns the seconds until Hypercorn cancels the connections that are left; `inf` if there has not been any. The
    lifespan's own shutdown comes only after the last connection. Never returns under a server without these classes.
    """
    worker = _worker.get(None)
    if worker is None:
        await trio.sleep_forever()
    await worker.terminated.wait()
    server = _servers.get(worker)
    return inf if server is None else server.graceful_timeout


def statistics() -> ConnectionStatistics:
    """Counts for metrics and for tests that look for leaks."""
    servers = list(_servers.values())
    return ConnectionStatistics(
        connections=sum(len(server.connections) for server in servers),
        websockets=sum(c.phase in (Phase.WEBSOCKET, Phase.CLOSING) for s in servers for c in s.connections),
        **counts,
    )
