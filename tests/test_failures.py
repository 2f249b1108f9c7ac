"""Every way a model can fail, seen through REST and the WebSocket: failed, with a code, never prose in the output."""

from __future__ import annotations

import pytest
import trio

from hector_trio.config import LlmAgent, OpenAiLlm
from tests.fake_model import (
    Behaviour,
    cuts,
    hangs_up,
    refuses,
    says,
    sends,
    serve_fake_model,
    serve_silent_port,
    stalls,
)
from tests.serving import serving, settings_of
from tests.sockets import connected, raw

KEY = "sk-0123456789abcdef0123456789"


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        pytest.param(refuses(401), "model_unauthorized", id="401"),
        pytest.param(refuses(403), "model_unauthorized", id="403"),
        pytest.param(refuses(404), "model_not_found", id="404"),
        pytest.param(refuses(429), "model_rate_limited", id="429"),
        pytest.param(refuses(500), "model_error", id="500"),
        pytest.param(stalls("half"), "model_timeout", id="stalls"),
        pytest.param(cuts("half"), "model_stream_cut", id="cut"),
        pytest.param(cuts("half", reset=True), "model_stream_cut", id="reset"),
        pytest.param(hangs_up(), "model_stream_cut", id="hangs up"),
        pytest.param(sends(b"data: {nonsense\n\n"), "model_garbage", id="nonsense"),
        pytest.param(sends(b"<html>", "text/html"), "model_garbage", id="html"),
    ],
)
async def test_a_failing_model_fails_the_task_with_a_code(behaviour: Behaviour, code: str) -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(behaviour, behaviour)
        llm = OpenAiLlm(model="m", base_url=fake.base_url, api_key=KEY, max_retries=0, read_timeout=0.3)
        settings = settings_of(llms={"m": llm}, agents={"a": LlmAgent(llm="m")})
        async with serving(settings) as server, server.client() as client, connected(server, "a") as peer:
            answer = await client.post("/agents/a/tasks", json={"input": {"content": "x"}})
            assert answer.status_code == 200
            task = answer.json()
            assert (task["status"], task["error"]["code"]) == ("failed", code)
            assert task.get("output", {}).get("content", "half") == "half"
            await peer.ask("x")
            last = (await peer.read_to_final())[-1]
            assert (last["chunkType"], last["status"], last["code"]) == ("error", "failed", code)
            assert KEY not in answer.text + str(last)
        nursery.cancel_scope.cancel()


async def test_a_model_that_is_busy_is_asked_again_after_the_time_it_names() -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(refuses(429, headers={"Retry-After": "0"}), says("at ", "last"))
        llm = OpenAiLlm(model="m", base_url=fake.base_url, api_key=KEY)
        settings = settings_of(llms={"m": llm}, agents={"a": LlmAgent(llm="m")})
        async with serving(settings) as server, server.client() as client:
            task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
            assert task["output"]["content"] == "at last"
        nursery.cancel_scope.cancel()


async def test_nobody_listening_is_unreachable() -> None:
    llm = OpenAiLlm(model="m", base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0)
    settings = settings_of(llms={"m": llm}, agents={"a": LlmAgent(llm="m")})
    async with serving(settings) as server, server.client() as client:
        task = (await client.post("/agents/a/tasks", json={"input": {"content": "x"}})).json()
        assert task["error"]["code"] == "model_unreachable"


@pytest.mark.parametrize("how", ["close", "fin", "rst"])
async def test_leaving_while_the_model_is_being_connected_to_closes_that_connection(how: str) -> None:
    async with trio.open_nursery() as nursery:
        silent = await serve_silent_port(nursery)
        llm = OpenAiLlm(model="m", base_url=f"https://127.0.0.1:{silent.port}/v1", api_key=KEY)
        settings = settings_of(llms={"m": llm}, agents={"a": LlmAgent(llm="m")})
        async with serving(settings) as server, raw(server, "a") as peer:
            await peer.ask("x")
            with trio.fail_after(5):
                await silent.accepted.wait()
                await peer.leave(how)
                await silent.closed.wait()
        nursery.cancel_scope.cancel()
