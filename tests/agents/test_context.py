"""What a run sees and does through its context, over the memory store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from msgspec import UNSET

from hector_trio.agents import Context
from hector_trio.config import Limits, Settings, Tasks
from hector_trio.engine import Engine, Order
from hector_trio.errors import HectorError
from hector_trio.log import now_ms
from hector_trio.models import Chunk, Content, TaskContext, TaskRequest
from hector_trio.stores import Store
from hector_trio.stores.memory import open_memory
from tests.engines import agent, engine_of, new_session, order, read_all, run


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with open_memory("test") as opened:
        yield opened


class Seen:
    """An agent that keeps the context of its last run."""

    def __init__(self) -> None:
        self.ctx: Context

    async def __call__(self, ctx: Context) -> None:
        self.ctx = ctx


async def asked(engine: Engine, content: Any, type: str = "text/plain", context: TaskContext | None = None) -> None:
    row = await run(engine, Order("o", "a", TaskRequest(Content(type, content), context=context), "continue"))
    assert row.status == "completed", row


@pytest.mark.parametrize(
    ("content", "text"),
    [("as it is", "as it is"), ("", ""), ({"a": [1, None]}, '{"a":[1,null]}'), ([1, 2], "[1,2]"), (None, "null")],
)
async def test_the_text_of_an_input_is_the_text_itself_or_its_json(store: Store, content: Any, text: str) -> None:
    seen = Seen()
    async with engine_of(store, agent(seen)) as engine:
        await asked(engine, content, "application/json")
    assert seen.ctx.text == text
    assert seen.ctx.input == Content("application/json", content)


async def test_a_request_that_says_no_more_than_its_input_has_plain_defaults(store: Store) -> None:
    seen = Seen()
    async with engine_of(store, agent(seen), Settings(tasks=Tasks(timeout=50))) as engine:
        before = trio.current_time()
        await asked(engine, "hi")
    ctx = seen.ctx
    assert (ctx.agent_id, ctx.session_id, ctx.user_id) == ("a", None, None)
    assert (ctx.parameters, ctx.history, ctx.state) == ({}, [], {})
    assert 50 <= ctx.deadline - before < 55


async def test_a_run_is_told_who_asks_and_with_what_parameters(store: Store) -> None:
    seen = Seen()
    async with engine_of(store, agent(seen)) as engine:
        session = await new_session(store)
        request = TaskRequest(
            Content(content="hi"),
            task_id="t",
            parameters={"temperature": 0},
            context=TaskContext(session, user_id="john"),
            timeout_ms=1500,
        )
        before = trio.current_time()
        await run(engine, Order("o", "a", request, "continue"))
    ctx = seen.ctx
    assert (ctx.task_id, ctx.session_id, ctx.user_id) == ("t", "s", "john")
    assert (ctx.parameters, ctx.request) == ({"temperature": 0}, request)
    assert 1.5 <= ctx.deadline - before < 5


async def test_everything_emitted_becomes_a_chunk_of_its_kind_in_order(store: Store) -> None:
    async def emit(ctx: Context) -> None:
        await ctx.emit_text("one")
        await ctx.emit_data([1, {"a": None}])
        await ctx.emit_metadata({"source": "x"})
        await ctx.emit_error("careful")
        await ctx.emit_error("odd", code="strange")
        await ctx.emit_text("")

    async with engine_of(store, agent(emit)) as engine:
        row = await run(engine, order())
        chunks: list[Chunk] = await read_all(engine, row)
    assert [(chunk.chunk_type, chunk.content, chunk.code) for chunk in chunks[:-1]] == [
        ("text", "one", UNSET),
        ("data", [1, {"a": None}], UNSET),
        ("metadata", {"source": "x"}, UNSET),
        ("error", "careful", "agent_warning"),
        ("error", "odd", "strange"),
    ]
    assert row.status == "completed"


async def test_what_is_emitted_is_kept_as_it_was_then(store: Store) -> None:
    async def emit(ctx: Context) -> None:
        value = {"n": 1}
        await ctx.emit_data(value)
        value["n"] = 2

    async with engine_of(store, agent(emit)) as engine:
        chunks = await read_all(engine, await run(engine, order()))
    assert chunks[0].content == {"n": 1}


async def caught(store: Store, function: Any, settings: Settings | None = None, **members: Any) -> HectorError:
    """What one call of the context raised inside the agent, which then went on."""
    raised: list[HectorError] = []

    async def call(ctx: Context) -> None:
        try:
            await function(ctx)
        except HectorError as error:
            raised.append(error)
        await ctx.emit_text("went on")

    async with engine_of(store, agent(call), settings) as engine:
        row = await run(engine, order(**members))
    assert row.output == Content("text/plain", "went on")
    (error,) = raised
    return error


async def test_a_chunk_that_is_refused_leaves_no_trace_and_the_run_may_go_on(store: Store) -> None:
    async def too_large(ctx: Context) -> None:
        await ctx.emit_data("x" * 2000)

    async def not_json(ctx: Context) -> None:
        await ctx.emit_metadata(object())

    async def not_text(ctx: Context) -> None:
        await ctx.emit_text(b"bytes")  # type: ignore[arg-type]

    small = Settings(limits=Limits(chunk_bytes=900))
    assert "900 are allowed" in (await caught(store, too_large, small)).detail
    assert "metadata chunk that cannot stand in JSON" in (await caught(store, not_json)).detail
    assert "not bytes" in (await caught(store, not_text)).detail
    for row in (await store.list_tasks("o")).items:
        assert row.last_seq == 2


# --- the session's state ----------------------------------------------------------------------------------------------


async def test_a_change_of_the_state_is_committed_when_it_returns(store: Store) -> None:
    stored: list[dict[str, Any]] = []

    async def change(ctx: Context) -> None:
        assert ctx.state == {"n": 1, "deep": {"a": 1}}
        await ctx.update_state({"n": None, "deep": {"b": 2}})
        assert ctx.state == {"deep": {"a": 1, "b": 2}}
        found = await store.get_session("o", "s", now=now_ms())
        assert found is not None
        stored.append(found.state)

    async with engine_of(store, agent(change)) as engine:
        await new_session(store)
        await store.update_session("o", "s", now=now_ms(), state={"n": 1, "deep": {"a": 1}})
        assert (await run(engine, order(session="s"))).status == "completed"
    assert stored == [{"deep": {"a": 1, "b": 2}}]


async def test_a_state_that_is_only_written_to_in_memory_is_not_the_sessions(store: Store) -> None:
    async def write(ctx: Context) -> None:
        ctx.state["n"] = 1

    async with engine_of(store, agent(write)) as engine:
        await new_session(store)
        assert (await run(engine, order(session="s"))).status == "completed"
    found = await store.get_session("o", "s", now=now_ms())
    assert found is not None
    assert found.state == {}


async def test_a_change_by_somebody_else_is_seen_with_the_runs_own_next_change(store: Store) -> None:
    async def change(ctx: Context) -> None:
        await store.update_session("o", "s", now=now_ms(), state={"theirs": 1})
        assert ctx.state == {}
        await ctx.update_state({"ours": 1})
        assert ctx.state == {"theirs": 1, "ours": 1}

    async with engine_of(store, agent(change)) as engine:
        await new_session(store)
        assert (await run(engine, order(session="s"))).status == "completed"


async def test_without_a_session_there_is_no_state_to_change(store: Store) -> None:
    async def change(ctx: Context) -> None:
        await ctx.update_state({"n": 1})

    error = await caught(store, change)
    assert (error.code, error.detail) == (
        "invalid_request",
        "The task belongs to no session, so there is no state to update",
    )


async def test_a_session_that_ended_meanwhile_is_told_as_that(store: Store) -> None:
    raised: list[HectorError] = []

    async def change(ctx: Context) -> None:
        await store.delete_session("o", "s")
        try:
            await ctx.update_state({"n": 1})
        except HectorError as error:
            raised.append(error)
            raise

    async with engine_of(store, agent(change)) as engine:
        await new_session(store)
        await run(engine, order(session="s"))
    (error,) = raised
    assert (error.code, error.detail) == ("session_not_found", "The session ended while its task was running")


async def test_a_state_that_is_no_object_is_refused(store: Store) -> None:
    async def change(ctx: Context) -> None:
        await ctx.update_state(["no", "object"])  # type: ignore[arg-type]

    await new_session(store)
    assert (await caught(store, change, session="s")).code == "invalid_request"
