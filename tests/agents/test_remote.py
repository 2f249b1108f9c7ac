"""Agents that are somewhere else: passed on piece by piece, cancelled there, asked there, followed through cuts."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.a2a.types import Part
from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.agents.remote import until_named
from hector_trio.config import A2a
from hector_trio.errors import RunError
from tests.cutting import Cut, Wire, wire_to
from tests.engines import Steered
from tests.fake_model import FakeModel, refuses, sends, serve_fake_model
from tests.logged import logged
from tests.serving import Served, serving, settings_of
from tests.sockets import connected

BINDINGS = ["JSONRPC 1.0", "HTTP+JSON 1.0", "JSONRPC 0.3", "HTTP+JSON 0.3"]
TOKEN = "far-token-0123456789"


def agents(about: A2a | None = None, **functions: Any) -> dict[str, Agent]:
    about = about or A2a()
    return {name: FunctionAgent(AgentInfo(name, name, a2a=about), function) for name, function in functions.items()}


class Pair:
    """A server with the real agents, one with their likenesses, and a wire between."""

    def __init__(self, far: Served, near: Served, wire: Wire) -> None:
        self.far, self.near, self.wire = far, near, wire

    async def ask(self, text: str, agent: str = "a", **request: Any) -> dict[str, Any]:
        async with self.near.client() as client:
            body = {"input": {"content": text}, **request}
            found: dict[str, Any] = (await client.post(f"/agents/{agent}/tasks", json=body)).json()
            return found

    async def log(self, task_id: str, agent: str = "a") -> list[dict[str, Any]]:
        async with self.near.client() as client:
            page = (await client.get(f"/agents/{agent}/tasks/{task_id}/events?pageSize=100")).json()
            found: list[dict[str, Any]] = page["chunks"]
            return found

    async def far_tasks(self, agent: str = "a") -> list[dict[str, Any]]:
        async with self.far.client() as client:
            found: list[dict[str, Any]] = (await client.get(f"/agents/{agent}/tasks")).json()["tasks"]
            return found


@asynccontextmanager
async def pair(
    functions: Mapping[str, Any],
    *,
    binding: str = BINDINGS[0],
    far: Any = None,
    streaming: bool = True,
    resume: bool = True,
    near: Mapping[str, Any] = {},
    **remote: Any,
) -> AsyncIterator[Pair]:
    """``binding``: all others are taken off the cards on their way."""
    about = A2a(streaming=streaming, resume=resume, input_modes=["*/*"])
    async with serving(far or settings_of(), agents(about, **functions)) as there, wire_to(there.address) as wire:
        async with narrowed(wire, binding) as url:
            settings = {name: {"type": "a2a", "url": f"{url}/a2a/{name}", **remote} for name in functions}
            async with serving(settings_of(agents=settings, **near)) as here:
                yield Pair(there, here, wire)


@asynccontextmanager
async def narrowed(wire: Wire, binding: str) -> AsyncIterator[str]:
    """An address whose cards name one interface only, that of ``wire``; everything else it does not know."""
    kind, version = binding.split()

    async def behave(exchange: Any) -> None:
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
            card = (await client.get(wire.url + exchange.target)).json()
        listed = card["supportedInterfaces"]
        card["supportedInterfaces"] = [
            each for each in listed if (each["protocolBinding"], each["protocolVersion"]) == (kind, version)
        ]
        assert len(card["supportedInterfaces"]) == 1
        if version == "0.3":  # as a server of then has it
            interface = card.pop("supportedInterfaces")[0]
            card |= {"url": interface["url"], "preferredTransport": kind, "additionalInterfaces": []}
        await sends(json.dumps(card).encode(), "application/json")(exchange)

    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.default = behave
        yield f"http://127.0.0.1:{fake.port}"
        nursery.cancel_scope.cancel()


async def speak(ctx: Context) -> None:
    for word in ("You ", "said: ", ctx.text):
        await ctx.emit_text(word)
        await trio.lowlevel.checkpoint()


# --- what an agent says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binding", BINDINGS)
async def test_an_answer_comes_through_piece_by_piece_over_every_binding(binding: str) -> None:
    steered = Steered()

    async def talk(ctx: Context) -> None:
        await ctx.emit_text("one ")
        await steered(ctx)
        await ctx.emit_text("two")

    async with pair({"a": talk}, binding=binding) as both, connected(both.near, "a") as peer:
        await peer.ask("x", taskId="t")
        assert (await peer.read())["content"] == "one "  # long before the end
        await steered.wait_started("x")
        steered.let("x")
        frames = await peer.read_to_final()
        assert "".join(frame["content"] for frame in frames if frame["chunkType"] == "text").endswith("two")
        assert frames[-1]["status"] == "completed"


@pytest.mark.parametrize("binding", BINDINGS)
async def test_everything_that_an_answer_can_be_made_of_comes_through(binding: str) -> None:
    async def talk(ctx: Context) -> None:
        await ctx.emit_status("thinking")
        await ctx.emit_data({"n": 1})
        await ctx.emit_bytes(b"\x00\xff", "image/png")
        await ctx.artifact(Part(text="doc", filename="a.txt"), {"k": [1]}, artifact_id="A", name="Doc", description="D")
        await ctx.artifact(" more", artifact_id="A", append=True, last=True)
        await ctx.artifact(Part(url="https://x.example/y.pdf", media_type="application/pdf"), artifact_id="B")

    async with pair({"a": talk}, binding=binding) as both:
        task = await both.ask("x", taskId="t")
        assert task["status"] == "completed"
        chunks = await both.log("t")
        kinds = [(chunk["chunkType"], chunk["content"]) for chunk in chunks]
        assert ("metadata", {"status": "working", "message": "thinking"}) in kinds
        assert ("data", {"n": 1}) in kinds
        picture = next(chunk for chunk in chunks if chunk.get("mediaType") == "image/png")
        assert picture["content"] == "AP8="
        docs = [chunk for chunk in chunks if chunk.get("artifact", {}).get("id") == "A"]
        assert [chunk["content"] for chunk in docs] == ["doc", {"k": [1]}, " more"]
        about = {"id": "A", "name": "Doc", "description": "D"}
        assert docs[0]["artifact"] == (about if "0.3" in binding else {**about, "filename": "a.txt"})
        assert docs[-1]["artifact"]["last"] is True
        link = next(chunk for chunk in chunks if chunk.get("artifact", {}).get("id") == "B")
        assert (link["content"], link["artifact"]["url"]) == ("https://x.example/y.pdf", True)


@pytest.mark.parametrize("binding", BINDINGS)
async def test_an_agent_that_does_not_stream_is_looked_at_until_it_has_ended(binding: str) -> None:
    steered = Steered()

    async def talk(ctx: Context) -> None:
        await ctx.emit_text("one ")
        await steered(ctx)
        await ctx.emit_text("two")

    async with pair({"a": talk}, binding=binding, streaming=False) as both, connected(both.near, "a") as peer:
        await peer.ask("x")
        assert (await peer.read())["content"].startswith("one ")
        steered.let("x")
        frames = await peer.read_to_final()
        assert "".join(frame["content"] for frame in frames if frame["chunkType"] == "text").endswith("two")
        assert frames[-1]["status"] == "completed"


async def test_a_long_text_is_cut_into_pieces_that_a_chunk_can_hold() -> None:
    async def talk(ctx: Context) -> None:
        for number in range(4):
            await ctx.artifact("xyz" * 100_000, artifact_id="A", append=number > 0)

    async with pair({"a": talk}, far=settings_of(limits={"chunk_bytes": 1 << 20})) as both:
        async with connected(both.near, "a") as peer:
            await peer.ask("x")
            frames = await peer.read_to_final()
        assert frames[-1]["status"] == "completed"
        assert sum(len(frame["content"]) for frame in frames if frame["chunkType"] == "text") == 1_200_000


async def test_what_an_a2a_client_sends_here_arrives_there_part_by_part() -> None:
    seen: list[list[Part]] = []

    async def talk(ctx: Context) -> None:
        assert ctx.message is not None
        seen.append(list(ctx.message.parts))

    parts = [{"text": "look", "mediaType": "text/markdown"}, {"raw": "AP8=", "filename": "p.png"}, {"data": [1, None]}]
    message = {"messageId": "m", "role": "ROLE_USER", "parts": parts}
    async with pair({"a": talk}) as both, both.near.client() as client:
        body = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message}}
        answer = (await client.post("/a2a/a", json=body, headers={"A2A-Version": "1.0"})).json()
        assert "result" in answer, answer
        assert answer["result"]["task"]["status"]["state"] == "TASK_STATE_COMPLETED"
    assert seen == [
        [Part(text="look", media_type="text/markdown"), Part(raw=b"\x00\xff", filename="p.png"), Part(data=[1, None])]
    ]


async def test_json_goes_there_as_data() -> None:
    async def talk(ctx: Context) -> None:
        await ctx.emit_data(ctx.input.content)

    async with pair({"a": talk}) as both, both.near.client() as client:
        content = {"type": "application/json", "content": {"q": [1, {"x": None}]}}
        task = (await client.post("/agents/a/tasks", json={"input": content})).json()
        assert task["output"]["content"] == {"q": [1, {"x": None}]}


# --- sessions and questions -------------------------------------------------------------------------------------------


async def test_a_session_here_is_one_context_there() -> None:
    sessions: list[str | None] = []

    async def talk(ctx: Context) -> None:
        sessions.append(ctx.session_id)
        await ctx.emit_text(f"{len(ctx.history)}")

    async with pair({"a": talk, "b": talk}) as both, both.near.client() as client:
        session = (await client.post("/sessions", json={"agentId": "a"})).json()["sessionId"]
        outputs = []
        for text in ("one", "two"):
            body = {"input": {"content": text}}
            outputs.append((await client.post(f"/sessions/{session}/tasks", json=body)).json()["output"]["content"])
        assert outputs == ["0", "2"]
        assert sessions[0] == sessions[1] is not None
        state = (await client.get(f"/sessions/{session}")).json()["state"]
        assert state == {"a2a": {"a": sessions[0]}}
        await both.ask("outside")
        assert sessions[2] != sessions[0]


@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_question_there_is_asked_here_and_the_answer_goes_there(binding: str) -> None:
    async def book(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.emit_text("Let me see. ")
            await ctx.ask("Which day?", saved={"n": 1})
        await ctx.emit_text(f"Booked {ctx.resume.answer}.")

    async with pair({"a": book}, binding=binding) as both, both.near.client() as client:
        task = await both.ask("a table", taskId="t")
        assert (task["status"], task["prompt"]) == ("input_required", "Which day?")
        (there,) = await both.far_tasks()
        assert there["status"] == "input_required"
        answered = await client.post("/agents/a/tasks/t/input", json={"input": {"content": "Monday"}})
        assert (answered.json()["status"], answered.json()["output"]["content"]) == (
            "completed",
            "Let me see. Booked Monday.",
        )
        (there,) = await both.far_tasks()
        assert there["status"] == "completed"


async def test_a_permission_that_is_asked_for_there_is_asked_for_here() -> None:
    async def work(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask({"login": "https://x.example"}, auth=True)
        await ctx.emit_text("in")

    async with pair({"a": work}) as both, both.near.client() as client:
        task = await both.ask("x", taskId="t")
        assert (task["status"], task["metadata"], task["prompt"]) == (
            "input_required",
            {"reason": "auth"},
            {"login": "https://x.example"},
        )
        answered = await client.post("/agents/a/tasks/t/input", json={"input": {"content": "done"}})
        assert answered.json()["output"]["content"] == "in"


async def test_a_task_that_went_on_without_us_is_followed_when_its_answer_comes() -> None:
    async def work(ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.ask("?")
        await ctx.emit_text(f"got {ctx.resume.answer}")

    async with pair({"a": work}) as both, both.near.client() as near, both.far.client() as far:
        await both.ask("x", taskId="t")
        (there,) = await both.far_tasks()
        await far.post(f"/agents/a/tasks/{there['taskId']}/input", json={"input": {"content": "theirs"}})
        answered = await near.post("/agents/a/tasks/t/input", json={"input": {"content": "ours"}})
        assert answered.json()["output"]["content"] == "got theirs"


# --- how it ends ------------------------------------------------------------------------------------------------------


async def fail(ctx: Context) -> None:
    await ctx.emit_text("so far ")
    raise RunError("out_of_stock", "Nothing left")


async def reject(ctx: Context) -> None:
    await ctx.reject("Not my job")


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(
    ("function", "code", "message"), [(fail, "remote_failed", "Nothing left"), (reject, "rejected", "Not my job")]
)
async def test_a_failure_there_is_a_failure_here_with_its_reason(
    binding: str, function: Any, code: str, message: str
) -> None:
    async with pair({"a": function}, binding=binding) as both:
        task = await both.ask("x")
        assert (task["status"], task["error"]["code"], task["error"]["message"]) == ("failed", code, message)


async def test_a_task_that_was_canceled_there_has_failed_here() -> None:
    steered = Steered()
    async with pair({"a": steered}) as both, connected(both.near, "a") as peer, both.far.client() as far:
        await peer.ask("x")
        await steered.wait_started("x")
        (there,) = await both.far_tasks()
        await far.post(f"/agents/a/tasks/{there['taskId']}/cancel")
        frames = await peer.read_to_final()
        assert (frames[-1]["status"], frames[-1]["code"]) == ("failed", "remote_canceled")


async def far_end(both: Pair, status: str) -> None:
    with trio.fail_after(5):
        (there,) = await both.far_tasks()
        row = await both.far.engine.store.get_task("local", "a", there["taskId"])
        assert row is not None
        assert (await both.far.engine.wait(row)).status == status


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_cancel_here_stops_the_work_there(binding: str, streaming: bool) -> None:
    steered = Steered()
    async with pair({"a": steered}, binding=binding, streaming=streaming) as both, connected(both.near, "a") as peer:
        await peer.ask("x", taskId="t")
        await steered.wait_started("x")
        await peer.send({"type": "cancel", "taskId": "t"})
        assert (await peer.read_to_final())[-1]["status"] == "cancelled"
        await steered.wait_ended("x")
        await far_end(both, "cancelled")


async def test_a_client_that_leaves_here_stops_the_work_there() -> None:
    steered = Steered()
    async with pair({"a": steered}) as both:
        async with connected(both.near, "a") as peer:
            await peer.ask("x")
            await steered.wait_started("x")
        await steered.wait_ended("x")
        await far_end(both, "cancelled")


async def test_a_cancel_does_not_wait_behind_those_who_wait_for_a_connection() -> None:
    steered = Steered()
    async with pair({"a": steered}, max_connections=1) as both, connected(both.near, "a") as peer:
        await peer.ask("x", taskId="t")
        await steered.wait_started("x")
        for number in range(5):
            await peer.ask(f"y{number}", taskId=f"y{number}")
        await peer.send({"type": "cancel", "taskId": "t"})
        assert (await peer.read_to_final())[-1]["status"] == "cancelled"
        await steered.wait_ended("x")
        (there,) = [each for each in await both.far_tasks() if each["status"] == "cancelled"]
        assert there["status"] == "cancelled"
        await steered.wait_started("y0")


async def test_a_deadline_here_stops_the_work_there() -> None:
    steered = Steered()
    async with pair({"a": steered}) as both:
        task = await both.ask("x", timeoutMs=300)
        assert (task["status"], task["error"]["code"]) == ("failed", "timeout")
        await steered.wait_ended("x")
        await far_end(both, "cancelled")


async def test_a_cancel_before_the_task_has_a_name_still_finds_it() -> None:
    """The request is on its way there, and held up; what it starts is cancelled all the same."""
    steered = Steered()
    arrived, go_on = trio.Event(), trio.Event()

    async with pair({"a": steered}) as both, connected(both.near, "a") as peer:
        submit = both.far.engine.submit

        async def held(*args: Any, **options: Any) -> Any:
            arrived.set()
            await go_on.wait()
            return await submit(*args, **options)

        both.far.engine.submit = held  # type: ignore[method-assign]
        await peer.ask("x", taskId="t")
        with trio.fail_after(5):
            await arrived.wait()
        await peer.send({"type": "cancel", "taskId": "t"})
        go_on.set()
        assert (await peer.read_to_final())[-1]["status"] == "cancelled"
        with trio.fail_after(5):
            while not await both.far_tasks():
                await trio.lowlevel.checkpoint()
        await far_end(both, "cancelled")


# --- a question that nobody answers -----------------------------------------------------------------------------------


async def wonder(ctx: Context) -> None:
    if ctx.resume is None:
        await ctx.ask("Which day?")


async def cancelled_by_rest(both: Pair, client: httpx2.AsyncClient) -> None:
    answer = await client.post("/agents/a/tasks/t/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


async def cancelled_over_a2a(both: Pair, client: httpx2.AsyncClient) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "CancelTask", "params": {"id": "t"}}
    answer = (await client.post("/a2a/a", json=body, headers={"A2A-Version": "1.0"})).json()
    assert answer["result"]["status"]["state"] == "TASK_STATE_CANCELED"


async def session_deleted(both: Pair, client: httpx2.AsyncClient) -> None:
    assert (await client.delete("/sessions/s")).status_code == 204


async def time_over(both: Pair, client: httpx2.AsyncClient) -> None:
    row = await both.near.engine.store.get_task("local", "a", "t")
    assert row is not None
    with trio.fail_after(10):
        while not (row := await both.near.engine.wait(row)).ended:
            await trio.lowlevel.checkpoint()
    assert row.error is not None
    assert row.error.code == "input_timeout"


@pytest.mark.parametrize("end", [cancelled_by_rest, cancelled_over_a2a, session_deleted, time_over])
async def test_a_question_that_nobody_will_answer_is_taken_back_there(end: Any) -> None:
    near = {"tasks": {"input_timeout": 1.0}} if end is time_over else {}
    async with pair({"a": wonder}, near=near) as both, both.near.client() as client:
        await client.post("/sessions", json={"sessionId": "s", "agentId": "a"})
        task = await both.ask("x", taskId="t", context={"sessionId": "s"})
        assert task["status"] == "input_required"
        (there,) = await both.far_tasks()
        assert there["status"] == "input_required"
        await end(both, client)
        (there,) = await both.far_tasks()  # it was told before the end was said here
        assert there["status"] == "cancelled"


async def test_a_client_that_leaves_with_its_question_takes_it_back_there() -> None:
    async with pair({"a": wonder}) as both:
        async with connected(both.near, "a") as peer:
            await peer.ask("x", taskId="t")
            while (await peer.read()).get("content") != {"status": "input_required", "prompt": "Which day?"}:
                pass
        with trio.fail_after(5):
            while (await both.far_tasks())[0]["status"] == "input_required":
                pass
        await far_end(both, "cancelled")


async def test_an_answer_that_no_run_has_taken_up_yet_is_taken_back_there() -> None:
    steered = Steered()
    agents_there = {"a": wonder, "busy": steered}
    async with pair(agents_there, near={"limits": {"running": 1}}) as both, both.near.client() as client:
        await both.ask("x", taskId="t")
        body = {"input": {"content": "x"}, "onDisconnect": "continue"}
        await client.post("/agents/busy/tasks", json=body, headers={"Prefer": "respond-async"})
        await steered.wait_started("x")
        answer = {"input": {"content": "Monday"}}
        await client.post("/agents/a/tasks/t/input", json=answer, headers={"Prefer": "respond-async"})
        await cancelled_by_rest(both, client)
        (there,) = await both.far_tasks()
        assert there["status"] == "cancelled"
        steered.let("x")


async def test_a_question_is_taken_back_there_by_the_next_start_too(tmp_path: Path) -> None:
    async with serving(settings_of(), agents(a=wonder)) as far, far.client() as there:
        settings = settings_of(
            agents={"a": {"type": "a2a", "url": f"{far.url}/a2a/a"}},
            store={"url": str(tmp_path / "hector.db")},
            uploads={"path": str(tmp_path / "uploads")},
        )
        async with serving(settings) as near, near.client() as client:
            await client.post("/agents/a/tasks", json={"taskId": "t", "input": {"content": "x"}})
        (task,) = (await there.get("/agents/a/tasks")).json()["tasks"]
        assert task["status"] == "input_required"  # the server went, and the task waits through that
        async with serving(settings) as near, near.client() as client:
            assert (await client.post("/agents/a/tasks/t/cancel")).json()["status"] == "cancelled"
        (task,) = (await there.get("/agents/a/tasks")).json()["tasks"]
        assert task["status"] == "cancelled"


async def test_an_agent_that_cannot_be_told_keeps_no_task_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hector_trio.agents.remote.CANCEL_LIMIT", 0.3)
    async with pair({"a": wonder}) as both, both.near.client() as client:
        await both.ask("x", taskId="t")
        both.wire.cut("silence")
        both.wire.cuts.extend([Cut("silence", up=0)] * 10)
        with logged() as lines:
            await cancelled_by_rest(both, client)
        (line,) = lines.of("remote_task_not_cancelled")
        assert (line["task_id"], line["level"]) == ("t", "warning")
        (there,) = await both.far_tasks()
        assert there["status"] == "input_required"


async def test_a_cancel_does_not_wait_long_for_a_name() -> None:
    async def begin() -> None:
        await trio.sleep_forever()

    began = trio.current_time()
    with trio.move_on_after(0.01):
        await until_named(begin)
    assert 1.5 < trio.current_time() - began < 4


async def test_what_goes_wrong_while_waiting_for_a_name_is_told_as_it_is() -> None:
    async def begin() -> None:
        raise RunError("x", "y")

    with pytest.raises(RunError):
        await until_named(begin)


# --- connections that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("binding", BINDINGS)
async def test_a_stream_that_breaks_is_taken_up_without_loss_or_repetition(binding: str, how: Any) -> None:
    steps = [trio.Event() for _ in range(5)]

    async def talk(ctx: Context) -> None:
        for number, step in enumerate(steps):
            await step.wait()
            await ctx.emit_text(f"[{number}]")
            await ctx.artifact(f"<{number}>", artifact_id="A", append=number > 0)

    async with pair({"a": talk}, binding=binding) as both, connected(both.near, "a") as peer:
        await peer.ask("x")
        found: list[str] = []
        for step in steps:
            step.set()
            while sum(map(len, found)) < 6 * (steps.index(step) + 1):
                found.append((await peer.read())["content"])
            both.wire.cut(how)
        frames = await peer.read_to_final()
        assert frames[-1]["status"] == "completed"
        texts = "".join(found) + "".join(frame["content"] for frame in frames if frame["chunkType"] == "text")
        assert texts == "".join(f"[{n}]<{n}>" for n in range(5))


async def test_a_stream_is_taken_up_without_our_extension_by_comparing() -> None:
    steps = [trio.Event() for _ in range(4)]

    async def talk(ctx: Context) -> None:
        for number, step in enumerate(steps):
            await step.wait()
            await ctx.emit_text(f"[{number}]")
            await ctx.emit_data({"n": number})

    async with pair({"a": talk}, resume=False) as both, connected(both.near, "a") as peer:
        await peer.ask("x")
        found: list[Any] = []
        for number, step in enumerate(steps):
            step.set()
            while len(found) < 2 * (number + 1):
                found.append((await peer.read())["content"])
            both.wire.cut("rst")
        assert (await peer.read_to_final())[-1]["status"] == "completed"
        assert found == [each for n in range(4) for each in (f"[{n}]", {"n": n})]


@pytest.mark.parametrize("resume", [True, False])
async def test_what_ended_during_a_cut_is_read_afterwards(resume: bool) -> None:
    steered = Steered()

    async def talk(ctx: Context) -> None:
        await ctx.emit_text("one ")
        await steered(ctx)
        await ctx.emit_text("two")

    async with pair({"a": talk}, resume=resume) as both, connected(both.near, "a") as peer:
        await peer.ask("x")
        assert (await peer.read())["content"] == "one "
        both.wire.cut("silence")  # nothing gets through any more, and nobody is told
        steered.let("x")
        await steered.wait_ended("x")
        await far_end(both, "completed")
        both.wire.cut("rst")
        frames = await peer.read_to_final()
        assert "".join(frame["content"] for frame in frames if frame["chunkType"] == "text").endswith("two")
        assert frames[-1]["status"] == "completed"


async def test_a_silent_connection_is_made_again() -> None:
    steered = Steered()
    async with pair({"a": steered}, read_timeout=0.2) as both, connected(both.near, "a") as peer:
        await peer.ask("x")
        await steered.wait_started("x")
        before = both.wire.connections
        both.wire.cut("silence")
        with trio.fail_after(5):
            while both.wire.connections == before:
                await trio.lowlevel.checkpoint()
        steered.let("x")
        assert (await peer.read_to_final())[-1]["status"] == "completed"


# --- peers that do not do their part ----------------------------------------------------------------------------------


@asynccontextmanager
async def facing(fake_model: FakeModel, **remote: Any) -> AsyncIterator[Served]:
    settings = {"a": {"type": "a2a", "url": f"http://127.0.0.1:{fake_model.port}", **remote}}
    async with serving(settings_of(agents=settings)) as near:
        yield near


def card_at(fake_model: FakeModel, **members: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "description": "x",
        "version": "1",
        "supportedInterfaces": [
            {"url": f"http://127.0.0.1:{fake_model.port}/rpc", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
        ],
        "capabilities": {"streaming": True},
        **members,
    }


def as_json(value: Any) -> Any:
    return sends(json.dumps(value).encode(), "application/json")


def rpc_error(code: int, message: str) -> Any:
    return as_json({"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": message}})


def events(*payloads: Any) -> Any:
    lines = [f"data: {json.dumps({'jsonrpc': '2.0', 'id': 1, 'result': each})}\n\n" for each in payloads]
    return sends("".join(lines).encode())


WORKING = {"task": {"id": "T", "contextId": "C", "status": {"state": "TASK_STATE_WORKING"}}}


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (refuses(401), "remote_unauthorized"),
        (refuses(403), "remote_unauthorized"),
        (refuses(429), "remote_rate_limited"),
        (refuses(503), "remote_unavailable"),
        (refuses(500), "remote_error"),
        (refuses(302), "remote_refused"),
        (rpc_error(-32602, "no such thing"), "remote_refused"),
        (rpc_error(-32005, "no pictures"), "remote_refused"),
        (rpc_error(-32603, "oops"), "remote_error"),
        (rpc_error(-1, "?"), "remote_error"),
        (sends(b"<html>", "text/html"), "remote_garbage"),
        (sends(b"data: {nonsense\n\n"), "remote_garbage"),
        (sends(b'data: {"jsonrpc":"2.0","id":1}\n\n'), "remote_garbage"),
        (events({}), "remote_garbage"),
        (events({"task": {"id": "T"}}), "remote_garbage"),
        (events({"statusUpdate": {"taskId": "T", "status": {"state": "TASK_STATE_DREAMING"}}}), "remote_garbage"),
        (sends(b""), "remote_lost"),
    ],
)
async def test_a_peer_that_refuses_or_talks_nonsense_fails_the_task_with_a_code(behaviour: Any, code: str) -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(as_json(card_at(fake)), behaviour)
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert (task["status"], task["error"]["code"]) == ("failed", code), task
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"name": 7}, "has no name"),
        ({"supportedInterfaces": []}, "names no interface"),
        (
            {
                "supportedInterfaces": [
                    {"url": "http://x", "protocolBinding": "GRPC", "protocolVersion": "1.0"},
                    {"url": "http://x", "protocolBinding": "JSONRPC", "protocolVersion": "2.0"},
                ]
            },
            "GRPC 1.0, JSONRPC 2.0",
        ),
        ({"capabilities": {"extensions": [{"uri": "urn:x", "required": True}]}}, "without urn:x"),
    ],
)
async def test_a_card_that_is_of_no_use_says_why(members: dict[str, Any], says: str) -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.default = as_json(card_at(fake, **members))
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["error"]["code"] in ("remote_garbage", "remote_refused")
            assert says in task["error"]["message"]
        nursery.cancel_scope.cancel()


async def test_nobody_there_is_told_as_such() -> None:
    remote = {"a": {"type": "a2a", "url": "http://127.0.0.1:1/agent"}}
    async with serving(settings_of(agents=remote)) as near, near.client() as client:
        task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
        assert (task["status"], task["error"]["code"]) == ("failed", "remote_unreachable")


async def test_a_bare_message_is_the_answer() -> None:
    message = {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "Hi "}, {"text": "there"}], "contextId": "C"}
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(as_json(card_at(fake)), events({"message": message}))
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert (task["status"], task["output"]["content"]) == ("completed", "Hi there")
            assert len(fake.requests) == 2
        nursery.cancel_scope.cancel()


async def test_the_last_words_of_a_status_are_the_answer_where_there_is_no_other() -> None:
    done = {
        "state": "TASK_STATE_COMPLETED",
        "message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "42"}]},
    }
    update = {"statusUpdate": {"taskId": "T", "contextId": "C", "status": done}}
    artifact = {
        "artifactUpdate": {"taskId": "T", "contextId": "C", "artifact": {"artifactId": "A", "parts": [{"text": "41"}]}}
    }
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(as_json(card_at(fake)), events(WORKING, update), events(WORKING, artifact, update))
        async with facing(fake) as near, near.client() as client:
            for answer in ("42", "41"):
                task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
                assert (task["status"], task["output"]["content"]) == ("completed", answer)
        nursery.cancel_scope.cancel()


async def test_a_stream_that_only_goes_on_after_a_cut_is_looked_at_instead() -> None:
    """As agents of 0.3 did it: their streams had no snapshot."""
    update = {"statusUpdate": {"taskId": "T", "contextId": "C", "status": {"state": "TASK_STATE_WORKING"}}}
    artifact = {"artifactId": "A", "parts": [{"text": "missed and new"}]}
    ended = {"id": "T", "contextId": "C", "status": {"state": "TASK_STATE_COMPLETED"}, "artifacts": [artifact]}
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(
            as_json(card_at(fake)),
            events(WORKING),
            events(update),
            as_json({"jsonrpc": "2.0", "id": 1, "result": ended}),
        )
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert (task["status"], task["output"]["content"]) == ("completed", "missed and new")
            methods = [each.body.get("method") for each in fake.requests]
            assert methods == [None, "SendStreamingMessage", "SubscribeToTask", "GetTask"]
        nursery.cancel_scope.cancel()


async def test_a_peer_that_subscribes_by_get_is_asked_by_get() -> None:
    """The specification says POST, its proto file GET."""
    ended = {"task": {"id": "T", "contextId": "C", "status": {"state": "TASK_STATE_COMPLETED"}}}
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        interface = {"url": f"http://127.0.0.1:{fake.port}", "protocolBinding": "HTTP+JSON", "protocolVersion": "1.0"}
        fake.plan(as_json(card_at(fake, supportedInterfaces=[interface])))
        fake.plan(sends(f"data: {json.dumps(WORKING)}\n\n".encode()))
        fake.plan(refuses(405), sends(f"data: {json.dumps(ended)}\n\n".encode()))
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["status"] == "completed"
            assert [(each.method, each.target) for each in fake.requests[1:]] == [
                ("POST", "/message:stream"),
                ("POST", "/tasks/T:subscribe"),
                ("GET", "/tasks/T:subscribe"),
            ]
        nursery.cancel_scope.cancel()


async def test_a_peer_that_ends_its_streams_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hector_trio.agents.remote.LONGEST_PAUSE", 0.01)
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(as_json(card_at(fake)), events(WORKING))
        fake.default = refuses(503)
        async with facing(fake) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["error"]["code"] == "remote_unavailable"
            methods = [each.body.get("method") for each in fake.requests]
            assert methods[-1] == "CancelTask"
            assert methods.count("SubscribeToTask") == 9
        nursery.cancel_scope.cancel()


# --- credentials and the card -----------------------------------------------------------------------------------------


async def test_credentials_go_to_the_agent_and_to_nobody_else() -> None:
    async with trio.open_nursery() as nursery:
        fake, other = await serve_fake_model(nursery), await serve_fake_model(nursery)
        answer = events({"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "ok"}]}})
        fake.plan(as_json(card_at(fake)), answer)
        async with facing(fake, token=TOKEN, headers={"X-Key": "k1"}) as near, near.client() as client:
            await client.post("/agents/a/tasks", json={"input": {"content": "x"}})
        for exchange in fake.requests:
            assert (exchange.headers["authorization"], exchange.headers["x-key"]) == (f"Bearer {TOKEN}", "k1")
        fake.plan(as_json(card_at(other)))
        other.plan(answer)
        async with facing(fake, token=TOKEN, headers={"X-Key": "k1"}) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["status"] == "completed"
        assert not {"authorization", "x-key"} & set(other.requests[0].headers)
        nursery.cancel_scope.cancel()


async def test_a_secured_agent_takes_our_token_and_no_other() -> None:
    far = settings_of(auth={"tokens": [{"name": "near", "token": TOKEN}]})
    async with serving(far, agents(a=speak)) as there:
        for token, end in ((TOKEN, "completed"), (None, "failed"), ("x" * 20, "failed")):
            remote = {"a": {"type": "a2a", "url": f"{there.url}/a2a/a", "token": token}}
            async with serving(settings_of(agents=remote)) as here, here.client() as client:
                task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
                assert task["status"] == end
                if end == "failed":
                    assert task["error"]["code"] == "remote_unauthorized"
                    assert "x" * 20 not in json.dumps(task)


async def test_a_card_is_fetched_once_and_asked_for_again_by_its_tag() -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        answer = events({"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "ok"}]}})
        card = json.dumps(card_at(fake)).encode()

        def card_with(age: int) -> Any:
            return sends(card, "application/json", {"ETag": '"1"', "Cache-Control": f"public, max-age={age}"})

        unchanged = refuses(304, body=b"", headers={"ETag": '"1"', "Cache-Control": "max-age=1000"})
        fake.plan(card_with(0), answer, refuses(500), answer)
        async with facing(fake) as near, near.client() as client:
            for _ in range(2):
                await client.post("/agents/a/tasks", json={"input": {"content": "x"}})
            assert [each.method for each in fake.requests] == ["GET", "POST", "GET", "POST"]  # the old one still counts
            assert fake.requests[2].headers["if-none-match"] == '"1"'
        fake.plan(card_with(0), answer, unchanged, answer, answer)
        async with facing(fake) as near, near.client() as client:
            for _ in range(3):
                await client.post("/agents/a/tasks", json={"input": {"content": "x"}})
            assert [each.method for each in fake.requests[4:]] == ["GET", "POST", "GET", "POST", "POST"]
        nursery.cancel_scope.cancel()


async def test_the_card_may_stand_where_its_server_has_it() -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        answer = events({"message": {"messageId": "m", "role": "ROLE_AGENT", "parts": [{"text": "ok"}]}})
        fake.plan(refuses(404), as_json(card_at(fake)), answer)
        settings = {"a": {"type": "a2a", "url": f"http://127.0.0.1:{fake.port}/deep/rpc"}}
        async with serving(settings_of(agents=settings)) as near, near.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["status"] == "completed"
            assert [each.target for each in fake.requests[:2]] == [
                "/deep/rpc/.well-known/agent-card.json",
                "/.well-known/agent-card.json",
            ]
        nursery.cancel_scope.cancel()


async def test_a_chain_of_servers_passes_on_what_the_last_one_says() -> None:
    async with serving(settings_of(), agents(a=speak)) as last:
        one = {"b": {"type": "a2a", "url": f"{last.url}/a2a/a"}}
        async with serving(settings_of(agents=one)) as middle:
            two = {"c": {"type": "a2a", "url": f"{middle.url}/a2a/b"}}
            async with serving(settings_of(agents=two)) as first, first.client() as client:
                task = (await client.post("/agents/c/tasks", json={"input": {"content": "hi"}})).json()
                assert task["output"]["content"] == "You said: hi"


async def test_a_server_without_agents_elsewhere_imports_no_http_client() -> None:
    code = "import sys, hector_trio.server; print({'httpx2', 'httpcore2'} & set(sys.modules))"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout.decode().strip() == "set()"
