"""The world of a simulation: processes that start, stop and die over one disk, and clients that come and go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from random import Random
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import structlog
import trio

from hector_trio import engine as engine_module
from hector_trio import log as log_module
from hector_trio.agents import AgentInfo
from hector_trio.agents.function import FunctionAgent
from hector_trio.auth import Authenticator
from hector_trio.config import Limits, Settings, Tasks
from hector_trio.engine import FINISH_LIMIT, REPAIR_INTERVAL, Engine, open_engine
from hector_trio.errors import StoreUnavailable
from hector_trio.log import TaskLog
from hector_trio.observability import Metrics
from hector_trio.server import CLOSING_LIMIT, App
from hector_trio.stores import Store, rules
from hector_trio.task import grace_of
from hector_trio.transports import Services
from hector_trio.transports import websocket as websocket_module
from hector_trio.uploads import Uploads
from tests.simulation.agent import PlannedAgent
from tests.simulation.channel import Link, http_link, websocket_link
from tests.simulation.clients import Call, Socket, request_of
from tests.simulation.invariants import EPOCH_NS, Ledger, Reader, Submission
from tests.simulation.store import SimulatedStore, Weather

AGENTS: Final = ("a", "b")
OWNER: Final = "local"

SOON: Final = FINISH_LIMIT + REPAIR_INTERVAL + 4.0
"""Seconds within which what must end ends, as long as the store is well."""

EXPECTED_ERRORS: Final = frozenset({"final_chunk_not_stored", "agent_failed"})
"""What may be logged as an error: a store that refuses, a planned crash of an agent."""


class Current:
    """``Services`` of whichever process lives at the time: so that the application needs to be built only once."""

    services: Services

    def __getattr__(self, name: str) -> Any:
        return getattr(self.services, name)


CURRENT: Final = Current()


@cache
def application() -> App:
    """The real application. To build it takes longer than a schedule."""
    return App(cast(Services, CURRENT))


class Process:
    """One life of the server."""

    engine: Engine
    connections: trio.Nursery

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"process {number}"
        self.store = SimulatedStore(world.ledger.disk, world.weather)
        self.metrics = Metrics()
        self.up = False
        """Whether it takes connections."""
        self.served = False
        self.stopping = trio.Event()
        self.gone = trio.Event()
        self.must_be_gone_at = float("inf")
        self.logs: set[TaskLog] = set()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        agents = {name: FunctionAgent(AgentInfo(name, name), PlannedAgent(self.world)) for name in AGENTS}
        try:
            with self._scope:
                store = cast(Store, self.store)
                async with open_engine(
                    store, agents, self.world.settings, instance=self.name, observer=self.metrics
                ) as self.engine:
                    await self._serve()
        except* StoreUnavailable as group:
            if self.served:
                self.world.ledger.note(f"{self.name} failed: {group!r}")
            self.world.say(f"{self.name} cannot start")
        finally:
            self.up = False
            self.world.ledger.process_gone()
            self.gone.set()

    async def _serve(self) -> None:
        nothing = cast(Uploads, None)  # they are written by threads
        settings = self.world.settings
        CURRENT.services = Services(
            self.engine, nothing, settings, Authenticator(settings.auth), self.metrics, loopback=True
        )
        self.up = self.served = True
        self.world.ledger.process_began = trio.current_time()
        self.world.say(f"{self.name} serves")
        async with trio.open_nursery() as self.connections:
            await self.stopping.wait()
            grace = self.world.settings.server.shutdown_grace
            self.must_be_gone_at = trio.current_time() + grace + 3 * FINISH_LIMIT + CLOSING_LIMIT
            await self.engine.drain(grace)
            with trio.move_on_after(CLOSING_LIMIT):
                for link in self.world.links:
                    await link.wait_finished()
            self.up = False
            self.connections.cancel_scope.cancel()

    def stop(self) -> None:
        """As after SIGTERM."""
        self.world.ledger.ending = True
        self.stopping.set()

    async def die(self) -> None:
        """As after SIGKILL: nothing more reaches the disk or a client."""
        self.world.ledger.ending = True
        self.store.die()
        for link in self.world.links:
            link.leave(1006, unread=self.world.random.random() < 0.5)
        self._scope.cancel()
        with trio.move_on_after(30) as limit:
            await self.gone.wait()
        if limit.cancelled_caught:
            self.world.ledger.note(f"{self.name} does not die")


class World:
    """See the module. It watches the agents, and checks what can be seen only of the whole."""

    def __init__(self, seed: int, nursery: trio.Nursery) -> None:
        self.random = Random(seed)
        self.weather = Weather(Random(seed + 1))
        self.ledger = Ledger(self.weather)
        self.settings = random_settings(self.random)
        self.ledger.input_timeout = self.settings.tasks.input_timeout
        self.ledger.log_retention = self.settings.tasks.log_retention
        self.process: Process | None = None
        self.sockets: list[Socket] = []
        self.calls: list[Call] = []
        self.readers: list[Reader] = []
        self.sessions: dict[str, str] = {}
        """The agent of each session that was ever asked for."""
        self.story: list[str] = []
        self.baseline = 0
        """Trio's tasks while a process has neither connections nor tasks."""
        self._processes = 0
        self._nursery = nursery

    @property
    def now(self) -> float:
        return trio.current_time()

    @property
    def links(self) -> list[Link]:
        return [socket.link for socket in self.sockets] + [call.link for call in self.calls]

    @property
    def stopping(self) -> bool:
        return self.process is not None and self.process.stopping.is_set()

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.up

    def say(self, text: str) -> None:
        self.story.append(f"{self.now:10.3f}  {text}")

    # --- agents tell

    def began(self, ctx: Any, plan: Any) -> None:
        self.say(f"    {ctx.task_id} runs")
        self.ledger.began(ctx, plan)

    def ended(self, ctx: Any, plan: Any) -> None:
        self.ledger.ended(ctx, plan)

    def resumed(self, ctx: Any, plan: Any) -> None:
        self.ledger.resumed(ctx, plan)

    def busy_seconds(self) -> float:
        return self.process.store.busy_seconds if self.process is not None else 0.0

    def waited(self, plan: Any, seconds: float, busy: float) -> None:
        self.ledger.waited(plan, seconds, busy)

    def refused(self, code: str, what: str) -> None:
        """Somebody was refused: for a reason?"""
        self.say(f"    refused: {code}, {what}")
        reasons = {
            "store_unavailable": self.weather.calm_since >= 0 or self.ledger.last_end_of_a_process >= 0,
            "draining": self.ledger.last_end_of_a_process >= 0,
            "session_not_found": bool(self.ledger.removed_sessions) or bool(self.sessions),
            "gone": bool(self.ledger.removed_sessions or self.ledger.removed_tasks),
            "task_not_found": True,
            "not_waiting": True,
            "task_exists": True,
            "task_running": True,
            "session_busy": True,
            "session_exists": True,
            "rate_limited": True,
            "invalid_request": True,
        }
        if not reasons.get(code, False):
            self.ledger.note(f"refused without a reason: {code}, {what}")

    # --- processes

    def start(self) -> None:
        self._processes += 1
        self.process = Process(self, self._processes)
        self.say(f"{self.process.name} starts")
        self._nursery.start_soon(self.process.run)

    async def crash(self) -> None:
        assert self.process is not None
        self.say(f"{self.process.name} is killed")
        await self.process.die()
        self.process = None

    # --- connections

    def _connect(self, link: Link) -> None:
        process = self.process
        if process is None or not process.up:
            link.refuse()
            return
        process.connections.start_soon(link.run, application())

    def _capacity(self) -> tuple[int, float]:
        return self.random.choice((100, 1000, 20_000)), self.settings.limits.send_timeout

    def open_socket(self, agent_id: str) -> Socket:
        socket = Socket(self, agent_id)
        capacity, patience = self._capacity()
        socket.link = websocket_link(
            f"/agents/{agent_id}/stream",
            socket,
            batches=self.random.random() < 0.7,
            capacity=capacity,
            patience=patience,
        )
        self.sockets.append(socket)
        self._connect(socket.link)
        return socket

    def request(self, call: Call, method: str, path: str, *, body: Any = None, query: str = "", **headers: str) -> Call:
        capacity, patience = self._capacity()
        call.link = http_link(
            method,
            path,
            call,
            body=b"" if body is None else msgspec.json.encode(body),
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            query=query,
            capacity=capacity,
            patience=patience,
        )
        if call.reader is not None:
            call.reader.link = call.link
            self.readers.append(call.reader)
        self.calls.append(call)
        self._connect(call.link)
        return call

    def post_task(self, submission: Submission, *, streamed: bool, **headers: str) -> Call:
        call = Call(self, "task", agent_id=submission.agent_id)
        call.submission, call.task_id = submission, submission.task_id
        if streamed:
            headers["Accept"] = "text/event-stream"
            call.reader = Reader(self.ledger, submission.agent_id, submission.task_id)
            call.reader.nonce = submission.plan.nonce
        path = f"/agents/{submission.agent_id}/tasks"
        if submission.session_id is not None and self.random.random() < 0.5:
            path = f"/sessions/{submission.session_id}/tasks"
        submission.posted |= not streamed
        self.request(call, "POST", path, body=request_of(submission), **headers)
        submission.links.append(call.link)
        return call

    def post_answer(self, submission: Submission, task_id: str, answer: str, *, streamed: bool) -> Call:
        call = Call(self, "task", agent_id=submission.agent_id)
        call.submission, call.task_id = submission, task_id
        submission.posted |= not streamed
        path = f"/agents/{submission.agent_id}/tasks/{task_id}/input"
        body = {"input": {"type": "text/plain", "content": answer}}
        if streamed:
            call.reader = Reader(self.ledger, submission.agent_id, task_id)
            call.reader.next = None  # behind the question, and that may not even be committed yet
            self.request(call, "POST", path, body=body, Accept="text/event-stream")
        else:
            self.request(call, "POST", path, body=body)
        submission.links.append(call.link)
        return call

    def forget_finished(self) -> None:
        self.sockets = [each for each in self.sockets if not (each.link.gone and each.link.finished)]
        self.calls = [each for each in self.calls if not (each.link.gone and each.link.finished)]

    # --- what must hold at any time

    def check(self, *, settled: bool) -> None:
        """After a step. ``settled``: nothing can go on before the clock does."""
        now, ledger = self.now, self.ledger
        process = self.process
        calm = max(self.weather.calm_since, ledger.last_end_of_a_process)
        for known in ledger.tasks.values():
            if known.final is None:
                self._check_leaving(known.plan.nonce, calm)
        for reader in self.all_readers():
            if reader.link.most_held > 300_000:
                ledger.note(f"{reader.link.most_held} bytes wait for one viewer")
        if process is None:
            return
        if now > process.must_be_gone_at and not process.gone.is_set():
            ledger.note(f"{process.name} was told to stop and has not")
        if process.up:
            self._check_memory(process)
            if settled and not process.store.busy and not self.weather.bad:
                self._check_prompt(process)

    def _asked(self) -> int:
        return sum(known.questions > 0 for known in self.ledger.tasks.values())

    def all_readers(self) -> Iterator[Reader]:
        for socket in self.sockets:
            yield from socket.readers.values()
        for call in self.calls:
            if call.reader is not None:
                yield call.reader

    def _check_leaving(self, nonce: int, calm: float) -> None:
        """A task with the policy ``cancel`` ends when its starter leaves."""
        submission = self.ledger.submissions[nonce]
        known = self.ledger.of_plan(nonce)[-1]
        if not self.up or self.ledger.may_be_gone(known) or known.policy == "continue":
            return
        if known.policy == "cancel":
            left = max(self.now if link.left_at is None else link.left_at for link in submission.links)
            alone = submission.posted or self.ledger.process_began >= known.started_at
            if known.status == "input_required" and alone:
                return  # who asked has its answer, or the server left it alone: it waits for input
        else:
            since, grace = self.ledger.unwatched_since(known), grace_of(known.policy)
            if since is None or grace is None:
                return
            left = since + grace
        if self.now > max(left, calm, known.started_at) + SOON:
            self.ledger.note(f"task {submission.task_id!r} ({known.policy}) runs on; nobody is there since {left:.3f}")

    def _check_memory(self, process: Process) -> None:
        limits = self.settings.limits
        parked = process.engine._parked
        if len(process.engine._timers) > 4 * self._asked():
            self.ledger.note(f"{len(process.engine._timers)} timers for {len(parked)} tasks that wait for input")
        for run in process.engine._runs.values():
            process.logs.add(run.log)
            slack = limits.chunk_bytes + 4096
            if run.log._pending_bytes > limits.max_uncommitted + slack:
                self.ledger.note(f"{run.log._pending_bytes} bytes of {run.row.task_id!r} wait for the store")
            if run.log._tail_size > 2 * limits.tail_bytes + limits.max_uncommitted + slack:
                self.ledger.note(f"{run.log._tail_size} bytes of {run.row.task_id!r} are kept in memory")

    def _check_prompt(self, process: Process) -> None:
        """The store is idle and everybody waits: so everybody has all that is committed."""
        for reader in self.all_readers():
            link = reader.link
            behind = reader.behind()
            if behind and not (link.gone or link.stalled or link.finished):
                self.ledger.note(f"a reader of {reader.task_id!r} waits {behind} chunks behind the log")
        for socket in self.sockets:
            if socket.open and not socket.link.stalled and not socket.link.finished:
                unanswered = [kind for kind, count in socket.controls.items() if count and kind != "cancel"]
                if unanswered:
                    self.ledger.note(f"control frames that are not answered: {unanswered}")
                if socket.bad_frames:
                    self.ledger.note("a bad frame is not answered")
        for call in self.calls:
            if call.complete or call.link.gone or call.link.stalled:
                continue
            if call.kind not in ("task", "events", "cancel", "delete session"):
                self.ledger.note(f"{call.kind} {call.task_id} is not answered")
            elif call.kind == "task" and call.submission is not None:
                found = self.ledger.of_plan(call.submission.plan.nonce)
                over = bool(found) and (found[-1].final is not None or found[-1].status == "input_required")
                if over and not call.events and not self.ledger.may_be_gone(found[-1]):
                    self.ledger.note(f"the task {call.task_id!r} is over, and who waits for it does not know")
        free = process.engine._slots.value > 0
        for run in process.engine._runs.values():
            first = run.turn is None or process.engine._turns.waiting(run.turn.session)[0] is run.turn
            if not run.begun and first and free:
                self.ledger.note(f"task {run.row.task_id!r} could run and does not")

    # --- what must hold when all is over

    def check_quiet(self, process: Process) -> None:
        """Nobody is connected and all tasks have ended: nothing of it is left."""
        engine = process.engine
        left = {
            "runs": engine._runs,
            "names": engine._named,
            "unfinished ends": engine._unfinished,
            "sessions being removed": engine._closing,
            "parked tasks": engine._parked,
            "logs": engine._logs,
            "turns": engine._turns._queues,
            "drain wakeups": engine.drain_wakeups,
            "dirty logs": engine._writer._dirty,
            "open streams": process.metrics.open_streams(),
            "readers": sum(len(log.readers) for log in process.logs),
            "waiting": engine._waiting,
            "taken slots": self.settings.limits.running - engine._slots.value,
            "sessions with a run": self.ledger.running,
        }
        for name, value in left.items():
            if value:
                self.ledger.note(f"left behind: {name}: {value}")
        tasks = trio.lowlevel.current_statistics().tasks_living
        if tasks != self.baseline:
            self.ledger.note(f"{tasks} Trio tasks live; there were {self.baseline} before the first connection")


