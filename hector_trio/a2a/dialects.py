"""How a client says its requests, and reads the answers, in A2A 1.0 and in both spellings of 0.3. Pure.

Inside there is only 1.0: the old dialects are translated here, JSON to JSON, before the types see it. 0.3 has a
spelling of its own over JSON-RPC (``kind``, lower-case states) and, over HTTP+JSON, that of its proto file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec

from hector_trio.a2a.types import SendMessageRequest, StreamResponse, Task

T = TypeVar("T")
Json = dict[str, Any]

OperationName = Literal["send", "stream", "get", "cancel", "subscribe"]


class Garbage(Exception):
    """An answer cannot be read as what it should be."""


class Dialect(Protocol):
    """One spelling of the protocol."""

    version: str
    """What the ``A2A-Version`` header says."""
    extensions_header: str
    methods: Mapping[OperationName, str]
    """Names over JSON-RPC."""
    prefix: str
    """Of paths over HTTP+JSON."""
    subscribe_method: Literal["GET", "POST"]

    def request(self, request: SendMessageRequest) -> Any: ...

    def response(self, data: msgspec.Raw | bytes) -> StreamResponse:
        """A response to a message, or an event of a stream. Raises: Garbage."""
        ...

    def task(self, data: msgspec.Raw | bytes) -> Task:
        """Raises: Garbage."""
        ...


class Current:
    """1.0."""

    version = "1.0"
    extensions_header = "A2A-Extensions"
    methods: Mapping[OperationName, str] = {
        "send": "SendMessage",
        "stream": "SendStreamingMessage",
        "get": "GetTask",
        "cancel": "CancelTask",
        "subscribe": "SubscribeToTask",
    }
    prefix = ""
    subscribe_method: Literal["GET", "POST"] = "POST"

    def __init__(self) -> None:
        self._responses = msgspec.json.Decoder(StreamResponse)
        self._tasks = msgspec.json.Decoder(Task)

    def request(self, request: SendMessageRequest) -> Any:
        return request

    def response(self, data: msgspec.Raw | bytes) -> StreamResponse:
        try:
            found = self._responses.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            found = _convert(_mended(_json(data)), StreamResponse)
        if (
            sum(each is not None for each in (found.task, found.message, found.status_update, found.artifact_update))
            != 1
        ):
            raise Garbage("an answer is neither a task, a message nor an update")
        return found

    def task(self, data: msgspec.Raw | bytes) -> Task:
        try:
            return self._tasks.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return _convert(_mended({"task": _json(data)})["task"], Task)


def _json(data: Any) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Garbage(f"an answer is no JSON: {error}"[:300]) from None


def _convert(found: Any, type_: type[T]) -> T:
    try:
        return msgspec.convert(found, type_)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Garbage(f"an answer cannot be read: {error}"[:300]) from None


def _mended(found: Any) -> Any:
    """What some agents leave out although it is REQUIRED: the parts of an artifact that ends, a context."""
    found = _object(found)
    artifacts: list[Any] = []
    if isinstance(task := found.get("task"), dict):
        artifacts += listed(task.get("artifacts"))
    for name in ("artifactUpdate", "statusUpdate"):
        if isinstance(update := found.get(name), dict):
            update["contextId"] = update.get("contextId") or update.get("taskId")
            artifacts.append(update.get("artifact"))
    for artifact in artifacts:
        if isinstance(artifact, dict) and not artifact.get("parts"):
            artifact["parts"] = [{"text": ""}]
    return found


class _Old(ABC):
    """What both spellings of 0.3 have in common: they are translated on the way."""

    version = "0.3"
    extensions_header = "X-A2A-Extensions"
    methods: Mapping[OperationName, str] = {
        "send": "message/send",
        "stream": "message/stream",
        "get": "tasks/get",
        "cancel": "tasks/cancel",
        "subscribe": "tasks/resubscribe",
    }
    prefix = "/v1"
    subscribe_method: Literal["GET", "POST"] = "GET"

    def response(self, data: msgspec.Raw | bytes) -> StreamResponse:
        return self._read(data, self._response, StreamResponse)

    def task(self, data: msgspec.Raw | bytes) -> Task:
        return self._read(data, self._task, Task)

    def _read(self, data: Any, translate: Callable[[Json], Json], type_: type[T]) -> T:
        try:
            found = translate(_object(_json(data)))
        except (KeyError, TypeError, AttributeError) as error:
            raise Garbage(f"an answer lacks what belongs in it: {error}"[:300]) from None
        return _convert(_mended(found) if type_ is StreamResponse else _mended({"task": found})["task"], type_)

    def _task(self, found: Json) -> Json:
        return {
            **found,
            "status": self._status(found["status"]),
            "artifacts": [self._artifact(each) for each in listed(found.get("artifacts"))],
            "history": [self._message(each) for each in listed(found.get("history"))],
        }

    @abstractmethod
    def _response(self, found: Json) -> Json: ...

    @abstractmethod
    def _status(self, found: Json) -> Json: ...

    @abstractmethod
    def _message(self, found: Json) -> Json: ...

    @abstractmethod
    def _artifact(self, found: Json) -> Json: ...


class OldJsonRpc(_Old):
    """0.3 over JSON-RPC."""

    def request(self, request: SendMessageRequest) -> Any:
        said: Json = msgspec.to_builtins(request)
        message = said["message"]
        old = {
            **message,
            "kind": "message",
            "role": _OLD_ROLES[message["role"]],
            "parts": [_old_part(part) for part in message["parts"]],
        }
        return _old_request(said, old)

    def _response(self, found: Json) -> Json:
        kind = found.get("kind") or _kind_of(found)
        if kind == "task":
            return {"task": self._task(found)}
        if kind == "message":
            return {"message": self._message(found)}
        if kind == "status-update":
            return {"statusUpdate": {**found, "status": self._status(found["status"])}}
        if kind == "artifact-update":
            return {"artifactUpdate": {**found, "artifact": self._artifact(found["artifact"])}}
        raise Garbage(f"{str(kind)[:40]!r} is nothing that an answer can be")

    def _status(self, found: Json) -> Json:
        state = _object(found).get("state")
        message = found.get("message")
        return {
            **found,
            "state": _STATES.get(state, state) if isinstance(state, str) else state,
            "message": None if message is None else self._message(message),
        }

    def _message(self, found: Json) -> Json:
        parts = [_new_part(_object(part)) for part in _object(found)["parts"]]
        return {**found, "role": _NEW_ROLES.get(found.get("role", "agent"), "ROLE_AGENT"), "parts": parts}

    def _artifact(self, found: Json) -> Json:
        return {**_object(found), "parts": [_new_part(_object(part)) for part in found["parts"]]}


class OldHttp(_Old):
    """0.3 over HTTP+JSON: its proto file as ProtoJSON."""

    def request(self, request: SendMessageRequest) -> Any:
        said: Json = msgspec.to_builtins(request)
        message = said["message"]
        old = {name: value for name, value in message.items() if name not in ("parts", "referenceTaskIds")}
        old["content"] = [_old_proto_part(part) for part in message["parts"]]
        return _old_request(said, old)

    def _response(self, found: Json) -> Json:
        if "task" in found:
            return {"task": self._task(_object(found["task"]))}
        for name in ("message", "msg"):
            if name in found:
                return {"message": self._message(found[name])}
        if "statusUpdate" in found:
            update = _object(found["statusUpdate"])
            return {"statusUpdate": {**update, "status": self._status(update["status"])}}
        if "artifactUpdate" in found:
            update = _object(found["artifactUpdate"])
            return {"artifactUpdate": {**update, "artifact": self._artifact(update["artifact"])}}
        raise Garbage("an answer is neither a task, a message nor an update")

    def _status(self, found: Json) -> Json:
        state = _object(found).get("state", "TASK_STATE_SUBMITTED")
        message = found.get("message", found.get("update"))
        return {
            **found,
            "state": {"TASK_STATE_CANCELLED": "TASK_STATE_CANCELED"}.get(state, state),
            "message": None if message is None else self._message(message),
        }

    def _message(self, found: Json) -> Json:
        parts = _object(found).get("content", found.get("parts")) or []
        return {
            **found,
            "role": found.get("role", "ROLE_AGENT"),
            "parts": [_new_proto_part(_object(part)) for part in parts],
        }

    def _artifact(self, found: Json) -> Json:
        return {**_object(found), "parts": [_new_proto_part(_object(part)) for part in found.get("parts", [])]}


# --- the pieces of 0.3 ------------------------------------------------------------------------------------------------

_STATES: Final[dict[str, str]] = {
    "submitted": "TASK_STATE_SUBMITTED",
    "working": "TASK_STATE_WORKING",
    "unknown": "TASK_STATE_WORKING",
    "input-required": "TASK_STATE_INPUT_REQUIRED",
    "auth-required": "TASK_STATE_AUTH_REQUIRED",
    "completed": "TASK_STATE_COMPLETED",
    "canceled": "TASK_STATE_CANCELED",
    "failed": "TASK_STATE_FAILED",
    "rejected": "TASK_STATE_REJECTED",
}
_NEW_ROLES: Final = {"user": "ROLE_USER", "agent": "ROLE_AGENT"}
_OLD_ROLES: Final = {new: old for old, new in _NEW_ROLES.items()}
_WRAPPED: Final = "data_part_compat"
"""In a part's metadata: data that is no object stands in ``value``, because 0.3 has only objects (a custom of SDKs)."""


