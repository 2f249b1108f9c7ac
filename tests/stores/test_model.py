"""Whatever is asked, in whatever order: every store answers as the plain list does that the protocol describes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hector_trio.errors import HectorError
from hector_trio.models import Content, Status, TaskError
from hector_trio.session import SessionRow, etag
from hector_trio.stores import Accepted, Append, Change, Idempotency, Page, Segment, Store, sql_removal
from hector_trio.stores.memory import open_memory
from hector_trio.stores.sql import open_sql
from hector_trio.task import Question, TaskRow
from tests.portal import Portal
from tests.stores.making import NOW, idempotency, message, new_session, new_task
from tests.stores.plain import Plain, PlainTask

T = TypeVar("T")

OWNERS = st.sampled_from(["alice"] * 7 + ["bob"])
AGENTS = st.sampled_from(["a"] * 7 + ["b"])
TASKS = st.sampled_from(["t", "t", "u", "u", "t~1", "x" * 128])
SESSIONS = st.sampled_from(["s", "s", "s", "z"])
JSON = st.sampled_from([None, 1, "x", [1, {"y": None}], {"a": {"b": 2}}, {"a": {"c": None}}])
OBJECTS = st.dictionaries(st.sampled_from("ab"), JSON, max_size=2)
KEYS = st.none() | st.tuples(st.sampled_from("kl"), st.sampled_from("bbbc"))
STATUSES: st.SearchStrategy[Status | None] = st.sampled_from(
    [None, None, "running", "input_required", "completed", "failed", "cancelled"]
)
PASSING = st.sampled_from([0, 0, 1, 300, 900])


def answer(ask: Callable[[], T]) -> T | type[HectorError]:
    """A refusal is an answer too."""
    try:
        return ask()
    except HectorError as error:
        return type(error)


class Machine(RuleBasedStateMachine):
    """One store, asked step by step, and the plain list of what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()
        self.portal = Portal()
        self.now = NOW
        self.instances = 1
        self.opened: AbstractAsyncContextManager[Store] = self.open()
        self.store: Store = self.portal.run(self.opened.__aenter__)

    def open(self) -> AbstractAsyncContextManager[Store]:
        raise NotImplementedError

    def close(self) -> None:
        self.portal.run(self.opened.__aexit__, None, None, None)

    def teardown(self) -> None:
        try:
            self.everything("alice", 1)
            self.everything("bob", 2)
            self.close()
        finally:
            self.portal.close()

    @property
    def instance(self) -> str:
        return f"instance-{self.instances}"

    def ask(self, call: Callable[..., Awaitable[T]], *args: Any, **members: Any) -> T | type[HectorError]:
        async def asked() -> T:
            return await call(*args, **members)

        return answer(lambda: self.portal.run(asked))

    # --- tasks
    @rule(
        passing=PASSING,
        owner=OWNERS,
        agent=AGENTS,
        task_id=TASKS,
        fingerprint=st.sampled_from("fffg"),
        session=st.none() | SESSIONS,
        metadata=OBJECTS,
        key=KEYS,
    )
    def create_task(
        self,
        passing: int,
        owner: str,
        agent: str,
        task_id: str,
        fingerprint: str,
        session: str | None,
        metadata: dict[str, Any],
        key: tuple[str, str] | None,
    ) -> None:
        self.now += passing
        new = new_task(
            task_id,
            owner=owner,
            agent_id=agent,
            fingerprint=fingerprint,
            session_id=session,
            metadata=metadata,
            instance=self.instance,
            created_at=self.now,
            idempotency=None if key is None else idempotency(*key, expires_at=self.now + 1000),
        )
        expected = answer(lambda: self.plain.create_task(new))
        accepted = self.ask(self.store.create_task, new)
        if isinstance(expected, type):
            assert accepted == expected
            return
        how, task = expected
        assert isinstance(accepted, Accepted)
        assert accepted.how == how
        if how == "created":
            if task is not None:
                renamed = self.ask(self.store.get_task_by_key, task.row.key)
                assert isinstance(renamed, TaskRow)
                self.plain.rename(task, renamed.task_id)
            task = self.plain.add(new, accepted.task.key)
        assert task is not None
        assert accepted.task == task.row

    @precondition(lambda self: self.plain.highest_key > 0)
    @rule(passing=PASSING, data=st.data())
    def append(self, passing: int, data: st.DataObject) -> None:
        self.now += passing
        known = [task.row.key for task in self.plain.tasks if not task.ended] or [1]
        keys = st.sampled_from(known) | st.sampled_from(known) | st.integers(1, self.plain.highest_key + 1)
        appends = [self.draw_append(data, key) for key in data.draw(st.lists(keys, max_size=3, unique=True))]
        assert self.ask(self.store.append, appends) == self.plain.append(appends)

    def draw_append(self, data: st.DataObject, key: int) -> Append:
        """Mostly one that fits."""
        task = self.plain.task(key)
        row = None if task is None else task.row
        shift = data.draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1]))
        first = max(1, (0 if row is None else row.last_seq) + 1 + shift)
        size = data.draw(st.integers(0, 3))
        lines = b"\n".join(b"%d" % (first + n) for n in range(size))
        status, json = data.draw(STATUSES), data.draw(JSON)
        change = None
        if status in ("running", "input_required"):
            saved = data.draw(JSON)
            told = data.draw(st.none() | st.just(Content("application/json", saved)))
            change = Change(status, question=data.draw(st.none() | st.just(Question(json, self.now, saved, told))))
        elif status is not None:
            output, error = Content("application/json", json), TaskError("c", "m", json)
            change = Change(status, output, error if status == "failed" else None, self.now)
        line = None
        if data.draw(st.booleans()):
            line = message(json, "t" if row is None else row.task_id, self.now)
        instance = data.draw(st.sampled_from([self.instance] * 7 + ["stale"]))
        return Append(key, instance, first, first + size - 1, lines, change, line)

    @precondition(lambda self: any(not task.ended for task in self.plain.tasks))
    @rule(data=st.data(), segments=st.integers(1, 6), ends=st.booleans())
    def work(self, data: st.DataObject, segments: int, ends: bool) -> None:
        """A run: its log comes segment by segment, and perhaps to an end."""
        task = data.draw(st.sampled_from([task for task in self.plain.tasks if not task.ended]))
        for n in range(segments):
            seq = task.row.last_seq + 1
            change = Change("completed", ended_at=self.now) if ends and n == segments - 1 else None
            append = Append(task.row.key, task.row.instance, seq, seq, b"%d" % seq, change)
            assert self.ask(self.store.append, [append]) == self.plain.append([append]) == frozenset()

    @rule(owner=OWNERS, agent=AGENTS, task_id=TASKS, data=st.data())
    def delete_task(self, owner: str, agent: str, task_id: str, data: st.DataObject) -> None:
        if data.draw(st.integers(0, 3)) and self.plain.tasks:
            row = data.draw(st.sampled_from(self.plain.tasks)).row
            owner, agent, task_id = row.owner, row.agent_id, row.task_id
        expected = answer(lambda: self.plain.delete_task(owner, agent, task_id))
        assert self.ask(self.store.delete_task, owner, agent, task_id) == expected

    @rule(key=st.integers(1, 9), policy=st.sampled_from(["cancel", "continue", "grace:5"]))
    def set_policy(self, key: int, policy: str) -> None:
        self.plain.set_policy(key, policy)
        assert self.ask(self.store.set_policy, key, policy) is None

    @rule()
    def take_over(self) -> None:
        self.instances += 1
        assert self.ask(self.store.take_over, self.instance) == self.plain.take_over(self.instance)

    # --- sessions
    @rule(
        passing=PASSING,
        owner=OWNERS,
        session=SESSIONS,
        agent=AGENTS,
        metadata=OBJECTS,
        state=OBJECTS,
        ttl=st.sampled_from([None, None, 1, 2]),
        limit=st.sampled_from([1, 2, 2]),
    )
    def create_session(
        self,
        passing: int,
        owner: str,
        session: str,
        agent: str,
        metadata: dict[str, Any],
        state: dict[str, Any],
        ttl: int | None,
        limit: int,
    ) -> None:
        self.now += passing
        row = new_session(
            session,
            owner=owner,
            agent_id=agent,
            metadata=metadata,
            state=state,
            ttl_seconds=ttl,
            created_at=self.now,
            last_activity_at=self.now,
        )
        expected = answer(lambda: self.plain.create_session(row, limit))
        assert self.ask(self.store.create_session, row, limit=limit) == expected

    @rule(
        passing=PASSING,
        owner=OWNERS,
        session=SESSIONS,
        state=st.none() | OBJECTS,
        metadata=JSON,
        condition=st.sampled_from([None, None, "right", "wrong"]),
    )
    def update_session(
        self, passing: int, owner: str, session: str, state: Any, metadata: Any, condition: str | None
    ) -> None:
        self.now += passing
        held = self.plain.session(owner, session)
        if_match = etag(held.row) if held is not None and condition == "right" else condition
        expected = answer(lambda: self.plain.update_session(owner, session, self.now, state, metadata, if_match))
        patches = {"state": state, "metadata": metadata, "if_match": if_match}
        assert self.ask(self.store.update_session, owner, session, now=self.now, **patches) == expected

    @rule(owner=OWNERS, session=SESSIONS)
    def delete_session(self, owner: str, session: str) -> None:
        expected = answer(lambda: self.plain.delete_session(owner, session))
        assert self.ask(self.store.delete_session, owner, session) == expected

    # --- housekeeping
    @rule(
        passing=PASSING,
        retention=st.sampled_from([0, 500, 5000]),
        log_retention=st.sampled_from([None, 0, 200, 1000]),
        limit=st.integers(1, 3),
    )
    def sweep(self, passing: int, retention: int, log_retention: int | None, limit: int) -> None:
        self.now += passing
        before = None if log_retention is None else self.now - log_retention
        bounds = {"now": self.now, "tasks_ended_before": self.now - retention, "logs_ended_before": before}
        gone: Any = limit
        while gone == limit:
            gone = self.ask(self.store.sweep, **bounds, limit=limit)
        assert 0 <= gone < limit
        assert self.ask(self.store.sweep, **bounds, limit=limit) == 0
        self.plain.sweep(*bounds.values())  # type: ignore[arg-type]

    # --- what is to be seen
    @invariant()
    def rows(self) -> None:
        """Every task that there ever was is as it must be, or gone."""
        keys = range(max(1, self.plain.highest_key - 5), self.plain.highest_key + 1)

        async def ask() -> list[TaskRow | None]:
            return [await self.store.get_task_by_key(key) for key in keys]

        held = [self.plain.task(key) for key in keys]
        assert self.portal.run(ask) == [None if task is None else task.row for task in held]

    @rule(after=st.integers(0, 9), limit_bytes=st.integers(0, 9), back=st.integers(0, 3))
    def logs(self, after: int, limit_bytes: int, back: int) -> None:
        key = self.plain.highest_key - back
        expected = read(self.plain.task(key), after, limit_bytes)
        assert self.ask(self.store.read_log, key, after, limit_bytes) == expected

    @rule(passing=PASSING, owner=OWNERS, limit=st.integers(1, 3))
    def look(self, passing: int, owner: str, limit: int) -> None:
        self.now += passing
        self.everything(owner, limit)

    def everything(self, owner: str, limit: int) -> None:
        now, store, plain = self.now, self.store, self.plain
        for task in plain.tasks:
            assert self.ask(store.read_log, task.row.key, 0, 10**6) == task.log
            row, name = task.row, (task.row.owner, task.row.agent_id, task.row.task_id)
            assert self.ask(store.get_task, *name, now=now) == (None if plain.gone(task.session, now) else row)
        filters: list[dict[str, Any]] = [
            {},
            {"agent_id": "a"},
            {"session_id": "s"},
            {"agent_id": "b", "session_id": "z"},
        ]
        for some in [*filters, {"status": "completed"}, {"agent_id": "a", "status": "pending"}]:
            listed = partial(store.list_tasks, owner, now=now, limit=limit, **some)
            self.paged(plain.list_tasks(owner, now, **some), limit, listed)
        for metadata in (None, {"a": "1"}, {"a": "x", "b": '{"a":{"b":2}}'}):
            found = partial(store.list_sessions, owner, now=now, limit=limit, metadata=metadata)
            self.paged(plain.list_sessions(owner, now, metadata), limit, found)
        for session_id in ("s", "z"):
            self.conversation(owner, session_id, limit)
        for key in (idempotency("k"), idempotency("l", "c")):
            self.idempotent(owner, key)

    def conversation(self, owner: str, session_id: str, limit: int) -> None:
        session = self.plain.session(owner, session_id)
        lines = self.plain.messages(session)
        row = None if session is None or self.plain.gone(session, self.now) else session.row
        found = self.ask(self.store.get_session, owner, session_id, now=self.now)
        assert isinstance(found, SessionRow | None)
        assert found == row
        assert self.ask(self.store.history, owner, session_id, limit=limit) == lines[-limit:]
        if row is not None:
            self.paged(lines, limit, partial(self.store.list_messages, owner, session_id, now=self.now, limit=limit))

    def idempotent(self, owner: str, key: Idempotency) -> None:
        expected = answer(lambda: self.plain.find_idempotent(owner, key, self.now))
        found = self.ask(self.store.find_idempotent, owner, key, now=self.now)
        if isinstance(expected, PlainTask):
            assert found == Accepted("replayed", expected.row)
        else:
            assert found == expected

    def paged(self, items: list[T], limit: int, ask: Callable[..., Awaitable[Page[T]]]) -> None:
        """Every page is the next ``limit`` of the items."""
        token = ""
        for start in range(0, max(len(items), 1), limit):
            page = self.ask(ask, token=token)
            assert isinstance(page, Page)
            assert page.items == items[start : start + limit]
            assert page.total == len(items)
            token = page.next_token
        assert token == ""


