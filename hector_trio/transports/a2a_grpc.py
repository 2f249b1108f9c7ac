"""The gRPC binding of A2A (specification 10): calls of its service over HTTP/2, straight from ASGI, with its trailers.

All agents have one address: a request's ``tenant`` says which is meant, the default agent where it says nothing.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import msgspec
import trio

from hector_trio.a2a import errors, protobuf, requests
from hector_trio.a2a import types as a2a
from hector_trio.agents import Agent
from hector_trio.connection import contain
from hector_trio.observability import ROUTE
from hector_trio.transports import Services
from hector_trio.transports.a2a import OPERATIONS, Event, Events, Operation
from hector_trio.transports.a2a_edge import INTERNAL, caller_of, headers_for, performed
from hector_trio.transports.a2a_routes import default_agent
from hector_trio.transports.negotiation import is_grpc
from hector_trio.transports.quart_app import HectorRequestBody, Receive, Send
from hector_trio.transports.routes import Call

SERVICE: Final = "/lf.a2a.v1.A2AService/"
RESPONSES: Final[Mapping[str, str]] = {
    "SendMessage": "SendMessageResponse",
    "SendStreamingMessage": "StreamResponse",
    "GetTask": "Task",
    "ListTasks": "ListTasksResponse",
    "CancelTask": "Task",
    "SubscribeToTask": "StreamResponse",
    "CreateTaskPushNotificationConfig": "TaskPushNotificationConfig",
    "GetTaskPushNotificationConfig": "TaskPushNotificationConfig",
    "ListTaskPushNotificationConfigs": "ListTaskPushNotificationConfigsResponse",
    "GetExtendedAgentCard": "AgentCard",
}
"""The message that each operation answers with; none is the empty one."""

STATUS: Final[Mapping[str, int]] = {
    name: code
    for code, name in enumerate(
        (
            "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
            "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
            "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
        )
    )
}  # fmt: skip
"""gRPC's codes by their names."""

PREFIX: Final = 5
"""Bytes before each message: whether it is compressed, and its length."""
_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])\Z")
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_GZIP: Final = 16 + zlib.MAX_WBITS
_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

RawHeaders = list[tuple[bytes, bytes]]


