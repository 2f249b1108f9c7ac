"""A log as A2A's objects: every chunk's events, and that they always add up to the Task."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.a2a import types as a2a
from hector_trio.a2a.mapping import (
    OUTPUT,
    Line,
    TaskView,
    artifact_pieces,
    content_of,
    history_of,
    media_type_of,
    part_of,
    reply_piece,
)
from hector_trio.models import ArtifactChunk, Chunk, Content, encode
from hector_trio.task import Outcome, decode_chunk, final_chunk, fold, join_lines, joined, split_lines

AT = "2025-10-28T10:30:00.000Z"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PARTS = st.one_of(
    st.builds(a2a.Part, text=st.text()),
    st.builds(a2a.Part, text=st.text(), media_type=st.just("text/markdown"), metadata=st.just({"a": 1})),
    st.builds(a2a.Part, data=JSON),
    st.builds(a2a.Part, raw=st.binary(), media_type=st.just("image/png"), filename=st.none() | st.just("f")),
    st.builds(a2a.Part, url=st.just("https://example.com"), media_type=st.none() | st.just("a/b")),
)
OUTCOMES = st.sampled_from(
    [
        Outcome("completed"),
        Outcome("failed", code="x", message="no", retryable=True),
        Outcome("failed", code="rejected", message="never"),
        Outcome("cancelled", reason="requested"),
    ]
)


class Writer:
    """A log as a run would write it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def put(self, kind: Any, content: Any, **extra: Any) -> None:
        chunk = Chunk("t", len(self.lines) + 1, kind, content, AT, **extra)
        self.lines.append(encode(chunk))

    def end(self, outcome: Outcome) -> None:
        self.lines.append(encode(final_chunk("t", len(self.lines) + 1, 0, outcome)))


@st.composite
def logs(draw: st.DrawFn) -> list[bytes]:
    log = Writer()
    for what in draw(
        st.lists(st.sampled_from(["text", "data", "metadata", "error", "ask", "auth", "artifact", "status"]))
    ):
        if what == "text":
            log.put("text", draw(st.text(min_size=1)))
        elif what in ("data", "metadata"):
            log.put(what, draw(JSON))
        elif what == "error":
            log.put("error", "oh", code="c")
        elif what in ("ask", "auth"):
            more = {"reason": "auth"} if what == "auth" else {}
            log.put("metadata", {"status": "input_required", "prompt": draw(JSON)} | more)
        elif what == "status":
            log.put("metadata", {"status": "working", "message": draw(st.none() | st.text(min_size=1))})
        else:
            about = ArtifactChunk(draw(st.sampled_from(["a", "b"])), append=draw(st.booleans()), name="n")
            for piece in artifact_pieces(draw(st.lists(PARTS, min_size=1, max_size=3)), about):
                log.put(piece.kind, piece.content, **piece.extra)
    log.end(draw(OUTCOMES))
    return log.lines


def assembled(events: list[a2a.StreamResponse]) -> tuple[a2a.TaskState | None, dict[str, list[a2a.Part]]]:
    """What a client that follows the specification puts together of a stream."""
    state = None
    artifacts: dict[str, list[a2a.Part]] = {}
    for event in events:
        if event.status_update is not None:
            state = event.status_update.status.state
        elif event.artifact_update is not None:
            made = event.artifact_update
            if made.append:
                artifacts[made.artifact.artifact_id] += made.artifact.parts
            else:
                artifacts[made.artifact.artifact_id] = list(made.artifact.parts)
    return state, artifacts


def merged(parts: list[a2a.Part]) -> list[a2a.Part]:
    """Adjacent plain text as one."""
    found: list[a2a.Part] = []
    for part in parts:
        if found and part == a2a.Part(text=part.text or "") and found[-1] == a2a.Part(text=found[-1].text or ""):
            found[-1] = a2a.Part(text=(found[-1].text or "") + (part.text or ""))
        else:
            found.append(part)
    return found