def read(task: PlainTask | None, after: int, limit_bytes: int) -> list[Segment]:
    """What ``read_log`` promises."""
    beyond = [] if task is None else [segment for segment in task.log if segment.last_seq > after]
    fitting = [n for n in range(len(beyond) + 1) if sum(len(segment.data) for segment in beyond[:n]) <= limit_bytes]
    return beyond[: max(1, fitting[-1])]


class MemoryMachine(Machine):
    def open(self) -> AbstractAsyncContextManager[Store]:
        return open_memory(self.instance)


class SqlMachine(Machine):
    """Also through ends of the process, orderly ones and others. Every transaction of a removal is as short as it may
    be, so that what is going is there in all states of going."""

    new: Path
    """An empty store: to migrate one for every example would take most of the time."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0" / "hector.db"
        shutil.copytree(self.new, self.path.parent)
        super().__init__()

    def open(self) -> AbstractAsyncContextManager[Store]:
        return open_sql(self.path, instance=self.instance)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        """A crash: goes on with the files as a process that dies now leaves them."""
        moved = self.folder / str(self.instances) / "hector.db"
        if crash:
            moved.parent.mkdir()
            for file in self.path.parent.glob("hector.db*"):
                if not file.name.endswith("-shm"):
                    shutil.copy(file, moved.parent)
        self.close()
        self.path = moved if crash else self.path
        self.instances += 1
        self.opened = self.open()
        self.store = self.portal.run(self.opened.__aenter__)


BOUNDS = settings(
    deadline=None,
    max_examples=25,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_the_memory_store_answers_as_the_plain_list_does() -> None:
    run(MemoryMachine)


def test_the_sql_store_answers_as_the_plain_list_does_also_after_restarts_and_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_removal, "SLICE_SECONDS", 0)
    portal = Portal()

    async def make() -> None:
        async with open_sql(tmp_path / "hector.db", instance="nobody"):
            pass

    portal.run(make)
    portal.close()
    monkeypatch.setattr(SqlMachine, "new", tmp_path, raising=False)
    run(SqlMachine)


def run(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=BOUNDS)
