"""The WebSocket, through real sockets: what a client of the seed sees, what only a client with control frames sees."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.transports.websocket import MAX_REPLIES
from tests.engines import Steered, agent
from tests.serving import Served, serving, settings_of
from tests.sockets import connect_raw, connected, raw, rejected
from tests.test_frozen import serving_narrow

pytestmark = pytest.mark.usefixtures("either_way")

SIX = {"taskId", "seq", "chunkType", "content", "timestamp", "final"}


async def only_task(server: Served) -> Any:
    page = await server.engine.store.list_tasks("local")
    assert page.total == 1
    return page.items[0]


async def test_one_request_gives_numbered_chunks_up_to_one_final_one_and_is_recorded() -> None:
    async with serving() as server, connected(server) as peer:
        await peer.ask("Hello", taskId="task-123")
        chunks = await peer.read_to_final()
        assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
        assert all(chunk.keys() >= SIX and chunk["taskId"] == "task-123" for chunk in chunks)
        assert [chunk["final"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert (chunks[-1]["chunkType"], chunks[-1]["content"], chunks[-1]["status"]) == ("done", "", "completed")
        async with server.client() as client:
            task = (await client.get("/agents/assistant/tasks/task-123")).json()
            stored = (await client.get("/agents/assistant/tasks/task-123/events?pageSize=100")).json()
        assert task["status"] == "completed"
        assert task["output"]["content"] == "".join(c["content"] for c in chunks if c["chunkType"] == "text")
        assert stored["chunks"] == chunks


async def test_a_socket_with_only_task_frames_is_closed_with_1000_after_its_last_task() -> None:
    async with serving(settings_of(limits={"idle_after_final": 0.05})) as server, connected(server) as peer:
        await peer.ask("Hello")
        await peer.read_to_final()
        assert await peer.close_code() == 1000


async def test_a_socket_that_sent_a_control_frame_stays_open() -> None:
    async with serving(settings_of(limits={"idle_after_final": 0.01})) as server, connected(server) as peer:
        await peer.send({"type": "ping", "id": 7})
        assert await peer.read() == {"type": "pong", "id": 7}
        await peer.ask("Hello")
        await peer.read_to_final()
        with trio.move_on_after(0.2):
            await peer.websocket.get_message()
            raise AssertionError("nothing was to be said")
        await peer.ask("Hello")
        await peer.read_to_final()


async def test_a_socket_without_a_first_message_is_closed() -> None:
    async with serving(settings_of(limits={"first_message_timeout": 0.05})) as server, connected(server) as peer:
        assert await peer.close_code() == 1008


async def test_many_tasks_share_a_socket_and_their_chunks_interleave() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as peer:
        for name in ("one", "two", "three"):
            await peer.ask(name, taskId=name)
            assert (await peer.read())["content"] == f"<{name}"
        for name in ("two", "three", "one"):
            steered.let(name)
            chunks = await peer.read_to_final()
            assert {chunk["taskId"] for chunk in chunks} == {name}


BAD: list[tuple[Any, str, str]] = [
    ("{", "", "invalid_request"),
    ("[]", "", "invalid_request"),
    ("null", "", "invalid_request"),
    ('"x"', "", "invalid_request"),
    ("", "", "invalid_request"),
    (b"\x00\x01", "", "invalid_request"),
    (b"", "", "invalid_request"),
    ("[" * 50_000, "", "invalid_request"),
    ('{"input":' + '{"content":' * 5_000, "", "invalid_request"),
    ({"taskId": "t"}, "t", "invalid_request"),
    ({"taskId": "t", "input": "text"}, "t", "invalid_request"),
    ({"taskId": "a b", "input": {"content": "x"}}, "a b", "invalid_request"),
    ({"taskId": "..", "input": {"content": "x"}}, "..", "invalid_request"),
    ({"taskId": 5, "input": {"content": "x"}}, "", "invalid_request"),
    ({"taskId": "t", "input": {"type": "text/plain", "content": 5}}, "t", "invalid_request"),
    ({"taskId": "t", "input": {"content": "x"}, "timeoutMs": 0}, "t", "invalid_request"),
    ({"taskId": "t", "input": {"content": "x"}, "timeoutMs": 10**30}, "t", "invalid_request"),
    ('{"taskId":"t","input":{"content":"x"},"timeoutMs":1e999}', "t", "invalid_request"),
    ('{"taskId":"t","input":{"type":"application/json","content":' + "9" * 6000 + "}}", "t", "invalid_request"),
    ('{"taskId":"t","input":{"content":"\\ud800"}}', "", "invalid_request"),
    ({"taskId": "t", "input": {"content": "x"}, "onDisconnect": "explode"}, "t", "invalid_request"),
    ({"taskId": "t", "input": {"content": "x"}, "context": {"sessionId": "nowhere"}}, "t", "session_not_found"),
]


async def test_a_bad_frame_is_answered_with_a_full_error_chunk_and_the_socket_stays_usable() -> None:
    async with serving() as server, connected(server) as peer:
        for frame, task_id, code in BAD:
            await peer.send(frame)
            chunk = await peer.read()
            assert chunk.keys() >= SIX, frame
            said = {key: chunk[key] for key in ("taskId", "seq", "chunkType", "final", "status", "code")}
            assert said == {
                "taskId": task_id, "seq": 0, "chunkType": "error", "final": True, "status": "failed", "code": code,
            }, frame  # fmt: skip
        await peer.ask("Hello")
        assert (await peer.read_to_final())[-1]["status"] == "completed"
        assert (await only_task(server)).status == "completed"


async def test_bad_frames_during_a_run_do_not_disturb_it() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as peer:
        await peer.ask("one", taskId="one")
        await peer.read()
        for frame in ("{", b"\xff", {"type": 5}, {"type": "nonsense"}, {"input": 1}):
            await peer.send(frame)
            assert (await peer.read()).get("code") == "invalid_request"
        steered.let("one")
        assert [chunk["content"] for chunk in await peer.read_to_final()] == [">", ""]


async def test_cancel_frames_are_answered_when_the_task_has_ended() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as peer:
        for name in ("one", "two", "three"):
            await peer.ask(name, taskId=name)
            await peer.read()
        await peer.send({"type": "cancel", "taskId": "two", "reason": "enough"})
        frames = [await peer.read(), await peer.read()]
        done = next(frame for frame in frames if "chunkType" in frame)
        ok = next(frame for frame in frames if "chunkType" not in frame)
        assert (done["taskId"], done["status"], done["reason"]) == ("two", "cancelled", "enough")
        assert ok == {"type": "ok", "of": "cancel", "taskId": "two", "status": "cancelled", "lastSeq": 2}
        await peer.send({"type": "cancel"})
        frames = [await peer.read() for _ in range(3)]
        assert sorted(frame["taskId"] for frame in frames if frame.get("final")) == ["one", "three"]
        await peer.send({"type": "cancel", "taskId": "nobody"})
        refusal = await peer.read()
        assert (refusal["type"], refusal["of"], refusal["code"]) == ("error", "cancel", "task_not_found")


async def test_the_same_request_twice_follows_the_running_task() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as first:
        await first.ask("one", taskId="t")
        await first.read()
        async with connected(server, "a") as second:
            await second.ask("one", taskId="t")
            assert (await second.read())["seq"] == 1
            await second.ask("other", taskId="t")
            assert (await second.read())["code"] == "task_exists"
            steered.let("one")
            assert (await second.read_to_final())[-1]["status"] == "completed"
        assert (await first.read_to_final())[-1]["status"] == "completed"
        assert steered.started == ["one"]


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
async def test_leaving_cancels_exactly_the_work_of_this_connection(how: str) -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as other:
        await other.ask("stays", taskId="stays")
        await other.read()
        async with raw(server, "a") as peer:
            await peer.ask("goes", taskId="goes")
            await peer.ask("lives on", taskId="on", onDisconnect="continue")
            await peer.wait_for(b"<goes")
            await peer.wait_for(b"<lives on")
            await peer.leave(how)
            await steered.wait_ended("goes")
            with trio.fail_after(5):
                while b"hector_cancel_seconds_count 1.0" not in server.services.metrics.render():
                    await trio.lowlevel.checkpoint()
        assert steered.ended == ["goes"]
        gone = await server.engine.store.get_task("local", "a", "goes")
        assert gone is not None
        gone = await server.engine.wait(gone)
        assert gone.status == "cancelled"
        for name in ("stays", "lives on"):
            steered.let(name)
        assert (await other.read_to_final())[-1]["status"] == "completed"
        on = await server.engine.store.get_task("local", "a", "on")
        assert on is not None
        with trio.fail_after(5):
            assert (await server.engine.wait(on)).status == "completed"


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
async def test_leaving_while_queued_cancels_the_queued_task(how: str) -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        session = (await client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
        async with connected(server, "a") as first:
            await first.ask("first", context={"sessionId": session})
            await first.read()
            async with raw(server, "a") as peer:
                await peer.ask("queued", taskId="queued", context={"sessionId": session})
                with trio.fail_after(5):
                    while server.engine.queued == 0:
                        await trio.lowlevel.checkpoint()
                await peer.leave(how)
                with trio.fail_after(5):
                    while server.engine.queued:
                        await trio.lowlevel.checkpoint()
            row = await server.engine.store.get_task("local", "a", "queued")
            assert row is not None
            assert (await server.engine.wait(row)).status == "cancelled"
        assert steered.started == ["first"]


async def test_a_stream_in_a_session_uses_and_feeds_its_history() -> None:
    async with serving() as server, server.client() as client:
        session = (await client.post("/sessions", json={"agentId": "assistant"})).json()["sessionId"]
        async with connected(server) as peer:
            await peer.ask("My name is Alice", context={"sessionId": session})
            await peer.ask("What is my name?", context={"sessionId": session})
            await peer.read_to_final()
            answer = "".join(c["content"] for c in await peer.read_to_final() if c["chunkType"] == "text")
        assert "Alice" in answer
        messages = (await client.get(f"/sessions/{session}/messages")).json()["messages"]
        assert [message["role"] for message in messages] == ["user", "agent"] * 2


async def test_an_unknown_agent_is_refused_before_the_upgrade() -> None:
    async with serving() as server:
        refused = await rejected(server, "nobody")
        assert refused.status_code == 404
        assert json.loads(refused.body or b"")["code"] == "agent_not_found"


async def test_a_foreign_origin_is_refused_before_the_upgrade() -> None:
    async with serving() as server:
        refused = await rejected(server, extra_headers=[("Origin", "https://evil.example")])
        assert refused.status_code == 403


TOKENS = {"tokens": [{"name": "alice", "token": "alice-0123456789abcdef"}, {"name": "bob", "token": "b" * 20}]}


async def test_a_socket_needs_a_token_in_a_header_or_a_subprotocol() -> None:
    async with serving(settings_of(auth=TOKENS)) as server:
        assert (await rejected(server)).status_code == 401
        async with connected(server, extra_headers=[("Authorization", "Bearer alice-0123456789abcdef")]) as peer:
            await peer.ask("Hello", taskId="mine")
            await peer.read_to_final()
        async with connected(server, subprotocols=["bearer", "b" * 20]) as peer:
            assert peer.websocket.subprotocol == "bearer"
            await peer.send({"type": "cancel", "taskId": "mine"})
            assert (await peer.read())["code"] == "task_not_found"


async def test_a_drain_refuses_new_work_lets_the_stream_end_and_closes_with_1012() -> None:
    steered = Steered()
    async with serving(settings_of(server={"shutdown_grace": 5}), agents=agent(steered)) as server:
        async with connected(server, "a") as idle, connected(server, "a") as peer:
            await peer.ask("one")
            await peer.read()
            server.stop.set()
            assert await idle.close_code() == 1012
            await peer.ask("two")
            assert (await peer.read())["code"] == "draining"
            steered.let("one")
            assert (await peer.read_to_final())[-1]["status"] == "completed"
            assert await peer.close_code() == 1012


async def test_a_stream_that_outlasts_the_grace_ends_with_its_final_chunk() -> None:
    steered = Steered()
    async with serving(settings_of(server={"shutdown_grace": 0.05}), agents=agent(steered)) as server:
        async with connected(server, "a") as peer:
            await peer.ask("one")
            await peer.read()
            server.stop.set()
            last = (await peer.read_to_final())[-1]
            assert (last["status"], last["code"]) == ("failed", "interrupted")
            assert await peer.close_code() == 1012


async def test_too_many_tasks_on_a_socket_are_refused() -> None:
    steered = Steered()
    limits = {"tasks_per_socket": 2}
    async with serving(settings_of(limits=limits), agents=agent(steered)) as server, connected(server, "a") as peer:
        for name in ("one", "two"):
            await peer.ask(name, taskId=name)
            await peer.read()
        await peer.ask("three")
        assert (await peer.read())["code"] == "rate_limited"
        steered.let("one")
        await peer.read_to_final()
        await peer.ask("three")
        assert (await peer.read())["content"] == "<three"


async def test_a_failure_of_one_stream_is_told_and_others_go_on() -> None:
    async def fail(ctx: Context) -> None:
        raise ValueError("/secret/path")

    steered = Steered()
    agents: dict[str, Agent] = {"a": FunctionAgent(AgentInfo("a", "a"), steered), **agent(fail, "f")}
    async with serving(agents=agents) as server, connected(server, "a") as other, connected(server, "f") as peer:
        await other.ask("one")
        await other.read()
        await peer.ask("x")
        last = (await peer.read_to_final())[-1]
        assert (last["chunkType"], last["code"]) == ("error", "agent_error")
        assert "secret" not in json.dumps(last)
        steered.let("one")
        assert (await other.read_to_final())[-1]["status"] == "completed"


async def test_ten_thousand_unread_messages_and_a_hang_up_cost_nobody_else_anything() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, connected(server, "a") as other:
        await other.ask("one")
        await other.read()
        async with raw(server, "a") as peer:
            await peer.ask("flood")
            await peer.wait_for(b"<flood")
            with trio.move_on_after(5):
                try:
                    for _ in range(10_000):
                        await peer.send_text('{"type":"ping"}')
                except trio.BrokenResourceError:
                    pass  # closed with 1008: a flood
            await peer.leave("rst")
            await steered.wait_ended("flood")
        steered.let("one")
        assert (await other.read_to_final())[-1]["status"] == "completed"


async def test_too_many_sockets_are_refused_before_the_upgrade() -> None:
    async with serving(settings_of(limits={"sockets": 1})) as server:
        async with connected(server) as peer:
            refused = await rejected(server)
            assert refused.status_code == 429
            await peer.ask("Hello")
            await peer.read_to_final()
        with trio.fail_after(5):
            while server.services.metrics.open_streams("websocket"):
                await trio.lowlevel.checkpoint()
        async with connected(server):
            pass


async def test_a_message_larger_than_allowed_closes_this_socket_with_1009_only() -> None:
    steered = Steered()
    limits = {"body_bytes": 10_000}
    async with serving(settings_of(limits=limits), agents=agent(steered)) as server, connected(server, "a") as other:
        await other.ask("one")
        await other.read()
        async with connected(server, "a") as peer:
            await peer.ask("x" * 20_000)
            assert await peer.close_code() == 1009
        steered.let("one")
        assert (await other.read_to_final())[-1]["status"] == "completed"


async def test_an_answer_repeats_only_little_of_what_a_client_says() -> None:
    async with serving() as server, connected(server) as peer:
        await peer.send({"type": "ping", "id": "x" * 1000})
        assert (await peer.read())["code"] == "invalid_request"
        await peer.send({"type": "y" * 1000})
        assert len((await peer.read())["of"]) <= 128
        await peer.send({"taskId": "z" * 1000, "input": {"content": "x"}})
        assert len((await peer.read())["taskId"]) <= 128


async def test_no_frame_waits_for_a_cancel_that_takes_its_time() -> None:
    release = trio.Event()

    async def stubborn(ctx: Context) -> None:
        await ctx.emit_text("x")
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await release.wait()

    async with serving(agents=agent(stubborn)) as server, connected(server, "a") as peer:
        await peer.ask("x", taskId="t")
        await peer.read()
        await peer.send({"type": "cancel", "taskId": "t"})
        await peer.send({"type": "ping"})
        assert await peer.read() == {"type": "pong"}
        release.set()
        assert {frame.get("status") for frame in (await peer.read(), await peer.read())} == {"cancelled"}


async def test_a_client_that_reads_no_answers_is_not_read_on_from() -> None:
    async def speak(ctx: Context) -> None:
        await ctx.emit_text("x" * int(ctx.text))

    cancels, most = 600, MAX_REPLIES + 100  # so many cancels may be at work besides
    async with serving_narrow(speak, send_timeout=30) as server, server.client() as client:
        await client.post("/agents/a/tasks", json={"taskId": "ended", "input": {"content": "1"}})
        store: Any = server.engine.store
        get_task, found = store.get_task, 0

        async def counting(*name: str) -> Any:
            nonlocal found
            found += 1
            return await get_task(*name)

        peer = await connect_raw(server.url, "a", receive_buffer=65536)
        async with peer.stream:
            await peer.ask("1000000", taskId="t")
            with trio.fail_after(10):
                while (row := await get_task("local", "a", "t")) is None or not row.ended:
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.01)  # more was said than the sockets hold
                store.get_task = counting
                for _ in range(cancels):
                    await peer.send_text('{"type":"cancel","taskId":"ended"}')
                while found <= MAX_REPLIES:
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert found <= most + 1
                while peer.received.count(b'"of":"cancel"') < cancels:
                    peer.received += await peer.stream.receive_some(65536)
        assert found == cancels


async def test_a_viewer_far_behind_reads_each_part_of_the_log_once() -> None:
    async def much(ctx: Context) -> None:
        for n in range(20_000):
            await ctx.emit_text(f"{n} ")

    async with serving(settings_of(limits={"tail_bytes": 1000}), agents=agent(much)) as server:
        store = server.engine.store
        reads = 0
        read_log = store.read_log

        async def counting(key: int, after: int, limit_bytes: int) -> Any:
            nonlocal reads
            reads += 1
            return await read_log(key, after, limit_bytes)

        async with connected(server, "a") as peer:
            await peer.ask("x", taskId="t", onDisconnect="continue")
            await peer.read_to_final()
        row = await server.engine.store.get_task("local", "a", "t")
        assert row is not None
        with trio.fail_after(20):
            row = await server.engine.wait(row)
            follower = server.engine.follow(row)
            follower._store = Counting(store, counting)  # type: ignore[assignment]
            seen = 0
            while lines := await follower.read(64):
                seen += len(lines)
        assert seen == 20_001
        assert reads <= 20


class Counting:
    """A store whose reads of logs are counted."""

    def __init__(self, store: Any, read_log: Any) -> None:
        self._store = store
        self.read_log = read_log
