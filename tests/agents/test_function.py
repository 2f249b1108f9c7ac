"""Functions as agents: which kinds there are, what a thread may do, and what code written for asyncio is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent, SyncContext
from hector_trio.errors import ConfigError
from hector_trio.stores import Store
from hector_trio.stores.memory import MemoryStore
from hector_trio.task import TaskRow
from tests.engines import agent, engine_of, new_session, order, read_all, run, texts


@pytest.fixture
def store() -> Store:
    return MemoryStore()


async def ended(store: Store, function: Callable[[Any], Awaitable[None] | None]) -> TaskRow:
    """The task of an agent that is this function."""
    async with engine_of(store, agent(function)) as engine:
        return await run(engine, order())


def code(row: TaskRow) -> str:
    assert row.error is not None
    return row.error.code


# --- kinds of functions -----------------------------------------------------------------------------------------------


async def greet(ctx: Context) -> None:
    await trio.lowlevel.checkpoint()
    await ctx.emit_text(threading.current_thread().name)


class Greeter:
    async def greet(self, ctx: Context) -> None:
        await greet(ctx)

    async def __call__(self, ctx: Context) -> None:
        await greet(ctx)


async def greet_politely(word: str, ctx: Context) -> None:
    await greet(ctx)


@pytest.mark.parametrize(
    "function",
    [greet, Greeter(), Greeter().greet, partial(greet_politely, "please")],
    ids=["function", "object", "method", "partial"],
)
async def test_what_is_async_runs_on_the_loop(store: Store, function: Callable[[Any], Awaitable[None]]) -> None:
    row = await ended(store, function)
    assert row.output is not None
    assert row.output.content == threading.current_thread().name


def greet_plainly(ctx: SyncContext) -> None:
    ctx.emit_text(threading.current_thread().name)


class PlainGreeter:
    def greet(self, ctx: SyncContext) -> None:
        greet_plainly(ctx)

    def __call__(self, ctx: SyncContext) -> None:
        greet_plainly(ctx)


@pytest.mark.parametrize(
    "function", [greet_plainly, PlainGreeter(), PlainGreeter().greet], ids=["function", "object", "method"]
)
async def test_what_is_plain_runs_in_a_thread_that_may_block(store: Store, function: Callable[[Any], None]) -> None:
    row = await ended(store, function)
    assert row.output is not None
    assert row.output.content != threading.current_thread().name


async def yielding(ctx: Context) -> AsyncIterator[str]:
    yield "no"


def yielding_plainly(ctx: SyncContext) -> Iterator[str]:
    yield "no"


class Yielding:
    async def __call__(self, ctx: Context) -> AsyncIterator[str]:
        yield "no"


@pytest.mark.parametrize("function", [yielding, yielding_plainly, Yielding()])
def test_a_function_that_yields_is_no_agent(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"agent 'a': the function yields; an agent emits"):
        agent(function)


async def test_a_coroutine_that_nobody_awaited_is_not_a_completed_task(store: Store) -> None:
    assert code(await ended(store, lambda ctx: greet(ctx))) == "agent_error"


# --- the context of a thread ------------------------------------------------------------------------------------------


async def test_a_thread_sees_the_same_request_and_emits_in_order(store: Store) -> None:
    seen: dict[str, Any] = {}

    def look(ctx: SyncContext) -> None:
        for name in ("task_id", "agent_id", "session_id", "user_id", "text", "parameters", "history", "state"):
            seen[name] = getattr(ctx, name)
        assert ctx.input == ctx.request.input
        for n in range(100):
            ctx.emit_text(f"{n} ")
        ctx.emit_error("careful", code="odd")

    async with engine_of(store, agent(look)) as engine:
        session = await new_session(store)
        row = await run(engine, order("hello", session=session, task_id="t", parameters={"n": 1}))
        chunks = await read_all(engine, row)
    assert seen == {
        "task_id": "t",
        "agent_id": "a",
        "session_id": "s",
        "user_id": None,
        "text": "hello",
        "parameters": {"n": 1},
        "history": [],
        "state": {},
    }
    assert texts(chunks) == [f"{n} " for n in range(100)]
    assert (chunks[100].content, chunks[100].code) == ("careful", "odd")


async def test_a_thread_sees_its_own_change_of_the_sessions_state(store: Store) -> None:
    states: list[dict[str, Any]] = []

    def change(ctx: SyncContext) -> None:
        ctx.update_state({"n": 1, "m": 2})
        ctx.update_state({"m": None})
        states.append(ctx.state)

    async with engine_of(store, agent(change)) as engine:
        assert (await run(engine, order(session=await new_session(store)))).status == "completed"
    assert states == [{"n": 1}]


async def test_an_emit_that_cannot_stand_in_json_raises_in_the_thread(store: Store) -> None:
    def odd(ctx: SyncContext) -> None:
        ctx.emit_data({1, 2})  # a set becomes a list
        ctx.emit_data(object())

    assert code(await ended(store, odd)) == "not_json"


class Blocked:
    """A plain agent: each run of it waits in its thread until it is let go, and keeps what its last emit raised."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.raised: list[BaseException] = []
        self.left = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._release = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, ctx: SyncContext) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self._entered.release()
        try:
            assert self._release.acquire(timeout=20)
            ctx.emit_text("free")
        except BaseException as error:
            self.raised.append(error)
            raise
        finally:
            with self._lock:
                self.inside -= 1
            self.left.release()

    async def wait_entered(self) -> None:
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(partial(self._entered.acquire, timeout=5))

    async def wait_left(self) -> None:
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(partial(self.left.acquire, timeout=5))

    def let_go(self) -> None:
        self._release.release()


