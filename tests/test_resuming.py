"""Coming back: attach, detach and grace, windows and pauses, joined text, gaps and bytes, through real sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hector_trio import connection
from hector_trio.agents import Context
from hector_trio.config import Settings, Tasks
from hector_trio.engine import FIRST_VIEWER
from hector_trio.log import now_ms
from hector_trio.models import GraceMs
from hector_trio.task import TaskRow, decode_chunk, seq_of
from tests import HANG
from tests.engines import Steered, agent, engine_of, order, read_all, run, store_of
from tests.serving import Served, serving, settings_of
from tests.sockets import Peer, connected, raw


class Paced:
    """Emits one word for each that it is allowed."""

    def __init__(self) -> None:
        self.emitted = 0
        self._allowed = 0
        self._moved = trio.lowlevel.ParkingLot()

    def allow(self, words: int) -> None:
        self._allowed += words
        self._moved.unpark_all()

    async def __call__(self, ctx: Context) -> None:
        words = int(ctx.text)
        while self.emitted < words:
            while self.emitted >= self._allowed:
                await self._moved.park()
            self.emitted += 1
            await ctx.emit_text(f"{self.emitted} ")

    async def wait_emitted(self, words: int) -> None:
        with trio.fail_after(5):
            while self.emitted < words:
                await trio.lowlevel.checkpoint()


async def row_of(server: Served, task_id: str = "t") -> TaskRow:
    with trio.fail_after(5):
        while (row := await server.engine.find("local", "a", task_id)) is None:
            await trio.lowlevel.checkpoint()
    return row


async def committed(server: Served, seq: int, task_id: str = "t") -> None:
    with trio.fail_after(5):
        while server.engine.last_seq(await row_of(server, task_id)) < seq:
            await trio.lowlevel.checkpoint()


def words(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["content"] for frame in frames if frame.get("chunkType") == "text")


def is_exact(frames: list[dict[str, Any]], after: int = 0) -> bool:
    """Chunks, joined or not, that go on at ``after`` without hole or duplicate."""
    for frame in frames:
        if frame.get("firstSeq", frame["seq"]) != after + 1:
            return False
        after = frame["seq"]
    return True


async def nothing_more(peer: Peer) -> None:
    """Lets the server do what it has to do; it says nothing else."""
    for _ in range(3):
        await peer.send({"type": "ping"})
        assert await peer.read() == {"type": "pong"}


@asynccontextmanager
async def started(words: int, **request: Any) -> AsyncIterator[tuple[Served, Paced, Peer]]:
    """A socket that has started task ``t``, of so many words."""
    paced = Paced()
    async with serving(agents=agent(paced)) as server, connected(server, "a") as peer:
        await peer.ask(str(words), taskId="t", **request)
        yield server, paced, peer


# --- attach -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["running", "ended"])
async def test_attach_is_exact_at_every_position(when: str) -> None:
    async with started(6) as (server, paced, starter):
        paced.allow(6 if when == "ended" else 4)
        last = 7 if when == "ended" else 4
        await committed(server, last)
        for after in range(last + 1):
            async with connected(server, "a") as peer:
                await peer.send({"type": "attach", "taskId": "t", "after": after})
                status = "completed" if when == "ended" else "running"
                assert await peer.read() == {
                    "type": "ok",
                    "of": "attach",
                    "taskId": "t",
                    "status": status,
                    "lastSeq": last,
                }
                begin = min(after, 6)  # at the end: the final chunk once more
                for seq in range(begin + 1, last + 1):
                    assert (await peer.read())["seq"] == seq
        paced.allow(6)
        assert [frame["seq"] for frame in await starter.read_to_final()] == list(range(1, 8))


async def test_attach_gives_the_replay_before_what_is_live_and_any_transport_goes_on_from_any() -> None:
    async with started(9) as (server, paced, starter), server.client() as client:
        paced.allow(3)
        first = [await starter.read() for _ in range(3)]
        async with connected(server, "a") as peer:
            await peer.send({"type": "attach", "taskId": "t", "after": 1})
            assert (await peer.read())["of"] == "attach"
            paced.allow(3)
            assert [(await peer.read())["seq"] for _ in range(5)] == [2, 3, 4, 5, 6]
        async with client.stream(
            "GET", "/agents/a/tasks/t/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "6"}
        ) as events:
            paced.allow(3)
            body = (await events.aread()).decode()
        data = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
        assert [chunk["seq"] for chunk in data] == [7, 8, 9, 10]
        chunks = first + await starter.read_to_final()
        assert is_exact(chunks)
        assert chunks[6:] == data


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ({"taskId": "u"}, "task_not_found"),
        ({"taskId": ".."}, "task_not_found"),
        ({"taskId": "t", "after": 99}, "invalid_request"),
        ({"taskId": "t", "after": -1}, "invalid_request"),
        ({"taskId": "t", "after": "1"}, "invalid_request"),
        ({"taskId": "t", "window": 0}, "invalid_request"),
        ({"taskId": "t", "pause": True, "window": 1}, "invalid_request"),
        ({"taskId": 7}, "invalid_request"),
        ({}, "invalid_request"),
    ],
)
async def test_an_attach_that_cannot_be_is_answered_and_starts_nothing(frame: dict[str, Any], code: str) -> None:
    async with started(2) as (server, paced, starter):
        paced.allow(1)
        await starter.read()
        async with connected(server, "a") as peer:
            await peer.send({"type": "attach", **frame})
            answer = await peer.read()
            assert (answer["type"], answer["of"], answer["code"]) == ("error", "attach", code)
            assert (await server.engine.store.list_tasks("local")).total == 1
            await peer.send({"type": "ping"})
            assert await peer.read() == {"type": "pong"}


async def test_a_second_attach_replaces_the_first() -> None:
    async with started(4) as (server, paced, _):
        paced.allow(2)
        await committed(server, 2)
        async with connected(server, "a") as peer:
            for after in (0, 1):
                await peer.send({"type": "attach", "taskId": "t", "after": after})
                assert (await peer.read())["of"] == "attach"
                assert [(await peer.read())["seq"] for _ in range(2 - after)] == list(range(after + 1, 3))
            paced.allow(2)
            assert [frame["seq"] for frame in await peer.read_to_final()] == [3, 4, 5]
            with trio.move_on_after(0.1):
                raise AssertionError(await peer.websocket.get_message())


async def test_a_task_is_followed_after_the_restart_of_its_server(tmp_path: Path) -> None:
    settings = settings_of(store={"url": str(tmp_path / "hector.db")})
    paced = Paced()
    async with serving(settings, agents=agent(paced)) as server, connected(server, "a") as peer:
        await peer.ask("5", taskId="t", onDisconnect="continue")
        paced.allow(3)
        before = [await peer.read() for _ in range(3)]
    async with serving(settings, agents=agent(paced)) as server, connected(server, "a") as peer:
        await peer.send({"type": "attach", "taskId": "t", "after": 2})
        assert (await peer.read())["status"] == "failed"
        rest = await peer.read_to_final()
        assert rest[0] == before[2]
        assert (rest[-1]["code"], is_exact(before[:2] + rest)) == ("interrupted", True)


# --- detach -----------------------------------------------------------------------------------------------------------


async def test_detach_by_the_starter_lets_the_task_go_on_without_it() -> None:
    async with started(5) as (server, paced, starter):
        paced.allow(2)
        await starter.read()
        await starter.read()
        await starter.send({"type": "detach", "taskId": "t"})
        answer = await starter.read()
        assert answer == {"type": "ok", "of": "detach", "taskId": "t", "status": "running", "lastSeq": 2}
        assert (await row_of(server)).policy == "continue"
        paced.allow(1)
        await committed(server, 3)
        await nothing_more(starter)
        await starter.websocket.aclose()
        row = await row_of(server)
        assert row.status == "running"
        paced.allow(2)
        row = await server.engine.wait(row)
        assert (row.status, row.last_seq) == ("completed", 6)


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
async def test_a_detached_task_outlives_its_socket_and_leaves_none_behind(how: str) -> None:
    paced = Paced()
    async with serving(agents=agent(paced)) as server:
        async with raw(server, "a") as peer:
            await peer.ask("3", taskId="t")
            paced.allow(1)
            await peer.wait_for(b'"seq":1')
            await peer.send_text('{"type":"detach","taskId":"t"}')
            await peer.wait_for(b'"of":"detach"')
            await peer.leave(how)
        with trio.fail_after(5):
            while server.services.metrics.open_streams("websocket") or connection.statistics().connections:
                await trio.lowlevel.checkpoint()
        row = await row_of(server)
        assert row.status == "running"
        async with connected(server, "a") as other:
            await other.send({"type": "attach", "taskId": "t", "after": 1})
            await other.read()
            paced.allow(2)
            assert [frame["seq"] for frame in await other.read_to_final()] == [2, 3, 4]


async def test_a_detached_task_can_be_cancelled_and_times_out_as_any() -> None:
    async with started(9, timeoutMs=300) as (server, _, starter):
        await starter.send({"type": "detach", "taskId": "t"})
        assert (await starter.read())["of"] == "detach"
        row = await server.engine.wait(await row_of(server))
        assert row.error is not None
        assert row.error.code == "timeout"
    async with started(9) as (server, _paced, starter):
        await starter.send({"type": "detach", "taskId": "t"})
        assert (await starter.read())["of"] == "detach"
        await starter.send({"type": "cancel", "taskId": "t"})
        assert (await starter.read())["status"] == "cancelled"


async def test_a_server_that_is_cancelled_does_not_wait_for_detached_tasks() -> None:
    with trio.fail_after(5):
        async with started(9) as (_, _, starter):
            await starter.send({"type": "detach", "taskId": "t"})
            assert (await starter.read())["of"] == "detach"


async def test_detach_of_what_is_not_followed_is_an_error() -> None:
    async with serving(agents=agent(Steered())) as server, connected(server, "a") as peer:
        await peer.send({"type": "detach", "taskId": "t"})
        answer = await peer.read()
        assert (answer["type"], answer["of"], answer["code"]) == ("error", "detach", "task_not_found")


async def test_answers_stand_in_the_order_of_their_frames_before_what_they_begin() -> None:
    async with started(3) as (server, paced, peer):
        paced.allow(1)
        await peer.read()
        for n in range(20):  # both in one packet, so that both are read before either is answered
            frames = [{"type": "detach", "taskId": "t"}, {"type": "attach", "taskId": "t", "after": 0}]
            async with trio.open_nursery() as nursery:
                for frame in frames:
                    nursery.start_soon(peer.send, frame)
                    await trio.lowlevel.checkpoint()
            assert [(await peer.read()).get("of") for _ in range(3)] == ["detach", "attach", None], n
        paced.allow(2)
        assert (await peer.read_to_final())[-1]["status"] == "completed"
        assert (await row_of(server)).policy == "continue"


async def test_a_cancel_of_everything_takes_what_was_detached_too() -> None:
    async with started(9) as (server, paced, starter):
        paced.allow(1)
        await starter.read()
        await starter.send({"type": "detach", "taskId": "t"})
        assert (await starter.read())["of"] == "detach"
        await starter.send({"type": "cancel"})
        answer = await starter.read()
        assert (answer["of"], answer["taskIds"]) == ("cancel", ["t"])
        assert (await server.engine.wait(await row_of(server))).status == "cancelled"


async def test_a_task_without_any_viewer_is_given_time_for_the_first() -> None:
    async with serving(agents=agent(Paced())) as server, server.client() as client:
        body = {"input": {"content": "1"}, "taskId": "t", "onDisconnect": {"graceMs": 0}}
        told = await client.post("/agents/a/tasks", json=body, headers={"Prefer": "respond-async"})
        assert told.status_code == 202
        asked = trio.current_time()
        row = await server.engine.wait(await row_of(server))
        assert row.status == "cancelled"
        assert trio.current_time() - asked > 0.5


# --- grace ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
async def test_a_viewer_that_returns_within_the_grace_loses_nothing(how: str) -> None:
    paced = Paced()
    async with serving(agents=agent(paced)) as server:
        async with raw(server, "a") as peer:
            await peer.ask("6", taskId="t", onDisconnect={"graceMs": 3000})
            paced.allow(2)
            await peer.wait_for(b'"seq":2')
            await peer.leave(how)
        paced.allow(2)
        await committed(server, 4)
        async with connected(server, "a") as back:
            await back.send({"type": "attach", "taskId": "t", "after": 2})
            await back.read()
            paced.allow(2)
            chunks = await back.read_to_final()
            assert ([chunk["seq"] for chunk in chunks], chunks[-1]["status"]) == ([3, 4, 5, 6, 7], "completed")


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
@pytest.mark.parametrize("state", ["before the first token", "between tokens", "in the queue"])
async def test_who_does_not_return_stops_paying(state: str, how: str) -> None:
    paced = Paced()
    async with serving(agents=agent(paced)) as server, server.client() as client:
        session = (await client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
        inside = {"context": {"sessionId": session}}
        async with connected(server, "a") as other, raw(server, "a") as peer:
            if state == "in the queue":
                await other.ask("9", taskId="first", **inside)
                paced.allow(1)
                await other.read()
            await peer.ask("9", taskId="t", onDisconnect={"graceMs": 100}, **inside)
            if state == "between tokens":
                paced.allow(1)
                await peer.wait_for(b'"seq":1')
            else:
                await row_of(server)
            left = trio.current_time()
            await peer.leave(how)
            row = await server.engine.wait(await row_of(server))
            assert row.status == "cancelled"
            assert trio.current_time() - left >= 0.1
            (*_, final) = await read_all(server.engine, row)
            assert final.reason == "client_left"
            if state == "in the queue":
                assert (await row_of(server, "first")).status == "running"


async def test_every_viewer_counts_and_the_last_one_to_leave_starts_the_grace(tmp_path: Path) -> None:
    paced = Paced()
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(paced)) as engine:
        row = (await engine.submit(order("9", on_disconnect=GraceMs(50)))).task
        with engine.follow(row, viewer=True), engine.follow(row):
            with engine.follow(row, viewer=True):
                pass
            await trio.sleep(0.2)  # four times the grace: the time itself is the subject
            assert engine.running == 1
        left = trio.current_time()
        assert (await engine.wait(row)).status == "cancelled"
        assert 0.05 <= trio.current_time() - left < 1


@pytest.mark.parametrize("state", ["running", "waiting for input"])
async def test_who_reads_and_is_no_viewer_moves_no_grace(
    state: str, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def work(ctx: Context) -> None:
        if state == "running":
            await trio.sleep_forever()
        await ctx.ask("?")

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(work)) as engine:
        row = (await engine.submit(order(on_disconnect=GraceMs(10_000)))).task
        with engine.follow(row, viewer=True):
            await trio.sleep(1)
        left = trio.current_time()
        with trio.fail_after(HANG):
            while engine.is_unfinished(row):
                with engine.follow(row):  # as for a page of the log
                    await trio.sleep(0.5)
        (*_, final) = await read_all(engine, row)
        assert final.reason == "client_left"
        assert trio.current_time() - left == pytest.approx(10, abs=0.6)


async def test_the_first_viewer_is_waited_for_whoever_reads_before_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with store_of("memory", tmp_path) as store, engine_of(store, agent(Paced())) as engine:
        row = (await engine.submit(order("1", on_disconnect=GraceMs(0)))).task
        began = trio.current_time()
        with engine.follow(row):
            pass
        with trio.fail_after(HANG):
            assert (await engine.wait(row)).status == "cancelled"
        assert trio.current_time() - began == pytest.approx(FIRST_VIEWER)


async def test_what_grace_is_given_is_limited_by_server_and_agent(tmp_path: Path) -> None:
    tasks = Tasks(grace=5, max_grace=20)
    agents = agent(Paced()) | agent(Paced(), "b")
    agents["b"].info = type(agents["b"].info)("b", "b", grace=0, max_grace=1)
    async with store_of("memory", tmp_path) as store, engine_of(store, agents, Settings(tasks=tasks)) as engine:

        async def policy(agent_id: str, default: Any, **request: Any) -> str:
            each = order("1", agent_id=agent_id, policy=default, **request)
            return (await engine.submit(each)).task.policy

        assert await policy("a", "cancel") == "grace:5000"
        assert await policy("a", "continue") == "continue"
        assert await policy("a", "cancel", on_disconnect="cancel") == "cancel"
        assert await policy("a", "cancel", on_disconnect=GraceMs(10**9)) == "grace:20000"
        assert await policy("b", "cancel") == "cancel"
        assert await policy("b", "cancel", on_disconnect=GraceMs(10**9)) == "grace:1000"


async def test_a_post_that_waits_counts_as_a_viewer() -> None:
    paced = Paced()
    async with serving(agents=agent(paced)) as server, server.client() as client:
        answers: list[Any] = []

        async def post() -> None:
            body = {"input": {"content": "1"}, "taskId": "t", "onDisconnect": {"graceMs": 0}}
            answers.append((await client.post("/agents/a/tasks", json=body)).json())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            await trio.sleep(1.2)  # longer than a first viewer is waited for
            paced.allow(1)
        assert answers[0]["status"] == "completed"


# --- windows ----------------------------------------------------------------------------------------------------------


async def test_with_a_window_no_more_frames_come_than_are_acknowledged() -> None:
    async with started(20, window=3) as (server, paced, peer):
        paced.allow(20)
        await committed(server, 21)
        frames = [await peer.read() for _ in range(3)]
        await peer.send({"type": "ping"})
        assert await peer.read() == {"type": "pong"}
        while not frames[-1]["final"]:
            await peer.send({"type": "credit", "taskId": "t", "frames": 2})
            answers = [await peer.read() for _ in range(3)]
            assert {"type": "ok", "of": "credit", "taskId": "t", "status": "completed", "lastSeq": 21} in answers
            frames += [frame for frame in answers if "seq" in frame]
        assert is_exact(frames)
        assert words(frames) == "".join(f"{n} " for n in range(1, 21))


async def test_a_task_whose_final_chunk_took_the_last_credit_is_no_longer_followed() -> None:
    """So the socket is closed as every other that has nothing to say, and nothing of the task is held."""
    paced = Paced()
    settings = settings_of(limits={"idle_after_final": 0.05})
    async with serving(settings, agents=agent(paced)) as server, connected(server, "a") as peer:
        await peer.ask("2", taskId="t", window=3)
        paced.allow(1)
        assert (await peer.read())["seq"] == 1
        paced.allow(1)
        assert is_exact([{"seq": 1, "final": False}, *await peer.read_to_final()])
        assert await peer.close_code() == 1000


async def test_a_viewer_that_is_far_behind_its_stream_gets_text_joined_for_its_credit() -> None:
    async with started(2000, window=2) as (server, paced, peer):
        paced.allow(2)
        frames = [await peer.read() for _ in range(2)]
        paced.allow(1998)
        await committed(server, 2001)
        while not frames[-1]["final"]:
            await peer.send({"type": "credit", "taskId": "t", "frames": 1})
            frames += [frame for frame in [await peer.read() for _ in range(2)] if "seq" in frame]
        assert frames[2]["firstSeq"] == 3
        assert len(frames) < 30
        assert is_exact(frames)
        assert words(frames) == "".join(f"{n} " for n in range(1, 2001))


async def test_a_task_without_credit_does_not_touch_the_others_of_its_socket() -> None:
    async with started(20, window=1) as (server, paced, peer):
        paced.allow(40)
        await committed(server, 21)
        assert (await peer.read())["seq"] == 1
        paced.emitted = 0
        await peer.ask("20", taskId="u")
        frames = await peer.read_to_final()
        assert {frame["taskId"] for frame in frames} == {"u"}
        assert is_exact(frames)


async def test_with_pause_the_agent_waits_for_its_viewer_until_that_leaves_it() -> None:
    async with started(50, window=4, pause=True) as (server, paced, peer):
        paced.allow(50)
        frames = [await peer.read() for _ in range(4)]
        await paced.wait_emitted(5)
        await nothing_more(peer)
        assert paced.emitted == 5  # the fifth waits in its emit
        await peer.send({"type": "credit", "taskId": "t", "frames": 2})
        frames += [frame for frame in [await peer.read() for _ in range(3)] if "seq" in frame]
        await paced.wait_emitted(7)
        await nothing_more(peer)
        assert (paced.emitted, is_exact(frames), frames[-1]["seq"]) == (7, True, 6)
        await peer.send({"type": "detach", "taskId": "t"})
        assert (await server.engine.wait(await row_of(server))).status == "completed"


async def test_a_paused_agent_is_cancelled_when_its_viewer_leaves() -> None:
    async with started(50, window=1, pause=True) as (server, paced, peer):
        paced.allow(50)
        await peer.read()
        await paced.wait_emitted(2)
        row = await row_of(server)
        await peer.websocket.aclose()
        assert (await server.engine.wait(row)).status == "cancelled"


async def test_an_agent_that_continues_without_its_viewer_is_no_longer_paused() -> None:
    async with started(50, window=1, pause=True, onDisconnect="continue") as (server, paced, peer):
        paced.allow(50)
        await peer.read()
        await paced.wait_emitted(2)
        row = await row_of(server)
        await peer.websocket.aclose()
        with trio.fail_after(5):
            assert (await server.engine.wait(row)).status == "completed"


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 2.5}, {"window": "9"}, {"pause": True}, {"pause": 1}, {"binary": "yes"}]
)
async def test_a_task_frame_with_wrong_options_is_refused(options: dict[str, Any]) -> None:
    async with serving(agents=agent(Paced())) as server, connected(server, "a") as peer:
        await peer.ask("1", taskId="t", **options)
        frame = await peer.read()
        assert (frame["seq"], frame["final"], frame["code"], frame["taskId"]) == (0, True, "invalid_request", "t")
        assert (await server.engine.store.list_tasks("local")).total == 0


async def test_credit_for_the_last_frames_of_a_task_changes_nothing() -> None:
    async with started(1, window=9) as (_server, paced, peer):
        paced.allow(1)
        assert is_exact(await peer.read_to_final())
        await peer.send({"type": "credit", "taskId": "t", "frames": 2})
        assert await peer.read() == {"type": "ok", "of": "credit", "taskId": "t", "status": "completed", "lastSeq": 2}


async def test_credit_without_a_window_or_a_task_is_an_error() -> None:
    async with started(2) as (_server, _, peer):
        await peer.send({"type": "credit", "taskId": "t", "frames": 1})
        assert (await peer.read())["code"] == "invalid_request"
        await peer.send({"type": "credit", "taskId": "u", "frames": 1})
        assert (await peer.read())["code"] == "task_not_found"
        await peer.send({"type": "credit", "taskId": "t", "frames": -1})
        assert (await peer.read())["code"] == "invalid_request"


async def test_no_more_tasks_are_followed_on_a_socket_than_are_allowed() -> None:
    settings = settings_of(limits={"tasks_per_socket": 2})
    async with serving(settings, agents=agent(Paced())) as server, connected(server, "a") as starter:
        await starter.ask("1", taskId="t0")
        await starter.ask("1", taskId="t1")
        async with connected(server, "a") as other, connected(server, "a") as peer:
            await other.ask("1", taskId="t2")
            for n in range(3):
                await peer.send({"type": "ping"})
                await peer.read()
                await row_of(server, f"t{n}")
                await peer.send({"type": "attach", "taskId": f"t{n}"})
                answer = await peer.read()
                assert answer["type"] == ("ok" if n < 2 else "error")
            assert answer["code"] == "rate_limited"


# --- joined text, gaps, bytes -----------------------------------------------------------------------------------------


async def test_a_joined_read_is_exact_at_every_position(tmp_path: Path) -> None:
    async def mixed(ctx: Context) -> None:
        for n in range(5):
            await ctx.emit_text(f'{n}"\\ü\n')
        await ctx.emit_data({"chunkType": "text"})
        for n in range(5):
            await ctx.emit_text(f"{n}")
        await ctx.emit_metadata(1)

    async with store_of("sql", tmp_path) as store, engine_of(store, agent(mixed)) as engine:
        row = await run(engine, order())
        plain = await read_all(engine, row)
        for after in range(14):
            for limit in (1, 2, 100):
                found = []
                with engine.follow(row, after) as follower:
                    while lines := await follower.read(limit, join=True):
                        assert len(lines) <= limit
                        found += [decode_chunk(line) for line in lines]
                at = after
                for chunk in found:
                    parts = plain[at : chunk.seq]
                    assert (chunk.first_seq or chunk.seq) == at + 1
                    assert {part.chunk_type for part in parts} == {chunk.chunk_type}
                    if chunk.chunk_type == "text":
                        assert chunk.content == "".join(part.content for part in parts)
                    else:
                        assert [chunk] == parts
                    at = chunk.seq
                assert at == (13 if after < 13 else after)


@pytest.mark.parametrize("when", ["running", "ended"])
async def test_a_joined_read_looks_at_little_more_than_it_gives(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0

    def counting(line: bytes) -> bytes:
        nonlocal looked_at
        looked_at += 1
        return seq_of(line)

    async def mixed(ctx: Context) -> None:
        for n in range(500):
            await ctx.emit_text("x")
            await ctx.emit_data(n)
        if when == "running":
            await trio.sleep_forever()

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(mixed)) as engine:
        row = (await engine.submit(order())).task
        with engine.follow(row) as follower, trio.fail_after(5):
            while follower.after < 1000:
                await follower.read()
        if when == "ended":
            row = await engine.wait(row)
        monkeypatch.setattr("hector_trio.task.seq_of", counting)
        with engine.follow(row) as follower:
            for n in range(1, 101):
                assert len(await follower.read(1, join=True)) == 1
                assert follower.after == n
        assert looked_at <= 3 * 100  # and not a hundred thousand: a client can have it so with a window of one


async def test_what_is_no_longer_held_is_said_on_every_transport() -> None:
    async with started(10) as (server, paced, starter), server.client() as client:
        for n in range(10):
            paced.allow(1)
            await committed(server, n + 1)
        await starter.read_to_final()
        store = server.engine.store
        gone = await store.sweep(now=now_ms(), tasks_ended_before=0, limit=100, logs_ended_before=now_ms() + 1)
        assert gone > 0
        page = (await client.get("/agents/a/tasks/t/events?after=2")).json()["chunks"]
        gap, *rest = page
        assert (gap["chunkType"], gap["content"]["gap"]["from"], gap["content"]["gap"]["reason"]) == (
            "metadata",
            3,
            "retention",
        )
        assert gap["content"]["gap"]["to"] == gap["seq"]
        assert (rest[-1]["final"], is_exact(rest, gap["seq"])) == (True, True)
        events = await client.get("/agents/a/tasks/t/events?after=2", headers={"Accept": "text/event-stream"})
        lines = events.text.splitlines()
        assert [line for line in lines if line.startswith("id:")] == [f"id: {chunk['seq']}" for chunk in page]
        async with connected(server, "a") as peer:
            await peer.send({"type": "attach", "taskId": "t", "after": 2})
            await peer.read()
            said = await peer.read_to_final()
            assert [frame["seq"] for frame in said] == [chunk["seq"] for chunk in page]
            assert said[0]["content"] == gap["content"]


PICTURE = bytes(range(256))


async def draw(ctx: Context) -> None:
    await ctx.emit_text("look: ")
    await ctx.emit_bytes(PICTURE, "image/png")
    await ctx.emit_data({"encoding": '"encoding":"base64"'})


async def test_bytes_come_as_binary_frames_to_who_asks_and_as_base64_to_others() -> None:
    async with serving(agents=agent(draw)) as server, connected(server, "a") as plain, connected(server, "a") as peer:
        await plain.ask("hi", taskId="t")
        chunks = await plain.read_to_final()
        assert (chunks[1]["mediaType"], chunks[1]["encoding"]) == ("image/png", "base64")
        assert base64.b64decode(chunks[1]["content"]) == PICTURE
        await peer.send({"type": "attach", "taskId": "t", "after": 0, "binary": True})
        frames = [await peer.websocket.get_message() for _ in range(5)]
        assert [isinstance(frame, bytes) for frame in frames] == [False, False, True, False, False]
        assert [json.loads(frame) for frame in frames[3:]] == chunks[2:]
        assert frames[2] == (
            b"\x01\x00" + b"\x01t" + (2).to_bytes(8, "big") + bytes([len("image/png")]) + b"image/png" + PICTURE
        )
        row = await row_of(server)
        assert row.output is not None
        assert row.output.content == "look: "


@pytest.mark.parametrize("media_type", ["", "x", "a/b\n", "a/" + "b" * 255, 7])
async def test_bytes_of_no_media_type_fail_the_run(media_type: Any, tmp_path: Path) -> None:
    async def wrong(ctx: Context) -> None:
        await ctx.emit_bytes(b"x", media_type)

    async with store_of("memory", tmp_path) as store, engine_of(store, agent(wrong)) as engine:
        assert (await run(engine, order())).status == "failed"


async def test_a_shutdown_closes_a_socket_that_only_follows_with_1012() -> None:
    async with started(2, onDisconnect="continue") as (server, paced, _starter):
        paced.allow(1)
        async with connected(server, "a") as peer:
            await peer.send({"type": "attach", "taskId": "t"})
            await peer.read()
            await peer.read()
            server.stop.set()
            final = (await peer.read_to_final())[-1]
            assert final["code"] == "interrupted"
            assert await peer.close_code() == 1012
