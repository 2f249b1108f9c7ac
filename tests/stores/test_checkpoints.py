"""The write-ahead log: copied beside the writer, bounded, and used again."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise

import pytest
import trio
from sqlalchemy import Connection

from hector_trio.stores import checkpoints
from hector_trio.stores.sql import SqlStore
from tests.stores.making import accept, chunks


def wal_size(sql: SqlStore) -> int:
    return os.stat(f"{sql._opened.path}-wal").st_size


async def rest(sql: SqlStore) -> None:
    """Has the writer look at what it wrote, and waits for what it then had copied."""
    await sql.check()
    await trio.to_thread.run_sync(sql._checkpoints.close)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which threads copied, with small limits."""
    monkeypatch.setattr(checkpoints, "STEP", 1 << 20)
    monkeypatch.setattr(checkpoints, "LIMIT", 4 << 20)
    threads: list[str] = []
    original: Callable[[sqlite3.Connection], int] = checkpoints._checkpoint

    def checkpoint(driver: sqlite3.Connection) -> int:
        threads.append(threading.current_thread().name)
        return original(driver)

    monkeypatch.setattr(checkpoints, "_checkpoint", checkpoint)
    return threads


async def test_once_the_log_has_grown_it_is_copied_beside_the_writer_and_begins_anew_when_that_rests(
    sql: SqlStore, copied: list[str]
) -> None:
    row = await accept(sql)
    for seq in range(1, 10):
        await sql.append([chunks(row.key, seq, b"x" * 200_000)])
    await rest(sql)
    assert set(copied) == {"hector store checkpoint"}
    grown = wal_size(sql)
    await sql.check()
    await sql.check()
    assert wal_size(sql) < grown
    assert len(await sql.read_log(row.key, 0, 1 << 30)) == 9


async def test_the_log_of_a_writer_that_never_rests_is_bounded(sql: SqlStore, copied: list[str]) -> None:
    row = await accept(sql)
    sizes = []
    for seq in range(1, 120):
        await sql.append([chunks(row.key, seq, b"x" * 200_000)])
        sizes.append(wal_size(sql))
    assert max(sizes) < 2 * checkpoints.LIMIT + (1 << 20)
    assert any(later < earlier for earlier, later in pairwise(sizes))


async def test_a_reader_that_stays_delays_no_append(sql: SqlStore, copied: list[str]) -> None:
    row = await accept(sql)
    with closing(sqlite3.connect(sql._opened.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM tasks").fetchall()
        with trio.fail_after(20):
            for seq in range(1, 60):
                await sql.append([chunks(row.key, seq, b"x" * 200_000)])
        assert wal_size(sql) > 60 * 190_000
    for seq in range(60, 90):
        await sql.append([chunks(row.key, seq, b"x" * 200_000)])
        await rest(sql)
    assert wal_size(sql) < 3 * checkpoints.LIMIT


async def test_a_copy_that_fails_is_tried_again(
    sql: SqlStore, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await accept(sql)
    original = checkpoints._checkpoint
    failures: list[sqlite3.Connection] = []

    def fails_once(driver: sqlite3.Connection) -> int:
        if not failures:
            failures.append(driver)
            raise sqlite3.OperationalError("disk I/O error")
        return original(driver)

    monkeypatch.setattr(checkpoints, "_checkpoint", fails_once)
    for seq in range(1, 30):
        await sql.append([chunks(row.key, seq, b"x" * 200_000)])
        await rest(sql)
    assert failures
    assert copied
    assert wal_size(sql) < checkpoints.LIMIT


async def test_pages_of_another_size_are_counted_right(sql: SqlStore, copied: list[str]) -> None:
    row = await accept(sql)
    await sql.append([chunks(row.key, 1, b"x" * 500_000)])

    def bytes_copied(connection: Connection) -> int:
        return checkpoints._checkpoint(connection.connection.driver_connection)  # type: ignore[arg-type]

    engine = sql._opened.writing
    assert await trio.to_thread.run_sync(lambda: bytes_copied(engine.connect())) == wal_size(sql)