def random_settings(random: Random) -> Settings:
    """Limits as they are, or small enough to be met."""

    def one(usual: int, *small: int) -> int:
        return usual if random.random() < 0.5 else random.choice(small)

    limits = Limits(
        running=one(1000, 1, 2, 5),
        waiting_for_input=one(10_000, 1),
        queued=one(10_000, 3, 10),
        queued_per_session=one(100, 1, 3),
        tasks_per_socket=one(100, 2),
        chunk_bytes=one(256 * 1024, 800, 8000),
        tail_bytes=one(256 * 1024, 200, 2000),
        max_uncommitted=one(256 * 1024, 100, 1000),
    )
    tasks = Tasks(
        timeout=120,
        max_timeout=200,
        input_timeout=random.choice((20, 300)),
        log_retention=random.choice((None, None, 25)),
        sweep_interval=7,
    )
    settings = Settings(limits=limits, tasks=tasks)
    grace = random.choice((0.0, 1.0, 10.0))
    return msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, shutdown_grace=grace))


# --- the edges of the simulation: clocks, constants, logs -------------------------------------------------------------


@contextmanager
def replaced(*values: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of modules, for as long as this lasts."""
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    for module, name, value in values:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def virtual(seed: int) -> Iterator[None]:
    """The wall's clock follows Trio's, and what is read and sent at once is sometimes little."""
    random = Random(seed)
    clock = SimpleNamespace(time_ns=lambda: EPOCH_NS + int(trio.current_time() * 1e9))
    read_bytes = 500 if random.random() < 0.4 else log_module.READ_BYTES
    with replaced(
        (log_module, "time", clock),
        (rules, "time", clock),
        (log_module, "READ_BYTES", read_bytes),
        (engine_module, "READ_BYTES", read_bytes),
        (websocket_module, "BATCH", random.choice((1, 3, 64))),
        (websocket_module, "ROUND_BYTES", random.choice((200, 256 * 1024))),
    ):
        yield


@contextmanager
def errors_noted(notes: list[str]) -> Iterator[None]:
    """What the server logs as an error, and is not expected, goes to ``notes``; nothing is printed."""

    def structured(logger: Any, method: str, event: Any) -> Mapping[str, Any]:
        if method in ("error", "critical", "exception") and event["event"] not in EXPECTED_ERRORS:
            notes.append(f"logged: {event}")
        if event["event"] == "agent_failed" and not isinstance(event.get("exc_info"), ValueError):
            notes.append(f"logged: {event}")
        raise structlog.DropEvent

    class Plain(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(f"logged: {record.getMessage()} {record.exc_info}")

    handler = Plain(logging.WARNING)
    root = logging.getLogger()
    before = structlog.get_config()
    structlog.configure(processors=[structured], cache_logger_on_first_use=False)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        structlog.configure(**before)
