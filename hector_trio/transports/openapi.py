"""OpenAPI 3.1: the table of routes and the wire's types as a description that machines can use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from hector_trio import __version__
from hector_trio.errors import (
    Draining,
    Forbidden,
    HectorError,
    InvalidRequest,
    PayloadTooLarge,
    StoreUnavailable,
    Unauthorized,
)
from hector_trio.models import ID_PATTERN, Chunk, Problem
from hector_trio.transports.problems import MEDIA_TYPE, STATUS
from hector_trio.transports.routes import Answer, Route

REF: Final = "#/components/schemas/{name}"

_NAMES: Final = {
    "agentId": "An agent's id",
    "sessionId": "A session's id",
    "taskId": "A task's id",
    "uploadId": "An upload's id",
}

HEADERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Location": ("The path of what was created", {"type": "string"}),
    "ETag": ("Changes with `state` and `metadata` (RFC 9110, 8.8.3)", {"type": "string"}),
    "Preference-Applied": ("Which preference was honoured (RFC 7240, 3)", {"type": "string"}),
    "Upload-Offset": ("How many bytes are stored", {"type": "integer"}),
    "Upload-Length": ("Bytes in all, where that is known", {"type": "integer"}),
    "Upload-Defer-Length": ("1 where the length has not been said yet", {"type": "string", "enum": ["1"]}),
    "Upload-Metadata": ("As it was sent", {"type": "string"}),
    "Upload-Expires": ("When it is removed unless something is written to it (RFC 9110, 5.6.7)", {"type": "string"}),
    "Retry-After": ("Seconds after which the same request may succeed", {"type": "integer"}),
    "WWW-Authenticate": ("`Bearer` (RFC 6750, 3)", {"type": "string"}),
}

PHRASES: Final = {460: "Checksum Mismatch"}
"""Statuses that only a protocol of ours has (tus)."""


def document(routes: Sequence[Route], base: str, *, secured: bool) -> dict[str, Any]:
    """The description of ``routes`` as served below ``base``; ``secured``: with bearer tokens."""
    types = _types(routes)
    schemas, components = msgspec.json.schema_components(types, ref_template=REF)
    known = dict(zip(map(_key, types), schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, known, secured)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "hector_trio",
            "version": __version__,
            "description": "Agents, tasks and sessions. Errors are RFC 9457 problem details with a stable `code`.",
        },
        "servers": [{"url": base}],
        "paths": paths,
        "components": {"schemas": _adjusted(components)},
    }
    if secured:
        result["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return result


def _key(type_: Any) -> str:
    return repr(type_)


def _types(routes: Sequence[Route]) -> list[Any]:
    """Every type that the table names, once each."""
    found: dict[str, Any] = {_key(Problem): Problem, _key(Chunk): Chunk}
    for route in routes:
        for type_ in (route.body, *(answer.type for answer in route.answers.values())):
            if type_ not in (None, bytes):
                found[_key(type_)] = type_
    return list(found.values())


def _adjusted(components: dict[str, Any]) -> dict[str, Any]:
    """What the decoder refuses beyond its types stands in the description too: ids may not be ``.`` or ``..``, and the
    pattern of the wire's types has no line break at the end."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            if node.get("pattern") == ID_PATTERN:
                return {key: walk(value) for key, value in node.items()} | {"not": {"enum": [".", ".."]}}
            return {key: walk(value) for key, value in node.items()}
        return [walk(each) for each in node] if isinstance(node, list) else node

    result: dict[str, Any] = walk(components)
    return result


def _operation(route: Route, known: dict[str, Any], secured: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": [_tag(route.path)],
        "responses": _responses(route, known, secured),
    }
    parameters = [
        *(_path_parameter(name) for name in re.findall(r"{(\w+)}", route.path)),
        *(
            {"name": each.name, "in": "query", "description": each.description, "schema": dict(each.schema)}
            for each in route.query
        ),
        *(
            {"name": each.name, "in": "header", "description": each.description, "schema": dict(each.schema)}
            | ({"required": True} if each.required else {})
            for each in route.headers
        ),
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is bytes:
        content = {"application/offset+octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"description": "Bytes of the file", "content": content}
    elif route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "description": "Read as JSON whatever its Content-Type",
            "content": {"application/json": {"schema": known[_key(route.body)]}},
        }
    if secured and route.right is not None:
        operation["security"] = [{"bearer": []}]
    return operation


def _tag(path: str) -> str:
    parts = path.strip("/").split("/")
    if "tasks" in parts:
        return "tasks"
    return parts[0] if parts[0] in ("agents", "sessions", "uploads") else "server"


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": ID_PATTERN, "not": {"enum": [".", ".."]}}
    return {"name": name, "in": "path", "required": True, "description": _NAMES[name], "schema": schema}


def _responses(route: Route, known: dict[str, Any], secured: bool) -> dict[str, Any]:
    responses = {str(status): _answer(answer, known) for status, answer in route.answers.items()}
    by_status: dict[int, list[type[HectorError]]] = {}
    for error in refusals(route, secured=secured):
        by_status.setdefault(STATUS[error.code], []).append(error)
    for status, errors in sorted(by_status.items()):
        responses[str(status)] = _refusal(status, errors)
    return responses


def refusals(route: Route, *, secured: bool) -> tuple[type[HectorError], ...]:
    """Everything that a route may refuse with. 403 is also how a foreign Origin or Host is answered."""
    found: list[type[HectorError]] = [*route.refusals, Forbidden, HectorError]
    if secured and route.right is not None:
        found.append(Unauthorized)
    if route.path not in ("/", "/health/live", "/openapi.json"):
        found.append(StoreUnavailable)
    if route.body is not None:
        found += [InvalidRequest, PayloadTooLarge]
    if route.method == "POST" or route.path == "/health/ready":
        found.append(Draining)
    return tuple(dict.fromkeys(found))


def _answer(answer: Answer, known: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.type is not None:
        content[answer.media_type] = {"schema": known[_key(answer.type)]}
    elif answer.media_type != "application/json":
        content[answer.media_type] = {"schema": {"type": "string"}}
    if answer.events:
        content["text/event-stream"] = {
            "schema": {
                "type": "string",
                "description": "Events of `id: seq` and `data:` a Chunk as JSON; comments while nothing happens",
            }
        }
    described: dict[str, Any] = {"description": answer.description}
    if content:
        described["content"] = content
    if answer.headers:
        described["headers"] = {name: _header(name) for name in answer.headers}
    return described


def _refusal(status: int, errors: list[type[HectorError]]) -> dict[str, Any]:
    codes = ", ".join(f"`{error.code}`" for error in errors)
    described: dict[str, Any] = {
        "description": f"{PHRASES.get(status) or HTTPStatus(status).phrase}: {codes}",
        "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(name="Problem")}}},
    }
    names = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, [])
    if names:
        described["headers"] = {name: _header(name) for name in names}
    return described


def _header(name: str) -> dict[str, Any]:
    description, schema = HEADERS[name]
    return {"description": description, "schema": schema}
