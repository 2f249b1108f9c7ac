"""What must hold whatever happens: of every log as it is written, of every reader, of every end, and when all is over.

The numbers in brackets are the rules of the design: one final chunk, what was acknowledged is not lost, nobody is
delayed by another, nothing outlives its nursery. A broken promise is noted, because it may be seen deep inside the
application, whose boundaries would take an exception for their own; the schedule raises it after the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import trio
from msgspec import UNSET

from hector_trio.agents import Context
from hector_trio.models import Chunk
from hector_trio.stores import Append
from hector_trio.task import ENDED, NEXT, Fold, TaskRow, decode_chunk, fold, grace_of, split_lines
from tests.simulation.agent import Plan, plan_of
from tests.simulation.channel import Link
from tests.simulation.store import Disk, Weather

if TYPE_CHECKING:
    from collections.abc import Iterable


EPOCH_NS: Final = 1_900_000_000 * 10**9
"""Where the clock on the wall stands when a simulation begins."""


def virtual_time(ms: int) -> float:
    """A time of a row on Trio's clock."""
    return (ms * 1_000_000 - EPOCH_NS) / 1e9


class BrokenPromise(AssertionError):
    """What was seen that must never be seen."""


@dataclass
class Submission:
    """A task request as clients have sent it; sent again, or its questions answered, it has several links."""

    agent_id: str
    task_id: str
    plan: Plan
    session_id: str | None
    policy: str
    """``cancel``, ``continue`` or ``grace:<ms>``."""
    multitask: str | None
    timeout: float
    links: list[Link] = field(default_factory=list)
    answers: set[str] = field(default_factory=set)
    """What was sent as input."""
    posted: bool = False
    """Whether some request for it, or for its next run, may end with the question itself."""
    may_pause: bool = False


@dataclass
class Known:
    """A task that has reached the disk, and its log as it was committed."""

    key: int
    original_id: str
    row: TaskRow
    plan: Plan
    created_at: float
    rests: list[bytes] = field(default_factory=list)
    """The encoded chunks from their number on: what stays the same when the task is renamed."""
    chunks: list[Chunk] = field(default_factory=list)
    fold: Fold = field(default_factory=Fold)
    final: Chunk | None = None
    status: str = "pending"
    begun: bool = False
    seen: int = 0
    """The last chunk that anybody has received."""
    policy: str = ""
    detached: bool = False
    """Whether a client was told that ``cancel`` has become ``continue``."""
    started_at: float = 0.0
    """When its last run was accepted."""
    asked_at: float | None = None
    ended_at: float | None = None
    questions: int = 0
    answers: int = 0


def rest_of(line: bytes) -> bytes:
    return line[line.index(b'"seq":') :]


def stem_of(task_id: str) -> str:
    """The name under which a task was accepted that has been renamed since."""
    return task_id.partition("~")[0]


