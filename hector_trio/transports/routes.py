"""What a REST route is: a row of the table that routes, OpenAPI and README come from; the call it gets, its reply."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, cast

import trio
from quart import Request, Response

from hector_trio.auth import Principal, Right
from hector_trio.errors import AgentNotFound, HectorError, NotFound, SessionNotFound, TaskNotFound, UploadNotFound
from hector_trio.models import encode, is_id
from hector_trio.transports import Services
from hector_trio.transports.quart_app import NURSERY, EventStreamResponse, HectorRequestBody
from hector_trio.transports.requests import decode_json

T = TypeVar("T")

PRINCIPAL: Final = "hector.principal"
REQUEST_ID: Final = "hector.request_id"
"""Keys of the scope under which the guard leaves who asks, and the id of the request."""

NOT_FOUND: Final[dict[str, type[NotFound]]] = {
    "agentId": AgentNotFound,
    "sessionId": SessionNotFound,
    "taskId": TaskNotFound,
    "uploadId": UploadNotFound,
}
"""How a name in a path that cannot be an id is answered: exactly like an unknown one."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query parameter: its name, its JSON schema, what it does."""

    name: str
    schema: Mapping[str, Any]
    description: str


@dataclass(frozen=True, slots=True)
class Header:
    """A request header that a route knows: its name, what it does, its JSON schema."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})
    required: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One status that a route answers with when all is well."""

    description: str
    type: Any = None
    """What the JSON body is; ``None``: no body, or one of ``media_type`` that no schema describes."""
    media_type: str = "application/json"
    events: bool = False
    """Whether the same status can also be a stream of server-sent events."""
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
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


@dataclass(frozen=True, slots=True)
class Reply:
    """What a route's function decided to answer."""

    status: int = 200
    body: bytes = b""
    media_type: str = "application/json"
    """Empty: nothing is said, because there is no body."""
    headers: dict[str, str] = field(default_factory=dict)
    events: AsyncIterator[bytes] | None = None
    """Server-sent events instead of a body."""


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """``value`` as JSON; headers by their names with ``_`` for ``-``."""
    return Reply(status, encode(value), headers={name.replace("_", "-"): text for name, text in headers.items()})


class Call:
    """One request as a route's function sees it."""

    __slots__ = ("_request", "ids", "principal", "query", "services")

    def __init__(self, services: Services, request: Request, ids: Mapping[str, str]) -> None:
        self.services = services
        self.ids = ids
        self.principal: Principal = _extra(request)[PRINCIPAL]
        self.query: dict[str, str] = request.args.to_dict()
        self._request = request

    @property
    def method(self) -> str:
        return self._request.method

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
        address = _extra(self._request).get("client")
        return address[0] if address else None

    @property
    def nursery(self) -> trio.Nursery:
        """The request's nursery: cancelled when the answer is complete, or the client has left."""
        nursery: trio.Nursery = _extra(self._request)[NURSERY]
        return nursery

    def header(self, name: str) -> str | None:
        """A header's value; of several with one name, joined (RFC 9110, 5.3)."""
        values = self._request.headers.getlist(name)
        return ", ".join(values) if values else None

    @property
    def source(self) -> HectorRequestBody:
        """The body in the pieces in which it comes, on a route whose bodies are streamed (see the guard)."""
        return cast(HectorRequestBody, self._request.body)

    async def data(self) -> bytes:
        """The body. Raises werkzeug's RequestEntityTooLarge beyond the limit."""
        return await self._request.get_data(cache=True, as_text=False, parse_form_data=False)

    async def read(self, type_: type[T]) -> T:
        """The body as ``type_``, whatever its Content-Type says. Raises: InvalidRequest."""
        return decode_json(await self.data(), type_, max_depth=self.services.settings.limits.json_depth)

    def path(self, path: str) -> str:
        """``path`` as clients reach it from outside: below the root path."""
        return self._request.root_path.rstrip("/") + path

    @property
    def base(self) -> str:
        """Where clients reach this server: ``base_url``, else the (trusted) host that they asked."""
        configured = self.services.settings.server.base_url
        if configured is not None:
            return configured.rstrip("/")
        request = self._request
        host = request.host
        if not host:
            address = _extra(request).get("server") or ("localhost", None)
            host = address[0] if address[1] is None else f"{address[0]}:{address[1]}"
        return f"{request.scheme}://{host}{request.root_path.rstrip('/')}"


def _extra(request: Request) -> dict[str, Any]:
    """The scope, in which our own keys stand too."""
    scope: Any = request.scope
    return scope  # type: ignore[no-any-return]


def check_ids(ids: Mapping[str, str]) -> None:
    """Raises: NotFound, of the right kind, for a name that can be nobody's id."""
    for name, text in ids.items():
        if not is_id(text):
            raise NOT_FOUND[name](f"There is no such {name.removesuffix('Id')}")


def respond(reply: Reply) -> Response:
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
