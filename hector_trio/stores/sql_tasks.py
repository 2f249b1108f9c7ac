"""Tasks and their logs in SQL: the statements, and what is done with them inside a transaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import msgspec
from msgspec.structs import replace
from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, tuple_, update

from hector_trio.errors import (
    IdempotencyMismatch,
    SessionMismatch,
    SessionNotFound,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.models import Content, TaskError, encode
from hector_trio.stores import Accepted, Append, Idempotency, NewTask, Page, Segment, State, sql_push
from hector_trio.stores.rules import (
    fitting,
    next_name,
    page_position,
    page_token,
    pair_position,
    pair_token,
    split_name,
)
from hector_trio.stores.schema import NEVER, bodies, idempotency, segments, sessions, tasks
from hector_trio.stores.sql_removal import HELD, Slice, alive, remove_task
from hector_trio.stores.sql_sessions import add_message, byte_count, live_session, touch
from hector_trio.stores.writer import Again
from hector_trio.task import Question, TaskRow

# --- rows -------------------------------------------------------------------------------------------------------------

_TASK = select(
    tasks.c.key,
    tasks.c.owner,
    tasks.c.agent_id,
    tasks.c.task_id,
    tasks.c.status,
    bodies.c.request,
    tasks.c.fingerprint,
    tasks.c.policy,
    tasks.c.instance,
    bodies.c.metadata,
    tasks.c.created_at,
    tasks.c.session_id,
    tasks.c.last_seq,
    bodies.c.output,
    bodies.c.error,
    tasks.c.ended_at,
    bodies.c.question,
    tasks.c.status_at,
    tasks.c.mark,
).join_from(tasks, bodies, bodies.c.task_key == tasks.c.key)

_BY_KEY = _TASK.where(tasks.c.key == bindparam("key"), HELD)
_BY_NAME = _TASK.where(
    tasks.c.owner == bindparam("owner"),
    tasks.c.agent_id == bindparam("agent_id"),
    tasks.c.task_id == bindparam("task_id"),
)

_VISIBLE = or_(
    tasks.c.session_key.is_(None),
    select(sessions.c.key).where(sessions.c.key == tasks.c.session_key, alive(bindparam("now"))).exists(),
)
"""A task of a session that has expired does not exist."""
_VISIBLE_BY_NAME = _BY_NAME.where(_VISIBLE)
_HELD_BY_NAME = _BY_NAME.where(HELD)

_also = tasks.alias("also")

_content = msgspec.json.Decoder(Content).decode
_error = msgspec.json.Decoder(TaskError).decode
_question = msgspec.json.Decoder(Question).decode


def _task(row: Sequence[Any]) -> TaskRow:
    key, owner, agent_id, task_id, status, request, fingerprint, policy, *rest = row
    instance, metadata, created_at, session_id, last_seq, output, error, ended_at, question, status_at, mark = rest
    return TaskRow(
        key=key,
        owner=owner,
        agent_id=agent_id,
        task_id=task_id,
        status=status,
        request=request,
        fingerprint=fingerprint,
        policy=policy,
        instance=instance,
        metadata=msgspec.json.decode(metadata),
        created_at=created_at,
        session_id=session_id,
        last_seq=last_seq,
        output=None if output is None else _content(output),
        error=None if error is None else _error(error),
        ended_at=ended_at,
        question=None if question is None else _question(question),
        status_at=status_at,
        mark=mark,
    )


def _size(row: Sequence[Any]) -> int:
    """What clients make large of a task."""
    return len(row[5]) + sum(byte_count(row[n]) for n in (9, 13, 14, 16))


# --- reading ----------------------------------------------------------------------------------------------------------


def by_key(connection: Connection, key: int) -> TaskRow | None:
    row = connection.execute(_BY_KEY, {"key": key}).one_or_none()
    return None if row is None else _task(row)


def by_name(connection: Connection, owner: str, agent_id: str, task_id: str) -> TaskRow | None:
    name = {"owner": owner, "agent_id": agent_id, "task_id": task_id}
    row = connection.execute(_BY_NAME, name).one_or_none()
    return None if row is None else _task(row)


def get(connection: Connection, owner: str, agent_id: str, task_id: str, now: int) -> TaskRow | None:
    values = {"owner": owner, "agent_id": agent_id, "task_id": task_id, "now": now}
    row = connection.execute(_VISIBLE_BY_NAME, values).one_or_none()
    return None if row is None else _task(row)


class Listing:
    """One page of tasks, newest first. Raises InvalidRequest for a token that is not one of this list."""

    def __init__(
        self,
        owner: str,
        now: int,
        agent_id: str | None,
        session_id: str | None,
        status: str | None,
        limit: int,
        limit_bytes: int,
        token: str,
    ) -> None:
        self._question = ("tasks", owner, agent_id, session_id, status)
        self._limits = (limit, limit_bytes)
        position = page_position(token, self._question)
        self._before = NEVER if position is None else position
        self._where = [tasks.c.owner == owner]
        if session_id is not None:
            session = select(sessions.c.key).where(sessions.c.owner == owner, sessions.c.session_id == session_id)
            self._where.append(tasks.c.session_key == session.where(alive(now)).scalar_subquery())
        else:
            # said so, and not task by task: what has expired is little, and an index alone goes on counting the rest
            of_expired = _also.c.session_key == sessions.c.key
            gone = select(_also.c.key).where(of_expired, sessions.c.expires_at <= now, ~alive(now))
            self._where.append(tasks.c.key.not_in(gone))
        if agent_id is not None:
            self._where.append(tasks.c.agent_id == agent_id)
        if status is not None:
            self._where.append(tasks.c.status == status)

    def read(self, connection: Connection) -> Page[TaskRow]:
        total = connection.execute(select(func.count()).select_from(tasks).where(*self._where)).scalar_one()
        page = _TASK.where(*self._where, tasks.c.key < self._before).order_by(tasks.c.key.desc())
        with connection.execute(page.execution_options(stream_results=True)) as cursor:
            rows, more = fitting(cursor, _size, *self._limits)
        items = [_task(row) for row in rows]
        return Page(items, total, page_token(items[-1].key, self._question) if more else "")


class Recent:
    """One page of an agent's tasks, the last changed first. Raises InvalidRequest for a token that is not its own."""

    def __init__(
        self,
        owner: str,
        now: int,
        agent_id: str,
        session_id: str | None,
        states: Sequence[State],
        since: int | None,
        limit: int,
        limit_bytes: int,
        token: str,
    ) -> None:
        self._question = ("recent", owner, agent_id, session_id, sorted(states, key=str), since)
        self._limits = (limit, limit_bytes)
        self._before = pair_position(token, self._question)
        gone = select(_also.c.key).where(
            _also.c.session_key == sessions.c.key, sessions.c.expires_at <= now, ~alive(now)
        )
        self._where = [tasks.c.owner == owner, tasks.c.agent_id == agent_id, tasks.c.key.not_in(gone)]
        self._where.append(or_(tasks.c.mark.is_(None), tasks.c.mark != "reply"))
        if session_id is not None:
            self._where.append(tasks.c.session_id == session_id)
        if states:
            self._where.append(
                or_(*((tasks.c.status == status) & tasks.c.mark.is_not_distinct_from(mark) for status, mark in states))
            )
        if since is not None:
            self._where.append(tasks.c.status_at >= since)

    def read(self, connection: Connection) -> Page[TaskRow]:
        total = connection.execute(select(func.count()).select_from(tasks).where(*self._where)).scalar_one()
        page = _TASK.where(*self._where).order_by(tasks.c.status_at.desc(), tasks.c.key.desc())
        if self._before is not None:
            page = page.where(tuple_(tasks.c.status_at, tasks.c.key) < self._before)
        with connection.execute(page.execution_options(stream_results=True)) as cursor:
            rows, more = fitting(cursor, _size, *self._limits)
        items = [_task(row) for row in rows]
        return Page(items, total, pair_token(items[-1].status_at, items[-1].key, self._question) if more else "")


