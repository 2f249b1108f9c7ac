"""The engine: submit, cancel, follow, recover, drain. It owns the runs that outlive their connection."""

from __future__ import annotations

import asyncio
import heapq
import math
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, Protocol

import msgspec
import structlog
import trio
from msgspec import UNSET, Struct

from hector_trio.a2a.mapping import question_message
from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.agents import Agent, WithdrawingAgent
from hector_trio.agents.context import RunContext
from hector_trio.config import Settings
from hector_trio.errors import (
    AgentNotFound,
    Draining,
    Gone,
    HectorError,
    InvalidRequest,
    NotWaiting,
    RateLimited,
    RunError,
    SessionBusy,
    SessionNotFound,
    StoreUnavailable,
    TaskNotFound,
)
from hector_trio.log import READ_BYTES, Follower, LogWriter, TaskLog, now_ms
from hector_trio.models import Content, TaskRequest, encode
from hector_trio.runs import (
    CLIENT_LEFT,
    INTERRUPTED,
    SESSION_DELETED,
    STORE_REFUSED,
    SUPERSEDED,
    Parked,
    Run,
    failure,
    last_change,
)
from hector_trio.session import MessageRow, wire_message
from hector_trio.stores import Accepted, Append, Change, Idempotency, NewPush, NewTask, Push, Store
from hector_trio.task import (
    Fold,
    Mark,
    Outcome,
    Question,
    StoredRequest,
    TaskRow,
    decode_chunk,
    encode_chunk,
    final_chunk,
    fingerprint,
    policy_of,
    session_of,
    split_lines,
)
from hector_trio.turns import Turn, Turns
from hector_trio.uploads import Uploads
from hector_trio.views import Views
from hector_trio.wakeup import Wakeup

FINISH_LIMIT: Final = 5.0
"""Seconds that the end of a run may take: its final chunk is committed under a shield this long."""

WITHDRAW_LIMIT: Final = 4.0
"""Seconds that an agent is given to tell somebody that its question will not be answered."""

FIRST_VIEWER: Final = 1.0
"""Seconds within which the first viewer of a task comes, however short its grace."""

REPAIR_INTERVAL: Final = 1.0
"""Seconds between tries to append the final chunks that the store refused."""

UNREAD_LIMIT: Final = 2.0
"""Seconds that the followers of a deleted session's tasks are given to read the final chunk."""

SWEEP_BATCH: Final = 500

log = structlog.stdlib.get_logger("hector_trio.engine")

_requests = msgspec.json.Decoder(StoredRequest)


class Observer(Protocol):
    """What the engine tells about itself, for metrics. Called on the loop; must not block or raise."""

    def run_ended(self, agent_id: str, status: str, code: str | None, seconds: float) -> None: ...

    def cancelled(self, seconds: float) -> None:
        """Time from the decision to the end of the run."""

    def chunks(self, count: int) -> None: ...


class Order(Struct, frozen=True):
    """A request to run an agent, as a transport has understood it."""

    owner: str
    agent_id: str
    request: TaskRequest
    default_policy: Literal["cancel", "continue"]
    idempotency: Idempotency | None = None
    push: Push | None = None
    """A webhook that is to be kept with the task."""


