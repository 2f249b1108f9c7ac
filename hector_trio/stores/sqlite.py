"""Everything that is SQLite's own: files and their lock, connections and pragmas, and what its errors mean."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from hector_trio.errors import StartError, StoreUnavailable
from hector_trio.models import timestamp

Durability = Literal["process", "full"]

_APPLICATION = 0x48435452
"""``PRAGMA application_id`` of our files."""

BUSY_MS = 5000
"""How long a statement waits for another program (a backup, a shell) that holds the file."""

_QUICK_CHECK_BYTES = 32 * 1024 * 1024
"""Files up to this size are checked when they are opened (about a tenth of a second at most)."""

_UNAVAILABLE = {
    sqlite3.SQLITE_FULL: "The store's disk is full",
    sqlite3.SQLITE_READONLY: "The store is read-only",
    sqlite3.SQLITE_IOERR: "The store's disk refuses to read or write",
    sqlite3.SQLITE_BUSY: "The store is locked by another program",
    sqlite3.SQLITE_LOCKED: "The store is locked by another program",
    sqlite3.SQLITE_CANTOPEN: "The store cannot be opened",
    sqlite3.SQLITE_PERM: "The store cannot be opened",
    sqlite3.SQLITE_CORRUPT: "The store's file is damaged",
    sqlite3.SQLITE_NOTADB: "The store's file is not a database",
    sqlite3.SQLITE_NOMEM: "The store has no memory left",
    sqlite3.SQLITE_INTERRUPT: "The store is closed",
    sqlite3.SQLITE_PROTOCOL: "The store is locked by another program",
}


def meaning(error: Exception) -> Exception:
    """StoreUnavailable for what the outside does to us; anything else (a bug of ours) as it is."""
    original = error.orig if isinstance(error, DBAPIError) else error
    detail = _UNAVAILABLE.get(getattr(original, "sqlite_errorcode", 0) & 0xFF)
    if detail is None:
        return error
    unavailable = StoreUnavailable(detail)
    unavailable.__cause__ = error
    return unavailable


def open_engine(path: Path, durability: Durability, *, writes: bool) -> Engine:
    """An engine whose connections may be used in any thread, by one at a time, and are not pooled."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"check_same_thread": False, "timeout": BUSY_MS / 1000},
        # an error goes to the log with its statement, and the values may be anybody's secrets
        hide_parameters=True,
    )

    def prepare(connection: Any, _record: object) -> None:
        # transactions are begun below, not by the driver's guess
        connection.isolation_level = None
        # the timeout first: changing the journal's mode needs a lock itself
        for pragma in (
            f"busy_timeout={BUSY_MS}",
            "journal_mode=WAL",
            f"synchronous={'FULL' if durability == 'full' else 'NORMAL'}",
            "foreign_keys=ON",
            "cache_size=-16000",
            # statements of many rows keep a journal of their own while they run
            "temp_store=MEMORY",
            # see checkpoints.py; the log's size on the disk is then what is in it
            "wal_autocheckpoint=0",
            "journal_size_limit=0",
            f"query_only={'OFF' if writes else 'ON'}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    # IMMEDIATE: a transaction that began as a reader and then writes fails when somebody wrote in between
    statement = "BEGIN IMMEDIATE" if writes else "BEGIN"

    def begin(connection: Connection) -> None:
        # past SQLAlchemy, which takes longer for it than SQLite does
        connection.connection.driver_connection.execute(statement).close()  # type: ignore[union-attr]

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def mark(connection: Connection) -> None:
    """Writes into a new file whose it is."""
    connection.exec_driver_sql(f"PRAGMA application_id={_APPLICATION}")


def is_full(error: Exception) -> bool:
    original = error.orig if isinstance(error, DBAPIError) else error
    return getattr(original, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def interrupt(connection: Connection) -> None:
    """Ends what ``connection`` is doing in another thread; that fails with StoreUnavailable."""
    connection.connection.driver_connection.interrupt()  # type: ignore[union-attr]


def size(path: Path) -> int:
    """Bytes on disk, the write-ahead log included."""
    total = 0
    for file in (path, path.with_name(path.name + "-wal")):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total


# --- opening ----------------------------------------------------------------------------------------------------------


@contextmanager
def claim(path: Path, instance: str, now: int) -> Iterator[None]:
    """Makes the folder (0700) and the file (0600) where they are missing, and holds the store for this process alone.

    The lock is the kernel's, on ``<path>.lock``: it ends with the process however that ends, so a file left behind
    means nothing. Raises: StartError when the folder or the file cannot be used, or another process has the store;
    where something else than a file stands in its place, nothing has been made.
    """
    if sqlite3.sqlite_version_info < (3, 35):
        raise StartError(f"SQLite {sqlite3.sqlite_version} is too old: the store needs 3.35 or newer")
    if os.path.exists(path) and not os.path.isfile(path):
        # before anything is made beside it: the neighbours of a device are nothing of ours
        raise StartError(f"The store {path} cannot be written: it is not a regular file")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"The store's folder {path.parent} cannot be made: {error.strerror}") from error
    try:
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"The store's folder {path.parent} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"The store {path} is in use by {_holder(lock)}") from None
        except OSError as error:
            raise StartError(f"The store {path} cannot be locked: {error.strerror}") from error
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            text = json.dumps({"pid": os.getpid(), "started": timestamp(now), "instance": instance}).encode()
            os.ftruncate(lock, 0)
            os.pwrite(lock, text, 0)
        except OSError as error:
            raise StartError(f"The store {path} cannot be written: {error.strerror}") from error
        yield
    finally:
        os.close(lock)


def _holder(lock: int) -> str:
    try:
        held = json.loads(os.pread(lock, 4096, 0))
        return f"process {int(held['pid'])} since {held['started']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


def stored_version(path: Path) -> str | None:
    """The migration the file is at; ``None`` for a new file. Changes nothing.

    Raises: StartError for a file that is not a database, is damaged, or is another program's.
    """
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_MS / 1000)) as connection:
            if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):
                return None
            ours = connection.execute("PRAGMA application_id").fetchone() == (_APPLICATION,)
            if not ours:
                raise StartError(f"The file {path} is the database of another program")
            if path.stat().st_size <= _QUICK_CHECK_BYTES:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise StartError(f"The store {path} is damaged ({' '.join(found.split())}): restore a backup")
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return None if row is None else str(row[0])
    except sqlite3.Error as error:
        raise start_error(path, error) from error


def start_error(path: Path, error: Exception) -> StartError:
    """Why a file that could be claimed cannot be opened."""
    original = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(original, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return StartError(f"The file {path} is not a database")
    if code == sqlite3.SQLITE_CORRUPT:
        return StartError(f"The store {path} is damaged: restore a backup")
    return StartError(f"The store {path} cannot be opened: {original}")
