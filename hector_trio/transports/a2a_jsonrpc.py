"""The JSON-RPC binding of A2A (specification 9): one method each for the operations, 1.0 and 0.3 by their names."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

from hector_trio.a2a import cards, errors, requests, v03
from hector_trio.a2a import types as a2a
from hector_trio.agents import Agent
from hector_trio.transports.a2a import OPERATIONS, Caller, Operation
from hector_trio.transports.a2a_edge import (
    CURRENT,
    JSON,
    Dialect,
    caller_of,
    headers_for,
    performed,
    refusal_headers,
    stream_reply,
    unread,
)
from hector_trio.transports.negotiation import wants_events
from hector_trio.transports.requests import is_deeper
from hector_trio.transports.routes import Call, Reply

LEGACY: Final = Dialect(v03.result, v03.event)


class Envelope(Struct, frozen=True):
    """A request of JSON-RPC 2.0 as far as it can be trusted before it is checked."""

    jsonrpc: Any = None
    id: Any = None
    method: Any = None
    params: msgspec.Raw = msgspec.Raw(b"{}")


_envelopes = msgspec.json.Decoder(Envelope).decode


async def answer(call: Call, agent: Agent) -> Reply:
    """200 with a result or an error, or a stream of results (9.1)."""
    request_id: Any = None
    as_event = False
    try:
        envelope = _read(call, await call.data())
        if isinstance(envelope.id, str | int | float) and not isinstance(envelope.id, bool):
            request_id = envelope.id
        _check(envelope)
        as_event = envelope.method in ("message/stream", "tasks/resubscribe")
        operation, request, legacy = _understood(call, agent, envelope)
        caller = caller_of(call, agent, legacy=legacy)
        value = await performed(caller, operation, request)
    except errors.A2AError as error:
        return _refused(request_id, error, as_event and wants_events(call.header("Accept") or ""))
    headers = headers_for(caller, legacy=legacy)
    dialect = LEGACY if legacy else CURRENT
    prefix = b'{"jsonrpc":"2.0","id":%b,"result":' % a2a.encode(request_id)
    if operation.streams:

        def encode(payload: a2a.StreamResponse) -> bytes:
            return prefix + a2a.encode(dialect.event(payload)) + b"}"

        def failed(error: errors.A2AError) -> bytes:
            return b"data: %b\n\n" % _error(request_id, error)

        return stream_reply(call, value, encode, failed, headers)
    if isinstance(value, a2a.AgentCard):
        value = cards.both_dialects(value)
    return Reply(body=prefix + a2a.encode(dialect.result(value)) + b"}", media_type=JSON, headers=headers)


def _read(call: Call, data: bytes) -> Envelope:
    """Raises: ParseError, ContentTypeNotSupportedError, RequestError."""
    max_depth = call.services.settings.limits.json_depth
    data = data.removeprefix(b"\xef\xbb\xbf")
    if is_deeper(data, max_depth):
        raise errors.RequestError(f"The request is nested deeper than {max_depth} levels")
    try:
        str(data, "utf-8")
        return _envelopes(data)
    except msgspec.ValidationError:
        raise errors.RequestError("A request is one JSON object; batches are not taken") from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise unread(call) from None


def _check(envelope: Envelope) -> None:
    """Raises: RequestError for what is no request of JSON-RPC 2.0."""
    if envelope.jsonrpc != "2.0":
        raise errors.RequestError('jsonrpc must be "2.0"')
    if not isinstance(envelope.method, str) or not envelope.method:
        raise errors.RequestError("method must be a string")
    if isinstance(envelope.id, bool | list | dict):
        raise errors.RequestError("id must be a string or a number")


def _understood(call: Call, agent: Agent, envelope: Envelope) -> tuple[Operation, Any, bool]:
    """The operation, its request, and whether 0.3 is spoken. Raises: A2AError."""
    spoken = agent.info.a2a.legacy
    version = requests.version_of(call.header("A2A-Version") or call.query.get("A2A-Version"), legacy=spoken)
    legacy = v03.METHODS.get(envelope.method) if spoken else None
    operation = OPERATIONS.get(envelope.method if legacy is None else legacy)
    if operation is None:
        raise errors.MethodNotFoundError("Method not found", metadata={"method": envelope.method[:128]})
    if legacy is None and version != a2a.VERSION:
        raise errors.VersionNotSupportedError(
            f"{operation.name} is a method of A2A 1.0; a request without A2A-Version: 1.0 speaks 0.3",
            metadata={"supported": "1.0,0.3"},
        )
    params = bytes(envelope.params)
    if params == b"null":
        params = b"{}"
    if legacy is not None:
        given = v03.request(operation.name, requests.decode(params, dict[str, Any]))
        return operation, requests.converted(given, operation.request), True
    return operation, requests.decode(params, operation.request), False


def _refused(request_id: Any, error: errors.A2AError, as_event: bool) -> Reply:
    """``as_event``: clients of 0.3 that stream read nothing else."""
    status = errors.codes_of(error).http
    headers = refusal_headers(error, status)
    body = _error(request_id, error)
    if as_event:
        return Reply(body=b"data: %b\n\n" % body, media_type="text/event-stream", headers=headers)
    return Reply(body=body, media_type=JSON, headers=headers)


def _error(request_id: Any, error: errors.A2AError) -> bytes:
    return a2a.encode({"jsonrpc": "2.0", "id": request_id, "error": errors.jsonrpc_error(error)})


__all__ = ["Caller", "answer"]
