"""Quart-Trio, subclassed: one nursery per connection, errors that are told, and a reader that never waits."""

from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from types import MethodType
from typing import Any, cast

import trio
from quart import ResponseReturnValue, has_request_context, has_websocket_context, request, websocket
from quart.routing import QuartMap, QuartRule
from quart.signals import websocket_received, websocket_sent
from quart.wrappers import Response, Websocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection, TrioASGIWebsocketConnection
from quart_trio.wrappers import TrioRequest, TrioResponse, TrioWebsocket
from quart_trio.wrappers.request import TrioBody
from quart_trio.wrappers.response import TrioIterableBody
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Rule, RuleFactory
from werkzeug.wrappers import Response as WerkzeugResponse

from hector_trio.connection import BODY_AHEAD, LOGGER, ConnectionLimits, Inbox, contain

NURSERY = "hector.nursery"
"""Key of the scope under which the nursery of the request or of the WebSocket stands."""
CLOSE_CODE = "hector.close_code"
"""Key of the WebSocket scope under which the code stands with which the connection ended, once it has."""
LEFT_AT = "hector.left_at"
"""Key of the scope under which `trio.current_time()` stands of the moment at which the client was seen to have left, or
the WebSocket to have ended."""
STREAMED = "hector.streamed"
"""Key of the scope that is set when the handler iterates over the body, which then may have any size."""
CLOSE_TIMEOUT = 1.0
"""Seconds that our own Close frame may take to leave when a client is being refused."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class AnyBody(TrioIterableBody):
    """A body from a generator, an iterable, or (what the base class takes for an iterable) any asynchronous iterator.

    An iterator with `aclose` is closed at the end, also when the client leaves.
    """

    def __init__(self, iterable: Any) -> None:
        if isinstance(iterable, AsyncIterable):
            self.iter = cast(Any, aiter(iterable))
        else:
            super().__init__(iterable)


class HectorResponse(TrioResponse):
    """A response whose body may be any asynchronous iterator object."""

    iterable_body_class = AnyBody


class EventStreamResponse(HectorResponse):
    """Server-sent events, *body* giving one or more complete events each time, for as long as it likes.

    The head leaves at once. No cache or proxy may hold events back. When the client leaves, *body* is cancelled and, if
    it has `aclose`, closed.
    """

    default_mimetype = "text/event-stream"

    def __init__(self, body: AsyncIterable[bytes | str], headers: dict[str, str] | None = None) -> None:
        super().__init__(
            cast(Any, body),
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})},
        )
        self.timeout = None


class HectorRequestBody(TrioBody):
    """A request body that a handler can iterate over however fast its client sends."""

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self._streamed = False
        self._taken = trio.lowlevel.ParkingLot()

    def stream(self) -> None:
        """The handler is going to iterate: from the first byte on the body waits for it, and has no limit."""
        self._streamed = True
        self._max_content_length = self._must_raise = None

    def arrived(self) -> bytes:
        """What has arrived and was not taken yet; takes it."""
        data = bytes(self._data)
        self._data.clear()
        return data

    async def __anext__(self) -> bytes:
        self._streamed = True
        data = await super().__anext__()
        self._taken.unpark_all()
        return data

    async def wait_for_room(self) -> None:
        """Wait while a handler that iterates is more than BODY_AHEAD bytes behind. One that wants the body in one piece
        is bounded by MAX_CONTENT_LENGTH instead."""
        while self._streamed and len(self._data) > BODY_AHEAD:
            await self._taken.park()


class HectorRequest(TrioRequest):
    """A request whose body does not run ahead of the handler that iterates over it."""

    body_class = HectorRequestBody


class HectorWebsocket(TrioWebsocket):
    """A WebSocket that knows whether it has been accepted and closed."""

    accepted = False
    closed = False

    async def accept(self, headers: Any = None, subprotocol: str | None = None) -> None:
        """Answer the upgrade, once; later calls do nothing."""
        if not self.accepted:
            await super().accept(headers, subprotocol)
            self.accepted = True

    def send(self, data: Any) -> Coroutine[Any, Any, None]:
        """Send one message, text or bytes. A cancel leaves it queued, complete and in order."""
        return self._send(data) if self.accepted else self._send_first(data)

    async def _send_first(self, data: Any) -> None:
        await self.accept()
        await self._send(data)

    async def close(self, code: int, reason: str = "") -> None:
        """Send our Close frame, or 403 before `accept`; later calls do nothing."""
        if not self.closed:
            self.closed = True
            await super().close(code, reason)


class HectorHTTPConnection(TrioASGIHTTPConnection):
    """One request, in one nursery that ends with its response or when its client leaves."""

    _answered = False
    """Whether the last of the response was sent: what ends then is the exchange, and nobody has left it."""

    async def __call__(self, receive: Receive, send: Send) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._answered = True
            await send(message)

        request = self._create_request_from_scope(answer)
        if cast(dict[str, Any], self.scope).get(STREAMED):
            cast(HectorRequestBody, request.body).stream()
        async with trio.open_nursery() as nursery:
            cast(dict[str, Any], self.scope)[NURSERY] = nursery
            nursery.start_soon(self._take_body, nursery, cast(HectorRequestBody, request.body), receive, name="reader")
            nursery.start_soon(self.handle_request, nursery, request, answer, name="handler")

    async def _take_body(self, nursery: trio.Nursery, body: HectorRequestBody, receive: Receive) -> None:
        while True:
            event = await receive()
            if event["type"] == "http.request":
                body.append(event.get("body", b""))
                if not event.get("more_body", False):
                    body.set_complete()
                await body.wait_for_room()
            elif event["type"] == "http.disconnect":
                if not self._answered:
                    cast(dict[str, Any], self.scope)[LEFT_AT] = trio.current_time()
                break
        nursery.cancel_scope.cancel()


class HectorWebsocketConnection(TrioASGIWebsocketConnection):
    """One WebSocket, in one nursery that ends with its handler or when its client leaves."""

    app: "HectorQuart"

    def __init__(self, app: "HectorQuart", scope: Any) -> None:
        super().__init__(app, scope)
        self._inbox: Inbox[str | bytes] = Inbox(app.limits.max_unread_messages, app.limits.max_unread_bytes)
        self.receive_channel = cast(Any, self._inbox)

    async def __call__(self, receive: Receive, send: Send) -> None:
        websocket = cast(HectorWebsocket, self._create_websocket_from_scope(send))
        async with trio.open_nursery() as nursery:
            cast(dict[str, Any], self.scope)[NURSERY] = nursery
            nursery.start_soon(self._take_messages, nursery, websocket, receive, name="reader")
            nursery.start_soon(self.handle_websocket, nursery, websocket, send, name="handler")

    def send_data(self, send: Send, data: str | bytes) -> Awaitable[None]:  # type: ignore[override]
        """As the base class; asks nobody where nobody has asked to be told, and is no coroutine of its own
        then: each on the way of a chunk costs as much as its encoding."""
        if isinstance(data, str):
            sending = send({"type": "websocket.send", "bytes": None, "text": data})
        else:
            sending = send({"type": "websocket.send", "bytes": data, "text": None})
        return self._send_and_tell(sending, data) if websocket_sent.receivers else sending

    async def _send_and_tell(self, sending: Awaitable[None], data: str | bytes) -> None:
        await sending
        await websocket_sent.send_async(data)

    async def _take_messages(self, nursery: trio.Nursery, websocket: HectorWebsocket, receive: Receive) -> None:
        """Take every message at once, so that the end of the connection never waits behind unread ones."""
        while True:
            event = await receive()
            if event["type"] == "websocket.receive":
                data = event.get("bytes")
                message: str | bytes = event["text"] if data is None else data
                if websocket_received.receivers:
                    wrap: Any = self.app.ensure_async
                    await websocket_received.send_async(message, _sync_wrapper=wrap)
                if not self._inbox.put(message, len(message)):
                    with trio.move_on_after(CLOSE_TIMEOUT):
                        await websocket.close(1008, "too many unread messages")
                    break
            elif event["type"] == "websocket.disconnect":
                scope = cast(dict[str, Any], self.scope)
                scope[CLOSE_CODE] = event.get("code", 1005)
                scope[LEFT_AT] = trio.current_time()
                break
        nursery.cancel_scope.cancel()


class HectorRule(QuartRule):
    """A rule that is compiled for building URLs when the first is built: of ours nobody builds any, and to compile them
    all takes longer than everything else that makes an application."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        compile_now = super()._compile_builder

        def build(rule: Rule, /, **values: Any) -> tuple[str, str]:
            compiled = compile_now(append_unknown)
            setattr(rule, "_build_unknown" if append_unknown else "_build", MethodType(compiled, rule))
            return compiled(rule, **values)

        return build


