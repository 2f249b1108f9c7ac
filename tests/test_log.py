"""The tail of a task's log: what is committed is visible, nobody waits for a reader, nothing is lost or seen twice."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.agents import Context
from hector_trio.errors import HectorError, InvalidRequest, RunError, StoreUnavailable
from hector_trio.log import EMITS_PER_CHECKPOINT, Follower, LogWriter, TaskLog
from hector_trio.models import Chunk
from hector_trio.stores import Append, Change
from hector_trio.stores.memory import MemoryStore
from hector_trio.task import Outcome, TaskRow, decode_chunk, fold
from hector_trio.wakeup import Wakeup
from tests.engines import agent, engine_of, order, read_all
from tests.stores.making import ME, NOW, accept, message, new_session

COMPLETED = Outcome("completed")
END = Change("completed", ended_at=NOW)
FULL = StoreUnavailable("The disk is full")


class Gated(MemoryStore):
    """The memory store behind a gate: appends wait while it is shut, fail while there is an ``error``, and are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[Append]] = []
        self.error: HectorError | None = None
        self._gate = trio.Event()
        self._gate.set()

    def shut(self) -> None:
        self._gate = trio.Event()

    def open(self) -> None:
        self._gate.set()

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        self.batches.append(list(appends))
        await self._gate.wait()
        if self.error is not None:
            raise self.error
        return await super().append(appends)


@pytest.fixture
def store() -> Gated:
    return Gated()


