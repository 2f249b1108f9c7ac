"""Ends that nobody asked for: kill -9, a second signal, a client that does not read. Real processes, real signals."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from tests.sockets import RawPeer, connect_raw
from tests.test_cli import Running, served

CONFIG = """
llms:
  demo: {type: demo, words_per_second: 400}
agents:
  assistant: {llm: demo}
"""


def serve(folder: Path, *flags: str) -> Any:
    (folder / "config.yaml").write_text(CONFIG)
    return served(folder, "--config", "config.yaml", *flags)


def received(peer: RawPeer) -> list[dict[str, Any]]:
    """Every complete chunk among the bytes that have arrived."""
    chunks = []
    decoder = json.JSONDecoder()
    text = peer.received.decode(errors="replace")
    start = text.find('{"taskId"')
    while start >= 0:
        try:
            chunk, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            break
        chunks.append(chunk)
        start = text.find('{"taskId"', end)
    return chunks


async def kill(process: Running) -> None:
    process.process.send_signal(signal.SIGKILL)
    with trio.fail_after(10):
        await process.process.wait()


@pytest.mark.parametrize("seed", range(3))
async def test_after_kill_9_every_chunk_a_client_received_is_there_and_every_task_ends(
    tmp_path: Path, seed: int
) -> None:
    when = random.Random(seed)
    peers: list[RawPeer] = []
    async with trio.open_nursery() as nursery:
        async with serve(tmp_path) as (process, url):
            for n in range(8):
                peer = await connect_raw(url)
                peers.append(peer)
                await peer.ask("Count to 100000", taskId=f"t{n}", onDisconnect=("cancel", "continue")[n % 2])
                nursery.start_soon(peer.read_on)
            for peer in peers:
                await peer.wait_for(f'"content":"{when.randrange(5, 120)} "'.encode())
            await kill(process)
    seen = {f"t{n}": received(peer) for n, peer in enumerate(peers)}
    for peer in peers:
        await peer.stream.aclose()
    with sqlite3.connect(tmp_path / ".hector" / "hector.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    async with serve(tmp_path) as (_, url), httpx2.AsyncClient(base_url=url, timeout=30) as client:
        for task_id, chunks in seen.items():
            assert len(chunks) >= 5
            task = (await client.get(f"/agents/assistant/tasks/{task_id}")).json()
            assert (task["status"], task["error"]["code"]) == ("failed", "interrupted")
            stored: list[dict[str, Any]] = []
            while not stored or not stored[-1]["final"]:
                path = f"/agents/assistant/tasks/{task_id}/events?pageSize=100&after={len(stored)}"
                stored += (await client.get(path)).json()["chunks"]
            assert [chunk["seq"] for chunk in stored] == list(range(1, len(stored) + 1))
            assert stored[: len(chunks)] == chunks


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
