"""Sessions and their conversations in SQL: the statements, and what is done with them inside a transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from hector_trio.errors import RateLimited, SessionExists, SessionNotFound
from hector_trio.models import encode
from hector_trio.session import MessageRow, SessionRow
from hector_trio.stores import Page
from hector_trio.stores.rules import Quota, fitting, page_position, page_token, patched, text_of
from hector_trio.stores.schema import NEVER, REMOVED, labels, messages, sessions, tasks
from hector_trio.stores.sql_removal import alive, remove_session

_json = msgspec.json.decode


def byte_count(text: str | None) -> int:
    """How many bytes the text was in the database."""
    return 0 if text is None else len(text) if text.isascii() else len(text.encode())


# --- sessions ---------------------------------------------------------------------------------------------------------

_SESSION: Select[*tuple[Any, ...]] = select(
    sessions.c.owner,
    sessions.c.session_id,
    sessions.c.agent_id,
    sessions.c.created_at,
    sessions.c.last_activity_at,
    sessions.c.state,
    sessions.c.metadata,
    sessions.c.ttl_seconds,
    sessions.c.key,
    sessions.c.expires_at,
)
_BY_NAME = _SESSION.where(sessions.c.owner == bindparam("owner"), sessions.c.session_id == bindparam("session_id"))
_LIVE = _BY_NAME.where(alive(bindparam("now")))
_HELD = select(func.count()).select_from(
    select(sessions.c.key)
    .where(sessions.c.owner == bindparam("owner"), alive(bindparam("now")))
    .limit(bindparam("limit"))
    .subquery()
)
_INSERT = insert(sessions)


def _session(row: Sequence[Any]) -> SessionRow:
    owner, session_id, agent_id, created_at, active_at, state, metadata, ttl_seconds, _, _ = row
    return SessionRow(owner, session_id, agent_id, created_at, active_at, _json(state), _json(metadata), ttl_seconds)


def _values(row: SessionRow) -> dict[str, Any]:
    """What changes of a session."""
    expires = row.expires_at
    return {
        "last_activity_at": row.last_activity_at,
        "expires_at": NEVER if expires is None else expires,
        "state": encode(row.state).decode(),
        "metadata": encode(row.metadata).decode(),
    }


def live_session(connection: Connection, owner: str, session_id: str, now: int) -> Row[*tuple[Any, ...]] | None:
    """The row, unless it has expired and is not at work."""
    return connection.execute(_LIVE, {"owner": owner, "session_id": session_id, "now": now}).one_or_none()


def get(connection: Connection, owner: str, session_id: str, now: int) -> SessionRow | None:
    row = live_session(connection, owner, session_id, now)
    return None if row is None else _session(row)


def create(connection: Connection, row: SessionRow, limit: int, quota: Quota) -> None:
    now = row.created_at
    if live_session(connection, row.owner, row.session_id, now) is not None:
        raise SessionExists(f"Session {row.session_id} exists")

    def held() -> int:
        values = {"owner": row.owner, "now": now, "limit": limit}
        return int(connection.execute(_HELD, values).scalar_one())

    if not quota.admits(row.owner, limit, held):
        raise RateLimited(f"No more than {limit} sessions")
    _remove(connection, row.owner, row.session_id)  # one that has expired
    values = {
        "owner": row.owner,
        "session_id": row.session_id,
        "agent_id": row.agent_id,
        "created_at": row.created_at,
        "ttl_seconds": row.ttl_seconds,
    }
    result = connection.execute(_INSERT, values | _values(row))
    assert result.inserted_primary_key is not None
    _label(connection, result.inserted_primary_key[0], row.metadata)


def change(
    connection: Connection,
    owner: str,
    session_id: str,
    now: int,
    state: Any,
    metadata: Any,
    if_match: str | None,
    limit_bytes: int,
) -> SessionRow:
    found = live_session(connection, owner, session_id, now)
    if found is None:
        raise SessionNotFound(f"No session {session_id}")
    row = patched(_session(found), now=now, state=state, metadata=metadata, if_match=if_match, limit_bytes=limit_bytes)
    values = _values(row)
    connection.execute(update(sessions).where(sessions.c.key == found.key).values(values))
    if values["metadata"] != found.metadata:
        connection.execute(delete(labels).where(labels.c.session_key == found.key))
        _label(connection, found.key, row.metadata)
    # as it will be read: nothing of the caller's patches is in it
    return msgspec.structs.replace(row, state=_json(values["state"]), metadata=_json(values["metadata"]))


def remove(connection: Connection, owner: str, session_id: str) -> None:
    if not _remove(connection, owner, session_id):
        raise SessionNotFound(f"No session {session_id}")


def _remove(connection: Connection, owner: str, session_id: str) -> bool:
    found = connection.execute(_BY_NAME, {"owner": owner, "session_id": session_id}).one_or_none()
    if found is None:
        return False
    remove_session(connection, found.key)
    return True


# --- lists of sessions ------------------------------------------------------------------------------------------------


_FEW = 1000
"""Of how many sessions a label is looked up in its own index."""


class Listing:
    """One page of sessions, newest first. Raises InvalidRequest for a token that is not one of this list."""

    def __init__(
        self,
        owner: str,
        now: int,
        agent_id: str | None,
        metadata: dict[str, str] | None,
        limit: int,
        limit_bytes: int,
        token: str,
    ) -> None:
        self._question = ("sessions", owner, agent_id, metadata or None)
        self._limits = (limit, limit_bytes)
        position = page_position(token, self._question)
        self._before = NEVER if position is None else position
        self._where = [sessions.c.owner == owner, alive(now)]
        if agent_id is not None:
            self._where.append(sessions.c.agent_id == agent_id)
        self._digests = [_digest(name, text) for name, text in (metadata or {}).items()]

    def read(self, connection: Connection) -> Page[SessionRow]:
        where = [*self._where, *(_labelled(connection, digest) for digest in self._digests)]
        total = connection.execute(select(func.count()).select_from(sessions).where(*where)).scalar_one()
        page = _SESSION.where(*where, sessions.c.key < self._before).order_by(sessions.c.key.desc())
        with connection.execute(page.execution_options(stream_results=True)) as cursor:
            rows, more = fitting(cursor, lambda row: byte_count(row.state) + byte_count(row.metadata), *self._limits)
        items = [_session(row) for row in rows]
        return Page(items, total, page_token(rows[-1].key, self._question) if more else "")


def _labelled(connection: Connection, digest: bytes) -> ColumnElement[bool]:
    """That a session has a label, asked so that a page costs little: a label that few have is looked up, and of one
    that many have it is asked session by session, which soon fills a page."""
    having = select(labels.c.session_key).where(labels.c.digest == digest)
    few = select(func.count()).select_from(having.limit(_FEW + 1).subquery())
    if connection.execute(few).scalar_one() <= _FEW:
        return sessions.c.key.in_(having)
    return having.where(labels.c.session_key == sessions.c.key).exists()


def _label(connection: Connection, session_key: int, metadata: Mapping[str, Any]) -> None:
    """Makes the session's metadata findable."""
    digests = {_digest(name, text_of(value)) for name, value in metadata.items()}
    if digests:
        connection.execute(insert(labels), [{"session_key": session_key, "digest": digest} for digest in digests])


