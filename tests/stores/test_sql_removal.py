"""What is removed is gone for everybody at once, however many transactions it takes, whatever comes between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hector_trio.errors import SessionNotFound, TaskNotFound
from hector_trio.stores import NewPush, Push, Store, sql_removal
from hector_trio.stores.schema import tables
from hector_trio.stores.sql import SqlStore, open_sql
from tests.stores.making import ME, NOW, accept, chunks, completed, ended, idempotency, message, new_session, new_task

SEGMENTS = 60


@pytest.fixture(autouse=True)
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transaction removes as little as it may."""
    monkeypatch.setattr(sql_removal, "SLICE_SECONDS", 0)


async def rows(sql: SqlStore) -> dict[str, int]:
    """How many rows each table has, if any, without those of the process."""
    counted = await sql._readers.run(
        lambda c: {name: int(c.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one()) for name in tables.tables}
    )
    return {name: count for name, count in counted.items() if count and name != "instances"}


async def sweep(store: Store, at: int = NOW, limit: int = 500) -> int:
    return await store.sweep(now=at, tasks_ended_before=at, limit=limit)


async def write(store: Store, key: int, count: int = SEGMENTS) -> None:
    for n in range(1, count + 1):
        await store.append([chunks(key, n, b"x")])


async def long(store: Store, task_id: str = "t", at: int = NOW, session_id: str | None = None) -> int:
    """The key of an ended task with many segments, to which an idempotency key leads."""
    new = new_task(task_id, session_id=session_id, idempotency=idempotency(task_id))
    key = (await store.create_task(new)).task.key
    await write(store, key)
    last = chunks(key, SEGMENTS + 1, b"end", change=completed(at), message=message("an answer", task_id))
    assert await store.append([last]) == frozenset()
    return key


async def test_a_long_task_is_gone_at_once_and_its_rows_by_and_by(sql: SqlStore) -> None:
    key = await long(sql)
    await sql.put_push(NewPush(Push(key, "c", "https://example.com", NOW, ME, credentials="secret"), 1))
    await sql.delete_task("alice", "a", "t")
    assert "pushes" not in await rows(sql)
    assert 0 < (await rows(sql))["segments"] < SEGMENTS
    assert await sql.get_task("alice", "a", "t") is None
    assert await sql.get_task_by_key(key) is None
    assert await sql.read_log(key, 0, 10**6) == []
    assert await sql.read_log(key, SEGMENTS - 1, 10**6) == []
    assert (await sql.list_tasks("alice")).total == 0
    for body in ("b", "another"):
        assert await sql.find_idempotent("alice", idempotency("t", body), now=NOW) is None
    assert await sql.append([chunks(key, SEGMENTS + 2, b"x")]) == {key}
    assert await sql.take_over("next") == []
    await sql.set_policy(key, "continue")
    with pytest.raises(TaskNotFound):
        await sql.delete_task("alice", "a", "t")
    new = await accept(sql)
    assert await sweep(sql) == 1
    assert await rows(sql) == {"tasks": 1, "bodies": 1}
    assert [row.task_id for row in (await sql.list_tasks("alice")).items] == [new.task_id]


async def test_a_long_task_leaves_its_line_in_the_conversation_and_nothing_else(sql: SqlStore) -> None:
    await sql.create_session(new_session(), limit=9)
    await long(sql, session_id="s")
    kept = await accept(sql, "kept", session_id="s")
    await sql.delete_task("alice", "a", "t")
    for _ in range(2):
        assert await sql.history("alice", "s", limit=9) == [message("an answer")]
        assert (await sql.list_messages("alice", "s", now=NOW)).items == [message("an answer")]
        assert (await sql.list_tasks("alice", session_id="s")).items == [kept]
        assert (await sql.list_tasks("alice")).items == [kept]
        await sweep(sql)
    assert "segments" not in await rows(sql)


async def test_a_large_session_is_gone_at_once_and_its_rows_by_and_by(sql: SqlStore) -> None:
    await sql.create_session(new_session(metadata={"k": "v"}, ttl_seconds=60), limit=9)
    done = [await long(sql, f"t{n}", session_id="s") for n in range(3)]
    working = [(await accept(sql, f"w{n}", session_id="s")).key for n in range(3)]
    await write(sql, working[0])
    elsewhere = await ended(sql, "elsewhere")
    await sql.delete_session("alice", "s")
    left = await rows(sql)
    assert left["tasks"] > 4
    assert left["messages"] == 3
    for key in done + working:
        assert await sql.get_task_by_key(key) is None
        assert await sql.read_log(key, 0, 10**6) == []
    assert await sql.append([chunks(working[0], SEGMENTS + 1, b"x"), chunks(working[1], 1, b"x")]) == set(working[:2])
    assert await sql.take_over("next") == []
    for task_id in ("t0", "t2", "w0", "w2"):
        assert await sql.get_task("alice", "a", task_id) is None
        assert await sql.find_idempotent("alice", idempotency(task_id), now=NOW) is None
        with pytest.raises(TaskNotFound):
            await sql.delete_task("alice", "a", task_id)
    assert [row.key for row in (await sql.list_tasks("alice")).items] == [elsewhere.key]
    assert (await sql.list_tasks("alice", agent_id="a")).total == 1
    assert (await sql.list_tasks("alice", session_id="s")).total == 0
    assert await sql.get_session("alice", "s", now=NOW) is None
    assert (await sql.list_sessions("alice", now=NOW)).total == 0
    assert (await sql.list_sessions("alice", now=NOW, metadata={"k": "v"})).total == 0
    assert await sql.history("alice", "s", limit=9) == []
    for refused in (
        sql.delete_session("alice", "s"),
        sql.list_messages("alice", "s", now=NOW),
        sql.update_session("alice", "s", now=NOW, state={"x": 1}),
        sql.create_task(new_task("u", session_id="s")),
    ):
        with pytest.raises(SessionNotFound):
            await refused
    await sql.create_session(new_session(), limit=1)
    row = await accept(sql, "t0", session_id="s")
    assert (await sql.list_tasks("alice", session_id="s")).items == [row]
    assert await sql.history("alice", "s", limit=9) == []
    while await sweep(sql, limit=2):
        pass
    assert await rows(sql) == {"sessions": 1, "tasks": 2, "bodies": 2, "segments": 1}
    assert await sql.get_task("alice", "a", "t0") == row


