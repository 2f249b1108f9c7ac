"""REST beside Quart: the table's routes answered straight from ASGI, where nobody on Quart looks at requests."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from quart import Quart
from quart.signals import (
    appcontext_popped,
    appcontext_pushed,
    appcontext_tearing_down,
    got_request_exception,
    request_finished,
    request_started,
    request_tearing_down,
)

from hector_trio.connection import contain
from hector_trio.errors import HectorError
from hector_trio.observability import ROUTE
from hector_trio.transports import Services
from hector_trio.transports.problems import INTERNAL
from hector_trio.transports.quart_app import LEFT_AT, NURSERY, STREAMED, HectorRequestBody, Receive, Send
from hector_trio.transports.rest import routes_of
from hector_trio.transports.routes import (
    ANSWER,
    DIRECT,
    REQUEST_ID,
    Call,
    Route,
    ServerRequest,
    perform,
    raw_headers,
    refusal,
)

EXTENSION: Final = "hector.request"
"""The ASGI scope extension of our connection class: the request itself, see ``ServerRequest``."""

_SIGNALS: Final = (
    appcontext_popped,
    appcontext_pushed,
    appcontext_tearing_down,
    got_request_exception,
    request_finished,
    request_started,
    request_tearing_down,
)
_OVERRIDABLE: Final = frozenset(
    ("asgi_app", "handle_request", "full_dispatch_request", "dispatch_request", "preprocess_request", "make_response")
)
_FOR_QUART: Final = frozenset((b"transfer-encoding", b"expect"))


def mark(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Notes in the scope of a request whether it comes from our connection class with nothing in between."""
    request: ServerRequest | None = (scope.get("extensions") or {}).get(EXTENSION)
    if request is not None and request.is_own(receive, send):
        scope[DIRECT] = request


class Direct:
    """An ASGI application before another, which leads to Quart: answers a request of REST's table itself, if that makes
    no difference but time.

    It does not when Quart has hooks, signals' receivers, error handlers or views that are not ours, or routes that may
    be meant instead; nor when something stands between the server and the application. HEAD, OPTIONS, streams of events
    and of uploads, bodies of unknown length, and paths and methods that the table does not have, are Quart's.
    """

    def __init__(self, quart: Quart, services: Services, below: Callable[..., Awaitable[None]]) -> None:
        """Made when everything of ours is on ``quart``: what is there now is what makes no difference."""
        self._quart = quart
        self._services = services
        self._below = below
        self._table: dict[tuple[str, int], list[tuple[re.Pattern[str], Route]]] = {}
        for route in routes_of(services):
            pattern = re.sub(r"{(\w+)}", r"(?P<\1>[A-Za-z0-9._~-]+)", re.sub(r"\.", r"\\.", route.path)) + r"\Z"
            self._table.setdefault((route.method, route.path.count("/")), []).append((re.compile(pattern), route))
        self._views = dict(quart.view_functions)
        self._ours = _hooks(quart)

    def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> Awaitable[None]:
        request: ServerRequest | None = scope.get(DIRECT)
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
                return (route, match.groupdict(), path) if self._may(scope) else None
        return None

    def _may(self, scope: dict[str, Any]) -> bool:
        if scope.get(STREAMED):
            return False
        for name, value in scope["headers"]:
            if name in _FOR_QUART or (name == b"accept" and b"event-stream" in value.lower()):
                return False
        return _hooks(self._quart) == self._ours and self._quart.view_functions == self._views


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


def _hooks(quart: Quart) -> tuple[object, ...]:
    """What on ``quart`` can see or change what happens to a request. There are only ever more of them, but for error
    handlers, which may be replaced."""
    count = len(quart.teardown_appcontext_funcs)
    for registry in (
        quart.before_request_funcs,
        quart.after_request_funcs,
        quart.teardown_request_funcs,
        quart.url_value_preprocessors,
    ):
        for functions in registry.values():
            count += len(functions)
    for signal in _SIGNALS:
        count += len(signal.receivers)
    handlers: list[object] = []
    for by_code in quart.error_handler_spec.values():
        for by_type in by_code.values():
            handlers += by_type.values()
    return count, handlers, quart.config["MAX_CONTENT_LENGTH"], _OVERRIDABLE.isdisjoint(vars(quart))
