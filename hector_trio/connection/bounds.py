"""What bounds a connection: its limits, what its deadline means, the inbox of what it has read, where errors end."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

import trio

from hector_trio.wakeup import Wakeup

LOGGER = logging.getLogger("hector_trio")
T = TypeVar("T")


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


class Phase(Enum):
    """What a connection's deadline means."""

    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    IDLE = auto()
    WEBSOCKET = auto()
    CLOSING = auto()
    LINGER = auto()


class Inbox(Generic[T]):
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
        self._items: list[tuple[T, int]] = []  # seldom more than one: a deque would take ten times the room
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._last: tuple[T] | None = None
        self._arrived = Wakeup()
        self._taken: trio.lowlevel.ParkingLot | None = None

    def put(self, item: T, size: int = 0) -> bool:
        """Add *item* of *size* bytes; False, and nothing is kept, if that would pass a limit or after `close`."""
        if self._last is not None or len(self._items) >= self._max_items or self.bytes + size > self._max_bytes:
            return False
        self._items.append((item, size))
        self.bytes += size
        self._arrived.wake()
        return True

    def close(self, last: T) -> None:
        """Nothing more comes: once all else is taken, `receive` returns *last*, again and again."""
        if self._last is None:
            self._last = (last,)
            self._arrived.wake()
            if self._taken is not None:
                self._taken.unpark_all()

    async def receive(self) -> T:
        """Take the oldest item, waiting for one. A cancel takes nothing.

        Raises: BusyResourceError if another task waits already.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            if self._last is not None:
                await trio.lowlevel.checkpoint()
                return self._last[0]
            await self._arrived.wait()
        item, size = self._items.pop(0)
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
