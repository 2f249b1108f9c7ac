"""One accepted socket: what it reads, what it could not send yet, its one deadline, and its end."""

from __future__ import annotations

import contextvars
import os
import socket as stdlib_socket
import struct
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.events import Event as ConnectionEvent
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import AppWrapper, LifespanState
from hypercorn.utils import parse_socket_addr, repr_socket_addr

from hector_trio import frames
from hector_trio.connection.bounds import LOGGER, ConnectionLimits, Phase, contain
from hector_trio.connection.h1 import Http1
from hector_trio.connection.server import counts, server_of
from hector_trio.connection.websocket import WebSocket

if TYPE_CHECKING:
    from hector_trio.http2 import Http2

MAX_RECV = 65536
SENDS_PER_CHECKPOINT = 64
MAX_CORKED = 16384
"""Bytes of a frame that does not wait for others to leave with."""
TLS_AHEAD = 65536
"""Bytes queued for encryption before a sender waits."""
MAX_REFUSALS = 64
"""Connections beyond `max_connections` that are being told so at one time; further ones are simply closed."""
_RESET = struct.pack("ii", 1, 0)


class Connection(TCPServer):
    """One accepted socket: its reader (this task), its unsent bytes, and its one deadline."""

    # The base class gives each a dictionary too, which stays empty: with this many entries it would take 1.5 KiB.
    __slots__ = (
        "_ahead",
        "_budget",
        "_context",
        "_corked",
        "_flushing",
        "_heard",
        "_nursery",
        "_pausing",
        "_pong",
        "_sent",
        "_unsent",
        "_work",
        "app",
        "config",
        "context",
        "deadline",
        "finishing",
        "gone",
        "hopeless",
        "http2",
        "is_corked",
        "limits",
        "moved",
        "phase",
        "protocol",
        "server",
        "socket",
        "state",
        "stream",
        "tls",
    )

    protocol: Http1 | Http2  # type: ignore[assignment]

    def __init__(self, app: AppWrapper, config: Config, context: Any, state: LifespanState, stream: Any) -> None:
        # Instead of the base class's own, which makes two locks
        self.app, self.config, self.context, self.state, self.stream = app, config, context, state, stream
        self.tls = isinstance(stream, trio.SSLStream)
        self.socket: trio.socket.SocketType = stream.transport_stream.socket if self.tls else stream.socket
        self.server = server_of(context, config)
        self.limits = self.server.limits
        self.phase = Phase.HEAD
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
            self.deadline = trio.current_time() + self.limits.header_timeout
            if not self.socket.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE):
                tune_listener(self.socket)  # a listening socket of ours has handed it down
            family = self.socket.family
            client = parse_socket_addr(family, self.socket.getpeername())
            local = parse_socket_addr(family, self.socket.getsockname())
            trio.lowlevel.current_task().name = f"connection {repr_socket_addr(family, self.socket.getpeername())}"
            if self.tls and not await self._shake_hands():
                return
            self._context = contextvars.copy_context()
            async with trio.open_nursery() as self._nursery:
                first = await self._chosen(client, local)
                await self._read(first)
                self._leave()
                await self.protocol.handle(Closed())
        except OSError:
            pass  # the peer left before we could ask for its name
        except (Exception, BaseExceptionGroup) as error:
            contain(error, "A connection failed")
        finally:
            self._leave()

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
            from hector_trio import http2

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
        self.protocol = Http1(self, client, server)
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
            if self.phase is Phase.IDLE or not self._heard:
                self._heard = True
                self.wait_for(Phase.HEAD, self.limits.header_timeout)
            elif self.phase is Phase.BODY:
                self.wait_for(Phase.BODY, self.limits.body_timeout)
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
        counts["refused"] += 1
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

    def wait_for(self, phase: Phase, seconds: float) -> None:
        self.phase = phase
        self.deadline = trio.current_time() + seconds

    @property
    def idle(self) -> bool:
        """Whether nobody would miss this connection."""
        return self.phase is Phase.IDLE or (self.phase is Phase.HEAD and not self._heard)

    async def expire(self) -> None:
        """The deadline has passed, or the server is closing and the connection is idle."""
        try:
            if self.idle:
                if self.http2 is not None:
                    self.http2.leave()
                else:
                    self._leave()
            elif self.phase in (Phase.HEAD, Phase.BODY):
                await self.protocol.time_out()
            elif self.phase is Phase.WEBSOCKET:
                self.wait_for(Phase.WEBSOCKET, self.limits.ping_interval)
                await cast(WebSocket, self.protocol.stream).beat()
            elif self.phase is Phase.CLOSING:
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
        self.phase = Phase.LINGER
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
        counts["reset"] += 1
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


def alpn(limits: ConnectionLimits) -> list[str]:
    """What is offered over TLS."""
    return ["h2", "http/1.1"] if limits.http2 else ["http/1.1"]


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
