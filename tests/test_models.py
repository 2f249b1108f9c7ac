"""The wire's types: which ids there are, how time is written, what is left out and what is ignored."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.errors import FieldError
from hector_trio.models import (
    AgentCard,
    Chunk,
    ChunkList,
    Content,
    Endpoints,
    GraceMs,
    Message,
    Problem,
    Session,
    SessionPatch,
    SessionRequest,
    Task,
    TaskContext,
    TaskError,
    TaskList,
    TaskRequest,
    encode,
    is_id,
    timestamp,
)

AT = "2026-01-02T03:04:05.678Z"


@pytest.mark.parametrize("text", ["a", "A.z_0~-", "...", ".a", "a.", "550e8400-e29b-41d4-a716-446655440000", "x" * 128])
def test_these_are_ids(text: str) -> None:
    assert is_id(text)
    assert msgspec.convert({"input": {}, "taskId": text}, TaskRequest).task_id == text


@pytest.mark.parametrize("text", ["", " ", "a b", "a/b", "ä", "a%20", "x" * 129, "\x00", "a\u200b", "１"])
def test_these_are_not(text: str) -> None:
    assert not is_id(text)
    with pytest.raises(msgspec.ValidationError, match=r"taskId"):
        msgspec.convert({"input": {}, "taskId": text}, TaskRequest)


@pytest.mark.parametrize("text", [".", "..", "a\n"])
def test_some_that_the_wires_pattern_lets_through_are_no_ids_either(text: str) -> None:
    assert not is_id(text)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (1_700_000_000_007, "2023-11-14T22:13:20.007Z"),
        (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
    ],
)
def test_a_timestamp_is_utc_with_milliseconds_and_a_z(ms: int, text: str) -> None:
    assert timestamp(ms) == text


@given(st.integers(min_value=0, max_value=4_102_444_800_000))
def test_no_millisecond_is_lost_in_a_timestamp(ms: int) -> None:
    parsed = datetime.fromisoformat(timestamp(ms))
    since = parsed - datetime(1970, 1, 1, tzinfo=UTC)
    assert round(since.total_seconds() * 1000) == ms


@given(st.integers(min_value=0, max_value=10**12), st.integers(min_value=1, max_value=10**6))
def test_later_is_greater_also_as_text(ms: int, more: int) -> None:
    assert timestamp(ms) < timestamp(ms + more)


COMPLETE: list[tuple[Any, dict[str, Any]]] = [
    (Content("text/html", "<p>"), {"type": "text/html", "content": "<p>"}),
    (Content(), {"type": "text/plain", "content": ""}),
    (
        TaskRequest(
            Content(content={"a": 1}),
            task_id="t",
            parameters={"n": 1},
            context=TaskContext("s", "u", {"k": "v"}),
            timeout_ms=1,
            on_disconnect=GraceMs(0),
            multitask="reject",
        ),
        {
            "input": {"type": "text/plain", "content": {"a": 1}},
            "taskId": "t",
            "parameters": {"n": 1},
            "context": {"sessionId": "s", "userId": "u", "metadata": {"k": "v"}},
            "timeoutMs": 1,
            "onDisconnect": {"graceMs": 0},
            "multitask": "reject",
        },
    ),
    (
        Task("t", "a", "pending", {}, AT),
        {"taskId": "t", "agentId": "a", "status": "pending", "metadata": {}, "startedAt": AT},
    ),
    (
        Task("t", "a", "failed", {}, AT, "s", Content(content="x"), TaskError("code", "why", {"n": 1}), AT),
        {
            "taskId": "t",
            "agentId": "a",
            "status": "failed",
            "metadata": {},
            "startedAt": AT,
            "sessionId": "s",
            "output": {"type": "text/plain", "content": "x"},
            "error": {"code": "code", "message": "why", "details": {"n": 1}},
            "endedAt": AT,
        },
    ),
    (TaskError("code", "why"), {"code": "code", "message": "why"}),
    (
        Chunk("t", 1, "text", "x", AT),
        {"taskId": "t", "seq": 1, "chunkType": "text", "content": "x", "timestamp": AT, "final": False},
    ),
    (
        Chunk("t", 9, "error", "x", AT, True, 7, "failed", "r", "c", "image/png", "base64", False),
        {
            "taskId": "t",
            "seq": 9,
            "chunkType": "error",
            "content": "x",
            "timestamp": AT,
            "final": True,
            "firstSeq": 7,
            "status": "failed",
            "reason": "r",
            "code": "c",
            "mediaType": "image/png",
            "encoding": "base64",
            "retryable": False,
        },
    ),
    (
        Session("s", "a", AT, AT, {"n": 1}, {}),
        {"sessionId": "s", "agentId": "a", "createdAt": AT, "lastActivityAt": AT, "state": {"n": 1}, "metadata": {}},
    ),
    (
        Message("agent", "x", "a", "t", AT, partial=True, status="cancelled"),
        {
            "role": "agent",
            "content": "x",
            "agentId": "a",
            "taskId": "t",
            "timestamp": AT,
            "type": "text/plain",
            "partial": True,
            "status": "cancelled",
        },
    ),
    (
        AgentCard("a", "A", "", "1", {"streaming": True}, Endpoints("/t", "/s", "/x"), ["text/plain"], [], {}),
        {
            "agentId": "a",
            "name": "A",
            "description": "",
            "version": "1",
            "capabilities": {"streaming": True},
            "endpoints": {"task": "/t", "stream": "/s", "status": "/x"},
            "inputTypes": ["text/plain"],
            "outputTypes": [],
            "auth": {},
            "metadata": {},
        },
    ),
    (
        Problem("about:blank", "Bad", 400, "why", "/x", "invalid_request", errors=(FieldError("/a", "no"),)),
        {
            "type": "about:blank",
            "title": "Bad",
            "status": 400,
            "detail": "why",
            "instance": "/x",
            "code": "invalid_request",
            "errors": [{"pointer": "/a", "message": "no"}],
        },
    ),
    (TaskList([], 0, ""), {"tasks": [], "total": 0, "nextPageToken": ""}),
    (ChunkList([], 3, "p"), {"chunks": [], "total": 3, "nextPageToken": "p"}),
]


@pytest.mark.parametrize(("value", "wire"), COMPLETE, ids=lambda value: type(value).__name__)
def test_this_is_how_it_stands_on_the_wire_and_is_read_back(value: Any, wire: dict[str, Any]) -> None:
    assert msgspec.json.decode(encode(value)) == wire
    assert msgspec.json.decode(encode(value), type=type(value)) == value


@pytest.mark.parametrize(("value", "wire"), COMPLETE, ids=lambda value: type(value).__name__)
def test_a_key_that_nobody_knows_is_ignored(value: Any, wire: dict[str, Any]) -> None:
    assert msgspec.convert(wire | {"somethingNew": {"a": 1}}, type(value)) == value


@pytest.mark.parametrize(("value", "wire"), COMPLETE, ids=lambda value: type(value).__name__)
def test_a_value_once_made_stays_as_it_is(value: Any, wire: dict[str, Any]) -> None:
    with pytest.raises(AttributeError):
        setattr(value, value.__struct_fields__[0], None)


def test_the_first_six_members_of_a_chunk_stand_in_this_order() -> None:
    assert list(msgspec.json.decode(encode(Chunk("t", 1, "data", None, AT, code="c")))) == [
        "taskId",
        "seq",
        "chunkType",
        "content",
        "timestamp",
        "final",
        "code",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e300, 1e300) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.text())
def test_any_json_comes_through_and_never_holds_a_line_break(content: Any, text: str) -> None:
    for chunk in (Chunk("t", 1, "data", content, AT), Chunk("t", 2, "text", text, AT)):
        line = encode(chunk)
        assert b"\n" not in line
        assert msgspec.json.decode(line, type=Chunk) == chunk


@pytest.mark.parametrize("body", [b"{}", b'{"input": null}', b'{"input": "text"}', b'{"input": []}', b"[]", b"null"])
def test_a_request_needs_an_input_that_is_an_object(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=TaskRequest)


@pytest.mark.parametrize(
    "member",
    [
        {"timeoutMs": 0},
        {"timeoutMs": 1.5},
        {"timeoutMs": "1"},
        {"onDisconnect": "stay"},
        {"onDisconnect": {}},
        {"onDisconnect": {"graceMs": -1}},
        {"multitask": ""},
        {"parameters": []},
        {"context": {"sessionId": ""}},
        {"context": "s"},
        {"taskId": 1},
    ],
)
def test_what_is_given_must_be_of_its_type(member: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"input": {}, **member}, TaskRequest)


def test_null_means_the_same_as_nothing_in_a_request() -> None:
    names = ("taskId", "parameters", "context", "timeoutMs", "onDisconnect", "multitask")
    assert msgspec.convert({"input": {}, **dict.fromkeys(names)}, TaskRequest) == TaskRequest(Content())


@pytest.mark.parametrize("seconds", [0, -1, 10 * 365 * 86400 + 1])
def test_a_session_lives_for_at_least_a_second_and_at_most_ten_years(seconds: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"agentId": "a", "ttlSeconds": seconds}, SessionRequest)


def test_a_patch_tells_a_member_that_is_empty_from_one_that_is_not_there() -> None:
    assert msgspec.convert({"state": {}}, SessionPatch) == SessionPatch(state={})
    assert msgspec.convert({}, SessionPatch) == SessionPatch()
    assert SessionPatch(state={}) != SessionPatch()
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"state": None}, SessionPatch)