def listed(value: Any) -> list[Any]:
    """A list, or nothing where none is."""
    return value if isinstance(value, list) else []


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise Garbage("there is no object where one belongs")
    return value


def _kind_of(found: Json) -> str | None:
    """For servers that leave ``kind`` out."""
    if "artifact" in found:
        return "artifact-update"
    if "taskId" in found and "status" in found:
        return "status-update"
    if "messageId" in found:
        return "message"
    return "task" if "id" in found else None


def _old_request(said: Json, message: Json) -> Json:
    configuration = said.get("configuration", {})
    old: Json = {
        name: configuration[name] for name in ("acceptedOutputModes", "historyLength") if name in configuration
    }
    old["blocking"] = not configuration.get("returnImmediately", False)
    metadata = {"metadata": said["metadata"]} if "metadata" in said else {}
    return {"message": message, "configuration": old, **metadata}


def _wrapped(part: Json) -> tuple[Json, Json]:
    """The data of a part as the object that 0.3 wants, and the part's metadata."""
    data, metadata = part["data"], part.get("metadata") or {}
    return (data, metadata) if isinstance(data, dict) else ({"value": data}, {**metadata, _WRAPPED: True})


def _unwrapped(data: Json, metadata: Any) -> Json:
    if isinstance(metadata, dict) and metadata.get(_WRAPPED):
        rest = {name: value for name, value in metadata.items() if name != _WRAPPED}
        return {"data": data.get("value"), "metadata": rest or None}
    return {"data": data, "metadata": metadata}