_LOG = (
    select(segments.c.first_seq, segments.c.last_seq, segments.c.data)
    .where(
        segments.c.task_key == bindparam("key"),
        # from the segment that holds the next chunk on: a long log costs no more at its end than at its beginning
        segments.c.first_seq
        >= func.coalesce(
            select(func.max(segments.c.first_seq))
            .where(segments.c.task_key == bindparam("key"), segments.c.first_seq <= bindparam("after") + 1)
            .scalar_subquery(),
            0,
        ),
        segments.c.last_seq > bindparam("after"),
        select(tasks.c.key).where(tasks.c.key == bindparam("key"), HELD).exists(),
    )
    .order_by(segments.c.first_seq)
    .execution_options(stream_results=True)
)


def read_log(connection: Connection, key: int, after: int, limit_bytes: int) -> list[Segment]:
    found: list[Segment] = []
    room = limit_bytes
    with connection.execute(_LOG, {"key": key, "after": after}) as rows:
        for first_seq, last_seq, data in rows:
            room -= len(data)
            if found and room < 0:
                break
            found.append(Segment(first_seq, last_seq, data))
    return found


_THIS_KEY = (
    idempotency.c.owner == bindparam("of_owner"),
    idempotency.c.route == bindparam("of_route"),
    idempotency.c.key == bindparam("of_key"),
)
_USED = (
    select(idempotency.c.body_hash, idempotency.c.task_key)
    .join_from(idempotency, tasks, tasks.c.key == idempotency.c.task_key)
    .where(*_THIS_KEY, idempotency.c.expires_at > bindparam("now"), _VISIBLE)
)


