"""A2A 0.3 at the edge: its requests as those of 1.0, and what 1.0 answers as 0.3 has it; JSON-RPC and HTTP+JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final

from hector_trio.a2a import errors
from hector_trio.a2a import types as a2a
from hector_trio.a2a.types import TERMINAL, is_unset

Json = dict[str, Any]

METHODS: Final[Mapping[str, str]] = {
    "message/send": "SendMessage",
    "message/stream": "SendStreamingMessage",
    "tasks/get": "GetTask",
    "tasks/cancel": "CancelTask",
    "tasks/resubscribe": "SubscribeToTask",
    "tasks/pushNotificationConfig/set": "CreateTaskPushNotificationConfig",
    "tasks/pushNotificationConfig/get": "GetTaskPushNotificationConfig",
    "tasks/pushNotificationConfig/list": "ListTaskPushNotificationConfigs",
    "tasks/pushNotificationConfig/delete": "DeleteTaskPushNotificationConfig",
    "agent/getAuthenticatedExtendedCard": "GetExtendedAgentCard",
}
"""Its methods, and the operations of 1.0 that they are. A name tells the dialect: none stands in both."""

_ROLES: Final = {"user": "ROLE_USER", "agent": "ROLE_AGENT"}
_STATES: Final[Mapping[a2a.TaskState, str]] = {
    "TASK_STATE_SUBMITTED": "submitted",
    "TASK_STATE_WORKING": "working",
    "TASK_STATE_COMPLETED": "completed",
    "TASK_STATE_FAILED": "failed",
    "TASK_STATE_CANCELED": "canceled",
    "TASK_STATE_INPUT_REQUIRED": "input-required",
    "TASK_STATE_REJECTED": "rejected",
    "TASK_STATE_AUTH_REQUIRED": "auth-required",
}


# --- requests ---------------------------------------------------------------------------------------------------------


def request(operation: str, params: Any, *, buffers: bool = False) -> Json:
    """The parameters of a method (or a body) as those of the operation, still to be checked. ``buffers``: they have the
    shape of the protocol's buffers of then, in which what is not said is false. Raises: InvalidParamsError."""
    if params is None:
        params = {}
    if not isinstance(params, dict):
        raise errors.invalid("params", "must be an object")
    if buffers and isinstance(configuration := params.get("configuration"), dict):
        params = {**params, "configuration": {"blocking": False, **configuration}}
    translate = _REQUESTS.get(operation)
    return params if translate is None else translate(params)


def _send(params: Json) -> Json:
    found: Json = {name: params[name] for name in ("metadata", "tenant") if params.get(name) is not None}
    message = params.get("message", params.get("request"))  # HTTP+JSON of 0.3 had a name of its own
    if message is not None:
        found["message"] = _message_in(message)
    if isinstance(configuration := params.get("configuration"), dict):
        found["configuration"] = _configuration_in(configuration)
    return found


def _configuration_in(given: Json) -> Json:
    found: Json = {}
    if (modes := _either(given, "acceptedOutputModes", "accepted_output_modes")) is not None:
        found["acceptedOutputModes"] = modes
    if length := _either(given, "historyLength", "history_length"):  # 0 meant "all" then
        found["historyLength"] = length
    blocking = given.get("blocking")
    if isinstance(blocking, bool):
        found["returnImmediately"] = not blocking
    push = _either(given, "pushNotificationConfig", "pushNotification") or given.get("push_notification")
    if isinstance(push, dict):
        found["taskPushNotificationConfig"] = _push_in(push)
    return found


def _push_in(given: Json) -> Json:
    found = {name: given[name] for name in ("id", "url", "token") if given.get(name) is not None}
    if isinstance(auth := given.get("authentication"), dict):
        schemes = auth.get("schemes") or []
        found["authentication"] = {"scheme": schemes[0] if schemes else "", "credentials": auth.get("credentials")}
    return found


def _create_push(params: Json) -> Json:
    push = _either(params, "pushNotificationConfig", "push_notification_config")
    config = params.get("config")
    if push is None and isinstance(config, dict):
        push = _either(config, "pushNotificationConfig", "push_notification_config")
    found = _push_in(push) if isinstance(push, dict) else {}
    if (task_id := params.get("taskId")) is not None:
        found["taskId"] = task_id
        found.setdefault("id", task_id)
    return found


def _get_push(params: Json) -> Json:
    # without the id of a configuration, the one that has the task's id is meant
    return {"taskId": params.get("id"), "id": params.get("pushNotificationConfigId") or params.get("id")}


def _list_push(params: Json) -> Json:
    return {"taskId": params.get("id")}


_REQUESTS: Final[Mapping[str, Callable[[Json], Json]]] = {
    "SendMessage": _send,
    "SendStreamingMessage": _send,
    "CreateTaskPushNotificationConfig": _create_push,
    "GetTaskPushNotificationConfig": _get_push,
    "ListTaskPushNotificationConfigs": _list_push,
    "DeleteTaskPushNotificationConfig": _get_push,
    "GetExtendedAgentCard": lambda params: {},
}


