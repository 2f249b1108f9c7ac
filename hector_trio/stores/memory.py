"""The store that forgets everything with the process: for trying things out, and as the model of the others."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import AsyncIterator, Iterable, Sequence
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
    Idempotency,
    NewTask,
    Page,
    Segment,
    State,
    StoreStatistics,
)
from hector_trio.stores.rules import (
    Quota,
    check_appends,
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


class _Session:
    """A session, its conversation (each line with the key of its task) and the keys of its tasks, oldest first."""

    def __init__(self, key: int, row: SessionRow) -> None:
        self.key = key
        self.row = row
        self.messages: list[tuple[int, MessageRow]] = []
        self.tasks: dict[int, None] = {}

    def expired(self, now: int) -> bool:
        expires = self.row.expires_at
        return expires is not None and expires <= now

    def touch(self, at: int) -> None:
        if self.row.last_activity_at < at:
            self.row = replace(self.row, last_activity_at=at)


class _Task:
    def __init__(self, row: TaskRow, session: _Session | None) -> None:
        self.row = row
        self.session = session
        self.log: list[Segment] = []
        self.used_by: list[tuple[str, str, str]] = []
        """The idempotency keys that lead here (some may lead elsewhere by now)."""


class MemoryStore:
    """The Store protocol in dictionaries; see there for what each method promises. Made by ``open_memory``.

    A method waits once, before it begins, and never again: so it is a transaction, and a cancel that comes late finds
    it finished. Rows are frozen; what JSON they hold is copied on the way in and on the way out.
    """

    def __init__(self) -> None:
        self._next_task = 1
        self._next_session = 1
        self._tasks: dict[int, _Task] = {}
        self._unpruned: dict[int, _Task] = {}
        """Those that have ended and whose log is whole."""
        self._lists: dict[tuple[str, str | None], dict[int, None]] = {}
        """The tasks of an owner, and of an owner and an agent, oldest first."""
        self._names: dict[tuple[str, str, str], int] = {}
        self._numbers: dict[tuple[str, str, str], list[int]] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._idempotency: dict[tuple[str, str, str], tuple[Idempotency, int]] = {}
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
        self._tasks[row.key] = _Task(row, session)
        for of in ((row.owner, None), (row.owner, row.agent_id)):
            self._lists.setdefault(of, {})[row.key] = None
        self._size += len(row.request)
        self._name(row)
        self._remember(new.owner, new.idempotency, row.key)
        if session is not None:
            session.tasks[row.key] = None
            session.touch(new.created_at)
        return Accepted("created", _task_out(row))

    async def find_idempotent(self, owner: str, idempotency: Idempotency, *, now: int) -> Accepted | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        used = self._used(owner, idempotency, now)
        return None if used is None else Accepted("replayed", _task_out(used.row))

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        check_appends(appends)
        appends = [_append_copy(append) for append in appends]
        await self._begin()
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
            if (change := append.change) is not None:
                task.row = replace(
                    task.row,
                    status=change.status,
                    output=change.output,
                    error=change.error,
                    ended_at=change.ended_at,
                    question=change.question,
                    status_at=task.row.status_at if change.status_at is None else change.status_at,
                    mark=change.mark,
                )
                if change.ended_at is not None:
                    self._unpruned[append.key] = task
                    if task.session is not None:
                        task.session.touch(change.ended_at)
            if append.message is not None and task.session is not None:
                task.session.messages.append((append.key, append.message))
                task.session.touch(append.message.created_at)
            self._remember(task.row.owner, append.idempotency, append.key)
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
        return None if task is None or self._is_gone(task.session, time_of(now)) else _task_out(task.row)

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
        among: Iterable[int] = self._lists.get((owner, agent_id), ())
        if session_id is not None:
            of = self._sessions.get((owner, session_id))
            among = of.tasks if of is not None else ()
        rows = [
            row
            for row, session in ((self._tasks[key].row, self._tasks[key].session) for key in among)
            if row.owner == owner
            and agent_id in (None, row.agent_id)
            and status in (None, row.status)
            and not self._is_gone(session, at)
        ]
        rest = (row for row in reversed(rows) if position is None or row.key < position)
        page, more = fitting(rest, _task_size, limit, limit_bytes)
        return Page([_task_out(row) for row in page], len(rows), page_token(page[-1].key, question) if more else "")

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
        rows = [
            row
            for row, session in (
                (self._tasks[key].row, self._tasks[key].session) for key in self._lists.get((owner, agent_id), ())
            )
            if row.mark != "reply"
            and session_id in (None, row.session_id)
            and (not states or (row.status, row.mark) in states)
            and (since is None or row.status_at >= since)
            and not self._is_gone(session, at)
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

    # --- sessions -----------------------------------------------------------------------------------------------------
    async def create_session(self, row: SessionRow, *, limit: int) -> None:
        row = _session_copy(row)
        await self._begin()
        now = row.created_at
        name = (row.owner, row.session_id)
        same = self._sessions.get(name)
        if same is not None and not self._is_gone(same, now):
            raise SessionExists(f"Session {row.session_id} exists")

        def held() -> int:
            return sum(owner == row.owner and not self._is_gone(one, now) for (owner, _), one in self._sessions.items())

        if not self._quota.admits(row.owner, limit, held):
            raise RateLimited(f"No more than {limit} sessions")
        if same is not None:
            self._remove_session(same)
        self._sessions[name] = _Session(self._next_session, row)
        self._next_session += 1

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
        found = [
            session
            for (of, _), session in self._sessions.items()
            if of == owner
            and not self._is_gone(session, now)
            and agent_id in (None, session.row.agent_id)
            and (not metadata or _has(session.row, metadata))
        ]
        rest = (one for one in reversed(found) if position is None or one.key < position)
        page, more = fitting(rest, lambda one: _size(one.row.state) + _size(one.row.metadata), limit, limit_bytes)
        items = [_session_copy(session.row) for session in page]
        return Page(items, len(found), page_token(page[-1].key, question) if more else "")

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
        session.row = _session_copy(row)
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
        lines, more = fitting(islice(session.messages, start, None), _line_size, limit, limit_bytes)
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
        keys = [name for name, (used, _) in self._idempotency.items() if used.expires_at <= now][:limit]
        for name in keys:
            del self._idempotency[name]
        gone = len(keys)
        old = [
            task
            for task in self._tasks.values()
            if task.session is None and task.row.ended_at is not None and task.row.ended_at < tasks_ended_before
        ]
        old.sort(key=lambda task: task.row.ended_at or 0)
        for task in old[: limit - gone]:
            self._remove_task(task)
            gone += 1
        expired = [one for one in self._sessions.values() if self._is_gone(one, now)]
        for session in sorted(expired, key=lambda one: (one.row.expires_at, one.key)):
            for key in list(session.tasks)[: limit - gone]:
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
        old = [
            task
            for task in self._unpruned.values()
            if task.row.ended_at is not None and task.row.ended_at < ended_before
        ]
        old.sort(key=lambda task: task.row.ended_at or 0)
        for task in old[:limit]:
            self._size -= sum(len(segment.data) for segment in task.log[:-1])
            del task.log[:-1]
            del self._unpruned[task.row.key]
        return len(old[:limit])

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
        if self._is_gone(task.session, now):
            return None
        if found[0].body_hash != key.body_hash:
            raise IdempotencyMismatch("The idempotency key was used with another body")
        return task

    def _remember(self, owner: str, key: Idempotency | None, task_key: int) -> None:
        if key is not None:
            name = (owner, key.route, key.key)
            self._idempotency[name] = (key, task_key)
            self._tasks[task_key].used_by.append(name)

    def _session(self, owner: str, session_id: str, now: int) -> _Session | None:
        session = self._sessions.get((owner, session_id))
        return None if session is None or self._is_gone(session, now) else session

    def _is_gone(self, session: _Session | None, now: int) -> bool:
        """It has expired and none of its tasks is at work."""
        return session is not None and session.expired(now) and all(self._tasks[key].row.ended for key in session.tasks)

    def _remove_task(self, task: _Task) -> None:
        row = task.row
        del self._tasks[row.key]
        self._unpruned.pop(row.key, None)
        for of in ((row.owner, None), (row.owner, row.agent_id)):
            del self._lists[of][row.key]
            if not self._lists[of]:
                del self._lists[of]
        self._unname(row)
        self._size -= len(row.request) + sum(len(segment.data) for segment in task.log)
        if task.session is not None:
            del task.session.tasks[row.key]
        for name in task.used_by:
            if name in self._idempotency and self._idempotency[name][1] == row.key:
                del self._idempotency[name]

    def _remove_session(self, session: _Session) -> None:
        for key in list(session.tasks):
            self._remove_task(self._tasks[key])
        del self._sessions[session.row.owner, session.row.session_id]

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
