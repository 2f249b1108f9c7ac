"""One run: what is known of a task while it is queued or running here, and how it ends."""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec
import structlog
import trio

from hector_trio.agents import Agent
from hector_trio.errors import HectorError, RunError
from hector_trio.log import TaskLog
from hector_trio.models import TaskRequest
from hector_trio.session import MessageRow
from hector_trio.stores import Change
from hector_trio.task import REJECTED, Fold, Mark, Outcome, Question, TaskRow, grace_of
from hector_trio.turns import Turn

CLIENT_LEFT: Final = Outcome("cancelled", reason="client_left")
INTERRUPTED: Final = Outcome(
    "failed", code="interrupted", message="The server stopped before the task ended", retryable=True
)
TIMED_OUT: Final = Outcome("failed", code="timeout", message="The task did not end within its time", retryable=True)
STORE_REFUSED: Final = Outcome(
    "failed", code="store_unavailable", message="The store refused a part of the task's log", retryable=True
)
INPUT_EXPIRED: Final = Outcome("failed", code="input_timeout", message="Nobody answered within the time for it")
SESSION_DELETED: Final = Outcome("cancelled", reason="session_deleted")
SUPERSEDED: Final = Outcome("cancelled", reason="interrupted_by_newer_task")

log = structlog.stdlib.get_logger("hector_trio.engine")


class Run:
    """One accepted task while it is queued or running here."""

    __slots__ = (
        "_grace",
        "_left_at",
        "_over",
        "agent",
        "asked",
        "begun",
        "deadline",
        "ending",
        "log",
        "nursery",
        "over",
        "parked",
        "request",
        "row",
        "scope",
        "stopped",
        "stopped_at",
        "taken_up",
        "task",
        "turn",
    )

    def __init__(
        self,
        row: TaskRow,
        log: TaskLog,
        turn: Turn | None = None,
        *,
        request: TaskRequest | None = None,
        agent: Agent | None = None,
        nursery: trio.Nursery | None = None,
        timeout: float = math.inf,
    ) -> None:
        self.row = row
        self.request = request
        self.agent = agent
        self.log = log
        self.turn = turn
        self.nursery = nursery
        """That of the connection which started it, if it is to end with that; else it lives in the engine's."""
        self.deadline = trio.current_time() + timeout
        self.scope = trio.CancelScope(deadline=self.deadline)
        self.begun = False
        """Whether it has its turn and a slot, and no longer counts as waiting."""
        self.taken_up = False
        """Whether its agent has been called, who sees to what is to be ended with it."""
        self.stopped: Outcome | None = None
        self.stopped_at = 0.0
        self.asked: Question | None = None
        """Set by the agent: the run ends here, and the task waits for input, unless it was decided how it ends."""
        self.parked = False
        """The run ends without a final chunk: the task stays ``pending`` for the next start."""
        self.task: trio.lowlevel.Task | None = None
        """Trio's, once it has started."""
        self.ending = False
        """Whether nothing is left but its final chunk, or its question."""
        self.over = False
        """Whether it has ended, or would have if the store took its final chunk."""
        self._over: trio.Event | None = None
        self._grace = grace_of(row.policy)
        self._left_at = math.inf

    @property
    def state(self) -> Literal["queued", "running", "finishing"]:
        """``finishing``: it was cancelled, in whatever way, or nothing is left but its final chunk."""
        if self.ending or self.scope.cancel_called:
            return "finishing"
        return "running" if self.begun else "queued"

    def end(self) -> None:
        self.over = True
        if self._over is not None:
            self._over.set()

    async def wait_over(self) -> None:
        if self._over is None:
            self._over = trio.Event()
            if self.over:
                self._over.set()
        await self._over.wait()

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

    def ask(self, question: Question) -> None:
        """Ends the run with a question, unless it was already decided how it ends."""
        self.asked = question
        self.scope.cancel()

    def watch(self, viewers: int, *, at_least: float = 0.0) -> None:
        """Viewers have come or gone: of a task with a grace, the time (seconds) without any is limited."""
        if self._grace is not None and not self.scope.cancel_called:
            if viewers:
                self._left_at = math.inf
            elif self._left_at == math.inf:  # else it runs already: whoever came or went was no viewer
                self._left_at = trio.current_time() + max(self._grace, at_least)
            self.scope.deadline = min(self.deadline, self._left_at)

    def detach(self) -> None:
        """The connection that started it no longer takes it along when it ends: only ``stop`` and the run's own
        deadline do. It stays in that connection's nursery, which so ends after it."""
        self.row = msgspec.structs.replace(self.row, policy="continue")
        self.scope.shield = True
        self.nursery = None
        self._grace = None
        self._left_at = math.inf
        if not self.scope.cancel_called:
            self.scope.deadline = self.deadline

    def left(self) -> Outcome:
        """How it ends when the nursery ends in which it lives."""
        if self.log.failure is not None:
            return STORE_REFUSED
        return CLIENT_LEFT if self.nursery is not None else INTERRUPTED

    def cut(self) -> Outcome:
        """How it ends when its scope was cancelled and nobody decided: its store refused, or a time is over."""
        if self.log.failure is not None:
            return STORE_REFUSED
        if self._left_at < self.deadline:
            return CLIENT_LEFT
        return TIMED_OUT


class Parked:
    """A task that waits for input: no run, no slot, no turn, no Trio task."""

    def __init__(self, row: TaskRow, nursery: trio.Nursery | None, expires_at: float) -> None:
        self.row = msgspec.structs.replace(row, request=b"", metadata={}, output=None, question=None)
        """Without what clients can make large: there may be many."""
        self.nursery = nursery
        self.expires_at = expires_at
        self.answering = False
        """Whether an answer is being accepted."""
        self.stopped: Outcome | None = None
        """How it is to end, decided meanwhile."""
        self.timer = math.inf
        """When somebody looks after it."""
        self._grace = grace_of(row.policy)
        self._left_at = math.inf

    @property
    def deadline(self) -> float:
        return min(self.expires_at, self._left_at)

    def watch(self, viewers: int) -> None:
        """As of a run."""
        if self._grace is not None:
            if viewers:
                self._left_at = math.inf
            elif self._left_at == math.inf:
                self._left_at = trio.current_time() + self._grace

    def detach(self) -> None:
        self.row = msgspec.structs.replace(self.row, policy="continue")
        self.nursery = self._grace = None
        self._left_at = math.inf

    def cut(self) -> Outcome:
        return CLIENT_LEFT if self._left_at < self.expires_at else INPUT_EXPIRED


def last_change(row: TaskRow, outcome: Outcome, fold: Fold, now: int) -> tuple[Change, MessageRow | None]:
    """How an ended task changes its row, and the line that its answer adds to the session's conversation.

    A partial answer stays in the conversation, marked with how its task ended.
    """
    output = fold.output()
    mark: Mark | None = None
    if outcome.status == "completed" and fold.replied:
        mark = "reply"
    elif outcome.status == "failed" and outcome.code == REJECTED:
        mark = "rejected"
    change = Change(outcome.status, output=output, error=outcome.error(), ended_at=now, mark=mark)
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
