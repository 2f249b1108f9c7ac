"""What nobody sees any more in SQL, and how it goes: hidden in one transaction, removed in as many as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Final

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Delete,
    Select,
    Table,
    bindparam,
    cast,
    delete,
    func,
    or_,
    select,
    tuple_,
    update,
)

from hector_trio.stores.schema import NEVER, REMOVED, idempotency, messages, pushes, segments, sessions, tasks

SLICE_SECONDS: Final = 0.01
"""How long a transaction goes on removing rows, while others wait for the writer."""

_ROWS: Final = 2
"""How many segments or messages go before the first look at the clock; twice as many before each further one, so that
small ones go fast and large ones not much longer than a slice."""

_KEYS: Final = 100
"""How many tasks of a session are looked up at once."""


# --- what is there ----------------------------------------------------------------------------------------------------

_AT_WORK = select(tasks.c.key).where(tasks.c.session_key == sessions.c.key, tasks.c.ended_at.is_(None)).exists()


def alive(now: int | BindParameter[int]) -> ColumnElement[bool]:
    """Of a row of sessions: it has not expired, or a task of it has not ended."""
    return or_(sessions.c.expires_at > now, _AT_WORK)


HELD: Final[ColumnElement[bool]] = (tasks.c.owner != REMOVED) & or_(
    tasks.c.session_key.is_(None),
    select(sessions.c.key).where(sessions.c.key == tasks.c.session_key, sessions.c.owner != REMOVED).exists(),
)
"""Of a row of tasks: neither it nor its session has been removed."""


# --- rows in slices ---------------------------------------------------------------------------------------------------


class Slice:
    """What one transaction may remove: as much as it can in ``SLICE_SECONDS``, but something in any case."""

    def __init__(self) -> None:
        self._until = perf_counter() + SLICE_SECONDS

    @property
    def over(self) -> bool:
        return perf_counter() >= self._until


def _first_rows(table: Table, parent: ColumnElement[int], number: ColumnElement[int]) -> Delete:
    """Removes the first rows of a parent, so many, and none but those that are numbered below a number."""
    mine = (parent == bindparam("of"), number < bindparam("below"))
    stays = select(number).where(*mine).order_by(number).limit(1).offset(bindparam("rows")).scalar_subquery()
    return delete(table).where(parent == bindparam("of"), number < func.coalesce(stays, bindparam("below")))


_SEGMENTS = _first_rows(segments, segments.c.task_key, segments.c.first_seq)
_MESSAGES = _first_rows(messages, messages.c.session_key, messages.c.n)


def _clear(connection: Connection, rows: Delete, of: int, part: Slice, below: int = NEVER) -> bool:
    """Whether all of the rows are gone."""
    count = _ROWS
    while connection.execute(rows, {"of": of, "below": below, "rows": count}).rowcount == count:
        if part.over:
            return False
        count *= 2
    return True


# --- tasks ------------------------------------------------------------------------------------------------------------

_REMOVE_TASK = delete(tasks).where(tasks.c.key == bindparam("of"))
_HIDE_TASK = (
    update(tasks)
    .where(tasks.c.key == bindparam("of"))
    .values(
        owner=REMOVED,
        task_id=cast(tasks.c.key, tasks.c.task_id.type),
        stem=cast(tasks.c.key, tasks.c.stem.type),
        number=0,
        session_id=None,
        session_key=None,
        # no append is taken any more, and no task is swept sooner
        ended_at=-NEVER,
    )
)
_FORGET_KEYS = delete(idempotency).where(idempotency.c.task_key == bindparam("of"))
_FORGET_PUSHES = delete(pushes).where(pushes.c.task_key == bindparam("of"))


def remove_task(connection: Connection, key: int, part: Slice) -> bool:
    """Removes the task with its log, or begins to: then nobody sees it any more, and sweeping goes on with it."""
    if _clear(connection, _SEGMENTS, key, part):
        connection.execute(_REMOVE_TASK, {"of": key})
        return True
    _hide_task(connection, key)
    return False


def _hide_task(connection: Connection, key: int) -> None:
    connection.execute(_FORGET_KEYS, {"of": key})
    connection.execute(_FORGET_PUSHES, {"of": key})
    connection.execute(_HIDE_TASK, {"of": key})


# --- sessions ---------------------------------------------------------------------------------------------------------

_OF_SESSION = select(tasks.c.key).where(tasks.c.session_key == bindparam("of")).limit(bindparam("limit"))
_UNFINISHED = select(tasks.c.key).where(tasks.c.session_key == bindparam("of"), tasks.c.ended_at.is_(None))
_REMOVE_SESSION = delete(sessions).where(sessions.c.key == bindparam("of"))
_HIDE_SESSION = (
    update(sessions)
    .where(sessions.c.key == bindparam("of"))
    .values(owner=REMOVED, session_id=cast(sessions.c.key, sessions.c.session_id.type), expires_at=-NEVER)
)


def remove_session(connection: Connection, key: int) -> None:
    """Removes the session with all it has, or begins to: then nobody sees any of it, and sweeping goes on with it."""
    _clear_session(connection, key, Slice(), NEVER)
    # Where that took too long: of the tasks that are left, those that have ended are not seen without their session.
    for unfinished in connection.execute(_UNFINISHED, {"of": key}).scalars().all():
        _hide_task(connection, unfinished)
    connection.execute(_HIDE_SESSION, {"of": key})


def _clear_session(connection: Connection, key: int, part: Slice, limit: int) -> int:
    """Removes the session's tasks, then the session, as far as time allows; how many of both, up to ``limit``."""
    gone = 0
    while gone < limit:
        keys = connection.execute(_OF_SESSION, {"of": key, "limit": min(_KEYS, limit - gone)}).scalars().all()
        for task in keys:
            if not remove_task(connection, task, part):
                return gone
            gone += 1
            if part.over:
                return gone
        if not keys:
            if _clear(connection, _MESSAGES, key, part):
                connection.execute(_REMOVE_SESSION, {"of": key})
                gone += 1
            return gone
    return gone


