"""What becomes of a task whose client leaves: every policy, at every moment, in every way there is to leave."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import trio
from trio.testing import MockClock

from hector_trio import connection
from hector_trio.agents import Context
from hector_trio.task import decode_chunk
from tests import HANG
from tests.clock import skip
from tests.crashes import frames_in
from tests.engines import agent
from tests.serving import Served, serving, settings_of
from tests.sockets import RawPeer, connect_raw, connected, raw
from tests.test_cli import served

Moment = Literal["before the first token", "between tokens", "in the queue", "waiting for input", "just ended"]
MOMENTS: tuple[Moment, ...] = (
    "before the first token", "between tokens", "in the queue", "waiting for input", "just ended",
)  # fmt: skip
GOING_ON = dict(zip(MOMENTS, ("running", "running", "pending", "input_required"), strict=False))
GRACE = 30.0
PING_INTERVAL = 60.0
POLICIES: dict[str, Any] = {"cancel": "cancel", "continue": "continue", "grace": {"graceMs": int(GRACE * 1000)}}


class Stage:
    """An agent that stops at the moment that it is asked for, until ``go`` is set."""

    def __init__(self) -> None:
        self.begun: set[str] = set()
        self.running: set[str] = set()
        self.go = trio.Event()

    async def __call__(self, ctx: Context) -> None:
        self.begun.add(ctx.task_id)
        self.running.add(ctx.task_id)
        try:
            if ctx.text == "waiting for input" and ctx.resume is None:
                await ctx.emit_text("tok")
                await ctx.ask("go on?")
            if ctx.text == "between tokens":
                await ctx.emit_text("tok")
            if ctx.text not in ("just ended", "waiting for input"):
                await self.go.wait()
            await ctx.emit_text("end")
        finally:
            self.running.discard(ctx.task_id)


class Theatre:
    """A server with such an agent, somebody else who is also there, and the one who is about to leave."""

    def __init__(self, server: Served, stage: Stage, client: httpx2.AsyncClient, bystander: RawPeer) -> None:
        self.server = server
        self.stage = stage
        self.client = client
        self._bystander = bystander

    async def task(self, task_id: str = "t") -> dict[str, Any]:
        return dict((await self.client.get(f"/agents/a/tasks/{task_id}")).json())

    async def ended(self) -> dict[str, Any]:
        """The task ``t`` when it has ended."""
        with trio.fail_after(HANG):
            while "endedAt" not in (task := await self.task()):
                pass
        return task

    async def final(self) -> dict[str, Any]:
        """The one final chunk of ``t``."""
        chunks = (await self.client.get("/agents/a/tasks/t/events?pageSize=100")).json()["chunks"]
        assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
        assert [chunk["final"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        return dict(chunks[-1])

    def follow(self, nursery: trio.Nursery, after: int) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
        """Follows ``t`` as server-sent events from now on; what is returned waits for its end."""
        send, receive = trio.open_memory_channel[list[dict[str, Any]]](1)

        async def read() -> None:
            path = f"/agents/a/tasks/t/events?after={after}"
            answer = await self.client.get(path, headers={"Accept": "text/event-stream"}, timeout=None)
            lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
            await send.send([json.loads(line) for line in lines])

        nursery.start_soon(read)
        return receive.receive

    async def seen_off(self, staying: int = 0) -> None:
        """Returns when the server has noticed that the one has left, and so many beside the bystander have not."""
        with trio.fail_after(HANG):
            while connection.statistics().websockets > 1 + staying:
                await trio.lowlevel.checkpoint()

    async def start(self, moment: Moment, policy: Any) -> RawPeer:
        """A client whose task ``t`` has come to the moment."""
        peer = await connect_raw(self.server.url, "a")
        request = {"taskId": "t", "onDisconnect": policy}
        if moment == "in the queue":
            session = (await self.client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
            first = {"taskId": "first", "input": {"content": "hold"}, "context": {"sessionId": session}}
            await self.client.post("/agents/a/tasks", json=first, headers={"Prefer": "respond-async"})
            request["context"] = {"sessionId": session}
        await peer.ask(moment, **request)
        if moment in ("between tokens", "waiting for input"):
            await peer.wait_for(b'"tok"' if moment == "between tokens" else b'"prompt"')
        elif moment == "just ended":
            await peer.wait_for(b'"final":true')
        else:
            with trio.fail_after(HANG):
                while (await self.task()).get("status") is None:
                    pass
            while moment != "in the queue" and "t" not in self.stage.running:
                await trio.lowlevel.checkpoint()
        return peer

    async def curtain(self, *, waiting: int = 0) -> None:
        """The other client has lost nothing, and nothing is left of the one who left."""
        await self.seen_off()
        assert (await self.task("other"))["status"] == "running"
        self.stage.go.set()
        await self._bystander.wait_for(b'"final":true')
        chunks = [decode_chunk(each) for each in frames_in(bytes(self._bystander.received)) if b'"seq"' in each]
        assert [chunk.content for chunk in chunks] == ["tok", "end", ""]
        engine = self.server.engine
        with trio.fail_after(HANG):
            while engine.running or engine.queued:
                await trio.lowlevel.checkpoint()
        assert engine.waiting_for_input == waiting
        assert not self.stage.running


@asynccontextmanager
async def theatre() -> AsyncIterator[Theatre]:
    stage = Stage()
    async with (
        serving(settings_of(limits={"ping_interval": PING_INTERVAL}), agent(stage)) as server,
        server.client() as client,
        raw(server, "a") as bystander,
        trio.open_nursery() as nursery,
    ):
        await bystander.ask("between tokens", taskId="other")
        await bystander.wait_for(b'"tok"')
        nursery.start_soon(bystander.read_on)
        yield Theatre(server, stage, client, bystander)
        nursery.cancel_scope.cancel()


async def leave(peer: RawPeer, how: str, clock: MockClock) -> None:
    if how != "silence":
        await peer.leave(how)
        return
    for _ in range(3):  # in the first of them it has spoken; the others it is silent, and the bystander answers pings
        await skip(clock, PING_INTERVAL)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("how", ["close", "fin", "rst", "silence"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("policy", list(POLICIES))
async def test_leaving_does_to_the_task_what_was_asked_for_and_to_others_nothing(
    policy: str, moment: Moment, how: str, clock: MockClock
) -> None:
    async with theatre() as here:
        peer = await here.start(moment, POLICIES[policy])
        async with peer.stream:
            await leave(peer, how, clock)
            await here.seen_off()
            if moment == "just ended":
                assert (await here.final())["status"] == "completed"
                await here.curtain()
                return
            if policy == "grace":
                await skip(clock, GRACE - 10)
            if policy != "cancel":  # for now it goes on
                assert (await here.task())["status"] == GOING_ON[moment]
            if policy == "continue":
                await here.curtain(waiting=moment == "waiting for input")
                if moment == "waiting for input":
                    await here.client.post("/agents/a/tasks/t/input", json={"input": {"content": "yes"}})
                assert (await here.ended())["status"] == "completed"
                return
            if policy == "grace":
                await skip(clock, 10)
                assert "endedAt" in await here.task()
            assert (await here.ended())["status"] == "cancelled"
            assert (await here.final())["reason"] == "client_left"
            assert ("t" in here.stage.begun) == (moment != "in the queue")
            await here.curtain()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("by", ["attach", "events"])
@pytest.mark.parametrize("moment", MOMENTS[:4])
async def test_whoever_comes_back_within_the_grace_finds_the_task_as_it_was_and_gets_the_rest(
    moment: Moment, by: str, clock: MockClock
) -> None:
    async with theatre() as here:
        peer = await here.start(moment, POLICIES["grace"])
        async with peer.stream:
            await peer.leave("rst")
            await here.seen_off()
        seen = {"between tokens": 1, "waiting for input": 2}.get(moment, 0)
        async with trio.open_nursery() as nursery, connected(here.server, "a") as again:
            if by == "attach":
                await again.send({"type": "attach", "taskId": "t", "after": seen})
                assert (await again.read())["type"] == "ok"
                rest: Callable[[], Awaitable[list[dict[str, Any]]]] = again.read_to_final
            else:
                rest = here.follow(nursery, seen)
            await skip(clock, 1.5 * GRACE)  # longer than it would have lived alone
            assert (await here.task())["status"] == GOING_ON[moment]
            here.stage.go.set()
            if moment == "waiting for input":
                await here.client.post(
                    "/agents/a/tasks/t/input", json={"input": {"content": "yes"}}, headers={"Prefer": "respond-async"}
                )
            chunks = await rest()
        assert [chunk["seq"] for chunk in chunks] == list(range(seen + 1, seen + 1 + len(chunks)))
        assert [chunk["content"] for chunk in chunks] == ["end", ""]
        assert (await here.final())["status"] == "completed"


@pytest.mark.usefixtures("either_way")
async def test_the_grace_begins_anew_with_every_leaving_and_only_with_that_of_the_last_viewer(
    clock: MockClock,
) -> None:
    async with theatre() as here:
        peer = await here.start("between tokens", POLICIES["grace"])
        other = await connect_raw(here.server.url, "a")
        async with peer.stream, other.stream:
            await other.send_text(json.dumps({"type": "attach", "taskId": "t"}))
            await other.wait_for(b'"tok"')
            await peer.leave("fin")
            await here.seen_off(1)
            await skip(clock, 1.5 * GRACE)
            assert (await here.task())["status"] == "running"
            await other.leave("close")
            await here.seen_off()
            await skip(clock, GRACE - 10)
            assert (await here.task())["status"] == "running"
            await skip(clock, 10)
            assert (await here.task())["status"] == "cancelled"
        assert (await here.final())["reason"] == "client_left"
        await here.curtain()


CONFIG = """
agents:
  a: {type: python, function: agent.py:asks}