class Engine:
    """See the module. Made by ``open_engine``."""

    def __init__(
        self,
        store: Store,
        agents: Mapping[str, Agent],
        settings: Settings,
        instance: str,
        nursery: trio.Nursery,
        writer: LogWriter,
        observer: Observer | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        self.store = store
        self.agents = agents
        self.instance = instance
        self.drain_started = trio.Event()
        self.drain_wakeups: set[Callable[[], None]] = set()
        """Called when a drain starts: connections that have nothing more to do then close."""
        self._settings = settings
        self._nursery = nursery
        self._writer = writer
        self._observer = observer
        self._uploads = uploads
        self.views = Views(self.follow, limit=settings.limits.view_bytes, log_retention=settings.tasks.log_retention)
        """What the tasks are to A2A clients."""
        self._runs: dict[int, Run] = {}
        self._parked: dict[int, Parked] = {}
        self._logs: dict[int, TaskLog] = {}
        """Of tasks that run, and of those that wait for input and are read."""
        self._timers: list[tuple[float, int]] = []
        self._timers_moved = Wakeup()
        # bound once, not for each log and run
        self._on_readers, self._on_refused, self._on_ask = self._readers_changed, self._refused, self._ask
        self._ending = False
        """Whether what runs is being ended: the grace of a drain is over."""
        self._named: dict[tuple[str, str, str], Run] = {}
        self._accepting: Counter[tuple[str, str, str]] = Counter()
        """Names of tasks that the store is being given: it may have them before they have a run."""
        self._changed = trio.lowlevel.ParkingLot()
        self._turns = Turns()
        self._slots = trio.Semaphore(settings.limits.running)
        self._waiting = 0
        self._closing: set[tuple[str, str]] = set()
        self._unfinished: dict[Run, Outcome] = {}

    # --- what is going on

    @property
    def draining(self) -> bool:
        return self.drain_started.is_set()

    @property
    def running(self) -> int:
        return len(self._runs) - self._waiting

    @property
    def queued(self) -> int:
        return self._waiting

    @property
    def waiting_for_input(self) -> int:
        return len(self._parked)

    @property
    def runs(self) -> Iterable[Run]:
        """All that is queued, runs or ends here."""
        return self._runs.values()

    # --- submit

    async def submit(self, order: Order, nursery: trio.Nursery | None = None) -> Accepted:
        """Accepts a task and starts its run; returns once the acceptance is committed.

        A run with the policy ``cancel`` starts in ``nursery`` (the connection's) when one is given, every other in the
        engine's; whoever gives one says ``left`` when it ends. There is no await between the commit and the start, so
        an accepted task always has a run. Cancelled before the commit: nothing has happened.

        Raises: InvalidRequest (of an upload), AgentNotFound, SessionNotFound, SessionMismatch, SessionBusy, TaskExists,
        IdempotencyMismatch, RateLimited, Draining, StoreUnavailable.
        """
        request = order.request
        agent = self.agents.get(order.agent_id)
        if agent is None:
            raise AgentNotFound(f"There is no agent {order.agent_id!r}")
        if self.draining:
            raise Draining("The server is shutting down; it takes no new work", retry_after=5)
        if order.idempotency is not None:
            replayed = await self.store.find_idempotent(order.owner, order.idempotency, now=now_ms())
            if replayed is not None:
                return replayed
        await self._keep_upload(order.owner, request.input)
        session_id = session_of(request)
        policy = self._policy(order, agent)
        new = NewTask(
            owner=order.owner,
            agent_id=order.agent_id,
            task_id=request.task_id or str(uuid.uuid4()),
            request=msgspec.json.encode(request),
            fingerprint=fingerprint(order.agent_id, session_id, request),
            policy=policy,
            instance=self.instance,
            metadata=(request.context.metadata if request.context is not None else None) or {},
            created_at=now_ms(),
            session_id=session_id,
            idempotency=order.idempotency,
            push=order.push,
        )
        name = (new.owner, new.agent_id, new.task_id)
        turn = self._enter(order, new, session_id)
        accepted: Accepted | None = None
        self._accepting[name] += 1
        try:
            accepted = await self.store.create_task(new)
            if accepted.how == "created":
                if turn is not None and request.multitask == "interrupt":
                    self._interrupt(turn)
                self._start(accepted.task, request, agent, turn, nursery if policy == "cancel" else None)
        finally:
            self._accepting[name] -= 1
            if not self._accepting[name]:
                del self._accepting[name]
            if turn is not None and (accepted is None or accepted.how != "created"):
                turn.leave()
            self._changed.unpark_all()
        while self._is_accepted(accepted.task):
            await self._changed.park()
        return accepted

    def _is_accepted(self, row: TaskRow) -> bool:
        """Whether the store has the task and its run is about to start."""
        name = (row.owner, row.agent_id, row.task_id)
        return not row.ended and name in self._accepting and not self.is_unfinished(row)

    async def find(self, owner: str, agent_id: str, task_id: str) -> TaskRow | None:
        """A task by its name, as the store has it. One that has not ended, and is this instance's, has a run, or waits
        for input, or has ended meanwhile: so it can be followed and stopped. Raises: StoreUnavailable."""
        while (row := await self.store.get_task(owner, agent_id, task_id)) is not None and self._is_accepted(row):
            await self._changed.park()
        return row

    def _policy(self, order: Order, agent: Agent) -> str:
        """What happens when the task's viewers leave: as it asks, within what the agent and the server allow."""
        tasks = self._settings.tasks
        grace = tasks.grace if agent.info.grace is None else agent.info.grace
        most = tasks.max_grace if agent.info.max_grace is None else agent.info.max_grace
        default: str = order.default_policy
        if default == "cancel" and grace > 0:
            default = f"grace:{int(min(grace, most) * 1000)}"
        return policy_of(order.request.on_disconnect, default, int(most * 1000))

    async def _keep_upload(self, owner: str, content: Content) -> None:
        """Sees to it that the upload which an input names is there for as long as the task. Raises: InvalidRequest."""
        if content.upload_id is UNSET:
            return
        if self._uploads is None:
            raise InvalidRequest("input.uploadId: no uploads are kept here")
        await self._uploads.use(owner, content.upload_id, content.type)

    def _enter(self, order: Order, new: NewTask, session_id: str | None) -> Turn | None:
        """Checks the limits and takes a place in the session's queue, in order of arrival."""
        limits = self._settings.limits
        # a repetition or a conflict: the store decides, whatever the limits say
        name = (order.owner, order.agent_id, new.task_id)
        named = name in self._named or name in self._accepting
        if self._waiting >= limits.queued and not named:
            raise RateLimited(f"{limits.queued} tasks wait already; no more are accepted now", retry_after=1)
        if session_id is None:
            return None
        session = (order.owner, session_id)
        if session in self._closing:
            raise SessionNotFound(f"There is no session {session_id!r}")
        queue = self._turns.waiting(session)
        if queue and order.request.multitask == "reject" and not named:
            task_id = queue[0].task_id
            raise SessionBusy(f"The session is busy with task {task_id!r}", task_id=task_id, retry_after=1)
        if len(queue) > limits.queued_per_session and not named:
            raise RateLimited(f"{limits.queued_per_session} tasks wait in this session already", retry_after=1)
        return self._turns.enter(session, new.task_id, next_up=order.request.multitask == "interrupt")

    def _interrupt(self, turn: Turn) -> None:
        first = self._turns.waiting(turn.session)[0]
        if isinstance(first.holder, Run):
            first.holder.stop(SUPERSEDED)
        elif first is not turn:
            first.interrupted = True  # it is still being accepted

    def _start(
        self, row: TaskRow, request: TaskRequest, agent: Agent, turn: Turn | None, nursery: trio.Nursery | None
    ) -> Run:
        timeout = self._settings.tasks.timeout if request.timeout_ms is None else request.timeout_ms / 1000
        run = Run(
            row,
            self._log_of(row),
            turn,
            request=request,
            agent=agent,
            nursery=nursery,
            timeout=min(timeout, self._settings.tasks.max_timeout),
        )
        if turn is not None:
            turn.holder = run
            if turn.interrupted:
                run.stop(SUPERSEDED)
        if row.session_id is not None and (row.owner, row.session_id) in self._closing:
            run.stop(SESSION_DELETED)
        self._launch(run)
        return run

    def _launch(self, run: Run) -> None:
        row = run.row
        self._runs[row.key] = self._named[row.owner, row.agent_id, row.task_id] = run
        self._parked.pop(row.key, None)
        self._waiting += 1
        run.watch(run.log.viewers, at_least=FIRST_VIEWER)
        self._changed.unpark_all()
        if self._ending:  # it was accepted before the drain, slowly
            _interrupt(run)
        (run.nursery or self._nursery).start_soon(self._run, run, name=f"run {row.agent_id}/{row.task_id}")

    def _log_of(self, row: TaskRow) -> TaskLog:
        """The one log of a task that has not ended."""
        log = self._logs.get(row.key)
        if log is None:
            limits = self._settings.limits
            log = self._logs[row.key] = TaskLog(
                row,
                self._writer,
                max_uncommitted=limits.max_uncommitted,
                max_chunk=limits.chunk_bytes,
                max_log=limits.log_bytes,
                tail_bytes=limits.tail_bytes,
            )
            log.on_readers = self._on_readers
            log.on_refused = self._on_refused
        return log

    def _refused(self, log: TaskLog) -> None:
        run = self._runs.get(log.key)
        if run is not None:
            run.scope.cancel()

    def _readers_changed(self, log: TaskLog) -> None:
        run = self._runs.get(log.key)
        if run is not None:
            run.watch(log.viewers)
        elif (parked := self._parked.get(log.key)) is not None:
            parked.watch(log.viewers)
            self._set_timer(parked)
            if not log.readers:
                del self._logs[log.key]

    # --- input

    async def answered(self, row: TaskRow, idempotency: Idempotency) -> TaskRow | None:
        """The task, if this key was used to answer it. Raises: IdempotencyMismatch, StoreUnavailable."""
        while (parked := self._parked.get(row.key)) is not None and parked.answering:
            await self._changed.park()
        replayed = await self.store.find_idempotent(row.owner, idempotency, now=now_ms())
        return None if replayed is None else replayed.task

    async def answer(
        self,
        row: TaskRow,
        content: Content,
        nursery: trio.Nursery | None = None,
        idempotency: Idempotency | None = None,
        message: A2aMessage | None = None,
        push: NewPush | None = None,
    ) -> TaskRow:
        """Accepts the answer of a task that waits for input and starts its next run; returns the row once the answer is
        committed, and ``push`` with it.

        The run starts in the nursery of the connection that started the task, if it was to end with that; if that has
        gone meanwhile, in ``nursery``. Cancelled before the commit: nothing has happened.
        Raises: InvalidRequest (of an upload), NotWaiting (also when the key was used: see ``answered``),
        IdempotencyMismatch, AgentNotFound, RateLimited, Draining, StoreUnavailable.
        """
        agent = self.agents.get(row.agent_id)
        if agent is None:
            raise AgentNotFound(f"There is no agent {row.agent_id!r}")
        if self.draining:
            raise Draining("The server is shutting down; it takes no new work", retry_after=5)
        await self._keep_upload(row.owner, content)
        parked = self._parked.get(row.key)
        if parked is None or parked.answering or parked.stopped is not None:
            raise NotWaiting(f"Task {row.task_id!r} does not wait for input", task_id=row.task_id)
        limits = self._settings.limits
        if self._waiting >= limits.queued:
            raise RateLimited(f"{limits.queued} tasks wait already; no more are accepted now", retry_after=1)
        turn = None
        if row.session_id is not None:
            session = (row.owner, row.session_id)
            if self._turns.length(session) > limits.queued_per_session:
                raise RateLimited(f"{limits.queued_per_session} tasks wait in this session already", retry_after=1)
            turn = self._turns.enter(session, row.task_id)
        parked.answering = True
        accepted = None
        try:
            accepted = await self._accept_answer(row, content, idempotency, message, push)
        finally:
            parked.answering = False
            if accepted is None:
                if turn is not None:
                    turn.leave()
                self._changed.unpark_all()
                if parked.stopped is not None:
                    self._end_parked(parked, parked.stopped)
        if row.key in self._logs:
            self._logs[row.key].status = accepted.status
        policy = parked.row.policy  # it may have been detached meanwhile
        accepted = msgspec.structs.replace(accepted, policy=policy)
        home = parked.nursery or nursery if policy == "cancel" else None
        run = self._start(accepted, _requests.decode(accepted.request), agent, turn, home)
        if parked.stopped is not None:
            run.stop(parked.stopped)
        return accepted

    async def _accept_answer(
        self,
        row: TaskRow,
        content: Content,
        idempotency: Idempotency | None,
        message: A2aMessage | None,
        push: NewPush | None,
    ) -> TaskRow:
        row = await self.store.get_task_by_key(row.key) or row
        if row.status != "input_required" or row.question is None:
            raise NotWaiting(f"Task {row.task_id!r} does not wait for input", task_id=row.task_id)
        if idempotency is not None and await self.store.find_idempotent(row.owner, idempotency, now=now_ms()):
            # since the caller has looked; what the task asks now is another question
            raise NotWaiting(f"Task {row.task_id!r} has got this answer already", task_id=row.task_id)
        question = msgspec.structs.replace(row.question, answer=content, message=message)
        now = now_ms()
        change = Change("pending", question=question, at=now, mark="answered")
        seq = row.last_seq
        append = Append(row.key, self.instance, seq + 1, seq, b"", change, idempotency=idempotency, push=push)
        if await self.store.append([append]):
            raise NotWaiting(f"Task {row.task_id!r} does not wait for input", task_id=row.task_id)
        return msgspec.structs.replace(row, status="pending", question=question, status_at=now, mark="answered")

    def _park(self, row: TaskRow, nursery: trio.Nursery | None, asked_at: int) -> None:
        """Keeps what is to be known of a task that waits for input."""
        wait = self._settings.tasks.input_timeout - (now_ms() - asked_at) / 1000
        parked = self._parked[row.key] = Parked(row, nursery, trio.current_time() + max(0.0, wait))
        log = self._logs.get(row.key)
        parked.watch(0 if log is None else log.viewers)
        if log is not None and not log.readers:
            del self._logs[row.key]
        if self._ending:
            self._dismiss_readers(row.key)
        self._set_timer(parked)

    def _dismiss_readers(self, key: int) -> None:
        """Tells who follows a task that waits through a restart: they come back to the next start."""
        if (log := self._logs.get(key)) is not None:
            log.refuse(Draining("The server is shutting down; the task goes on waiting at the next start"))

    def _set_timer(self, parked: Parked) -> None:
        if parked.deadline < parked.timer:  # else the one that is set will find out
            parked.timer = parked.deadline
            heapq.heappush(self._timers, (parked.deadline, parked.row.key))
            if len(self._timers) > 2 * len(self._parked) + 64:  # most are of tasks that were answered long ago
                self._timers = [(each.timer, key) for key, each in self._parked.items() if each.timer < math.inf]
                heapq.heapify(self._timers)
            if self._timers[0][1] == parked.row.key:
                self._timers_moved.wake()

    async def _lift_shields(self) -> None:
        """A detached run does not end with its connection; it ends, as all do, when everything is cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            for run in self._runs.values():
                run.scope.shield = False

    async def _watch_parked(self) -> None:
        """Ends the tasks for whose input nobody waits any longer."""
        while True:
            with trio.move_on_at(self._timers[0][0] if self._timers else math.inf):
                await self._timers_moved.wait()
            while self._timers and self._timers[0][0] <= trio.current_time():
                at, key = heapq.heappop(self._timers)
                parked = self._parked.get(key)
                if parked is None or parked.timer != at:
                    continue  # it was answered, or has an earlier timer by now
                parked.timer = math.inf
                if parked.deadline <= trio.current_time():
                    self._end_parked(parked, parked.cut())
                else:
                    self._set_timer(parked)

    def _end_parked(self, parked: Parked, outcome: Outcome) -> None:
        """A run that only ends."""
        if parked.answering:
            parked.stopped = parked.stopped or outcome
            return
        run = Run(parked.row, self._log_of(parked.row))
        run.stop(outcome)
        self._launch(run)

    # --- a run

    async def _run(self, run: Run) -> None:
        """The run of one task, whatever nursery it is in. Ends with exactly one final chunk (or parked)."""
        row = run.row
        run.task = trio.lowlevel.current_task()
        began = trio.current_time()
        outcome: Outcome | None = None
        asked = False
        # this task's own; it ends with the run, so nothing has to be unbound
        structlog.contextvars.bind_contextvars(agent_id=row.agent_id, task_id=row.task_id, session_id=row.session_id)
        try:
            try:
                with run.scope:
                    outcome = await self._execute(run)
                if run.asked is not None and run.stopped is None and run.log.failure is None:
                    outcome = None
                    asked = True
                elif run.scope.cancelled_caught:
                    outcome = run.stopped or run.cut()
            except (Exception, SystemExit, asyncio.CancelledError) as error:  # all of them an agent's
                outcome = run.stopped or failure(error)
            except BaseExceptionGroup as group:
                cancelled, rest = group.split(trio.Cancelled)
                if rest is not None:
                    log.error("agent_failed_while_cancelled", exc_info=rest)
                if cancelled is not None:
                    raise cancelled from None
                raise
        finally:
            if not run.begun:
                self._waiting -= 1
                if outcome is None and run.stopped is None and run.nursery is None and row.policy != "cancel":
                    run.parked = True  # accepted, not begun: the next start takes it up
                run.begun = True
            if run.stopped is not None and self._observer is not None:
                self._observer.cancelled(trio.current_time() - run.stopped_at)
            if not asked:
                outcome = outcome or run.stopped or run.left()
            await self._end(run, outcome, trio.current_time() - began)

    async def _execute(self, run: Run) -> Outcome:
        if run.turn is not None:
            await run.turn.wait()
        async with self._slots:
            self._waiting -= 1
            run.begun = True
            ctx = await self._begin(run)
            assert run.agent is not None
            run.taken_up = True
            await run.agent.run(ctx)
        return Outcome("completed")

    async def _begin(self, run: Run) -> RunContext:
        row, request = run.row, run.request
        assert request is not None
        question = row.question
        said, original = request.input, request.message if isinstance(request, StoredRequest) else None
        if question is not None and question.answer is not None:
            said, original = question.answer, question.message
        history, state = [], {}
        message = None
        if not run.log.folded:
            run.log.restore(await self._refold(row.key))
        now = now_ms()
        if row.session_id is not None:
            session = await self.store.get_session(row.owner, row.session_id, now=now)
            if session is None:
                raise RunError("session_ended", "The session ended before its task could run")
            state = session.state
            limits = self._settings.limits
            rows = await self.store.history(
                row.owner, row.session_id, limit=limits.history_messages, limit_bytes=limits.history_bytes
            )
            history = [wire_message(line) for line in rows]
            message = _message(row, "user", said, now, original)
        run.log.change(Change("running", at=now), message)
        return RunContext(
            row,
            request,
            run.log,
            self.store,
            history=history,
            state=state,
            deadline=run.deadline,
            session_bytes=self._settings.limits.session_bytes,
            ask=self._on_ask,
            run=run,
            message=original,
            replies=run.agent is not None and run.agent.info.replies,
            uploads=self._uploads,
        )

    def _ask(self, run: Run, question: Any, saved: Any, auth: bool) -> None:
        """Raises: RunError for what cannot be kept."""
        limits = self._settings.limits
        try:
            kept = [encode(question), encode(saved)]
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RunError("not_json", "ask(question, saved=...) takes what can stand in JSON") from error
        if max(map(len, kept)) > limits.chunk_bytes:
            raise RunError(
                "chunk_too_large", f"A question, and what is saved, may have {limits.chunk_bytes} bytes each"
            )
        if len(self._parked) >= limits.waiting_for_input:
            raise RunError("too_many_waiting", f"{len(self._parked)} tasks wait for input already", retryable=True)
        plain, saved = map(msgspec.json.decode, kept)
        run.ask(Question(plain, now_ms(), saved, auth=auth))

    async def _end(self, run: Run, outcome: Outcome | None, seconds: float) -> None:
        """Commits the final chunk or (``None``) the question, bounded; gives the turn on; wakes who waits."""
        run.ending = True
        if run.parked:
            run.log.refuse(Draining("The server is shutting down; the task runs at the next start"))
            self._close(run)
            return
        stored = False
        if outcome is None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FINISH_LIMIT):
                outcome = await self._put_question(run)
                stored = outcome is None
        if outcome is not None:
            await self._withdraw(run)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FINISH_LIMIT):
                stored = await self._finish(run, outcome)
        status, code = (run.row.status, None) if outcome is None else (outcome.status, outcome.code)
        if self._observer is not None:
            self._observer.run_ended(run.row.agent_id, status, code, seconds)
        if stored:
            self._close(run)
        else:
            self._unfinished[run] = outcome or STORE_REFUSED
            run.end()
            self._changed.unpark_all()

    async def _withdraw(self, run: Run) -> None:
        """Tells the agent of a task that ends with an open question that nobody will answer it; bounded."""
        if run.taken_up and run.asked is None:
            return
        agent = self.agents.get(run.row.agent_id)
        if not isinstance(agent, WithdrawingAgent):
            return
        try:
            with trio.move_on_after(WITHDRAW_LIMIT, shield=True):
                question = run.asked
                if question is None:
                    row = await self.store.get_task_by_key(run.row.key)
                    question = None if row is None else row.question
                if question is not None:
                    await agent.withdraw(question.saved)
        except Exception:
            log.exception("question_not_withdrawn")  # the task ends all the same

    async def _put_question(self, run: Run) -> Outcome | None:
        """The chunk that says what is asked, with the row's change; how the task ends if it cannot wait for input."""
        question, row = run.asked, run.row
        assert question is not None
        await run.log.settled()
        if run.log.failure is not None:
            return STORE_REFUSED
        try:
            content = {"status": "input_required", "prompt": question.question}
            seq = run.log.put("metadata", content | {"reason": "auth"} if question.auth else content)
        except RunError as error:
            return failure(error)
        line = None
        if row.session_id is not None:
            text = isinstance(question.question, str)
            said = Content("text/plain" if text else "application/json", question.question)
            original = question_message(row.task_id, row.session_id, seq, question.question)
            line = _message(row, "agent", said, question.asked_at, original)
        mark: Mark | None = "auth" if question.auth else None
        at = now_ms()  # not before the chunk
        run.log.change(Change("input_required", question=question, at=at, mark=mark), line)
        await run.log.settled()
        if run.log.failure is not None:
            return STORE_REFUSED
        run.row = msgspec.structs.replace(
            row,
            status="input_required",
            question=question,
            last_seq=run.log.committed,
            status_at=at,
            mark=mark,
        )
        return run.stopped  # decided while the question was being committed

    def _close(self, run: Run) -> None:
        row = run.row
        del self._runs[row.key]
        name = (row.owner, row.agent_id, row.task_id)
        if self._named.get(name) is run:  # else a newer task has taken the name
            del self._named[name]
        if run.turn is not None:
            run.turn.leave()
        if row.status == "input_required" and row.question is not None:
            self._park(row, run.nursery, row.question.asked_at)
        else:
            del self._logs[row.key]
        run.end()
        self._changed.unpark_all()

    async def _finish(self, run: Run, outcome: Outcome) -> bool:
        """Appends the final chunk. ``False``: the store refuses for now."""
        now = now_ms()
        try:
            if not run.log.folded:
                run.log.restore(await self._refold(run.row.key))
            if run.log.lost and outcome.status == "completed":
                outcome = STORE_REFUSED
            change, message = last_change(run.row, outcome, run.log.fold, now)
            await run.log.finish(outcome, change, message)
        except Gone:
            log.info("task_gone", task_id=run.row.task_id)  # its session was deleted meanwhile
        except HectorError as error:
            if run not in self._unfinished:  # told once, however often it is tried again
                row = run.row
                ids = {"agent_id": row.agent_id, "task_id": row.task_id, "session_id": row.session_id}
                log.error("final_chunk_not_stored", detail=error.detail, status=outcome.status, **ids)
            return False
        except Exception:
            log.exception("final_chunk_failed", task_id=run.row.task_id)
            return False
        run.row = msgspec.structs.replace(
            run.row,
            status=change.status,
            output=change.output,
            error=change.error,
            ended_at=now,
            last_seq=run.log.committed,
            status_at=now,
            mark=change.mark,
        )
        return True

    async def _repair(self) -> None:
        """Appends the final chunks that the store refused, as soon as it takes them."""
        while True:
            await trio.sleep(REPAIR_INTERVAL)
            for run, outcome in list(self._unfinished.items()):
                if not await self._finish(run, outcome):
                    break  # still refusing: the next round tries again
                del self._unfinished[run]
                self._close(run)

    async def _refold(self, key: int) -> Fold:
        """What the committed part of a log adds up to."""
        result = Fold()
        while segments := await self.store.read_log(key, result.last_seq, READ_BYTES):
            for segment in segments:
                for line in split_lines(segment.data)[max(0, result.last_seq + 1 - segment.first_seq) :]:
                    result.take(decode_chunk(line))
                    result.size += len(line)
        return result

    # --- cancel, wait, follow

    async def cancel(self, row: TaskRow, reason: str = "requested") -> TaskRow:
        """Cancels a task and returns its row once the final chunk is committed; an ended task's row as it is.

        Raises: StoreUnavailable; Draining when a drain was quicker, and leaves the task to the next start.
        """
        self.stop([row], reason)
        row = await self.wait(row)
        if not row.ended and self.draining:
            raise Draining("The server is shutting down; the task goes on at the next start", retry_after=5)
        return row

    def stop(self, rows: Iterable[TaskRow], reason: str) -> None:
        """Begins to cancel those that have not ended; ``wait`` tells when they have."""
        for row in rows:
            self._stop(row.key, Outcome("cancelled", reason=reason))

    def _stop(self, key: int, outcome: Outcome) -> None:
        if (run := self._runs.get(key)) is not None:
            run.stop(outcome)
        elif (parked := self._parked.get(key)) is not None:
            self._end_parked(parked, outcome)

    async def wait(self, row: TaskRow) -> TaskRow:
        """Returns the row once the task has ended or waits for input.

        Raises: StoreUnavailable when the store refuses its last chunk: its end then has to wait for the store.
        TaskNotFound when it has ended and was removed since ``row`` was read.
        """
        run = self._runs.get(row.key)
        if run is None:
            while (parked := self._parked.get(row.key)) is not None and parked.stopped is not None:
                await self._changed.park()  # until the answer that is being accepted has been
            run = self._runs.get(row.key)
        if run is None:
            found = await self.store.get_task_by_key(row.key)
            if found is None and not row.ended:
                raise TaskNotFound(f"Task {row.task_id!r} has ended and was removed", task_id=row.task_id)
            return found or row
        await run.wait_over()
        if run in self._unfinished:
            refused = run.log.failure
            detail = refused.detail if refused is not None else "The store does not take the end of the task now"
            raise StoreUnavailable(detail, task_id=row.task_id)
        return run.row if run.request is not None else await self.store.get_task_by_key(row.key) or row

    def follow(
        self, row: TaskRow, after: int = 0, alarm: Callable[[], None] | None = None, *, viewer: bool = False
    ) -> Follower:
        """A reader of the task's log beyond ``after``; a context manager. ``alarm``: see ``Follower``."""

        def live() -> TaskLog | None:
            log = self._logs.get(row.key)
            if log is None and (parked := self._parked.get(row.key)) is not None:
                log = self._log_of(parked.row)  # the caller's row may be older
                if self._ending:
                    self._dismiss_readers(row.key)
            return log

        return Follower(self.store, row, live, after=after, alarm=alarm, viewer=viewer)

    def last_seq(self, row: TaskRow) -> int:
        """The last committed seq: what the row says, or what is known here, whichever is newer."""
        if (log := self._logs.get(row.key)) is not None:
            return max(row.last_seq, log.committed)
        parked = self._parked.get(row.key)
        return row.last_seq if parked is None else max(row.last_seq, parked.row.last_seq)

    def is_running(self, row: TaskRow) -> bool:
        """Whether a run of the task is here, also one that is queued or ends."""
        return row.key in self._runs

    def is_unfinished(self, row: TaskRow) -> bool:
        """Whether the task runs or waits here. Its row in the store may have ended already: the last commit is in the
        store before the run learns of it."""
        return row.key in self._runs or row.key in self._parked

    def runs_in(self, row: TaskRow, nursery: trio.Nursery) -> bool:
        """Whether a run of the task is to end with ``nursery``."""
        run = self._runs.get(row.key)
        return run is not None and run.nursery is nursery

    async def detach(self, row: TaskRow) -> None:
        """The connection that started the task stops following it: ``cancel`` turns into ``continue``, committed when
        this returns. Raises: StoreUnavailable."""
        if row.policy != "cancel":
            return
        await self.store.set_policy(row.key, "continue")
        for task in (self._runs.get(row.key), self._parked.get(row.key)):
            if task is not None:
                task.detach()

    def left(self, row: TaskRow, *, answered: bool = False) -> None:
        """The connection that started the task has gone; a run in its nursery ends with that, and this is for one that
        waits for input. ``answered``: it has gone because it got its answer, the question; who answers that comes in
        its place."""
        parked, run = self._parked.get(row.key), self._runs.get(row.key)
        goes = not answered and not self.draining  # else it is the server that goes, and the task waits through that
        if parked is not None and parked.nursery is not None:
            parked.nursery = None
            if goes:
                self._end_parked(parked, CLIENT_LEFT)
        elif run is not None and run.asked is not None and run.nursery is not None:
            run.nursery = None
            if goes:
                run.stop(CLIENT_LEFT)

    # --- sessions

    async def delete_session(self, owner: str, session_id: str) -> None:
        """Cancels the session's tasks, commits their final chunks, lets followers finish (all bounded), and removes it.

        Raises: SessionNotFound.
        """
        session = (owner, session_id)
        if session in self._closing or await self.store.get_session(owner, session_id, now=now_ms()) is None:
            raise SessionNotFound(f"There is no session {session_id!r}")
        if session in self._closing:  # another removal was quicker
            raise SessionNotFound(f"There is no session {session_id!r}")
        self._closing.add(session)
        try:
            for parked in [each for each in self._parked.values() if _session_of(each.row) == session]:
                self._end_parked(parked, SESSION_DELETED)
            runs = [run for run in self._runs.values() if _session_of(run.row) == session]
            for run in runs:
                run.stop(SESSION_DELETED)
            with trio.move_on_after(FINISH_LIMIT):
                while self._is_busy(session):
                    await self._changed.park()
            with trio.move_on_after(UNREAD_LIMIT):
                for run in runs:
                    await run.log.unread()
            await self.store.delete_session(owner, session_id)
        finally:
            self._closing.discard(session)

    def _is_busy(self, session: tuple[str, str]) -> bool:
        """Whether a task of the session has not ended, as far as the store lets it."""
        runs, parked = self._runs.values(), self._parked.values()
        return (
            self._turns.length(session) > 0
            or any(_session_of(run.row) == session and not run.over for run in runs)
            or any(_session_of(each.row) == session for each in parked)
        )

    # --- the engine's own life

    async def recover(self) -> None:
        """Takes over what a dead process left: running tasks get their final chunk, unstarted ones are started."""
        pending: list[tuple[TaskRow, TaskRequest, Agent]] = []
        waiting: list[tuple[TaskRow, int]] = []
        appends: list[Append] = []
        for row in await self.store.take_over(self.instance):
            agent = self.agents.get(row.agent_id)
            if row.status == "input_required" and row.question is not None:
                waiting.append((row, row.question.asked_at))
            elif row.status == "pending" and row.policy != "cancel" and agent is not None:
                pending.append((row, _requests.decode(row.request), agent))
            else:
                appends.append(await self._interrupted(row))
        for start in range(0, len(appends), SWEEP_BATCH):
            await self.store.append(appends[start : start + SWEEP_BATCH])
        for row, request, agent in pending:
            turn = None if row.session_id is None else self._turns.enter((row.owner, row.session_id), row.task_id)
            self._start(row, request, agent, turn, None)
        for row, asked_at in waiting:  # last: their graces begin now, and nobody can come before
            self._park(row, None, asked_at)
        if appends or pending:
            log.info("recovered", interrupted=len(appends), resumed=len(pending), waiting=len(self._parked))

    async def _interrupted(self, row: TaskRow) -> Append:
        """The final chunk of a task whose process died."""
        folded = await self._refold(row.key)
        now = now_ms()
        change, message = last_change(row, INTERRUPTED, folded, now)
        seq = row.last_seq + 1
        line = encode_chunk(final_chunk(row.task_id, seq, now, INTERRUPTED))
        return Append(
            key=row.key,
            instance=self.instance,
            first_seq=seq,
            last_seq=seq,
            data=line,
            change=change,
            message=message if row.status == "running" or row.last_seq else None,
        )

    async def sweep(self) -> int:
        """Removes what is past its retention, in batches; returns how many rows went."""
        total = 0
        while True:
            now = now_ms()
            tasks = self._settings.tasks
            gone = await self.store.sweep(
                now=now,
                tasks_ended_before=now - int(tasks.retention * 1000),
                limit=SWEEP_BATCH,
                logs_ended_before=None if tasks.log_retention is None else now - int(tasks.log_retention * 1000),
            )
            total += gone
            if gone < SWEEP_BATCH:
                return total

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(self._settings.tasks.sweep_interval)
            try:
                gone = await self.sweep()
            except StoreUnavailable as error:
                log.warning("sweep_failed", detail=error.detail)
            except Exception:
                log.exception("sweep_failed")  # housekeeping must not end the server
            else:
                if gone:
                    log.info("swept", rows=gone)

    async def drain(self, grace: float) -> None:
        """Takes no new work, waits up to ``grace`` seconds for what runs, then ends it as ``interrupted``.

        Accepted tasks with the policy ``continue`` that have not begun stay ``pending``: the next start takes them up.
        Returns within ``grace`` plus a few seconds, whatever the agents do.
        """
        self.drain_started.set()
        for wake in self.drain_wakeups:
            wake()
        with trio.move_on_after(grace):
            await self._quiet()
        self._ending = True
        for run in list(self._runs.values()):
            _interrupt(run)
        for key in self._parked:
            self._dismiss_readers(key)
        with trio.move_on_after(FINISH_LIMIT):
            await self._quiet()

    async def _quiet(self) -> None:
        """Returns when nothing runs. Final chunks that the store refuses are not waited for: recovery appends them."""
        while len(self._runs) > len(self._unfinished):
            await self._changed.park()


def _interrupt(run: Run) -> None:
    """Ends a run because the server stops, or leaves it to the next start if it has not begun."""
    if not run.begun and run.row.policy != "cancel":
        run.park()
    elif run.asked is None:
        run.stop(INTERRUPTED)


def _session_of(row: TaskRow) -> tuple[str, str | None]:
    return row.owner, row.session_id


def _message(
    row: TaskRow, role: Literal["user", "agent"], content: Content, now: int, original: A2aMessage | None = None
) -> MessageRow:
    """A line of the session's conversation."""
    return MessageRow(
        role=role,
        type=content.type,
        content=content.content if content.upload_id is UNSET else {"uploadId": content.upload_id},
        agent_id=row.agent_id,
        task_id=row.task_id,
        created_at=now,
        original=None if original is None else encode(original),
    )


@asynccontextmanager
async def open_engine(
    store: Store,
    agents: Mapping[str, Agent],
    settings: Settings,
    *,
    instance: str,
    observer: Observer | None = None,
    uploads: Uploads | None = None,
) -> AsyncIterator[Engine]:
    """The engine, recovered and running. Leaving drains it without grace: nothing of it runs afterwards."""
    writer = LogWriter(store, committed=observer.chunks if observer is not None else lambda chunks: None)
    async with trio.open_nursery() as writing:
        # Runs end under their own limited shields and need the writer for their final chunks, so it must outlive them
        # when all this is cancelled from outside. Its shield is lifted as soon as the last run has ended.
        shield = trio.CancelScope(shield=True)

        async def write() -> None:
            with shield:
                await writer.run()

        writing.start_soon(write, name="writer log")
        try:
            async with trio.open_nursery() as nursery:
                engine = Engine(store, agents, settings, instance, nursery, writer, observer, uploads)
                await engine.recover()
                nursery.start_soon(engine._sweep_for_ever, name="engine sweep")
                nursery.start_soon(engine._repair, name="engine repair")
                nursery.start_soon(engine._watch_parked, name="engine questions")
                nursery.start_soon(engine._lift_shields, name="engine shields")
                try:
                    yield engine
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * FINISH_LIMIT):
                        await engine.drain(0)
                    nursery.cancel_scope.cancel()
        finally:
            shield.cancel()
