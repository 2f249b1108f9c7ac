"""What stands before the application: who asks, from where, and how much; decided before a body is read."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from functools import lru_cache, partial
from typing import Any, Final

import structlog
import trio

from hector_trio.a2a import errors
from hector_trio.auth import Principal, cors_origin, forwarded, host_allowed, origin_allowed, trusted_peer
from hector_trio.errors import Forbidden, HectorError, InvalidRequest, KeysUnavailable, PayloadTooLarge, Unauthorized
from hector_trio.models import is_id
from hector_trio.observability import access_log
from hector_trio.transports import Services
from hector_trio.transports.a2a_routes import is_public as is_card
from hector_trio.transports.beside import OWN_REQUEST, OWN_STREAM
from hector_trio.transports.negotiation import is_grpc
from hector_trio.transports.problems import body_of, headers_of, status_of
from hector_trio.transports.quart_app import STREAMED
from hector_trio.transports.rest_keys import KEYS_PATH
from hector_trio.transports.routes import ANSWER, PRINCIPAL, REQUEST_ID, ServerRequest
from hector_trio.transports.uploads import is_upload, method_meant, tus_headers

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Any, Any, Any], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

SUBPROTOCOL: Final = "hector.subprotocol"
"""Key of the scope under which the subprotocol stands that a WebSocket is accepted with, if any."""

NOBODY: Final = Principal("", "nobody", "viewer")
"""Who asks a public path without credentials."""

EXPOSED: Final = (
    b"Location, Retry-After, ETag, X-Request-Id, Upload-Offset, Upload-Length, Upload-Defer-Length, Upload-Metadata, "
    b"Upload-Expires, Tus-Resumable, Tus-Version, Tus-Extension, Tus-Max-Size, Tus-Checksum-Algorithm"
)
NOT_STORED: Final = (b"cache-control", b"no-store")
NOT_SNIFFED: Final = (b"x-content-type-options", b"nosniff")
VARIES: Final = (b"vary", b"Origin")
METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
PREFLIGHT_AGE: Final = b"600"

log = structlog.stdlib.get_logger("hector_trio.guard")


class Guard:
    """An ASGI application around another: refuses what may not pass and marks what may.

    Below it the scope holds the principal and the request's id, and scheme, host and client are those that a trusted
    proxy has told. Every answer gets the headers that PROTOCOL section 1 promises.
    """

    def __init__(self, app: Asgi, services: Services) -> None:
        self._app = app
        self._services = services
        self._answered = access_log(services.metrics, services.settings.log)
        self._tus = tus_headers(services.settings.uploads)
        server = services.settings.server
        self._host_allowed = lru_cache(maxsize=64)(
            partial(host_allowed, loopback_bind=services.loopback, allowed_hosts=server.allowed_hosts)
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began = trio.current_time()
        scope = seen_through_proxies(scope, self._services.settings.server.trusted_proxies)
        if scope["path"] == scope.get("root_path"):
            scope["path"] += "/"  # the prefix without its slash is the page too
        headers = Headers(scope["headers"])
        request_id = scope[REQUEST_ID] = accepted_request_id(headers.one(b"x-request-id"))
        exchange = Exchange(send, request_id, scope.get(OWN_REQUEST))
        scope[ANSWER] = exchange.send_whole
        if scope["type"] == "http" and is_upload(local_path(scope)):
            exchange.more = self._tus
            scope["method"] = method_meant(scope["method"], headers.one(b"x-http-method-override"))
            scope[STREAMED] = scope["method"] in ("POST", "PATCH")
        bound = dict(structlog.contextvars.bind_contextvars(request_id=request_id))
        try:
            if await self._admits(scope, headers, exchange):
                if self._services.authenticator.required:  # else everybody has the same name, which says nothing
                    bound |= structlog.contextvars.bind_contextvars(principal=scope[PRINCIPAL].name)
                if OWN_STREAM in scope:
                    bound = {}  # the task is this stream's own, and an idle one would hold them
                del headers  # an idle stream would hold them
                await self._app(scope, receive, exchange.send)
        finally:
            self._answered(scope, exchange.status, trio.current_time() - began)
            structlog.contextvars.reset_contextvars(**bound)

    async def _admits(self, scope: Message, headers: Headers, exchange: Exchange) -> bool:
        """Marks the scope, or answers and is False."""
        try:
            self._check_host(headers)
            exchange.shown_to = self._check_origin(scope, headers)
            if is_preflight(scope, headers):
                await exchange.send_whole(204, preflight(headers))
                return False
            scope[PRINCIPAL], scope[SUBPROTOCOL] = await self._authenticate(scope, headers)
            self._check_length(headers, streamed=scope.get(STREAMED, False))
        except HectorError as error:
            await exchange.refuse(scope, error)
            return False
        return True

    def _check_host(self, headers: Headers) -> None:
        """Against DNS rebinding: a page of a name that resolves to this machine is not of this machine."""
        host = headers.one(b"host")
        if not self._host_allowed(host):
            log.warning("host_refused", host=host, allow_with="server.allowed_hosts")
            raise Forbidden("The host asked for is neither a loopback name nor in allowed_hosts")

    def _check_origin(self, scope: Message, headers: Headers) -> str | None:
        """To pages of which origin a browser may show the answer."""
        origin = headers.one(b"origin")
        if origin is None:
            return None
        host = headers.one(b"host")
        allowed = self._services.settings.server.allow_origins
        if not origin_allowed(origin, scheme=scope["scheme"], host_header=host, allow_origins=allowed):
            log.warning("origin_refused", origin=origin, allow_with=f"--allow-origin {origin}")
            raise Forbidden("Pages of this origin may not ask this server; the server's log says how to allow it")
        return cors_origin(origin, scheme=scope["scheme"], host_header=host, allow_origins=allowed)

    async def _authenticate(self, scope: Message, headers: Headers) -> tuple[Principal, str | None]:
        try:
            return await self._services.authenticator.authenticate(
                headers.one(b"authorization"), scope.get("subprotocols") or ()
            )
        except (Unauthorized, KeysUnavailable):
            if is_public(local_path(scope)):
                return NOBODY, None
            raise

    def _check_length(self, headers: Headers, *, streamed: bool) -> None:
        """RFC 9110, 15.5.14. A body without a length is cut at the same limit while it is read."""
        settings = self._services.settings
        limit = settings.uploads.max_bytes if streamed else settings.limits.body_bytes
        text = headers.one(b"content-length")
        if text is None:
            return
        if not (text.isascii() and text.isdigit()):
            raise InvalidRequest("Content-Length is not a number")
        if len(text) > 18 or int(text) > limit:
            raise PayloadTooLarge(f"The body is larger than {limit} bytes")


class Exchange:
    """What is sent back: adds the headers that every answer has, and remembers the status."""

    __slots__ = ("_request", "_request_id", "_send", "more", "shown_to", "status")

    def __init__(self, send: Send, request_id: str, request: ServerRequest | None) -> None:
        self._send = send
        self._request = request
        self._request_id = request_id.encode()
        self.more: RawHeaders = []
        """What every answer at this path has besides."""
        self.shown_to: str | None = None
        """The origin to whose pages a browser may show the answer, or ``*``."""
        self.status: int | None = None
        """``None`` until something was answered; 101 for an accepted WebSocket."""

    def send(self, message: Message) -> Awaitable[None]:
        """No coroutine of its own: one costs as much as encoding a chunk."""
        kind = message["type"]
        if kind == "websocket.send":
            pass  # by far the most frequent
        elif kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            message = {**message, "headers": self._completed(message.get("headers", ()))}
        elif kind == "websocket.accept":
            self.status = 101
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self._request_id)]}
        elif kind == "websocket.close" and self.status is None:
            self.status = 403  # that is how a server answers a close before the accept
        return self._send(message)

    def _completed(self, headers: Any) -> RawHeaders:
        result: RawHeaders = list(headers)
        for name, _ in result:
            if name.lower() == b"cache-control":
                break
        else:
            result.append(NOT_STORED)
        result += (NOT_SNIFFED, (b"x-request-id", self._request_id), VARIES)
        result += self.more
        if self.shown_to is not None:
            result.append((b"access-control-allow-origin", self.shown_to.encode("latin-1")))
            result.append((b"access-control-expose-headers", EXPOSED))
        return result

    async def send_whole(self, status: int, headers: RawHeaders, body: bytes = b"", *, prefix: str = "http") -> None:
        """Send a whole answer; on HTTP, in one step where the server can."""
        if self._request is not None:
            self.status = status
            await self._request.respond(status, self._completed(headers), body)
            return
        await self.send({"type": f"{prefix}.response.start", "status": status, "headers": headers})
        await self.send({"type": f"{prefix}.response.body", "body": body, "more_body": False})

    async def refuse(self, scope: Message, error: HectorError) -> None:
        """RFC 9457 on HTTP, and on a WebSocket instead of the upgrade; a call of gRPC in its own way."""
        if is_grpc(scope):
            from hector_trio.transports import a2a_grpc

            await self.send_whole(200, a2a_grpc.refusal(errors.of(error)))
            return
        body = body_of(error, instance=scope["path"], request_id=scope[REQUEST_ID])
        headers = [(name.lower().encode(), value.encode()) for name, value in headers_of(error, scope["path"]).items()]
        headers.append((b"content-length", str(len(body)).encode()))
        if scope["type"] == "http":
            await self.send_whole(status_of(error), headers, body)
        elif "websocket.http.response" in (scope.get("extensions") or {}):
            await self.send_whole(status_of(error), headers, body, prefix="websocket.http")
        else:
            await self.send({"type": "websocket.close", "code": 1008})


# --- decided without I/O ----------------------------------------------------------------------------------------------


class Headers:
    """A request's headers by their lower-case names."""

    __slots__ = ("_values",)

    def __init__(self, raw: Any) -> None:
        self._values: dict[bytes, list[bytes]] = {}
        for name, value in raw:
            self._values.setdefault(name.lower(), []).append(value)

    def one(self, name: bytes) -> str | None:
        """The value; of several, joined (RFC 9110, 5.3), which no rule here accepts."""
        values = self._values.get(name)
        return None if values is None else b", ".join(values).decode("latin-1")


