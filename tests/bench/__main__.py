"""``python -m tests.bench``: chunks per second and CPU per chunk, ours with both stores against Starlette/uvicorn.

Every contestant is a process of its own; they take turns, round by round, so that a machine that drifts drifts for all.
The client is this process: it reads bytes and looks for the final chunk, nothing else. Prints a table and one line of
JSON. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

SIZE = 40
"""Characters of text in a chunk, which makes about 154 bytes of JSON."""

CONTESTANTS = {
    "hector_trio, memory": ["tests.bench.ours", "memory", "process"],
    "hector_trio, SQLite": ["tests.bench.ours", "{tmp}/process.db", "process"],
    "hector_trio, SQLite, durability full": ["tests.bench.ours", "{tmp}/full.db", "full"],
    "Starlette/uvicorn, websockets": ["tests.bench.starlette_app", "websockets"],
    "Starlette/uvicorn, websockets-sansio": ["tests.bench.starlette_app", "websockets-sansio"],
}


@contextmanager
def server(arguments: list[str]) -> Iterator[tuple[int, int]]:
    """The port and the process id."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connect_to(port: int, agent: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    sock.sendall(
        f"GET /agents/{agent}/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Upgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096)
    assert head.startswith(b"HTTP/1.1 101"), head
    return sock


def text_frame(text: str) -> bytes:
    data = text.encode()
    mask = b"\0\0\0\0"
    assert len(data) < 126
    return bytes((0x81, 0x80 | len(data))) + mask + data


def burst(port: int, pid: int, streams: int, count: int) -> tuple[float, float]:
    """Chunks per second and microseconds of the server's CPU per chunk."""
    socks = [connect_to(port, "burst") for _ in range(streams)]
    before, start = cpu_seconds(pid), time.perf_counter()
    request = text_frame(json.dumps({"input": {"content": f"{count} {SIZE}"}}))
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            sock.sendall(request)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, bytearray())
        waiting = len(socks)
        while waiting:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                assert data, "the server closed the stream"
                tail: bytearray = key.data
                tail += data
                if b'"final":true' in tail:
                    selector.unregister(key.fileobj)
                    waiting -= 1
                del tail[:-512]
    seconds = time.perf_counter() - start
    used = cpu_seconds(pid) - before
    for sock in socks:
        sock.close()
    total = streams * (count + 1)
    return total / seconds, used / total * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=50_000, help="chunks per round and contestant")
    options = parser.parse_args()
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
        running = {
            name: stack.enter_context(server([each.format(tmp=tmp) for each in arguments]))
            for name, arguments in CONTESTANTS.items()
        }
        for round_number in range(options.rounds + 1):
            for streams in (1, 100):
                for name, (port, pid) in running.items():
                    figures = burst(port, pid, streams, options.chunks // streams)
                    if round_number:  # the first warms up
                        results.setdefault(name, {}).setdefault(str(streams), []).append(figures)
    best = {
        streams: min(
            statistics.median(cpu for _, cpu in figures[streams])
            for name, figures in results.items()
            if name.startswith("Starlette")
        )
        for streams in ("1", "100")
    }
    print(f"{'':40}{'1 stream':>34}{'100 streams':>34}")
    print(f"{'':40}" + f"{'chunks/s':>12}{'us/chunk':>11}{'ratio':>11}" * 2)
    table = {}
    for name, by_streams in results.items():
        line = f"{name:40}"
        for number, measured in by_streams.items():
            rate = statistics.median(rate for rate, _ in measured)
            cpu = statistics.median(cpu for _, cpu in measured)
            line += f"{rate:12,.0f}{cpu:11.1f}{best[number] / cpu:10.2f}x"
            table[f"{name}, {number}"] = {"chunks_per_second": rate, "cpu_us": cpu, "ratio": best[number] / cpu}
        print(line)
    print(
        "ratio: the better uvicorn variant's CPU per chunk, divided by the line's; medians of", options.rounds, "rounds"
    )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
