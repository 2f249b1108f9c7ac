"""Hypercorn's connection classes, subclassed so that no connection can end, freeze or exhaust the process.

The only module that knows Hypercorn's internals (`http2`, the other protocol of a connection, knows its events). How it
works:

- Everything that *decides* here is synchronous: bytes are written at once or queued, states change, and only then does
  the sender wait (`Connection.pace`). A cancel can therefore never split a clean-up or a frame.
- One queue of unsent bytes per connection, and one task that empties it, which exists only for a connection whose
  socket has once been full. Whoever is cancelled while waiting leaves the bytes in the queue, in order.
- One number per connection, `deadline`, and one task per server that looks at all of them, instead of a timer each.
- The reader never waits for the application: what it has read goes to an `Inbox` with a limit.
"""

import contextvars
import inspect
import logging
import os
import socket as stdlib_socket
import ssl
import struct
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from importlib.metadata import version
from math import inf
from time import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from uuid import uuid4

import h11
import hypercorn.trio.run
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.events import Closed, RawData
from hypercorn.events import Event as ConnectionEvent
from hypercorn.logging import Logger
from hypercorn.protocol.events import Body, Data, EndBody, Event, Request, Response, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework, ConnectionState, LifespanState
from hypercorn.utils import parse_socket_addr, repr_socket_addr
from wsproto.connection import Connection as WebSocketParser
from wsproto.connection import ConnectionState as ParserState
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage
from wsproto.extensions import Extension
from wsproto.handshake import server_extensions_handshake
from wsproto.utilities import generate_accept_token

from . import frames, http1

if TYPE_CHECKING:
    from .http2 import Http2

LOGGER = logging.getLogger("hector_trio")

MAX_RECV = 65536
SENDS_PER_CHECKPOINT = 64
MAX_CORKED = 16384
"""Bytes of a frame that does not wait for others to leave with."""
EVENTS_PER_CHECKPOINT = 32
EARLY_BYTES = 32768
"""Bytes a client may send behind its upgrade request before it has been answered."""
BODY_AHEAD = 262144
"""Bytes of a request body read ahead of the application."""
TLS_AHEAD = 65536
"""Bytes queued for encryption before a sender waits."""
MAX_REFUSALS = 64
"""Connections beyond `max_connections` that are being told so at one time; further ones are simply closed."""

_T = TypeVar("_T")
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may cost. Times are seconds, sizes are bytes."""

    send_timeout: float = 10.0
    """From the first byte that could not be written; begins again with every byte accepted (over TLS: with every record
    of 16 KiB). Then the connection is reset."""
    header_timeout: float = 10.0
    """For a complete request head, and for the TLS handshake."""
    body_timeout: float = 30.0
    """Without a byte of an announced request body, while the application is ready to take it."""
    keep_alive_timeout: float = 75.0
    """Idle between two requests."""
    ping_interval: float = 20.0
    """Between WebSocket pings. A peer from which and to which no byte moved for two intervals is gone:
    Close 4101, reset."""
    linger_timeout: float = 2.0
    """How long a peer may take to answer our end of the connection with its own; what it still sends is dropped."""
    max_message_bytes: int = 1 << 20
    """Of one WebSocket message, inflated; beyond: 1009, and the connection is closed."""
    max_unread_messages: int = 1024
    """WebSocket messages the application has not read; beyond: 1008."""
    max_unread_bytes: int = 4 << 20
    """Bytes in those messages; beyond: 1008."""
    max_connections: int = 10_000
    """Of one server; beyond: 503 with Retry-After over plain HTTP, otherwise closed."""
    max_header_bytes: int = 64 << 10
    """Of a request head; beyond: 431. Also of requests pipelined behind one that is being answered: beyond, reading
    stops, and if that lasts `header_timeout` the connection is reset."""
    compression: bool = False
    """Whether permessage-deflate is accepted when a client offers it."""
    http2: bool = False
    """Whether HTTP/2 is spoken too: on plain sockets with who begins with its preface, over TLS with who chooses it."""


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


class Inbox(Generic[_T]):
    """What one task has received and another has not yet taken, with a limit on its number and its bytes.

    Putting never waits, so that whoever puts also notices the end of the connection. Not for several receivers.
    """

    __slots__ = (
        "_arrived",
        "_items",
        "_last",
        "_max_bytes",
        "_max_items",
        "_taken",
        "bytes",
    )

    def __init__(self, max_items: float, max_bytes: float) -> None:
        self.bytes = 0
        self._items: deque[tuple[_T, int]] = deque()
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._last: tuple[_T] | None = None
        self._arrived = trio.lowlevel.ParkingLot()
        self._taken: trio.lowlevel.ParkingLot | None = None

    def put(self, item: _T, size: int = 0) -> bool:
        """Add *item* of *size* bytes; False, and nothing is kept, if that would pass a limit or after `close`."""
        if self._last is not None or len(self._items) >= self._max_items or self.bytes + size > self._max_bytes:
            return False
        self._items.append((item, size))
        self.bytes += size
        if self._arrived:
            self._arrived.unpark()
        return True

    def close(self, last: _T) -> None:
        """Nothing more comes: once all else is taken, `receive` returns *last*, again and again."""
        if self._last is None:
            self._last = (last,)
            if self._arrived:
                self._arrived.unpark_all()
            if self._taken is not None:
                self._taken.unpark_all()

    async def receive(self) -> _T:
        """Take the oldest item, waiting for one. A cancel takes nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            if self._last is not None:
                await trio.lowlevel.checkpoint()
                return self._last[0]
            await self._arrived.park()
        item, size = self._items.popleft()
        self.bytes -= size
        if self._taken is not None:
            self._taken.unpark_all()
        return item

    async def wait_below(self, limit: int) -> None:
        """Wait until at most *limit* bytes are unread, or the inbox is closed."""
        while self.bytes > limit and self._last is None:
            self._taken = self._taken or trio.lowlevel.ParkingLot()
            await self._taken.park()


def contain(error: BaseException, what: str) -> None:
    """Log *error* with its traceback as *what*, except for what nobody may stop (a cancel, Ctrl-C): that is raised.

    Call it in the `except (Exception, BaseExceptionGroup)` of a request, a connection or a run. Of a group that holds
    both, the errors are logged and the cancel goes on.
    """
    rest: BaseException | None = error
    vital: BaseException | None = None
    if isinstance(error, BaseExceptionGroup):
        vital, rest = error.split((trio.Cancelled, KeyboardInterrupt, SystemExit, GeneratorExit))
    if rest is not None:
        LOGGER.error(what, exc_info=rest)
    if vital is not None:
        raise vital


class _Phase(Enum):
    """What a connection's deadline means."""

    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    IDLE = auto()
    WEBSOCKET = auto()
    CLOSING = auto()
    LINGER = auto()


class _Server:
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

    def enter(self, connection: "Connection", nursery: trio.Nursery) -> None:
        self.connections.add(connection)
        _counts["accepted"] += 1
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


