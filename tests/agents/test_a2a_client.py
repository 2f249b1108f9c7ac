"""The official SDK's server as a remote agent of ours: both bindings, both dialects, and without streaming."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.agents.a2a_client import age_of, card_urls
from tests.cutting import Wire, wire_to
from tests.fake_model import Exchange, sends, serve_fake_model
from tests.serving import Served, serving, settings_of
from tests.sockets import connected

AGENTS = ["rpc", "http", "rpc03", "http03", "plain"]


@pytest.fixture(scope="module")
def sdk() -> Iterator[str]:
    """The address of the server; it ends with the tests of this file."""
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen([sys.executable, "-m", "tests.agents.sdk_server"], stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
    finally:
        process.terminate()
        process.wait(5)
        if process.stdout is not None:
            process.stdout.close()


@asynccontextmanager
async def facing(sdk: str) -> AsyncIterator[tuple[Served, httpx2.AsyncClient]]:
    remote = {name: {"type": "a2a", "url": f"{sdk}/{name}"} for name in AGENTS}
    async with serving(settings_of(agents=remote)) as server, server.client() as client:
        yield server, client


async def ask(client: httpx2.AsyncClient, agent: str, text: str, **more: Any) -> Any:
    answer = await client.post(f"/agents/{agent}/tasks", json={"input": {"content": text}, **more})
    return answer.json()


@pytest.mark.parametrize("agent", AGENTS)
async def test_an_answer_of_the_sdk_comes_through(sdk: str, agent: str) -> None:
    async with facing(sdk) as (_, client):
        task = await ask(client, agent, "say it", taskId="t")
        assert task["status"] == "completed", task
        chunks = (await client.get(f"/agents/{agent}/tasks/t/events")).json()["chunks"]
        assert "".join(each["content"] for each in chunks if each["chunkType"] == "text") == "You said: say it"
        picture = next(each for each in chunks if each.get("mediaType") == "image/png")
        assert picture["artifact"]["name"] == "Picture"
        if agent != "http03":  # there the SDK encodes bytes twice
            assert picture["content"] == "AP8="
        statuses = [each["content"] for each in chunks if each["chunkType"] == "metadata"]
        if agent != "plain":
            assert {"status": "working", "message": "thinking"} in statuses


@pytest.mark.parametrize("agent", AGENTS)
async def test_other_ends_come_through_too(sdk: str, agent: str) -> None:
    async with facing(sdk) as (_, client):
        bare = await ask(client, agent, "message")
        assert (bare["status"], bare["output"]["content"]) == ("completed", "a bare message")
        last = await ask(client, agent, "last")
        assert (last["status"], last["output"]["content"]) == ("completed", "last words")
        for text, code, message in (("fail", "remote_failed", "broken"), ("reject", "rejected", "not mine")):
            task = await ask(client, agent, text)
            assert (task["status"], task["error"]["code"], task["error"]["message"]) == ("failed", code, message)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(("text", "question"), [("ask", "Which?"), ("auth", "Log in")])
async def test_a_question_of_the_sdk_is_answered(sdk: str, agent: str, text: str, question: str) -> None:
    async with facing(sdk) as (_, client):
        task = await ask(client, agent, text, taskId="t")
        assert (task["status"], task["prompt"]) == ("input_required", question)
        answered = await client.post(f"/agents/{agent}/tasks/t/input", json={"input": {"content": "this"}})
        assert (answered.json()["status"], answered.json()["output"]["content"]) == ("completed", "answered this")


@pytest.mark.parametrize("agent", AGENTS)
async def test_a_cancel_reaches_the_sdk(sdk: str, agent: str) -> None:
    text = f"wait {agent}"
    async with facing(sdk) as (server, client), connected(server, agent) as peer:
        await peer.ask(text, taskId="t")
        while (await peer.read())["content"] != "waiting ":
            pass
        await peer.send({"type": "cancel", "taskId": "t"})
        assert (await peer.read_to_final())[-1]["status"] == "cancelled"
        assert (await client.get(f"{sdk}/ended/{agent}")).status_code == 200


@asynccontextmanager
async def wired(sdk: str) -> AsyncIterator[tuple[Served, Wire]]:
    """As ``facing``, with a wire before the SDK: its cards are changed on their way to name that."""
    async with wire_to(("127.0.0.1", int(sdk.rpartition(":")[2]))) as wire, trio.open_nursery() as nursery:

        async def behave(exchange: Exchange) -> None:
            async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
                card = (await client.get(sdk + exchange.target)).text
            await sends(card.replace(sdk, wire.url).encode(), "application/json")(exchange)

        fake = await serve_fake_model(nursery)
        fake.default = behave
        remote = {name: {"type": "a2a", "url": f"http://127.0.0.1:{fake.port}/{name}"} for name in AGENTS}
        async with serving(settings_of(agents=remote)) as server:
            yield server, wire
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("agent", AGENTS)
async def test_a_stream_of_the_sdk_is_taken_up_after_a_cut(sdk: str, agent: str) -> None:
    async with wired(sdk) as (server, wire), connected(server, agent) as peer:
        await peer.ask("count")
        frames = []
        for how in ("rst", "fin"):
            frames.append(await peer.read())
            wire.cut(how)
        frames += await peer.read_to_final()
        assert frames[-1]["status"] == "completed", frames[-1]
        texts = "".join(frame["content"] for frame in frames if frame["chunkType"] == "text")
        assert texts == "".join(f"{number} " for number in range(10))


async def test_a_session_is_one_context_of_the_sdk(sdk: str) -> None:
    async with facing(sdk) as (_, client):
        session = (await client.post("/sessions", json={"agentId": "rpc"})).json()["sessionId"]
        for _ in range(2):
            task = (await client.post(f"/sessions/{session}/tasks", json={"input": {"content": "x"}})).json()
            assert task["status"] == "completed"
        state = (await client.get(f"/sessions/{session}")).json()["state"]
        assert set(state["a2a"]) == {"rpc"}


# --- without a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "places"),
    [
        ("https://x.example/cards/a.json", ["https://x.example/cards/a.json"]),
        ("https://x.example", ["https://x.example/.well-known/agent-card.json"]),
        (
            "https://x.example:8443/a/b/",
            [
                "https://x.example:8443/a/b/.well-known/agent-card.json",
                "https://x.example:8443/.well-known/agent-card.json",
            ],
        ),
    ],
)
def test_where_a_card_is_looked_for(url: str, places: list[str]) -> None:
    assert card_urls(url) == places


@pytest.mark.parametrize(
    ("header", "age"),
    [
        ("", 300),
        ("max-age=7", 7),
        ("public, Max-Age=7", 7),
        ("s-maxage=9, max-age=7", 7),
        ("no-store, max-age=7", 0),
        ("no-cache", 0),
        ("max-age=999999999", 86400),
        ("max-age=x", 300),
    ],
)
def test_how_long_a_card_counts(header: str, age: float) -> None:
    assert age_of(httpx2.Headers({"Cache-Control": header} if header else {})) == age
