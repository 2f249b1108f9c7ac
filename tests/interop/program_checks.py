"""Other people's programs and the server: Node, with and without its own WebSocket; npm's eventsource; websocat."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.interop.browser_checks import check_whole, log_of, submit, text_of
from tests.interop.web import wire_to
from tests.seed import snippets as seed
from tests.seed.process import LIMIT, REPOSITORY, Home, Output

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
    return home.run(module(home, node, packages, name, text))


def module(home: Home, node: str, packages: Path, name: str, text: str) -> list[str]:
    """The command that runs a module with the example's client beside it."""
    shutil.copy(REPOSITORY / "examples" / "hector.js", packages)
    (packages / name).write_text(text)
    (packages / "preload.mjs").write_text(PRELOAD)
    preload = [] if node_version(home, node) >= 22 else ["--import", str(packages / "preload.mjs")]
    return [node, *preload, str(packages / name)]


def check_exact(chunks: list[dict[str, Any]]) -> None:
    reached = 0
    for chunk in chunks:
        assert chunk.get("firstSeq", chunk["seq"]) == reached + 1
        reached = chunk["seq"]
    assert [chunk["final"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


ASKER = """
async def ask(ctx):
    if ctx.resume is None:
        await ctx.ask("Your name?", saved=1)
    if ctx.resume.saved == 1:
        await ctx.ask({"question": f"{ctx.resume.answer}, your age?"}, saved=2)
    await ctx.emit_bytes(bytes(range(256)), "image/png")
    await ctx.emit_text(str(ctx.resume.answer))
"""


def serving_asker(home: Home, port: int = 0) -> AbstractContextManager[str]:
    """A server of ``assistant`` and ``asker``, over the data that the last one in this home has left."""
    (home.folder / "asker.py").write_text(ASKER)
    config = {
        "server": {"port": port, "shutdown_grace": 0.1},
        "llms": {"demo": {"type": "demo", "words_per_second": 400}},
        "agents": {"assistant": {"llm": "demo"}, "asker": {"type": "python", "function": "asker.py:ask"}},
    }
    (home.folder / "asker.yaml").write_text(json.dumps(config))
    return home.serving(["hector", "serve", "--config", "asker.yaml"])


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

    def test_the_client_mends_a_stream_that_is_cut(self, home: Home, server: str, packages: Path, node: str) -> None:
        script = """
            import {Hector} from './hector.js';
            const stream = new Hector('%s').stream('assistant', 'Count to 600');
            for await (const chunk of stream) console.log(JSON.stringify(chunk));
        """
        with wire_to(server) as wire:
            # In the handshake, before its end, in the middle of a chunk, and after the answer to an attach.
            wire.cuts += [20, 4000, 3000, 100, 130, 180, 300, 5000, 0, 12_345, 230]
            said = run_module(home, node, packages, "cuts.mjs", script % wire.url)
            chunks = [json.loads(line) for line in said.splitlines()]
            check_exact(chunks)
            assert text_of(chunks) == " ".join(str(n) for n in range(1, 601))
            assert not wire.cuts
        task_id = chunks[0]["taskId"]
        tasks = httpx2.get(f"{server}/agents/assistant/tasks", params={"pageSize": 100}, trust_env=False).json()[
            "tasks"
        ]
        assert [task["status"] for task in tasks if task["taskId"].startswith(task_id)] == ["completed"]

    def test_an_upload_of_tus_js_client_survives_cuts_and_resumes(
        self, home: Home, server: str, packages: Path, node: str
    ) -> None:
        data = os.urandom(8_000_000)
        (packages / "data.bin").write_bytes(data)
        script = """
            import {readFileSync} from 'node:fs';
            import {Upload} from 'tus-js-client';
            const [endpoint, file] = ['%s/uploads', readFileSync('%s')];
            const options = {endpoint, metadata: {filename: 'data.bin'}, retryDelays: Array(20).fill(20)};
            // In chunks, over a wire that is cut again and again.
            const url = await new Promise((resolve, reject) => {
              const upload = new Upload(file, {...options, chunkSize: 1e6, onError: reject,
                onSuccess: () => resolve(upload.url)});
              upload.start();
            });
            // In one, aborted in the middle, and resumed by another.
            const first = await new Promise((resolve, reject) => {
              const upload = new Upload(file, {...options, uploadSize: file.length, onError: reject,
                onProgress: async (sent) => { if (sent > 1e6) { await upload.abort(); resolve(upload.url); } },
                onSuccess: () => resolve(upload.url)});
              upload.start();
            });
            await new Promise((resolve, reject) => new Upload(file, {...options, uploadUrl: first, onError: reject,
              onSuccess: resolve}).start());
            console.log(JSON.stringify([url, first]));
        """
        with wire_to(server) as wire:
            wire.cuts += [1500, 700, 40, 2500, 900, 0]
            said = run_module(home, node, packages, "upload.mjs", script % (wire.url, packages / "data.bin"))
            assert not wire.cuts
        for url in json.loads(said):
            (stored,) = home.folder.rglob(f"{url.rpartition('/')[2]}.data")
            assert stored.read_bytes() == data

    def test_the_client_goes_on_after_a_restart(self, tmp_path: Path, packages: Path, node: str) -> None:
        home = Home(tmp_path / "home")
        script = """
            import {Hector} from './hector.js';
            const hector = new Hector('%s');
            const asks = hector.stream('asker', 'x', {binary: true});
            await asks.next();
            console.log(asks.status, asks.prompt);
            await hector.stream('assistant', 'Count to 100000').each((chunk) => console.log(JSON.stringify(chunk)));
            await asks.answer('Zoe');
            await asks.next();
            console.log(asks.status, JSON.stringify(asks.prompt));
            await asks.answer(7);
            for await (const {content, seq} of asks) console.log(seq, content.length, String(content).slice(0, 8));
            console.log(asks.status);
        """
        with serving_asker(home) as url:
            port = int(url.rpartition(":")[2])
            process = home.start(module(home, node, packages, "restart.mjs", script % url))
            assert process.stdout is not None
            output = Output(process.stdout)
            output.find('"content":"(40) "')
        with process, serving_asker(home, port):
            assert process.wait(LIMIT) == 0, output.rest()
        lines = output.rest().splitlines()
        assert lines[0] == "input_required Your name?"
        assert lines[-5:] == [
            'input_required {"question":"Zoe, your age?"}', "3 256 0,1,2,3,", "4 1 7", "5 0 ", "completed"
        ]  # fmt: skip
        chunks = [json.loads(line) for line in lines[1:-5]]
        check_exact(chunks)
        assert (chunks[-1]["status"], chunks[-1]["code"]) == ("failed", "interrupted")
        assert text_of(chunks).split() == [str(n) for n in range(1, len(chunks))]

    def test_leaving_a_stream_cancels_it_also_where_its_connection_is_lost(
        self, home: Home, server: str, packages: Path, node: str
    ) -> None:
        script = """
            import {Hector} from './hector.js';
            const hector = new Hector('%s');
            for (let n = 0; n < 3; n += 1) {
              const stream = hector.stream('assistant', 'Count to 100000');
              for await (const chunk of stream) if (chunk.seq > 5) break;
              console.log(stream.taskId);
            }
            const kept = hector.stream('assistant', 'Count to 20', {onDisconnect: 'cancel'});
            await kept.next();
            await kept.detach();
            console.log(kept.taskId);
        """
        with wire_to(server) as wire:
            *left, kept = run_module(home, node, packages, "leave.mjs", script % wire.url).split()
        assert [log_of(server, task_id)[-1]["status"] for task_id in left] == ["cancelled"] * 3
        assert log_of(server, kept)[-1]["status"] == "completed"

    def test_the_client_gives_up_at_the_limit_and_says_why(
        self, home: Home, server: str, packages: Path, node: str
    ) -> None:
        script = """
            import {Hector} from './hector.js';
            const tell = ({code, closeCode, message}) => console.log(JSON.stringify({code, closeCode, message}));
            const hector = new Hector('%s', {reconnectLimit: 1000});
            await hector.stream('assistant', 'Count to 1000').each(() => {}).catch(tell);
            await hector.stream('nobody', 'x').each(() => {}).catch(tell);
            await hector.stream('assistant', 'x', {sessionId: 'none'}).each(() => {}).catch(tell);
        """
        with wire_to(server) as wire:
            wire.cuts += [3000, *[0] * 20]
            process = home.start(module(home, node, packages, "limit.mjs", script % wire.url))
            assert process.stdout is not None
            output = Output(process.stdout)
            with process:
                lost = json.loads(output.find("(.*connection_failed.*)"))
                wire.cuts.clear()
                assert process.wait(LIMIT) == 0
            others = [json.loads(line)["code"] for line in output.rest().splitlines()[1:]]
            assert re.search("not mended in [01] seconds, at try [3-9]$", lost["message"])
            assert others == ["agent_not_found", "session_not_found"]

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
