"""The HTTP+JSON binding of A2A (specification 11): what a method and a path below an agent ask for, 1.0 and 0.3."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from hector_trio.a2a import cards, errors, requests, v03
from hector_trio.a2a import types as a2a
from hector_trio.agents import Agent
from hector_trio.transports.a2a import OPERATIONS
from hector_trio.transports.a2a_edge import (
    CURRENT,
    JSON,
    Dialect,
    after,
    caller_of,
    card_reply,
    headers_for,
    performed,
    status_reply,
    stream_reply,
    unread,
)
from hector_trio.transports.requests import is_deeper
from hector_trio.transports.routes import Call, Reply

LEGACY: Final = Dialect(v03.rest_result, v03.rest_event)

FOR_ONE: Final = {"Cache-Control": f"private, max-age={cards.MAX_AGE}", "Vary": "Authorization, Accept"}
"""Who may keep a card that only authenticated clients see (13.3): the client, and nothing between it and here."""


class Pattern(NamedTuple):
    """One row of 11.3: segments of a path, of which ``{…}`` is a name of the request; a verb follows a colon."""

    methods: tuple[str, ...]
    segments: tuple[str, ...]
    operation: str
    legacy: bool | None = None
    """Whether it is of 0.3 alone (true), of 1.0 alone (false), or of both."""


PATTERNS: Final = (
    Pattern(("POST",), ("message:send",), "SendMessage"),
    Pattern(("POST",), ("message:stream",), "SendStreamingMessage"),
    Pattern(("GET",), ("tasks",), "ListTasks", legacy=False),
    Pattern(("GET",), ("tasks", "{id}"), "GetTask"),
    Pattern(("POST",), ("tasks", "{id}:cancel"), "CancelTask"),
    Pattern(("GET", "POST"), ("tasks", "{id}:subscribe"), "SubscribeToTask"),
    Pattern(("POST",), ("tasks", "{taskId}", "pushNotificationConfigs"), "CreateTaskPushNotificationConfig"),
    Pattern(("GET",), ("tasks", "{taskId}", "pushNotificationConfigs"), "ListTaskPushNotificationConfigs"),
    Pattern(("GET",), ("tasks", "{taskId}", "pushNotificationConfigs", "{id}"), "GetTaskPushNotificationConfig"),
    Pattern(("DELETE",), ("tasks", "{taskId}", "pushNotificationConfigs", "{id}"), "DeleteTaskPushNotificationConfig"),
    Pattern(("GET",), ("extendedAgentCard",), "GetExtendedAgentCard", legacy=False),
    Pattern(("GET",), ("card",), "GetExtendedAgentCard", legacy=True),
)
RESERVED: Final = frozenset({"v1", "tasks", "extendedAgentCard"})
"""What no tenant is called; nor anything with a colon (a verb)."""


class Found(NamedTuple):
    pattern: Pattern
    names: dict[str, str]
    legacy: bool


def find(method: str, path: str) -> Found | frozenset[str]:
    """What ``path`` (below the agent, without a slash before it) means; else the methods that it takes, if any."""
    segments = path.split("/")
    legacy = segments[0] == "v1"
    tenant = None
    if legacy:
        segments = segments[1:]
    elif len(segments) > 1 and segments[0] not in RESERVED and ":" not in segments[0]:
        tenant, *segments = segments
    allowed: set[str] = set()
    for pattern in PATTERNS:
        if pattern.legacy not in (None, legacy):
            continue
        names = _names(pattern.segments, segments)
        if names is None:
            continue
        if method in pattern.methods:
            return Found(pattern, names if tenant is None else {**names, "tenant": tenant}, legacy)
        allowed |= set(pattern.methods)
    return frozenset(allowed)


def _names(pattern: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(segments):
        return None
    names = {}
    for wanted, given in zip(pattern, segments, strict=True):
        head, colon, verb = wanted.partition(":")
        name, given_colon, given_verb = given.partition(":")
        if (colon, verb) != (given_colon, given_verb) or not name:
            return None
        if head.startswith("{"):
            names[head[1:-1]] = name
        elif head != name:
            return None
    return names


async def answer(call: Call, agent: Agent, path: str) -> Reply:
    media_type, refused_type = media_types_of(call)
    refused = v03.rest_error if path.startswith("v1/") else errors.http_body
    try:
        found = find("GET" if call.method == "HEAD" else call.method, path)
        if not isinstance(found, Found):
            return _nothing_there(found, refused_type)
        spoken = agent.info.a2a.legacy
        version = requests.version_of(call.header("A2A-Version") or call.query.get("A2A-Version"), legacy=spoken)
        if not found.legacy and version != a2a.VERSION:
            raise errors.VersionNotSupportedError(
                "This path is of A2A 1.0; a request without A2A-Version: 1.0 speaks 0.3, whose paths begin with /v1",
                metadata={"supported": "1.0,0.3"},
            )
        operation = OPERATIONS[found.pattern.operation]
        caller = after(caller_of(call, agent, legacy=found.legacy), call.query.get("after"))
        request = await _request(call, found)
        value = await performed(caller, operation, request)
    except errors.A2AError as error:
        return status_reply(error, refused_type, refused)
    headers = headers_for(caller, legacy=found.legacy)
    dialect = LEGACY if found.legacy else CURRENT
    if operation.streams:

        def encode(payload: a2a.StreamResponse) -> bytes:
            return a2a.encode(dialect.event(payload))

        def failed(error: errors.A2AError) -> bytes:
            return b"event: error\ndata: %b\n\n" % a2a.encode(refused(error))

        return stream_reply(call, value, encode, failed, headers)
    if isinstance(value, a2a.AgentCard):
        return card_reply(call, value, media_type, headers | FOR_ONE)
    result = dialect.result(value)
    return Reply(body=b"{}" if result is None else a2a.encode(result), media_type=media_type, headers=headers)


def media_types_of(call: Call) -> tuple[str, str]:
    """Of a result and of an error: ``application/a2a+json`` (11.1), but ``application/json`` to a client that speaks or
    wants that, as it was in 1.0.0. An error is google.rpc.Status, which is the protocol's own only to who asks for
    that."""
    accept = (call.header("Accept") or "").lower()
    kind = (call.header("Content-Type") or "").partition(";")[0].strip().lower()
    if a2a.MEDIA_TYPE in accept or (kind == a2a.MEDIA_TYPE and JSON not in accept):
        return a2a.MEDIA_TYPE, a2a.MEDIA_TYPE
    return (JSON if kind == JSON or JSON in accept else a2a.MEDIA_TYPE), JSON


def _nothing_there(allowed: frozenset[str], media_type: str) -> Reply:
    error = errors.MethodNotFoundError("There is no operation at this path")
    reply = status_reply(error, media_type)
    if not allowed:
        return reply
    text = ", ".join(sorted(allowed))
    body = errors.http_body(errors.MethodNotFoundError(f"This path answers {text}"))
    body["error"]["code"] = 405
    return Reply(405, a2a.encode(body), media_type, {"Allow": text})


async def _request(call: Call, found: Found) -> Any:
    """The request from the body, or from the query (11.5); what the path names counts. Raises: A2AError."""
    operation = OPERATIONS[found.pattern.operation]
    if call.method not in ("POST", "PUT"):
        given = {name: text for name, text in call.query.items() if name != "A2A-Version"} | found.names
        return requests.from_query(given, operation.request)
    data = await call.data()
    body: Any = {}
    if data.strip():
        depth = call.services.settings.limits.json_depth
        if is_deeper(data, depth):
            raise errors.RequestError(f"The body is nested deeper than {depth} levels")
        try:
            body = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise unread(call) from None
    if not isinstance(body, dict):
        raise errors.invalid("", "The body is a JSON object")
    if found.legacy:
        body = v03.request(operation.name, body | found.names, buffers=True)
    return requests.converted(requests.camel(body, operation.request) | found.names, operation.request)
