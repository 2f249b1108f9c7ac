"""Ends that nobody asked for: kill -9, a second signal, a client that does not read. Real processes, real signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from tests.crashes import torment
from tests.sockets import connect_raw
from tests.test_cli import Running, served

CONFIG = """
llms:
  demo: {type: demo, words_per_second: 400}
agents:
  assistant: {llm: demo}
"""


SERIES = 25
"""Kills of one store."""
ROUNDS = int(os.environ.get("CRASH_ROUNDS", 8))


def serve(folder: Path, *flags: str) -> Any:
    (folder / "config.yaml").write_text(CONFIG)
    return served(folder, "--config", "config.yaml", *flags)


async def kill(process: Running) -> None:
    process.process.send_signal(signal.SIGKILL)
    with trio.fail_after(10):
        await process.process.wait()


@pytest.mark.parametrize("seed", range(max(1, ROUNDS // SERIES)))
async def test_a_kill_9_at_any_moment_takes_back_nothing_that_a_client_was_told(tmp_path: Path, seed: int) -> None:
    found = await torment(tmp_path, min(ROUNDS, SERIES), seed)
    assert found["tasks"] > ROUNDS
    assert found["messages"] > ROUNDS


async def test_after_kill_9_accepted_tasks_that_had_not_begun_run_in_order(tmp_path: Path) -> None:
    async with serve(tmp_path) as (process, url), httpx2.AsyncClient(base_url=url, timeout=30) as client:
        session = (await client.post("/sessions", json={"agentId": "assistant"})).json()["sessionId"]
        for prompt in ("Count to 100000", "My name is Alice", "My name is Bob", "What is my name?"):
            answer = await client.post(
                f"/sessions/{session}/tasks",
                json={"input": {"content": prompt}},
                headers={"Prefer": "respond-async"},
            )
            assert answer.status_code == 202
        while not (await client.get(f"/sessions/{session}/messages")).json()["messages"]:
            pass
        await kill(process)
    async with serve(tmp_path) as (_, url), httpx2.AsyncClient(base_url=url, timeout=30) as client:
        with trio.fail_after(20):
            while True:
                tasks = (await client.get(f"/sessions/{session}/tasks")).json()["tasks"]
                if all(task["status"] in ("completed", "failed") for task in tasks):
                    break
        assert [task["status"] for task in tasks] == ["completed"] * 3 + ["failed"]
        messages = (await client.get(f"/sessions/{session}/messages")).json()["messages"]
        users = [message["content"] for message in messages if message["role"] == "user"]
        assert users == ["Count to 100000", "My name is Alice", "My name is Bob", "What is my name?"]
        assert "Bob" in messages[-1]["content"]


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path, "--shutdown-grace", "60") as (process, url):
        peer = await connect_raw(url)
        await peer.ask("Count to 100000")
        await peer.wait_for(b'"content":"5 "')
        process.process.send_signal(signal.SIGTERM)
        async with httpx2.AsyncClient(base_url=url, timeout=10) as client:
            while (await client.get("/health/ready")).status_code == 200:
                pass
            refused = await client.post("/agents/assistant/tasks", json={"input": {"content": "x"}})
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
            assert (await client.get("/health/live")).status_code == 200
        process.process.send_signal(signal.SIGTERM)
        with trio.fail_after(2):
            assert await process.process.wait() not in (0, None)
        await peer.stream.aclose()


async def test_a_client_that_has_stopped_reading_does_not_hold_up_the_end(tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    fast = CONFIG.replace("400", "0")
    (tmp_path / "fast" / "config.yaml").write_text(fast)
    async with served(tmp_path / "fast", "--config", "config.yaml", "--shutdown-grace", "0.5") as (process, url):
        peer = await connect_raw(url, receive_buffer=4096)
        await peer.ask("Count to 20000", onDisconnect="continue")
        async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
            while True:  # the task has ended, and most of it waits for a viewer that does not read
                tasks = (await client.get("/agents/assistant/tasks")).json()["tasks"]
                if tasks and tasks[0]["status"] == "completed":
                    break
        process.process.send_signal(signal.SIGTERM)
        with trio.fail_after(10):
            assert await process.process.wait() == 0
        await peer.stream.aclose()
