"""The pure rules on tasks and their logs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import msgspec
import pytest
from msgspec import UNSET

from hector_trio.models import Chunk, ChunkType, Content, GraceMs, TaskContext, TaskRequest
from hector_trio.task import (
    ENDED,
    NEXT,
    Outcome,
    decode_chunk,
    encode_chunk,
    final_chunk,
    fingerprint,
    fold,
    grace_of,
    join_lines,
    joined,
    named,
    policy_of,
    split_lines,
)


def chunk(seq: int, kind: ChunkType, content: object) -> Chunk:
    return Chunk("t", seq, kind, content, "2026-01-01T00:00:00.000Z")


def test_nothing_follows_an_end() -> None:
    assert all(not NEXT[status] for status in ENDED)
    assert all(after <= NEXT.keys() for after in NEXT.values())


def test_text_adds_up_to_the_output() -> None:
    log = [chunk(1, "text", "Hel"), chunk(2, "data", {"n": 1}), chunk(3, "text", "lo")]
    folded = fold([*log, final_chunk("t", 4, 0, Outcome("completed"))])
    assert folded.output() == Content("text/plain", "Hello")
    assert (folded.status, folded.last_seq, folded.error) == ("completed", 4, None)


@pytest.mark.parametrize(("values", "output"), [([{"n": 1}], {"n": 1}), ([1, 2], [1, 2])])
def test_without_text_the_data_is_the_output(values: list[object], output: object) -> None:
    folded = fold([chunk(n, "data", value) for n, value in enumerate(values, 1)])
    assert folded.output() == Content("application/json", output)


def test_a_failure_has_a_code_and_is_never_prose_in_the_output() -> None:
    folded = fold([final_chunk("t", 1, 0, Outcome("failed", code="timeout", message="Too late"))])
    assert folded.status == "failed"
    assert folded.error is not None
    assert folded.error.code == "timeout"
    assert folded.output() is None


def test_an_error_chunk_that_is_not_final_fails_nothing() -> None:
    folded = fold([chunk(1, "error", "careful"), final_chunk("t", 2, 0, Outcome("completed"))])
    assert folded.status == "completed"


@pytest.mark.parametrize(
    ("outcome", "kind", "extra"),
    [
        (Outcome("completed"), "done", {"status": "completed"}),
        (Outcome("cancelled", reason="requested"), "done", {"status": "cancelled", "reason": "requested"}),
        (Outcome("failed", code="x", message="m"), "error", {"status": "failed", "code": "x"}),
    ],
)
def test_a_final_chunk_has_the_words_of_the_protocol(outcome: Outcome, kind: str, extra: dict[str, str]) -> None:
    sent = msgspec.json.decode(encode_chunk(final_chunk("t", 7, 0, outcome)))
    assert sent == {
        "taskId": "t",
        "seq": 7,
        "chunkType": kind,
        "content": outcome.message,
        "timestamp": "1970-01-01T00:00:00.000Z",
        "final": True,
        **extra,
    }


def test_all_six_members_of_a_chunk_are_always_there() -> None:
    assert set(msgspec.json.decode(encode_chunk(chunk(1, "text", "")))) == {
        "taskId", "seq", "chunkType", "content", "timestamp", "final",
    }  # fmt: skip


def test_joined_lines_keep_their_boundaries_whatever_the_text_holds() -> None:
    lines = [encode_chunk(chunk(n, "text", text)) for n, text in enumerate(["\n", "a\r\nb", "\u2028", "\\n"], 1)]
    assert split_lines(join_lines(lines)) == lines
    assert split_lines(b"") == []


def test_joining_works_only_through_what_is_taken_of_it() -> None:
    looked_at = 0

    def lines() -> Iterator[bytes]:
        nonlocal looked_at
        for looked_at in range(1, 1001):
            yield encode_chunk(chunk(looked_at, "data" if looked_at % 3 == 0 else "text", "x"))

    given = [decode_chunk(line) for line in islice(joined(lines()), 3)]
    assert [(each.first_seq, each.seq, each.content) for each in given] == [
        (1, 2, "xx"),
        (UNSET, 3, "x"),
        (4, 5, "xx"),
    ]
    assert looked_at == 6  # and not a thousand: a viewer far behind may take one at a time


def test_a_renamed_task_is_read_under_its_new_name() -> None:
    lines = [encode_chunk(chunk(n, "text", '"seq":9')) for n in (1, 2)]
    renamed = [decode_chunk(line) for line in named(lines, "t~1")]
    assert [(each.task_id, each.seq, each.content) for each in renamed] == [
        ("t~1", 1, '"seq":9'),
        ("t~1", 2, '"seq":9'),
    ]
    assert named(lines, "t") is lines


def test_fingerprints_are_equal_for_the_same_question_only() -> None:
    request = TaskRequest(Content("text/plain", "x"), parameters={"a": 1, "b": 2}, timeout_ms=5)
    same = TaskRequest(Content("text/plain", "x"), parameters={"b": 2, "a": 1}, context=TaskContext(user_id="u"))
    other = TaskRequest(Content("text/plain", "y"), parameters={"a": 1, "b": 2})
    assert fingerprint("a", None, request) == fingerprint("a", None, same)
    assert fingerprint("a", None, request) != fingerprint("a", None, other)
    assert fingerprint("a", None, request) != fingerprint("a", "s", request)
    assert fingerprint("a", None, request) != fingerprint("b", None, request)


def test_policies_have_one_stored_form() -> None:
    assert policy_of(None, "cancel", 60) == "cancel"
    assert policy_of("continue", "cancel", 60) == "continue"
    assert policy_of(GraceMs(30), "cancel", 60) == "grace:30"
    assert policy_of(GraceMs(90), "cancel", 60) == "grace:60"
    assert [grace_of(policy) for policy in ("cancel", "continue", "grace:1500")] == [None, None, 1.5]
