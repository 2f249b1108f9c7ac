"""``hector info | call | chat`` with the URL of an A2A agent, as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
import trio

from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.errors import RunError
from tests.engines import Steered
from tests.serving import serving, settings_of
from tests.test_cli import CLEAN, HECTOR, hector, running


async def speak(ctx: Context) -> None:
    if ctx.text == "fail":
        raise RunError("x", "Nothing left")
    if ctx.text == "ask" and ctx.resume is None:
        await ctx.emit_text("Let me see. ")
        await ctx.ask("Which day?")
    if ctx.resume is not None:
        await ctx.emit_text(f"Booked {ctx.resume.answer}.")
        return
    await ctx.emit_text(f"You said: {ctx.text}, after {len(ctx.history)}")
    await ctx.emit_data({"n": 1})


def agents(function: Any = speak) -> dict[str, Agent]:
    return {"a": FunctionAgent(AgentInfo("a", "Speaker", "Says it again"), function)}


async def test_info_shows_the_card_of_any_a2a_agent() -> None:
    async with serving(agents=agents()) as server:
        done = await hector("info", f"{server.url}/a2a/a")
        assert (done.code, done.err) == (0, "")
        assert "name: Speaker\n" in done.out
        assert "description: Says it again\n" in done.out
        card = json.loads((await hector("info", f"{server.url}/a2a/a", "--json")).out)
        assert card["supportedInterfaces"][0]["url"] == f"{server.url}/a2a/a"


@pytest.mark.parametrize("flags", [(), ("--stream",)])
async def test_call_prints_the_answer_and_nothing_else(flags: tuple[str, ...]) -> None:
    async with serving(agents=agents()) as server:
        done = await hector("call", f"{server.url}/a2a/a", "hi", *flags)
        assert (done.code, done.out, done.err) == (0, 'You said: hi, after 0\n{"n":1}\n', "")


async def test_call_in_json_is_a_task_or_its_chunks() -> None:
    async with serving(agents=agents()) as server:
        task = json.loads((await hector("call", f"{server.url}/a2a/a", "hi", "--json")).out)
        assert (task["status"], task["output"]["content"]) == ("completed", "You said: hi, after 0")
        assert task["metadata"]["contextId"]
        lines = (await hector("call", f"{server.url}/a2a/a", "hi", "--json", "--stream")).out.splitlines()
        assert [json.loads(line)["chunkType"] for line in lines] == ["text", "data"]


async def test_a_failure_and_a_wrong_address_have_their_exit_codes() -> None:
    async with serving(agents=agents()) as server:
        done = await hector("call", f"{server.url}/a2a/a", "fail")
        assert (done.code, done.err) == (1, "hector: task failed: remote_failed: Nothing left\n")
        assert (await hector("info", f"{server.url}/a2a/nobody")).code in (0, 4)  # or that of the default agent
        assert (await hector("call", "http://127.0.0.1:1/x", "hi")).code == 3
        assert (await hector("call", f"{server.url}/a2a/a", "hi", "--task-id", "t")).code == 2
        assert (await hector("call", f"{server.url}/a2a/a", "hi", "--server", server.url)).code == 2


async def test_a_question_is_left_waiting_where_nobody_can_answer_and_answered_later() -> None:
    async with serving(agents=agents()) as server:
        url = f"{server.url}/a2a/a"
        asked = await hector("call", url, "ask", "--stream")
        assert (asked.code, asked.out) == (5, "Let me see. \n")
        assert "the agent asks: Which day?" in asked.err
        command = asked.err.strip().splitlines()[-1].split(": hector ")[1]
        words = command.removesuffix(' "..."').split()
        done = await hector(*words, "Monday")
        assert (done.code, done.out) == (0, "Let me see. Booked Monday.\n")


async def test_a_token_is_sent_where_one_is_given() -> None:
    secured = settings_of(auth={"tokens": [{"name": "me", "token": "me-0123456789abcdef"}]})
    async with serving(secured, agents()) as server:
        url = f"{server.url}/a2a/a"
        done = await hector("call", url, "hi")
        assert (done.code, "remote_unauthorized" in done.err) == (1, True)
        assert (await hector("call", url, "hi", "--token", "me-0123456789abcdef")).code == 0
        assert (await hector("call", url, "hi", HECTOR_TOKEN="me-0123456789abcdef")).code == 0


async def test_chat_goes_on_in_one_context() -> None:
    async with serving(agents=agents()) as server:
        done = await hector("chat", f"{server.url}/a2a/a", stdin=b"one\ntwo\n")
        assert done.code == 0
        assert [line for line in done.out.splitlines() if line.startswith("You")] == [
            "You said: one, after 0",
            "You said: two, after 2",
        ]


@pytest.mark.parametrize("seconds", [None, "0.5"])
async def test_an_interrupt_and_a_timeout_cancel_the_task_there(seconds: str | None) -> None:
    steered = Steered()
    async with serving(agents=agents(steered)) as server:
        flags = ["--timeout", seconds] if seconds else []
        command = [*HECTOR, "call", f"{server.url}/a2a/a", "x", "--stream", *flags]
        async with running(command, stderr=subprocess.PIPE, env=CLEAN) as process:
            await steered.wait_started("x")
            if seconds is None:
                process.process.send_signal(signal.SIGINT)
            assert await process.wait() == (130 if seconds is None else 1)
        await steered.wait_ended("x")
        async with server.client() as client:
            (task,) = (await client.get("/agents/a/tasks")).json()["tasks"]
            with trio.fail_after(5):
                row = await server.engine.store.get_task("local", "a", task["taskId"])
                assert row is not None
                assert (await server.engine.wait(row)).status == "cancelled"