@given(lines=logs())
def test_the_events_of_a_log_add_up_to_its_task(lines: list[bytes]) -> None:
    view = TaskView("t", "c", 0)
    events = [event for line in lines for event in view.take(decode_chunk(line))]
    state, artifacts = assembled(events)
    task = view.task()
    assert state == task.status.state
    assert {each.artifact_id: each.parts for each in task.artifacts or []} == {
        name: merged(parts) for name, parts in artifacts.items()
    }
    # and can be written and read again
    assert msgspec.json.decode(a2a.encode(task), type=a2a.Task) == task
    for event in events:
        assert msgspec.json.decode(a2a.encode(event), type=a2a.StreamResponse) == event


@given(lines=logs(), data=st.data())
def test_a_view_that_begins_anywhere_goes_on_in_the_same_way(lines: list[bytes], data: st.DataObject) -> None:
    whole, late = TaskView("t", None, 0), TaskView("t", None, 0)
    at = data.draw(st.integers(0, len(lines)))
    for line in lines[:at]:
        whole.take(decode_chunk(line))
        late.take(decode_chunk(line))
    late = late.going_on()
    for line in lines[at:]:
        assert whole.take(decode_chunk(line)) == late.take(decode_chunk(line))
    assert not late.artifacts()


def test_what_is_emitted_without_a_name_is_one_artifact_whatever_it_is() -> None:
    log = Writer()
    for kind, content in (("text", "one "), ("text", "two"), ("data", {"a": 1}), ("text", "three")):
        log.put(kind, content)
    view = TaskView("t", None, 0)
    events = [event for line in log.lines for event in view.take(decode_chunk(line))]
    parts = [a2a.Part(text="one two"), a2a.Part(data={"a": 1}), a2a.Part(text="three")]
    assert [each.parts for each in view.artifacts()] == [parts]
    assert merged(assembled(events)[1][OUTPUT]) == parts


@given(lines=logs(), data=st.data())
def test_who_joins_or_comes_back_anywhere_is_told_the_same_and_keeps_nothing(
    lines: list[bytes], data: st.DataObject
) -> None:
    chunks = list(map(decode_chunk, lines))
    at = data.draw(st.integers(0, len(lines)))
    upto = data.draw(st.integers(at, len(lines)))
    whole, shared = TaskView("t", "c", 0), TaskView("t", "c", 0)
    for chunk in chunks[:at]:
        whole.take(chunk)
    for chunk in chunks[:upto]:
        shared.take(chunk)
    joined_late = shared.going_on()
    come_back = shared.going_on(at)
    if at:
        come_back.take(chunks[at - 1])
    assert (come_back.seq, come_back.state, come_back.reply) == (whole.seq, whole.state, whole.reply)
    for n, chunk in enumerate(chunks[at:], at):
        told = whole.take(chunk)
        assert come_back.take(chunk) == told
        if n >= upto:
            assert joined_late.take(chunk) == told
            shared.take(chunk)
    assert shared.snapshot() == whole.snapshot()
    assert come_back.artifacts() == joined_late.artifacts() == []


@given(lines=logs())
def test_work_is_told_of_before_its_fruits_and_an_end_is_the_last_event(lines: list[bytes]) -> None:
    view = TaskView("t", "c", 0)
    state: str = "TASK_STATE_SUBMITTED"
    for line in lines:
        for event in view.take(decode_chunk(line)):
            assert state not in a2a.TERMINAL
            if event.artifact_update is not None:
                assert state == "TASK_STATE_WORKING"
            if event.status_update is not None:
                state = event.status_update.status.state
    assert state in a2a.TERMINAL


@given(lines=logs())
def test_reading_joined_text_changes_no_task_and_no_output(lines: list[bytes]) -> None:
    apart, together = TaskView("t", "c", 0), TaskView("t", "c", 0)
    for line in lines:
        apart.take(decode_chunk(line))
    joins = list(joined(split_lines(join_lines(lines))))
    for line in joins:
        together.take(decode_chunk(line))
    assert apart.artifacts() == together.artifacts()
    outputs = [fold(map(decode_chunk, each)).output() for each in (lines, joins)]
    assert outputs[0] == outputs[1]