async def test_after_the_end_of_its_run_a_thread_can_emit_nothing(store: Store) -> None:
    blocked = Blocked()
    async with engine_of(store, agent(blocked)) as engine:
        row = (await engine.submit(order())).task
        await blocked.wait_entered()
        with trio.fail_after(5):
            assert (await engine.cancel(row)).status == "cancelled"
        blocked.let_go()
        await blocked.wait_left()
        assert [chunk.chunk_type for chunk in await read_all(engine, row)] == ["done"]
    (raised,) = blocked.raised
    assert isinstance(raised, trio.Cancelled)


async def test_the_limiter_bounds_the_threads_and_a_cancelled_run_keeps_its_place_until_its_thread_ends(
    store: Store,
) -> None:
    blocked = Blocked()
    function = FunctionAgent(AgentInfo("a", "a"), blocked)
    function.limiter = trio.CapacityLimiter(1)
    async with engine_of(store, {"a": function}) as engine:
        first = (await engine.submit(order("first"))).task
        await blocked.wait_entered()
        second = (await engine.submit(order("second"))).task
        with trio.fail_after(5):
            await engine.cancel(first)
        await trio.testing.wait_all_tasks_blocked()
        assert (blocked.inside, function.limiter.borrowed_tokens) == (1, 1)
        blocked.let_go()
        await blocked.wait_entered()
        blocked.let_go()
        with trio.fail_after(5):
            assert (await engine.wait(second)).status == "completed"
    assert blocked.most == 1


async def test_a_run_that_waits_for_a_thread_can_be_cancelled(store: Store) -> None:
    function = FunctionAgent(AgentInfo("a", "a"), greet_plainly)
    function.limiter = trio.CapacityLimiter(1)
    async with engine_of(store, {"a": function}) as engine:
        async with function.limiter:
            row = (await engine.submit(order())).task
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(5):
                assert (await engine.cancel(row)).status == "cancelled"
        assert function.limiter.borrowed_tokens == 0


# --- code written for asyncio -----------------------------------------------------------------------------------------


async def sleeps(ctx: Context) -> None:
    await asyncio.sleep(1)


async def lets_others_run(ctx: Context) -> None:
    await asyncio.sleep(0)


async def waits_for_an_event(ctx: Context) -> None:
    await asyncio.Event().wait()


async def sets_a_timeout(ctx: Context) -> None:
    async with asyncio.timeout(1):
        await greet(ctx)


async def opens_a_connection(ctx: Context) -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def opens_a_group(ctx: Context) -> None:
    async with asyncio.TaskGroup():
        pass


async def asks_a_client_that_wants_its_own_loop(ctx: Context) -> None:
    asyncio.get_running_loop()  # so do aiohttp and others where they are made


async def creates_a_task(ctx: Context) -> None:
    coroutine = greet(ctx)
    try:
        asyncio.create_task(coroutine)  # noqa: RUF006
    finally:
        coroutine.close()


async def sleeps_in_a_nursery(ctx: Context) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeps, ctx)


def looks_for_a_loop_in_its_thread(ctx: SyncContext) -> None:
    asyncio.get_event_loop()


@pytest.mark.parametrize(
    "function",
    [
        sleeps,
        lets_others_run,
        waits_for_an_event,
        sets_a_timeout,
        opens_a_connection,
        opens_a_group,
        asks_a_client_that_wants_its_own_loop,
        creates_a_task,
        sleeps_in_a_nursery,
        looks_for_a_loop_in_its_thread,
    ],
)
async def test_code_written_for_asyncio_is_told_what_to_do_instead(store: Store, function: Any) -> None:
    row = await ended(store, function)
    assert code(row) == "asyncio_in_agent"
    assert row.error is not None
    for advice in ("trio.sleep", "plain def", "asyncio.run"):
        assert advice in row.error.message


async def only_mentions_it(ctx: Context) -> None:
    raise RuntimeError("The asyncio job has no running event loop any more")


async def has_the_wrong_type(ctx: Context) -> None:
    raise TypeError("trio got unexpected asyncio.Future")


async def lacks_an_attribute(ctx: Context) -> None:
    asyncio.no_such_thing  # type: ignore[attr-defined]  # noqa: B018


async def fails_in_a_nursery_beside_it(ctx: Context) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeps, ctx)
        nursery.start_soon(only_mentions_it, ctx)


@pytest.mark.parametrize(
    "function", [only_mentions_it, has_the_wrong_type, lacks_an_attribute, fails_in_a_nursery_beside_it]
)
async def test_an_error_of_the_agents_own_is_not_taken_for_asyncio(store: Store, function: Any) -> None:
    assert code(await ended(store, function)) == "agent_error"


async def test_a_plain_function_may_run_a_loop_of_asyncio(store: Store) -> None:
    def plain(ctx: SyncContext) -> None:
        async def main() -> str:
            await asyncio.sleep(0)
            return "from asyncio"

        ctx.emit_text(asyncio.run(main()))

    row = await ended(store, plain)
    assert row.output is not None
    assert row.output.content == "from asyncio"


async def test_what_fails_in_that_loop_is_the_agents_own_error(store: Store) -> None:
    def plain(ctx: SyncContext) -> None:
        async def main() -> None:
            asyncio.get_running_loop().run_forever()  # "This event loop is already running"

        asyncio.run(main())

    assert code(await ended(store, plain)) == "agent_error"
