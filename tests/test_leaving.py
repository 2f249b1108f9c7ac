"""Leaving, with a real model's server behind the agent: the cut reaches it, at once, from wherever the run is."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hector_trio import connection
from hector_trio.agents import Context
from hector_trio.config import Limits, LlmAgent, OpenAiLlm, Settings
from tests import HANG
from tests.clock import skip
from tests.engines import agent
from tests.fake_model import FakeModel, says, serve_fake_model, silent, stalls
from tests.serving import Served, serving, settings_of
from tests.sockets import connected, raw

pytestmark = pytest.mark.usefixtures("either_way")


def with_model(fake: FakeModel, limits: Limits | None = None) -> Settings:
    return settings_of(
        llms={"model": OpenAiLlm(model="any", base_url=fake.base_url, api_key="k" * 20)},
        agents={"a": LlmAgent(llm="model")},
        limits=limits or Limits(),
    )


@asynccontextmanager
async def model_and_server(limits: Limits | None = None) -> AsyncIterator[tuple[FakeModel, Served]]:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        async with serving(with_model(fake, limits)) as server:
            yield fake, server
        nursery.cancel_scope.cancel()


async def quiet(server: Served) -> None:
    """Returns when nothing runs."""
    with trio.fail_after(HANG):
        while server.engine.running or server.engine.queued:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
@pytest.mark.parametrize("when", ["before the first token", "between tokens"])
async def test_leaving_closes_the_models_connection(how: str, when: str) -> None:
    async with model_and_server() as (fake, server):
        fake.plan(silent() if when == "before the first token" else stalls("tok"))
        async with raw(server, "a") as peer:
            await peer.ask("x")
            (request,) = await fake.wait_requests(1)
            if when == "between tokens":
                await peer.wait_for(b'"tok"')
            await peer.leave(how)
            await wait_all_tasks_blocked()
            assert request.closed.is_set()  # no timer had to pass
        await quiet(server)


async def test_a_cancel_through_rest_closes_the_models_connection_and_says_so_when_it_has() -> None:
    async with model_and_server() as (fake, server), server.client() as client:
        fake.plan(silent())
        async with connected(server, "a") as peer:
            await peer.ask("x", taskId="t")
            (request,) = await fake.wait_requests(1)
            answer = (await client.post("/agents/a/tasks/t/cancel")).json()
            assert answer["status"] == "cancelled"
            await wait_all_tasks_blocked()
            assert request.closed.is_set()
            assert (await peer.read_to_final())[-1]["status"] == "cancelled"


async def test_a_task_that_continues_keeps_its_model_and_its_answer_is_in_the_history() -> None:
    async with model_and_server() as (fake, server), server.client() as client:
        gate = trio.Semaphore(1)
        fake.plan(says("half ", "whole", gate=gate))
        session = (await client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
        async with raw(server, "a") as peer:
            await peer.ask("x", onDisconnect="continue", context={"sessionId": session})
            await peer.wait_for(b'"half "')
            await peer.leave("rst")
        gate.release()
        gate.release()
        await quiet(server)
        messages = (await client.get(f"/sessions/{session}/messages")).json()["messages"]
        assert [message["content"] for message in messages] == ["x", "half whole"]


async def test_a_client_that_vanishes_without_a_packet_is_found(clock: MockClock) -> None:
    """It answers no ping and reads nothing; its kernel would, so only the silence of its program tells."""
    async with model_and_server(Limits(ping_interval=30)) as (fake, server):
        fake.plan(silent())
        async with raw(server, "a") as peer:
            await peer.ask("x")
            (request,) = await fake.wait_requests(1)
            for _ in range(2):
                await skip(clock, 30)
                assert not request.closed.is_set()
            await skip(clock, 30)
            assert request.closed.is_set()


async def test_a_thousand_cut_streams_leave_no_task_and_no_socket_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async with model_and_server() as (fake, server):

        async def cut(n: int) -> None:
            async with raw(server, "a") as peer:
                await peer.ask("x")
                await peer.wait_for(b'"tok"')
                await peer.leave(("close", "fin", "rst")[n % 3])

        async def many(count: int) -> None:
            for start in range(0, count, 50):
                fake.plan(*(stalls("tok") for _ in range(50)))
                async with trio.open_nursery() as nursery:
                    for n in range(start, start + 50):
                        nursery.start_soon(cut, n)
            await quiet(server)
            await fake.wait_connections(0)
            while connection.statistics().websockets:
                await trio.lowlevel.checkpoint()

        with trio.fail_after(10 * HANG):
            await many(50)
            before = tasks(), descriptors()
            await many(1000)
            for _ in range(50):
                await trio.lowlevel.checkpoint()
        assert (tasks(), descriptors()) <= before


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cancel", "continue", {"graceMs": 60_000}])
async def test_the_time_of_a_task_bounds_its_model_call(policy: str | dict[str, int], clock: MockClock) -> None:
    async with model_and_server() as (fake, server), connected(server, "a") as peer:
        fake.plan(stalls("tok"))
        await peer.ask("x", timeoutMs=30_000, onDisconnect=policy)
        (request,) = await fake.wait_requests(1)
        await skip(clock, 15)
        assert not request.closed.is_set()
        await skip(clock, 15)
        assert request.closed.is_set()
        final = (await peer.read_to_final())[-1]
        assert (final["status"], final["code"]) == ("failed", "timeout")


async def test_time_spent_in_the_queue_counts_and_what_is_left_is_visible(clock: MockClock) -> None:
    left: list[float] = []

    async def look(ctx: Context) -> None:
        left.append(ctx.deadline - trio.current_time())
        if ctx.text == "first":
            await skip(clock, 20)

    async with serving(agents=agent(look)) as server, server.client() as client:
        session = (await client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
        async with connected(server, "a") as peer:
            for text in ("first", "second"):
                await peer.ask(text, taskId=text, timeoutMs=60_000, context={"sessionId": session})
            await peer.read_to_final()
            await peer.read_to_final()
    assert 40 < left[0] <= 60
    assert 20 < left[1] <= 40


async def test_each_run_of_a_task_has_its_own_time_and_waiting_for_input_costs_none(clock: MockClock) -> None:
    async def ask(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("?")
        assert 0 < ctx.deadline - trio.current_time() <= 30
        await ctx.emit_text("in time")

    async with serving(agents=agent(ask)) as server, server.client() as client:
        body = {"input": {"content": "x"}, "taskId": "t", "timeoutMs": 30_000}
        assert (await client.post("/agents/a/tasks", json=body)).json()["status"] == "input_required"
        await skip(clock, 40)  # longer than a run may take
        task = (await client.post("/agents/a/tasks/t/input", json={"input": {"content": "x"}})).json()
        assert task["output"]["content"] == "in time"
