"""What is the SQL store's own: crashes, full disks, grouped commits, and what questions cost."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from sqlalchemy import Connection, event

import hector_trio
from hector_trio.errors import StartError, StoreUnavailable
from hector_trio.models import Content
from hector_trio.stores import Change, Segment, sql_sessions
from hector_trio.stores.rules import text_of
from hector_trio.stores.sql import SqlStore, open_sql
from tests.stores.making import ME, NOW, accept, chunks, ended, message, new_session, new_task

ROOT = str(Path(hector_trio.__path__[0]).parent)


def started(program: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)], env={"PYTHONPATH": ROOT}, stdout=subprocess.PIPE, text=True
    )


CRASH = """
import sys, trio
from hector_trio.stores.sql import open_sql
from tests.stores.making import accept, chunks
async def write(store, key):
    seq = 0
    while True:
        data = [b"%d" % n for n in range(seq + 1, seq + 4)]
        assert not await store.append([chunks(key, seq + 1, *data)])
        seq += 3
        print(key, seq, flush=True)
async def main():
    async with open_sql(sys.argv[1], instance="instance-1") as store, trio.open_nursery() as nursery:
        for n in range(8):
            nursery.start_soon(write, store, (await accept(store, f"t{n}")).key)
trio.run(main)
"""


async def test_what_was_committed_survives_the_death_of_the_process_without_holes(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"

    def crash() -> dict[int, int]:
        with started(CRASH, path) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(300)]
            process.kill()
            lines += process.stdout.readlines()
        whole = [line.split() for line in lines if line.endswith("\n")]
        return {int(key): int(seq) for key, seq in whole}

    with trio.fail_after(30):
        reported = await trio.to_thread.run_sync(crash)
    assert len(reported) == 8
    async with open_sql(path, instance="next") as store:
        rows = await store.take_over("next")
        assert {row.key for row in rows} == set(reported)
        for row in rows:
            segments = await store.read_log(row.key, 0, 10**9)
            numbers = [int(line) for segment in segments for line in segment.data.split(b"\n")]
            assert numbers == list(range(1, row.last_seq + 1))
            assert row.last_seq >= reported[row.key]
        assert await store.append([chunks(rows[0].key, rows[0].last_seq + 1, b"x")]) == {rows[0].key}


FULL = """
import os, resource, sys, trio
from hector_trio.errors import StoreUnavailable
from hector_trio.stores.sql import open_sql
from tests.stores.making import accept, chunks, new_task
async def refused(store, call):
    try:
        await call
    except StoreUnavailable as error:
        print(error.detail, sys.argv[1] in error.detail)
    else:
        print("accepted")
async def main():
    async with open_sql(sys.argv[1], instance="instance-1") as store:
        key = (await accept(store)).key
        size = os.stat(sys.argv[1] + "-wal").st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        await refused(store, store.append([chunks(key, 1, b"x" * 100_000)]))
        await refused(store, store.create_task(new_task("u")))
        await refused(store, store.check())
        print((await store.get_task_by_key(key)).last_seq)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        print(await store.append([chunks(key, 1, b"x" * 100_000)]) == frozenset())
        await store.check()
        print((await store.get_task_by_key(key)).last_seq, await store.get_task("alice", "a", "u"))