def used(connection: Connection, owner: str, key: Idempotency | None, now: int) -> TaskRow | None:
    """The task for which the idempotency key was used. Raises: IdempotencyMismatch."""
    if key is None:
        return None
    values = {"of_owner": owner, "of_route": key.route, "of_key": key.key, "now": now}
    found = connection.execute(_USED, values).one_or_none()
    if found is None:
        return None
    if found.body_hash != key.body_hash:
        raise IdempotencyMismatch("The idempotency key was used with another body")
    return by_key(connection, found.task_key)


# --- accepting --------------------------------------------------------------------------------------------------------

_HIGHEST = select(func.max(tasks.c.number)).where(
    tasks.c.owner == bindparam("owner"), tasks.c.agent_id == bindparam("agent_id"), tasks.c.stem == bindparam("stem")
)


_RENAME = (
    update(tasks)
    .where(tasks.c.key == bindparam("ended"))
    .values(task_id=bindparam("new_task_id"), stem=bindparam("new_stem"), number=bindparam("new_number"))
)
_INSERT = insert(tasks)
_INSERT_BODY = insert(bodies)
_FORGET_KEY = delete(idempotency).where(*_THIS_KEY)
_INSERT_KEY = insert(idempotency)


def create(connection: Connection, new: NewTask) -> Accepted:
    replayed = used(connection, new.owner, new.idempotency, new.created_at)
    if replayed is not None:
        return Accepted("replayed", replayed)
    session_key = _session_for(connection, new)
    same = by_name(connection, new.owner, new.agent_id, new.task_id)
    if same is not None and not same.ended:
        if same.fingerprint != new.fingerprint:
            raise TaskExists(f"Task {new.task_id} has not ended and is a different one", task_id=new.task_id)
        _remember(connection, new.owner, new.idempotency, same.key)
        return Accepted("running", same)
    if same is not None:
        _rename(connection, same)
    row = _insert(connection, new, session_key)
    _remember(connection, new.owner, new.idempotency, row.key)
    if session_key is not None:
        touch(connection, (row.key, new.created_at))
    if new.push is not None:
        sql_push.keep(connection, replace(new.push, key=row.key))
    return Accepted("created", row)


def _session_for(connection: Connection, new: NewTask) -> int | None:
    if new.session_id is None:
        return None
    session = live_session(connection, new.owner, new.session_id, new.created_at)
    if session is None:
        raise SessionNotFound(f"No session {new.session_id}")
    if session.agent_id != new.agent_id:
        raise SessionMismatch(f"Session {new.session_id} belongs to agent {session.agent_id}")
    return int(session.key)


def _remember(connection: Connection, owner: str, key: Idempotency | None, task_key: int) -> None:
    if key is None:
        return
    # one that has expired may stand there still
    connection.execute(_FORGET_KEY, {"of_owner": owner, "of_route": key.route, "of_key": key.key})
    values = {
        "owner": owner,
        "route": key.route,
        "key": key.key,
        "body_hash": key.body_hash,
        "expires_at": key.expires_at,
        "task_key": task_key,
    }
    connection.execute(_INSERT_KEY, values)


def _rename(connection: Connection, ended: TaskRow) -> None:
    def highest(stem: str) -> int:
        values = {"owner": ended.owner, "agent_id": ended.agent_id, "stem": stem}
        return connection.execute(_HIGHEST, values).scalar_one() or 0

    name = next_name(ended.task_id, highest)
    stem, number = split_name(name)
    values = {"ended": ended.key, "new_task_id": name, "new_stem": stem, "new_number": number}
    connection.execute(_RENAME, values)


