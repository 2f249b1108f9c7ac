"""The writer thread: grouping, culprits, cancellation, and its death."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from hector_trio.errors import NotFound, StoreUnavailable
from hector_trio.stores import sqlite
from hector_trio.stores.writer import Again, Writer
from tests import HANG

Operation = Callable[[Connection], None]


@asynccontextmanager
async def open_writer(path: Path) -> AsyncIterator[Writer]:
    engine = sqlite.open_engine(path / "w.db", "process", writes=True)
    writer = Writer(engine.connect, sqlite.meaning)
    try:
        await writer.run(lambda c: c.exec_driver_sql("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY)"))
        yield writer
    finally:
        with trio.move_on_after(5, shield=True):
            await writer.close()
        assert writer.has_ended


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    async with open_writer(tmp_path) as opened:
        yield opened


class Gate:
    """An operation that stays in the writer's thread until it is let go."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._go = threading.Event()

    def __call__(self, connection: Connection) -> str:
        self._entered.set()
        assert self._go.wait(HANG)
        return "through"

    async def entered(self) -> None:
        assert await trio.to_thread.run_sync(self._entered.wait, HANG)

    def open(self) -> None:
        self._go.set()


def put(n: int) -> Operation:
    def operation(connection: Connection) -> None:
        connection.exec_driver_sql("INSERT INTO t VALUES (?)", (n,))

    return operation


async def stored(writer: Writer) -> list[int]:
    def read(connection: Connection) -> list[int]:
        return [n for (n,) in connection.exec_driver_sql("SELECT n FROM t ORDER BY n").fetchall()]

    return await writer.run(read)


async def test_all_that_waits_is_one_commit(writer: Writer) -> None:
    seen: list[tuple[float, int]] = []
    writer.on_commit = lambda seconds, operations: seen.append((seconds, operations))
    gate = Gate()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, gate)
            await gate.entered()
            for n in range(500):
                nursery.start_soon(writer.run, put(n))
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
    assert [operations for _, operations in seen] == [1, 500]
    assert all(seconds > 0 for seconds, _ in seen)
    assert await stored(writer) == list(range(500))
    assert (writer.commits, writer.operations) == (4, 503)


async def test_one_bad_operation_fails_alone(writer: Writer) -> None:
    failures: list[Exception] = []

    async def bad() -> None:
        with pytest.raises(IntegrityError) as caught:
            await writer.run(put(1))
        failures.append(caught.value)

    await writer.run(put(1))
    gate = Gate()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, gate)
            await gate.entered()
            nursery.start_soon(writer.run, put(2))
            nursery.start_soon(bad)
            nursery.start_soon(writer.run, put(3))
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
    assert len(failures) == 1
    assert await stored(writer) == [1, 2, 3]


async def test_a_refusal_does_not_undo_its_neighbours(writer: Writer) -> None:
    runs = []

    def counted(connection: Connection) -> None:
        runs.append(1)
        put(1)(connection)

    def refuse(_connection: Connection) -> None:
        raise NotFound("nothing there")

    async def refused() -> None:
        with pytest.raises(NotFound):
            await writer.run(refuse)

    gate = Gate()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, gate)
            await gate.entered()
            nursery.start_soon(writer.run, counted)
            nursery.start_soon(refused)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
    assert runs == [1]
    assert await stored(writer) == [1]


async def test_a_cancel_withdraws_what_the_thread_has_not_taken(writer: Writer) -> None:
    gate = Gate()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, gate)
            await gate.entered()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(writer.run, put(1))
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
            gate.open()
    assert await stored(writer) == []


async def test_a_cancel_waits_for_what_the_thread_has_taken_and_its_result_is_returned(writer: Writer) -> None:
    gate = Gate()
    results: list[str] = []

    def slow(connection: Connection) -> str:
        put(1)(connection)
        return gate(connection)

    with trio.fail_after(5), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def run() -> None:
                results.append(await writer.run(slow))
                results.append("no checkpoint until here")
                await trio.lowlevel.checkpoint()
                results.append("never")

            with trio.CancelScope(shield=True):
                await gate.entered()
                scope.cancel()
                gate.open()
    assert results == ["through", "no checkpoint until here"]
    assert await stored(writer) == [1]