_servers: "weakref.WeakKeyDictionary[Any, _Server]" = weakref.WeakKeyDictionary()
_installed = ConnectionLimits()
_counts = {"accepted": 0, "refused": 0, "reset": 0}


def _server_of(context: Any, config: Config) -> _Server:
    server = _servers.get(context)
    if server is None:
        limits = config.limits if isinstance(config, _ServeConfig) else _installed
        server = _servers[context] = _Server(limits, config.graceful_timeout, context.terminated)
    return server


_worker: contextvars.ContextVar["_Worker"] = contextvars.ContextVar("hector_trio.worker")


class _Worker(WorkerContext):
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
        websockets=sum(c.phase in (_Phase.WEBSOCKET, _Phase.CLOSING) for s in servers for c in s.connections),
        **_counts,
    )


class Connection(TCPServer):
    """One accepted socket: its reader (this task), its unsent bytes, and its one deadline."""

    protocol: "_Http1 | Http2"  # type: ignore[assignment]

    def __init__(self, app: AppWrapper, config: Config, context: Any, state: LifespanState, stream: Any) -> None:
        # Instead of the base class's own, which makes two locks
        self.app, self.config, self.context, self.state, self.stream = app, config, context, state, stream
        self.tls = isinstance(stream, trio.SSLStream)
        self.socket: trio.socket.SocketType = stream.transport_stream.socket if self.tls else stream.socket
        self.server = _server_of(context, config)
        self.limits = self.server.limits
        self.phase = _Phase.HEAD
        self.deadline = inf
        self.gone = False
        """No byte can be sent any more."""
        self.finishing = False
        """Nothing more will be queued; what is queued is still sent, what is received is dropped."""
        self.hopeless = False
        """The peer is believed to be dead: end with RST, not with FIN."""
        self.moved = False
        """Whether a byte of the peer's or of the application's moved since this was last reset."""
        self.http2: Http2 | None = None
        """The protocol, if it is that."""
        self._heard = False
        self._unsent = bytearray()
        self.is_corked = False
        """Whether what is written is being collected for one write."""
        self._corked: list[bytes] = []
        self._ahead = TLS_AHEAD if self.tls else 0
        self._pong: bytes | None = None
        self._budget = SENDS_PER_CHECKPOINT
        self._sent: trio.lowlevel.ParkingLot | None = None
        self._work: trio.lowlevel.ParkingLot | None = None
        self._flushing = False
        self._pausing: trio.CancelScope | None = None
        """Around the reader while it waits for something other than the peer."""
        self._nursery: trio.Nursery
        self._context: contextvars.Context

    # ---- life

    async def run(self) -> None:
        """Serve the connection until it ends. Raises only a cancel, or what is meant to end the process."""
        server = self.server
        nursery = trio.lowlevel.current_task().parent_nursery
        assert nursery is not None
        try:
            if len(server.connections) >= self.limits.max_connections:
                await self._refuse()
                return
            server.enter(self, nursery)
            await self._serve()
        except OSError:
            pass  # the peer left before we could ask for its name
        except (Exception, BaseExceptionGroup) as error:
            contain(error, "A connection failed")
        finally:
            self._leave()

    async def _serve(self) -> None:
        self.deadline = trio.current_time() + self.limits.header_timeout
        if not self.socket.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE):
            tune_listener(self.socket)  # a listening socket of ours has handed it down
        family = self.socket.family
        client = parse_socket_addr(family, self.socket.getpeername())
        server = parse_socket_addr(family, self.socket.getsockname())
        trio.lowlevel.current_task().name = f"connection {repr_socket_addr(family, self.socket.getpeername())}"
        if self.tls and not await self._shake_hands():
            return
        self._context = contextvars.copy_context()
        async with trio.open_nursery() as self._nursery:
            first = await self._chosen(client, server)
            await self._read(first)
            self._leave()
            await self.protocol.handle(Closed())

    async def _shake_hands(self) -> bool:
        with trio.move_on_after(self.limits.header_timeout):
            try:
                await self.stream.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
            return self.stream.selected_alpn_protocol() in (None, *alpn(self.limits))
        return False

    async def _chosen(self, client: tuple[str, int] | None, server: tuple[str, int] | None) -> bytes:
        """Choose the protocol. Returns what was read for that, none if nothing had to be or will ever be."""
        first, speaks = b"", False
        if self.limits.http2:
            from . import http2

            speaks = self.tls and self.stream.selected_alpn_protocol() == "h2"
            if not self.tls:
                while not speaks and http2.PREFACE.startswith(first):
                    data = await self._receive()
                    first += data
                    speaks = first.startswith(http2.PREFACE)
                    if not data:
                        break
            if speaks:
                self.protocol = self.http2 = http2.Http2(self, client, server)
                return first
        self.protocol = _Http1(self, client, server)
        return first

    async def _read(self, first: bytes) -> None:
        while True:
            data = first or await self._receive()
            first = b""
            if not data:
                return
            if self.finishing:
                continue
            self.moved = True
            if self.phase is _Phase.IDLE or not self._heard:
                self._heard = True
                self.wait_for(_Phase.HEAD, self.limits.header_timeout)
            elif self.phase is _Phase.BODY:
                self.wait_for(_Phase.BODY, self.limits.body_timeout)
            await self.protocol.handle(RawData(data))
            if not self.gone and self.protocol.is_ahead:
                with trio.CancelScope() as self._pausing:
                    await self.protocol.room()
                self._pausing = None

    async def _receive(self) -> bytes:
        """The next bytes; none when there will be none."""
        try:
            if self.tls:
                return bytes(await self.stream.receive_some(MAX_RECV))
            while not self.gone:
                # First the wait, which is the checkpoint too: as a rule nothing has come yet.
                await trio.lowlevel.wait_readable(self.socket.fileno())
                with suppress(BlockingIOError):
                    return os.read(self.socket.fileno(), MAX_RECV)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        return b""

    async def _refuse(self) -> None:
        """Say why, when that is cheap; no request is read."""
        _counts["refused"] += 1
        if self.tls or self.server.refusing >= MAX_REFUSALS:
            return
        self.server.refusing += 1
        try:
            self.write(frames.problem_alone(503, str(uuid4())))
            self.socket.shutdown(stdlib_socket.SHUT_WR)
            with trio.move_on_after(self.limits.linger_timeout):
                while await self.stream.receive_some(MAX_RECV):
                    pass
        except (OSError, trio.BrokenResourceError):
            pass
        finally:
            self.server.refusing -= 1

    def spawn(self, function: Callable[[], Awaitable[None]], name: str) -> None:
        """Start a task of this connection, with the connection's context variables rather than its starter's."""
        self._context.run(partial(self._nursery.start_soon, function, name=name))

    # ---- time

    def wait_for(self, phase: _Phase, seconds: float) -> None:
        self.phase = phase
        self.deadline = trio.current_time() + seconds

    @property
    def idle(self) -> bool:
        """Whether nobody would miss this connection."""
        return self.phase is _Phase.IDLE or (self.phase is _Phase.HEAD and not self._heard)

    async def expire(self) -> None:
        """The deadline has passed, or the server is closing and the connection is idle."""
        try:
            if self.idle:
                if self.http2 is not None:
                    self.http2.leave()
                else:
                    self._leave()
            elif self.phase in (_Phase.HEAD, _Phase.BODY):
                await self.protocol.time_out()
            elif self.phase is _Phase.WEBSOCKET:
                self.wait_for(_Phase.WEBSOCKET, self.limits.ping_interval)
                await cast(_WebSocket, self.protocol.stream).beat()
            elif self.phase is _Phase.CLOSING:
                self.finish()
            elif self.hopeless:
                self.reset("is silent")
            else:
                self._leave()  # FIN is sent already; the kernel delivers what is still on its way
        except (Exception, BaseExceptionGroup) as error:
            contain(error, "A connection failed")
            self.reset("failed")

    # ---- writing

    async def protocol_send(self, event: ConnectionEvent) -> None:
        """What Hypercorn's protocol classes call. Never waits; `Updated` is told by the phases instead."""
        if isinstance(event, RawData):
            self.write(event.data)
        elif isinstance(event, Closed):
            self.finish()

    def write(self, data: bytes) -> None:
        """Send what the socket takes now and queue the rest behind what is queued already. Never waits or raises."""
        if self.is_corked:
            self._corked.append(data)
            if len(data) > MAX_CORKED:
                self.uncork()
                self.is_corked = True
            return
        if self.gone or self.finishing:
            return
        if self._unsent or self.tls:
            self._unsent += data
            self._wake()
            return
        try:
            # fileno() is -1 once closed, so that a late write can never reach another connection's descriptor.
            accepted = os.write(self.socket.fileno(), data)
        except BlockingIOError:
            accepted = 0
        except OSError:
            self._leave()
            return
        if accepted < len(data):
            self._unsent += memoryview(data)[accepted:]
            self._wake()

    def together(self, sending: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Await *sending*. What it writes leaves in one write, in order: at its end and whenever it is made to wait, by
        anybody."""
        return Together(self, sending)

    def uncork(self) -> None:
        self.is_corked = False
        if self._corked:
            corked, self._corked = self._corked, []
            self.write(b"".join(corked))

    @property
    def full(self) -> bool:
        """Whether `pace` would wait for the socket, or what was written went nowhere."""
        return self.gone or self.finishing or len(self._unsent) > self._ahead

    @property
    def backlog(self) -> int:
        """Bytes that wait for the socket."""
        return len(self._unsent)

    async def emptied(self) -> None:
        """Wait until none do, or the connection is gone."""
        if self._unsent and not self.gone:
            self._sent = self._sent or trio.lowlevel.ParkingLot()
            await self._sent.park()

    def pong(self, payload: bytes) -> None:
        """Answer a ping; while the socket is full only the newest is answered (RFC 6455, 5.5.3), so none pile up."""
        if self._unsent:
            self._pong = payload
        else:
            self.write(frames.frame(frames.PONG, payload))

    def ping(self) -> None:
        """Ask the peer for a sign of life; a full socket is watched by `send_timeout` already."""
        if not self._unsent:
            self.write(frames.frame(frames.PING, b""))

    async def pace(self, sends: int = 1) -> None:
        """Where whoever has written *sends* things waits: for the socket if it is full, else for its turn.

        A cancel leaves what was written queued, complete and in order.
        """
        if self.spend(sends):
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        self._budget = SENDS_PER_CHECKPOINT
        self.uncork()
        if self.gone or self.finishing:
            await trio.lowlevel.checkpoint()
        elif len(self._unsent) > self._ahead:
            self._sent = self._sent or trio.lowlevel.ParkingLot()
            await self._sent.park()
        else:
            self.moved = True
            await trio.lowlevel.checkpoint()

    def spend(self, sends: int = 1) -> bool:
        """Whether *sends* more things may be written before whoever writes has to wait for its turn."""
        self._budget -= sends
        if self._budget <= 0 or self.full:
            return False
        self.moved = True
        return True

    def finish(self) -> None:
        """Send what is queued, then our end; then wait for the peer's, at most `linger_timeout`."""
        if self.gone or self.finishing:
            return
        self.uncork()
        self.finishing = True
        self.phase = _Phase.LINGER
        if self._unsent:
            self.deadline = inf  # send_timeout holds until the queue is empty
            self._wake()
        else:
            self._send_end()

    def reset(self, why: str) -> None:
        """End the connection at once with RST: nothing of it stays in the kernel."""
        if self.gone:
            return
        LOGGER.debug("Connection reset: the peer %s", why)
        _counts["reset"] += 1
        with suppress(OSError):
            self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _RESET)
        self._leave()

    def _leave(self) -> None:
        """Close the socket and wake everybody who waits for it."""
        if self.gone:
            return
        self.gone = True
        self.deadline = inf
        self.server.connections.discard(self)  # its application may go on for a while: a detached run does
        if self._unsent:
            # The peer does not read: with FIN the kernel would keep what it holds for as long as the peer likes.
            self._unsent.clear()
            with suppress(OSError):
                self.socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, _RESET)
        self.socket.close()
        if not self.tls:
            vars(self.stream)["aclose"] = (
                _closed  # Trio's server closes once more, with a cancel scope and two checkpoints
            )
        if self._pausing is not None:
            self._pausing.cancel()
        for waiting in (self._sent, self._work):
            if waiting is not None:
                waiting.unpark_all()

    def _send_end(self) -> None:
        try:
            self.socket.shutdown(stdlib_socket.SHUT_WR)
        except OSError:
            self._leave()
        else:
            self.deadline = trio.current_time() + self.limits.linger_timeout

    def _wake(self) -> None:
        if self._work is not None:
            self._work.unpark_all()
        elif not self._flushing:
            self._flushing = True
            self.spawn(self._flush, "flusher")

    async def _flush(self) -> None:
        """Empty the queue whenever it fills, for as long as the peer takes something every `send_timeout`."""
        deadline = trio.current_time() + self.limits.send_timeout
        while not self.gone:
            if not self._unsent:
                if self._pong is not None:
                    payload, self._pong = self._pong, None
                    self._unsent += frames.frame(frames.PONG, payload)
                    continue
                if self._sent is not None:
                    self._sent.unpark_all()
                if self.finishing:
                    self._send_end()
                    return
                self._work = self._work or trio.lowlevel.ParkingLot()
                await self._work.park()
                deadline = trio.current_time() + self.limits.send_timeout
                continue
            with trio.CancelScope(deadline=deadline) as scope:
                try:
                    accepted = await self._send_some()
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    self._leave()
                    return
            if scope.cancelled_caught:
                self.reset("does not read")
                return
            if accepted:
                del self._unsent[:accepted]
                self.moved = True
                deadline = trio.current_time() + self.limits.send_timeout

    async def _send_some(self) -> int:
        if self.tls:
            record = bytes(self._unsent[:16384])
            await self.stream.send_all(record)
            return len(record)
        await trio.lowlevel.wait_writable(self.socket.fileno())
        try:
            return os.write(self.socket.fileno(), self._unsent)
        except BlockingIOError:
            return 0


