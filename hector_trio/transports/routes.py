"""What a REST route is: a row of the table that routes, OpenAPI and README come from; the call it gets, its reply."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar
from urllib.parse import parse_qsl

import trio
from msgspec import Struct, field
from quart import Response
from werkzeug.sansio.utils import get_host

from hector_trio.auth import Principal, Right
from hector_trio.errors import AgentNotFound, HectorError, NotFound, SessionNotFound, TaskNotFound, UploadNotFound
from hector_trio.models import encode, is_id
from hector_trio.transports import Services
from hector_trio.transports.beside import Own
from hector_trio.transports.problems import body_of, headers_of, status_of
from hector_trio.transports.quart_app import NURSERY, EventStreamResponse, HectorRequestBody
from hector_trio.transports.requests import decode_json

T = TypeVar("T")

PRINCIPAL: Final = "hector.principal"
REQUEST_ID: Final = "hector.request_id"
"""Keys of the scope under which the guard leaves who asks, and the id of the request."""

ANSWER: Final = "hector.answer"
"""Key of the scope under which the guard leaves a function that sends a whole answer: status, headers, body."""

NOT_FOUND: Final[dict[str, type[NotFound]]] = {
    "agentId": AgentNotFound,
    "sessionId": SessionNotFound,
    "taskId": TaskNotFound,
    "uploadId": UploadNotFound,
}
"""How a name in a path that cannot be an id is answered: exactly like an unknown one."""


class Query(Struct, frozen=True):
    """A query parameter: its name, its JSON schema, what it does."""

    name: str
    schema: Mapping[str, Any]
    description: str


class Header(Struct, frozen=True):
    """A request header that a route knows: its name, what it does, its JSON schema."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    required: bool = False


class Answer(Struct, frozen=True):
    """One status that a route answers with when all is well."""

    description: str
    type: Any = None
    """What the JSON body is; ``None``: no body, or one of ``media_type`` that no schema describes."""
    media_type: str = "application/json"
    events: bool = False
    """Whether the same status can also be a stream of server-sent events."""
    headers: tuple[str, ...] = ()


class Route(Struct, frozen=True):
    """One row. ``right``: what the caller must be allowed to do; ``None``: anybody may, also without credentials."""

    method: Literal["GET", "HEAD", "POST", "PATCH", "DELETE"]
    path: str
    """With ``{agentId}``, ``{sessionId}``, ``{taskId}``, ``{uploadId}``."""
    name: str
    summary: str
    run: Callable[[Call], Awaitable[Reply]]
    answers: Mapping[int, Answer]
    right: Right | None = "read"
    body: Any = None
    """What the JSON body is; ``bytes``: a piece of a file instead, which may be missing."""
    query: tuple[Query, ...] = ()
    headers: tuple[Header, ...] = ()
    refusals: tuple[type[HectorError], ...] = ()
    """What it may refuse with, beside what every route may (credentials, size, drain, store)."""
    runs: bool = False
    """Whether it may start a run in the nursery of its request."""


class Reply(Struct, frozen=True):
    """What a route's function decided to answer."""

    status: int = 200
    body: bytes = b""
    media_type: str = "application/json"
    """Empty: nothing is said, because there is no body."""
    headers: dict[str, str] = {}
    events: AsyncIterator[bytes] | None = None
    """Server-sent events instead of a body."""


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """``value`` as JSON; headers by their names with ``_`` for ``-``."""
    return Reply(status, encode(value), headers={name.replace("_", "-"): text for name, text in headers.items()})


class ServerRequest(Own, Protocol):
    """A request of our connection class. See ``hector_trio.connection``."""

    def when_gone(self, tell: Callable[[], None]) -> None: ...

    async def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None: ...


class Body(Protocol):
    """The body of a request, which may still be on its way."""

    async def data(self) -> bytes: ...

    @property
    def pieces(self) -> HectorRequestBody: ...


