"""The log, step by step, over a store that delays, refuses and dies: no duplicate, no hole, one final chunk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from msgspec import UNSET

from hector_trio.errors import HectorError, StoreUnavailable
from hector_trio.log import Follower, LogWriter, TaskLog
from hector_trio.models import Chunk
from hector_trio.stores import Append, Change, Segment
from hector_trio.stores.memory import MemoryStore
from hector_trio.task import Fold, Outcome, Question, TaskRow, decode_chunk, split_lines
from tests.portal import Portal
from tests.stores.making import NOW, accept


class Moody(MemoryStore):
    """Appends wait before they are committed, and after it, and reads wait, while the gate of each is shut; appends
    that come to an open gate while there is an ``error`` fail with it."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = {name: trio.Event() for name in ("append", "answer", "read")}
        self.error: HectorError | None = None

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        await self.gates["append"].wait()
        if self.error is not None:
            raise self.error
        refused = await super().append(appends)
        await self.gates["answer"].wait()
        return refused

    async def read_log(self, key: int, after: int, limit_bytes: int) -> list[Segment]:
        segments = await super().read_log(key, after, limit_bytes)
        await self.gates["read"].wait()
        return segments


class Reader:
    """A client: what it was given, and where it goes on."""

    def __init__(self, after: int) -> None:
        self.start = after
        self.after = after
        self.texts: list[tuple[int, int, str]] = []
        """What was said, from the one number to the other."""
        self.finals = 0
        self.gaps = 0
        self.follower: Follower | None = None
        self.scope: trio.CancelScope | None = None

    def take(self, line: bytes) -> None:
        chunk = decode_chunk(line)
        assert self.finals == 0
        if isinstance(chunk.content, dict) and "gap" in chunk.content:
            assert chunk.content["gap"]["from"] == self.after + 1
            assert chunk.content["gap"]["to"] == chunk.seq
            self.gaps += 1
        else:
            first = chunk.seq if chunk.first_seq is UNSET else chunk.first_seq
            assert first == self.after + 1
            if not chunk.final:
                self.texts.append((first, chunk.seq, str(chunk.content)))
        self.after = chunk.seq
        self.finals += chunk.final