async def test_operations_of_one_kind_travel_together_and_again_alone_when_surprised(writer: Writer) -> None:
    calls: list[tuple[list[int], bool]] = []

    def together(connection: Connection, numbers: Sequence[int], again: bool) -> list[int]:
        calls.append((list(numbers), again))
        for n in numbers:
            put(n)(connection)
        if 13 in numbers and not again:
            raise Again
        return [n * 10 for n in numbers]

    results: dict[int, int] = {}

    async def run(n: int) -> None:
        results[n] = await writer.run_together(together, n)

    for numbers in ([1, 2, 3], [12, 13]):
        gate = Gate()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.run, gate)
                await gate.entered()
                for n in numbers:
                    nursery.start_soon(run, n)
                await trio.testing.wait_all_tasks_blocked()
                gate.open()
    assert results == {n: n * 10 for n in (1, 2, 3, 12, 13)}
    (first, second, *alone) = calls
    assert (sorted(first[0]), first[1]) == ([1, 2, 3], False)
    assert (sorted(second[0]), second[1]) == ([12, 13], False)
    assert sorted(alone) == [([12], True), ([13], True)]
    assert await stored(writer) == [1, 2, 3, 12, 13]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_thread_fails_those_who_wait_and_all_later_calls(
    writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    unavailable: list[str] = []

    def die(connection: Connection) -> None:
        put(7)(connection)
        raise SystemExit

    async def fails(operation: Operation) -> None:
        with pytest.raises(StoreUnavailable) as caught:
            await writer.run(operation)
        unavailable.append(caught.value.detail)

    gate = Gate()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, gate)
            await gate.entered()
            nursery.start_soon(fails, put(1))
            nursery.start_soon(fails, die)
            nursery.start_soon(fails, put(2))
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
        await fails(put(3))
    assert unavailable == ["The store's writer has stopped"] * 4
    assert "writer has stopped" in caplog.text


async def test_closing_finishes_what_waits_and_refuses_the_rest(tmp_path: Path) -> None:
    async with open_writer(tmp_path) as writer:
        gate = Gate()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.run, gate)
                await gate.entered()
                nursery.start_soon(writer.run, put(1))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(writer.close)
                await trio.testing.wait_all_tasks_blocked(0.01)
                with pytest.raises(StoreUnavailable):
                    await writer.run(put(2))
                gate.open()
        with pytest.raises(StoreUnavailable, match="closed"):
            await writer.run(put(2))
    async with open_writer(tmp_path) as again:
        assert await stored(again) == [1]


async def test_when_no_transaction_can_be_opened_all_hear_of_it_once_and_it_is_tried_again(tmp_path: Path) -> None:
    good = sqlite.open_engine(tmp_path / "w.db", "process", writes=True)
    bad = sqlite.open_engine(tmp_path / "no" / "such" / "folder.db", "process", writes=True)
    entered, go = threading.Event(), threading.Event()
    attempts: list[int] = []

    def connect() -> Connection:
        attempts.append(1)
        entered.set()
        assert go.wait(HANG)
        return bad.connect() if len(attempts) <= 2 else good.connect()

    writer = Writer(connect, sqlite.meaning)
    details: list[str] = []

    async def fails() -> None:
        with pytest.raises(StoreUnavailable) as caught:
            await writer.run(put(1))
        details.append(caught.value.detail)

    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails)
                assert await trio.to_thread.run_sync(entered.wait, 5)
                for _ in range(3):
                    nursery.start_soon(fails)
                await trio.testing.wait_all_tasks_blocked()
                go.set()
        assert details == ["The store cannot be opened"] * 4
        assert len(attempts) == 2
        await writer.run(lambda c: c.exec_driver_sql("CREATE TABLE t (n INTEGER)"))
    finally:
        with trio.move_on_after(5, shield=True):
            await writer.close()


async def test_an_observer_that_fails_disturbs_nobody(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_seconds: float, _operations: int) -> None:
        raise RuntimeError("observer")

    writer.on_commit = broken
    await writer.run(put(1))
    assert await stored(writer) == [1]
    assert "on_commit" in caplog.text


async def test_a_mistake_in_an_operation_is_not_called_the_stores_fault(writer: Writer) -> None:
    with pytest.raises(DBAPIError, match="no such table"):
        await writer.run(lambda c: c.exec_driver_sql("INSERT INTO missing VALUES (1)"))
    await writer.run(put(1))
    assert await stored(writer) == [1]
