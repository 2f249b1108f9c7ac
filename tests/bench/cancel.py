"""``python -m tests.bench.cancel``: from a client's leaving to the close of the model's connection, idle and busy.

The server is a process of its own, with a real (loopback) model's server behind it, which stands in this process and
notes when it sees the close. Busy: 100 streams of 40 words a second each, read by a third process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.bench.__main__ import connect_to, text_frame
from tests.fake_model import FakeModel, serve_fake_model, silent, stalls
from tests.sockets import connect_raw

CONFIG = """
llms:
  model: {{type: openai, model: any, base_url: "{base_url}", api_key: unused-but-needed}}
  demo: {{type: demo, words_per_second: 40}}
agents:
  a: {{llm: model}}
  busy: {{llm: demo}}
store: {{url: "{store}"}}
"""


@contextmanager
def started(command: list[str], folder: str) -> Iterator[str]:
    """The server's URL."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(line.split()[1] for line in process.stdout if "listening" in line)
        finally:
            process.kill()


def read_streams(port: int, count: int) -> None:
    """Reads ``count`` busy streams until killed."""
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            sock = connect_to(port, "busy")
            sock.sendall(text_frame(json.dumps({"input": {"content": "Count to 100000"}})))
            selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.recv(65536)


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


async def measure(fake: FakeModel, url: str, cuts: int) -> dict[str, float]:
    times = sorted([await cut(fake, url, n) for n in range(cuts)])
    return {
        "p50_ms": round(times[len(times) // 2] * 1000, 2),
        "p99_ms": round(times[int(len(times) * 0.99)] * 1000, 2),
        "max_ms": round(times[-1] * 1000, 2),
    }


async def main(cuts: int, streams: int) -> None:
    results = {}
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        for store in ("memory", "hector.db"):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.yaml").write_text(CONFIG.format(base_url=fake.base_url, store=store))
                command = [sys.executable, "-m", "hector_trio", "serve", "--config", "config.yaml", "--port", "0"]
                with started(command, folder) as url:
                    results[f"{store}, idle"] = await measure(fake, url, cuts)
                    port = int(url.rpartition(":")[2])
                    reader = multiprocessing.get_context("spawn").Process(target=read_streams, args=(port, streams))
                    reader.start()
                    await trio.sleep(3)  # the readers' processes start, the streams flow
                    results[f"{store}, {streams} busy streams"] = await measure(fake, url, cuts)
                    reader.kill()
                    reader.join()
        nursery.cancel_scope.cancel()
    for name, figures in results.items():
        print(f"{name:32}", *(f"{key} {value:8.2f}" for key, value in figures.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=100)
    options = parser.parse_args()
    trio.run(main, options.cuts, options.streams)
