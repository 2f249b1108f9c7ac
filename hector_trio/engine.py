"""The engine: submit, cancel, follow, recover, drain. It owns the runs that outlive their connection."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final, Literal, Protocol

import msgspec
import structlog
import trio
from msgspec import Struct

from hector_trio.agents import Agent
from hector_trio.agents.context import RunContext
from hector_trio.config import Settings
from hector_trio.errors import (
    AgentNotFound,
    Draining,
    FieldError,
    Gone,
    HectorError,
    InvalidRequest,
    RateLimited,
    RunError,
    SessionBusy,
    SessionNotFound,
    StoreUnavailable,
)
from hector_trio.log import READ_BYTES, Follower, LogWriter, TaskLog, Wakeup, now_ms
from hector_trio.models import GraceMs, TaskRequest
from hector_trio.runs import (
    CLIENT_LEFT,
    INTERRUPTED,
    SESSION_DELETED,
    STORE_REFUSED,
    SUPERSEDED,
    Run,
    failure,
    last_change,
)
from hector_trio.session import MessageRow, wire_message
from hector_trio.stores import Accepted, Append, Change, Idempotency, NewTask, Store
from hector_trio.task import (
    Fold,
    Outcome,
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

FINISH_LIMIT: Final = 5.0
"""Seconds that the end of a run may take: its final chunk is committed under a shield this long."""

REPAIR_INTERVAL: Final = 1.0
"""Seconds between tries to append the final chunks that the store refused."""

UNREAD_LIMIT: Final = 2.0
"""Seconds that the followers of a deleted session's tasks are given to read the final chunk."""

SWEEP_BATCH: Final = 500

log = structlog.stdlib.get_logger("hector_trio.engine")