class Call:
    """One request as a route's function sees it: an ASGI scope that has passed the guard, and a body."""

    __slots__ = ("_body", "_scope", "ids", "principal", "services")

    def __init__(self, services: Services, scope: dict[str, Any], ids: Mapping[str, str], body: Body) -> None:
        self.services = services
        self.ids = ids
        self.principal: Principal = scope[PRINCIPAL]
        self._scope = scope
        self._body = body

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of several with one name, the first."""
        text: bytes = self._scope["query_string"]
        if not text:
            return {}
        result: dict[str, str] = {}
        for name, value in parse_qsl(text.decode(), keep_blank_values=True, errors="werkzeug.url_quote"):
            result.setdefault(name, value)
        return result

    @property
    def method(self) -> str:
        method: str = self._scope["method"]
        return method

    @property
    def owner(self) -> str:
        return self.principal.owner

    @property
    def until(self) -> float:
        """``trio.current_time()`` at which the caller's token expires, and a stream with it."""
        return trio.current_time() + self.principal.seconds_left

    @property
    def client(self) -> str | None:
        """The address of the client, as a trusted proxy has told it; ``None``: it is on the Unix socket."""
        address = self._scope.get("client")
        return address[0] if address else None

    @property
    def nursery(self) -> trio.Nursery:
        """The request's nursery, on a route that ``runs``: cancelled when the answer is complete, or the client has
        left."""
        nursery: trio.Nursery = self._scope[NURSERY]
        return nursery

    def header(self, name: str) -> str | None:
        """A header's value; of several with one name, joined (RFC 9110, 5.3)."""
        wanted = name.lower().encode()
        values = [value for key, value in self._scope["headers"] if key.lower() == wanted]
        return b", ".join(values).decode("latin-1") if values else None

    @property
    def source(self) -> HectorRequestBody:
        """The body in the pieces in which it comes, on a route whose bodies are streamed (see the guard)."""
        return self._body.pieces

    async def data(self) -> bytes:
        """The body. Raises werkzeug's RequestEntityTooLarge beyond the limit."""
        return await self._body.data()

    async def read(self, type_: type[T]) -> T:
        """The body as ``type_``, whatever its Content-Type says. Raises: InvalidRequest."""
        return decode_json(await self.data(), type_, max_depth=self.services.settings.limits.json_depth)

    @property
    def _root(self) -> str:
        root: str = self._scope.get("root_path", "")
        return root.rstrip("/")

    def path(self, path: str) -> str:
        """``path`` as clients reach it from outside: below the root path."""
        return self._root + path

    @property
    def base(self) -> str:
        """Where clients reach this server: ``base_url``, else the (trusted) host that they asked."""
        configured = self.services.settings.server.base_url
        if configured is not None:
            return configured.rstrip("/")
        scheme: str = self._scope["scheme"]
        host = get_host(scheme, self.header("Host") or "")
        if not host:
            address = self._scope.get("server") or ("localhost", None)
            host = address[0] if address[1] is None else f"{address[0]}:{address[1]}"
        return f"{scheme}://{host}{self._root}"


async def perform(route: Route, call: Call) -> Reply:
    """What ``route`` answers to ``call``. Raises: Forbidden, NotFound, and what the route's function refuses with."""
    if route.right is not None and not call.principal.may(route.right):
        raise call.principal.forbidden(route.right)
    check_ids(call.ids)
    return await route.run(call)


def check_ids(ids: Mapping[str, str]) -> None:
    """Raises: NotFound, of the right kind, for a name that can be nobody's id."""
    for name, text in ids.items():
        if not is_id(text):
            raise NOT_FOUND[name](f"There is no such {name.removesuffix('Id')}")


def raw_headers(reply: Reply) -> list[tuple[bytes, bytes]]:
    """The headers of ``reply``, which is no stream of events, as ASGI has them."""
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
    if reply.status in (204, 304):
        return headers
    first = [(b"content-type", reply.media_type.encode())] if reply.media_type else []
    return [*first, (b"content-length", b"%d" % len(reply.body)), *headers]


def respond(reply: Reply) -> Response:
    """``reply`` as Quart's response, with the same headers as ``raw_headers``."""
    if reply.events is not None:
        trio.lowlevel.current_task().name = "sse"
        return EventStreamResponse(reply.events, reply.headers)
    response = Response(reply.body, reply.status, content_type=reply.media_type)
    response.headers.update(reply.headers)
    if reply.status in (204, 304) or not reply.media_type:
        response.headers.pop("Content-Type", None)
    if reply.status in (204, 304):
        response.headers.pop("Content-Length", None)
    return response


def refusal(error: HectorError, instance: str, request_id: str) -> Reply:
    """RFC 9457 problem details."""
    headers = headers_of(error, instance)
    media_type = headers.pop("Content-Type")
    body = body_of(error, instance=instance, request_id=request_id)
    return Reply(status_of(error), body, media_type, headers)
