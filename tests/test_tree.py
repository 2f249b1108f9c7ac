"""The live tree: who is in it, below whom, how far each is and what it waits for."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from types import CodeType, FrameType
from typing import Any

import httpx2
import pytest
import trio
import trio.testing

from hector_trio.agents import Context
from hector_trio.config import Settings
from hector_trio.tree import MAX_NODES, MAX_TEXT, awaited, described, waiting
from tests import HANG
from tests.engines import Steered, agent
from tests.fake_model import serve_fake_model, silent, stalls
from tests.serving import serving, settings_of
from tests.sockets import connect_raw, connected

Node = dict[str, Any]


def watched(**sections: Any) -> Settings:
    return settings_of(server={"debug_tree": True}, **sections)


async def look(client: httpx2.AsyncClient, **query: Any) -> Node:
    answer = await client.get("/debug/tree", params=query)
    assert answer.status_code == 200, answer.text
    found: Node = answer.json()
    return found


def walk(node: Node, *above: Node) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Every node, with those above it."""
    yield node, above
    for child in node.get("children", ()):
        yield from walk(child, *above, node)


def find(tree: Node, kind: str, name: str = "") -> tuple[Node, list[str]]:
    """The one node of this kind and name, and the kinds from the server down to it."""
    ((node, above),) = [
        (node, above)
        for node, above in walk(tree["root"])
        if node["kind"] == kind and (not name or node.get("name") == name)
    ]
    kinds = [each["kind"] for each in (*above, node)]
    return node, kinds[kinds.index("server") :]


async def test_a_model_call_stands_below_its_run_its_stream_and_its_connection() -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.default = stalls("Half ")
        model = {"type": "openai", "model": "gpt", "base_url": fake.base_url, "api_key": "sk-0123456789abcdef"}
        async with (
            serving(watched(llms={"model": model}, agents={"assistant": {"type": "llm", "llm": "model"}})) as server,
            server.client() as client,
            connected(server) as peer,
        ):
            await peer.ask("a very private prompt", taskId="t", timeoutMs=50_000)
            await peer.read()
            tree = await look(client)
            call, kinds = find(tree, "model call")
            assert kinds == ["server", "connection", "websocket", "run", "model call"]
            assert call["name"] == f"openai gpt at {fake.base_url}"
            assert call["waitsFor"] == "SocketStream.receive_some in TrioStream.read"
            assert 0 <= call["ageMs"] < 10_000
            run, _ = find(tree, "run", "assistant/t")
            assert run["waitsFor"] == "model call"
            assert 0 < run["deadlineMs"] <= 50_000
            assert 0 < call["deadlineMs"] <= 50_000
            assert "state" not in run  # it runs, like most
            assert (tree["running"], tree["queued"], tree["waitingForInput"]) == (1, 0, 0)
            socket, _ = find(tree, "websocket")
            assert socket["name"] == "/agents/assistant/stream"
            assert {each["kind"] for each in socket["children"]} == {"run"}  # it is the reader itself; all is sent
            text = json.dumps(tree)
            assert "private" not in text
            assert "sk-0123456789abcdef" not in text
        nursery.cancel_scope.cancel()


async def test_a_run_before_its_first_token_waits_for_its_model_too() -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.default = silent()
        model = {"type": "openai", "model": "gpt", "base_url": fake.base_url}
        async with (
            serving(watched(llms={"model": model}, agents={"assistant": {"type": "llm", "llm": "model"}})) as server,
            server.client() as client,
            connected(server) as peer,
        ):
            await peer.ask("x", taskId="t")
            await fake.wait_requests(1)
            call, kinds = find(await look(client), "model call")
            assert kinds[-2:] == ["run", "model call"]
            assert call["waitsFor"].startswith("SocketStream.receive_some")
        nursery.cancel_scope.cancel()


async def test_every_stream_has_its_own_connection_and_a_task_that_waits_for_its_turn_is_queued() -> None:
    steered = Steered()
    async with (
        serving(watched(), agent(steered)) as server,
        server.client() as client,
        connected(server, "a") as first,
        connected(server, "a") as second,
        connected(server, "a"),
    ):
        await client.post("/sessions", json={"agentId": "a", "sessionId": "s"})
        await first.ask("one", taskId="one", context={"sessionId": "s"})
        await steered.wait_started("one")
        await second.ask("two", taskId="two", context={"sessionId": "s"})
        await second.send({"type": "ping"})
        await second.read()  # the task before it is accepted
        tree = await look(client)
        connections = [node for node, _ in walk(tree["root"]) if node["kind"] == "connection"]
        assert len(connections) == 4
        assert len({each["name"] for each in connections}) == 4
        assert all(each["name"].startswith("127.0.0.1:") for each in connections)
        queued, kinds = find(tree, "run", "a/two")
        assert kinds == ["server", "connection", "websocket", "run"]
        assert (queued["state"], queued["waitsFor"]) == ("queued", "Event.wait in Turn.wait")
        running, _ = find(tree, "run", "a/one")
        assert "state" not in running
        assert running["waitsFor"] == "Event.wait in Steered.__call__"
        assert (tree["running"], tree["queued"]) == (1, 1)
        steered.let("one")
        steered.let("two")
        await second.read_to_final()
        assert not [node for node, _ in walk((await look(client))["root"]) if node["kind"] == "run"]


