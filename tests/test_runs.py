"""How a run ends: the first decision wins, an error becomes an outcome, an outcome changes the row and the session."""

from __future__ import annotations

import msgspec
import pytest

from hector_trio.agents import AgentInfo
from hector_trio.agents.function import FunctionAgent
from hector_trio.errors import InvalidRequest, RunError
from hector_trio.log import LogWriter, TaskLog
from hector_trio.models import Content, TaskRequest
from hector_trio.runs import INTERRUPTED, SESSION_DELETED, Run, failure, last_change
from hector_trio.stores.memory import open_memory
from hector_trio.task import Fold, Outcome, TaskRow

ROW = TaskRow(1, "o", "a", "t", "running", b"{}", "", "cancel", "i", {}, 0, session_id="s")


def folded(text: str) -> Fold:
    fold = Fold()
    fold.add("text", text)
    return fold


async def a_run() -> Run:
    async with open_memory("i") as store:
        log = TaskLog(ROW, LogWriter(store), max_uncommitted=1, max_chunk=1, max_log=1, tail_bytes=1)
    agent = FunctionAgent(AgentInfo("a", "a"), lambda ctx: None)
    return Run(ROW, log, request=TaskRequest(Content()), agent=agent)


async def test_the_first_to_stop_a_run_decides_how_it_ends() -> None:
    run = await a_run()
    run.stop(SESSION_DELETED)
    run.stop(INTERRUPTED)
    assert run.stopped is SESSION_DELETED
    assert run.scope.cancel_called


async def test_a_parked_run_cannot_be_stopped_any_more() -> None:
    run = await a_run()
    run.park()
    run.stop(INTERRUPTED)
    assert run.stopped is None


async def test_a_cancelled_task_is_not_left_to_the_next_start() -> None:
    run = await a_run()
    run.stop(SESSION_DELETED)
    run.park()
    assert not run.parked


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("sold_out", "Nothing left"), "sold_out"),
        (InvalidRequest("no"), "invalid_request"),
        (ExceptionGroup("", [ValueError("x"), ExceptionGroup("", [RunError("sold_out", "Nothing left")])]), "sold_out"),
        (ValueError("secret"), "agent_error"),
        (ExceptionGroup("", [ValueError("secret")]), "agent_error"),
    ],
)
def test_what_was_raised_on_purpose_is_told_and_nothing_else(error: Exception, code: str) -> None:
    outcome = failure(error)
    assert (outcome.status, outcome.code) == ("failed", code)
    assert "secret" not in outcome.message


@pytest.mark.parametrize(
    ("outcome", "partial"),
    [(Outcome("completed"), None), (Outcome("cancelled"), "cancelled"), (INTERRUPTED, "failed")],
)
def test_an_answer_joins_the_conversation_marked_when_it_was_cut(outcome: Outcome, partial: str | None) -> None:
    change, message = last_change(ROW, outcome, folded("half"), 5)
    assert (change.status, change.ended_at) == (outcome.status, 5)
    assert message is not None
    assert (message.content, message.partial_status) == ("half", partial)


def test_without_a_session_or_an_answer_nothing_joins_a_conversation() -> None:
    assert last_change(ROW, Outcome("completed"), Fold(), 5)[1] is None
    alone = msgspec.structs.replace(ROW, session_id=None)
    assert last_change(alone, Outcome("completed"), folded("x"), 5)[1] is None


def test_what_a_status_does_not_say_is_marked() -> None:
    replied = folded("x")
    replied.replied = True
    for outcome, fold, mark in (
        (Outcome("completed"), replied, "reply"),
        (Outcome("cancelled"), replied, None),
        (Outcome("failed", code="rejected"), folded("x"), "rejected"),
        (Outcome("failed", code="other"), folded("x"), None),
    ):
        assert last_change(ROW, outcome, fold, 5)[0].mark == mark