def _digest(name: str, text: str) -> bytes:
    return blake2b(msgspec.json.encode((name, text)), digest_size=16).digest()


# --- conversations ----------------------------------------------------------------------------------------------------

_COLUMNS = ("task_key", "task_id", "agent_id", "role", "type", "content", "created_at", "partial_status", "original")
_ADD = insert(messages).from_select(
    ["session_key", "n", *_COLUMNS],
    select(
        tasks.c.session_key,
        select(func.coalesce(func.max(messages.c.n), 0) + 1)
        .where(messages.c.session_key == tasks.c.session_key)
        .correlate(tasks)
        .scalar_subquery(),
        *(bindparam(f"new_{name}", type_=messages.c[name].type) for name in _COLUMNS),
    ).where(tasks.c.key == bindparam("new_task_key"), tasks.c.session_key.is_not(None)),
)
_TOUCH = (
    update(sessions)
    .where(
        sessions.c.key == select(tasks.c.session_key).where(tasks.c.key == bindparam("of_task")).scalar_subquery(),
        sessions.c.last_activity_at < bindparam("at"),
    )
    .values(
        last_activity_at=bindparam("at"),
        expires_at=case(
            (sessions.c.ttl_seconds.is_(None), NEVER), else_=bindparam("at") + sessions.c.ttl_seconds * 1000
        ),
    )
)
# A task that was replaced has another name by now; its messages follow it, for they know its key.
_MESSAGES = select(
    messages.c.role,
    messages.c.type,
    messages.c.content,
    messages.c.agent_id,
    func.coalesce(tasks.c.task_id, messages.c.task_id),
    messages.c.created_at,
    messages.c.partial_status,
    messages.c.n,
).join_from(messages, tasks, (tasks.c.key == messages.c.task_key) & (tasks.c.owner != REMOVED), isouter=True)