def _insert(connection: Connection, new: NewTask, session_key: int | None) -> TaskRow:
    stem, number = split_name(new.task_id)
    values = {
        "owner": new.owner,
        "agent_id": new.agent_id,
        "task_id": new.task_id,
        "stem": stem,
        "number": number,
        "status": "pending",
        "fingerprint": new.fingerprint,
        "policy": new.policy,
        "instance": new.instance,
        "created_at": new.created_at,
        "session_id": new.session_id,
        "session_key": session_key,
        "last_seq": 0,
        "status_at": new.created_at,
    }
    result = connection.execute(_INSERT, values)
    assert result.inserted_primary_key is not None
    key = int(result.inserted_primary_key[0])
    body = {"task_key": key, "request": new.request, "metadata": encode(new.metadata).decode()}
    connection.execute(_INSERT_BODY, body)
    row = by_key(connection, key)
    assert row is not None
    return row


# --- appending --------------------------------------------------------------------------------------------------------

_CHANGE = (
    update(tasks)
    .where(
        tasks.c.key == bindparam("task_key"),
        tasks.c.last_seq == bindparam("before"),
        tasks.c.instance == bindparam("writer"),
        tasks.c.ended_at.is_(None),
    )
    .values(
        last_seq=bindparam("after"),
        status=bindparam("new_status"),
        ended_at=bindparam("new_ended_at"),
        status_at=func.coalesce(bindparam("new_status_at", type_=tasks.c.status_at.type), tasks.c.status_at),
        mark=bindparam("new_mark"),
    )
)
_CHANGE_BODY = (
    update(bodies)
    .where(bodies.c.task_key == bindparam("of_task"))
    .values(output=bindparam("new_output"), error=bindparam("new_error"), question=bindparam("new_question"))
)
# Said for every chunk of every stream, so it goes to the driver as it is. Of many rows at once: a driver gives up the
# interpreter's lock with every statement, and may have to wait for it whenever the loop is busy.
_ADVANCE_MANY = (
    "UPDATE tasks SET last_seq = new.column4 FROM (VALUES {rows}) AS new WHERE tasks.key = new.column1 "
    "AND tasks.last_seq = new.column2 AND tasks.instance = new.column3 AND tasks.ended_at IS NULL"
)
_SEGMENT_MANY = "INSERT INTO segments (task_key, first_seq, last_seq, data) VALUES {rows}"

_MOST_ROWS = 256
"""How many rows a statement has at most; those with fewer have a power of two, so that there are few to prepare."""


class _Rows:
    """A statement with four values for each row of it."""

    def __init__(self, text: str) -> None:
        self._texts: dict[int, str] = {}
        count = 1
        while count <= _MOST_ROWS:
            self._texts[count] = text.format(rows=", ".join(["(?, ?, ?, ?)"] * count))
            count *= 2

    def run(self, connection: Connection, rows: list[tuple[Any, Any, Any, Any]]) -> int:
        """Returns how many rows of the table were changed."""
        changed = at = 0
        with closing(connection.connection.cursor()) as cursor:
            while at < len(rows):
                count = min(_MOST_ROWS, 1 << (len(rows) - at).bit_length() - 1)
                cursor.execute(self._texts[count], list(chain.from_iterable(rows[at : at + count])))
                changed += cursor.rowcount
                at += count
        return changed


