"""Other people's programs and the server: Node, with and without its own WebSocket; npm's eventsource; websocat."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.interop.browser_checks import check_whole, log_of, submit, text_of
from tests.interop.web import wire_to
from tests.seed import snippets as seed
from tests.seed.process import REPOSITORY, Home

NODES = os.environ.get("INTEROP_NODES", "none").split(os.pathsep)
"""Programs; at least one with the global WebSocket of Node 22."""

# Before Node 22 there is no global WebSocket: npm's `ws` takes its place, as in a page's build.
PRELOAD = """
import {WebSocket} from 'ws';
globalThis.WebSocket ??= WebSocket;
"""


def node_version(home: Home, node: str) -> int:
    return int(home.run([node, "-p", "parseInt(process.versions.node)"]))


def run_module(home: Home, node: str, packages: Path, name: str, text: str) -> str:
    (packages / name).write_text(text)
    (packages / "preload.mjs").write_text(PRELOAD)
    preload = [] if node_version(home, node) >= 22 else ["--import", str(packages / "preload.mjs")]
    return home.run([node, *preload, str(packages / name)])


def test_one_node_has_a_websocket_of_its_own_and_one_has_not(home: Home) -> None:
    versions = [node_version(home, node) for node in NODES]
    assert max(versions) >= 22
    assert min(versions) >= 20


@pytest.mark.parametrize("node", NODES, ids=lambda node: Path(node).parts[-3] if "/" in node else node)
class TestNode:
    def test_the_streaming_snippet_runs_twice(self, home: Home, server: str, packages: Path, node: str) -> None:
        snippet = seed.at(seed.snippet(seed.STREAMING_FLOW), server.removeprefix("http://"))
        for prompt, word in (("Explain quantum computing", "qubit"), ("What are AI agents?", "goal")):
            text = snippet.replace("Explain quantum computing", prompt)
            said = run_module(home, node, packages, "streaming.mjs", text)
            assert said.startswith("Chunk: {\n  taskId: 'task-123',")
            assert said.endswith("Task complete!\n")
            assert word in text_of(log_of(server, "task-123"))

    def test_the_combined_snippet_runs_twice_and_ends(self, home: Home, server: str, packages: Path, node: str) -> None:
        """The snippet leaves its socket open: Node ends because the server closes it."""
        snippet = seed.at(seed.snippet(seed.COMBINED), server.removeprefix("http://"))
        for prompt, words in (("Hello!", ["Hello!", "demo:"]), ("My name is Zoe", ["Hello", "Zoe,"])):
            lines = run_module(home, node, packages, "combined.mjs", snippet.replace("Hello!", prompt)).split()
            assert set(words) <= set(lines)

    def test_the_example_remembers(self, home: Home, server: str, packages: Path, node: str) -> None:
        shutil.copy(REPOSITORY / "examples" / "node_client.mjs", packages)
        said = home.run([node, str(packages / "node_client.mjs"), server])
        assert "agent: Your name is Alice." in said
        assert "3 examples of AI agents" in said
        assert "\n8 messages in session " in said

    def test_an_event_source_of_npm_stops_at_the_end(self, home: Home, server: str, packages: Path, node: str) -> None:
        task_id = submit(server, "Count to 100")
        path = f"/agents/assistant/tasks/{task_id}/events"
        with wire_to(server) as wire:
            script = f"""
                import {{EventSource}} from 'eventsource';
                const source = new EventSource('{wire.url}{path}');
                const chunks = [];
                source.onmessage = (event) => chunks.push({{...JSON.parse(event.data), id: event.lastEventId}});
                source.onerror = () => {{
                  if (source.readyState === EventSource.CLOSED) console.log(JSON.stringify(chunks));
                }};
            """
            chunks: list[dict[str, Any]] = json.loads(run_module(home, node, packages, "events.mjs", script))
            check_whole(chunks)
            assert wire.requests == [(path, None), (path, chunks[-1]["id"])]
            assert wire.statuses == [200, 204]


# --- websocat ---------------------------------------------------------------------------------------------------------


def line_of(server: str) -> str:
    line = seed.commands(seed.snippet(seed.TEST_STREAMING))[-1]
    return seed.at(line, server.removeprefix("http://"))


def test_websocat_that_stays_reads_the_answer(home: Home, server: str, websocat: str) -> None:
    for prompt in ("Hello", "My name is Zoe"):
        said = home.shell(line_of(server).replace("websocat ", f"{websocat} -n ").replace("Hello", prompt))
        chunks = [json.loads(line) for line in said.splitlines()]
        assert prompt.split()[-1] in text_of(chunks)
        assert chunks[-1]["status"] == "completed"


def test_websocat_that_closes_at_the_end_of_its_input_has_left(home: Home, server: str, websocat: str) -> None:
    url = f"{server}/agents/assistant/tasks"

    def ids() -> set[str]:
        tasks = httpx2.get(url, params={"pageSize": 100}, trust_env=False).json()["tasks"]
        return {task["taskId"] for task in tasks}

    before = ids()
    home.shell(line_of(server).replace("websocat ", f"{websocat} ").replace("Hello", "Count to 100000"))
    assert all(log_of(server, task_id)[-1]["status"] == "cancelled" for task_id in ids() - before)
