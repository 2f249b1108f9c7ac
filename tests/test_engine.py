"""The engine over every store: runs, turns, ends, limits, recovery."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hector_trio.agents import Context
from hector_trio.agents.function import SyncContext
from hector_trio.config import Limits, Settings, Tasks
from hector_trio.engine import Engine
from hector_trio.errors import (
    AgentNotFound,
    Draining,
    HectorError,
    RateLimited,
    RunError,
    SessionBusy,
    SessionNotFound,
    StoreUnavailable,
    TaskExists,
    TaskNotFound,
)
from hector_trio.log import now_ms
from hector_trio.stores import Accepted, Append, NewTask, Store
from hector_trio.task import TaskRow, fold
from tests.engines import Steered, agent, engine_of, new_session, order, read_all, run, store_of, texts, wait_ended


@pytest.fixture(params=["memory", "sql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with store_of(request.param, tmp_path) as opened:
        yield opened


async def stays_true_to_its_log(engine: Engine, row: TaskRow) -> None:
    """The row is what the complete log folds to, the numbers have no hole, and one chunk is final, the last."""
    chunks = await read_all(engine, row)
    assert [chunk.seq for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    stored = await engine.store.get_task_by_key(row.key)
    assert stored is not None
    folded = fold(chunks)
    assert (stored.status, stored.output, stored.last_seq) == (folded.status, folded.output(), folded.last_seq)
    assert (stored.error and stored.error.code) == (folded.error and folded.error.code)


async def test_a_task_runs_to_its_end_and_its_log_says_so(store: Store) -> None:
    async def answer(ctx: Context) -> None:
        for word in ("one ", "two ", "three"):
            await ctx.emit_text(word)
        await ctx.emit_data({"n": 3})
        await ctx.emit_metadata({"source": "memory"})
        await ctx.emit_error("careful")

    async with engine_of(store, agent(answer)) as engine:
        row = await run(engine, order())
        assert row.status == "completed"
        assert row.output is not None
        assert row.output.content == "one two three"
        chunks = await read_all(engine, row)
        assert [chunk.chunk_type for chunk in chunks] == ["text"] * 3 + ["data", "metadata", "error", "done"]
        await stays_true_to_its_log(engine, row)


@pytest.mark.parametrize("after", range(6))
async def test_a_follower_starts_at_any_number_during_the_run_and_after_it(store: Store, after: int) -> None:
    steered = Steered()

    async def count(ctx: Context) -> None:
        for n in range(4):
            await ctx.emit_text(str(n))
        await steered(ctx)

    async with engine_of(store, agent(count)) as engine, trio.open_nursery() as nursery:
        row = (await engine.submit(order())).task
        await steered.wait_started("hi")
        live: list[int] = []

        async def follow() -> None:
            live.extend(chunk.seq for chunk in await read_all(engine, row, after))

        nursery.start_soon(follow)
        steered.let("hi")
        row = await engine.wait(row)
        assert [chunk.seq for chunk in await read_all(engine, row, after)] == list(range(after + 1, 8))
        nursery.cancel_scope.deadline = trio.current_time() + 5
    assert live == list(range(after + 1, 8))


async def test_a_reader_far_behind_gets_everything_from_the_store(store: Store) -> None:
    async def much(ctx: Context) -> None:
        for n in range(3000):
            await ctx.emit_text(f"{n} ")

    settings = Settings(limits=Limits(tail_bytes=2000, max_uncommitted=5000))
    async with engine_of(store, agent(much), settings) as engine:
        row = (await engine.submit(order())).task
        chunks = await read_all(engine, row)
        assert texts(chunks) == [f"{n} " for n in range(3000)]
        await stays_true_to_its_log(engine, row)


class Surprise(Exception):
    """Something an agent did not expect; its words are nobody's business."""


async def raise_surprise(ctx: Context) -> None:
    await ctx.emit_text("so far")
    raise Surprise("/etc/secret")


async def raise_group(ctx: Context) -> None:
    async with trio.open_nursery() as nursery:

        async def fail() -> None:
            raise RunError("out_of_stock", "Nothing left", details={"n": 0})

        nursery.start_soon(fail)