trio.run(main)
"""


async def test_a_disk_that_takes_nothing_refuses_writes_only_and_everything_works_when_it_takes_again(
    tmp_path: Path,
) -> None:
    def run() -> list[str]:
        with started(FULL, tmp_path / "hector.db") as process:
            return process.communicate(timeout=30)[0].splitlines()

    said = await trio.to_thread.run_sync(run)
    assert said == ["The store's disk refuses to read or write False"] * 3 + ["0", "True", "1 None"]


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(sql: SqlStore) -> None:
    small, large = await accept(sql, "small"), await accept(sql, "large")

    def limit(connection: Connection, pages: int) -> None:
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {used + pages}")

    await sql._writer.run(lambda c: limit(c, 10))
    results: dict[str, object] = {}

    async def append(name: str, key: int, data: bytes) -> None:
        try:
            results[name] = await sql.append([chunks(key, 1, data)])
        except StoreUnavailable as error:
            results[name] = error.detail

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(append, "large", large.key, b"x" * 10**6)
            nursery.start_soon(append, "small", small.key, b"x")
    assert results == {"large": "The store's disk is full", "small": frozenset()}
    assert await sql.get_task_by_key(large.key) == large
    await sql._writer.run(lambda c: limit(c, 10**6))
    await append("large", large.key, b"x" * 10**6)
    assert results["large"] == frozenset()


async def test_where_the_disk_is_short_the_log_goes_into_the_file_before_it_is_too_large_for_it(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2_000_000

    def small(_path: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", small)
    row = await accept(sql)
    wal = sql._opened.path.with_name(sql._opened.path.name + "-wal")
    for n in range(100):
        await sql.append([chunks(row.key, n + 1, b"x" * 20_000)])
        await sql.check()
        assert wal.stat().st_size < free / 4 + 100_000


async def test_no_write_waits_for_another_programs_reader_where_the_disk_is_short(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    await accept(sql)
    wal = sql._opened.path.with_name(sql._opened.path.name + "-wal")
    with closing(sqlite3.connect(sql._opened.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM tasks").fetchall()
        with trio.fail_after(4):  # less than one wait for a lock that is wanted
            for _ in range(10):
                await sql.check()
        kept = wal.stat().st_size
    await sql.check()
    await sql.check()  # between the two the log was emptied
    assert wal.stat().st_size < kept


async def test_a_write_that_the_log_left_no_room_for_is_tried_again_once_that_is_emptied(sql: SqlStore) -> None:
    row = await accept(sql)
    wal = sql._opened.path.with_name(sql._opened.path.name + "-wal")
    attempts: list[int] = []

    def refused(connection: Connection) -> str:
        attempts.append(wal.stat().st_size)
        if attempts[-1] > 0:
            full = sqlite3.OperationalError("database or disk is full")
            full.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise full
        return "written"

    assert await sql._writer.run(refused) == "written"
    assert len(attempts) == 2
    assert await sql.get_task_by_key(row.key) == row


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_writer_is_dead_every_call_says_so(sql: SqlStore) -> None:
    def die(_connection: Connection) -> None:
        raise SystemExit

    with trio.fail_after(5):
        for call in (
            sql._writer.run(die),
            sql.create_task(new_task()),
            sql.append([chunks(1, 1, b"x")]),
            sql.check(),
            sql.get_task_by_key(1),
            sql.list_sessions("alice", now=NOW),
        ):
            with pytest.raises(StoreUnavailable):
                await call


async def test_after_it_is_closed_every_call_says_so(tmp_path: Path) -> None:
    async with open_sql(tmp_path / "hector.db", instance=ME) as store:
        await accept(store)
    for call in (store.create_task(new_task()), store.get_task_by_key(1), store.check()):
        with pytest.raises(StoreUnavailable, match="closed"):
            await call


async def test_tasks_that_are_accepted_at_once_share_their_commits(tmp_path: Path) -> None:
    seen: list[int] = []
    async with open_sql(
        tmp_path / "hector.db", instance=ME, on_commit=lambda _seconds, operations: seen.append(operations)
    ) as store:
        before = store.statistics()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for n in range(300):
                    nursery.start_soon(accept, store, f"t{n}")
        after = store.statistics()
        assert after.operations - before.operations == sum(seen) == 300
        assert after.commits - before.commits == len(seen) <= 30
        assert after.commit_seconds > before.commit_seconds
        assert (await store.list_tasks("alice")).total == 300


@contextmanager
def statements(sql: SqlStore) -> Iterator[list[str]]:
    """What is said to the database meanwhile."""
    said: list[str] = []
    engines = [sql._opened.writing, sql._opened.reading]

    def listen(_conn: object, _cursor: object, statement: str, _parameters: object, *_rest: object) -> None:
        said.append(statement)

    for engine in engines:
        event.listen(engine, "before_cursor_execute", listen)
    try:
        yield said
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", listen)


async def test_a_batch_is_one_statement_for_the_rows_and_one_for_the_segments(sql: SqlStore) -> None:
    keys = [(await accept(sql, f"t{n}")).key for n in range(64)]
    said: list[str] = []
    await sql._writer.run(lambda c: c.connection.driver_connection.set_trace_callback(said.append))  # type: ignore[union-attr]
    assert await sql.append([chunks(key, 1, b"x") for key in keys]) == frozenset()
    said = [text.split()[0] for text in said if not text.startswith("--")]
    assert said[said.index("BEGIN") :] == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]


async def test_a_batch_of_any_size_is_written_whole_or_not_at_all(sql: SqlStore) -> None:
    keys = [(await accept(sql, f"t{n}")).key for n in range(600)]
    at = dict.fromkeys(keys, 0)
    for size in (1, 2, 3, 63, 255, 256, 257, 600):
        assert await sql.append([chunks(key, at[key] + 1, b"x") for key in keys[-size:]]) == frozenset()
        at.update((key, at[key] + 1) for key in keys[-size:])
    assert len(await sql.read_log(keys[-1], 0, 9)) == 8
    stale = [chunks(key, 99 if key == keys[300] else 2, b"y") for key in keys[:343]]
    assert await sql.append(stale) == {keys[300]}
    assert [segment.data for segment in await sql.read_log(keys[0], 0, 9)] == [b"x", b"y"]
    assert [segment.data for segment in await sql.read_log(keys[300], 0, 9)] == [b"x"]


async def test_a_page_of_large_items_reads_no_more_than_it_gives_and_one(sql: SqlStore) -> None:
    await sql.create_session(new_session(), limit=9)
    for n in range(16):
        row = await accept(sql, f"t{n}", session_id="s")
        change = Change("completed", Content("text/plain", "x" * 2_000_000), ended_at=NOW)
        await sql.append([chunks(row.key, 1, b"x", change=change, message=message("x" * 2_000_000))])
    for question in (
        lambda: sql.list_tasks("alice"),
        lambda: sql.list_messages("alice", "s", now=NOW),
        lambda: sql.history("alice", "s", limit=9),
    ):
        tracemalloc.start()
        await question()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 2_000_000 < peak < 16_000_000  # of one and the next as text and as values; all have 64_000_000


async def test_replacing_a_task_costs_the_same_however_often_its_id_was_used(sql: SqlStore) -> None:
    costs = []
    for _ in range(3):
        for _ in range(20):
            await ended(sql)
        with statements(sql) as said:
            await ended(sql)
        costs.append(len(said))
    assert costs[0] == costs[1] == costs[2]


async def test_no_list_is_sorted_or_scanned(sql: SqlStore) -> None:
    await sql.create_session(new_session(), limit=9)
    row = await accept(sql, session_id="s")
    await sql.append([chunks(row.key, 1, b"x", message=message())])
    await sql.create_session(new_session("s2"), limit=9)
    await ended(sql, "pruned", session_id="s2")
    await ended(sql, "removed")
    await sql.create_session(new_session("expired", ttl_seconds=1), limit=9)
    await ended(sql, "expired", session_id="expired")

    def explain(connection: Connection, text: str) -> list[str]:
        answer = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * text.count("?"))
        return [step for (_, _, _, step) in answer.fetchall()]

    for question in (
        lambda: sql.list_tasks("alice"),
        lambda: sql.list_tasks("alice", agent_id="a"),
        lambda: sql.list_tasks("alice", session_id="s"),
        lambda: sql.list_tasks("alice", agent_id="a", status="failed"),
        lambda: sql.recent_tasks("alice", "a"),
        lambda: sql.recent_tasks("alice", "a", states=[("failed", None), ("running", None)], since=NOW),
        lambda: sql.task_messages(row.key, limit=9),
        lambda: sql.list_sessions("alice", now=NOW),
        lambda: sql.list_sessions("alice", now=NOW, agent_id="a"),
        lambda: sql.list_messages("alice", "s", now=NOW),
        lambda: sql.history("alice", "s", limit=5),
        lambda: sql.get_task("alice", "a", "t"),
        lambda: sql.read_log(row.key, 0, 99),
        lambda: sql.sweep(now=NOW, tasks_ended_before=NOW, limit=10, logs_ended_before=NOW),
        lambda: sql.sweep(now=NOW + 9999, tasks_ended_before=NOW + 1, limit=10, logs_ended_before=NOW + 1),
        lambda: sql.delete_task("alice", "a", "pruned"),
        lambda: sql.delete_session("alice", "s2"),
        lambda: sql.set_policy(row.key, "continue"),
        lambda: sql.take_over("x"),
    ):
        with statements(sql) as said:
            await question()
        for text in said:
            if text.split()[0] in ("SELECT", "UPDATE", "DELETE"):
                steps = await sql._readers.run(lambda c, text=text: explain(c, text))  # type: ignore[misc]
                assert not [step for step in steps if "TEMP B-TREE" in step], (text, steps)
                # a scan of the unfinished tasks is a scan of a partial index, and of instances there are few
                small = ("ix_tasks_unfinished", "SCAN instances")
                scans = [step for step in steps if step.startswith("SCAN") and not any(each in step for each in small)]
                assert not scans, (text, steps)


async def test_a_store_is_locked_by_whatever_name_it_is_opened(tmp_path: Path) -> None:
    alias = tmp_path / "alias.db"
    alias.symlink_to(tmp_path / "hector.db")
    async with open_sql(tmp_path / "hector.db", instance="one"):
        with pytest.raises(StartError, match=str(os.getpid())):
            async with open_sql(alias, instance="two"):
                pass


async def steps(sql: SqlStore, question: Callable[[], Awaitable[object]]) -> int:
    """How many tens of steps SQLite's machine takes for the answer: what it costs on any machine, however busy."""
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    def watch(connection: Connection, callback: Callable[[], int] | None) -> None:
        connection.connection.driver_connection.set_progress_handler(callback, 10)  # type: ignore[union-attr]

    await sql._readers.run(lambda c: watch(c, count))  # the connection that is idle is the next one's as well
    await question()
    await sql._readers.run(lambda c: watch(c, None))
    return taken


