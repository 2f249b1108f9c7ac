"""The store in an SQL database: every method is one transaction, all writes go through one thread. SQLite for now."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import trio
from sqlalchemy import Connection, Engine, delete, insert, make_url, update
from sqlalchemy.exc import ArgumentError, DBAPIError

from hector_trio.errors import StartError, StoreUnavailable
from hector_trio.session import MessageRow, SessionRow
from hector_trio.stores import (
    HISTORY_BYTES,
    PAGE_BYTES,
    SESSION_BYTES,
    Accepted,
    Append,
    Idempotency,
    NewPush,
    NewTask,
    Page,
    Push,
    PushMove,
    Segment,
    State,
    StoreStatistics,
    sql_push,
    sql_removal,
    sql_sessions,
    sql_tasks,
    sqlite,
)
from hector_trio.stores.checkpoints import Checkpoints
from hector_trio.stores.readers import Readers
from hector_trio.stores.rules import Quota, check_appends, time_of
from hector_trio.stores.schema import HEAD, instances, tables
from hector_trio.stores.writer import Writer
from hector_trio.task import TaskRow

R = TypeVar("R")

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
        if store._writer.has_ended and store._checkpoints.has_ended:
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
    path = Path(os.path.realpath(path))  # the lock beside it must be the same by whatever name it is opened
    with ExitStack() as stack:
        stack.enter_context(sqlite.claim(path, instance, now))
        version = sqlite.stored_version(path)
        writing = sqlite.open_engine(path, durability, writes=True)
        reading = sqlite.open_engine(path, durability, writes=False)
        mine = {"id": instance, "pid": os.getpid(), "host": socket.gethostname(), "started_at": now, "checks": 0}

        def begin(connection: Connection) -> None:
            with connection.begin():
                if version is None:
                    _make(connection)
                elif version != HEAD:
                    _migrate(connection, path, version)
                connection.execute(delete(instances).where(instances.c.id == instance))
                connection.execute(insert(instances).values(mine))

        try:
            with writing.connect() as connection:
                try:
                    begin(connection)
                except (DBAPIError, sqlite3.Error) as error:
                    if not Checkpoints(path)(connection, error):
                        raise
                    begin(connection)
        except (DBAPIError, sqlite3.Error) as error:
            raise sqlite.start_error(path, error) from error
        kept = stack.pop_all()
    return _Opened(path, kept, writing, reading)


def _make(connection: Connection) -> None:
    """Makes the tables of a new file as the migrations would, and says so: importing alembic takes longer than all."""
    tables.create_all(connection, checkfirst=False)
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
        "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (HEAD,))
    sqlite.mark(connection)


def _migrate(connection: Connection, path: Path, version: str) -> None:
    """Brings an older schema to ``HEAD`` in the transaction of ``connection``."""
    # imported here: a store that is up to date starts without alembic
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    try:
        ScriptDirectory.from_config(config).get_revision(version)
    except CommandError:
        raise StartError(
            f"The store {path} was written by a newer version (schema {version}, this version knows {HEAD})"
        ) from None
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


class SqlStore:
    """The Store protocol on SQL; see there for what each method promises. Made by ``open_sql``."""

    def __init__(self, opened: _Opened, instance: str) -> None:
        self._instance = instance
        self._opened = opened
        self._quota = Quota()
        self._appender = sql_tasks.Appender()
        self._readers = Readers(opened.reading, meaning=sqlite.meaning, interrupt=sqlite.interrupt)
        self._checkpoints = Checkpoints(opened.path)
        self._writer = Writer(opened.writing.connect, sqlite.meaning, self._checkpoints)

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
        # where that fails, the next process finds the row of a dead instance
        with suppress(StoreUnavailable):
            await self._writer.run(lambda c: c.execute(mine))
        await self._writer.close()
        await trio.to_thread.run_sync(self._checkpoints.close, abandon_on_cancel=True)
        await self._readers.close()

    async def _read(self, read: Callable[[Connection], R]) -> R:
        self._writer.check()
        return await self._readers.run(read)

    # --- tasks and logs -----------------------------------------------------------------------------------------------
    async def create_task(self, new: NewTask) -> Accepted:
        return await self._writer.run(lambda c: sql_tasks.create(c, new))

    async def find_idempotent(self, owner: str, idempotency: Idempotency, *, now: int) -> Accepted | None:
        row = await self._read(lambda c: sql_tasks.used(c, owner, idempotency, now))
        return None if row is None else Accepted("replayed", row)

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        check_appends(appends)
        return await self._writer.run_together(self._appender.append, appends)

    async def read_log(self, key: int, after: int, limit_bytes: int) -> list[Segment]:
        return await self._read(lambda c: sql_tasks.read_log(c, key, after, limit_bytes))

    async def get_task(self, owner: str, agent_id: str, task_id: str, *, now: int | None = None) -> TaskRow | None:
        return await self._read(lambda c: sql_tasks.get(c, owner, agent_id, task_id, time_of(now)))

    async def get_task_by_key(self, key: int) -> TaskRow | None:
        return await self._read(lambda c: sql_tasks.by_key(c, key))

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
        listing = sql_tasks.Listing(owner, time_of(now), agent_id, session_id, status, limit, limit_bytes, token)
        return await self._read(listing.read)

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
        at = time_of(now)
        listing = sql_tasks.Recent(owner, at, agent_id, session_id, states, since, limit, limit_bytes, token)
        return await self._read(listing.read)

    async def task_messages(self, key: int, *, limit: int, limit_bytes: int = PAGE_BYTES) -> list[MessageRow]:
        return await self._read(lambda connection: sql_sessions.of_task(connection, key, limit, limit_bytes))

    async def delete_task(self, owner: str, agent_id: str, task_id: str) -> None:
        await self._writer.run(lambda c: sql_tasks.remove(c, owner, agent_id, task_id))

    async def set_policy(self, key: int, policy: str) -> None:
        await self._writer.run(lambda c: sql_tasks.set_policy(c, key, policy))

    async def take_over(self, instance: str) -> list[TaskRow]:
        # the file's lock is ours, so whoever else began something in it is dead
        others = delete(instances).where(instances.c.id.not_in([instance, self._instance]))

        def take(connection: Connection) -> list[TaskRow]:
            connection.execute(others)
            return sql_tasks.take_over(connection, instance)

        return await self._writer.run(take)

    # --- webhooks -----------------------------------------------------------------------------------------------------
    async def put_push(self, new: NewPush) -> None:
        await self._writer.run(lambda c: sql_push.put(c, new))

    async def list_pushes(self, key: int) -> list[Push]:
        return await self._read(lambda c: sql_push.of_task(c, key))

    async def delete_push(self, key: int, config_id: str) -> None:
        await self._writer.run(lambda c: sql_push.remove(c, key, config_id))

    async def move_pushes(self, moves: Sequence[PushMove]) -> frozenset[tuple[int, str]]:
        return await self._writer.run(lambda c: sql_push.move(c, moves))

    async def take_over_pushes(self, instance: str) -> list[Push]:
        return await self._writer.run(lambda c: sql_push.take_over(c, instance))

    # --- sessions -----------------------------------------------------------------------------------------------------
    async def create_session(self, row: SessionRow, *, limit: int) -> None:
        await self._writer.run(lambda c: sql_sessions.create(c, row, limit, self._quota))

    async def get_session(self, owner: str, session_id: str, *, now: int) -> SessionRow | None:
        return await self._read(lambda c: sql_sessions.get(c, owner, session_id, now))

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
        return await self._read(sql_sessions.Listing(owner, now, agent_id, metadata, limit, limit_bytes, token).read)

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
        return await self._writer.run(
            lambda c: sql_sessions.change(c, owner, session_id, now, state, metadata, if_match, limit_bytes)
        )

    async def delete_session(self, owner: str, session_id: str) -> None:
        await self._writer.run(lambda c: sql_sessions.remove(c, owner, session_id))

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
        return await self._read(sql_sessions.Conversation(owner, session_id, now, limit, limit_bytes, token).read)

    async def history(
        self, owner: str, session_id: str, *, limit: int, limit_bytes: int = HISTORY_BYTES
    ) -> list[MessageRow]:
        return await self._read(lambda c: sql_sessions.history(c, owner, session_id, limit, limit_bytes))

    # --- housekeeping -------------------------------------------------------------------------------------------------
    async def sweep(
        self, *, now: int, tasks_ended_before: int, limit: int, logs_ended_before: int | None = None
    ) -> int:
        gone, more = 0, True
        while more and gone < limit:
            some = sql_removal.Sweep(now, tasks_ended_before, logs_ended_before, limit - gone)
            went, more = await self._writer.run(some.run)
            gone += went
        return gone

    async def check(self) -> None:
        # a counter, since a row that stays the same is not written
        count = update(instances).where(instances.c.id == self._instance).values(checks=instances.c.checks + 1)
        await self._writer.run(lambda c: c.execute(count))

    def statistics(self) -> StoreStatistics:
        writer = self._writer
        return StoreStatistics(sqlite.size(self._opened.path), writer.commits, writer.commit_seconds, writer.operations)