class LogMachine(RuleBasedStateMachine):
    """One task, in whatever process it is by now, and clients that come, read, leave and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.portal = Portal()
        self.readers: list[Reader] = []
        self.said: list[str] = []
        self.lost: set[str] = set()
        self.instances = 1
        self.finishing = self.pruned = False
        self.portal.run(self.begin)

    async def begin(self) -> None:
        self.opened = trio.open_nursery()
        self.nursery = await self.opened.__aenter__()
        self.store = Moody()
        for gate in self.store.gates.values():
            gate.set()
        await self.start(await accept(self.store, instance="instance-1"))

    async def start(self, row: TaskRow) -> None:
        """The process that has the task now."""
        self.scopes: list[trio.CancelScope] = []
        self.ending = False
        writer = LogWriter(self.store)
        self.log = TaskLog(
            row,
            writer,
            max_uncommitted=1 << 20,
            max_chunk=1 << 20,
            max_log=1 << 30,
            tail_bytes=self.instances % 2 * 3000 + 300,
        )
        self.log.restore(Fold())  # nobody asks here what it adds up to
        self.log.on_refused = lambda log: self.forget()
        self.nursery.start_soon(self.in_process, writer.run)

    async def in_process(self, call: Any) -> None:
        """Until the process dies."""
        with trio.CancelScope() as scope:
            self.scopes.append(scope)
            await call()

    def step(self, call: Any, *args: Any) -> Any:
        """Does it, and lets everything that can go on do so."""

        async def settled() -> Any:
            result = await call(*args)
            await trio.testing.wait_all_tasks_blocked()
            return result

        return self.portal.run(settled)

    def held(self) -> list[Chunk]:
        """What the store holds."""
        (task,) = self.store._tasks.values()
        return [decode_chunk(line) for segment in task.log for line in split_lines(segment.data)]

    @property
    def over(self) -> bool:
        (task,) = self.store._tasks.values()
        return task.row.ended

    def forget(self) -> None:
        """What was said and is not held will never be."""
        held = {str(chunk.content) for chunk in self.held()}
        self.lost |= {text for text in self.said if text not in held}

    # --- the run
    @precondition(lambda self: not self.ending and self.log.failure is None)
    @rule(count=st.integers(1, 8), data=st.booleans())
    def emit(self, count: int, data: bool) -> None:
        async def put() -> None:
            for _ in range(count):
                self.said.append(f"<{len(self.said)}>")
                self.log.put("data" if data else "text", self.said[-1])

        self.step(put)

    @precondition(lambda self: not self.ending and self.log.failure is None)
    @rule(asks=st.booleans())
    def change(self, asks: bool) -> None:
        async def change() -> None:
            question = Question("Which?", NOW) if asks else None
            self.log.change(Change("input_required" if asks else "running", question=question))

        self.step(change)

    @precondition(lambda self: not self.finishing and not self.over)
    @rule(status=st.sampled_from(["completed", "failed", "cancelled", *[None] * 5]), cut=st.booleans())
    def finish(self, status: Any, cut: bool) -> None:
        """The end, as often as it takes; seldom, for little can happen after it."""
        if status is None and not self.ending and self.log.failure is None:
            return
        status = status or "failed"

        async def finish() -> None:
            with trio.CancelScope() as scope, suppress(StoreUnavailable):
                if cut:
                    self.nursery.start_soon(self.cut, scope)
                await self.log.finish(Outcome(status), Change(status, ended_at=NOW), None)
            self.finishing = False

        async def begin() -> None:
            self.finishing = self.ending = True
            self.nursery.start_soon(self.in_process, finish)

        self.step(begin)

    async def cut(self, scope: trio.CancelScope) -> None:
        await trio.lowlevel.checkpoint()
        scope.cancel()

    # --- the store
    @rule(gate=st.sampled_from(["append", "answer", "read", *[None] * 5]))
    def shut(self, gate: str | None) -> None:
        """Seldom: it stays shut until all are opened."""
        if gate is not None and self.store.gates[gate].is_set():
            self.store.gates[gate] = trio.Event()

    @rule()
    def open(self) -> None:
        self.step(self.open_all, None)

    @precondition(lambda self: not self.over)
    @rule()
    def refuse(self) -> None:
        self.step(self.open_all, StoreUnavailable("The disk is full"))

    async def open_all(self, error: HectorError | None) -> None:
        self.store.error = error
        for gate in self.store.gates.values():
            gate.set()

    @precondition(lambda self: not self.over)
    @rule()
    def die(self) -> None:
        """The process goes, whatever waits; its clients lose their connections, and the next one takes over."""

        async def die() -> None:
            for scope in self.scopes:
                scope.cancel()
            for reader in self.readers:
                self.leave_now(reader)
            await trio.testing.wait_all_tasks_blocked()
            self.forget()
            self.finishing = False
            self.instances += 1
            (row,) = await self.store.take_over(f"instance-{self.instances}")
            await self.start(row)

        self.step(die)

    @precondition(lambda self: self.over)
    @rule()
    def prune(self) -> None:
        async def prune() -> None:
            await self.store.sweep(now=NOW, tasks_ended_before=0, limit=9, logs_ended_before=NOW + 1)

        self.step(prune)
        self.pruned = True

    # --- clients
    @rule(back=st.integers(0, 5))
    def attach(self, back: int) -> None:
        reader = Reader(max(0, self.log.committed - back) if back < 5 else 0)
        self.readers.append(reader)
        self.step(self.follow, reader)

    async def follow(self, reader: Reader) -> None:
        row = await self.store.get_task_by_key(self.log.key)
        assert row is not None
        log = None if row.ended and self.log.final_seq is not None and len(self.readers) % 2 else self.log
        reader.follower = Follower(self.store, row, lambda: log, after=reader.after).__enter__()

    def leave_now(self, reader: Reader) -> None:
        if reader.scope is not None:
            reader.scope.cancel()
        if reader.follower is not None:
            reader.follower.close()
            reader.follower = None

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), limit=st.sampled_from([1, 2, 5, 1 << 30]), join=st.booleans(), times=st.integers(1, 4))
    def read(self, data: st.DataObject, limit: int, join: bool, times: int) -> None:
        """Begins to read, unless it does; goes on in the background as long as there is nothing to be had."""
        reader = data.draw(st.sampled_from(self.readers))
        self.step(self.begin_to_read, reader, limit, join, times)

    async def begin_to_read(self, reader: Reader, limit: int, join: bool, times: int) -> None:
        if reader.scope is not None:
            return
        if reader.follower is None or reader.follower.failure is not None:
            self.leave_now(reader)
            await self.follow(reader)
        follower = reader.follower
        assert follower is not None

        async def go_on() -> None:
            with trio.CancelScope() as reader.scope:
                for _ in range(times):
                    for line in await follower.read(limit, join=join):
                        reader.take(line)
            reader.scope = None

        self.nursery.start_soon(go_on)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), leaves=st.booleans())
    def cut_reader(self, data: st.DataObject, leaves: bool) -> None:
        """A read is cancelled; its reader reads on later, or has left and comes back."""
        reader = data.draw(st.sampled_from(self.readers))

        async def cut() -> None:
            if leaves:
                self.leave_now(reader)
            elif reader.scope is not None:
                reader.scope.cancel()

        self.step(cut)

    # --- what must hold
    @invariant()
    def the_log_is_whole(self) -> None:
        held = self.held()
        if not self.pruned:
            assert [chunk.seq for chunk in held] == list(range(1, len(held) + 1))
            texts = [str(chunk.content) for chunk in held if not chunk.final]
            expected = [text for text in self.said if text not in self.lost]
            assert texts == expected[: len(texts)]
        assert [chunk.final for chunk in held[:-1]] == [False] * (len(held) - 1 if held else 0)
        assert any(chunk.final for chunk in held) == self.over

    @invariant()
    def readers_have_what_is_held(self) -> None:
        held = {chunk.seq: chunk for chunk in self.held()}
        texts = [text for text in self.said if text not in self.lost]
        for reader in self.readers:
            for first, last, text in reader.texts:
                assert text == "".join(texts[first - 1 : last])
            assert reader.after <= max(held, default=0)
            if reader.finals:
                assert held[reader.after].final
            assert reader.gaps <= self.pruned

    def teardown(self) -> None:
        try:
            self.step(self.open_all, None)
            for _ in range(2):  # what was begun before a refusal ends with it, then nothing is in the way
                if not self.over:
                    self.finish("completed", False)
            assert self.over
            for reader in self.readers:
                for _ in range(4):
                    self.step(self.begin_to_read, reader, 1 << 30, False, 100)
                assert reader.finals == 1 or reader.start >= self.log.committed
                assert reader.after == max(self.log.committed, reader.start)
            self.the_log_is_whole()
            self.readers_have_what_is_held()
        finally:
            self.portal.run(self.end)
            self.portal.close()

    async def end(self) -> None:
        self.nursery.cancel_scope.cancel()
        await self.opened.__aexit__(None, None, None)


def test_whatever_happens_every_reader_gets_every_chunk_once_and_one_final_one() -> None:
    bounds = settings(
        deadline=None,
        max_examples=100,
        stateful_step_count=50,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(LogMachine, settings=bounds)