async def test_a_session_that_takes_the_name_of_a_large_one_has_nothing_of_it(sql: SqlStore) -> None:
    await sql.create_session(new_session(ttl_seconds=1), limit=9)
    key = await long(sql, session_id="s")
    later = NOW + 5000
    await sql.create_session(new_session(created_at=later, last_activity_at=later), limit=9)
    assert await sql.get_task_by_key(key) is None
    assert await sql.history("alice", "s", limit=9) == []
    assert (await sql.list_tasks("alice", now=later)).total == 0
    await sweep(sql)
    assert await rows(sql) == {"sessions": 1}


async def test_whatever_was_being_removed_when_the_process_died_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    async with open_sql(path, instance=ME) as store:
        await store.create_session(new_session(), limit=9)
        keys = [await long(store, "a", session_id="s"), await long(store, "b"), await long(store, "c")]
        working = await accept(store, "working", session_id="s")
        await write(store, working.key)
        await store.delete_session("alice", "s")
        await store.delete_task("alice", "a", "b")
    async with open_sql(path, instance="next") as store:
        assert await store.take_over("next") == []
        assert [await store.get_task_by_key(key) is None for key in keys] == [True, True, False]
        assert (await store.list_tasks("alice")).total == 1
        with trio.move_on_after(0):
            await sweep(store)
        assert (await rows(store))["segments"] > SEGMENTS
        while await sweep(store, limit=1):
            pass
        assert await rows(store) == {"tasks": 1, "bodies": 1, "segments": SEGMENTS + 1, "idempotency": 1}


async def test_a_task_past_its_retention_is_never_seen_with_half_its_log(sql: SqlStore) -> None:
    key = await long(sql)
    seen: list[int] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def look() -> None:
                while await sql.get_task_by_key(key) is not None:
                    seen.append(len(await sql.read_log(key, 0, 10**6)))

            assert await sweep(sql, NOW + 1) == 1
    assert set(seen) <= {0, SEGMENTS + 1}
    assert await rows(sql) == {}


@pytest.mark.parametrize("pruned", [False, True])
async def test_others_write_while_a_long_log_goes(sql: SqlStore, pruned: bool) -> None:
    keys = [await long(sql, f"t{n}") for n in range(5)]
    other = await accept(sql, "other")
    swept: list[int] = []
    written = 0
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def remove() -> None:
                before = NOW + (not pruned)
                swept.append(await sql.sweep(now=NOW, tasks_ended_before=before, limit=5, logs_ended_before=NOW + 1))

            while not swept:
                written += 1
                assert await sql.append([chunks(other.key, written, b"x")]) == frozenset()
    assert swept == [5]
    assert written >= 5 * SEGMENTS / 4
    assert (await rows(sql))["segments"] == written + 5 * pruned
    assert [len(await sql.read_log(key, 0, 10**6)) for key in keys] == [pruned] * 5


async def test_a_sweep_that_is_cut_leaves_the_rest_to_the_next(sql: SqlStore) -> None:
    keys = [await long(sql, f"t{n}") for n in range(3)]
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        sql.on_commit = lambda _seconds, _operations: token.run_sync_soon(scope.cancel)
        await sql.sweep(now=NOW, tasks_ended_before=NOW, limit=9, logs_ended_before=NOW + 1)
    sql.on_commit = None
    assert scope.cancelled_caught
    left = [len(await sql.read_log(key, 0, 10**6)) for key in keys]
    assert 3 < sum(left) < 3 * SEGMENTS + 3
    assert await sql.sweep(now=NOW, tasks_ended_before=NOW, limit=9, logs_ended_before=NOW + 1) == 3
    assert [len(await sql.read_log(key, 0, 10**6)) for key in keys] == [1] * 3


async def test_a_cancelled_removal_of_a_long_task_has_happened_or_not_and_says_so(sql: SqlStore) -> None:
    key = await long(sql)
    entered, token = trio.Event(), trio.lowlevel.current_trio_token()
    removed = False
    with trio.CancelScope() as scope:
        scope.cancel()
        await sql.delete_task("alice", "a", "t")
    assert scope.cancelled_caught
    assert await sql.get_task_by_key(key) is not None
    async with trio.open_nursery() as nursery:
        sql.on_commit = lambda _seconds, _operations: token.run_sync_soon(entered.set)

        @nursery.start_soon
        async def cut() -> None:
            await entered.wait()
            nursery.cancel_scope.cancel()

        await sql.delete_task("alice", "a", "t")
        removed = True
    assert removed
    assert await sql.get_task_by_key(key) is None