class Appender:
    """Appends to logs, of as many tasks as there are with one statement for the rows and one for the segments."""

    def __init__(self) -> None:
        self._advance = _Rows(_ADVANCE_MANY)
        self._segment = _Rows(_SEGMENT_MANY)

    def append(
        self, connection: Connection, calls: Sequence[Sequence[Append]], again: bool
    ) -> Sequence[frozenset[int]]:
        """What each call's appends were refused (``Writer.run_together``). Whether a row takes its part, the count of
        changed rows tells; which does not, is found out when the count is wrong: alone, ``again``. Raises: RateLimited,
        before anything is written."""
        for append in chain.from_iterable(calls):
            if append.push is not None:
                sql_push.check(connection, append.push)
        if again:
            (call,) = calls
            refused = frozenset(append.key for append in call if not _fits(connection, append))
            if not self._write(connection, [append for append in call if append.key not in refused]):
                raise RuntimeError("a row changed under the store's only writer")
            return [refused]
        for appends in _rounds(calls):
            if not self._write(connection, appends):
                raise Again
        return [frozenset()] * len(calls)

    def _write(self, connection: Connection, appends: Sequence[Append]) -> bool:
        """Writes all of ``appends``, no two of one task; false when a row did not take its part: undo everything."""
        changes = [append for append in appends if append.change is not None]
        advanced = self._advance.run(
            connection,
            [(a.key, a.first_seq - 1, a.instance, a.last_seq) for a in appends if a.change is None],
        )
        if changes:
            advanced += connection.execute(_CHANGE, [_change(append) for append in changes]).rowcount
        if advanced != len(appends):
            return False
        self._segment.run(connection, [(a.key, a.first_seq, a.last_seq, a.data) for a in appends if a.data])
        if changes:
            connection.execute(_CHANGE_BODY, [_change_body(append) for append in changes])
            ends = [(a.key, a.change.ended_at) for a in changes if a.change is not None]
            touch(connection, *((key, at) for key, at in ends if at is not None))
        for append in appends:
            if append.message is not None:
                add_message(connection, append.key, append.message)
            if append.idempotency is not None:
                owner = connection.execute(select(tasks.c.owner).where(tasks.c.key == append.key)).scalar_one()
                _remember(connection, owner, append.idempotency, append.key)
            if append.push is not None:
                sql_push.keep(connection, append.push.push)
        return True


def _rounds(calls: Sequence[Sequence[Append]]) -> Iterator[list[Append]]:
    """All appends in order, in rounds in which no task comes twice: states and chunks of one task keep their order."""
    if len(calls) == 1:
        yield list(calls[0])
        return
    current: dict[int, Append] = {}
    for call in calls:
        if any(append.key in current for append in call):
            yield list(current.values())
            current = {}
        for append in call:
            current[append.key] = append
    yield list(current.values())


def _fits(connection: Connection, append: Append) -> bool:
    row_of = select(tasks.c.last_seq, tasks.c.instance, tasks.c.ended_at).with_for_update()
    row = connection.execute(row_of.where(tasks.c.key == append.key)).one_or_none()
    return row is not None and tuple(row) == (append.first_seq - 1, append.instance, None)


def _change(append: Append) -> dict[str, Any]:
    change = append.change
    assert change is not None
    return {
        "task_key": append.key,
        "before": append.first_seq - 1,
        "writer": append.instance,
        "after": append.last_seq,
        "new_status": change.status,
        "new_ended_at": change.ended_at,
        "new_status_at": change.status_at,
        "new_mark": change.mark,
    }


def _change_body(append: Append) -> dict[str, Any]:
    change = append.change
    assert change is not None
    return {
        "of_task": append.key,
        "new_output": None if change.output is None else encode(change.output).decode(),
        "new_error": None if change.error is None else encode(change.error).decode(),
        "new_question": None if change.question is None else encode(change.question).decode(),
    }


# --- changing without an append ---------------------------------------------------------------------------------------

_SET_POLICY = (
    update(tasks).where(tasks.c.key == bindparam("of_task"), tasks.c.ended_at.is_(None)).values(policy=bindparam("new"))
)


def set_policy(connection: Connection, key: int, policy: str) -> None:
    connection.execute(_SET_POLICY, {"of_task": key, "new": policy})


# --- the end ----------------------------------------------------------------------------------------------------------


def remove(connection: Connection, owner: str, agent_id: str, task_id: str) -> None:
    name = {"owner": owner, "agent_id": agent_id, "task_id": task_id}
    row = connection.execute(_HELD_BY_NAME, name).one_or_none()
    if row is None:
        raise TaskNotFound(f"No task {task_id}", task_id=task_id)
    if row.ended_at is None:
        raise TaskRunning(f"Task {task_id} has not ended", task_id=task_id)
    remove_task(connection, row.key, Slice())


def take_over(connection: Connection, instance: str) -> list[TaskRow]:
    orphaned = (tasks.c.ended_at.is_(None), tasks.c.instance != instance)
    keys = connection.execute(select(tasks.c.key).where(*orphaned).order_by(tasks.c.key)).scalars().all()
    if keys:
        connection.execute(update(tasks).where(*orphaned).values(instance=instance))
    return [_task(connection.execute(_BY_KEY, {"key": key}).one()) for key in keys]
