"""What is passed on of a task elsewhere: everything once, through any mixture of events and snapshots."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.a2a.relay import Ask, Done, Failed, Relay, Say, Tell
from hector_trio.a2a.types import (
    Artifact,
    Message,
    Part,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)


def update(text: str, artifact_id: str = "A", *, append: bool = True, last: bool = False) -> StreamResponse:
    artifact = Artifact(artifact_id, [Part(text=text)], name="n")
    return StreamResponse(artifact_update=TaskArtifactUpdateEvent("T", "C", artifact, append=append, last_chunk=last))


def status(state: TaskState, *parts: Part, message_id: str = "m") -> StreamResponse:
    message = Message(message_id, "ROLE_AGENT", list(parts)) if parts else None
    return StreamResponse(status_update=TaskStatusUpdateEvent("T", "C", TaskStatus(state, message=message)))


def snapshot(*artifacts: Artifact, state: TaskState = "TASK_STATE_WORKING") -> StreamResponse:
    return StreamResponse(task=Task("T", TaskStatus(state), context_id="C", artifacts=list(artifacts) or None))


def texts(steps: list[Any]) -> str:
    return "".join(step.part.text or "" for step in steps if isinstance(step, Say))


def test_a_task_is_passed_on_as_it_comes() -> None:
    relay = Relay()
    assert relay.take(snapshot(state="TASK_STATE_SUBMITTED")) == []
    assert (relay.task_id, relay.context_id) == ("T", "C")
    (first,) = relay.take(update("one", append=False))
    assert isinstance(first, Say)
    assert (first.part, first.append, first.last) == (Part(text="one"), False, False)
    assert first.artifact is not None
    assert (first.artifact.artifact_id, first.artifact.name, first.artifact.parts) == ("A", "n", [])
    (second,) = relay.take(update("two", last=True))
    assert isinstance(second, Say)
    assert (second.append, second.last) == (True, True)
    assert relay.take(status("TASK_STATE_COMPLETED")) == [Done()]


def test_what_is_appended_to_nothing_begins() -> None:
    (step,) = Relay().take(update("x", append=True))
    assert isinstance(step, Say)
    assert not step.append


def test_an_artifact_that_is_replaced_is_said_again() -> None:
    relay = Relay()
    relay.take(update("one", append=False))
    (step,) = relay.take(update("new", append=False))
    assert isinstance(step, Say)
    assert not step.append
    assert texts(relay.take(snapshot(Artifact("A", [Part(text="newer")])))) == "er"


def test_a_snapshot_says_only_what_was_not_said() -> None:
    relay = Relay()
    relay.take(update("one ", append=False))
    whole = Artifact("A", [Part(text="one tw"), Part(text="o"), Part(raw=b"x"), Part(text="!")])
    steps = relay.take(snapshot(whole, Artifact("B", [Part(data=None)])))
    assert [(step.part, step.append) for step in steps if isinstance(step, Say)] == [
        (Part(text="tw"), True),
        (Part(text="o"), True),
        (Part(raw=b"x"), True),
        (Part(text="!"), True),
        (Part(data=None), False),
    ]
    assert relay.take(snapshot(whole, Artifact("B", [Part(data=None)]))) == []


def test_a_snapshot_that_lacks_what_was_said_says_nothing() -> None:
    relay = Relay()
    relay.take(update("one two", append=False))
    assert relay.take(snapshot(Artifact("A", [Part(text="one")]))) == []


def test_a_message_is_the_whole_answer() -> None:
    message = Message("m", "ROLE_AGENT", [Part(text="a"), Part(data=1)], context_id="C")
    relay = Relay()
    assert relay.take(StreamResponse(message=message)) == [Say(Part(text="a")), Say(Part(data=1)), Done()]
    assert (relay.task_id, relay.context_id) == (None, "C")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([Part(text="a"), Part(text="b")], "a\nb"),
        ([Part(data={"x": 1})], {"x": 1}),
        ([Part(text="a"), Part(data=1)], [{"text": "a"}, {"data": 1}]),
    ],
)
def test_a_status_tells_how_the_work_goes_on_once(parts: list[Part], told: Any) -> None:
    relay = Relay()
    assert relay.take(status("TASK_STATE_WORKING", *parts)) == [Tell(told)]
    assert relay.take(status("TASK_STATE_WORKING", *parts)) == []
    assert relay.take(status("TASK_STATE_WORKING", *parts, message_id="m2")) == [Tell(told)]


def test_questions_and_permissions_are_asked() -> None:
    relay = Relay()
    asked = status("TASK_STATE_INPUT_REQUIRED", Part(text="Which?"))
    assert relay.take(asked) == [Ask("Which?", auth=False)]
    assert relay.take(asked) == [Ask("Which?", auth=False)]  # also when it is asked again after a cut
    assert relay.take(status("TASK_STATE_AUTH_REQUIRED")) == [Ask("The agent needs a permission", auth=True)]
    assert relay.take(status("TASK_STATE_INPUT_REQUIRED")) == [Ask("The agent needs input", auth=False)]


@pytest.mark.parametrize(
    ("state", "code", "usual"),
    [
        ("TASK_STATE_FAILED", "remote_failed", "The agent's task failed"),
        ("TASK_STATE_REJECTED", "rejected", "The agent has rejected the task"),
        ("TASK_STATE_CANCELED", "remote_canceled", "The task was canceled at the agent"),
    ],
)
def test_other_ends_are_failures_with_their_reason(state: TaskState, code: str, usual: str) -> None:
    assert Relay().take(status(state)) == [Failed(code, usual, None)]
    assert Relay().take(status(state, Part(text="why"))) == [Failed(code, "why", None)]
    assert Relay().take(status(state, Part(data={"n": 1}))) == [Failed(code, usual, {"n": 1})]


def test_last_words_are_the_answer_only_where_there_is_no_other() -> None:
    done = status("TASK_STATE_COMPLETED", Part(text="42"))
    assert Relay().take(done) == [Say(Part(text="42")), Done()]
    relay = Relay()
    relay.take(update("41"))
    assert relay.take(done) == [Tell("42"), Done()]


def test_it_can_be_kept_and_read_again() -> None:
    relay = Relay()
    relay.take(update("one"))
    relay.take(status("TASK_STATE_INPUT_REQUIRED", Part(text="?")))
    kept = msgspec.json.decode(msgspec.json.encode(relay))
    again = msgspec.convert(kept, Relay)
    assert again == relay
    assert kept["taskId"] == "T"
    assert texts(again.take(snapshot(Artifact("A", [Part(text="one, two")])))) == ", two"


@given(st.lists(st.tuples(st.sampled_from("AB"), st.text(max_size=3), st.sampled_from(["event", "miss", "snapshot"]))))
def test_through_any_cuts_every_artifact_arrives_whole_and_once(happened: list[tuple[str, str, str]]) -> None:
    """Events are had or missed; each snapshot, and one at the end, makes up for what was missed before it."""
    relay = Relay()
    truth: dict[str, list[Part]] = {}
    got: dict[str, str] = {"A": "", "B": ""}
    behind = False

    def take(response: StreamResponse) -> None:
        for step in relay.take(response):
            assert isinstance(step, Say)
            assert step.artifact is not None
            got[step.artifact.artifact_id] += step.part.text or ""

    for name, text, how in happened:
        known = name in truth
        truth.setdefault(name, []).append(Part(text=text))
        if how == "event" and not behind:
            take(update(text, name, append=known))
        else:
            behind = True
        if how == "snapshot":
            take(snapshot(*(Artifact(each, list(parts)) for each, parts in truth.items())))
            behind = False
    take(snapshot(*(Artifact(each, list(parts)) for each, parts in truth.items())))
    assert got == {name: "".join(part.text or "" for part in truth.get(name, [])) for name in got}
