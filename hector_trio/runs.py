"""One run: what is known of a task while it is queued or running here, and how it ends."""

from __future__ import annotations

from typing import Final

import msgspec
import structlog
import trio

from hector_trio.agents import Agent
from hector_trio.errors import HectorError, RunError
from hector_trio.log import TaskLog
from hector_trio.models import Content, TaskRequest
from hector_trio.session import MessageRow
from hector_trio.stores import Change
from hector_trio.task import Outcome, TaskRow
from hector_trio.turns import Turn

CLIENT_LEFT: Final = Outcome("cancelled", reason="client_left")
INTERRUPTED: Final = Outcome(
    "failed", code="interrupted", message="The server stopped before the task ended", retryable=True
)
STORE_REFUSED: Final = Outcome(
    "failed", code="store_unavailable", message="The store refused a part of the task's log", retryable=True
)
SESSION_DELETED: Final = Outcome("cancelled", reason="session_deleted")
SUPERSEDED: Final = Outcome("cancelled", reason="interrupted_by_newer_task")

log = structlog.stdlib.get_logger("hector_trio.engine")


class Run:
    """One accepted task while it is queued or running here."""

    def __init__(
        self, row: TaskRow, request: TaskRequest, agent: Agent, log: TaskLog, turn: Turn | None, *, connected: bool
    ) -> None:
        self.row = row
        self.request = request
        self.agent = agent
        self.log = log
        self.turn = turn
        self.scope = trio.CancelScope()
        self.connected = connected
        """Whether it lives in the nursery of the connection that started it."""
        self.begun = False
        """Whether it has its turn and a slot, and no longer counts as waiting."""
        self.stopped: Outcome | None = None
        self.stopped_at = 0.0
        self.parked = False
        """The run ends without a final chunk: the task stays ``pending`` for the next start."""
        self.ended = trio.Event()

    def stop(self, outcome: Outcome) -> None:
        """Ends the run as ``outcome``; the first to decide wins. Idempotent, at any time."""
        if self.stopped is None and not self.parked:
            self.stopped = outcome
            self.stopped_at = trio.current_time()
            self.scope.cancel()

    def park(self) -> None:
        """Leaves a task that has not begun to the next start, unless it was already decided how it ends."""
        if self.stopped is None:
            self.parked = True
            self.scope.cancel()


def last_change(row: TaskRow, outcome: Outcome, output: Content | None, now: int) -> tuple[Change, MessageRow | None]:
    """How an ended task changes its row, and the line that its answer adds to the session's conversation.

    A partial answer stays in the conversation, marked with how its task ended.
    """
    change = Change(outcome.status, output=output, error=outcome.error(), ended_at=now)
    if row.session_id is None or output is None:
        return change, None
    return change, MessageRow(
        role="agent",
        type=output.type,
        content=output.content,
        agent_id=row.agent_id,
        task_id=row.task_id,
        created_at=now,
        partial_status=None if outcome.status == "completed" else outcome.status,
    )


def failure(error: BaseException) -> Outcome:
    """How a run fails whose agent raised. What an unexpected error says stays in the log."""
    found = _first(error)
    if isinstance(found, RunError):
        outcome = Outcome(
            "failed", code=found.run_code, message=found.detail, details=found.details, retryable=found.can_retry
        )
        if _is_wire(outcome):
            return outcome
        log.error("agent_failed", exc_info=error)
        return Outcome("failed", code="agent_error", message="The agent failed")
    if isinstance(found, HectorError):
        return Outcome("failed", code=found.code, message=found.detail, retryable=found.retryable)
    log.error("agent_failed", exc_info=error)
    return Outcome("failed", code="agent_error", message="The agent failed")


def _first(error: BaseException) -> BaseException:
    """The error itself, or of a group the first that was raised on purpose."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first(each) for each in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, HectorError)), leaves[0])


def _is_wire(outcome: Outcome) -> bool:
    """Whether what an agent raised can stand in a final chunk and in the row."""
    try:
        msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True