class Together(Generator[Any, Any, None]):
    """Awaits a coroutine; while that runs, and not while it waits, its connection is corked."""

    __slots__ = ("_coroutine", "_owner")

    def __init__(self, owner: Connection, coroutine: Coroutine[Any, Any, None]) -> None:
        self._owner = owner
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, None]:
        return self

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def _step(self, go_on: Callable[..., Any], *sent: Any) -> Any:
        self._owner.is_corked = True
        try:
            return go_on(*sent)
        finally:
            self._owner.uncork()


_NO_GROUP = TaskGroup()
"""What the streams of the base classes are given; ours start their tasks themselves."""


def _nothing(*_: object) -> None:
    """Nobody has asked to be told."""


class _Application:
    """What both kinds of stream share: the application's task, its inbox, and its end.

    A mixin for Hypercorn's streams, which call the methods here through what they take for their task group.
    """

    owner: Connection
    inbox: Inbox[Any]
    app: AppWrapper
    scope: Any
    closed: bool
    stream_id: int
    config: Config
    send: Callable[[Event], Awaitable[None]]
    start_time: float

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        """Called by the base class when the scope is complete: start the application."""
        kind = "websocket" if scope["type"] == "websocket" else f"request {scope['method']}"
        self.owner.spawn(self._run, f"{kind} {scope['path']}")
        return self._put

    def spawn(self, func: Callable[..., Any], *args: Any) -> None:
        """Called by the base class for its pings, which are sent by the connection's deadline instead."""

    async def _put(self, event: Mapping[str, Any]) -> None:
        if event["type"] in ("http.disconnect", "websocket.disconnect"):
            self.inbox.close(event)
        else:
            self.inbox.put(event, len(event.get("body") or b""))

    async def _run(self) -> None:
        """Run the application; whatever it raises ends this stream and no other."""
        code = 1012  # a cancel from outside: the server is going
        try:
            await self.app(self.scope, self.receive, self.app_send, trio.to_thread.run_sync, trio.from_thread.run)
            code = 1000
        except (Exception, BaseExceptionGroup) as error:
            contain(error, f"The application failed on {self.scope['type']} {self.scope['path']}")
            code = 1011
        finally:
            try:
                await self.ended(code)
            except (Exception, BaseExceptionGroup) as error:
                self.owner.reset("cannot be answered")
                contain(error, "The end of a response failed")

    async def receive(self) -> Any:
        """What the application calls for its next event."""
        return await self.inbox.receive()

    async def _send_error_response(self, status_code: int) -> None:
        """Called by the base classes where there is no application to answer, or none that did."""
        await self.refuse(status_code)

    async def refuse(self, status: int, detail: str = "") -> None:
        """Answer in the application's place."""
        headers, body = frames.problem(status, str(uuid4()), detail)
        await self.send(Response(stream_id=self.stream_id, status_code=status, headers=headers))
        if self.scope.get("method") != "HEAD":
            await self.send(Body(stream_id=self.stream_id, data=body))
        await self.send(EndBody(stream_id=self.stream_id))
        await self.config.log.access(self.scope, {"status": status, "headers": []}, time() - self.start_time)

    async def app_send(self, message: Any) -> None:
        raise NotImplementedError

    async def ended(self, code: int) -> None:
        """The application has ended; *code* closes its WebSocket if it has not done so itself. Does not wait."""
        raise NotImplementedError