async def test_history_costs_no_more_when_the_conversation_is_longer(sql: SqlStore) -> None:
    for name in ("short", "long"):
        await sql.create_session(new_session(name), limit=9)
        row = await accept(sql, name, session_id=name)
        await sql.append([chunks(row.key, 1, b"x", message=message("1", name))])

    def lengthen(connection: Connection, name: str, lines: int) -> None:
        connection.exec_driver_sql(
            "WITH RECURSIVE n(i) AS (VALUES(2) UNION ALL SELECT i + 1 FROM n WHERE i < ?) INSERT INTO messages "
            "SELECT m.session_key, i, task_key, task_id, agent_id, role, type, i, created_at, partial_status, original "
            "FROM n, messages m WHERE m.task_id = ? AND m.n = 1",
            (lines, name),
        )

    costs = {}
    for name, lines in (("short", 600), ("long", 60_000)):
        await sql._writer.run(lambda c, name=name, lines=lines: lengthen(c, name, lines))  # type: ignore[misc]
        costs[name] = await steps(sql, lambda name=name: sql.history("alice", name, limit=50))  # type: ignore[misc]
        assert [line.content for line in await sql.history("alice", name, limit=2)] == [lines - 1, lines]
    assert 0 < costs["long"] <= costs["short"] + 2