def test_who_wants_only_the_events_keeps_nothing_of_what_they_say() -> None:
    log = Writer()
    for n in range(3):
        log.put("text", f"{n}")
        log.put("data", {"n": n})
    whole, light = TaskView("t", None, 0), TaskView("t", None, 0, keep=False)
    for line in log.lines:
        assert light.take(decode_chunk(line)) == whole.take(decode_chunk(line))
    assert len(whole.artifacts()[0].parts) == 6
    assert light.artifacts() == []


def test_states_of_the_end() -> None:
    for outcome, state in (
        (Outcome("completed"), "COMPLETED"),
        (Outcome("failed", code="x", message=""), "FAILED"),
        (Outcome("failed", code="rejected", message="no"), "REJECTED"),
        (Outcome("cancelled"), "CANCELED"),
    ):
        view = TaskView("t", "c", 0)
        view.take(final_chunk("t", 1, 0, outcome))
        assert view.state == f"TASK_STATE_{state}"


def test_a_task_that_was_canceled_before_it_began_never_worked() -> None:
    view = TaskView("t", "c", 0)
    [event] = view.take(final_chunk("t", 1, 0, Outcome("cancelled")))
    assert event.status_update is not None


def test_a_reply_is_a_message_and_nothing_else() -> None:
    answers: list[list[a2a.Part]] = [
        [a2a.Part(text="x")],
        [a2a.Part(text="x"), a2a.Part(data=None)],
        [a2a.Part(raw=b"\0")],
    ]
    for parts in answers:
        piece = reply_piece(parts, "m")
        log = Writer()
        log.put(piece.kind, piece.content, **piece.extra)
        view = TaskView("t", "c", 0)
        view.take(decode_chunk(log.lines[0]))
        assert view.reply == a2a.Message("m", "ROLE_AGENT", parts, context_id="c")
        assert fold([decode_chunk(log.lines[0])]).replied


def test_a_gap_is_said_and_remembered() -> None:
    view = TaskView("t", "c", 0)
    [begun, event] = view.take(Chunk("t", 9, "metadata", {"gap": {"from": 1, "to": 9}}, AT))
    assert begun.status_update is not None
    assert event.status_update is not None
    assert event.status_update.metadata == {"gap": {"from": 1, "to": 9}}
    assert view.gap


def test_a_message_is_an_input() -> None:
    def of(*parts: a2a.Part) -> Content:
        return content_of(a2a.Message("m", "ROLE_USER", list(parts)))

    assert of(a2a.Part(text="a"), a2a.Part(text="b")) == Content("text/plain", "a\nb")
    assert of(a2a.Part(data=[1])) == Content("application/json", [1])
    file = a2a.Part(raw=b"abc", filename="f.bin")
    assert of(a2a.Part(text="see"), file).content == "see\n[f.bin: application/octet-stream, 3 bytes]"
    assert of(a2a.Part(raw="ü".encode(), media_type="text/plain")).content == "ü"
    assert of(a2a.Part(url="https://x/y")).content == "[file: https://x/y]"


def test_what_a_part_is_made_of() -> None:
    assert part_of("x") == a2a.Part(text="x")
    assert part_of(b"x") == a2a.Part(raw=b"x", media_type="application/octet-stream")
    assert part_of({"a": 1}) == a2a.Part(data={"a": 1})
    several: list[Any] = ["x", b"x", {}]
    assert [media_type_of(part_of(each)) for each in several] == [
        "text/plain",
        "application/octet-stream",
        "application/json",
    ]


def test_history_has_the_originals_with_the_ids_of_task_and_context() -> None:
    original = a2a.encode(a2a.Message("mine", "ROLE_USER", [a2a.Part(text="x")], metadata={"k": 1}))
    lines = [Line("user", Content("text/plain", "x"), original), Line("agent", Content("application/json", [1]))]
    first, second = history_of("t", "c", lines)
    assert (first.message_id, first.metadata, first.task_id, first.context_id) == ("mine", {"k": 1}, "t", "c")
    assert (second.role, second.parts) == ("ROLE_AGENT", [a2a.Part(data=[1])])
