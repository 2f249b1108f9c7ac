"""An engine for tests: over a chosen store, with agents that tests steer by events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import trio

from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Settings
from hector_trio.engine import Engine, Order, open_engine
from hector_trio.errors import StoreUnavailable
from hector_trio.log import now_ms
from hector_trio.models import Chunk, Content, TaskContext, TaskRequest
from hector_trio.session import SessionRow
from hector_trio.stores import Accepted, Store
from hector_trio.stores.memory import open_memory
from hector_trio.stores.sql import open_sql
from hector_trio.task import TaskRow, decode_chunk
from tests import HANG


def agent(function: Callable[[Any], Awaitable[None] | None], agent_id: str = "a") -> dict[str, Agent]:
    return {agent_id: FunctionAgent(AgentInfo(agent_id, agent_id), function)}


class Steered:
    """An agent whose steps a test decides: it says when it has started, emits what it is given, ends when told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.running = 0
        self.most = 0
        self._gates: dict[str, trio.Event] = {}
        self._moved = trio.lowlevel.ParkingLot()

    def gate(self, text: str) -> trio.Event:
        return self._gates.setdefault(text, trio.Event())

    def let(self, text: str) -> None:
        self.gate(text).set()

    async def wait_started(self, text: str) -> None:
        with trio.fail_after(HANG):
            while text not in self.started:
                await self._moved.park()

    async def wait_ended(self, text: str) -> None:
        with trio.fail_after(HANG):
            while text not in self.ended:
                await self._moved.park()

    async def __call__(self, ctx: Context) -> None:
        self.started.append(ctx.text)
        self.running += 1
        self.most = max(self.most, self.running)
        self._moved.unpark_all()
        try:
            await ctx.emit_text(f"<{ctx.text}")
            await self.gate(ctx.text).wait()
            await ctx.emit_text(">")
        finally:
            self.running -= 1
            self.ended.append(ctx.text)
            self._moved.unpark_all()


@asynccontextmanager
async def store_of(kind: str, path: Path, instance: str = "test") -> AsyncIterator[Store]:
    if kind == "memory":
        async with open_memory(instance) as memory:
            yield memory
    else:
        async with open_sql(str(path / "hector.db"), durability="process", instance=instance) as sql:
            yield sql


@asynccontextmanager
async def engine_of(
    store: Store, agents: dict[str, Agent], settings: Settings | None = None, instance: str = "test"
) -> AsyncIterator[Engine]:
    async with open_engine(store, agents, settings or Settings(), instance=instance) as engine:
        yield engine


def order(
    text: str = "hi",
    *,
    session: str | None = None,
    policy: Literal["cancel", "continue"] = "continue",
    owner: str = "o",
    agent_id: str = "a",
    **request: Any,
) -> Order:
    context = TaskContext(session_id=session) if session is not None else None
    return Order(owner, agent_id, TaskRequest(Content("text/plain", text), context=context, **request), policy)


async def new_session(store: Store, session_id: str = "s", *, owner: str = "o", agent_id: str = "a") -> str:
    now = now_ms()
    await store.create_session(SessionRow(owner, session_id, agent_id, now, now, {}, {}), limit=1000)
    return session_id


async def run(engine: Engine, order: Order) -> TaskRow:
    with trio.fail_after(HANG):
        return await engine.wait((await engine.submit(order)).task)


async def wait_ended(engine: Engine, row: TaskRow) -> TaskRow:
    """The row once its end is stored, however often the store refuses it."""
    with trio.fail_after(HANG):
        while True:
            try:
                return await engine.wait(row)
            except StoreUnavailable:
                await trio.lowlevel.checkpoint()


async def read_all(engine: Engine, row: TaskRow, after: int = 0) -> list[Chunk]:
    chunks: list[Chunk] = []
    with trio.fail_after(HANG), engine.follow(row, after) as follower:
        while lines := await follower.read():
            chunks += [decode_chunk(line) for line in lines]
    return chunks


def texts(chunks: list[Chunk]) -> list[Any]:
    return [chunk.content for chunk in chunks if chunk.chunk_type == "text"]


__all__ = ["Accepted", "Steered", "agent", "engine_of", "new_session", "order", "read_all", "run", "store_of", "texts"]
