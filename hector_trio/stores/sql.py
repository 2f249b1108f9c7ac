"""The store in an SQL database: every method is one transaction, all writes go through one thread. SQLite for now."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio
from sqlalchemy import (
    BigInteger,
    Connection,
    Dialect,
    Engine,
    Executable,
    Row,
    Select,
    Table,
    Text,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal,
    make_url,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError

from hector_trio.errors import (
    IdempotencyMismatch,
    RateLimited,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    StartError,
    StoreUnavailable,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.models import Content, TaskError, encode
from hector_trio.session import MessageRow, SessionRow
from hector_trio.stores import Accepted, Append, Idempotency, NewTask, Page, Segment, StoreStatistics, sqlite
from hector_trio.stores.rules import check_appends, next_name, page_position, page_token, patched, split_name, text_of
from hector_trio.stores.schema import (
    HEAD,
    NEVER,
    bodies,
    idempotency,
    instances,
    labels,
    messages,
    segments,
    sessions,
    tasks,
)
from hector_trio.stores.writer import Again, Writer
from hector_trio.task import TaskRow

R = TypeVar("R")
Fields = Sequence[Any]
"""A row of a result."""

READERS = 4
"""How many reads run at once; more wait for their turn."""

_CLOSE_SECONDS = 10
"""How long closing waits for a disk that hangs before it leaves the thread behind (the lock stays, then)."""


@asynccontextmanager
async def open_sql(
    where: str | Path,
    *,
    durability: sqlite.Durability = "process",
    instance: str,
    on_commit: Callable[[float, int], None] | None = None,
) -> AsyncIterator[SqlStore]:
    """Opens the store at ``where`` (a path, or ``sqlite:///path``) for the process called ``instance``; makes what is
    missing and brings an older schema up to date. At the end what was accepted is committed, then the store is closed.

    ``durability``: what is committed survives the death of the process, or (``full``) the loss of power.
    ``on_commit`` is the store's attribute of that name.

    Raises: StartError, in one line: the folder or file cannot be made or written, is not a database, is damaged,
    another program's or a newer version's, or another process has it open.
    """
    path = _path_of(where)
    opened = await trio.to_thread.run_sync(_open, path, durability, instance)
    store = SqlStore(opened, instance)
    store.on_commit = on_commit
    try:
        yield store
    finally:
        with trio.move_on_after(_CLOSE_SECONDS, shield=True):
            await store._close()
        if store._writer.has_ended:
            opened.stack.close()


def _path_of(where: str | Path) -> Path:
    text = str(where)
    if "://" not in text:
        if text in ("", ":memory:"):
            raise StartError("A store in SQL needs a file; for one that forgets everything choose the memory store")
        return Path(text)
    try:
        url = make_url(text)
    except ArgumentError:
        raise StartError("The store's URL cannot be read: sqlite:///path is meant") from None
    if url.get_backend_name() != "sqlite":
        raise StartError(f"The store cannot be in {url.get_backend_name()}: only sqlite:///path is known")
    if url.query or url.host:
        raise StartError("The store's URL says too much: sqlite:///path has no host and no options")
    return _path_of(url.database or "")


class _Opened:
    """What opening found and made; ``stack`` gives the file back."""

    def __init__(self, path: Path, stack: ExitStack, writing: Engine, reading: Engine) -> None:
        self.path = path
        self.stack = stack
        self.writing = writing
        self.reading = reading


def _open(path: Path, durability: sqlite.Durability, instance: str) -> _Opened:
    now = time.time_ns() // 1_000_000
    with ExitStack() as stack:
        stack.enter_context(sqlite.claim(path, instance, now))
        version = sqlite.stored_version(path)
        writing = sqlite.open_engine(path, durability, writes=True)
        try:
            with writing.connect() as connection, connection.begin():
                if version != HEAD:
                    _migrate(connection, path, version)
                connection.execute(delete(instances).where(instances.c.id == instance))
                connection.execute(
                    insert(instances).values(
                        id=instance, pid=os.getpid(), host=socket.gethostname(), started_at=now, checks=0
                    )
                )
        except DBAPIError as error:
            raise sqlite.start_error(path, error) from error
        reading = sqlite.open_engine(path, durability, writes=False)
        return _Opened(path, stack.pop_all(), writing, reading)
    raise AssertionError("unreachable")


def _migrate(connection: Connection, path: Path, version: str | None) -> None:
    """Brings the schema to ``HEAD`` in the transaction of ``connection``."""
    # imported here: a store that is up to date starts without alembic
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if version is not None:
        try:
            ScriptDirectory.from_config(config).get_revision(version)
        except CommandError:
            raise StartError(
                f"The store {path} was written by a newer version (schema {version}, this version knows {HEAD})"
            ) from None
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    sqlite.mark(connection)


# --- statements -------------------------------------------------------------------------------------------------------

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
).join_from(tasks, bodies, bodies.c.task_key == tasks.c.key)

_TASK_BY_KEY = _TASK.where(tasks.c.key == bindparam("key"))
_TASK_BY_NAME = _TASK.where(
    tasks.c.owner == bindparam("owner"),
    tasks.c.agent_id == bindparam("agent_id"),
    tasks.c.task_id == bindparam("task_id"),
)

_HIGHEST = select(func.max(tasks.c.number)).where(
    tasks.c.owner == bindparam("owner"), tasks.c.agent_id == bindparam("agent_id"), tasks.c.stem == bindparam("stem")
)

_CHANGE = (
    update(tasks)
    .where(
        tasks.c.key == bindparam("task_key"),
        tasks.c.last_seq == bindparam("before"),
        tasks.c.instance == bindparam("writer"),
        tasks.c.ended_at.is_(None),
    )
    .values(last_seq=bindparam("after"), status=bindparam("new_status"), ended_at=bindparam("new_ended_at"))
)
_CHANGE_BODY = (
    update(bodies)
    .where(bodies.c.task_key == bindparam("of_task"))
    .values(output=bindparam("new_output"), error=bindparam("new_error"))
)

_MESSAGE_COLUMNS = ("task_key", "task_id", "agent_id", "role", "type", "content", "created_at", "partial_status")
_MESSAGE = insert(messages).from_select(
    ["session_key", "n", *_MESSAGE_COLUMNS],
    select(
        tasks.c.session_key,
        select(func.coalesce(func.max(messages.c.n), 0) + 1)
        .where(messages.c.session_key == tasks.c.session_key)
        .correlate(tasks)
        .scalar_subquery(),
        *(bindparam(f"new_{name}", type_=messages.c[name].type) for name in _MESSAGE_COLUMNS),
    ).where(tasks.c.key == bindparam("of_task"), tasks.c.session_key.is_not(None)),
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
_SESSION_BY_NAME = _SESSION.where(
    sessions.c.owner == bindparam("owner"), sessions.c.session_id == bindparam("session_id")
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
).join_from(messages, tasks, tasks.c.key == messages.c.task_key, isouter=True)

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
    )
    .order_by(segments.c.first_seq)
    .execution_options(stream_results=True)
)

_REMOVE_TASK = delete(tasks).where(tasks.c.key == bindparam("gone"))


class _Rows:
    """A statement for many rows at once, as text with the driver's placeholders.

    Python's lock is given up and taken again with every step of the driver; beside a busy event loop that costs more
    than the step. So rows go in by 64, 16, 4 and 1 instead of one by one.
    """

    SIZES = (64, 16, 4, 1)

    def __init__(self, dialect: Dialect, build: Callable[[int], Executable]) -> None:
        self._texts = [(size, str(build(size).compile(dialect=dialect))) for size in self.SIZES]  # type: ignore[attr-defined]

    def run(self, connection: Connection, rows: Sequence[tuple[Any, ...]]) -> int:
        """Returns how many rows were changed."""
        done = changed = 0
        for size, text in self._texts:
            while len(rows) - done >= size:
                part = chain.from_iterable(rows[done : done + size])
                changed += connection.exec_driver_sql(text, tuple(part)).rowcount
                done += size
        return changed


def _many_segments(size: int) -> Executable:
    """Rows of task_key, first_seq, last_seq, data."""
    return insert(segments).values([(0, 0, 0, b"")] * size)


def _many_advances(size: int) -> Executable:
    """Rows of task key, last_seq before, last_seq after, instance."""
    rows = [
        select(
            cast(literal(0), BigInteger).label("task_key"),
            cast(literal(0), BigInteger).label("before"),
            cast(literal(0), BigInteger).label("after"),
            cast(literal(""), Text).label("writer"),
        )
        for _ in range(size)
    ]
    new = (rows[0] if size == 1 else union_all(*rows)).subquery("new")
    return (
        update(tasks)
        .where(
            tasks.c.key == new.c.task_key,
            tasks.c.last_seq == new.c.before,
            tasks.c.instance == new.c.writer,
            tasks.c.ended_at.is_(None),
        )
        .values(last_seq=new.c.after)
    )


# --- rows -------------------------------------------------------------------------------------------------------------

_json = msgspec.json.decode
_content = msgspec.json.Decoder(Content).decode
_error = msgspec.json.Decoder(TaskError).decode


def _text(value: Any) -> str:
    return encode(value).decode()


def _optional(value: Any) -> str | None:
    return None if value is None else encode(value).decode()


def _task(row: Fields) -> TaskRow:
    key, owner, agent_id, task_id, status, request, fingerprint, policy, *rest = row
    instance, metadata, created_at, session_id, last_seq, output, error, ended_at = rest
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
        metadata=_json(metadata),
        created_at=created_at,
        session_id=session_id,
        last_seq=last_seq,
        output=None if output is None else _content(output),
        error=None if error is None else _error(error),
        ended_at=ended_at,
    )


def _session(row: Fields) -> SessionRow:
    owner, session_id, agent_id, created, active, state, metadata, ttl, _, _ = row
    return SessionRow(owner, session_id, agent_id, created, active, _json(state), _json(metadata), ttl)


def _message(row: Fields) -> MessageRow:
    role, type_, content, agent_id, task_id, created, partial_status, _ = row
    return MessageRow(role, type_, _json(content), agent_id, task_id, created, partial_status)


def _session_values(row: SessionRow) -> dict[str, Any]:
    expires = row.expires_at
    return {
        "last_activity_at": row.last_activity_at,
        "expires_at": NEVER if expires is None else expires,
        "state": _text(row.state),
        "metadata": _text(row.metadata),
    }


def _digest(name: str, text: str) -> bytes:
    return blake2b(msgspec.json.encode((name, text)), digest_size=16).digest()


class _Readers:
    """A few connections that read, each in the thread of one read at a time.

    A read that is cancelled is abandoned: its thread finishes it, gives the connection back and the place with it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limiter = trio.CapacityLimiter(READERS)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._closed = False

    async def run(self, read: Callable[[Connection], R]) -> R:
        return await trio.to_thread.run_sync(self._run, read, abandon_on_cancel=True, limiter=self._limiter)

    async def close(self) -> None:
        """Ends the reads that nobody waits for any more, and closes all connections."""
        with self._lock:
            self._closed = True
            for connection in self._busy:
                sqlite.interrupt(connection)
        for _ in range(READERS):
            await self._limiter.acquire_on_behalf_of(object())

    def close_idle(self) -> None:
        """Closes the connections that are not in use; those that are, their threads close."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _run(self, read: Callable[[Connection], R]) -> R:
        try:
            with self._connection() as connection, connection.begin():
                return read(connection)
        except DBAPIError as error:
            meant = sqlite.meaning(error)
            if meant is error:
                raise
            raise meant from error

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("The store is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._engine.connect()
        with self._lock:
            self._busy.add(connection)
        broken = False
        try:
            yield connection
        except DBAPIError:
            broken = True
            raise
        finally:
            with self._lock:
                self._busy.discard(connection)
                keep = not (broken or self._closed or connection.in_transaction())
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()


class SqlStore:
    """The Store protocol on SQL; see there for what each method promises. Made by ``open_sql``."""

    def __init__(self, opened: _Opened, instance: str) -> None:
        self._instance = instance
        self._path = opened.path
        self._segments = _Rows(opened.writing.dialect, _many_segments)
        self._advances = _Rows(opened.writing.dialect, _many_advances)
        self._readers = _Readers(opened.reading)
        self._writer = Writer(opened.writing.connect, sqlite.meaning)

    @property
    def on_commit(self) -> Callable[[float, int], None] | None:
        """Called after every commit with its duration (seconds) and how many operations it held, in the writer's
        thread: it must be quick and may not touch Trio."""
        return self._writer.on_commit

    @on_commit.setter
    def on_commit(self, observe: Callable[[float, int], None] | None) -> None:
        self._writer.on_commit = observe

    async def _close(self) -> None:
        mine = delete(instances).where(instances.c.id == self._instance)
        try:
            # where that fails, the next process finds the row of a dead instance
            with suppress(StoreUnavailable):
                await self._writer.run(lambda connection: connection.execute(mine))
            await self._writer.close()
            await self._readers.close()
        finally:
            self._readers.close_idle()

    async def _read(self, read: Callable[[Connection], R]) -> R:
        self._writer.check()
        return await self._readers.run(read)

    # --- tasks and logs -----------------------------------------------------------------------------------------------
    async def create_task(self, new: NewTask) -> Accepted:
        return await self._writer.run(partial(_create_task, new, _text(new.metadata)))

    async def find_idempotent(self, owner: str, idempotency: Idempotency, *, now: int) -> Accepted | None:
        row = await self._read(lambda connection: _used(connection, owner, idempotency, now))
        return None if row is None else Accepted("replayed", row)

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        check_appends(appends)
        if not appends:
            await trio.lowlevel.checkpoint()
            return frozenset()
        return await self._writer.run_together(self._append, appends)

    def _append(
        self, connection: Connection, calls: Sequence[Sequence[Append]], again: bool
    ) -> Sequence[frozenset[int]]:
        if again:
            (call,) = calls
            refused = _refused(connection, call)
            if not self._write(connection, [append for append in call if append.key not in refused]):
                raise RuntimeError("a row changed under the store's only writer")
            return [refused]
        for appends in _rounds(calls):
            if not self._write(connection, appends):
                raise Again
        return [frozenset()] * len(calls)

    def _write(self, connection: Connection, appends: Sequence[Append]) -> bool:
        """Writes all of ``appends`` (no two of one task); false when a row did not take its part: undo everything."""
        changes = [append for append in appends if append.change is not None]
        advanced = self._advances.run(
            connection,
            [(a.key, a.first_seq - 1, a.last_seq, a.instance) for a in appends if a.change is None],
        )
        if changes:
            advanced += connection.execute(_CHANGE, [_change_values(append) for append in changes]).rowcount
        if advanced != len(appends):
            return False
        self._segments.run(connection, [(a.key, a.first_seq, a.last_seq, a.data) for a in appends if a.data])
        if changes:
            connection.execute(_CHANGE_BODY, [_body_values(append) for append in changes])
        for append in appends:
            if append.message is not None:
                connection.execute(_MESSAGE, _message_values(append.key, append.message))
                connection.execute(_TOUCH, {"of_task": append.key, "at": append.message.created_at})
        return True

    async def read_log(self, key: int, after: int, limit_bytes: int) -> list[Segment]:
        def read(connection: Connection) -> list[Segment]:
            found: list[Segment] = []
            room = limit_bytes
            with connection.execute(_LOG, {"key": key, "after": after}) as rows:
                for first_seq, last_seq, data in rows:
                    room -= len(data)
                    if found and room < 0:
                        break
                    found.append(Segment(first_seq, last_seq, data))
            return found

        return await self._read(read)

    async def get_task(self, owner: str, agent_id: str, task_id: str) -> TaskRow | None:
        return await self._read(lambda connection: _named(connection, owner, agent_id, task_id))

    async def get_task_by_key(self, key: int) -> TaskRow | None:
        return await self._read(lambda connection: _keyed(connection, key))

    async def list_tasks(
        self,
        owner: str,
        *,
        agent_id: str | None = None,
        session_id: str | None = None,
        status: str | None = None,
        limit: int = 50,
        token: str = "",
    ) -> Page[TaskRow]:
        question = ("tasks", owner, agent_id, session_id, status)
        position = page_position(token, question)
        conditions = [tasks.c.owner == owner]
        if session_id is not None:
            session = select(sessions.c.key).where(sessions.c.owner == owner, sessions.c.session_id == session_id)
            conditions.append(tasks.c.session_key == session.scalar_subquery())
        if agent_id is not None:
            conditions.append(tasks.c.agent_id == agent_id)
        if status is not None:
            conditions.append(tasks.c.status == status)

        def read(connection: Connection) -> Page[TaskRow]:
            total = connection.execute(select(func.count()).select_from(tasks).where(*conditions)).scalar_one()
            rows = connection.execute(_newest(_TASK.where(*conditions), tasks, position, limit)).all()
            items = [_task(row) for row in rows[:limit]]
            return Page(items, total, page_token(items[-1].key, question) if len(rows) > limit else "")

        return await self._read(read)

    async def delete_task(self, owner: str, agent_id: str, task_id: str) -> None:
        def remove(connection: Connection) -> None:
            row = _named(connection, owner, agent_id, task_id)
            if row is None:
                raise TaskNotFound(f"No task {task_id}", task_id=task_id)
            if not row.ended:
                raise TaskRunning(f"Task {task_id} has not ended", task_id=task_id)
            connection.execute(_REMOVE_TASK, {"gone": row.key})

        await self._writer.run(remove)

    async def take_over(self, instance: str) -> list[TaskRow]:
        # The file's lock is ours, so whoever else began something in it is dead.
        def take(connection: Connection) -> list[TaskRow]:
            orphaned = (tasks.c.ended_at.is_(None), tasks.c.instance != instance)
            keys = connection.execute(select(tasks.c.key).where(*orphaned).order_by(tasks.c.key)).scalars().all()
            if keys:
                connection.execute(update(tasks).where(*orphaned).values(instance=instance))
            connection.execute(delete(instances).where(instances.c.id.not_in([instance, self._instance])))
            return [_task(connection.execute(_TASK_BY_KEY, {"key": key}).one()) for key in keys]

        return await self._writer.run(take)

    # --- sessions -----------------------------------------------------------------------------------------------------
    async def create_session(self, row: SessionRow, *, limit: int) -> None:
        values = _session_values(row)

        def create(connection: Connection) -> None:
            now = row.created_at
            same = connection.execute(
                _SESSION_BY_NAME, {"owner": row.owner, "session_id": row.session_id}
            ).one_or_none()
            if same is not None and (same.expires_at > now or _is_at_work(connection, same.key)):
                raise SessionExists(f"Session {row.session_id} exists")
            held = (
                select(sessions.c.key)
                .where(sessions.c.owner == row.owner, sessions.c.expires_at > now)
                .limit(limit)
                .subquery()
            )
            if connection.execute(select(func.count()).select_from(held)).scalar_one() >= limit:
                raise RateLimited(f"No more than {limit} sessions")
            if same is not None:
                connection.execute(delete(sessions).where(sessions.c.key == same.key))
            result = connection.execute(
                insert(sessions),
                values
                | {
                    "owner": row.owner,
                    "session_id": row.session_id,
                    "agent_id": row.agent_id,
                    "created_at": row.created_at,
                    "ttl_seconds": row.ttl_seconds,
                },
            )
            _label(connection, _key_of(result), row.metadata)

        await self._writer.run(create)

    async def get_session(self, owner: str, session_id: str, *, now: int) -> SessionRow | None:
        def read(connection: Connection) -> SessionRow | None:
            row = _live_session(connection, owner, session_id, now)
            return None if row is None else _session(row)

        return await self._read(read)

    async def list_sessions(
        self,
        owner: str,
        *,
        now: int,
        agent_id: str | None = None,
        metadata: dict[str, str] | None = None,
        limit: int = 50,
        token: str = "",
    ) -> Page[SessionRow]:
        question = ("sessions", owner, agent_id, metadata or None)
        position = page_position(token, question)
        conditions = [sessions.c.owner == owner, sessions.c.expires_at > now]
        if agent_id is not None:
            conditions.append(sessions.c.agent_id == agent_id)
        for name, text in (metadata or {}).items():
            labelled = select(labels.c.session_key).where(labels.c.digest == _digest(name, text))
            conditions.append(sessions.c.key.in_(labelled))

        def read(connection: Connection) -> Page[SessionRow]:
            total = connection.execute(select(func.count()).select_from(sessions).where(*conditions)).scalar_one()
            rows = connection.execute(_newest(_SESSION.where(*conditions), sessions, position, limit)).all()
            items = [_session(row) for row in rows[:limit]]
            return Page(items, total, page_token(rows[limit - 1].key, question) if len(rows) > limit else "")

        return await self._read(read)

    async def update_session(
        self,
        owner: str,
        session_id: str,
        *,
        now: int,
        state: Any = None,
        metadata: Any = None,
        if_match: str | None = None,
    ) -> SessionRow:
        def change(connection: Connection) -> SessionRow:
            found = _live_session(connection, owner, session_id, now)
            if found is None:
                raise SessionNotFound(f"No session {session_id}")
            row = patched(_session(found), now=now, state=state, metadata=metadata, if_match=if_match)
            values = _session_values(row)
            connection.execute(update(sessions).where(sessions.c.key == found.key).values(values))
            if values["metadata"] != found.metadata:
                connection.execute(delete(labels).where(labels.c.session_key == found.key))
                _label(connection, found.key, row.metadata)
            # as it will be read: nothing of the caller's patches is in it
            return msgspec.structs.replace(row, state=_json(values["state"]), metadata=_json(values["metadata"]))

        return await self._writer.run(change)

    async def delete_session(self, owner: str, session_id: str) -> None:
        def remove(connection: Connection) -> None:
            where = (sessions.c.owner == owner, sessions.c.session_id == session_id)
            if connection.execute(delete(sessions).where(*where)).rowcount == 0:
                raise SessionNotFound(f"No session {session_id}")

        await self._writer.run(remove)

    async def list_messages(
        self, owner: str, session_id: str, *, now: int, limit: int = 50, token: str = ""
    ) -> Page[MessageRow]:
        question = ("messages", owner, session_id)
        position = page_position(token, question)

        def read(connection: Connection) -> Page[MessageRow]:
            session = _live_session(connection, owner, session_id, now)
            if session is None:
                raise SessionNotFound(f"No session {session_id}")
            of_session = messages.c.session_key == session.key
            # messages go with their session only, so the last one's number is how many there are
            total = connection.execute(select(func.coalesce(func.max(messages.c.n), 0)).where(of_session)).scalar_one()
            page = _MESSAGES.where(of_session, messages.c.n > (position or 0)).order_by(messages.c.n).limit(limit + 1)
            rows = connection.execute(page).all()
            items = [_message(row) for row in rows[:limit]]
            return Page(items, total, page_token(rows[limit - 1].n, question) if len(rows) > limit else "")

        return await self._read(read)

    async def history(self, owner: str, session_id: str, *, limit: int) -> list[MessageRow]:
        session = select(sessions.c.key).where(sessions.c.owner == owner, sessions.c.session_id == session_id)
        last = (
            _MESSAGES.where(messages.c.session_key == session.scalar_subquery())
            .order_by(messages.c.n.desc())
            .limit(limit)
        )
        return await self._read(lambda connection: [_message(row) for row in reversed(connection.execute(last).all())])

    # --- housekeeping -------------------------------------------------------------------------------------------------
    async def sweep(self, *, now: int, tasks_ended_before: int, limit: int) -> int:
        return await self._writer.run(partial(_sweep, now, tasks_ended_before, limit))

    async def check(self) -> None:
        # a counter, since a row that stays the same is not written
        count = update(instances).where(instances.c.id == self._instance).values(checks=instances.c.checks + 1)
        await self._writer.run(lambda connection: connection.execute(count))

    def statistics(self) -> StoreStatistics:
        writer = self._writer
        return StoreStatistics(sqlite.size(self._path), writer.commits, writer.commit_seconds, writer.operations)


# --- operations -------------------------------------------------------------------------------------------------------
# Each runs in a transaction of the writer, and refuses before it writes.


def _keyed(connection: Connection, key: int) -> TaskRow | None:
    row = connection.execute(_TASK_BY_KEY, {"key": key}).one_or_none()
    return None if row is None else _task(row)


def _named(connection: Connection, owner: str, agent_id: str, task_id: str) -> TaskRow | None:
    name = {"owner": owner, "agent_id": agent_id, "task_id": task_id}
    row = connection.execute(_TASK_BY_NAME, name).one_or_none()
    return None if row is None else _task(row)


def _live_session(connection: Connection, owner: str, session_id: str, now: int) -> Row[*tuple[Any, ...]] | None:
    row = connection.execute(_SESSION_BY_NAME, {"owner": owner, "session_id": session_id}).one_or_none()
    return row if row is not None and row.expires_at > now else None


def _is_at_work(connection: Connection, session_key: int) -> bool:
    unfinished = select(tasks.c.key).where(tasks.c.session_key == session_key, tasks.c.ended_at.is_(None)).limit(1)
    return connection.execute(unfinished).first() is not None


def _key_of(result: Any) -> int:
    return int(result.inserted_primary_key[0])


def _newest(rows: Select[Any], table: Table, position: int | None, limit: int) -> Select[Any]:
    before = NEVER if position is None else position
    return rows.where(table.c.key < before).order_by(table.c.key.desc()).limit(limit + 1)


def _label(connection: Connection, session_key: int, metadata: Mapping[str, Any]) -> None:
    if metadata:
        digests = {_digest(name, text_of(value)) for name, value in metadata.items()}
        connection.execute(insert(labels), [{"session_key": session_key, "digest": digest} for digest in digests])


def _create_task(new: NewTask, metadata: str, connection: Connection) -> Accepted:
    used = _used(connection, new.owner, new.idempotency, new.created_at)
    if used is not None:
        return Accepted("replayed", used)
    session_key = None
    if new.session_id is not None:
        session = _live_session(connection, new.owner, new.session_id, new.created_at)
        if session is None:
            raise SessionNotFound(f"No session {new.session_id}")
        if session.agent_id != new.agent_id:
            raise SessionMismatch(f"Session {new.session_id} belongs to agent {session.agent_id}")
        session_key = session.key
    same = _named(connection, new.owner, new.agent_id, new.task_id)
    if same is not None and not same.ended:
        if same.fingerprint != new.fingerprint:
            raise TaskExists(f"Task {new.task_id} has not ended and is a different one", task_id=new.task_id)
        _remember(connection, new, same.key)
        return Accepted("running", same)
    if same is not None:
        _rename(connection, same)
    row = _insert_task(connection, new, metadata, session_key)
    _remember(connection, new, row.key)
    if session_key is not None:
        connection.execute(_TOUCH, {"of_task": row.key, "at": new.created_at})
    return Accepted("created", row)


def _used(connection: Connection, owner: str, key: Idempotency | None, now: int) -> TaskRow | None:
    """The task for which the idempotency key was used."""
    if key is None:
        return None
    found = connection.execute(
        select(idempotency.c.body_hash, idempotency.c.task_key).where(
            idempotency.c.owner == owner,
            idempotency.c.route == key.route,
            idempotency.c.key == key.key,
            idempotency.c.expires_at > now,
        )
    ).one_or_none()
    if found is None:
        return None
    if found.body_hash != key.body_hash:
        raise IdempotencyMismatch("The idempotency key was used with another body")
    return _keyed(connection, found.task_key)


def _remember(connection: Connection, new: NewTask, task_key: int) -> None:
    key = new.idempotency
    if key is None:
        return
    connection.execute(
        delete(idempotency).where(
            idempotency.c.owner == new.owner, idempotency.c.route == key.route, idempotency.c.key == key.key
        )
    )
    connection.execute(
        insert(idempotency),
        {
            "owner": new.owner,
            "route": key.route,
            "key": key.key,
            "body_hash": key.body_hash,
            "expires_at": key.expires_at,
            "task_key": task_key,
        },
    )


def _rename(connection: Connection, ended: TaskRow) -> None:
    def highest(stem: str) -> int:
        values = {"owner": ended.owner, "agent_id": ended.agent_id, "stem": stem}
        return connection.execute(_HIGHEST, values).scalar_one() or 0

    name = next_name(ended.task_id, highest)
    stem, number = split_name(name)
    connection.execute(update(tasks).where(tasks.c.key == ended.key).values(task_id=name, stem=stem, number=number))


def _insert_task(connection: Connection, new: NewTask, metadata: str, session_key: int | None) -> TaskRow:
    stem, number = split_name(new.task_id)
    result = connection.execute(
        insert(tasks),
        {
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
            "ended_at": None,
            "session_id": new.session_id,
            "session_key": session_key,
            "last_seq": 0,
        },
    )
    key = _key_of(result)
    connection.execute(
        insert(bodies),
        {"task_key": key, "request": new.request, "metadata": metadata, "output": None, "error": None},
    )
    return TaskRow(
        key=key,
        owner=new.owner,
        agent_id=new.agent_id,
        task_id=new.task_id,
        status="pending",
        request=new.request,
        fingerprint=new.fingerprint,
        policy=new.policy,
        instance=new.instance,
        metadata=_json(metadata),
        created_at=new.created_at,
        session_id=new.session_id,
    )


def _rounds(calls: Sequence[Sequence[Append]]) -> Iterator[list[Append]]:
    """All appends in order, in rounds in which no task comes twice: one statement changes a row once."""
    current: dict[int, Append] = {}
    for call in calls:
        if any(append.key in current for append in call):
            yield list(current.values())
            current = {}
        for append in call:
            current[append.key] = append
    yield list(current.values())


def _refused(connection: Connection, appends: Sequence[Append]) -> frozenset[int]:
    refused = set()
    row_of = select(tasks.c.last_seq, tasks.c.instance, tasks.c.ended_at).with_for_update()
    for append in appends:
        row = connection.execute(row_of.where(tasks.c.key == append.key)).one_or_none()
        fits = (append.instance, append.first_seq - 1, None)
        if row is None or (row.instance, row.last_seq, row.ended_at) != fits:
            refused.add(append.key)
    return frozenset(refused)


def _change_values(append: Append) -> dict[str, Any]:
    change = append.change
    assert change is not None
    return {
        "task_key": append.key,
        "before": append.first_seq - 1,
        "writer": append.instance,
        "after": append.last_seq,
        "new_status": change.status,
        "new_ended_at": change.ended_at,
    }


def _body_values(append: Append) -> dict[str, Any]:
    change = append.change
    assert change is not None
    return {"of_task": append.key, "new_output": _optional(change.output), "new_error": _optional(change.error)}


def _message_values(key: int, message: MessageRow) -> dict[str, Any]:
    return {
        "of_task": key,
        "new_task_key": key,
        "new_task_id": message.task_id,
        "new_agent_id": message.agent_id,
        "new_role": message.role,
        "new_type": message.type,
        "new_content": _text(message.content),
        "new_created_at": message.created_at,
        "new_partial_status": message.partial_status,
    }


def _sweep(now: int, tasks_ended_before: int, limit: int, connection: Connection) -> int:
    gone = _sweep_keys(connection, now, limit)
    gone += _remove_tasks(
        connection,
        select(tasks.c.key)
        .where(tasks.c.session_key.is_(None), tasks.c.ended_at < tasks_ended_before)
        .order_by(tasks.c.ended_at)
        .limit(limit - gone),
    )
    unfinished = select(tasks.c.key).where(tasks.c.session_key == sessions.c.key, tasks.c.ended_at.is_(None))
    expired = select(sessions.c.key).where(sessions.c.expires_at <= now, ~unfinished.exists()).limit(limit - gone)
    for key in connection.execute(expired).scalars().all():
        # task by task, however many a session has; nobody sees an expired session become less
        gone += _remove_tasks(connection, select(tasks.c.key).where(tasks.c.session_key == key).limit(limit - gone))
        if gone >= limit:
            break
        connection.execute(delete(sessions).where(sessions.c.key == key))
        gone += 1
    return gone


def _sweep_keys(connection: Connection, now: int, limit: int) -> int:
    expired = select(idempotency.c.owner, idempotency.c.route, idempotency.c.key)
    rows = connection.execute(expired.where(idempotency.c.expires_at <= now).limit(limit)).all()
    if rows:
        connection.execute(
            delete(idempotency).where(
                idempotency.c.owner == bindparam("of_owner"),
                idempotency.c.route == bindparam("of_route"),
                idempotency.c.key == bindparam("of_key"),
            ),
            [{"of_owner": owner, "of_route": route, "of_key": key} for owner, route, key in rows],
        )
    return len(rows)


def _remove_tasks(connection: Connection, which: Select[Any]) -> int:
    keys = connection.execute(which).scalars().all()
    if keys:
        connection.execute(_REMOVE_TASK, [{"gone": key} for key in keys])
    return len(keys)