async def call_asyncio(ctx: Context) -> None:
    import asyncio

    await asyncio.sleep(1)


async def not_json(ctx: Context) -> None:
    await ctx.emit_data(object())


async def too_large(ctx: Context) -> None:
    await ctx.emit_data("x" * 300_000)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (raise_surprise, "agent_error"),
        (raise_group, "out_of_stock"),
        (call_asyncio, "asyncio_in_agent"),
        (not_json, "not_json"),
        (too_large, "chunk_too_large"),
    ],
)
async def test_every_failure_of_an_agent_is_failed_with_a_code(store: Store, function: object, code: str) -> None:
    async with engine_of(store, agent(function)) as engine:  # type: ignore[arg-type]
        row = await run(engine, order())
        assert row.status == "failed"
        assert row.error is not None
        assert row.error.code == code
        assert "secret" not in msgspec.json.encode(row).decode()
        await stays_true_to_its_log(engine, row)


async def test_a_log_that_grows_beyond_its_limit_fails_the_run(store: Store) -> None:
    async def babble(ctx: Context) -> None:
        while True:
            await ctx.emit_text("bla " * 20)

    async with engine_of(store, agent(babble), Settings(limits=Limits(log_bytes=50_000))) as engine:
        row = await run(engine, order())
        assert row.error is not None
        assert row.error.code == "log_full"
        await stays_true_to_its_log(engine, row)


async def test_long_text_becomes_several_chunks(store: Store) -> None:
    text = "ä€😀\n" * 2000

    async def write(ctx: Context) -> None:
        await ctx.emit_text(text)

    async with engine_of(store, agent(write), Settings(limits=Limits(chunk_bytes=1000))) as engine:
        row = await run(engine, order())
        assert row.output is not None
        assert row.output.content == text


async def test_a_task_out_of_time_fails_with_timeout(store: Store) -> None:
    async with engine_of(store, agent(Steered())) as engine:
        row = await run(engine, order(timeout_ms=30))
        assert row.error is not None
        assert row.error.code == "timeout"
        await stays_true_to_its_log(engine, row)