def _either(given: Json, name: str, other: str) -> Any:
    return given.get(name, given.get(other))


def _message_in(given: Any) -> Any:
    if not isinstance(given, dict):
        return given  # refused where it is checked
    found = {name: value for name in _KEPT if (value := _either(given, name, _SNAKE[name])) is not None}
    role = given.get("role")
    if role is not None:
        found["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    named = "parts" in given  # else it is the shape of HTTP+JSON
    parts = given.get("parts", given.get("content"))
    if isinstance(parts, list):
        found["parts"] = [_part_in(each, named) for each in parts]
    elif parts is not None:
        found["parts"] = parts
    return found


_KEPT: Final = ("messageId", "contextId", "taskId", "metadata", "extensions", "referenceTaskIds")
_SNAKE: Final = {
    "messageId": "message_id",
    "contextId": "context_id",
    "taskId": "task_id",
    "metadata": "metadata",
    "extensions": "extensions",
    "referenceTaskIds": "reference_task_ids",
}


def _part_in(given: Any, named: bool) -> Any:
    """A part as JSON-RPC had it (``named``: by its ``kind``), or as HTTP+JSON had it."""
    if not isinstance(given, dict):
        return given
    found: Json = {}
    if given.get("metadata") is not None:
        found["metadata"] = given["metadata"]
    kind = given.get("kind", "" if named else None)
    if kind == "text" or (kind is None and "text" in given):
        found["text"] = given.get("text")
    elif kind == "data" or (kind is None and "data" in given):
        data = given.get("data")
        found["data"] = data["data"] if kind is None and isinstance(data, dict) and "data" in data else data
        if kind == "data" and not isinstance(data, dict):
            raise errors.invalid("message.parts", "the data of a part is an object")
    elif kind == "file" or (kind is None and "file" in given):
        found |= _file_in(given.get("file"))
    else:
        raise errors.invalid("message.parts", "a part is of the kind text, file or data")
    return found


def _file_in(file: Any) -> Json:
    if not isinstance(file, dict):
        raise errors.invalid("message.parts", "the file of a part is an object")
    found: Json = {}
    data = file.get("bytes", _either(file, "fileWithBytes", "file_with_bytes"))
    url = file.get("uri", _either(file, "fileWithUri", "file_with_uri"))
    if data is not None:
        found["raw"] = data
    if url is not None:
        found["url"] = url
    if (name := file.get("name")) is not None:
        found["filename"] = name
    if (kind := _either(file, "mimeType", "mime_type")) is not None:
        found["mediaType"] = kind
    return found


# --- responses over JSON-RPC ------------------------------------------------------------------------------------------


def result(value: Any) -> Any:
    """What an operation returned, as 0.3 has it."""
    if isinstance(value, a2a.SendMessageResponse | a2a.StreamResponse):
        return event(value)
    if isinstance(value, a2a.Task):
        return task(value)
    if isinstance(value, a2a.TaskPushNotificationConfig):
        return push_config(value)
    if isinstance(value, a2a.ListTaskPushNotificationConfigsResponse):
        return [push_config(each) for each in value.configs]
    return value


def event(value: a2a.SendMessageResponse | a2a.StreamResponse) -> Json:
    if value.task is not None:
        return task(value.task)
    if value.message is not None:
        return message(value.message)
    assert isinstance(value, a2a.StreamResponse)
    if (update := value.status_update) is not None:
        return _set(
            kind="status-update",
            taskId=update.task_id,
            contextId=update.context_id,
            status=status(update.status),
            final=is_final(update.status.state),
            metadata=update.metadata,
        )
    assert value.artifact_update is not None
    made = value.artifact_update
    return _set(
        kind="artifact-update",
        taskId=made.task_id,
        contextId=made.context_id,
        artifact=artifact(made.artifact),
        append=made.append,
        lastChunk=made.last_chunk,
        metadata=made.metadata,
    )


def is_final(state: a2a.TaskState) -> bool:
    """Whether a stream says that this is its last event: the work is over, or goes on with an answer only."""
    return state in TERMINAL or state == "TASK_STATE_INPUT_REQUIRED"


def task(value: a2a.Task) -> Json:
    return _set(
        kind="task",
        id=value.id,
        contextId=value.context_id,
        status=status(value.status),
        artifacts=[artifact(each) for each in value.artifacts or []] or None,
        history=[message(each) for each in value.history or []] or None,
        metadata=value.metadata,
    )


def status(value: a2a.TaskStatus) -> Json:
    said = None if value.message is None else message(value.message)
    return _set(state=_STATES[value.state], message=said, timestamp=value.timestamp)


def message(value: a2a.Message) -> Json:
    return _set(
        kind="message",
        messageId=value.message_id,
        role="user" if value.role == "ROLE_USER" else "agent",
        parts=[part(each) for each in value.parts],
        contextId=value.context_id,
        taskId=value.task_id,
        metadata=value.metadata,
        extensions=value.extensions,
        referenceTaskIds=value.reference_task_ids,
    )


def artifact(value: a2a.Artifact) -> Json:
    return _set(
        artifactId=value.artifact_id,
        name=value.name,
        description=value.description,
        parts=[part(each) for each in value.parts],
        metadata=value.metadata,
        extensions=value.extensions,
    )


def part(value: a2a.Part) -> Json:
    if value.text is not None:
        return _set(kind="text", text=value.text, metadata=value.metadata)
    if not is_unset(value.data):
        data = value.data if isinstance(value.data, dict) else {"value": value.data}
        return _set(kind="data", data=data, metadata=value.metadata)
    file = _set(name=value.filename, mimeType=value.media_type, uri=value.url)
    if value.raw is not None:
        file["bytes"] = base64.b64encode(value.raw).decode()
    return _set(kind="file", file=file, metadata=value.metadata)


def push_config(value: a2a.TaskPushNotificationConfig) -> Json:
    auth = None
    if value.authentication is not None:
        auth = _set(schemes=[value.authentication.scheme], credentials=value.authentication.credentials)
    config = _set(id=value.id, url=value.url, token=value.token, authentication=auth)
    return _set(taskId=value.task_id, pushNotificationConfig=config)


def _set(**members: Any) -> Json:
    return {name: value for name, value in members.items() if value is not None}


# --- responses over HTTP+JSON -----------------------------------------------------------------------------------------
# It had a shape of its own: that of the protocol's buffers at the time, between JSON-RPC's and that of 1.0.


def rest_result(value: Any) -> Any:
    if isinstance(value, a2a.SendMessageResponse | a2a.StreamResponse):
        return rest_event(value)
    if isinstance(value, a2a.Task):
        return _rest_task(value)
    if isinstance(value, a2a.TaskPushNotificationConfig):
        return _rest_push(value)
    if isinstance(value, a2a.ListTaskPushNotificationConfigsResponse):
        return {"configs": [_rest_push(each) for each in value.configs]}
    return {} if value is None else value


def rest_event(value: a2a.SendMessageResponse | a2a.StreamResponse) -> Json:
    if value.task is not None:
        return {"task": _rest_task(value.task)}
    if value.message is not None:
        return {"message": _rest_message(value.message)}
    assert isinstance(value, a2a.StreamResponse)
    if (update := value.status_update) is not None:
        return {
            "statusUpdate": _set(
                taskId=update.task_id,
                contextId=update.context_id,
                status=_rest_status(update.status),
                final=is_final(update.status.state),
                metadata=update.metadata,
            )
        }
    made = value.artifact_update
    assert made is not None
    return {
        "artifactUpdate": _set(
            taskId=made.task_id,
            contextId=made.context_id,
            artifact=_rest_artifact(made.artifact),
            append=made.append,
            lastChunk=made.last_chunk,
            metadata=made.metadata,
        )
    }


def rest_error(error: errors.A2AError) -> Json:
    """An error, for which 0.3 had no shape: JSON-RPC's members by which some of its clients know it, and its name, by
    which others do."""
    return {**errors.jsonrpc_error(error), "type": type(error).__name__}


def _rest_task(value: a2a.Task) -> Json:
    return _set(
        id=value.id,
        contextId=value.context_id,
        status=_rest_status(value.status),
        artifacts=[_rest_artifact(each) for each in value.artifacts or []] or None,
        history=[_rest_message(each) for each in value.history or []] or None,
        metadata=value.metadata,
    )


def _rest_status(value: a2a.TaskStatus) -> Json:
    state = "TASK_STATE_CANCELLED" if value.state == "TASK_STATE_CANCELED" else value.state
    said = None if value.message is None else _rest_message(value.message)
    return _set(state=state, message=said, timestamp=value.timestamp)


def _rest_message(value: a2a.Message) -> Json:
    return _set(
        messageId=value.message_id,
        role=value.role,
        content=[_rest_part(each) for each in value.parts],
        contextId=value.context_id,
        taskId=value.task_id,
        metadata=value.metadata,
        extensions=value.extensions,
    )


def _rest_artifact(value: a2a.Artifact) -> Json:
    return artifact(value) | {"parts": [_rest_part(each) for each in value.parts]}


def _rest_part(value: a2a.Part) -> Json:
    if value.text is not None:
        return _set(text=value.text, metadata=value.metadata)
    if not is_unset(value.data):
        data = value.data if isinstance(value.data, dict) else {"value": value.data}
        return _set(data={"data": data}, metadata=value.metadata)
    file = _set(name=value.filename, mimeType=value.media_type, fileWithUri=value.url)
    if value.raw is not None:
        file["fileWithBytes"] = base64.b64encode(value.raw).decode()
    return _set(file=file, metadata=value.metadata)


def _rest_push(value: a2a.TaskPushNotificationConfig) -> Json:
    name = f"tasks/{value.task_id}/pushNotificationConfigs/{value.id}"
    return {"name": name, "pushNotificationConfig": push_config(value)["pushNotificationConfig"]}