def seen_through_proxies(scope: Message, trusted: list[str]) -> Message:
    """``scope`` with scheme, host and client as ``X-Forwarded-*`` of a trusted peer has them: a copy, if others may
    look at it."""
    if OWN_REQUEST not in scope and OWN_STREAM not in scope:
        scope = dict(scope)
    client = scope.get("client")
    peer = client[0] if client else None
    if not trusted_peer(peer, trusted):
        return scope
    host = Headers(scope["headers"]).one(b"host")
    seen = forwarded(scope["headers"], scheme=scope["scheme"], host=host, client=peer, trusted_proxies=trusted)
    scope["scheme"] = seen.scheme
    if seen.host is not None and seen.host != host:
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"host"]
        scope["headers"] = [*others, (b"host", seen.host.encode("latin-1"))]
    if seen.client != peer:
        scope["client"] = (seen.client, 0)
    return scope


def accepted_request_id(given: str | None) -> str:
    """The client's ``X-Request-Id`` if it is an id, else a new one."""
    return given if given is not None and is_id(given) else str(uuid.uuid4())


def local_path(scope: Message) -> str:
    """The path below the root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


def is_public(path: str) -> bool:
    """Whether anybody may ask without credentials: the page, its assets, what watches the server, A2A's cards, keys."""
    return path in ("/", KEYS_PATH) or path.startswith(("/health/", "/assets/")) or is_card(path)


def is_preflight(scope: Message, headers: Headers) -> bool:
    """Whether a browser asks first (Fetch, CORS-preflight request)."""
    return (
        scope["type"] == "http"
        and scope["method"] == "OPTIONS"
        and headers.one(b"origin") is not None
        and headers.one(b"access-control-request-method") is not None
    )


def preflight(headers: Headers) -> RawHeaders:
    """The answer to a preflight from an allowed origin. Nothing works by cookies, so no credentials are allowed."""
    wanted = headers.one(b"access-control-request-headers") or ""
    names = [name.strip() for name in wanted.split(",")]
    result = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", PREFLIGHT_AGE),
    ]
    if wanted and all(name and name.isascii() and name.replace("-", "").isalnum() for name in names):
        result.append((b"access-control-allow-headers", ", ".join(names).encode()))
    if headers.one(b"access-control-request-private-network") == "true":
        result.append((b"access-control-allow-private-network", b"true"))
    return result