def _old_part(part: Json) -> Json:
    about = {"metadata": part["metadata"]} if part.get("metadata") else {}
    if "text" in part:
        return {"kind": "text", "text": part["text"], **about}
    if "data" in part:
        data, metadata = _wrapped(part)
        return {"kind": "data", "data": data, **({"metadata": metadata} if metadata else {})}
    file = {"bytes": part["raw"]} if "raw" in part else {"uri": part["url"]}
    names = {"name": part.get("filename"), "mimeType": part.get("mediaType")}
    return {"kind": "file", "file": {**file, **{key: name for key, name in names.items() if name}}, **about}


def _new_part(part: Json) -> Json:
    metadata = part.get("metadata")
    if "text" in part:
        return {"text": part["text"], "metadata": metadata}
    if "data" in part:
        return _unwrapped(_object(part["data"]), metadata)
    file = _object(part["file"])
    content = {"raw": file["bytes"]} if file.get("bytes") is not None else {"url": file["uri"]}
    return {**content, "filename": file.get("name"), "mediaType": file.get("mimeType"), "metadata": metadata}


def _old_proto_part(part: Json) -> Json:
    about = {"metadata": part["metadata"]} if part.get("metadata") else {}
    if "text" in part:
        return {"text": part["text"], **about}
    if "data" in part:
        data, metadata = _wrapped(part)
        return {"data": {"data": data}, **({"metadata": metadata} if metadata else {})}
    file = {"fileWithBytes": part["raw"]} if "raw" in part else {"fileWithUri": part["url"]}
    names = {"name": part.get("filename"), "mimeType": part.get("mediaType")}
    return {"file": {**file, **{key: name for key, name in names.items() if name}}, **about}


def _new_proto_part(part: Json) -> Json:
    metadata = part.get("metadata")
    if "data" in part:
        return _unwrapped(_object(_object(part["data"]).get("data", {})), metadata)
    if "file" in part:
        file = _object(part["file"])
        content = {"raw": file["fileWithBytes"]} if "fileWithBytes" in file else {"url": file["fileWithUri"]}
        return {
            **content,
            "filename": file.get("name") or None,
            "mediaType": file.get("mimeType") or None,
            "metadata": metadata,
        }
    return {"text": part.get("text", ""), "metadata": metadata}