class Grpc:
    """An ASGI application before another: answers every call of gRPC; what is none is left to that."""

    def __init__(self, services: Services, below: Any) -> None:
        self._services = services
        self._below = below

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if not is_grpc(scope):
            await self._below(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        operation = OPERATIONS.get(path.removeprefix(SERVICE)) if path.startswith(SERVICE) else None
        scope[ROUTE] = f"{SERVICE}…" if operation is None else f"{SERVICE}{operation.name}"
        body = _Message(receive, self._services.settings.limits.body_bytes)
        call = Call(self._services, scope, {}, body)
        answer = _Answer(send)
        async with trio.open_nursery() as nursery:
            try:
                with trio.move_on_after(seconds_of(call.header("grpc-timeout"))) as deadline:
                    if operation is None:
                        raise errors.MethodNotFoundError(f"There is no method {path[:128]}")
                    request = await body.message(call.header("grpc-encoding"))
                    nursery.start_soon(_watch, receive, nursery.cancel_scope, name="client of a call")
                    await self._perform(call, operation, request, answer)
                if deadline.cancelled_caught:
                    await answer.end(trailers("DEADLINE_EXCEEDED", "The deadline of the call has passed"))
            except errors.A2AError as error:
                await answer.end(refusal(error))
            except _Left:
                pass
            except (Exception, BaseExceptionGroup) as error:
                contain(error, f"Exception in {path[:128]}")
                await answer.end(refusal(INTERNAL))
            nursery.cancel_scope.cancel()

    async def _perform(self, call: Call, operation: Operation, data: bytes, answer: _Answer) -> None:
        """Runs the operation and says all that it has to say. Raises: A2AError."""
        given = _decoded(self._services, operation.request.__name__, data)
        agent = self._agent(given.get("tenant"))
        version = requests.version_of(call.header("A2A-Version"), legacy=agent.info.a2a.legacy)
        if version != a2a.VERSION:
            raise errors.VersionNotSupportedError(
                "This is the service of A2A 1.0; a call without a2a-version: 1.0 speaks 0.3",
                metadata={"supported": "1.0"},
            )
        caller = caller_of(call, agent)
        value = await performed(caller, operation, requests.converted(given, operation.request))
        answer.headers = [(name.lower().encode(), text.encode()) for name, text in headers_for(caller).items()]
        kind = RESPONSES.get(operation.name)
        if operation.streams:
            with self._services.metrics.stream("grpc"), trio.move_on_at(call.until) as trusted:
                await _stream(value, answer)
            if trusted.cancelled_caught:
                raise errors.UnauthenticatedError("The token has expired")
        else:
            await answer.say(b"" if kind is None else encoded(kind, value))
        await answer.end(trailers("OK"))

    def _agent(self, tenant: str | None) -> Agent:
        agent = self._services.engine.agents.get(tenant or default_agent(self._services) or "")
        if agent is None:
            raise errors.NotFoundError("There is no such agent")
        return agent


async def _stream(events: Events, answer: _Answer) -> None:
    """The stream ends with its events, or its client; a task that it is about goes on."""
    try:
        await answer.begin()
        async for batch in events:
            if batch:
                await answer.say(*map(_event, batch))
    finally:
        await events.aclose()


def _event(event: Event) -> bytes:
    return encoded("StreamResponse", event.payload)


async def _watch(receive: Receive, present: trio.CancelScope) -> None:
    """Cancels ``present`` when the client has cancelled the call, or left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    present.cancel()


class _Left(Exception):
    """The client has cancelled before its request was complete."""


class _Message:
    """The one message of a request."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit

    async def message(self, encoding: str | None) -> bytes:
        """Raises: A2AError for what is not one whole message of at most the limit; _Left."""
        data = bytearray()
        more = True
        while more:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise _Left
            data += event["body"]
            more = event["more_body"]
            if len(data) > self._limit + PREFIX:
                raise self._too_large()
        if len(data) < PREFIX or data[0] > 1 or len(data) != PREFIX + int.from_bytes(data[1:PREFIX]):
            raise errors.RequestError("The request is not one whole message")
        message = bytes(memoryview(data)[PREFIX:])
        return message if not data[0] else self._unpacked(message, encoding)

    def _unpacked(self, message: bytes, encoding: str | None) -> bytes:
        if encoding != "gzip":
            raise errors.MethodNotFoundError(f"The message encoding {(encoding or 'identity')[:32]} is not supported")
        try:
            unpacking = zlib.decompressobj(_GZIP)
            unpacked = unpacking.decompress(message, self._limit + 1)
        except zlib.error:
            raise errors.RequestError("The message is not gzip") from None
        if len(unpacked) > self._limit:
            raise self._too_large()
        if not unpacking.eof:
            raise errors.RequestError("The message ends too early")
        return unpacked

    def _too_large(self) -> errors.A2AError:
        return errors.PayloadTooLargeError(f"The message is larger than {self._limit} bytes")

    async def data(self) -> bytes:
        raise RuntimeError("A call has a message, which is read once")

    @property
    def pieces(self) -> HectorRequestBody:
        raise RuntimeError("A call has a message, which is read once")


class _Answer:
    """What is sent back: a head, messages, trailers; only trailers, if there was nothing before."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self.headers: RawHeaders = []

    async def begin(self) -> None:
        if not self._begun:
            self._begun = True
            head = {"type": "http.response.start", "status": 200, "headers": [*HEAD, *self.headers], "trailers": True}
            await self._send(head)

    async def say(self, *messages: bytes) -> None:
        await self.begin()
        data = b"".join(b"\0" + len(each).to_bytes(4) + each for each in messages)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, last: RawHeaders) -> None:
        if self._begun:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            await self._send({"type": "http.response.trailers", "headers": last[len(HEAD) :], "more_trailers": False})
        else:
            await self._send({"type": "http.response.start", "status": 200, "headers": last})
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


# --- decided without I/O ----------------------------------------------------------------------------------------------

HEAD: Final[RawHeaders] = [(b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity,gzip")]


def trailers(status: str, message: str = "", details: bytes = b"") -> RawHeaders:
    """How a call ends, with the head that it needs if there was none before."""
    result = [*HEAD, (b"grpc-status", b"%d" % STATUS[status])]
    if message:
        result.append((b"grpc-message", quote(message, safe=_PRINTABLE).encode()))
    if details:
        result.append((b"grpc-status-details-bin", base64.b64encode(details).rstrip(b"=")))
    return result


def refusal(error: errors.A2AError) -> RawHeaders:
    """An error as the end of a call (10.6): its status, and google.rpc.Status with its details."""
    status = errors.codes_of(error).grpc
    told = {"code": STATUS[status], "message": error.message, "details": errors.details(error)}
    return trailers(status, error.message, protobuf.encode("google.rpc.Status", told))


def seconds_of(timeout: str | None) -> float:
    """A ``grpc-timeout``, the greatest that there is where none is given. Raises: InvalidParamsError."""
    if timeout is None:
        return float("inf")
    match = _TIMEOUT.match(timeout)
    if match is None:
        raise errors.invalid("grpc-timeout", "is no time")
    return int(match[1]) * _UNITS[match[2]]


def encoded(kind: str, value: Any) -> bytes:
    """A response of ``a2a.types`` as the message ``kind``."""
    return protobuf.encode(kind, msgspec.to_builtins(value, builtin_types=(bytes,)))


def _decoded(services: Services, kind: str, data: bytes) -> dict[str, Any]:
    try:
        return protobuf.decode(kind, data, max_depth=services.settings.limits.json_depth)
    except protobuf.Malformed as error:
        raise errors.RequestError(f"The message is no {kind}: {error}") from None