_requests = msgspec.json.Decoder(TaskRequest)


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
    ) -> None:
        self.store = store
        self.agents = agents
        self.instance = instance
        self.drain_started = trio.Event()
        self.drain_wakeups: set[Wakeup] = set()
        """Woken when a drain starts: connections that have nothing more to do then close."""
        self._settings = settings
        self._nursery = nursery
        self._writer = writer
        self._observer = observer
        self._runs: dict[int, Run] = {}
        self._named: dict[tuple[str, str, str], Run] = {}
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

    # --- submit

    async def submit(self, order: Order, nursery: trio.Nursery | None = None) -> Accepted:
        """Accepts a task and starts its run; returns once the acceptance is committed.

        A run with the policy ``cancel`` starts in ``nursery`` (the connection's) when one is given, every other in the
        engine's. There is no await between the commit and the start, so an accepted task always has a run. Cancelled
        before the commit: nothing has happened.

        Raises: AgentNotFound, SessionNotFound, SessionMismatch, SessionBusy, TaskExists, IdempotencyMismatch,
        RateLimited, Draining, StoreUnavailable.
        """
        request = order.request
        agent = self.agents.get(order.agent_id)
        if agent is None:
            raise AgentNotFound(f"There is no agent {order.agent_id!r}")
        if self.draining:
            raise Draining("The server is shutting down; it takes no new work", retry_after=5)
        if isinstance(request.on_disconnect, GraceMs):
            wrong = 'graceMs is not served by this version; use "cancel" or "continue"'
            raise InvalidRequest(f"onDisconnect: {wrong}", errors=(FieldError("/onDisconnect", wrong),))
        if order.idempotency is not None:
            replayed = await self.store.find_idempotent(order.owner, order.idempotency, now=now_ms())
            if replayed is not None:
                return replayed
        session_id = session_of(request)
        policy = policy_of(request.on_disconnect, order.default_policy)
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
        )
        turn = self._enter(order, new, session_id)
        accepted: Accepted | None = None
        try:
            accepted = await self.store.create_task(new)
        finally:
            if turn is not None and (accepted is None or accepted.how != "created"):
                turn.leave()
                self._changed.unpark_all()
        if accepted.how == "created":
            if turn is not None and request.multitask == "interrupt":
                self._interrupt(turn)
            self._start(accepted.task, request, agent, turn, nursery if policy == "cancel" else None)
        return accepted

    def _enter(self, order: Order, new: NewTask, session_id: str | None) -> Turn | None:
        """Checks the limits and takes a place in the session's queue, in order of arrival."""
        limits = self._settings.limits
        # a repetition or a conflict: the store decides, whatever the limits say
        named = (order.owner, order.agent_id, new.task_id) in self._named
        if self._waiting >= limits.queued and not named:
            raise RateLimited(f"{limits.queued} tasks wait already; no more are accepted now", retry_after=1)
        if session_id is None:
            return None
        session = (order.owner, session_id)
        if session in self._closing:
            raise SessionNotFound(f"There is no session {session_id!r}")
        queue = self._turns.waiting(session)
        if queue and order.request.multitask == "reject" and not named:
            holder = queue[0].holder
            task_id = holder.row.task_id if isinstance(holder, Run) else None
            raise SessionBusy(f"The session is busy with task {task_id!r}", task_id=task_id, retry_after=1)
        if len(queue) > limits.queued_per_session and not named:
            raise RateLimited(f"{limits.queued_per_session} tasks wait in this session already", retry_after=1)
        return self._turns.enter(session, next_up=order.request.multitask == "interrupt")

    def _interrupt(self, turn: Turn) -> None:
        first = self._turns.waiting(turn.session)[0]
        if isinstance(first.holder, Run):
            first.holder.stop(SUPERSEDED)
        elif first is not turn:
            first.interrupted = True  # it is still being accepted

    def _start(
        self, row: TaskRow, request: TaskRequest, agent: Agent, turn: Turn | None, nursery: trio.Nursery | None
    ) -> None:
        limits = self._settings.limits
        tail = TaskLog(
            row,
            self._writer,
            max_uncommitted=limits.max_uncommitted,
            max_chunk=limits.chunk_bytes,
            max_log=limits.log_bytes,
            tail_bytes=limits.tail_bytes,
        )
        run = Run(row, request, agent, tail, turn, connected=nursery is not None)
        if turn is not None:
            turn.holder = run
            if turn.interrupted:
                run.stop(SUPERSEDED)
        timeout = self._settings.tasks.timeout if request.timeout_ms is None else request.timeout_ms / 1000
        run.scope.deadline = trio.current_time() + min(timeout, self._settings.tasks.max_timeout)
        tail.on_refused = lambda error: run.scope.cancel()
        self._runs[row.key] = self._named[row.owner, row.agent_id, row.task_id] = run
        self._waiting += 1
        if row.session_id is not None and (row.owner, row.session_id) in self._closing:
            run.stop(SESSION_DELETED)
        (nursery or self._nursery).start_soon(self._run, run, name=f"run {row.agent_id}/{row.task_id}")

    # --- a run

    async def _run(self, run: Run) -> None:
        """The run of one task, whatever nursery it is in. Ends with exactly one final chunk (or parked)."""
        row = run.row
        began = trio.current_time()
        outcome: Outcome | None = None
        with structlog.contextvars.bound_contextvars(
            agent_id=row.agent_id, task_id=row.task_id, session_id=row.session_id
        ):
            try:
                try:
                    with run.scope:
                        outcome = await self._execute(run)
                    if run.scope.cancelled_caught:
                        outcome = run.stopped or self._cut(run)
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
                    if outcome is None and run.stopped is None and not run.connected and row.policy != "cancel":
                        run.parked = True  # accepted, not begun: the next start takes it up
                    run.begun = True
                if run.stopped is not None and self._observer is not None:
                    self._observer.cancelled(trio.current_time() - run.stopped_at)
                left = CLIENT_LEFT if run.connected else INTERRUPTED  # what a nursery that ends around us means
                await self._end(run, outcome or run.stopped or left, trio.current_time() - began)

    async def _execute(self, run: Run) -> Outcome:
        if run.turn is not None:
            await run.turn.wait()
        async with self._slots:
            self._waiting -= 1
            run.begun = True
            ctx = await self._begin(run)
            await run.agent.run(ctx)
        return Outcome("completed")

    async def _begin(self, run: Run) -> RunContext:
        row = run.row
        history, state = [], {}
        message = None
        if row.session_id is not None:
            now = now_ms()
            session = await self.store.get_session(row.owner, row.session_id, now=now)
            if session is None:
                raise RunError("session_ended", "The session ended before its task could run")
            state = session.state
            limits = self._settings.limits
            rows = await self.store.history(
                row.owner, row.session_id, limit=limits.history_messages, limit_bytes=limits.history_bytes
            )
            history = [wire_message(line) for line in rows]
            message = MessageRow(
                role="user",
                type=run.request.input.type,
                content=run.request.input.content,
                agent_id=row.agent_id,
                task_id=row.task_id,
                created_at=now,
            )
        run.log.change(Change("running"), message)
        return RunContext(
            row,
            run.request,
            run.log,
            self.store,
            history=history,
            state=state,
            deadline=run.scope.deadline,
            session_bytes=self._settings.limits.session_bytes,
        )

    def _cut(self, run: Run) -> Outcome:
        """The run's own scope was cancelled and nobody decided how it ends: its store refused, or its time is over."""
        if run.log.failure is not None:
            return STORE_REFUSED
        return Outcome("failed", code="timeout", message="The task did not end within its time", retryable=True)

    async def _end(self, run: Run, outcome: Outcome, seconds: float) -> None:
        """Commits the final chunk, bounded; gives the turn on; wakes who waits."""
        if run.parked:
            run.log.refuse(Draining("The server is shutting down; the task runs at the next start"))
            self._close(run)
            return
        stored = False
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FINISH_LIMIT):
            stored = await self._finish(run, outcome)
        if self._observer is not None:
            self._observer.run_ended(run.row.agent_id, outcome.status, outcome.code, seconds)
        if stored:
            self._close(run)
        else:
            self._unfinished[run] = outcome
            self._changed.unpark_all()

    def _close(self, run: Run) -> None:
        row = run.row
        del self._runs[row.key]
        name = (row.owner, row.agent_id, row.task_id)
        if self._named.get(name) is run:  # else a newer task has taken the name
            del self._named[name]
        if run.turn is not None:
            run.turn.leave()
        run.ended.set()
        self._changed.unpark_all()

    async def _finish(self, run: Run, outcome: Outcome) -> bool:
        """Appends the final chunk. ``False``: the store refuses for now."""
        now = now_ms()
        try:
            if run.log.lost:
                run.log.fold = await self._refold(run.row.key)
                if outcome.status == "completed":
                    outcome = STORE_REFUSED
            change, message = last_change(run.row, outcome, run.log.fold.output(), now)
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
        return result

    # --- cancel, wait, follow

    async def cancel(self, row: TaskRow, reason: str = "requested") -> TaskRow:
        """Cancels a task and returns its row once the final chunk is committed; an ended task's row as it is."""
        run = self._runs.get(row.key)
        if run is not None:
            run.stop(Outcome("cancelled", reason=reason))
            return await self._ended(run)
        return await self.store.get_task_by_key(row.key) or row

    def stop(self, rows: Iterable[TaskRow], reason: str) -> None:
        """Begins to cancel those that have not ended; ``wait`` tells when they have."""
        for row in rows:
            if (run := self._runs.get(row.key)) is not None:
                run.stop(Outcome("cancelled", reason=reason))

    async def wait(self, row: TaskRow) -> TaskRow:
        """Returns the row once the task has ended."""
        run = self._runs.get(row.key)
        if run is not None:
            return await self._ended(run)
        return await self.store.get_task_by_key(row.key) or row

    async def _ended(self, run: Run) -> TaskRow:
        await run.ended.wait()
        return run.row

    def follow(self, row: TaskRow, after: int = 0, wakeup: Wakeup | None = None) -> Follower:
        """A reader of the task's log beyond ``after``; a context manager."""
        run = self._runs.get(row.key)
        return Follower(self.store, row, None if run is None else run.log, after=after, wakeup=wakeup)

    def last_seq(self, row: TaskRow) -> int:
        """The last committed seq."""
        run = self._runs.get(row.key)
        return row.last_seq if run is None else run.log.committed

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
            runs = [turn.holder for turn in self._turns.waiting(session) if isinstance(turn.holder, Run)]
            for run in runs:
                run.stop(SESSION_DELETED)
            with trio.move_on_after(FINISH_LIMIT):
                while self._turns.length(session):
                    await self._changed.park()
            with trio.move_on_after(UNREAD_LIMIT):
                for run in runs:
                    await run.log.unread()
            await self.store.delete_session(owner, session_id)
        finally:
            self._closing.discard(session)

    # --- the engine's own life

    async def recover(self) -> None:
        """Takes over what a dead process left: running tasks get their final chunk, unstarted ones are started."""
        pending: list[tuple[TaskRow, TaskRequest, Agent]] = []
        appends: list[Append] = []
        for row in await self.store.take_over(self.instance):
            agent = self.agents.get(row.agent_id)
            if row.status == "pending" and row.policy != "cancel" and agent is not None:
                pending.append((row, _requests.decode(row.request), agent))
            elif row.status != "input_required":
                appends.append(await self._interrupted(row))
        for start in range(0, len(appends), SWEEP_BATCH):
            await self.store.append(appends[start : start + SWEEP_BATCH])
        for row, request, agent in pending:
            turn = None if row.session_id is None else self._turns.enter((row.owner, row.session_id))
            self._start(row, request, agent, turn, None)
        if appends or pending:
            log.info("recovered", interrupted=len(appends), resumed=len(pending))

    async def _interrupted(self, row: TaskRow) -> Append:
        """The final chunk of a task whose process died."""
        folded = await self._refold(row.key)
        now = now_ms()
        change, message = last_change(row, INTERRUPTED, folded.output(), now)
        seq = row.last_seq + 1
        line = encode_chunk(final_chunk(row.task_id, seq, now, INTERRUPTED))
        return Append(
            key=row.key,
            instance=self.instance,
            first_seq=seq,
            last_seq=seq,
            data=line,
            change=change,
            message=message if row.status == "running" else None,
        )

    async def sweep(self) -> int:
        """Removes what is past its retention, in batches; returns how many rows went."""
        total = 0
        while True:
            now = now_ms()
            before = now - int(self._settings.tasks.retention * 1000)
            gone = await self.store.sweep(now=now, tasks_ended_before=before, limit=SWEEP_BATCH)
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
        for wakeup in self.drain_wakeups:
            wakeup.wake()
        with trio.move_on_after(grace):
            await self._quiet()
        for run in list(self._runs.values()):
            if not run.begun and run.row.policy != "cancel":
                run.park()
            else:
                run.stop(INTERRUPTED)
        with trio.move_on_after(FINISH_LIMIT):
            await self._quiet()

    async def _quiet(self) -> None:
        """Returns when nothing runs. Final chunks that the store refuses are not waited for: recovery appends them."""
        while len(self._runs) > len(self._unfinished):
            await self._changed.park()


@asynccontextmanager
async def open_engine(
    store: Store,
    agents: Mapping[str, Agent],
    settings: Settings,
    *,
    instance: str,
    observer: Observer | None = None,
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

        writing.start_soon(write)
        try:
            async with trio.open_nursery() as nursery:
                engine = Engine(store, agents, settings, instance, nursery, writer, observer)
                await engine.recover()
                nursery.start_soon(engine._sweep_for_ever)
                nursery.start_soon(engine._repair)
                try:
                    yield engine
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * FINISH_LIMIT):
                        await engine.drain(0)
                    nursery.cancel_scope.cancel()
        finally:
            shield.cancel()
