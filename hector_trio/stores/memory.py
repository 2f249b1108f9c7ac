"""The store that forgets everything with the process: for trying things out, and as the model of the others."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, TypeVar

import msgspec
import trio
from msgspec.structs import replace

from hector_trio.errors import (
    IdempotencyMismatch,
    RateLimited,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.models import Content, TaskError, encode
from hector_trio.session import MessageRow, SessionRow
from hector_trio.stores import (
    HISTORY_BYTES,
    PAGE_BYTES,
    SESSION_BYTES,
    Accepted,
    Append,
    Change,
    Idempotency,
    NewPush,
    NewTask,
    Page,
    Push,
    PushMove,
    Segment,
    State,
    StoreStatistics,
)
from hector_trio.stores.order import Due, Lists
from hector_trio.stores.rules import (
    Quota,
    check_appends,
    check_pushes,
    fitting,
    next_name,
    page_position,
    page_token,
    pair_position,
    pair_token,
    patched,
    split_name,
    text_of,
    time_of,
)
from hector_trio.task import Question, TaskRow

T = TypeVar("T", Content, TaskError, MessageRow, Question)


@asynccontextmanager
async def open_memory(instance: str) -> AsyncIterator[MemoryStore]:
    """Opens an empty store for the process called ``instance``; what it holds is gone at the end."""
    yield MemoryStore()


_ListName = tuple[str, str | None, tuple[str, str] | None]
"""The owner, perhaps an agent, and perhaps a member of the metadata."""


class _Session:
    """A session, its conversation (each line with the key of its task) and the keys of its tasks, oldest first."""

    def __init__(self, key: int, row: SessionRow) -> None:
        self.key = key
        self.row = row
        self.messages: list[tuple[int, MessageRow]] = []
        self.tasks: dict[int, None] = {}
        self.unfinished: set[int] = set()

    def expired(self, now: int) -> bool:
        expires = self.row.expires_at
        return expires is not None and expires <= now

    def is_gone(self, now: int) -> bool:
        """It has expired and none of its tasks is at work."""
        return self.expired(now) and not self.unfinished

    @property
    def lists(self) -> list[_ListName]:
        """The lists in which it stands: of its owner, its agent, and each member of its metadata."""
        row = self.row
        labels = [None, *((name, text_of(value)) for name, value in row.metadata.items())]
        return [(row.owner, agent, label) for agent in (None, row.agent_id) for label in labels]


class _Task:
    __slots__ = ("log", "pushes", "row", "session", "used_by")

    def __init__(self, row: TaskRow, session: _Session | None) -> None:
        self.row = row
        self.session = session
        self.log: list[Segment] = []
        self.used_by: tuple[tuple[str, str, str], ...] = ()
        """The idempotency keys that lead here (some may lead elsewhere by now)."""
        self.pushes: dict[str, Push] = {}

    @property
    def lists(self) -> list[tuple[str, str | None, str | None]]:
        """The lists in which it stands: of its owner, its agent, and its status."""
        row = self.row
        return [(row.owner, agent, status) for agent in (None, row.agent_id) for status in (None, row.status)]

    def check_push(self, new: NewPush) -> None:
        check_pushes(len(self.pushes.keys() - {new.push.config_id}), new.limit)


class MemoryStore:
    """The Store protocol in dictionaries; see there for what each method promises. Made by ``open_memory``.

    A method waits once, before it begins, and never again: so it is a transaction, and a cancel that comes late finds
    it finished. Rows are frozen; what JSON they hold is copied on the way in and on the way out.
    """

    def __init__(self) -> None:
        self._next_task = 1
        self._next_session = 1
        self._tasks: dict[int, _Task] = {}
        self._task_lists: Lists[tuple[str, str | None, str | None]] = Lists()
        self._ended: Due[int] = Due()
        """When tasks without a session have ended."""
        self._unpruned: Due[int] = Due()
        """When those have ended whose log is whole."""
        self._names: dict[tuple[str, str, str], int] = {}
        self._numbers: dict[tuple[str, str, str], list[int]] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._session_keys: dict[int, _Session] = {}
        self._session_lists: Lists[_ListName] = Lists()
        self._expiring: Due[tuple[str, str]] = Due()
        self._idempotency: dict[tuple[str, str, str], tuple[Idempotency, int]] = {}
        self._idempotency_due: Due[tuple[str, str, str]] = Due()
        self._quota = Quota()
        self._size = 0
        self._operations = 0

    async def _begin(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._operations += 1

    # --- tasks and logs -----------------------------------------------------------------------------------------------
    async def create_task(self, new: NewTask) -> Accepted:
        metadata = _copy(new.metadata)
        await self._begin()
        used = self._used(new.owner, new.idempotency, new.created_at)
        if used is not None:
            return Accepted("replayed", _task_out(used.row))
        session = None
        if new.session_id is not None:
            session = self._session(new.owner, new.session_id, new.created_at)
            if session is None:
                raise SessionNotFound(f"No session {new.session_id}")
            if session.row.agent_id != new.agent_id:
                raise SessionMismatch(f"Session {new.session_id} belongs to agent {session.row.agent_id}")
        same = self._named(new.owner, new.agent_id, new.task_id)
        if same is not None and not same.row.ended:
            if same.row.fingerprint != new.fingerprint:
                raise TaskExists(f"Task {new.task_id} has not ended and is a different one", task_id=new.task_id)
            self._remember(new.owner, new.idempotency, same.row.key)
            return Accepted("running", _task_out(same.row))
        if same is not None:
            name = next_name(new.task_id, lambda stem: self._highest(new.owner, new.agent_id, stem))
            self._unname(same.row)
            same.row = replace(same.row, task_id=name)
            self._name(same.row)
        row = TaskRow(
            key=self._next_task,
            owner=new.owner,
            agent_id=new.agent_id,
            task_id=new.task_id,
            status="pending",
            request=new.request,
            fingerprint=new.fingerprint,
            policy=new.policy,
            instance=new.instance,
            metadata=metadata,
            created_at=new.created_at,
            session_id=new.session_id,
            status_at=new.created_at,
        )
        self._next_task += 1
        task = self._tasks[row.key] = _Task(row, session)
        self._task_lists.add(task.lists, row.key)
        self._size += len(row.request)
        self._name(row)
        self._remember(new.owner, new.idempotency, row.key)
        if session is not None:
            session.tasks[row.key] = None
            session.unfinished.add(row.key)
            self._touch(session, new.created_at)
        if new.push is not None:
            task.pushes[new.push.config_id] = replace(new.push, key=row.key)
        return Accepted("created", _task_out(row))

    async def find_idempotent(self, owner: str, idempotency: Idempotency, *, now: int) -> Accepted | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        used = self._used(owner, idempotency, now)
        return None if used is None else Accepted("replayed", _task_out(used.row))

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        check_appends(appends)
        appends = [_append_copy(append) for append in appends]
        await self._begin()
        for append in appends:
            if append.push is not None and append.key in self._tasks:
                self._tasks[append.key].check_push(append.push)
        refused = set()
        for append in appends:
            task = self._tasks.get(append.key)
            fits = (append.instance, append.first_seq - 1, False)
            if task is None or (task.row.instance, task.row.last_seq, task.row.ended) != fits:
                refused.add(append.key)
                continue
            if append.data:
                task.log.append(Segment(append.first_seq, append.last_seq, append.data))
                self._size += len(append.data)
            task.row = replace(task.row, last_seq=append.last_seq)
            if append.change is not None:
                self._change(task, append.change)
            if append.message is not None and task.session is not None:
                task.session.messages.append((append.key, append.message))
                self._touch(task.session, append.message.created_at)
            self._remember(task.row.owner, append.idempotency, append.key)
            if append.push is not None:
                task.pushes[append.push.push.config_id] = append.push.push
        return frozenset(refused)

    async def read_log(self, key: int, after: int, limit_bytes: int) -> list[Segment]:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = self._tasks.get(key)
        if task is None:
            return []
        found: list[Segment] = []
        room = limit_bytes
        for segment in task.log[bisect_right(task.log, after, key=lambda segment: segment.last_seq) :]:
            room -= len(segment.data)
            if found and room < 0:
                break
            found.append(segment)
        return found

    async def get_task(self, owner: str, agent_id: str, task_id: str, *, now: int | None = None) -> TaskRow | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = self._named(owner, agent_id, task_id)
        if task is None or (task.session is not None and task.session.is_gone(time_of(now))):
            return None
        return _task_out(task.row)

    async def get_task_by_key(self, key: int) -> TaskRow | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = self._tasks.get(key)
        return None if task is None else _task_out(task.row)

    async def list_tasks(
        self,
        owner: str,
        *,
        now: int | None = None,
        agent_id: str | None = None,
        session_id: str | None = None,
        status: str | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[TaskRow]:
        question = ("tasks", owner, agent_id, session_id, status)
        position = page_position(token, question)
        await trio.lowlevel.checkpoint_if_cancelled()
        at = time_of(now)
        gone = self._gone(owner, at)

        def listed(row: TaskRow) -> bool:
            return agent_id in (None, row.agent_id) and status in (None, row.status)

        if session_id is None:
            name = (owner, agent_id, status)
            among = self._task_lists.newest(name, position)
            total = self._task_lists.count(name)
            total -= sum(listed(self._tasks[key].row) for session in gone for key in session.tasks)
            rest = (task.row for task in map(self._tasks.__getitem__, among) if task.session not in gone)
        else:
            session = self._session(owner, session_id, at)
            rows = [row for key in (session.tasks if session else ()) if listed(row := self._tasks[key].row)]
            total = len(rows)
            rest = (row for row in reversed(rows) if position is None or row.key < position)
        page, more = fitting(rest, _task_size, limit, limit_bytes)
        return Page([_task_out(row) for row in page], total, page_token(page[-1].key, question) if more else "")

    async def recent_tasks(
        self,
        owner: str,
        agent_id: str,
        *,
        now: int | None = None,
        session_id: str | None = None,
        states: Sequence[State] = (),
        since: int | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[TaskRow]:
        question = ("recent", owner, agent_id, session_id, sorted(states, key=str), since)
        before = pair_position(token, question)
        await trio.lowlevel.checkpoint_if_cancelled()
        at = time_of(now)
        gone = self._gone(owner, at)
        tasks = map(self._tasks.__getitem__, self._task_lists.newest((owner, agent_id, None)))
        rows = [
            task.row
            for task in tasks
            if task.session not in gone
            and task.row.mark != "reply"
            and session_id in (None, task.row.session_id)
            and (not states or (task.row.status, task.row.mark) in states)
            and (since is None or task.row.status_at >= since)
        ]
        rows.sort(key=lambda row: (row.status_at, row.key), reverse=True)
        rest = (row for row in rows if before is None or (row.status_at, row.key) < before)
        page, more = fitting(rest, _task_size, limit, limit_bytes)
        token = pair_token(page[-1].status_at, page[-1].key, question) if more else ""
        return Page([_task_out(row) for row in page], len(rows), token)

    async def task_messages(self, key: int, *, limit: int, limit_bytes: int = PAGE_BYTES) -> list[MessageRow]:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = self._tasks.get(key)
        if task is None or task.session is None:
            return []
        lines = (line for line in reversed(task.session.messages) if line[0] == key)
        found, _ = fitting(lines, lambda line: _line_size(line) + len(line[1].original or b""), limit, limit_bytes)
        return [replace(self._message_out(*line), original=line[1].original) for line in reversed(found)]

    async def delete_task(self, owner: str, agent_id: str, task_id: str) -> None:
        await self._begin()
        task = self._named(owner, agent_id, task_id)
        if task is None:
            raise TaskNotFound(f"No task {task_id}", task_id=task_id)
        if not task.row.ended:
            raise TaskRunning(f"Task {task_id} has not ended", task_id=task_id)
        self._remove_task(task)

    async def set_policy(self, key: int, policy: str) -> None:
        await self._begin()
        task = self._tasks.get(key)
        if task is not None and not task.row.ended:
            task.row = replace(task.row, policy=policy)

    async def take_over(self, instance: str) -> list[TaskRow]:
        await self._begin()
        orphans = [task for task in self._tasks.values() if not task.row.ended and task.row.instance != instance]
        for task in orphans:
            task.row = replace(task.row, instance=instance)
        return [_task_out(task.row) for task in orphans]

    # --- webhooks -----------------------------------------------------------------------------------------------------
    async def put_push(self, new: NewPush) -> None:
        await self._begin()
        task = self._tasks.get(new.push.key)
        if task is None:
            raise TaskNotFound("The task is gone")
        task.check_push(new)
        task.pushes[new.push.config_id] = new.push

    async def list_pushes(self, key: int) -> list[Push]:
        await trio.lowlevel.checkpoint_if_cancelled()
        task = self._tasks.get(key)
        return [] if task is None else [task.pushes[name] for name in sorted(task.pushes)]

    async def delete_push(self, key: int, config_id: str) -> None:
        await self._begin()
        if (task := self._tasks.get(key)) is not None:
            task.pushes.pop(config_id, None)

    async def move_pushes(self, moves: Sequence[PushMove]) -> frozenset[tuple[int, str]]:
        await self._begin()
        gone = set()
        for move in moves:
            task = self._tasks.get(move.key)
            if task is None or move.config_id not in task.pushes:
                gone.add((move.key, move.config_id))
            else:
                push = task.pushes[move.config_id]
                task.pushes[move.config_id] = replace(push, seq=move.seq, over_at=move.over_at)
        return frozenset(gone)

    async def take_over_pushes(self, instance: str) -> list[Push]:
        await self._begin()
        found = []
        for task in self._tasks.values():
            for name, push in sorted(task.pushes.items()):
                if push.over_at is None:
                    task.pushes[name] = replace(push, instance=instance)
                    found.append(task.pushes[name])
        return found

    # --- sessions -----------------------------------------------------------------------------------------------------
    async def create_session(self, row: SessionRow, *, limit: int) -> None:
        row = _session_copy(row)
        await self._begin()
        now = row.created_at
        name = (row.owner, row.session_id)
        same = self._sessions.get(name)
        if same is not None and not same.is_gone(now):
            raise SessionExists(f"Session {row.session_id} exists")

        def held() -> int:
            return self._session_lists.count((row.owner, None, None)) - len(self._gone(row.owner, now))

        if not self._quota.admits(row.owner, limit, held):
            raise RateLimited(f"No more than {limit} sessions")
        if same is not None:
            self._remove_session(same)
        session = self._sessions[name] = _Session(self._next_session, row)
        self._next_session += 1
        self._session_keys[session.key] = session
        self._session_lists.add(session.lists, session.key)
        self._set_expiry(session)

    async def get_session(self, owner: str, session_id: str, *, now: int) -> SessionRow | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        session = self._session(owner, session_id, now)
        return None if session is None else _session_copy(session.row)

    async def list_sessions(
        self,
        owner: str,
        *,
        now: int,
        agent_id: str | None = None,
        metadata: dict[str, str] | None = None,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[SessionRow]:
        question = ("sessions", owner, agent_id, metadata or None)
        position = page_position(token, question)
        await trio.lowlevel.checkpoint_if_cancelled()
        texts = metadata or {}

        def listed(session: _Session) -> bool:
            return agent_id in (None, session.row.agent_id) and _has(session.row, texts)

        # of several members that are asked for, the one that the fewest have
        names: list[_ListName] = [(owner, agent_id, label) for label in texts.items()] or [(owner, agent_id, None)]
        name = min(names, key=self._session_lists.count)
        gone = self._gone(owner, now)
        if len(names) == 1:
            total = self._session_lists.count(name) - sum(map(listed, gone))
        else:
            total = sum(
                session not in gone and listed(session)
                for session in map(self._session_keys.__getitem__, self._session_lists.newest(name))
            )
        among = map(self._session_keys.__getitem__, self._session_lists.newest(name, position))
        rest = (session for session in among if session not in gone and listed(session))
        page, more = fitting(rest, lambda one: _size(one.row.state) + _size(one.row.metadata), limit, limit_bytes)
        items = [_session_copy(session.row) for session in page]
        return Page(items, total, page_token(page[-1].key, question) if more else "")

    async def update_session(
        self,
        owner: str,
        session_id: str,
        *,
        now: int,
        state: Any = None,
        metadata: Any = None,
        if_match: str | None = None,
        limit_bytes: int = SESSION_BYTES,
    ) -> SessionRow:
        await self._begin()
        session = self._session(owner, session_id, now)
        if session is None:
            raise SessionNotFound(f"No session {session_id}")
        row = patched(session.row, now=now, state=state, metadata=metadata, if_match=if_match, limit_bytes=limit_bytes)
        self._session_lists.remove(session.lists, session.key)
        session.row = _session_copy(row)
        self._session_lists.add(session.lists, session.key)
        self._set_expiry(session)
        return _session_copy(row)

    async def delete_session(self, owner: str, session_id: str) -> None:
        await self._begin()
        session = self._sessions.get((owner, session_id))
        if session is None:
            raise SessionNotFound(f"No session {session_id}")
        self._remove_session(session)

    async def list_messages(
        self,
        owner: str,
        session_id: str,
        *,
        now: int,
        limit: int = 50,
        limit_bytes: int = PAGE_BYTES,
        token: str = "",
    ) -> Page[MessageRow]:
        question = ("messages", owner, session_id)
        position = page_position(token, question)
        await trio.lowlevel.checkpoint_if_cancelled()
        session = self._session(owner, session_id, now)
        if session is None:
            raise SessionNotFound(f"No session {session_id}")
        start = position or 0
        lines, more = fitting(
            map(session.messages.__getitem__, range(start, len(session.messages))), _line_size, limit, limit_bytes
        )
        items = [self._message_out(*line) for line in lines]
        return Page(items, len(session.messages), page_token(start + len(lines), question) if more else "")

    async def history(
        self, owner: str, session_id: str, *, limit: int, limit_bytes: int = HISTORY_BYTES
    ) -> list[MessageRow]:
        await trio.lowlevel.checkpoint_if_cancelled()
        session = self._sessions.get((owner, session_id))
        if session is None:
            return []
        lines, _ = fitting(reversed(session.messages), _line_size, limit, limit_bytes)
        return [self._message_out(*line) for line in reversed(lines)]

    # --- housekeeping -------------------------------------------------------------------------------------------------
    async def sweep(
        self, *, now: int, tasks_ended_before: int, limit: int, logs_ended_before: int | None = None
    ) -> int:
        await self._begin()
        keys = self._idempotency_due.until(now, limit)
        for name in keys:
            del self._idempotency[name]
            self._idempotency_due.discard(name)
        gone = len(keys)
        for task_key in self._ended.until(tasks_ended_before - 1, limit - gone):
            self._remove_task(self._tasks[task_key])
            gone += 1
        for session in self._gone(None, now):
            for key in list(islice(session.tasks, limit - gone)):
                self._remove_task(self._tasks[key])
                gone += 1
            if gone >= limit:
                break
            self._remove_session(session)
            gone += 1
        return gone + self._prune(logs_ended_before, limit - gone)

    async def check(self) -> None:
        await self._begin()

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(self._size, self._operations, 0.0, self._operations)

    def _prune(self, ended_before: int | None, limit: int) -> int:
        if ended_before is None:
            return 0
        keys = self._unpruned.until(ended_before - 1, limit)
        for key in keys:
            log = self._tasks[key].log
            self._size -= sum(len(segment.data) for segment in log[:-1])
            del log[:-1]
            self._unpruned.discard(key)
        return len(keys)

    # --- inside: nothing below waits ----------------------------------------------------------------------------------
    def _named(self, owner: str, agent_id: str, task_id: str) -> _Task | None:
        key = self._names.get((owner, agent_id, task_id))
        return None if key is None else self._tasks[key]

    def _name(self, row: TaskRow) -> None:
        stem, number = split_name(row.task_id)
        self._names[row.owner, row.agent_id, row.task_id] = row.key
        insort(self._numbers.setdefault((row.owner, row.agent_id, stem), []), number)

    def _unname(self, row: TaskRow) -> None:
        stem, number = split_name(row.task_id)
        del self._names[row.owner, row.agent_id, row.task_id]
        numbers = self._numbers[row.owner, row.agent_id, stem]
        numbers.remove(number)
        if not numbers:
            del self._numbers[row.owner, row.agent_id, stem]

    def _highest(self, owner: str, agent_id: str, stem: str) -> int:
        numbers = self._numbers.get((owner, agent_id, stem))
        return numbers[-1] if numbers else 0

    def _used(self, owner: str, key: Idempotency | None, now: int) -> _Task | None:
        found = None if key is None else self._idempotency.get((owner, key.route, key.key))
        if key is None or found is None or found[0].expires_at <= now:
            return None
        task = self._tasks[found[1]]
        if task.session is not None and task.session.is_gone(now):
            return None
        if found[0].body_hash != key.body_hash:
            raise IdempotencyMismatch("The idempotency key was used with another body")
        return task

    def _remember(self, owner: str, key: Idempotency | None, task_key: int) -> None:
        if key is not None:
            name = (owner, key.route, key.key)
            self._idempotency[name] = (key, task_key)
            self._idempotency_due.set(name, key.expires_at)
            self._tasks[task_key].used_by += (name,)

    def _session(self, owner: str, session_id: str, now: int) -> _Session | None:
        session = self._sessions.get((owner, session_id))
        return None if session is None or session.is_gone(now) else session

    def _gone(self, owner: str | None, now: int) -> list[_Session]:
        """The sessions (of ``owner``) that have expired and are not at work: few, for sweeping removes them."""
        due = (self._sessions[name] for name in self._expiring.until(now) if owner in (None, name[0]))
        return [session for session in due if not session.unfinished]

    def _touch(self, session: _Session, at: int) -> None:
        if session.row.last_activity_at < at:
            session.row = replace(session.row, last_activity_at=at)
            self._set_expiry(session)

    def _set_expiry(self, session: _Session) -> None:
        expires = session.row.expires_at
        if expires is not None:
            self._expiring.set((session.row.owner, session.row.session_id), expires)

    def _change(self, task: _Task, change: Change) -> None:
        row = task.row
        if change.status != row.status:
            self._task_lists.remove(task.lists, row.key)
        task.row = replace(
            row,
            status=change.status,
            output=change.output,
            error=change.error,
            ended_at=change.ended_at,
            question=change.question,
            status_at=row.status_at if change.status_at is None else change.status_at,
            mark=change.mark,
        )
        if change.status != row.status:
            self._task_lists.add(task.lists, row.key)
        if change.ended_at is None:
            return
        self._unpruned.set(row.key, change.ended_at)
        if task.session is None:
            self._ended.set(row.key, change.ended_at)
        else:
            task.session.unfinished.discard(row.key)
            self._touch(task.session, change.ended_at)

    def _remove_task(self, task: _Task) -> None:
        row = task.row
        del self._tasks[row.key]
        self._unpruned.discard(row.key)
        self._ended.discard(row.key)
        self._task_lists.remove(task.lists, row.key)
        self._unname(row)
        self._size -= len(row.request) + sum(len(segment.data) for segment in task.log)
        if task.session is not None:
            del task.session.tasks[row.key]
            task.session.unfinished.discard(row.key)
        for name in task.used_by:
            if name in self._idempotency and self._idempotency[name][1] == row.key:
                del self._idempotency[name]
                self._idempotency_due.discard(name)

    def _remove_session(self, session: _Session) -> None:
        for key in list(session.tasks):
            self._remove_task(self._tasks[key])
        name = (session.row.owner, session.row.session_id)
        del self._sessions[name], self._session_keys[session.key]
        self._session_lists.remove(session.lists, session.key)
        self._expiring.discard(name)

    def _message_out(self, task_key: int, message: MessageRow) -> MessageRow:
        # a task that was replaced has another name by now
        task = self._tasks.get(task_key)
        name = message.task_id if task is None else task.row.task_id
        return replace(message, task_id=name, content=_copy(message.content), original=None)


def _copy(value: Any) -> Any:
    """``value`` as it would be read from a disk: JSON, and nobody else's."""
    return value if isinstance(value, str) else msgspec.json.decode(encode(value))