async def test_a_cancel_ends_a_running_task_once_and_is_idempotent(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        row = (await engine.submit(order())).task
        await steered.wait_started("hi")
        with trio.fail_after(5):
            first = await engine.cancel(row)
            second = await engine.cancel(row)
        assert first == second
        assert first.status == "cancelled"
        assert steered.ended == ["hi"]
        await stays_true_to_its_log(engine, row)


async def test_a_cancel_before_the_run_has_begun_means_it_never_begins(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        running = (await engine.submit(order("one", session=session))).task
        queued = (await engine.submit(order("two", session=session))).task
        await steered.wait_started("one")
        with trio.fail_after(5):
            assert (await engine.cancel(queued)).status == "cancelled"
        steered.let("one")
        with trio.fail_after(5):
            await engine.wait(running)
        assert steered.started == ["one"]
        await stays_true_to_its_log(engine, queued)


async def test_a_run_dies_with_the_nursery_it_was_given_and_its_final_chunk_is_committed(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        async with trio.open_nursery() as connection:
            row = (await engine.submit(order(policy="cancel"), connection)).task
            await steered.wait_started("hi")
            connection.cancel_scope.cancel()
        stored = await store.get_task_by_key(row.key)
        assert stored is not None
        assert stored.status == "cancelled"
        assert engine.running == engine.queued == 0
        await stays_true_to_its_log(engine, row)


async def test_a_run_that_continues_is_not_in_the_connections_nursery(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        async with trio.open_nursery() as connection:
            row = (await engine.submit(order(policy="continue"), connection)).task
            await steered.wait_started("hi")
            connection.cancel_scope.cancel()
        steered.let("hi")
        with trio.fail_after(5):
            assert (await engine.wait(row)).status == "completed"


async def test_a_submit_that_is_cancelled_leaves_a_run_that_ends_or_nothing(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        for checkpoints in range(12):
            async with trio.open_nursery() as connection:

                async def submit(connection: trio.Nursery = connection, n: int = checkpoints) -> None:
                    await engine.submit(order(str(n), policy="cancel"), connection)

                connection.start_soon(submit)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                connection.cancel_scope.cancel()
        page = await store.list_tasks("o", limit=100)
        assert all(row.status == "cancelled" for row in page.items)
        for row in page.items:
            await stays_true_to_its_log(engine, row)
        assert engine.running == engine.queued == 0


async def test_tasks_of_a_session_take_their_turn_in_order_and_remember(store: Store) -> None:
    seen: dict[str, list[str]] = {}
    running = 0

    async def remember(ctx: Context) -> None:
        nonlocal running
        running += 1
        assert running == 1
        seen[ctx.text] = [str(message.content) for message in ctx.history]
        await ctx.emit_text(f"re {ctx.text}")
        await trio.lowlevel.checkpoint()
        running -= 1

    async with engine_of(store, agent(remember)) as engine:
        session = await new_session(store)
        rows: list[TaskRow] = []
        async with trio.open_nursery() as nursery:

            async def submit(n: int) -> None:
                rows.append((await engine.submit(order(str(n), session=session))).task)

            for n in range(10):
                nursery.start_soon(submit, n)
        with trio.fail_after(10):
            for row in rows:
                await engine.wait(row)
        arrival = list(seen)
        assert sorted(arrival) == [str(n) for n in range(10)]
        for n, text in enumerate(arrival):
            assert seen[text] == [line for earlier in arrival[:n] for line in (earlier, f"re {earlier}")]
        by_key = sorted(rows, key=lambda row: row.key)
        assert [msgspec.json.decode(row.request)["input"]["content"] for row in by_key] == arrival


async def test_histories_of_sessions_and_owners_never_mix(store: Store) -> None:
    seen: list[list[str]] = []

    async def remember(ctx: Context) -> None:
        seen.append([str(message.content) for message in ctx.history])
        await ctx.emit_text("answer")

    async with engine_of(store, agent(remember)) as engine:
        await new_session(store, "same", owner="o")
        await new_session(store, "same", owner="p")
        await new_session(store, "other", owner="o")
        await run(engine, order("secret of o", session="same", owner="o"))
        await run(engine, order("x", session="same", owner="p"))
        await run(engine, order("y", session="other", owner="o"))
        assert seen == [[], [], []]
        with pytest.raises(SessionNotFound):
            await engine.submit(order("z", session="other", owner="p"))


async def test_a_partial_answer_stays_in_the_conversation_marked(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        row = (await engine.submit(order(session=session))).task
        await steered.wait_started("hi")
        await engine.cancel(row)
        messages = (await store.list_messages("o", session, now=now_ms())).items
        assert [(line.role, line.content, line.partial_status) for line in messages] == [
            ("user", "hi", None),
            ("agent", "<hi", "cancelled"),
        ]


async def test_two_tasks_at_once_can_be_rejected_or_interrupt(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        first = (await engine.submit(order("first", session=session, task_id="t1"))).task
        await steered.wait_started("first")
        with pytest.raises(SessionBusy) as busy:
            await engine.submit(order("no", session=session, multitask="reject"))
        assert busy.value.task_id == "t1"
        waiting = (await engine.submit(order("waiting", session=session))).task
        newest = (await engine.submit(order("newest", session=session, multitask="interrupt"))).task
        await steered.wait_started("newest")
        assert (await engine.wait(first)).status == "cancelled"
        assert steered.started == ["first", "newest"]
        steered.let("newest")
        steered.let("waiting")
        with trio.fail_after(5):
            assert (await engine.wait(newest)).status == "completed"
            assert (await engine.wait(waiting)).status == "completed"


async def test_the_same_running_id_is_followed_another_question_is_refused(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        first = await engine.submit(order(task_id="t"))
        again = await engine.submit(order(task_id="t"))
        assert (first.how, again.how) == ("created", "running")
        assert again.task.key == first.task.key
        with pytest.raises(TaskExists):
            await engine.submit(order("else", task_id="t"))
        elsewhere = await engine.submit(order("else", task_id="t", owner="p"))
        assert elsewhere.how == "created"
        steered.let("hi")
        steered.let("else")
        with trio.fail_after(5):
            await engine.wait(first.task)
        third = await engine.submit(order(task_id="t"))
        assert third.how == "created"
        old = await store.get_task("o", "a", "t~1")
        assert old is not None
        assert old.key == first.task.key
        assert {chunk.task_id for chunk in await read_all(engine, old)} == {"t~1"}


async def test_limits_refuse_with_a_clear_error_and_cost_nothing(store: Store) -> None:
    steered = Steered()
    settings = Settings(limits=Limits(running=2, queued=3, queued_per_session=1))
    async with engine_of(store, agent(steered), settings) as engine:
        session = await new_session(store)
        for text in ("r1", "r2"):
            await engine.submit(order(text, session=session if text == "r1" else None))
            await steered.wait_started(text)
        await engine.submit(order("q1", session=session))
        with pytest.raises(RateLimited, match="session"):
            await engine.submit(order("q2", session=session))
        rows = [(await engine.submit(order(f"n{n}"))).task for n in range(2)]
        with pytest.raises(RateLimited):
            await engine.submit(order("too much"))
        assert (engine.running, engine.queued) == (2, 3)
        for text in ("r1", "r2", "q1", "n0", "n1"):
            steered.let(text)
        with trio.fail_after(5):
            for row in rows:
                await engine.wait(row)
        assert steered.most == 2


async def test_an_unknown_agent_or_session_is_refused(store: Store) -> None:
    async with engine_of(store, agent(Steered())) as engine:
        with pytest.raises(AgentNotFound):
            await engine.submit(order(agent_id="nobody"))
        with pytest.raises(SessionNotFound):
            await engine.submit(order(session="nowhere"))


async def test_state_is_the_sessions_and_survives_the_run(store: Store) -> None:
    async def count(ctx: Context) -> None:
        await ctx.update_state({"n": ctx.state.get("n", 0) + 1, "gone": None})
        await ctx.emit_text(str(ctx.state["n"]))

    async with engine_of(store, agent(count)) as engine:
        session = await new_session(store)
        await run(engine, order(session=session))
        row = await run(engine, order(session=session))
        assert row.output is not None
        assert row.output.content == "2"
        found = await store.get_session("o", session, now=now_ms())
        assert found is not None
        assert found.state == {"n": 2}
        outside = await run(engine, order())
        assert outside.error is not None
        assert outside.error.code == "invalid_request"


async def test_a_plain_function_runs_in_a_thread_with_the_same_context(store: Store) -> None:
    def plain(ctx: SyncContext) -> None:
        ctx.update_state({"seen": len(ctx.history)})
        ctx.emit_text(f"{ctx.text} {ctx.state['seen']}")
        ctx.emit_data({"n": 1})
        ctx.emit_metadata({})
        ctx.emit_error("careful")

    async with engine_of(store, agent(plain)) as engine:
        session = await new_session(store)
        row = await run(engine, order(session=session))
        assert row.output is not None
        assert row.output.content == "hi 0"


async def test_a_cancel_ends_a_plain_functions_run_at_once_and_it_can_emit_no_more(store: Store) -> None:
    import threading

    inside, release, outcome = threading.Event(), threading.Event(), []

    def stuck(ctx: SyncContext) -> None:
        inside.set()
        release.wait(10)
        try:
            ctx.emit_text("too late")
        except BaseException as error:
            outcome.append(type(error).__name__)
            raise

    async with engine_of(store, agent(stuck)) as engine:
        row = (await engine.submit(order())).task
        await trio.to_thread.run_sync(inside.wait)
        with trio.fail_after(2):
            row = await engine.cancel(row)
        assert row.status == "cancelled"
        release.set()
        while not outcome:
            await trio.lowlevel.checkpoint()
        assert texts(await read_all(engine, row)) == []


async def test_deleting_a_session_cancels_what_runs_in_it_and_lets_followers_finish(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        running = (await engine.submit(order("one", session=session))).task
        queued = (await engine.submit(order("two", session=session))).task
        await steered.wait_started("one")
        seen: list[str] = []
        async with trio.open_nursery() as nursery:
            ready = trio.Event()

            async def follow() -> None:
                with engine.follow(running) as follower:
                    while lines := await follower.read():
                        seen.extend(line.decode() for line in lines)
                        ready.set()

            nursery.start_soon(follow)
            with trio.fail_after(5):
                await ready.wait()
                await engine.delete_session("o", session)
        assert '"cancelled"' in seen[-1]
        assert await store.get_task_by_key(running.key) is None
        assert await store.get_task_by_key(queued.key) is None
        assert engine.running == engine.queued == 0
        with pytest.raises(SessionNotFound):
            await engine.delete_session("o", session)
        with pytest.raises(SessionNotFound):
            await engine.submit(order(session=session))


async def test_a_drain_lets_runs_end_refuses_new_ones_and_interrupts_the_rest(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        quick = (await engine.submit(order("quick"))).task
        slow = (await engine.submit(order("slow"))).task
        await steered.wait_started("quick")
        await steered.wait_started("slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.drain, 0.2)
            await engine.drain_started.wait()
            with pytest.raises(Draining):
                await engine.submit(order("new"))
            steered.let("quick")
        assert (await engine.wait(quick)).status == "completed"
        slow = await engine.wait(slow)
        assert slow.error is not None
        assert slow.error.code == "interrupted"
        await stays_true_to_its_log(engine, slow)


async def test_who_follows_a_task_that_a_drain_has_left_to_the_next_start_is_told(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered), Settings(limits=Limits(running=1))) as engine:
        await engine.submit(order("first"))
        await steered.wait_started("first")
        waiting = (await engine.submit(order("second"))).task
        await engine.drain(0)
        with engine.follow(waiting) as follower, trio.fail_after(5):
            assert await follower.read() == []
        assert isinstance(follower.failure, Draining)


async def test_a_cancel_that_a_drain_has_overtaken_is_refused(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered), Settings(limits=Limits(running=1))) as engine:
        await engine.submit(order("first"))
        await steered.wait_started("first")
        waiting = (await engine.submit(order("second"))).task
        await engine.drain(0)
        with pytest.raises(Draining), trio.fail_after(5):
            await engine.cancel(waiting)
    assert (await store.get_task_by_key(waiting.key)) == waiting


async def test_a_cancel_of_what_has_ended_and_was_removed_since_it_was_found_says_so(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        row = (await engine.submit(order("x"))).task
        steered.let("x")
        ended = await engine.wait(row)
        await store.delete_task(row.owner, row.agent_id, row.task_id)
        with pytest.raises(TaskNotFound):
            await engine.cancel(row)
        assert await engine.cancel(ended) == ended


async def test_who_was_given_a_row_before_its_task_ended_reads_to_the_end(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        row = (await engine.submit(order("x"))).task
        follower = engine.follow(row)  # not entered yet: the answer's head is still being sent
        steered.let("x")
        await engine.wait(row)
        with follower, trio.fail_after(5):
            assert len(await follower.read()) == 3
            assert await follower.read() == []
        assert follower.failure is None


async def test_what_a_drain_could_not_begin_is_taken_up_by_the_next_start_in_order(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        await engine.submit(order("running", session=session))
        await steered.wait_started("running")
        for text in ("b", "a", "c"):
            await engine.submit(order(text, session=session))
        dropped = (await engine.submit(order("dropped", session=session, policy="cancel"))).task
        await engine.drain(0)
    assert steered.started == ["running"]
    found = await store.get_task_by_key(dropped.key)
    assert found is not None
    assert found.status == "failed"
    again = Steered()
    for text in ("a", "b", "c"):
        again.let(text)
    async with engine_of(store, agent(again), instance="next") as engine:
        for row in (await store.list_tasks("o", session_id=session)).items:
            with trio.fail_after(5):
                await stays_true_to_its_log(engine, await engine.wait(row))
    assert again.started == ["b", "a", "c"]


async def test_what_ran_when_the_process_died_is_interrupted_at_the_next_start(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered), instance="dead") as engine:
        session = await new_session(store)
        row = (await engine.submit(order(session=session, policy="cancel"))).task
        await steered.wait_started("hi")
        with engine.follow(row) as follower:
            seen = await follower.read()
        frozen = await store.get_task_by_key(row.key)
        async with engine_of(store, agent(steered), instance="next") as next_engine:
            found = await store.get_task_by_key(row.key)
            assert found is not None
            assert found.error is not None
            assert (found.status, found.error.code) == ("failed", "interrupted")
            chunks = await read_all(next_engine, found)
            assert texts(chunks) == ["<hi"] * len(seen)
            await stays_true_to_its_log(next_engine, found)
            messages = (await store.list_messages("o", session, now=now_ms())).items
            assert messages[-1].partial_status == "failed"
        assert frozen is not None
        # The process that was thought dead cannot write into the task any more.
        steered.let("hi")
        with trio.fail_after(5):
            await engine.wait(row)
        assert await store.get_task_by_key(row.key) == found


class Refusing:
    """A store whose appends are refused while ``full``; everything else is the real one's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.full = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def append(self, appends: list[Append]) -> frozenset[int]:
        if self.full:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable("The disk is full")
        return await self._store.append(appends)


async def test_when_the_store_refuses_the_run_ends_viewers_learn_it_and_the_end_is_stored_later(store: Store) -> None:
    refusing = Refusing(store)
    steered = Steered()
    async with engine_of(refusing, agent(steered)) as engine:  # type: ignore[arg-type]
        row = (await engine.submit(order())).task
        await steered.wait_started("hi")
        with engine.follow(row) as follower:
            assert len(await follower.read()) == 1
            refusing.full = True
            steered.let("hi")
            with trio.fail_after(5):
                assert await follower.read() == []
            assert isinstance(follower.failure, HectorError)
            assert follower.failure.code == "store_unavailable"
        refusing.full = False
        row = await wait_ended(engine, row)
        assert row.error is not None
        assert row.error.code == "store_unavailable"
        assert texts(await read_all(engine, row)) == ["<hi"]
        await stays_true_to_its_log(engine, row)


async def test_ended_tasks_are_swept_after_their_retention_those_of_sessions_stay(store: Store) -> None:
    async def answer(ctx: Context) -> None:
        await ctx.emit_text("x")

    async with engine_of(store, agent(answer), Settings(tasks=Tasks(retention=0))) as engine:
        session = await new_session(store)
        alone = await run(engine, order())
        kept = await run(engine, order(session=session))
        while now_ms() <= (alone.ended_at or 0):
            await trio.lowlevel.checkpoint()
        assert await engine.sweep() == 1
        assert await store.get_task_by_key(alone.key) is None
        assert await store.get_task_by_key(kept.key) is not None


async def test_an_agent_that_only_emits_lets_others_run(store: Store) -> None:
    async def babble(ctx: Context) -> None:
        while True:
            await ctx.emit_text("bla")

    async with engine_of(store, agent(babble)) as engine:
        row = (await engine.submit(order())).task
        with trio.fail_after(5):
            with engine.follow(row) as follower:
                for _ in range(20):
                    assert await follower.read()
            assert (await engine.cancel(row)).status == "cancelled"


async def test_a_run_is_given_the_last_messages_only(store: Store) -> None:
    seen: list[list[str]] = []

    async def remember(ctx: Context) -> None:
        seen.append([str(message.content) for message in ctx.history])
        await ctx.emit_text(f"re {ctx.text}")

    async with engine_of(store, agent(remember), Settings(limits=Limits(history_messages=3))) as engine:
        session = await new_session(store)
        for n in range(4):
            await run(engine, order(str(n), session=session))
        assert seen[-1] == ["re 1", "2", "re 2"]


async def test_a_sessions_state_cannot_grow_without_a_bound(store: Store) -> None:
    async def hoard(ctx: Context) -> None:
        for n in range(100):
            await ctx.update_state({str(n): "x" * 1000})

    async with engine_of(store, agent(hoard), Settings(limits=Limits(session_bytes=10_000))) as engine:
        session = await new_session(store)
        row = await run(engine, order(session=session))
        assert row.error is not None
        assert row.error.code == "payload_too_large"
        found = await store.get_session("o", session, now=now_ms())
        assert found is not None
        assert len(found.state) == 9


async def test_a_store_that_keeps_refusing_does_not_hold_up_the_end(store: Store) -> None:
    refusing = Refusing(store)
    steered = Steered()
    with trio.fail_after(5):
        async with engine_of(refusing, agent(steered)) as engine:  # type: ignore[arg-type]
            row = (await engine.submit(order())).task
            with engine.follow(row) as follower:
                await follower.read()
            refusing.full = True
            await engine.drain(0)
    async with engine_of(store, agent(steered), instance="next") as engine:
        found = await store.get_task_by_key(row.key)
        assert found is not None
        assert found.status == "failed"
        await stays_true_to_its_log(engine, found)


async def test_a_bug_in_the_store_fails_the_task_and_not_the_server(store: Store) -> None:
    class Buggy(Refusing):
        async def append(self, appends: list[Append]) -> frozenset[int]:
            if self.full:
                self.full = False
                raise ZeroDivisionError
            return await super().append(appends)

    buggy = Buggy(store)
    buggy.full = True

    async def answer(ctx: Context) -> None:
        await ctx.emit_text("x")

    async with engine_of(buggy, agent(answer)) as engine:  # type: ignore[arg-type]
        first = await wait_ended(engine, (await engine.submit(order())).task)
        assert first.error is not None
        assert first.error.code == "store_unavailable"
        assert (await run(engine, order())).status == "completed"


async def test_a_reused_id_is_safe_however_closely_the_next_task_follows(store: Store) -> None:
    """The next task is accepted in the very transaction that ends the one before, while that one still winds up."""

    async def answer(ctx: Context) -> None:
        await ctx.emit_text("x")

    async with engine_of(store, agent(answer)) as engine:

        async def client(n: int) -> None:
            for _ in range(30):
                with contextlib.suppress(TaskExists):
                    await engine.wait((await engine.submit(order(str(n), task_id="task-123"))).task)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for n in range(8):
                    nursery.start_soon(client, n)
        assert engine.running == engine.queued == 0
        for row in (await store.list_tasks("o", limit=100)).items:
            await stays_true_to_its_log(engine, row)


async def test_a_reused_id_keeps_its_turn_in_the_session(store: Store) -> None:
    running = 0

    async def answer(ctx: Context) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await ctx.emit_text("x")
        await trio.lowlevel.checkpoint()
        running -= 1

    async with engine_of(store, agent(answer)) as engine:
        session = await new_session(store)

        async def client(n: int) -> None:
            for _ in range(15):
                with contextlib.suppress(TaskExists):
                    row = await engine.wait((await engine.submit(order(str(n), session=session, task_id="t"))).task)
                    assert row.status == "completed"

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for n in range(6):
                    nursery.start_soon(client, n)


async def raise_details(ctx: Context) -> None:
    raise RunError("odd", "message", details=object())


async def raise_surrogate(ctx: Context) -> None:
    raise RunError("odd", "\ud800")


async def raise_number(ctx: Context) -> None:
    raise RunError(404, "message")  # type: ignore[arg-type]


def leave(ctx: SyncContext) -> None:
    sys.exit()


def cancel_asyncio(ctx: SyncContext) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("function", [raise_details, raise_surrogate, raise_number, leave, cancel_asyncio])
async def test_whatever_an_agent_raises_harms_nobody_else(store: Store, function: Callable[..., None]) -> None:
    steered = Steered()
    agents = agent(function) | agent(steered, "other")
    async with engine_of(store, agents) as engine:
        other = (await engine.submit(order(agent_id="other"))).task
        await steered.wait_started("hi")
        for _ in range(3):
            row = await run(engine, order())
            assert (row.status, row.error and row.error.code) == ("failed", "agent_error")
            await stays_true_to_its_log(engine, row)
        steered.let("hi")
        with trio.fail_after(5):
            assert (await engine.wait(other)).status == "completed"


async def test_what_an_agent_does_to_its_data_after_emitting_it_changes_nothing(store: Store) -> None:
    async def reuse(ctx: Context) -> None:
        value: dict[str, object] = {}
        for n in range(3):
            value["n"] = n
            await ctx.emit_data(value)
        value["n"] = object()

    async with engine_of(store, agent(reuse)) as engine:
        row = await run(engine, order())
        assert row.output is not None
        assert row.output.content == [{"n": 0}, {"n": 1}, {"n": 2}]
        await stays_true_to_its_log(engine, row)


async def test_a_thread_that_goes_on_emitting_after_a_cancel_adds_nothing_behind_the_end(store: Store) -> None:
    def write(ctx: SyncContext) -> None:
        while True:
            ctx.emit_text("bla " * 20_000)

    async with engine_of(store, agent(write), Settings(limits=Limits(chunk_bytes=4000))) as engine:
        for _ in range(10):
            row = (await engine.submit(order())).task
            with engine.follow(row) as follower, trio.fail_after(10):
                await follower.read()
            row = await engine.cancel(row)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            await stays_true_to_its_log(engine, row)


async def test_an_engine_ended_from_outside_leaves_what_it_accepted_to_the_next_start(store: Store) -> None:
    steered = Steered()
    with trio.CancelScope() as outside:
        async with engine_of(store, agent(steered)) as engine:
            session = await new_session(store)
            began = (await engine.submit(order("began", session=session))).task
            await steered.wait_started("began")
            queued = (await engine.submit(order("queued", session=session))).task
            outside.cancel()
            await trio.lowlevel.checkpoint()
    found = await store.get_task_by_key(began.key)
    assert found is not None
    assert (found.status, found.error and found.error.code) == ("failed", "interrupted")
    found = await store.get_task_by_key(queued.key)
    assert found is not None
    assert found.status == "pending"


async def test_an_interrupt_also_hits_a_task_that_is_still_being_accepted(store: Store) -> None:
    steered = Steered()
    async with engine_of(store, agent(steered)) as engine:
        session = await new_session(store)
        for _ in range(10):
            rows: dict[str, TaskRow] = {}

            async def submit(text: str, multitask: str, rows: dict[str, TaskRow] = rows) -> None:
                rows[text] = (await engine.submit(order(text, session=session, multitask=multitask))).task

            async with trio.open_nursery() as nursery:
                nursery.start_soon(submit, "old", "enqueue")
                await trio.lowlevel.checkpoint()
                nursery.start_soon(submit, "new", "interrupt")
            steered.let("new")
            with trio.fail_after(5):
                ends = {text: (await engine.wait(row)).status for text, row in rows.items()}
            assert ends == {"old": "cancelled", "new": "completed"}


class Late(Refusing):
    """Has tasks before it says so, as a store in another thread does."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.has = trio.Event()
        self.say = trio.Event()

    async def create_task(self, new: NewTask) -> Accepted:
        accepted = await self._store.create_task(new)
        self.has.set()
        await self.say.wait()
        return accepted


async def test_a_task_that_is_just_being_accepted_can_be_found_followed_and_stopped(store: Store) -> None:
    late = Late(store)
    steered = Steered()
    found: list[TaskRow | None] = []
    async with engine_of(late, agent(steered)) as engine, trio.open_nursery() as nursery:  # type: ignore[arg-type]

        async def find() -> None:
            found.append(await engine.find("o", "a", "t"))

        nursery.start_soon(engine.submit, order("hi", task_id="t"))
        await late.has.wait()
        nursery.start_soon(find)
        nursery.start_soon(engine.submit, order("hi", task_id="t"))
        await wait_all_tasks_blocked(0.05)
        assert not found
        late.say.set()
        with trio.fail_after(5):
            while not found:
                await trio.lowlevel.checkpoint()
        (row,) = found
        assert row is not None
        assert (await engine.cancel(row)).status == "cancelled"
        assert engine._accepting == {}


async def test_who_is_refused_for_a_busy_session_learns_the_task_also_while_that_is_being_accepted(
    store: Store,
) -> None:
    late = Late(store)
    async with engine_of(late, agent(Steered())) as engine, trio.open_nursery() as nursery:  # type: ignore[arg-type]
        session = await new_session(store)
        nursery.start_soon(engine.submit, order("hi", session=session, task_id="t"))
        await late.has.wait()
        with pytest.raises(SessionBusy) as busy:
            await engine.submit(order("other", session=session, multitask="reject"))
        assert busy.value.task_id == "t"
        late.say.set()