class Ledger:
    """Everything that ever reached the disk, and what the clients did: so it can say whether an end was deserved."""

    def __init__(self, weather: Weather) -> None:
        self.disk = Disk(self)
        self.tasks: dict[int, Known] = {}
        self.submissions: dict[int, Submission] = {}
        self.cancelled: set[str] = set()
        """Ids that somebody has asked to cancel."""
        self.removed_tasks: set[str] = set()
        self.removed_sessions: set[str] = set()
        """What somebody has asked to remove."""
        self.interrupts: set[str] = set()
        """Sessions in which somebody has asked to interrupt."""
        self.ending = False
        """Whether the process is being stopped or killed."""
        self._last_end = -1.0
        self.running: dict[tuple[str, str], int] = {}
        self.readers: list[Reader] = []
        """All that ever were."""
        self.attaching: dict[tuple[str, str], float] = {}
        """When an attach that was not answered yet may last have watched a task; ``inf`` while it may."""
        self.process_began = 0.0
        self.input_timeout = 0.0
        self.log_retention: float | None = None
        self.broken: list[str] = []
        self._weather = weather
        self._by_id: dict[tuple[str, str], list[int]] = {}

    def note(self, text: str) -> None:
        self.broken.append(f"at {trio.current_time():.3f}: {text}")

    # --- told by the disk

    def created(self, row: TaskRow) -> None:
        known = Known(row.key, row.task_id, row, plan_of(row), trio.current_time())
        known.policy, known.started_at = row.policy, known.created_at
        if row.policy != self.submissions[known.plan.nonce].policy:
            self.note(f"task {row.task_id!r} has the policy {row.policy}")
        self.tasks[row.key] = known
        self._by_id.setdefault((row.agent_id, row.task_id), []).append(row.key)

    def policy_set(self, key: int, policy: str) -> None:
        self.tasks[key].policy = policy

    def appended(self, append: Append, refused: bool, row: TaskRow | None) -> None:
        known = self.tasks[append.key]
        if refused:
            self._refused(known, append, row)
            return
        assert row is not None
        lines = split_lines(append.data)
        name = f"task {known.original_id!r}"
        if append.first_seq != len(known.rests) + 1 or append.last_seq != len(known.rests) + len(lines):
            self.note(f"{name}: {len(lines)} chunks as {append.first_seq}..{append.last_seq} behind {len(known.rests)}")
            return
        for line in lines:
            chunk = decode_chunk(line)
            known.rests.append(rest_of(line))
            known.chunks.append(chunk)
            if known.final is not None:
                self.note(f"{name}: chunk {chunk.seq} behind the final one")
            if chunk.seq != len(known.rests) or chunk.task_id != known.original_id:
                self.note(f"{name}: chunk {len(known.rests)} says {chunk.task_id!r} {chunk.seq}")
            known.fold.take(chunk)
            if chunk.final:
                known.final = chunk
                self._judge(known, chunk)
        if append.change is not None:
            known.ended_at = None if append.change.ended_at is None else virtual_time(append.change.ended_at)
            status = append.change.status
            passed = NEXT[known.status] | (NEXT["running"] if known.status == "pending" else frozenset())
            if status != known.status and status not in passed:  # one commit may carry two changes
                self.note(f"{name}: {status} after {known.status}")
            if status == "input_required":
                known.questions += 1
                question = append.change.question
                assert question is not None
                known.begun, known.asked_at = False, virtual_time(question.asked_at)
            elif known.status == "input_required" and status == "pending":
                known.answers += 1
                known.started_at = trio.current_time()
            known.status = status
        if (known.status in ENDED) != (known.final is not None):
            self.note(f"{name}: is {known.status}, final chunk: {known.final}")
        self._compare(known, row)

    def _refused(self, known: Known, append: Append, row: TaskRow | None) -> None:
        if row is None and not self.may_be_gone(known):
            self.note(f"task {known.original_id!r} is gone, and nobody has removed it")
        if row is not None and row.instance == append.instance:
            self.note(f"an append {append.first_seq}..{append.last_seq} to task {known.original_id!r} was refused")

    def _compare(self, known: Known, row: TaskRow) -> None:
        """The row is the fold of the log."""
        name = f"task {known.original_id!r}"
        if row.last_seq != len(known.rests) or row.status != known.status:
            self.note(f"{name}: the row says {row.status} {row.last_seq}, the log {known.status} {len(known.rests)}")
        if known.final is not None:
            if row.status != known.fold.status or row.output != known.fold.output():
                self.note(f"{name}: {row.status} {row.output}, folded {known.fold.status} {known.fold.output()}")
            if (row.error is None) != (known.fold.error is None) or (
                row.error is not None and known.fold.error is not None and row.error.code != known.fold.error.code
            ):
                self.note(f"{name}: error {row.error}, folded {known.fold.error}")
            if row.ended_at is None:
                self.note(f"{name} has ended at no time")

    def may_be_pruned(self, known: Known) -> bool:
        retention = self.log_retention
        ended_at = known.ended_at
        return retention is not None and ended_at is not None and trio.current_time() >= ended_at + retention

    def may_be_gone(self, known: Known) -> bool:
        return known.row.session_id in self.removed_sessions or known.original_id in self.removed_tasks

    # --- how a task may end

    def _judge(self, known: Known, final: Chunk) -> None:
        submission = self.submissions[known.plan.nonce]
        verdict = self._wrong(known, final, submission)
        if verdict is not None:
            self.note(f"task {known.original_id!r} ended as {final.status} {final.reason} {final.code}: {verdict}")

    def _wrong(self, known: Known, final: Chunk, submission: Submission) -> str | None:
        plan, now = known.plan, trio.current_time()
        emitted = [(chunk.chunk_type, chunk.content) for chunk in known.chunks[:-1]]
        expected = plan.expected()
        whole = joined(emitted) == expected
        if not begins(expected, joined(emitted)):
            return f"it emitted {joined(emitted)}, which is not in its plan {expected}"
        match final.status, final.reason, final.code:
            case "completed", _, _:
                if not whole or plan.fails() or any(step.kind == "for ever" for step in plan.steps):
                    return f"it emitted {joined(emitted)} of {expected}"
            case "cancelled", "client_left", _:
                if known.policy == "continue" and (known.row.policy == "continue" or known.detached):
                    return "its policy is continue"
                if known.policy == "cancel" and not any(link.ending for link in submission.links):
                    return "nobody has left"
                if known.policy.startswith("grace"):
                    return self._too_early(known)
            case "cancelled", "session_deleted", _:
                if submission.session_id not in self.removed_sessions:
                    return "its session is still there"
            case "cancelled", "interrupted_by_newer_task", _:
                if submission.session_id not in self.interrupts:
                    return "nobody has interrupted"
            case "cancelled", _, _:
                if known.original_id not in self.cancelled:
                    return "nobody has cancelled it"
            case "failed", _, "interrupted":
                if self.last_end_of_a_process < known.created_at:
                    return "no process has ended"
            case "failed", _, "store_unavailable":
                if max(self._weather.calm_since, self.last_end_of_a_process) < known.created_at:
                    return "the store has refused nothing"
            case "failed", _, "timeout":
                if now < known.started_at + submission.timeout - 0.001:
                    return f"its {submission.timeout} s are not over"
            case "failed", _, "input_timeout":
                if known.asked_at is None or now < known.asked_at + self.input_timeout - 0.01:
                    return f"the {self.input_timeout} s for its input are not over"
            case "failed", _, "too_many_waiting":
                if not plan.asks:
                    return "it asks nothing"
            case "failed", _, "session_ended":
                if submission.session_id not in self.removed_sessions:
                    return "its session is still there"
            case "failed", _, code:
                lost = self._weather.calm_since >= known.created_at
                if code != plan.fails() or not (whole or lost):
                    return f"planned: {plan.fails()} after {expected}"
        return None

    def _too_early(self, known: Known) -> str | None:
        """Whether there never was a time as long as the grace without anybody who watched."""
        grace, now = grace_of(known.policy) or 0.0, trio.current_time()
        watched = sorted(
            (reader.seen_at, now if reader.gone_at is None else reader.gone_at)
            for reader in self.readers
            if reader.keys == {known.key} and reader.seen_at is not None
        )
        until = max(known.created_at, self.process_began)
        for since, gone in [*watched, (now, now)]:
            if since >= until + grace - 0.001:
                return None
            until = max(until, gone)
        return f"it has a grace of {grace} s and was watched until {until:.3f}"

    def unwatched_since(self, known: Known) -> float | None:
        """Since when certainly nobody watches; ``None``: somebody may."""
        since = max(known.created_at, self.process_began)
        since = max(since, self.attaching.get((known.row.agent_id, known.original_id), since))
        for reader in self.readers:
            if known.key in (reader.keys or self.candidates(reader.agent_id, reader.task_id)):
                if reader.gone_at is None:
                    return None
                since = max(since, reader.gone_at)
        for link in self.submissions[known.plan.nonce].links:
            if link.left_at is None:
                return None
            since = max(since, link.left_at)
        return since

    # --- told by agents

    def began(self, ctx: Context, plan: Plan) -> None:
        known = next(
            (each for each in map(self.tasks.__getitem__, self._by_id[ctx.agent_id, ctx.task_id])
             if each.plan.nonce == plan.nonce and each.final is None), None
        )  # fmt: skip
        if known is None:
            self.note(f"task {ctx.task_id!r} runs and has ended, or was never accepted")
            return
        if known.begun:
            self.note(f"task {ctx.task_id!r} runs a second time")
        known.begun = True
        if ctx.session_id is None:
            return
        session = (ctx.agent_id, ctx.session_id)
        if session in self.running:
            self.note(f"task {ctx.task_id!r} runs while {self.running[session]} runs in the same session")
        self.running[session] = plan.nonce
        if ctx.resume is None and self.submissions[plan.nonce].multitask in (None, "enqueue"):
            for other in self.tasks.values():
                if (
                    other.row.session_id == ctx.session_id
                    and other.key < known.key
                    and not (other.begun or other.final or other.questions or self.may_be_gone(other))
                    and self.submissions[other.plan.nonce].multitask in (None, "enqueue")
                ):
                    self.note(f"task {ctx.task_id!r} runs before {other.original_id!r}, which came first")

    def resumed(self, ctx: Context, plan: Plan) -> None:
        resume = ctx.resume
        assert resume is not None
        if (
            resume.question != plan.question(resume.saved)
            or resume.answer not in self.submissions[plan.nonce].answers
            or plan.steps[resume.saved].kind != "ask"
        ):
            self.note(f"task {ctx.task_id!r} goes on with {resume}")

    @property
    def last_end_of_a_process(self) -> float:
        """When a process last crashed or stopped; now while it does; -1: never."""
        return trio.current_time() if self.ending else self._last_end

    def process_gone(self) -> None:
        """What had begun without a trace of it on the disk begins anew."""
        self.running.clear()
        self._last_end = trio.current_time()
        self.ending = False
        for known in self.tasks.values():
            known.begun = known.begun and known.status != "pending"
        for reader in self.readers:
            reader.gone()

    def ended(self, ctx: Context, plan: Plan) -> None:
        if ctx.session_id is not None:
            self.running.pop((ctx.agent_id, ctx.session_id), None)

    def waited(self, plan: Plan, seconds: float, busy: float) -> None:
        """Only the store may hold an agent up: no reader does."""
        if seconds > busy + 1e-6 and not self.submissions[plan.nonce].may_pause:
            self.note(f"an emit of plan {plan.nonce} took {seconds:.3f} s, of which the store worked {busy:.3f} s")

    # --- asked by readers

    def of_plan(self, nonce: int) -> list[Known]:
        """The newest last."""
        submission = self.submissions[nonce]
        keys = self._by_id.get((submission.agent_id, submission.task_id), ())
        return [self.tasks[key] for key in keys if self.tasks[key].plan.nonce == nonce]

    def candidates(self, agent_id: str, task_id: str) -> set[int]:
        return set(self._by_id.get((agent_id, stem_of(task_id)), ()))

    def holds(self, key: int, chunk: Chunk, line: bytes) -> bool:
        """Whether this chunk, which somebody has received, is in the log of this task."""
        known = self.tasks[key]
        if chunk.seq > len(known.rests):
            return False
        if chunk.first_seq is UNSET:
            return known.rests[chunk.seq - 1] == rest_of(line)
        parts = known.chunks[chunk.first_seq - 1 : chunk.seq]
        return {part.chunk_type for part in parts} == {chunk.chunk_type} and "".join(
            part.content for part in parts
        ) == chunk.content

    def one_of(self, reader: Reader, seq: int) -> Known | None:
        """The newest task that this may be and that has such a chunk."""
        keys = self.candidates(reader.agent_id, reader.task_id) if reader.keys is None else reader.keys
        found = [self.tasks[key] for key in sorted(keys) if len(self.tasks[key].rests) >= seq]
        return found[-1] if found else None

    # --- looked at as a whole

    def check_disk(self) -> None:
        """All logs are there as they were committed, byte for byte, and fold to their rows."""
        rows = {row.key: row for row in self.disk.rows()}
        for key, known in self.tasks.items():
            row = rows.get(key)
            if row is None:
                if not self.may_be_gone(known):
                    self.note(f"task {known.original_id!r} is lost")
                continue
            lines = self.disk.lines(key) if row.last_seq else []
            held = known.rests[len(known.rests) - len(lines) :] if self.may_be_pruned(known) else known.rests
            if [rest_of(line) for line in lines] != held:
                self.note(f"the log of task {known.original_id!r} is not what was committed")
            if row.ended and held is known.rests and fold(decode_chunk(line) for line in lines).output() != row.output:
                self.note(f"the log of task {known.original_id!r} does not fold to its row")
            self._compare(known, row)

    def check_conversations(self) -> None:
        """When all has ended: each run has its line and its answer's, side by side."""
        for owner, session_id in {(known.row.owner, known.row.session_id) for known in self.tasks.values()}:
            lines = None if session_id is None else self.disk.conversation(owner, session_id)
            for key in {key for key, _ in lines or ()}:
                self._check_lines(self.tasks[key], lines or [])
            for row in self.disk.rows():
                known = self.tasks[row.key]
                ran = known.status == "completed" or len(known.rests) > 1
                if ran and row.session_id == session_id and lines is not None and row.key not in dict(lines):
                    self.note(f"task {known.original_id!r} has no line in its session")

    def _check_lines(self, known: Known, lines: list[tuple[int, str]]) -> None:
        roles = "".join(role[0] for key, role in lines if key == known.key)
        answer = "" if known.fold.output() is None else "a"
        asked = "ua" * known.questions
        # the run behind an answer may have ended before it began: then it has no line
        if roles != f"{asked}u{answer}" and (not known.questions or roles != asked + answer):
            self.note(f"task {known.original_id!r} has the lines {roles}, its output: {known.fold.output()}")
        if known.questions:
            return
        # a task that has asked has given up its turn, and so may end in another's
        groups = [key for key, _ in groupby(key for key, _ in lines if not self.tasks[key].questions)]
        if groups.count(known.key) > 1:
            self.note(f"the lines of session {known.row.session_id!r} are mixed: {lines}")


