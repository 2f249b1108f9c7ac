"""Both dialects both ways: what a server of ours writes in 0.3 is read as what it was in 1.0."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.a2a import v03
from hector_trio.a2a.dialects import Current, Dialect, Garbage, OldHttp, OldJsonRpc
from hector_trio.a2a.types import (
    Artifact,
    Message,
    Part,
    SendMessageConfiguration,
    SendMessageRequest,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskStatus,
    TaskStatusUpdateEvent,
)

PARTS = [
    Part(text="hi", metadata={"m": 1}),
    Part(raw=b"\x00\xff", filename="a.png", media_type="image/png"),
    Part(url="https://x.example/a", media_type="text/html"),
    Part(data={"a": [None, 1]}),
]
MESSAGE = Message("m", "ROLE_AGENT", PARTS, context_id="C", task_id="T", metadata={"k": "v"}, extensions=["urn:x"])
STATES: Any = [
    "TASK_STATE_SUBMITTED",
    "TASK_STATE_WORKING",
    "TASK_STATE_COMPLETED",
    "TASK_STATE_FAILED",
    "TASK_STATE_CANCELED",
    "TASK_STATE_INPUT_REQUIRED",
    "TASK_STATE_REJECTED",
    "TASK_STATE_AUTH_REQUIRED",
]
RESPONSES = [
    StreamResponse(message=MESSAGE),
    StreamResponse(
        task=Task(
            "T",
            TaskStatus("TASK_STATE_WORKING", message=MESSAGE, timestamp="2026-01-01T00:00:00Z"),
            context_id="C",
            artifacts=[Artifact("A", PARTS, name="n", description="d")],
            history=[MESSAGE],
        )
    ),
    StreamResponse(
        artifact_update=TaskArtifactUpdateEvent("T", "C", Artifact("A", PARTS), append=True, last_chunk=True)
    ),
    *(StreamResponse(status_update=TaskStatusUpdateEvent("T", "C", TaskStatus(state))) for state in STATES),
]


def normal(response: StreamResponse) -> Any:
    """Without the difference between empty and absent."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(each) for name, each in value.items() if each not in ([], {})}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return clean(msgspec.to_builtins(response))


@pytest.mark.parametrize("response", RESPONSES, ids=lambda each: next(iter(msgspec.to_builtins(each))))
def test_what_our_server_writes_in_0_3_is_read_as_it_was(response: StreamResponse) -> None:
    assert normal(OldJsonRpc().response(json.dumps(v03.event(response)).encode())) == normal(response)
    assert normal(OldHttp().response(json.dumps(v03.rest_event(response)).encode())) == normal(response)
    if response.task is not None:
        assert OldJsonRpc().task(json.dumps(v03.task(response.task)).encode()).id == "T"
        assert OldHttp().task(json.dumps(v03.rest_result(response.task)).encode()).id == "T"


@pytest.mark.parametrize("dialect", [OldJsonRpc(), OldHttp()])
def test_what_we_write_in_0_3_our_server_reads_as_it_was(dialect: Dialect) -> None:
    message = msgspec.structs.replace(MESSAGE, role="ROLE_USER")
    configuration = SendMessageConfiguration(accepted_output_modes=["text/plain"], return_immediately=True)
    request = SendMessageRequest(message, configuration, metadata={"p": 1})
    read = v03.request("SendMessage", json.loads(msgspec.json.encode(dialect.request(request))))
    assert msgspec.convert(read, SendMessageRequest) == request


def test_data_that_is_no_object_is_wrapped_in_0_3() -> None:
    request = SendMessageRequest(Message("m", "ROLE_USER", [Part(data=[1, None])]))
    rpc = OldJsonRpc().request(request)["message"]["parts"][0]
    assert rpc == {"kind": "data", "data": {"value": [1, None]}, "metadata": {"data_part_compat": True}}
    http = OldHttp().request(request)["message"]["content"][0]
    assert http == {"data": {"data": {"value": [1, None]}}, "metadata": {"data_part_compat": True}}
    event = {"kind": "message", "messageId": "m", "role": "agent", "parts": [rpc]}
    found = OldJsonRpc().response(json.dumps(event).encode()).message
    assert found is not None
    assert found.parts == [Part(data=[1, None])]


def test_an_old_server_may_leave_the_kind_out() -> None:
    for found, name in (
        ({"messageId": "m", "role": "agent", "parts": [{"kind": "text", "text": "x"}]}, "message"),
        ({"id": "T", "contextId": "C", "status": {"state": "working"}}, "task"),
        ({"taskId": "T", "contextId": "C", "status": {"state": "unknown"}, "final": False}, "statusUpdate"),
        ({"taskId": "T", "artifact": {"artifactId": "A", "parts": [{"text": "x"}]}}, "artifactUpdate"),
    ):
        assert name in msgspec.to_builtins(OldJsonRpc().response(json.dumps(found).encode()))


def test_what_some_agents_leave_out_is_mended() -> None:
    for dialect in (Current(), OldHttp()):
        update = {"artifactUpdate": {"taskId": "T", "artifact": {"artifactId": "A"}, "lastChunk": True}}
        found = dialect.response(json.dumps(update).encode()).artifact_update
        assert found is not None
        assert (found.context_id, found.artifact.parts, found.last_chunk) == ("T", [Part(text="")], True)
    task = {"id": "T", "status": {"state": "TASK_STATE_WORKING"}, "artifacts": [{"artifactId": "A", "parts": []}]}
    mended = Current().task(json.dumps(task).encode())
    assert mended.artifacts is not None
    assert mended.artifacts[0].parts == [Part(text="")]


GARBAGE = [
    b"",
    b"7",
    b"[]",
    b"{}",
    b"\xff",
    b"[" * 100_000,
    b'{"task":7}',
    b'{"task":{"id":"T","status":{"state":"dreaming"}}}',
    b'{"kind":"task","id":"T"}',
    b'{"kind":"task","id":"T","status":[]}',
    b'{"kind":"dream"}',
    b'{"kind":"message","messageId":"m","parts":[7]}',
    b'{"kind":"message","messageId":"m","parts":[{"kind":"file"}]}',
    b'{"message":{"messageId":"m","content":[{"data":7}]}}',
    b'{"statusUpdate":{}}',
    b'{"artifactUpdate":{"artifact":{"parts":7}}}',
]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda each: each[:40].decode("latin-1"))
@pytest.mark.parametrize("dialect", [Current(), OldJsonRpc(), OldHttp()], ids=lambda each: type(each).__name__)
def test_what_makes_no_sense_is_garbage(dialect: Dialect, data: bytes) -> None:
    with pytest.raises(Garbage):
        dialect.response(data)
    with pytest.raises(Garbage):
        dialect.task(data)


_keys = st.sampled_from(
    [
        "kind",
        "task",
        "message",
        "statusUpdate",
        "artifactUpdate",
        "status",
        "state",
        "artifact",
        "parts",
        "content",
        "id",
        "taskId",
        "messageId",
        "artifactId",
        "text",
        "data",
        "file",
        "role",
        "artifacts",
        "history",
        "metadata",
    ]
)
_json: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["task", "message", "x", "working"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=12,
)


@given(_json)
def test_no_answer_breaks_anything(value: Any) -> None:
    data = json.dumps(value).encode()
    for dialect in (Current(), OldJsonRpc(), OldHttp()):
        for read in (dialect.response, dialect.task):
            with contextlib.suppress(Garbage):
                read(data)