def _fresh(value: T | None) -> T | None:
    """The same with nobody else's JSON in it."""
    return None if value is None else msgspec.json.decode(encode(value), type=type(value))


def _size(value: Any) -> int:
    return len(encode(value))


def _task_size(row: TaskRow) -> int:
    size = len(row.request) + _size(row.metadata)
    return size + sum(_size(part) for part in (row.output, row.error, row.question) if part is not None)


def _line_size(line: tuple[int, MessageRow]) -> int:
    return _size(line[1].content)


def _task_out(row: TaskRow) -> TaskRow:
    if not row.metadata and row.output is None and row.error is None and row.question is None:
        return replace(row, metadata={})
    return replace(
        row,
        metadata=_copy(row.metadata),
        output=_fresh(row.output),
        error=_fresh(row.error),
        question=_fresh(row.question),
    )


def _append_copy(append: Append) -> Append:
    change = append.change
    if change is not None:
        output, error, question = _fresh(change.output), _fresh(change.error), _fresh(change.question)
        change = replace(change, output=output, error=error, question=question)
    return replace(append, change=change, message=_fresh(append.message))


def _session_copy(row: SessionRow) -> SessionRow:
    return replace(row, state=_copy(row.state), metadata=_copy(row.metadata))


def _has(row: SessionRow, metadata: dict[str, str]) -> bool:
    return all(name in row.metadata and text_of(row.metadata[name]) == text for name, text in metadata.items())
