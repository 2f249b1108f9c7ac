"""A2A 0.3: its requests become those of 1.0, and what 1.0 answers is read by 0.3's own models."""

from __future__ import annotations

from typing import Any

import pytest
from a2a.compat.v0_3 import a2a_v0_3_pb2 as buffers
from a2a.compat.v0_3 import types as theirs
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]

from hector_trio.a2a import errors, requests, v03
from hector_trio.a2a import types as a2a
from hector_trio.transports.a2a import OPERATIONS

TEXT = {"kind": "text", "text": "hi"}
MESSAGE = {"kind": "message", "messageId": "m", "role": "user", "parts": [TEXT]}


def sent(**params: Any) -> a2a.SendMessageRequest:
    return requests.converted(v03.request("SendMessage", params), a2a.SendMessageRequest)


def test_its_methods_are_all_operations_but_one() -> None:
    assert set(v03.METHODS.values()) == set(OPERATIONS) - {"ListTasks"}


def test_parts_of_each_kind_are_read() -> None:
    parts = [
        TEXT,
        {"kind": "data", "data": {"a": 1}, "metadata": {"m": 1}},
        {"kind": "file", "file": {"bytes": "aGk=", "name": "f", "mimeType": "a/b"}},
        {"kind": "file", "file": {"uri": "https://x"}},
    ]
    assert sent(message=MESSAGE | {"parts": parts}).message.parts == [
        a2a.Part(text="hi"),
        a2a.Part(data={"a": 1}, metadata={"m": 1}),
        a2a.Part(raw=b"hi", filename="f", media_type="a/b"),
        a2a.Part(url="https://x"),
    ]


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": "x"}, {"kind": "video"}, {"kind": "file"}, {"kind": "data", "data": 1}, 7]
)
def test_what_is_no_part_is_refused(part: Any) -> None:
    with pytest.raises(errors.InvalidParamsError):
        sent(message=MESSAGE | {"parts": [part]})


@pytest.mark.parametrize("wrong", [{}, {"message": None}, {"message": 1}, {"message": {"kind": "message"}}])
def test_what_is_no_message_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.InvalidParamsError):
        sent(**wrong)
    with pytest.raises(errors.InvalidParamsError):
        v03.request("SendMessage", [wrong])


def test_blocking_is_the_opposite_of_returning_immediately() -> None:
    for blocking, at_once in ((True, False), (False, True), (None, None)):
        configuration = sent(message=MESSAGE, configuration={"blocking": blocking, "historyLength": 0}).configuration
        assert configuration == a2a.SendMessageConfiguration(return_immediately=at_once)


def test_a_push_configuration_is_flat_now() -> None:
    push = {"url": "https://x", "token": "t", "authentication": {"schemes": ["Bearer"], "credentials": "c"}}
    params = {"taskId": "task", "pushNotificationConfig": push}
    made = requests.converted(v03.request("CreateTaskPushNotificationConfig", params), a2a.TaskPushNotificationConfig)
    assert made == a2a.TaskPushNotificationConfig(
        "https://x", id="task", task_id="task", token="t", authentication=a2a.AuthenticationInfo("Bearer", "c")
    )
    push["id"] = "task"  # what get and delete mean when they name none
    assert v03.push_config(made) == params


def test_the_shape_of_http_json_is_read_as_well() -> None:
    message = {
        "message_id": "m",
        "role": "ROLE_USER",
        "content": [{"text": "hi"}, {"data": {"data": {"a": 1}}}, {"file": {"file_with_uri": "u", "mime_type": "a/b"}}],
    }
    assert sent(request=message).message == a2a.Message(
        "m", "ROLE_USER", [a2a.Part(text="hi"), a2a.Part(data={"a": 1}), a2a.Part(url="u", media_type="a/b")]
    )


PARTS = [
    a2a.Part(text="x", metadata={"m": 1}),
    a2a.Part(data=[1]),
    a2a.Part(data={"a": 1}),
    a2a.Part(raw=b"hi", filename="f", media_type="a/b"),
    a2a.Part(url="https://x"),
]
SAID = a2a.Message("m", "ROLE_AGENT", PARTS, context_id="c", task_id="t", reference_task_ids=["r"])


@pytest.mark.parametrize("state", v03._STATES)
def test_a_task_is_read_by_the_models_of_0_3(state: a2a.TaskState) -> None:
    task = a2a.Task(
        "t",
        a2a.TaskStatus(state, SAID, "2025-10-28T10:30:00.000Z"),
        context_id="c",
        artifacts=[a2a.Artifact("a", PARTS, "n")],
        history=[SAID],
        metadata={"k": 1},
    )
    read = theirs.Task.model_validate(v03.result(task))
    assert read.status.state.value == v03._STATES[state]
    assert read.artifacts is not None
    assert len(read.artifacts[0].parts) == 5
    assert v03.result(a2a.SendMessageResponse(task=task)) == v03.result(task)
    ParseDict(v03.rest_result(task), buffers.Task())
    ParseDict(v03.rest_result(a2a.SendMessageResponse(task=task)), buffers.SendMessageResponse())


@pytest.mark.parametrize(
    ("state", "final"),
    [("TASK_STATE_WORKING", False), ("TASK_STATE_INPUT_REQUIRED", True), ("TASK_STATE_COMPLETED", True)],
)
def test_updates_are_read_by_the_models_of_0_3_and_say_which_is_the_last(state: a2a.TaskState, final: bool) -> None:
    update = a2a.StreamResponse(status_update=a2a.TaskStatusUpdateEvent("t", "c", a2a.TaskStatus(state)))
    assert theirs.TaskStatusUpdateEvent.model_validate(v03.event(update)).final is final
    made = a2a.StreamResponse(artifact_update=a2a.TaskArtifactUpdateEvent("t", "c", a2a.Artifact("a", PARTS), True))
    assert theirs.TaskArtifactUpdateEvent.model_validate(v03.event(made)).append is True
    said = a2a.StreamResponse(message=SAID)
    assert theirs.Message.model_validate(v03.event(said)).role.value == "agent"
    for each in (update, made, said):
        ParseDict(v03.rest_event(each), buffers.StreamResponse())


def test_what_is_empty_stays_empty() -> None:
    assert v03.result(None) is None
    assert v03.rest_result(None) == {}
    assert v03.result(a2a.ListTaskPushNotificationConfigsResponse([])) == []