async def test_a_cancelled_run_that_cleans_up_is_finishing_behind_its_shield() -> None:
    started, cleaning, clean = trio.Event(), trio.Event(), trio.Event()

    async def tidy(ctx: Context) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):
                cleaning.set()
                await clean.wait()

    async with serving(watched(), agent(tidy)) as server, server.client() as client:
        async with connected(server, "a") as peer:
            await peer.ask("x", taskId="t")
            await started.wait()
            run, _ = find(await look(client), "run")
            assert "cancel" not in run
            await peer.send({"type": "cancel", "taskId": "t"})
            await cleaning.wait()
            run, _ = find(await look(client), "run")
            assert (run["state"], run["cancel"]) == ("finishing", "shielded")
            assert 50_000 < run["deadlineMs"] <= 60_000
            assert run["waitsFor"].startswith("Event.wait in test_a_cancelled_run")
            clean.set()


async def test_a_cancel_that_cannot_be_noticed_yet_is_pending() -> None:
    release = threading.Event()
    started = trio.Event()

    async def stubborn(ctx: Context) -> None:
        started.set()
        await trio.to_thread.run_sync(release.wait)

    async with serving(watched(), agent(stubborn)) as server, server.client() as client, connected(server, "a") as peer:
        try:
            await peer.ask("x", taskId="t")
            await started.wait()
            await peer.send({"type": "cancel", "taskId": "t"})
            await peer.send({"type": "ping"})
            await peer.websocket.get_message()
            run, _ = find(await look(client), "run")
            assert (run["state"], run["cancel"]) == ("finishing", "pending")
            assert "deadlineMs" not in run
            assert run["waitsFor"].startswith("to_thread_run_sync in")
        finally:
            release.set()


async def test_a_run_that_outlives_its_connection_stands_with_the_engine() -> None:
    steered = Steered()
    async with serving(watched(), agent(steered)) as server, server.client() as client:
        async with connected(server, "a") as peer:
            await peer.ask("x", taskId="t", onDisconnect="continue")
            await steered.wait_started("x")
            _, kinds = find(await look(client), "run")
            assert kinds == ["server", "engine", "run"]
        with trio.fail_after(5):
            while server.services.metrics.open_streams("websocket"):
                await trio.lowlevel.checkpoint()
        tree = await look(client)
        _, kinds = find(tree, "run")
        assert kinds == ["server", "engine", "run"]
        assert not [node for node, _ in walk(tree["root"]) if node["kind"] == "websocket"]


async def test_a_detached_run_is_shielded_and_runs_on() -> None:
    steered = Steered()
    async with serving(watched(), agent(steered)) as server, server.client() as client:
        async with connected(server, "a") as peer:
            await peer.ask("x", taskId="t")
            await steered.wait_started("x")
            await peer.send({"type": "detach", "taskId": "t"})
            while (await peer.read()).get("type") != "ok":
                pass
        with trio.fail_after(5):
            while "cancel" not in (run := find(await look(client), "run")[0]):
                await trio.lowlevel.checkpoint()
        assert run["cancel"] == "shielded"
        assert "state" not in run
        steered.let("x")


