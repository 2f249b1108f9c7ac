"""The network of the simulation: ASGI in memory, with a client that stalls, reads on, and leaves in every way."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import trio

from hector_trio.transports.beside import SEND_MANY

Message = dict[str, Any]
Asgi = Callable[[Any, Any, Any], Awaitable[None]]

BASE: dict[str, Any] = {
    "asgi": {"spec_version": "2.3", "version": "3.0"},
    "http_version": "1.1",
    "root_path": "",
    "client": ("127.0.0.1", 40000),
    "server": ("127.0.0.1", 8080),
}


class Client(Protocol):
    """The far end of a link. Is told at once of what it reads; must neither wait nor raise."""

    def take(self, message: Message) -> None: ...

    def lost(self) -> None:
        """The connection is gone; nothing more is read."""

    def failed(self, error: BaseException) -> None:
        """The application raised."""


class Link:
    """One connection: at one end the application, at the other a client whose reading the schedule decides.

    What a client that has stalled does not read is held, ``capacity`` bytes of it as a kernel holds them. With more
    the application waits, and after ``patience`` seconds without progress the connection is reset, as in
    ``hector_trio.connection``.
    """

    def __init__(self, scope: Message, client: Client, *, capacity: int, patience: float) -> None:
        self.scope = scope
        self.client = client
        self.stalled = False
        self.gone = False
        """Nothing passes any more, in either direction."""
        self.left_at: float | None = None
        self._over = trio.Event()
        self.ending = False
        """Whether either side has said its last word."""
        self.most_held = 0
        self._capacity = capacity
        self._patience = patience
        self._inbound: deque[Message] = deque()
        self._arrived = trio.lowlevel.ParkingLot()
        self._farewell: Message | None = None
        self._gone: Callable[[int], None] | None = None
        self._unread: deque[tuple[Message, int]] = deque()
        self._held = 0
        self._read = trio.lowlevel.ParkingLot()

    @property
    def finished(self) -> bool:
        """Whether the application is through with it, or never came to it."""
        return self._over.is_set()

    async def wait_finished(self) -> None:
        await self._over.wait()

    def refuse(self) -> None:
        """Nobody listens."""
        self._over.set()
        self.leave()

    # --- the client's side

    def put(self, message: Message) -> None:
        """Something from the client."""
        if not self.gone:
            self._inbound.append(message)
            self._arrived.unpark_all()

    def stall(self) -> None:
        self.stalled = True

    def read(self, count: int | None = None) -> None:
        """The client reads ``count`` messages, or all and goes on reading."""
        if count is None:
            self.stalled = False
        taken = 0
        while self._unread and (count is None or taken < count):
            message, size = self._unread.popleft()
            self._held -= size
            taken += 1
            self.client.take(message)
        if taken:
            self._read.unpark_all()
        if self.finished and not self._unread:
            self.leave()

    def leave(self, code: int = 1006, *, unread: bool = False) -> None:
        """The connection ends. ``unread``: what is still on its way is read before."""
        if self.gone:
            return
        if unread:
            self.read(len(self._unread))
        self._unread.clear()
        self._held = 0
        self.gone = self.ending = True
        self.left_at = trio.current_time()
        self._say_farewell(code)
        self._read.unpark_all()
        self.client.lost()

    def _say_farewell(self, code: int) -> None:
        if self._farewell is None:
            kind = self.scope["type"]
            self._farewell = {"type": f"{kind}.disconnect"} | ({"code": code} if kind == "websocket" else {})
            self._arrived.unpark_all()
            if self._gone is not None:
                self._gone(code)

    # --- the application's side

    async def run(self, app: Asgi) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            self.client.failed(error)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if rest is not None:
                self.client.failed(rest)
            if cancelled is not None:
                raise cancelled from None
        finally:
            self._over.set()
            if self.scope["type"] == "websocket" and not self.gone and self._farewell is None:
                self._hand({"type": "websocket.close", "code": 1012}, 4)
            if not self._unread:
                self.leave()

    async def receive(self) -> Message:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbound:
            if self._farewell is not None:
                await trio.lowlevel.checkpoint()
                return self._farewell
            await self._arrived.park()
        return self._inbound.popleft()

    async def send(self, message: Message) -> None:
        size = len(message.get("body") or message.get("bytes") or message.get("text") or b"")
        if message["type"] == "websocket.close":
            self._say_farewell(int(message.get("code") or 1000))
            self.ending = True
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.ending = True
        await self._write([(message, size)])

    async def __call__(self, payloads: list[bytes], *, binary: bool = False) -> None:
        key = "bytes" if binary else "text"
        await self._write(
            [
                ({"type": "websocket.send", key: payload if binary else payload.decode()}, len(payload))
                for payload in payloads
            ]
        )

    @property
    def full(self) -> bool:
        return self.gone or self.ending or self._held > self._capacity

    def send_now(self, payloads: list[bytes]) -> bool:
        for payload in payloads:
            self._hand({"type": "websocket.send", "text": payload.decode()}, len(payload))
        return not self.full

    def when_gone(self, tell: Callable[[int], None]) -> None:
        """As of the streams in ``hector_trio.connection``; so are ``full``, ``send_now``, ``is_own``, ``together``."""
        self._gone = tell
        if self._farewell is not None:
            tell(1006)

    def is_own(self, receive: object, send: object) -> bool:
        return receive == self.receive and send == self.send

    def together(self, sending: Coroutine[Any, Any, None]) -> Awaitable[None]:
        return sending

    async def _write(self, messages: list[tuple[Message, int]]) -> None:
        for message, size in messages:
            self._hand(message, size)
        deadline = trio.current_time() + self._patience
        held = self._held
        while self._held > self._capacity and not self.gone:
            with trio.move_on_at(deadline) as scope:
                await self._read.park()
            if self._held < held:
                held, deadline = self._held, trio.current_time() + self._patience
            elif scope.cancelled_caught:
                self.leave(1006)
        await trio.lowlevel.checkpoint()

    def _hand(self, message: Message, size: int) -> None:
        if self.gone:
            return
        if self.stalled:
            self._unread.append((message, size))
            self._held += size
            self.most_held = max(self.most_held, self._held - size)
        else:
            self.client.take(message)


def websocket_link(path: str, client: Client, *, batches: bool, capacity: int, patience: float) -> Link:
    """``batches``: whether the server offers to take many frames at once, as ours does and others do not."""
    scope: Message = {
        **BASE,
        "type": "websocket",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"x-request-id", b"r")],
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}},
        "state": {},
    }
    link = Link(scope, client, capacity=capacity, patience=patience)
    if batches:
        scope["extensions"][SEND_MANY] = link
    link.put({"type": "websocket.connect"})
    return link


def http_link(
    method: str,
    path: str,
    client: Client,
    *,
    body: bytes = b"",
    headers: dict[str, str],
    query: str = "",
    capacity: int,
    patience: float,
) -> Link:
    sent = {"host": "127.0.0.1", "x-request-id": "r", "content-length": str(len(body)), **headers}
    scope: Message = {
        **BASE,
        "type": "http",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "extensions": {},
        "state": {},
    }
    link = Link(scope, client, capacity=capacity, patience=patience)
    link.put({"type": "http.request", "body": body, "more_body": False})
    return link