@asynccontextmanager
async def writing(store: MemoryStore) -> AsyncIterator[LogWriter]:
    writer = LogWriter(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        with trio.fail_after(5):
            yield writer
        nursery.cancel_scope.cancel()


def log_of(row: TaskRow, writer: LogWriter, **limits: int) -> TaskLog:
    known = {"max_uncommitted": 1 << 20, "max_chunk": 1 << 20, "max_log": 1 << 30, "tail_bytes": 1 << 20}
    return TaskLog(row, writer, **(known | limits))


async def emit(log: TaskLog, *contents: str) -> None:
    for content in contents:
        await log.emit("text", content)


def chunks(lines: list[bytes] | None) -> list[Chunk]:
    return [decode_chunk(line) for line in lines or []]


def contents(lines: list[bytes] | None) -> list[Any]:
    return [chunk.content for chunk in chunks(lines)]


def always(log: TaskLog | None) -> Callable[[], TaskLog | None]:
    return lambda: log


async def read_to_end(follower: Follower, limit: int = 1 << 30) -> list[Chunk]:
    """What a follower is given up to the end."""
    found: list[Chunk] = []
    with trio.fail_after(5), follower:
        while lines := await follower.read(limit):
            found += chunks(lines)
    assert follower.ended
    return found


def is_whole(log: list[Chunk]) -> bool:
    """Numbered without a hole, with one final chunk, the last."""
    numbers = [chunk.seq for chunk in log]
    return numbers == list(range(1, len(log) + 1)) and [chunk.final for chunk in log] == [False] * (len(log) - 1) + [
        True
    ]


# --- committed before visible -----------------------------------------------------------------------------------------


async def test_a_chunk_is_visible_once_it_is_committed_and_not_before(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        store.shut()
        with Follower(store, row, lambda: log) as follower:
            await emit(log, "one")
            await trio.testing.wait_all_tasks_blocked()
            assert (log.committed, log.lines_after(0), follower.ready) == (0, [], False)
            store.open()
            assert contents(await follower.read()) == ["one"]
            assert log.committed == 1


async def test_what_is_visible_can_be_read_from_the_store_at_that_moment(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        with Follower(store, row, lambda: log) as follower:
            for n in range(10):
                await emit(log, str(n))
                await follower.read()
                segments = await store.read_log(row.key, n, 1 << 20)
                assert segments[-1].last_seq == log.committed == n + 1


async def test_what_waits_in_many_logs_is_one_append_with_one_segment_each(store: Gated) -> None:
    async with writing(store) as writer:
        rows = [await accept(store, f"t{n}") for n in range(50)]
        logs = [log_of(row, writer) for row in rows]
        store.shut()
        await emit(logs[0], "first")
        await trio.testing.wait_all_tasks_blocked()
        for log in logs:
            await emit(log, "a", "b", "c")
        store.open()
        for log in logs:
            await log.settled()
        first, second = store.batches
        assert len(first) == 1
        assert [(append.first_seq, append.last_seq) for append in second] == [(2, 4)] + [(1, 3)] * 49
        assert all(contents(log.lines_after(log.committed - 3)) == ["a", "b", "c"] for log in logs)


async def test_the_writer_tells_how_many_chunks_it_has_committed(store: Gated) -> None:
    told: list[int] = []
    writer = LogWriter(store, committed=told.append)
    log = log_of(await accept(store), writer)
    log.change(Change("running"))
    log.put("text", "a")
    log.put("text", "b")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await log.settled()
            nursery.cancel_scope.cancel()
    assert told == [2]


async def test_a_change_alone_is_an_append_without_chunks(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        log.change(Change("running"))
        await log.settled()
        found = await store.get_task_by_key(row.key)
        assert found is not None
        assert (found.status, found.last_seq) == ("running", 0)


async def test_the_users_line_of_the_conversation_stands_before_the_answer_however_soon_that_comes(
    store: Gated,
) -> None:
    await store.create_session(new_session("s"), limit=10)
    async with writing(store) as writer:
        row = await accept(store, session_id="s")
        log = log_of(row, writer)
        log.change(Change("running"), message("question"))
        await log.finish(COMPLETED, END, message("answer", role="agent"))
        lines = (await store.list_messages("alice", "s", now=NOW)).items
        assert [line.content for line in lines] == ["question", "answer"]


# --- the tail ---------------------------------------------------------------------------------------------------------


async def test_the_tail_holds_everything_after_its_edge_and_nothing_before_it(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, tail_bytes=2000)
        for n in range(100):
            await emit(log, str(n))
            await log.settled()
        held = [after for after in range(101) if log.lines_after(after) is not None]
        edge = held[0]
        assert 0 < edge < 100
        assert held == list(range(edge, 101))
        for after in held:
            assert [chunk.seq for chunk in chunks(log.lines_after(after))] == list(range(after + 1, 101))
        assert log.lines_after(1000) == []
        kept = log.lines_after(edge)
        assert kept is not None
        assert sum(map(len, kept)) <= 2 * 2000
        for after in (edge - 1, edge, edge + 1):
            with Follower(store, row, lambda: log, after=after) as follower:
                assert chunks(await follower.read())[0].seq == after + 1


async def test_a_commit_larger_than_the_tail_is_read_from_the_store(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, tail_bytes=100)
        with Follower(store, row, lambda: log) as follower:
            await emit(log, "x" * 1000, "y")
            assert contents(await follower.read()) == ["x" * 1000, "y"]
            assert not follower.ready
            await emit(log, "z")
            assert contents(await follower.read()) == ["z"]


class Forgetful(MemoryStore):
    """Takes everything and keeps nothing."""

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        await trio.lowlevel.checkpoint()
        return frozenset()


async def test_a_frozen_reader_delays_nobody_and_costs_no_memory() -> None:
    store = Forgetful()
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, tail_bytes=50_000, max_uncommitted=50_000)
        with Follower(store, row, lambda: log), Follower(store, row, lambda: log) as reader:
            tracemalloc.start()
            try:
                for _ in range(100):
                    for _ in range(20):
                        await log.emit("metadata", "x" * 2000)
                    await log.settled()
                    assert len(await reader.read()) == 20
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    assert log.committed == 2000  # four megabytes
    assert peak < 1 << 20


async def test_a_reader_far_behind_gets_everything_once_and_in_order(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, tail_bytes=1000)
        with Follower(store, row, lambda: log) as frozen:
            for n in range(500):
                await emit(log, str(n))
                if n % 7 == 0:
                    await log.settled()
            await log.finish(COMPLETED, END, None)
            found = await read_to_end(frozen, 13)
        assert is_whole(found)
        assert [chunk.content for chunk in found[:-1]] == [str(n) for n in range(500)]


# --- emit -------------------------------------------------------------------------------------------------------------


async def test_an_emit_waits_only_above_the_limit_and_goes_on_after_the_commit(store: Gated) -> None:
    async with writing(store) as writer, trio.open_nursery() as nursery:
        row = await accept(store)
        log = log_of(row, writer, max_uncommitted=1000)
        store.shut()
        returned = 0

        async def babble() -> None:
            nonlocal returned
            for n in range(50):
                await emit(log, f"{n:02}")
                returned += 1

        nursery.start_soon(babble)
        await trio.testing.wait_all_tasks_blocked()
        before = returned
        store.open()
        while returned < 50:
            await trio.lowlevel.checkpoint()
        await log.settled()
        sizes = [len(line) for line in log.lines_after(0) or []]
        assert sum(sizes[:before]) <= 1000 < sum(sizes[: before + 1])
        assert len(sizes) == 50


async def test_an_emit_that_waits_goes_on_when_the_store_refuses(store: Gated) -> None:
    async with writing(store) as writer:
        log = log_of(await accept(store), writer, max_uncommitted=10)
        store.error = FULL
        await emit(log, "lost")
        with pytest.raises(StoreUnavailable):
            await emit(log, "too late")


async def test_one_that_only_emits_lets_others_run(store: Gated) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with writing(store) as writer, trio.open_nursery() as nursery:
        log = log_of(await accept(store), writer)
        nursery.start_soon(other)
        await emit(log, *["x"] * 20 * EMITS_PER_CHECKPOINT)
        assert turns >= 10
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("data", object(), "not_json"),
        ("data", {1: {2: b"x", (3, 4): object()}}, "not_json"),
        ("data", "\ud800", "not_json"),
        ("text", "x" * 2000, "chunk_too_large"),
    ],
)
async def test_a_chunk_that_cannot_be_taken_uses_up_no_number(store: Gated, kind: Any, content: Any, code: str) -> None:
    async with writing(store) as writer:
        log = log_of(await accept(store), writer, max_chunk=1000)
        await emit(log, "one")
        with pytest.raises(RunError) as raised:
            await log.emit(kind, content)
        assert raised.value.run_code == code
        await emit(log, "two")
        await log.settled()
        assert [(chunk.seq, chunk.content) for chunk in chunks(log.lines_after(0))] == [(1, "one"), (2, "two")]
        output = log.fold.output()
        assert output is not None
        assert output.content == "onetwo"


async def test_a_full_log_still_has_room_for_its_end(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, max_log=1000)
        with pytest.raises(RunError) as raised:
            await emit(log, *["bla"] * 100)
        assert raised.value.run_code == "log_full"
        await log.finish(Outcome("failed", code="log_full", message="full"), Change("failed", ended_at=NOW), None)
        found = await read_to_end(Follower(store, row, lambda: log))
        assert is_whole(found)
        assert sum(len(line) for line in (log.lines_after(0) or [])[:-1]) <= 1000


@given(st.text(max_size=400))
def test_text_of_any_length_fits_into_chunks_and_comes_out_as_it_went_in(text: str) -> None:
    async def main() -> None:
        store = Gated()
        async with writing(store) as writer:
            log = log_of(await accept(store), writer, max_chunk=400)
            await log.emit_text(text)
            await log.settled()
            assert "".join(contents(log.lines_after(0))) == text
            assert "" not in contents(log.lines_after(0))

    trio.run(main)


async def test_text_must_be_text(store: Gated) -> None:
    async with writing(store) as writer:
        log = log_of(await accept(store), writer)
        with pytest.raises(InvalidRequest, match="not int"):
            await log.emit_text(5)  # type: ignore[arg-type]


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_refusal_discards_what_waits_and_the_end_is_numbered_behind_what_is_committed(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        told: list[HectorError | None] = []
        log.on_refused = lambda log: told.append(log.failure)
        with Follower(store, row, lambda: log) as follower:
            await emit(log, "kept")
            assert contents(await follower.read()) == ["kept"]
            store.shut()
            store.error = FULL
            await emit(log, "lost in flight")
            await trio.testing.wait_all_tasks_blocked()
            await emit(log, "lost while waiting")
            store.open()
            assert await follower.read() == []
            assert (follower.failure, follower.ended) == (FULL, True)
        assert set(told) == {FULL}
        assert (log.committed, log.final_seq) == (1, None)
        with pytest.raises(StoreUnavailable):
            log.put("text", "later")
        store.error = None
        await log.finish(COMPLETED, END, None)
        assert (log.committed, log.final_seq) == (2, 2)
        found = await read_to_end(Follower(store, row, lambda: log))
        assert is_whole(found)
        assert found[0].content == "kept"


async def test_an_end_that_is_refused_is_raised_and_can_be_tried_again(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        await emit(log, "kept")
        await log.settled()
        store.error = FULL
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await log.finish(COMPLETED, END, None)
        store.error = None
        await log.finish(COMPLETED, END, None)
        assert is_whole(await read_to_end(Follower(store, row, lambda: log)))
        found = await store.get_task_by_key(row.key)
        assert found is not None
        assert (found.status, found.last_seq) == ("completed", 2)


async def test_one_log_that_is_refused_does_not_hold_up_the_others_of_its_append(store: Gated) -> None:
    async with writing(store) as writer:
        mine = await accept(store, "mine")
        theirs = await accept(store, "theirs", instance="another")
        good = log_of(mine, writer)
        stale = log_of(msgspec.structs.replace(theirs, instance=ME), writer)
        good.put("text", "a")
        stale.put("text", "b")
        await good.settled()
        await stale.settled()
        assert len(store.batches) == 1
        assert (good.committed, good.failure) == (1, None)
        assert stale.failure is not None
        assert (stale.committed, stale.failure.code) == (0, "gone")
        assert await store.read_log(theirs.key, 0, 1000) == []


async def test_the_writer_goes_on_after_a_failure_of_the_store(store: Gated) -> None:
    async with writing(store) as writer:
        store.error = FULL
        first = log_of(await accept(store, "first"), writer)
        await emit(first, "x")
        await first.settled()
        store.error = None
        second = log_of(await accept(store, "second"), writer)
        await emit(second, "x")
        await second.settled()
        assert (first.committed, second.committed) == (0, 1)


# --- readers ----------------------------------------------------------------------------------------------------------


async def test_one_reader_of_many_tasks_waits_for_all_of_them_at_once(store: Gated) -> None:
    async with writing(store) as writer, trio.open_nursery() as nursery:
        rows = [await accept(store, f"t{n}") for n in range(5)]
        logs = [log_of(row, writer) for row in rows]
        wakeup = Wakeup()
        found: dict[str, list[Chunk]] = {row.task_id: [] for row in rows}

        async def read() -> None:
            with ExitStack() as stack:
                followers = [
                    stack.enter_context(Follower(store, row, always(log), wakeup=wakeup))
                    for row, log in zip(rows, logs, strict=True)
                ]
                while followers:
                    for follower in followers:
                        if follower.ready:
                            found[follower.task_id] += chunks(await follower.read())
                    followers = [follower for follower in followers if not follower.ended]
                    if followers and not any(follower.ready for follower in followers):
                        await wakeup.wait()

        nursery.start_soon(read)
        for n in range(20):
            await trio.testing.wait_all_tasks_blocked()
            await emit(logs[n % 5], str(n))
        for log in logs:
            await trio.testing.wait_all_tasks_blocked()
            await log.finish(COMPLETED, END, None)
    for n, row in enumerate(rows):
        assert is_whole(found[row.task_id])
        assert [chunk.content for chunk in found[row.task_id][:-1]] == [str(m) for m in range(20) if m % 5 == n]


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_a_reader_takes_as_much_as_it_wants(store: Gated, limit: int) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        await emit(log, "a", "b", "c", "d")
        await log.finish(COMPLETED, END, None)
        ended = await store.get_task_by_key(row.key)
        assert ended is not None
        for follower in (Follower(store, row, lambda: log), Follower(store, ended), Follower(store, row)):
            assert is_whole(await read_to_end(follower, limit))
        with Follower(store, row, lambda: log) as follower:
            assert len(await follower.read(limit)) == min(limit, 5)


@pytest.mark.parametrize("after", range(7))
async def test_a_reader_begins_behind_any_number_of_an_ended_task(store: Gated, after: int) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        await emit(log, "a", "b", "c")
        await log.settled()
        await emit(log, "d")
        await log.finish(COMPLETED, END, None)
        ended = await store.get_task_by_key(row.key)
        assert ended is not None
        for known, tail in ((ended, None), (row, log), (row, None)):
            found = await read_to_end(Follower(store, known, always(tail), after=after))
            assert [chunk.seq for chunk in found] == list(range(after + 1, 6))


async def test_nobody_follows_any_more_once_the_last_has_left(store: Gated) -> None:
    async with writing(store) as writer, trio.open_nursery() as nursery:
        row = await accept(store)
        log = log_of(row, writer)
        alone = trio.Event()

        async def wait() -> None:
            await log.unread()
            alone.set()

        with Follower(store, row, lambda: log):
            with Follower(store, row, lambda: log):
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            assert not alone.is_set()
        await alone.wait()


class Erratic(Gated):
    """Commits after any number of turns of the loop."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        for _ in range(self.chance.randrange(8)):
            await trio.lowlevel.checkpoint()
        return await super().append(appends)


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_the_schedule_every_reader_gets_every_chunk_once_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    store = Erratic(chance)

    async def pause() -> None:
        for _ in range(chance.choice([0, 0, 0, 1, 5, 20])):
            await trio.lowlevel.checkpoint()

    async def produce(log: TaskLog) -> None:
        for n in range(chance.randrange(80)):
            await emit(log, str(n))
            await pause()
        await log.finish(COMPLETED, END, None)

    async def read(row: TaskRow, log: TaskLog, after: int, found: list[int]) -> None:
        await pause()
        with Follower(store, row, lambda: log, after=after) as follower:
            while not follower.ended:
                with trio.CancelScope() as scope:
                    if chance.random() < 0.3:
                        scope.cancel()
                    lines = await follower.read(chance.choice([1, 5, 1000]))
                    found.extend(chunk.seq for chunk in chunks(lines))
                await pause()

    async with writing(store) as writer:
        seen: list[tuple[TaskLog, int, list[int]]] = []
        async with trio.open_nursery() as nursery:
            for n in range(4):
                row = await accept(store, f"t{n}")
                log = log_of(row, writer, tail_bytes=chance.choice([100, 1000, 100_000]), max_uncommitted=500)
                for _ in range(4):
                    after, found = chance.choice([0, 0, 1, 7]), list[int]()
                    seen.append((log, after, found))
                    nursery.start_soon(read, row, log, after, found)
                nursery.start_soon(produce, log)
        for log, after, found in seen:
            assert found == list(range(after + 1, log.committed + 1))


# --- cancels ----------------------------------------------------------------------------------------------------------


async def test_a_cancel_inside_an_emit_leaves_its_chunk_in_the_log_once(store: Gated) -> None:
    async with writing(store) as writer:
        log = log_of(await accept(store), writer, max_uncommitted=1)
        store.shut()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(emit, log, "one", "never")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        store.open()
        await emit(log, "two")
        await log.settled()
        assert [(chunk.seq, chunk.content) for chunk in chunks(log.lines_after(0))] == [(1, "one"), (2, "two")]


async def test_a_cancel_arrives_at_an_emit_that_does_not_wait(store: Gated) -> None:
    async with writing(store) as writer:
        log = log_of(await accept(store), writer)
        with trio.CancelScope() as scope:
            scope.cancel()
            await emit(log, "taken", "never")
        assert scope.cancelled_caught
        await log.settled()
        assert contents(log.lines_after(0)) == ["taken"]


@pytest.mark.parametrize("tail_bytes", [1, 10_000], ids=["from the store", "from memory"])
async def test_a_cancel_inside_a_read_loses_nothing(store: Gated, tail_bytes: int) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer, tail_bytes=tail_bytes)
        with Follower(store, row, lambda: log) as follower:
            for n in range(3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(follower.read)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await emit(log, str(n))
                await log.settled()
                with trio.CancelScope() as scope:
                    scope.cancel()
                    assert contents(await follower.read()) == [str(n)]
                if scope.cancelled_caught:
                    assert contents(await follower.read()) == [str(n)]


async def test_a_cancel_inside_the_wait_for_the_commit_leaves_the_log_usable(store: Gated) -> None:
    async with writing(store) as writer:
        row = await accept(store)
        log = log_of(row, writer)
        store.shut()
        await emit(log, "one")
        with trio.move_on_after(0) as scope:
            await log.settled()
        assert scope.cancelled_caught
        await emit(log, "two")
        store.open()
        await log.finish(COMPLETED, END, None)
        assert is_whole(await read_to_end(Follower(store, row, lambda: log)))


async def test_an_end_that_was_cut_while_it_waited_and_is_tried_again_is_one_final_chunk(store: Gated) -> None:
    async with writing(store) as writer:
        busy = log_of(await accept(store, "busy"), writer)
        row = await accept(store)
        log = log_of(row, writer)
        store.shut()
        await emit(busy, "holds up the writer")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await log.finish(COMPLETED, END, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.finish, Outcome("failed"), Change("failed", ended_at=NOW), None)
            await trio.testing.wait_all_tasks_blocked()
            store.open()
        found = await read_to_end(Follower(store, row))
        assert is_whole(found)
        stored = await store.get_task_by_key(row.key)
        assert stored is not None
        assert stored.status == found[-1].status


# --- the task behind a refused log ------------------------------------------------------------------------------------


async def stays_true_to_its_log(store: Gated, error_at_commit: trio.Event, agent_waits_for: trio.Event) -> TaskRow:
    """A run whose only chunk is refused once; its row must be what its log folds to."""

    async def answer(ctx: Context) -> None:
        await ctx.emit_text("lost")
        await agent_waits_for.wait()

    class Once(Gated):
        async def append(self, appends: Sequence[Append]) -> frozenset[int]:
            if any(append.data for append in appends) and not error_at_commit.is_set():
                await trio.lowlevel.checkpoint()
                error_at_commit.set()
                raise FULL
            return await super().append(appends)

    async with engine_of(Once(), agent(answer), instance=ME) as engine:
        row = (await engine.submit(order())).task
        with trio.fail_after(5):
            row = await engine.wait(row)
            log = await read_all(engine, row)
    assert is_whole(log)
    folded = fold(log)
    assert (row.status, row.output) == (folded.status, folded.output())
    return row


async def test_the_output_of_a_task_holds_nothing_that_the_store_refused(store: Gated) -> None:
    await stays_true_to_its_log(store, trio.Event(), trio.Event())


async def test_a_task_that_lost_a_chunk_is_not_completed_even_if_its_agent_ends_at_that_moment(store: Gated) -> None:
    moment = trio.Event()
    row = await stays_true_to_its_log(store, moment, moment)
    assert (row.status, row.error and row.error.code) == ("failed", "store_unavailable")