def touch(connection: Connection, *activities: tuple[int, int]) -> None:
    """Moves the last activity of the sessions of tasks, forwards only: pairs of a task's key and a time."""
    if activities:
        connection.execute(_TOUCH, [{"of_task": key, "at": at} for key, at in activities])


def add_message(connection: Connection, task_key: int, message: MessageRow) -> None:
    """Adds a line to the conversation of the task's session, if it has one."""
    values = {
        "new_task_key": task_key,
        "new_task_id": message.task_id,
        "new_agent_id": message.agent_id,
        "new_role": message.role,
        "new_type": message.type,
        "new_content": encode(message.content).decode(),
        "new_created_at": message.created_at,
        "new_partial_status": message.partial_status,
        "new_original": message.original,
    }
    connection.execute(_ADD, values)
    touch(connection, (task_key, message.created_at))


class Conversation:
    """One page of messages, oldest first. Raises InvalidRequest for a token that is not one of this list."""

    def __init__(self, owner: str, session_id: str, now: int, limit: int, limit_bytes: int, token: str) -> None:
        self._session = (owner, session_id, now)
        self._question = ("messages", owner, session_id)
        self._limits = (limit, limit_bytes)
        self._after = page_position(token, self._question) or 0

    def read(self, connection: Connection) -> Page[MessageRow]:
        session = live_session(connection, *self._session)
        if session is None:
            raise SessionNotFound(f"No session {self._session[1]}")
        of_session = messages.c.session_key == session.key
        # messages go with their session only, so the last one's number is how many there are
        total = connection.execute(select(func.coalesce(func.max(messages.c.n), 0)).where(of_session)).scalar_one()
        page = _MESSAGES.where(of_session, messages.c.n > self._after).order_by(messages.c.n)
        with connection.execute(page.execution_options(stream_results=True)) as cursor:
            rows, more = fitting(cursor, lambda row: byte_count(row.content), *self._limits)
        items = [_message(row) for row in rows]
        return Page(items, total, page_token(rows[-1].n, self._question) if more else "")


def history(connection: Connection, owner: str, session_id: str, limit: int, limit_bytes: int) -> list[MessageRow]:
    session = select(sessions.c.key).where(sessions.c.owner == owner, sessions.c.session_id == session_id)
    last = _MESSAGES.where(messages.c.session_key == session.scalar_subquery()).order_by(messages.c.n.desc())
    with connection.execute(last.execution_options(stream_results=True)) as cursor:
        rows, _ = fitting(cursor, lambda row: byte_count(row.content), limit, limit_bytes)
    return [_message(row) for row in reversed(rows)]


_OF_TASK = (
    _MESSAGES.add_columns(messages.c.original)
    .where(messages.c.task_key == bindparam("task_key"))
    .order_by(messages.c.n.desc())
    .execution_options(stream_results=True)
)


def of_task(connection: Connection, key: int, limit: int, limit_bytes: int) -> list[MessageRow]:
    with connection.execute(_OF_TASK, {"task_key": key}) as cursor:
        rows, _ = fitting(cursor, lambda row: byte_count(row.content) + len(row.original or b""), limit, limit_bytes)
    return [msgspec.structs.replace(_message(row[:-1]), original=row[-1]) for row in reversed(rows)]


def _message(row: Sequence[Any]) -> MessageRow:
    role, type_, content, agent_id, task_id, created_at, partial_status, _ = row
    return MessageRow(role, type_, _json(content), agent_id, task_id, created_at, partial_status)