"""
AGENT = """
async def asks(ctx):
    if ctx.resume is None:
        await ctx.ask("go on?")
    await ctx.emit_text("end")
"""


async def test_graces_start_anew_after_a_restart(tmp_path: Path) -> None:
    """Of two tasks that wait for input, one is looked at by its client again within its grace, one is not."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "agent.py").write_text(AGENT)
    grace = 2.0
    async with served(tmp_path, "--config", "config.yaml") as (process, url):
        peer = await connect_raw(url, "a")
        async with peer.stream:
            for task_id in ("watched", "left"):
                await peer.ask("x", taskId=task_id, onDisconnect={"graceMs": int(grace * 1000)})
                await peer.wait_for(f'{{"taskId":"{task_id}","seq":1'.encode())
            process.process.send_signal(signal.SIGKILL)
            await process.wait()
    async with served(tmp_path, "--config", "config.yaml") as (_, url), httpx2.AsyncClient(base_url=url) as client:
        started_at = trio.current_time()
        for task_id in ("watched", "left"):
            assert (await client.get(f"/agents/a/tasks/{task_id}")).json()["status"] == "input_required"
        peer = await connect_raw(url, "a")
        async with peer.stream:
            await peer.send_text(json.dumps({"type": "attach", "taskId": "watched", "after": 1}))
            await peer.wait_for(b'"ok"')
            with trio.fail_after(HANG):
                while (task := (await client.get("/agents/a/tasks/left")).json())["status"] == "input_required":
                    pass
            assert task["status"] == "cancelled"
            assert trio.current_time() - started_at > grace / 2  # it was not counted from before the restart
            assert (await client.get("/agents/a/tasks/watched")).json()["status"] == "input_required"
            await peer.send_text(
                json.dumps({"type": "input", "taskId": "watched", "input": {"type": "text/plain", "content": "yes"}})
            )
            await peer.wait_for(b'"status":"completed"')
