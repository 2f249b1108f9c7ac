"""REST beside Quart: the table's routes answered straight from ASGI, where nobody on Quart looks at requests."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from hector_trio.connection import contain
from hector_trio.errors import HectorError
from hector_trio.observability import ROUTE
from hector_trio.transports import Services
from hector_trio.transports.beside import OWN_REQUEST, Onlookers
from hector_trio.transports.problems import INTERNAL
from hector_trio.transports.quart_app import LEFT_AT, NURSERY, STREAMED, HectorQuart, HectorRequestBody, Receive, Send
from hector_trio.transports.rest import routes_of
from hector_trio.transports.routes import (
    ANSWER,
    REQUEST_ID,
    Call,
    Route,
    ServerRequest,
    perform,
    raw_headers,
    refusal,
)

_FOR_QUART: Final = frozenset((b"transfer-encoding", b"expect"))


class Direct:
    """An ASGI application before another, which leads to Quart: answers a request of REST's table itself, if that makes
    no difference but time.

    HEAD, OPTIONS, streams of events and of uploads, bodies of unknown length, and paths and methods that the table does
    not have, are Quart's.
    """

    def __init__(self, quart: HectorQuart, services: Services, below: Callable[..., Awaitable[None]]) -> None:
        """Made when everything of ours is on ``quart``."""
        self._services = services
        self._below = below
        self._table: dict[tuple[str, int], list[tuple[re.Pattern[str], Route]]] = {}
        for route in routes_of(services):
            pattern = re.sub(r"{(\w+)}", r"(?P<\1>[A-Za-z0-9._~-]+)", re.sub(r"\.", r"\\.", route.path)) + r"\Z"
            self._table.setdefault((route.method, route.path.count("/")), []).append((re.compile(pattern), route))
        self._onlookers = Onlookers(quart, "http")

    def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> Awaitable[None]:
        request: ServerRequest | None = scope.get(OWN_REQUEST)
        found = None if request is None else self._find(scope)
        if request is None or found is None:
            return self._below(scope, receive, send)
        return self._serve(request, scope, receive, *found)

    async def _serve(
        self,
        request: ServerRequest,
        scope: dict[str, Any],
        receive: Receive,
        route: Route,
        ids: dict[str, str],
        path: str,
    ) -> None:
        scope[ROUTE] = route.path
        call = Call(self._services, scope, ids, _Body(receive))
        if not route.runs:
            with trio.CancelScope() as present:
                await _answer(route, call, path, scope, request, present)
            return
        async with trio.open_nursery() as nursery:
            scope[NURSERY] = nursery
            await _answer(route, call, path, scope, request, nursery.cancel_scope)
            nursery.cancel_scope.cancel()

    def _find(self, scope: dict[str, Any]) -> tuple[Route, dict[str, str], str] | None:
        """The route that is asked, the ids in its path, and the path; if it may be answered here."""
        path: str = scope["path"]
        root: str = scope.get("root_path", "").rstrip("/")
        if root:
            if not path.startswith(root + "/"):
                return None
            path = path.removeprefix(root)
        for pattern, route in self._table.get((scope["method"], path.count("/")), ()):
            match = pattern.match(path)
            if match is not None:
                return None if self._is_for_quart(scope, path, route) else (route, match.groupdict(), path)
        return None

    def _is_for_quart(self, scope: dict[str, Any], path: str, route: Route) -> bool:
        if scope.get(STREAMED):
            return True
        for name, value in scope["headers"]:
            if name in _FOR_QUART or (name == b"accept" and b"event-stream" in value.lower()):
                return True
        return self._onlookers.look_at(path, route.name)


async def _answer(
    route: Route, call: Call, path: str, scope: dict[str, Any], request: ServerRequest, present: trio.CancelScope
) -> None:
    """Answers the call; ``present`` is cancelled when the client leaves."""

    def gone() -> None:
        scope[LEFT_AT] = trio.current_time()
        present.cancel()

    request.when_gone(gone)
    try:
        reply = await perform(route, call)
    except HectorError as error:
        reply = refusal(error, path, scope[REQUEST_ID])
    except (Exception, BaseExceptionGroup) as error:
        contain(error, f"Exception in {call.method} {path}")
        reply = refusal(INTERNAL, path, scope[REQUEST_ID])
    assert reply.events is None
    await scope[ANSWER](reply.status, raw_headers(reply), reply.body)


class _Body:
    """A body of which the length is known and has passed the guard."""

    __slots__ = ("_data", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._data: bytes | None = None

    async def data(self) -> bytes:
        if self._data is None:
            parts: list[bytes] = []
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    await trio.sleep_forever()  # cancelled, by whoever was told of it
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
            self._data = b"".join(parts)
        return self._data

    @property
    def pieces(self) -> HectorRequestBody:
        raise RuntimeError("A body that is streamed is read through Quart")
