"""How a socket reaches its client: message by message through Quart, or beside it where nobody looks at them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol, cast

import trio
from quart import Websocket

from hector_trio.observability import ROUTE
from hector_trio.transports import Services
from hector_trio.transports.beside import OWN_STREAM, SEND_MANY, Onlookers, Own
from hector_trio.transports.guard import SUBPROTOCOL, local_path
from hector_trio.transports.quart_app import CLOSE_CODE, LEFT_AT, HectorQuart, Receive, Send
from hector_trio.transports.routes import ANSWER

STREAM: Final = "/agents/{agentId}/stream"
VIEW: Final = "stream"
"""The name of its route on Quart."""
_PATH: Final = re.compile(r"/agents/([^/]+)/stream\Z")

_OF_THE_HANDSHAKE: Final = (
    ANSWER, "asgi", "extensions", "headers", "query_string", "raw_path", "state", "subprotocols",
)  # fmt: skip
"""Of the scope."""


class ServerStream(Own, Protocol):
    """A WebSocket of our connection class. See ``hector_trio.connection``."""

    full: bool

    async def __call__(self, payloads: list[bytes], *, binary: bool = False) -> None: ...

    def send_now(self, payloads: list[bytes]) -> bool: ...

    def together(self, sending: Coroutine[Any, Any, None]) -> Awaitable[None]: ...

    def when_gone(self, tell: Callable[[int], None]) -> None: ...


class Wire(Protocol):
    """A WebSocket."""

    scope: dict[str, Any]
    now: ServerStream | None
    """Where frames can be sent without waiting, if they can."""

    async def accept(self) -> None: ...

    def tie(self, scope: trio.CancelScope) -> None:
        """Has *scope* cancelled when the client has left, if whoever called has not been given one for that."""

    def receive(self) -> Awaitable[Any]: ...

    def said(self, received: Any) -> str | bytes | None:
        """What the client said with that; ``None``: it has left, and the scope that was tied is cancelled."""

    async def send_many(self, payloads: list[bytes], *, binary: bool = False) -> None: ...

    async def close(self, code: int) -> None: ...


class QuartWire:
    """Through Quart: each message is one ``websocket.send`` with its signals, and any middleware sees it."""

    def __init__(self, websocket: Websocket) -> None:
        self.scope = cast(dict[str, Any], websocket.scope)
        self.now: ServerStream | None = None
        self.receive = websocket.receive
        self._websocket = websocket
        self._stream: ServerStream | None = (self.scope.get("extensions") or {}).get(SEND_MANY)

    async def accept(self) -> None:
        await self._websocket.accept(subprotocol=self.scope.get(SUBPROTOCOL))

    def tie(self, scope: trio.CancelScope) -> None:
        """Quart's nursery around everything is cancelled."""

    def said(self, received: Any) -> str | bytes | None:
        return cast(str | bytes, received)

    async def send_many(self, payloads: list[bytes], *, binary: bool = False) -> None:
        sending = self._send_each(payloads, binary)
        await (sending if self._stream is None or len(payloads) == 1 else self._stream.together(sending))

    async def _send_each(self, payloads: list[bytes], binary: bool) -> None:
        send = self._websocket.send
        for payload in payloads:
            await send(payload if binary else payload.decode())

    async def close(self, code: int) -> None:
        await self._websocket.close(code)


class DirectWire:
    """Beside Quart: frames go to the server's stream as they are."""

    __slots__ = ("_gone", "_present", "_send", "now", "receive", "scope", "send_many")

    def __init__(self, scope: dict[str, Any], stream: ServerStream, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.now: ServerStream | None = stream
        self.send_many = stream
        self.receive = receive
        self._send = send
        self._gone = False
        self._present: trio.CancelScope | None = None
        stream.when_gone(self._left)

    async def accept(self) -> None:
        await self.receive()  # websocket.connect
        await self._send({"type": "websocket.accept", "subprotocol": self.scope.get(SUBPROTOCOL), "headers": []})
        for name in _OF_THE_HANDSHAKE:  # nobody asks any more, and an idle stream would hold it all
            self.scope.pop(name, None)

    def tie(self, scope: trio.CancelScope) -> None:
        self._present = scope
        if self._gone:
            scope.cancel()

    def _left(self, code: int) -> None:
        self._gone = True
        self.scope[CLOSE_CODE], self.scope[LEFT_AT] = code, trio.current_time()
        if self._present is not None:
            self._present.cancel()

    def said(self, received: Any) -> str | bytes | None:
        if received["type"] == "websocket.disconnect":
            return None
        data: bytes | None = received.get("bytes")
        text: str = received.get("text")
        return text if data is None else data

    async def close(self, code: int) -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": ""})


Serve = Callable[[Wire, str], Awaitable[None]]


class Shortcut:
    """An ASGI application before Quart's: serves an agent's stream itself, if that makes no difference but time.

    Whatever is to be refused, Quart refuses.
    """

    def __init__(self, quart: HectorQuart, services: Services, serve: Serve) -> None:
        """Made when everything of ours is on ``quart``."""
        self._quart = quart
        self._services = services
        self._serve = serve
        self._onlookers = Onlookers(quart, "websocket")

    def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> Awaitable[None]:
        stream: ServerStream | None = scope.get(OWN_STREAM)
        agent_id = None if stream is None else self._agent_of(scope)
        if stream is None or agent_id is None:
            return self._quart(scope, receive, send)  # type: ignore[arg-type]
        scope[ROUTE] = STREAM
        return self._serve(DirectWire(scope, stream, receive, send), agent_id)

    def _agent_of(self, scope: dict[str, Any]) -> str | None:
        if not scope["path"].startswith(scope.get("root_path", "").rstrip("/") + "/"):
            return None
        path = local_path(scope)
        match = _PATH.match(path)
        engine = self._services.engine
        if match is None or match[1] not in engine.agents or engine.draining:
            return None
        if self._services.metrics.open_streams("websocket") >= self._services.settings.limits.sockets:
            return None
        return None if self._onlookers.look_at(path, VIEW) else match[1]
