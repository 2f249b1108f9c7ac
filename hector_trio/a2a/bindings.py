"""What a client sends to an agent and reads of it, over JSON-RPC (specification 9) and HTTP+JSON (11). Pure: no I/O."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple, Protocol
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Struct

from hector_trio.a2a import errors
from hector_trio.a2a.dialects import Dialect, Garbage, OperationName
from hector_trio.a2a.types import MEDIA_TYPE, AgentInterface, SendMessageRequest, StreamResponse, Task


class Outgoing(NamedTuple):
    """One HTTP request."""

    method: Literal["GET", "POST"]
    url: str
    content: bytes | None
    media_type: str = "application/json"


class Binding(Protocol):
    """One agent's interface: what to send to it, and how to read what it answers.

    What is read raises Garbage for what cannot be read and an A2AError where the agent has refused.
    """

    dialect: Dialect

    def send(self, request: SendMessageRequest, *, stream: bool) -> Outgoing: ...

    def about(self, name: OperationName, task_id: str, metadata: dict[str, Any] | None = None) -> Outgoing:
        """One of the operations on a task. ``metadata`` goes along where the binding can carry it."""
        ...

    def subscribe_otherwise(self, task_id: str) -> Outgoing | None:
        """For agents that know no such path or method: what a2a.proto has where the specification (11.3.2) has POST."""
        ...

    def response(self, data: bytes) -> StreamResponse:
        """What a message was answered with at once."""
        ...

    def task(self, data: bytes) -> Task: ...

    def event(self, kind: str, data: bytes) -> StreamResponse:
        """One event of a stream; ``kind`` is what SSE calls its type."""
        ...

    def refusal(self, status: int, data: bytes) -> errors.A2AError:
        """What an HTTP status beyond 299 says."""
        ...


def binding_of(interface: AgentInterface, dialect: Dialect) -> Binding:
    kind = JsonRpc if interface.protocol_binding == "JSONRPC" else HttpJson
    return kind(interface, dialect)


class RpcError(Struct):
    code: int
    message: str = ""
    data: Any = None


class RpcAnswer(Struct):
    result: msgspec.Raw | msgspec.UnsetType = UNSET
    error: RpcError | None = None


class JsonRpc:
    def __init__(self, interface: AgentInterface, dialect: Dialect) -> None:
        self.dialect = dialect
        self._url = interface.url
        self._tenant = {"tenant": interface.tenant} if interface.tenant else {}
        self._answers = msgspec.json.Decoder(RpcAnswer)

    def send(self, request: SendMessageRequest, *, stream: bool) -> Outgoing:
        if self._tenant:
            request = msgspec.structs.replace(request, **self._tenant)
        return self._call("stream" if stream else "send", self.dialect.request(request))

    def about(self, name: OperationName, task_id: str, metadata: dict[str, Any] | None = None) -> Outgoing:
        more = {"metadata": metadata} if metadata else {}
        return self._call(name, {"id": task_id, **self._tenant, **more})

    def subscribe_otherwise(self, task_id: str) -> Outgoing | None:
        return None

    def _call(self, name: OperationName, params: Any) -> Outgoing:
        body = {"jsonrpc": "2.0", "id": 1, "method": self.dialect.methods[name], "params": params}
        return Outgoing("POST", self._url, msgspec.json.encode(body))

    def response(self, data: bytes) -> StreamResponse:
        return self.dialect.response(self._result(data))

    def task(self, data: bytes) -> Task:
        return self.dialect.task(self._result(data))

    def event(self, kind: str, data: bytes) -> StreamResponse:
        return self.dialect.response(self._result(data))

    def refusal(self, status: int, data: bytes) -> errors.A2AError:
        try:
            error = self._answers.decode(data).error
        except (msgspec.DecodeError, ValueError, RecursionError):
            error = None
        if error is None:
            return _by_status(status, "")
        # What stands before the agent may refuse in the shape of HTTP+JSON.
        kind = _BY_CODE.get(error.code)
        return (
            _known(error.data, error.message)
            or (kind(error.message) if kind is not None else None)
            or _by_status(status, error.message)
        )

    def _result(self, data: bytes) -> msgspec.Raw:
        try:
            answer = self._answers.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise Garbage(f"an answer is no JSON-RPC: {error}"[:300]) from None
        if answer.error is not None:
            kind = _BY_CODE.get(answer.error.code, errors.InternalError)
            details = answer.error.data
            raise _known(details, answer.error.message) or kind(answer.error.message)
        if answer.result is UNSET:
            raise Garbage("an answer has neither a result nor an error")
        return answer.result


class HttpJson:
    def __init__(self, interface: AgentInterface, dialect: Dialect) -> None:
        self.dialect = dialect
        tenant = f"/{quote(interface.tenant, safe='')}" if interface.tenant else ""
        base = interface.url.rstrip("/")
        prefix = "" if dialect.prefix and base.endswith(dialect.prefix) else dialect.prefix
        self._base = base + tenant + prefix
        self._media_type = MEDIA_TYPE if dialect.version == "1.0" else "application/json"

    def send(self, request: SendMessageRequest, *, stream: bool) -> Outgoing:
        body = msgspec.json.encode(self.dialect.request(request))
        return Outgoing("POST", f"{self._base}/message:{'stream' if stream else 'send'}", body, self._media_type)

    def about(self, name: OperationName, task_id: str, metadata: dict[str, Any] | None = None) -> Outgoing:
        """``metadata`` has no place where there is no body."""
        place = f"{self._base}/tasks/{quote(task_id, safe='')}"
        if name == "get":
            return Outgoing("GET", place, None)
        if name == "subscribe" and self.dialect.subscribe_method == "GET":
            return Outgoing("GET", f"{place}:subscribe", None)
        body = msgspec.json.encode({"metadata": metadata} if metadata else {})
        return Outgoing("POST", f"{place}:{name}", body, self._media_type)

    def subscribe_otherwise(self, task_id: str) -> Outgoing | None:
        if self.dialect.subscribe_method == "GET":
            return None
        return Outgoing("GET", f"{self._base}/tasks/{quote(task_id, safe='')}:subscribe", None)

    def response(self, data: bytes) -> StreamResponse:
        return self.dialect.response(data)

    def task(self, data: bytes) -> Task:
        return self.dialect.task(data)

    def event(self, kind: str, data: bytes) -> StreamResponse:
        if kind == "error" or data.startswith(b'{"error":'):
            raise self.refusal(500, data)
        return self.dialect.response(data)

    def refusal(self, status: int, data: bytes) -> errors.A2AError:
        try:
            found = msgspec.json.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            found = None
        error = found.get("error", found) if isinstance(found, dict) else None
        if not isinstance(error, dict):
            return _by_status(status, "")
        said = error.get("message", error.get("detail", ""))
        message = said if isinstance(said, str) else ""
        code = error.get("code")
        # 0.3 has no reasons; some of its servers put JSON-RPC's code here.
        by_code = _BY_CODE.get(code) if isinstance(code, int) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else status
        return _known(error.get("details"), message) or (by_code(message) if by_code else _by_status(status, message))


_BY_CODE: Final = {codes.jsonrpc: kind for kind, codes in errors.CODES.items()}
_BY_REASON: Final = {kind.reason: kind for kind in errors.CODES}
_BY_STATUS: Final[dict[int, type[errors.A2AError]]] = {
    401: errors.UnauthenticatedError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    405: errors.MethodNotFoundError,
    501: errors.MethodNotFoundError,
    408: errors.UnavailableError,
    409: errors.ConflictError,
    413: errors.PayloadTooLargeError,
    415: errors.ContentTypeNotSupportedError,
    429: errors.ResourceExhaustedError,
    502: errors.UnavailableError,
    503: errors.UnavailableError,
    504: errors.UnavailableError,
}


def _known(details: Any, message: str) -> errors.A2AError | None:
    """The error that an ErrorInfo names."""
    for each in details if isinstance(details, list) else ():
        if isinstance(each, dict) and each.get("@type") == errors.ERROR_INFO:
            kind = _BY_REASON.get(str(each.get("reason")))
            if kind is not None:
                return kind(message)
    return None


def _by_status(status: int, message: str) -> errors.A2AError:
    kind = _BY_STATUS.get(status, errors.InternalError if status >= 500 else errors.InvalidParamsError)
    return kind(message or f"the status was {status}")