# --- sweeping ---------------------------------------------------------------------------------------------------------

_KEY = (idempotency.c.owner, idempotency.c.route, idempotency.c.key)
_LAST_SEGMENT = select(func.max(segments.c.first_seq)).where(segments.c.task_key == bindparam("of"))
_PRUNED = update(tasks).where(tasks.c.key == bindparam("of")).values(pruned_at=bindparam("at"))


class Sweep:
    """One transaction of sweeping, for up to ``limit`` tasks, sessions, keys and logs."""

    def __init__(self, now: int, tasks_ended_before: int, logs_ended_before: int | None, limit: int) -> None:
        self._now = now
        self._tasks_before = tasks_ended_before
        self._logs_before = logs_ended_before
        self._left = self._limit = limit

    def run(self, connection: Connection) -> tuple[int, bool]:
        """How many went, and whether there may be more: time was up."""
        part = Slice()
        self._remove_keys(connection)
        whole = (
            self._remove_tasks(connection, part)
            and self._remove_sessions(connection, part)
            and self._prune(connection, part)
        )
        return self._limit - self._left, not whole

    def _first(self, connection: Connection, keys: Select[int]) -> Sequence[int]:
        return connection.execute(keys.limit(self._left)).scalars().all()

    def _remove_keys(self, connection: Connection) -> None:
        expired = select(*_KEY).where(idempotency.c.expires_at <= self._now).limit(self._left)
        self._left -= connection.execute(delete(idempotency).where(tuple_(*_KEY).in_(expired))).rowcount

    # Each of these looks at the clock after it has done something, and says whether there was time for all.

    def _remove_tasks(self, connection: Connection, part: Slice) -> bool:
        # what was hidden is the oldest of all
        overdue = select(tasks.c.key).where(tasks.c.session_key.is_(None), tasks.c.ended_at < self._tasks_before)
        for key in self._first(connection, overdue.order_by(tasks.c.ended_at)):
            if not remove_task(connection, key, part):
                return False
            self._left -= 1
            if part.over:
                return False
        return True

    def _remove_sessions(self, connection: Connection, part: Slice) -> bool:
        expired = select(sessions.c.key).where(sessions.c.expires_at <= self._now, ~alive(self._now))
        for key in self._first(connection, expired.order_by(sessions.c.expires_at, sessions.c.key)):
            # task by task, however many a session has: nobody sees how an expired session becomes less
            gone = _clear_session(connection, key, part, self._left)
            self._left -= gone
            if part.over or self._left == 0:
                return False
        return True

    def _prune(self, connection: Connection, part: Slice) -> bool:
        if self._logs_before is None:
            return True
        # said as the index says it
        whole = (tasks.c.ended_at.is_not(None), tasks.c.pruned_at.is_(None), tasks.c.ended_at < self._logs_before)
        for key in self._first(connection, select(tasks.c.key).where(*whole).order_by(tasks.c.ended_at)):
            last = connection.execute(_LAST_SEGMENT, {"of": key}).scalar_one()
            if last is not None and not _clear(connection, _SEGMENTS, key, part, below=last):
                return False
            connection.execute(_PRUNED, {"of": key, "at": self._now})
            self._left -= 1
            if part.over:
                return False
        return True
