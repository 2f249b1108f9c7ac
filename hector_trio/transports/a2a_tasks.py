"""Tasks for A2A from what the store has: a row's state, its history, the Task from a row and the view of its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec.structs import replace

from hector_trio.a2a import types as a2a
from hector_trio.a2a.mapping import OUTPUT, Line, TaskSnapshot, context_of, history_of, question_message
from hector_trio.models import Content, encode, timestamp
from hector_trio.stores import State, Store
from hector_trio.task import StoredRequest, TaskRow

HISTORY: Final = 100
"""Messages of a task's history that are given when nobody says how many."""

MOST_HISTORY: Final = 1000

STATES: Final[Mapping[a2a.TaskState, tuple[State, ...]]] = {
    "TASK_STATE_SUBMITTED": (("pending", None),),
    "TASK_STATE_WORKING": (("running", None), ("pending", "answered")),
    "TASK_STATE_INPUT_REQUIRED": (("input_required", None),),
    "TASK_STATE_AUTH_REQUIRED": (("input_required", "auth"),),
    "TASK_STATE_COMPLETED": (("completed", None),),
    "TASK_STATE_FAILED": (("failed", None),),
    "TASK_STATE_REJECTED": (("failed", "rejected"),),
    "TASK_STATE_CANCELED": (("cancelled", None),),
}
"""What each state is in the store. A task that was answered by a bare message is none of them."""

_STATE_OF: Final[Mapping[State, a2a.TaskState]] = {
    ("completed", "reply"): "TASK_STATE_COMPLETED",
    **{each: state for state, several in STATES.items() for each in several},
}

_requests = msgspec.json.Decoder(StoredRequest).decode


def status_of(row: TaskRow) -> a2a.TaskStatus:
    """The status as the row has it."""
    message = None
    if row.status == "input_required" and row.question is not None:
        message = question_message(row.task_id, row.session_id, row.last_seq, row.question.question)
    elif row.status == "failed" and row.error is not None:
        said = row.error.message or "The task failed"
        message = question_message(row.task_id, row.session_id, row.last_seq, said)
    return a2a.TaskStatus(_STATE_OF[row.status, row.mark], message, timestamp(row.status_at))


def task_from_row(row: TaskRow, history: list[a2a.Message]) -> a2a.Task:
    """The Task without its artifacts."""
    return a2a.Task(
        row.task_id,
        status_of(row),
        context_id=context_of(row.task_id, row.session_id),
        history=history or None,
        metadata=row.metadata or None,
    )


def task_of(row: TaskRow, snapshot: TaskSnapshot, history: list[a2a.Message], *, artifacts: bool = False) -> a2a.Task:
    """The Task as it was. ``row`` is as new, or newer. ``artifacts``: they are there even if there are none."""
    task = snapshot.task
    status = task.status
    if snapshot.ended:
        status = replace(status, timestamp=timestamp(row.status_at))
    made = task.artifacts or []
    if snapshot.gap and row.output is not None:
        made = [_output(row.output)]  # all that is left of it
    return replace(
        task,
        status=status,
        artifacts=made if artifacts else made or None,
        history=history or None,
        metadata=row.metadata or None,
    )


def _output(output: Content) -> a2a.Artifact:
    text = output.type == "text/plain" and isinstance(output.content, str)
    return a2a.Artifact(OUTPUT, [a2a.Part(text=output.content) if text else a2a.Part(data=output.content)])


async def history(store: Store, row: TaskRow, length: int | None) -> list[a2a.Message]:
    """The last ``length`` messages of a task (3.2.4), without what it asks now and without its output.

    What a task outside a session was asked is all that is known of it.
    """
    if length == 0:
        return []
    wanted = min(HISTORY if length is None else length, MOST_HISTORY)
    rows = await store.task_messages(row.key, limit=wanted + 2)
    lines = [Line(each.role, Content(each.type, each.content), each.original) for each in rows]
    question = row.question if row.status == "pending" else None
    answer = None if question is None else question.answer
    if rows and rows[-1].role == "agent" and answer is None:
        lines.pop()  # in any state: the task may have ended since its row was read
    if not rows:  # it has not begun, or is in no session
        asked = _requests(row.request)
        lines = [Line("user", asked.input, None if asked.message is None else encode(asked.message))]
    if question is not None and answer is not None:
        lines.append(Line("user", answer, None if question.message is None else encode(question.message)))
    return history_of(row.task_id, row.session_id, lines)[-wanted:]