async def test_a_task_that_waits_for_input_is_counted_and_has_no_node() -> None:
    async def curious(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("Which one?")

    async with serving(watched(), agent(curious)) as server, server.client() as client:
        task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
        assert task["status"] == "input_required"
        tree = await look(client)
        assert tree["waitingForInput"] == 1
        assert not [node for node, _ in walk(tree["root"]) if node["kind"] == "run"]


async def test_a_stream_of_events_is_told_from_a_request() -> None:
    steered = Steered()
    async with serving(watched(), agent(steered)) as server, server.client() as client:
        await client.post(
            "/agents/a/tasks", json={"input": {"content": "x"}, "taskId": "t"}, headers={"Prefer": "respond-async"}
        )
        await steered.wait_started("x")
        async with await trio.open_tcp_stream(*server.address) as stream:
            head = "GET /agents/a/tasks/t/events?after=0&secret=1 HTTP/1.1\r\nHost: localhost\r\n"
            await stream.send_all(f"{head}Accept: text/event-stream\r\n\r\n".encode())
            assert b"text/event-stream" in await stream.receive_some()
            tree = await look(client)
        node, kinds = find(tree, "sse")
        assert kinds == ["server", "connection", "sse"]
        assert node["name"] == "GET /agents/a/tasks/t/events"
        itself, _ = find(tree, "request")
        assert itself["name"] == "GET /debug/tree"
        assert "secret" not in json.dumps(tree)


async def test_tasks_that_nobody_knows_are_shown_by_their_names() -> None:
    started = trio.Event()

    async def busy(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever, name="look it up")
            nursery.start_soon(trio.sleep_forever, name="x" * 1000)
            started.set()

    async with serving(watched(), agent(busy)) as server, server.client() as client, connected(server, "a") as peer:
        await peer.ask("x")
        await started.wait()
        tree = await look(client)
        node, kinds = find(tree, "task", "look it up")
        assert kinds[-2:] == ["run", "task"]
        assert node["waitsFor"] == "sleep_forever"
        assert find(tree, "task", "x" * MAX_TEXT)
        assert find(tree, "run")[0]["waitsFor"].startswith("children in test_tasks_that_nobody_knows")


async def test_no_task_is_hidden() -> None:
    steered = Steered()
    async with serving(watched(), agent(steered)) as server, server.client() as client, connected(server, "a") as peer:
        await peer.ask("x")
        await steered.wait_started("x")
        await peer.read()
        tree = await look(client)
        assert sum(node.get("tasks", 1) for node, _ in walk(tree["root"])) == tree["tasks"]


async def test_what_is_beyond_the_limit_is_counted() -> None:
    async with serving(watched()) as server, server.client() as client, connected(server), connected(server):
        tree = await look(client, limit=1)
        top, _ = find(tree, "server")
        assert top["omitted"]["connection"] == 2
        _, kinds = find(tree, "connection")  # the oldest
        assert kinds == ["server", "connection"]
        assert find(tree, "websocket")
        for wrong in ("0", "x", "-1", str(MAX_NODES + 1), "²"):
            answer = await client.get("/debug/tree", params={"limit": wrong})
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


class Steps(trio.abc.Instrument):
    """How long each step of the loop holds it: CPU time of this thread, so that a busy machine does not count."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._began = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.thread_time() - self._began)


async def test_two_thousand_streams_are_answered_in_bounded_steps_and_bytes() -> None:
    async def idle(ctx: Context) -> None:
        await trio.sleep_forever()

    async with serving(watched(limits={"running": 1000}), agent(idle)) as server, server.client() as client:
        peers = [await connect_raw(server.url, "a") for _ in range(200)]
        try:
            for peer in peers:
                for _ in range(10):
                    await peer.ask("x")
            with trio.fail_after(2 * HANG):
                while server.engine.running + server.engine.queued < 2000:
                    await trio.lowlevel.checkpoint()
            for limit in (100, MAX_NODES):
                steps = Steps()
                trio.lowlevel.add_instrument(steps)
                answer = await client.get("/debug/tree", params={"limit": limit})
                trio.lowlevel.remove_instrument(steps)
                assert steps.longest < 0.1
                assert len(answer.content) < 1 << 20
                tree = answer.json()
                assert tree["tasks"] > 2400  # a run each; a connection and a reader for ten
                nodes = list(walk(tree["root"]))
                assert len(nodes) <= MAX_NODES + 100
                shown = [node for node, _ in nodes if node["kind"] == "run"]
                if limit == 100:
                    assert find(tree, "server")[0]["omitted"]["connection"] == 101
                else:
                    assert len(shown) == 2000
                    assert {each.get("state", "running") for each in shown} == {"running", "queued"}
        finally:
            for peer in peers:
                await trio.aclose_forcefully(peer.stream)


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("connection 127.0.0.1:4000", ("connection", "127.0.0.1:4000")),
        ("run a/t", ("run", "a/t")),
        ("reader", ("reader", "")),
        ("hector_trio.server.serve", ("task", "hector_trio.server.serve")),
        ("loop watchdog", ("task", "loop watchdog")),
        ("", ("task", "")),
    ],
)
def test_the_first_word_of_a_name_is_the_kind_if_it_is_one(name: str, expected: tuple[str, str]) -> None:
    assert described(name) == expected


class Wrapped:
    """What is awaited through ``__await__``, as Hypercorn's servers are."""

    def __await__(self) -> Generator[Any, None, None]:
        return parked().__await__()


async def parked() -> None:
    await trio.sleep_forever()


async def numbers() -> AsyncGenerator[int]:
    await Wrapped()
    yield 1


async def consume() -> None:
    async for _ in numbers():
        pass


def names(codes: list[CodeType]) -> list[str]:
    return [code.co_name for code in codes]


async def test_what_is_waited_for_is_found_through_generators_and_wrappers() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        (task,) = nursery.child_tasks
        assert waiting(awaited(task.coro)) == ""  # not begun
        await trio.testing.wait_all_tasks_blocked()
        codes = awaited(task.coro)
        assert names(codes)[:4] == ["consume", "numbers", "parked", "sleep_forever"]
        assert waiting(codes) == "sleep_forever in parked"
        nursery.cancel_scope.cancel()
    assert waiting(awaited(task.coro)) == ""  # ended


async def test_looking_keeps_no_frame_alive() -> None:
    """A frame that was asked for once would stay, with whatever its variables held."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await trio.testing.wait_all_tasks_blocked()
        (task,) = nursery.child_tasks

        def frames() -> int:
            return sum(isinstance(each, FrameType) for each in gc.get_objects())

        before = frames()
        awaited(task.coro)
        assert frames() <= before
        nursery.cancel_scope.cancel()
