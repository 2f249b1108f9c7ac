"""From a client's leaving to the close of the model's connection, idle and busy.

The server is a process of its own, with a real (loopback) model's server behind it, which stands in this process and
notes when it sees the close. Busy: many streams of 40 words a second each, read by the client.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import trio

from tests.bench.client import Client
from tests.bench.contestants import Contestant, Running
from tests.bench.starting import served
from tests.fake_model import FakeModel, serve_fake_model, silent, stalls
from tests.sockets import connect_raw

CONFIG = """
llms:
  model: {{type: openai, model: any, base_url: "{base_url}", api_key: unused-but-needed}}
  demo: {{type: demo, words_per_second: 40}}
agents:
  a: {{llm: model}}
  busy: {{llm: demo}}
"""

BUSY = json.dumps({"input": {"content": "Count to 100000"}})


async def cut(fake: FakeModel, url: str, n: int) -> float:
    """Seconds from leaving to the close as the model's server sees it; by turns before the first token and after."""
    before = len(fake.requests)
    fake.plan(silent() if n % 2 else stalls("tok"))
    peer = await connect_raw(url, "a")
    async with peer.stream:
        await peer.ask("x")
        exchange = (await fake.wait_requests(before + 1))[before]
        if not n % 2:
            await peer.wait_for(b'"tok"')
        left = trio.current_time()
        await peer.leave(("close", "fin", "rst")[n % 3])
        with trio.fail_after(5):
            await exchange.closed.wait()
        return exchange.closed_at - left


async def cut_often(fake: FakeModel, url: str, cuts: int) -> list[float]:
    """Milliseconds: p50, p99 and the longest."""
    times = sorted([await cut(fake, url, n) for n in range(cuts)])
    return [times[round((cuts - 1) * share)] * 1000 for share in (0.5, 0.99, 1)]


def measure(client: Client, contestant: Contestant, cuts: int, streams: int) -> list[float]:
    """The three figures of an idle server, then those of a busy one."""

    async def run() -> list[float]:
        async with trio.open_nursery() as nursery:
            fake = await serve_fake_model(nursery)
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.yaml").write_text(CONFIG.format(base_url=fake.base_url))
                store = contestant.command[1].format(tmp=folder)
                with served("--config", "config.yaml", "--store", store, folder=folder) as server:
                    figures = await cut_often(fake, server.url, cuts)
                    running = Running(contestant, server.port, server.pid)
                    with client.hold(running, "/agents/busy/stream", BUSY, streams):
                        figures += await cut_often(fake, server.url, cuts)
            nursery.cancel_scope.cancel()
        return figures

    return trio.run(run)