class _Request(_Application, HTTPStream):
    """One HTTP request and its response."""

    def __init__(self, owner: Connection, *args: Any) -> None:
        super().__init__(*args)
        self.owner = owner
        self.inbox = Inbox(inf, inf)  # bounded by `_Http1.room`: the reader stops, TCP tells the client
        self.task_group = cast(TaskGroup, self)
        self._gone: Callable[[], None] = _nothing

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        scope["extensions"]["hector.request"] = self
        return await super().spawn_app(app, config, scope, send)

    def is_own(self, receive: object, send: object) -> bool:
        """Whether the application was given these two by this stream, with nothing in between."""
        return receive == self.receive and send == self.app_send

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Have *tell* called once if the client leaves before its answer is complete; now, if it has left already."""
        self._gone = tell
        if self.closed:
            tell()

    async def handle(self, event: Event) -> None:
        left = type(event) is StreamClosed and not self.closed and self.state is not ASGIHTTPState.CLOSED
        await super().handle(event)
        if left:
            self._gone()

    async def receive(self) -> Any:
        protocol = self.owner.protocol
        if isinstance(protocol, _Http1) and protocol.stream is self:
            protocol.ask_for_body()
        return await self.inbox.receive()

    async def app_send(self, message: Any) -> None:
        if not self.closed:
            await HTTPStream.app_send(self, message)
        await self.owner.pace()

    async def respond(self, status: int, headers: http1.RawHeaders, body: bytes) -> None:
        """Send a whole answer: what `http.response.start` and one `http.response.body` do, in one step if it is an
        ordinary one."""
        protocol = cast(_Http1, self.owner.protocol)
        if self.state is ASGIHTTPState.REQUEST and protocol.answer(self, status, headers, body):
            self.state = ASGIHTTPState.CLOSED
            told = {"status": status, "headers": headers}
            await self.config.log.access(self.scope, cast(Any, told), time() - self.start_time)
            await self.send(StreamClosed(self.stream_id))
            await self.owner.pace()
        else:
            await self.app_send({"type": "http.response.start", "status": status, "headers": headers})
            await self.app_send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_error_response(self, status_code: int) -> None:
        await super()._send_error_response(status_code)
        self.state = ASGIHTTPState.CLOSED

    async def ended(self, code: int) -> None:
        await HTTPStream.app_send(self, None)


class _WebSocket(_Application, WSStream):
    """One WebSocket: wsproto reads, frames are written by hand."""

    def __init__(self, owner: Connection, *args: Any) -> None:
        super().__init__(*args)
        self.owner = owner
        self.inbox = Inbox(owner.limits.max_unread_messages, owner.limits.max_unread_bytes)
        self.task_group = cast(TaskGroup, self)
        self.open = False
        """Accepted, and no Close frame has been sent."""
        self.buffer.max_length = owner.limits.max_message_bytes
        self._early = bytearray()
        self._extensions: list[Extension] = []
        self._parser: WebSocketParser | None = None
        self._received = 0
        self._quiet = 0
        self._farewell = (1006, "")
        self._gone: Callable[[int], None] = _nothing

    # ---- from the client

    async def handle(self, event: Event) -> None:
        kind = type(event)
        if kind is StreamClosed:
            if not self.closed:
                self.closed = True
                self.open = False
                code, reason = self._farewell
                self.inbox.close({"type": "websocket.disconnect", "code": code, "reason": reason})
                self._gone(code)
        elif kind is not Data:
            await super().handle(event)
        elif self.closed:
            pass
        elif self.state in (ASGIWebsocketState.CONNECTED, ASGIWebsocketState.CLOSED):
            while self._early and not self.closed:  # the application is taking it: this stands behind it
                await trio.lowlevel.checkpoint()
            if not self.closed:
                await self._receive(bytes(cast(Data, event).data))
        elif len(self._early) + len(cast(Data, event).data) <= EARLY_BYTES:
            self._early += cast(Data, event).data
        else:
            self.state = ASGIWebsocketState.HTTPCLOSED
            await self.refuse(400, f"More than {EARLY_BYTES} bytes were sent before the WebSocket was accepted")
            await self.send(StreamClosed(self.stream_id))

    async def _receive(self, data: bytes) -> None:
        """Take usual frames as they are; from the first other one on, wsproto reads."""
        if self._parser is None:
            data = await self._take_plain(data)
            if not data or self.closed:
                return
            self._parser = WebSocketParser(ConnectionType.SERVER, self._extensions)
        self._parser.receive_data(data)
        await self._parse(self._parser)

    async def _take_plain(self, data: bytes) -> bytes:
        """Returns what is left from the first frame on that takes a parser to read."""
        limit = self.owner.limits.max_message_bytes
        start = number = 0
        while start < len(data) and not self.closed:
            found = frames.plain_frame(data, start, limit)
            if found is None:
                return data[start:]
            first, end, payload = found
            if first == frames.TEXT:
                try:
                    text = payload.decode()
                except UnicodeDecodeError:
                    return data[start:]
                if self.open and not self.inbox.put(
                    {"type": "websocket.receive", "bytes": None, "text": text}, len(payload)
                ):
                    await self.fail(1008, "too many unread messages")
            elif first == frames.PING:
                self.owner.pong(payload)
            elif first == frames.CLOSE:
                await self._left(int.from_bytes(payload) if payload else frames.NO_STATUS, "")
            start = end
            number += 1
            if not number % EVENTS_PER_CHECKPOINT:
                await trio.lowlevel.checkpoint()
        return b""

    async def _parse(self, parser: WebSocketParser) -> None:
        """Handle every frame received; let others run now and then, for a packet may hold ten thousand."""
        for number, event in enumerate(parser.events(), 1):
            if isinstance(event, Message):
                await self._take(event)
            elif isinstance(event, Ping):
                self.owner.pong(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                await self._closing(parser, event)
            if self.closed:
                return
            if not number % EVENTS_PER_CHECKPOINT:
                await trio.lowlevel.checkpoint()

    async def _take(self, event: Message[Any]) -> None:
        if not self.open:
            return  # our Close frame is out: only the peer's still matters
        data = event.data
        self._received += len(data) if not isinstance(data, str) or data.isascii() else len(data.encode())
        if self._received > self.owner.limits.max_message_bytes:
            await self.fail(1009, "message too big")
            return
        self.buffer.extend(event)
        if event.message_finished:
            size, self._received = self._received, 0
            message = self.buffer.to_message()
            self.buffer.clear()
            if not self.inbox.put(message, size):
                await self.fail(1008, "too many unread messages")

    async def _closing(self, parser: WebSocketParser, event: CloseConnection) -> None:
        if parser.state is not ParserState.REMOTE_CLOSING:
            await self.fail(int(event.code), frames.REASONS.get(int(event.code), ""))
        else:
            await self._left(int(event.code), event.reason or "")

    async def _left(self, code: int, reason: str) -> None:
        self._farewell = (code, reason)
        self._send_close(code, reason)
        await self.send(StreamClosed(self.stream_id))

    async def fail(self, code: int, reason: str) -> None:
        """End the WebSocket from our side at once: a Close frame, no more input, and the application is told."""
        self._farewell = (code, reason)
        self._send_close(code, reason)
        await self.send(StreamClosed(self.stream_id))

    async def beat(self) -> None:
        """One ping interval has passed."""
        moved, self.owner.moved = self.owner.moved, False
        self._quiet = 0 if moved else self._quiet + 1
        if self._quiet >= 2:
            self.owner.hopeless = True
            await self.fail(4101, "silent")
        else:
            self.owner.ping()

    # ---- from the application

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        scope["extensions"]["hector.send_many"] = self
        return await super().spawn_app(app, config, scope, send)

    def is_own(self, receive: object, send: object) -> bool:
        """Whether the application was given these two by this stream, with nothing in between."""
        return receive == self.receive and send == self.app_send

    def when_gone(self, tell: Callable[[int], None]) -> None:
        """Have *tell* called once, with the code, when no message of the client can come any more, however many are
        unread; now, if that is so already."""
        self._gone = tell
        if self.closed:
            tell(self._farewell[0])

    def together(self, sending: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Await *sending*; the messages it sends leave in one write, at its end and whenever it is made to wait."""
        return self.owner.together(sending)

    async def __call__(self, payloads: Sequence[bytes], *, binary: bool = False) -> None:
        """Send one message for each payload (text must be UTF-8), all in one write.

        Waits only for what the socket did not take, at most `send_timeout` without progress. Once the socket is closing
        or gone it sends nothing and returns after a checkpoint: the end of the connection is told elsewhere. A cancel
        leaves all of it queued. RuntimeError before the WebSocket is accepted.
        """
        self._write_all(payloads, binary)
        await self.owner.pace(len(payloads))

    def send_now(self, payloads: Sequence[bytes]) -> bool:
        """The same for text, without waiting. False: the socket did not take it all, so nothing more is to be sent
        before an empty `send_many` has returned."""
        self._write_all(payloads, False)
        if self.owner.full:
            return False
        self.owner.moved = True
        return True

    @property
    def full(self) -> bool:
        """Whether `send_now` would only queue."""
        return self.owner.full

    def _write_all(self, payloads: Sequence[bytes], binary: bool) -> None:
        if self.open:
            if self._extensions:
                assert self._parser is not None
                kind: Any = BytesMessage if binary else TextMessage
                data = b"".join(self._parser.send(kind(p if binary else p.decode())) for p in payloads)
            else:
                data = frames.frames(frames.BINARY if binary else frames.TEXT, payloads)
            if data:
                self.owner.write(data)
        elif self.state is ASGIWebsocketState.HANDSHAKE:
            raise RuntimeError("The WebSocket has not been accepted")

    async def app_send(self, message: Any) -> None:
        kind = message["type"]
        if kind == "websocket.send" and self.open:
            text = message.get("text")
            payload = text.encode() if text is not None else message["bytes"]
            owner = self.owner
            if self._extensions:
                self._write_all((payload,), text is None)
            else:
                owner.write(frames.frame(frames.TEXT if text is not None else frames.BINARY, payload))
            if owner.is_corked and owner.spend():
                return  # the next checkpoint is not far
        elif self.open and kind == "websocket.close":
            self.state = ASGIWebsocketState.CLOSED
            self._send_close(int(message.get("code") or 1000), message.get("reason") or "")
            self.owner.wait_for(_Phase.CLOSING, self.owner.limits.linger_timeout)
        elif self.open or (not self.closed and self.state is not ASGIWebsocketState.CLOSED):
            await WSStream.app_send(self, message)
        await self.owner.pace()

    async def ended(self, code: int) -> None:
        if self.closed or self.state is ASGIWebsocketState.CLOSED:
            return  # either side has closed, and the reader or the deadline does the rest
        if self.open:
            await self.fail(code, "")
        else:
            await WSStream.app_send(self, None)

    def _send_close(self, code: int, reason: str) -> None:
        if self.open:
            self.open = False
            self.owner.write(frames.close(code, reason))

    async def _accept(self, message: Any) -> None:
        """Answer 101, then handle what an eager client has sent before it."""
        subprotocol = message.get("subprotocol")
        if subprotocol is not None and subprotocol not in (self.handshake.subprotocols or ()):
            raise ValueError(f"The client did not offer the subprotocol {subprotocol!r}")
        headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
        headers.append((b"sec-websocket-accept", generate_accept_token(cast(bytes, self.handshake.key))))
        if subprotocol is not None:
            headers.append((b"sec-websocket-protocol", subprotocol.encode()))
        if self.owner.limits.compression and self.handshake.extensions:
            extension = frames.BoundedDeflate(self.owner.limits.max_message_bytes)
            accepted = server_extensions_handshake(self.handshake.extensions, [extension])
            if accepted:
                self._extensions = [extension]
                self._parser = WebSocketParser(ConnectionType.SERVER, self._extensions)
                headers.append((b"sec-websocket-extensions", accepted))
        headers.extend(message.get("headers") or ())
        await self.send(Response(stream_id=self.stream_id, status_code=101, headers=headers))
        self.handshake.accepted = True
        self.state = ASGIWebsocketState.CONNECTED
        self.open = True
        self.owner.wait_for(_Phase.WEBSOCKET, self.owner.limits.ping_interval)
        await self.config.log.access(self.scope, {"status": 101, "headers": []}, time() - self.start_time)
        try:
            if self._early:
                await self._receive(bytes(self._early))
        finally:
            self._early.clear()