async def test_the_end_of_a_log_of_a_million_chunks_costs_what_that_of_a_short_one_costs(sql: SqlStore) -> None:
    costs = []
    for segments in (10, 100_000):
        row = await accept(sql, f"t{segments}")

        def fill(connection: Connection, key: int = row.key, segments: int = segments) -> None:
            connection.exec_driver_sql(
                "WITH RECURSIVE n(i) AS (VALUES(0) UNION ALL SELECT i + 1 FROM n WHERE i < ?) INSERT INTO segments "
                "SELECT ?, 10 * i + 1, 10 * i + 10, CAST('0123456789' AS BLOB) FROM n",
                (segments - 1, key),
            )
            connection.exec_driver_sql("UPDATE tasks SET last_seq = ? WHERE key = ?", (10 * segments, key))

        await sql._writer.run(fill)
        after = 10 * segments - 5
        costs.append(await steps(sql, lambda key=row.key, after=after: sql.read_log(key, after, 1 << 18)))  # type: ignore[misc]
        assert await sql.read_log(row.key, after, 1 << 18) == [Segment(after - 4, after + 5, b"0123456789")]
        assert not await sql.append([chunks(row.key, 10 * segments + 1, b"x")])
    assert 0 < costs[1] <= costs[0] + 2


async def test_a_page_of_sessions_with_a_common_label_is_found_without_looking_at_all_of_them(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_sessions, "_FEW", 20)
    for n in range(60):
        labels = {"all": "x", "some": n % 6}
        await sql.create_session(new_session(f"s{n}", agent_id="ab"[n % 2], metadata=labels), limit=99)
    for metadata, total in (
        ({"all": "x"}, 60),
        ({"some": "3"}, 10),
        ({"all": "x", "some": "3"}, 10),
        ({"all": "y"}, 0),
    ):
        page = await sql.list_sessions("alice", now=NOW, metadata=metadata, limit=3)
        assert (page.total, len(page.items)) == (total, min(total, 3))
        assert all(text_of(row.metadata[name]) == text for row in page.items for name, text in metadata.items())
        with statements(sql) as said:
            await sql.list_sessions("alice", now=NOW, agent_id="a", metadata=metadata, limit=3)
        assert ("EXISTS (SELECT labels" in said[-1]) == ("all" in metadata and total > 0)
