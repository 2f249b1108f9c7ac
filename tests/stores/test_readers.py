"""The reader connections: abandoned reads, and closing."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from hector_trio.errors import NotFound, StoreUnavailable
from hector_trio.stores import sqlite
from hector_trio.stores.readers import READERS, Readers
from tests import HANG

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


class Counting:
    """Counts the connections of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.opened = 0

    def connect(self) -> Connection:
        self.opened += 1
        return self.engine.connect()


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    engine = sqlite.open_engine(tmp_path / "r.db", "process", writes=True)
    with engine.connect() as connection, connection.begin():
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    return Counting(sqlite.open_engine(tmp_path / "r.db", "process", writes=False))


@pytest.fixture
async def readers(counting: Counting) -> AsyncIterator[Readers]:
    opened = Readers(counting, meaning=sqlite.meaning, interrupt=sqlite.interrupt)  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        with trio.fail_after(5):
            await opened.close()


def count(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT count(*) FROM t").scalar_one())


async def test_connections_are_used_again(readers: Readers, counting: Counting) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(readers.run, count)
    assert counting.opened <= READERS


async def test_a_cancelled_read_is_left_at_once_and_its_connection_is_not_shared(
    readers: Readers, counting: Counting
) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(connection: Connection) -> int:
        entered.set()
        assert go.wait(HANG)
        return count(connection)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readers.run, slow)
            assert await trio.to_thread.run_sync(entered.wait, 5)
            nursery.cancel_scope.cancel()
        assert await readers.run(count) == 0
        assert counting.opened == 2
        go.set()
        for _ in range(20):
            assert await readers.run(count) == 0
    assert counting.opened <= READERS


async def test_closing_ends_the_reads_that_nobody_waits_for(readers: Readers) -> None:
    entered = threading.Event()

    def endless(connection: Connection) -> None:
        entered.set()
        connection.exec_driver_sql(FOREVER)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readers.run, endless)
            assert await trio.to_thread.run_sync(entered.wait, 5)
            nursery.cancel_scope.cancel()
        await readers.close()
    with pytest.raises(StoreUnavailable):
        await readers.run(count)


async def test_an_answer_that_is_an_error_keeps_the_connection_and_a_broken_one_goes(
    readers: Readers, counting: Counting
) -> None:
    def refuse(_connection: Connection) -> None:
        raise NotFound("nothing there")

    for _ in range(3):
        with pytest.raises(NotFound):
            await readers.run(refuse)
    assert counting.opened == 1
    with pytest.raises(DBAPIError):
        await readers.run(lambda c: c.exec_driver_sql("SELECT * FROM missing"))
    assert await readers.run(count) == 0
    assert counting.opened == 2