def joined(emitted: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for kind, content in emitted:
        if kind == "text" and result and result[-1][0] == "text":
            result[-1] = ("text", result[-1][1] + content)
        else:
            result.append((kind, content))
    return result


def begins(whole: list[tuple[str, Any]], part: list[tuple[str, Any]]) -> bool:
    """Whether ``part`` is how ``whole`` begins."""
    if not part:
        return True
    if len(part) > len(whole) or part[:-1] != whole[: len(part) - 1]:
        return False
    (kind, content), (expected_kind, expected) = part[-1], whole[len(part) - 1]
    if kind != expected_kind:
        return False
    return bool(expected.startswith(content) if kind == "text" else content == expected)


class Reader:
    """One viewer's place in one task's log: never a duplicate, never a hole, nothing that is not committed.

    ``link`` is set by whoever connects it.
    """

    link: Link

    def __init__(self, ledger: Ledger, agent_id: str, task_id: str, *, after: int = 0, counted: bool = True) -> None:
        """``counted``: it is a viewer, for whom a task with a grace goes on."""
        self.agent_id = agent_id
        self.task_id = task_id
        self.next: int | None = after + 1
        """The number that comes next; ``None``: any."""
        self.keys: set[int] | None = None
        """Which tasks this can be: ids are used again. ``None``: nothing was received yet."""
        self.ended = False
        self.refused: str | None = None
        """The code of the uncommitted chunk that has ended this."""
        self.may_restart = 0
        """How often the same task was asked for again on the same socket: each time it is read from its beginning."""
        self.final_once = False
        """Whether it asked with ``after``: where that is at or past the end, it gets the final chunk, whichever it is.
        The id may have gone to a later, shorter task meanwhile."""
        self.nonce: int | None = None
        self.detached = False
        self.seen_at: float | None = None
        """When it certainly watched for the first time."""
        self.gone_at: float | None = None
        self.window: int | None = None
        self.unacknowledged = 0
        self.pauses = False
        self._ledger = ledger
        if counted:
            ledger.readers.append(self)

    def follow(self, after: int, window: int | None) -> None:
        """The server has said that it follows the task from here on."""
        self.next, self.keys, self.ended, self.refused, self.detached = after + 1, None, False, None, False
        self.window, self.unacknowledged, self.pauses = window, 0, False
        self.seen_at, self.gone_at = trio.current_time(), None

    def take(self, chunk: Chunk, line: bytes) -> None:
        """``line``: as it came, or as it stands in the log for one that came as bytes."""
        name = f"a reader of {self.task_id!r} at {self.next}"
        if chunk.seq == 0:
            if not chunk.final or chunk.chunk_type != "error" or chunk.code is UNSET:
                self._ledger.note(f"{name} got {line!r}")
            else:
                self.refused = chunk.code
                self.ended = True
                self.gone()
            return
        first = chunk.seq if chunk.first_seq is UNSET else chunk.first_seq
        self.next = self.next or first
        if self.may_restart and first == 1 and (self.next > 1 or self.detached):
            self.follow(0, None)
            self.may_restart -= 1
        if self.ended and self.refused is None:
            self._ledger.note(f"{name} got {line!r} after the end")
        if self.detached:
            self._ledger.note(f"{name} got {line!r} after it was detached")
        if self.keys is None:
            self.keys = self._ledger.candidates(self.agent_id, self.task_id)
        gap = chunk.content.get("gap") if isinstance(chunk.content, dict) else None
        if gap is not None:
            self._take_gap(chunk, gap)
            return
        if self.final_once and chunk.final:
            self.next = min(self.next, first)
        self.final_once = False
        if first != self.next:
            self._ledger.note(f"{name} got {first}..{chunk.seq}")
        self.keys = {key for key in self.keys if self._ledger.holds(key, chunk, line)}
        if not self.keys:
            self._ledger.note(f"{name} got {line!r}, which is not committed")
        for key in self.keys:
            known = self._ledger.tasks[key]
            known.seen = max(known.seen, chunk.seq)
        self.next = chunk.seq + 1
        self.seen_at = trio.current_time() if self.seen_at is None else self.seen_at
        self.unacknowledged += 1
        if self.window is not None and self.unacknowledged > self.window and not self.may_restart:
            self._ledger.note(f"{name} got {self.unacknowledged} frames, its window is {self.window}")
        self.ended = chunk.final
        if self.ended:
            self.gone()

    def _take_gap(self, chunk: Chunk, gap: Any) -> None:
        keys = {key for key in self.keys or () if self._ledger.may_be_pruned(self._ledger.tasks[key])}
        if not keys or gap["from"] != self.next or gap["to"] != chunk.seq or chunk.final:
            self._ledger.note(f"a reader of {self.task_id!r} at {self.next} got the gap {gap} as {chunk.seq}")
        self.keys = keys
        self.next = chunk.seq + 1
        self.unacknowledged += 1

    def gone(self) -> None:
        """It watches no longer."""
        if self.gone_at is None:
            self.gone_at = trio.current_time()

    def behind(self) -> int | None:
        """How many committed chunks it has not got and could have, as far as can be told."""
        if self.ended or self.may_restart or self.detached or self.gone_at is not None:
            return None
        if self.window is not None and self.unacknowledged >= self.window:
            return None
        known = self.known()
        return None if known is None or self.next is None else len(known.rests) + 1 - self.next

    def known(self) -> Known | None:
        """The task, if there can be but one."""
        keys = self.keys
        if keys is None:
            found = self._ledger.of_plan(self.nonce) if self.nonce is not None else []
            keys = {found[-1].key} if found else set()
        if len(keys) != 1:
            return None
        (key,) = keys
        return self._ledger.tasks[key]