class HectorMap(QuartMap):
    """A map of rules that counts how often it was added to."""

    added = 0

    def add(self, rulefactory: RuleFactory) -> None:
        super().add(rulefactory)
        self.added += 1


class HectorQuart(QuartTrio):
    """A Quart-Trio application that logs every error whole, and answers it where it can.

    *limits* give the bounds for messages a WebSocket handler has not read.
    """

    asgi_http_class = HectorHTTPConnection
    asgi_websocket_class = HectorWebsocketConnection  # type: ignore[assignment]
    request_class = HectorRequest
    response_class = HectorResponse
    url_map: HectorMap
    url_map_class = HectorMap
    url_rule_class = HectorRule  # type: ignore[assignment]
    websocket_class = HectorWebsocket

    def __init__(self, import_name: str, *, limits: ConnectionLimits | None = None, **options: Any) -> None:
        super().__init__(import_name, **options)
        self.limits = limits or ConnectionLimits()
        # Sixty seconds would cut a stream in the middle, and look like its end.
        self.config["RESPONSE_TIMEOUT"] = None

    def log_exception(self, exception_info: Any) -> None:
        """Log an error that no handler took, with everything an exception group holds."""
        what = "start or stop of the application"
        if has_request_context():
            what = f"{request.method} {request.path}"
        elif has_websocket_context():
            what = f"WebSocket {websocket.path}"
        LOGGER.error("Exception in %s", what, exc_info=exception_info)

    async def handle_user_exception(self, error: Any) -> HTTPException | ResponseReturnValue:
        """Find the error handler. Errors raised beside a cancel have nobody to be told to: they are logged."""
        if isinstance(error, BaseExceptionGroup) and not isinstance(error, ExceptionGroup):
            contain(error, "Exception while a handler was being cancelled")
        return await super().handle_user_exception(error)

    async def handle_websocket(self, websocket: Websocket) -> Response | WerkzeugResponse | None:
        """As the base class; once accepted, a failure can only be told by its code: 1011 ours, 1008 the client's."""
        response = await super().handle_websocket(websocket)
        if response is not None and cast(HectorWebsocket, websocket).accepted:
            await websocket.close(1011 if response.status_code >= 500 else 1008)
        return response

    async def make_default_options_response(self) -> Response:
        """RFC 9110, 9.3.7. A browser's preflight never comes this far."""
        response = await super().make_default_options_response()
        response.status_code = 204
        response.headers["Allow"] = ", ".join(sorted(response.allow))
        del response.headers["Content-Type"], response.headers["Content-Length"]
        return response

    def add_background_task(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run *func* until the application stops. An error is logged; it ends neither this nor other tasks to come."""

        async def guarded() -> None:
            try:
                async with self.app_context():
                    await self.ensure_async(func)(*args, **kwargs)
            except (Exception, BaseExceptionGroup) as error:
                contain(error, "A background task failed")

        self.nursery.start_soon(guarded)