class _Http1(H11Protocol):
    """HTTP/1.1 on one connection, and its upgrade to a WebSocket. Its methods never wait, except `room` and `handle`
    in the reader."""

    def __init__(self, owner: Connection, client: tuple[str, int] | None, server: tuple[str, int] | None) -> None:
        # Instead of the base class's own, which makes a parser and an event that most connections never need
        self.app, self.config, self.context = owner.app, owner.config, owner.context
        self.client, self.server, self.ssl = client, server, owner.tls
        self.send = owner.protocol_send
        self.task_group = _NO_GROUP
        self.keep_alive_requests = 0
        self.stream: _Request | _WebSocket | None = None
        self.connection_state = ConnectionState(owner.state)
        self.owner = owner
        self._h11: h11.Connection | H11WSConnection | None = None
        self._head = b""
        """A response head that waits for its body, so that both leave in one write."""
        self._only_head = False
        """Whether the request is a HEAD, whose answer has no body."""
        self._skipped = False
        """Whether an empty line was found in front of this request."""
        self._paused = False
        self._recycled: trio.lowlevel.ParkingLot | None = None
        self._ordinary: http1.Ordinary | None = None
        """The request that is being answered, if h11 has not been told of it."""
        self._answered: tuple[http1.Head, int, http1.RawHeaders] | None = None
        """The head of its answer, its status and its headers, as long as it waits for its body."""
        self._complete = False
        """Whether its answer is."""
        self._upgraded = False
        """Whether what the client sends belongs to a WebSocket of which h11 was not told."""

    @property
    def connection(self) -> h11.Connection | H11WSConnection:
        """h11's view, made when there is something to ask."""
        if self._h11 is None:
            self._h11 = self._parser(b"")
        return self._h11

    @connection.setter
    def connection(self, parser: h11.Connection | H11WSConnection) -> None:
        self._h11 = parser

    def _parser(self, data: bytes) -> h11.Connection:
        """The parser of a connection on which *data* was received first."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self.owner.limits.max_header_bytes)
        if data:
            parser.receive_data(data)
        return parser

    async def handle(self, event: ConnectionEvent) -> None:
        """Take bytes, or the end of the connection."""
        if type(event) is RawData:
            if self._upgraded:
                if self.stream is not None:
                    await self._contained(self.stream.handle(Data(STREAM_ID, event.data)))
                return
            parser = self._h11
            unread = parser is not None and (parser.their_state is not h11.IDLE or parser.trailing_data[0])
            if self.stream is None and not unread:
                request = http1.ordinary(event.data, self.owner.limits.max_header_bytes)
                if request is not None:
                    await self._contained(self._upgrade(request) if request.upgrade else self._start_ordinary(request))
                    return
        await self._contained(super().handle(event))

    async def _upgrade(self, request: http1.Ordinary) -> None:
        """Give a faultless handshake to the application."""
        self._ordinary, self._upgraded = request, True
        self.owner.wait_for(_Phase.ANSWER, inf)
        self.keep_alive_requests += 1
        stream = self.stream = _WebSocket(self.owner, *self._stream_arguments())
        await stream.handle(Request(STREAM_ID, request.headers, "1.1", "GET", request.target, self.connection_state))
        if stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        await self.context.mark_request()

    async def _start_ordinary(self, request: http1.Ordinary) -> None:
        """Give a whole request to the application, all at once."""
        self._ordinary = request
        self._only_head = request.method == "HEAD"
        self._complete = False
        self.owner.wait_for(_Phase.ANSWER, inf)
        self.keep_alive_requests += 1
        stream = self.stream = _Request(self.owner, *self._stream_arguments())
        _, method, target, headers, body, _ = request
        await stream.handle(Request(STREAM_ID, headers, "1.1", method, target, self.connection_state))
        if stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        stream.inbox.put({"type": "http.request", "body": body, "more_body": False}, len(body))
        await self.context.mark_request()

    def _tell_parser(self) -> None:
        """Something about the answer is not ordinary: let h11 continue, as if it had read the request."""
        request, answered = self._ordinary, self._answered
        self._ordinary = self._answered = None
        self._complete = False
        if request is not None and request.upgrade:
            parser = self._parser(request.data)
            parser.next_event()
            self.connection = H11WSConnection(parser)
        elif request is not None:
            self.connection = self._parser(request.data + self.connection.trailing_data[0])
            while type(self.connection.next_event()) is not h11.EndOfMessage:
                pass
            if answered is not None:
                _, status, headers = answered
                self._head = self._encode(h11.Response(status_code=status, headers=headers))

    async def _contained(self, step: Awaitable[None]) -> None:
        """Whatever fails while bytes are handled ends this connection and no other."""
        try:
            await step
        except (Exception, BaseExceptionGroup) as error:
            self.owner.reset("sent what could not be handled")
            contain(error, "A connection failed")

    @property
    def is_ahead(self) -> bool:
        """Whether the client is so far ahead of the application that the reader is to wait."""
        stream = self.stream
        if isinstance(stream, _Request) and stream.inbox.bytes > BODY_AHEAD:
            return True
        return self._paused and len(self.connection.trailing_data[0]) > self.owner.limits.max_header_bytes

    async def room(self) -> None:
        """Wait, in the reader, until the client is no longer too far ahead of the application."""
        owner = self.owner
        stream = self.stream
        if isinstance(stream, _Request) and stream.inbox.bytes > BODY_AHEAD:
            owner.deadline = inf
            await stream.inbox.wait_below(BODY_AHEAD // 2)
            if owner.phase is _Phase.BODY:
                owner.wait_for(_Phase.BODY, owner.limits.body_timeout)
        else:
            # Not reading also means not noticing that the client has left: for a while only.
            with trio.move_on_after(owner.limits.header_timeout) as scope:
                self._recycled = self._recycled or trio.lowlevel.ParkingLot()
                await self._recycled.park()
            if scope.cancelled_caught:
                owner.reset("sent more than it waits for")

    async def time_out(self) -> None:
        """A head or a body was not completed in time."""
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(408)
        self.owner.finish()
        await self._close_stream()

    async def _handle_events(self) -> None:
        connection = self.connection
        if isinstance(connection, H11WSConnection):
            passed = connection.next_event()
            if isinstance(passed, Data) and self.stream is not None:
                await self.stream.handle(passed)
            return
        self._paused = self._ordinary is not None
        if self._paused:
            return
        if connection.their_state is h11.IDLE:
            if not self._begins():
                return
            connection = self.connection
        while not self.owner.finishing and self.connection is connection:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    self._answer(error.error_status_hint)
                self.owner.finish()
                await self._close_stream()
                return
            if isinstance(event, h11.Request):
                await self._start(event)
            elif isinstance(event, h11.Data) and self.stream is not None:
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
                self.owner.wait_for(_Phase.ANSWER, inf)
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            else:
                self._paused = event is h11.PAUSED
                return
        if self.connection is not connection:
            await self._handle_events()  # upgraded: what followed the request is early data

    def _begins(self) -> bool:
        """Whether what was received may be the begin of a head. One empty line before it is dropped (RFC 9112, 2.2),
        and a head that is too long is refused although it came in one piece, which the parser lets pass."""
        owner = self.owner
        data = self.connection.trailing_data[0]
        if not self._skipped and data.startswith(b"\r"):
            if data == b"\r":
                return False
            if data.startswith(b"\r\n"):
                self._skipped = True
                data = data[2:]
                self.connection = self._parser(data)
                if not data and self.keep_alive_requests:
                    owner.wait_for(_Phase.IDLE, owner.limits.keep_alive_timeout)
        if frames.head_too_long(data, owner.limits.max_header_bytes):
            self._answer(431)
            owner.finish()
            return False
        return bool(data)

    def ask_for_body(self) -> None:
        """The application wants the body: tell a client that waits for it to be wanted (RFC 9110, 10.1.1)."""
        if self._ordinary is None and self.connection.they_are_waiting_for_100_continue:
            self.owner.write(self._encode(h11.InformationalResponse(status_code=100, headers=[])))
            self.owner.wait_for(_Phase.BODY, self.owner.limits.body_timeout)

    async def _start(self, request: h11.Request) -> None:
        """A complete head: refuse it here, or give it to the application."""
        self._only_head = request.method == b"HEAD"
        upgrade = frames.wants_websocket(request)
        fault = frames.request_fault(request) or (upgrade and frames.handshake_fault(request))
        if fault:
            self._answer(fault)
            self.owner.finish()
            return
        target = request.target
        if not target.startswith((b"/", b"*")):
            # The absolute form, which every server must accept (RFC 9112, 3.2.2)
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
        connection = self.connection
        if upgrade:
            self.stream = _WebSocket(self.owner, *self._stream_arguments())
            self.connection = H11WSConnection(cast(h11.Connection, connection))
            self.owner.wait_for(_Phase.ANSWER, inf)
        else:
            self.stream = _Request(self.owner, *self._stream_arguments())
            waiting = connection.they_are_waiting_for_100_continue  # we for the application, the client for us
            self.owner.wait_for(_Phase.BODY, inf if waiting else self.owner.limits.body_timeout)
        self.keep_alive_requests += 1
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=frames.joined(request.headers) if upgrade else list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=target,
                state=self.connection_state,
            )
        )
        if self.stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        await self.context.mark_request()

    def _stream_arguments(self) -> tuple[Any, ...]:
        return (
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )

    def _answer(self, status: int) -> None:
        """A response that no application gives, after which the connection ends."""
        headers, body = frames.problem(status, str(uuid4()))
        data = self._encode(h11.Response(status_code=status, headers=headers))
        if not self._only_head:
            data += self._encode(h11.Data(data=body))
        self.owner.write(data + self._encode(h11.EndOfMessage()))

    async def stream_send(self, event: Event) -> None:
        kind = type(event)
        if kind is Response and cast(Response, event).status_code >= 200:
            self._respond(cast(Response, event))
        elif kind is Body:
            self._write_body(cast(Body, event).data)
        elif kind is EndBody:
            self._write_end()
        elif kind is not Response or not self._switch(cast(Response, event)):
            await super().stream_send(event)

    def _switch(self, event: Response) -> bool:
        """Write the 101 to a handshake of which h11 was not told, unless there is something about it to be checked."""
        if self._ordinary is None:
            return False
        data = http1.switching([*event.headers, *self.owner.server.response_headers(self.config)])
        if data is None:
            self._tell_parser()
            return False
        self._ordinary = None
        self.owner.write(data)
        return True

    def answer(self, stream: _Request, status: int, headers: http1.RawHeaders, body: bytes) -> bool:
        """Write the whole answer to an ordinary request. False, and nothing is done, if one of both is not ordinary."""
        if self._ordinary is None or stream is not self.stream:
            return False
        head = http1.answer_head(self._ordinary.method, status, self._completed(headers))
        if head is None or not (head.bodiless or head.size == len(body)):
            return False
        self.owner.write(head.data if head.bodiless else head.data + body)
        self._complete = True
        return True

    def _completed(self, headers: http1.RawHeaders) -> http1.RawHeaders:
        headers = [*headers, *self.owner.server.response_headers(self.config)]
        closing = self.context.terminated.is_set() or isinstance(self.stream, _WebSocket)
        if self._ordinary is None:  # else the body is here
            closing = closing or self.connection.they_are_waiting_for_100_continue  # for nothing: it is not read
        if closing or self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        return headers

    def _respond(self, event: Response) -> None:
        headers = self._completed(event.headers)
        if self._ordinary is not None and not self._ordinary.upgrade:
            head = http1.answer_head(self._ordinary.method, event.status_code, headers)
            if head is not None:
                self._answered = head, event.status_code, headers
                return
        self._tell_parser()
        self._head = self._encode(h11.Response(status_code=event.status_code, headers=headers))
        if not any(name.lower() == b"content-length" for name, _ in headers):
            self._write_head()  # a stream: its client wants to know now that it has begun

    def _write_body(self, data: bytes) -> None:
        if self._answered is not None and len(data) == self._answered[0].size:
            self.owner.write(self._answered[0].data + data)
            self._answered, self._complete = None, True
            return
        self._tell_parser()
        self._write(h11.Data(data=data))

    def _write_end(self) -> None:
        if self._complete:
            return
        if self._answered is not None and not self._answered[0].size:
            self.owner.write(self._answered[0].data)
            self._answered, self._complete = None, True
            return
        self._tell_parser()
        self._write(h11.EndOfMessage())

    def _write(self, event: h11.Data | h11.EndOfMessage) -> None:
        data = self._head + self._encode(event)
        self._head = b""
        if data:
            self.owner.write(data)

    def _write_head(self) -> None:
        if self._head:
            self.owner.write(self._head)
            self._head = b""

    def _encode(self, event: h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage) -> bytes:
        try:
            return self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is h11.ERROR:
                return b""  # the client broke the protocol and has been told so
            raise

    async def _maybe_recycle(self) -> None:
        """The response is complete, or never will be: get ready for the next request, or end the connection."""
        if not self._complete:
            self._tell_parser()
            self._write_head()
        await self._close_stream()
        if self._upgraded:
            self.owner.finish()
            return
        connection = self.connection
        if self._recycled is not None:
            self._recycled.unpark_all()
        reusable = self._complete or (connection.our_state is h11.DONE and connection.their_state is h11.DONE)
        if self.context.terminated.is_set() or not reusable:
            self.owner.finish()
            return
        if self._complete:
            self._ordinary, self._complete = None, False
        else:
            connection.start_next_cycle()
        self._only_head = self._skipped = False
        self.owner.wait_for(_Phase.IDLE, self.owner.limits.keep_alive_timeout)
        if connection.trailing_data[0]:
            self.owner.wait_for(_Phase.HEAD, self.owner.limits.header_timeout)
            await self._contained(self._handle_events())


async def _closed() -> None:
    """What is left to do for a stream whose socket is closed."""


def tune_listener(sock: stdlib_socket.socket | trio.socket.SocketType) -> None:
    """Let the kernel find peers that vanished: 20 s for unacknowledged bytes, 30 s of silence on an idle connection.

    Set on a listening socket, accepted ones inherit it. Options that the platform or the family lacks are left out.
    """
    with suppress(OSError):
        sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_USER_TIMEOUT", 20_000), ("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        option = getattr(stdlib_socket, name, None)
        if option is not None:
            with suppress(OSError):
                sock.setsockopt(stdlib_socket.IPPROTO_TCP, option, value)


AccessLog = Callable[[Mapping[str, Any], int | None, float], None]
"""Called with the scope, the status (None: the client left first) and the seconds, for each response."""


class _ServeConfig(Config):
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
        self._access = cast(_ServeConfig, config).access

    async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Where Hypercorn says that it runs, which whoever called ``serve`` says better."""

    async def access(self, request: Any, response: Any, request_time: float) -> None:
        if self._access is not None:
            self._access(request, None if response is None else response["status"], request_time)


def alpn(limits: ConnectionLimits) -> list[str]:
    """What is offered over TLS."""
    return ["h2", "http/1.1"] if limits.http2 else ["http/1.1"]


def install(limits: ConnectionLimits | None = None) -> None:
    """Put these classes where Hypercorn's trio worker looks them up, and HTTP/2 off unless *limits* say on. Idempotent.

    *limits* hold for servers started by Hypercorn itself from now on, in place of its own timeouts and sizes; without
    them the last ones, or the defaults.
    """
    global _installed
    if limits is not None:
        _installed = limits
    vars(hypercorn.trio.run).update(TCPServer=Connection, WorkerContext=_Worker)
    Config.alpn_protocols = alpn(_installed)


async def serve(
    app: ASGIFramework,
    sockets: Iterable[stdlib_socket.socket],
    *,
    ssl_context: ssl.SSLContext | None = None,
    limits: ConnectionLimits | None = None,
    shutdown: Callable[[], Awaitable[None]],
    graceful_timeout: float = 10.0,
    root_path: str = "",
    access_log: AccessLog | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* on bound and listening *sockets* until `shutdown()` returns and its connections have ended.

    Lifespan startup comes first (its failure is raised), then `task_status.started` with the URLs; lifespan shutdown
    comes last. From the return of `shutdown()` no connection is accepted and idle ones are closed; the others have
    *graceful_timeout* seconds to end, then their tasks are cancelled, WebSockets closed with 1012, and what has stopped
    reading is reset; over TLS, nothing more can be said then and all are reset. The sockets are closed in the end. A
    cancel ends everything at once, without lifespan shutdown. With *ssl_context*, whose ALPN is set to what is spoken,
    all sockets speak TLS.
    """
    install()
    config = _ServeConfig(limits or ConnectionLimits(), ssl_context, access_log)
    config.graceful_timeout = graceful_timeout
    config.root_path = root_path
    bound = list(sockets)
    if ssl_context is not None:
        ssl_context.set_alpn_protocols(alpn(config.limits))
    await hypercorn.trio.run.worker_serve(
        cast(AppWrapper, ASGIWrapper(app)),
        config,
        sockets=Sockets(bound if ssl_context else [], [] if ssl_context else bound, []),
        shutdown_trigger=shutdown,
        task_status=task_status,
    )


_STREAM = "self app config context task_group ssl client server send stream_id"
_RELIED_ON: dict[Callable[..., Any], str] = {
    TCPServer.__init__: "self app config context state stream",
    WorkerContext.__init__: "self max_requests",
    H11Protocol.__init__: "self app config context task_group connection_state ssl client server send",
    HTTPStream.__init__: _STREAM,
    WSStream.__init__: _STREAM,
    HTTPStream.app_send: "self message",
    HTTPStream._send_error_response: "self status_code",
    WSStream.app_send: "self message",
    WSStream._accept: "self message",
    WSStream._send_error_response: "self status_code",
    H11Protocol.stream_send: "self event",
    H11Protocol._handle_events: "self",
    H11Protocol._maybe_recycle: "self",
    H11Protocol._close_stream: "self",
    H11WSConnection.__init__: "self h11_connection",
    hypercorn.trio.run.worker_serve: "app config sockets shutdown_trigger task_status",
}
"""What is subclassed or called here, with the names of its parameters."""


def check_hypercorn(relied_on: Mapping[Callable[..., Any], str]) -> None:
    """Raise ImportError if Hypercorn is no longer what is subclassed here: at import, not in the first request."""
    changed = [
        function.__qualname__
        for function, names in relied_on.items()
        if " ".join(inspect.signature(function).parameters) != names
    ]
    for ours in (Connection, _Worker):
        name = ours.__mro__[1].__name__
        if vars(hypercorn.trio.run).get(name) not in ours.__mro__[:2]:
            changed.append(f"hypercorn.trio.run.{name}")
    if changed:
        raise ImportError(
            f"hector_trio.connection was written for Hypercorn 0.18; version {version('hypercorn')} changed: "
            + ", ".join(changed)
        )


check_hypercorn(_RELIED_ON)
