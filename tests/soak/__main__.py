"""``python -m tests.soak``: 100,000 connect-stream-cut cycles against ``hector serve``, and what they leave behind.

Most cycles are cut in the middle of a stream; among them are stalls, resumes over both transports, detaches, graces,
questions, plain requests and sessions. Twenty times, and at the end, everything rests: then the server's Trio tasks,
descriptors, threads, connections and rows must be what they were in the first fifth, and memory and database may not
grow with the cycles. Prints the curve; ends with 1 if something has not come back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import trio

CONFIG = """
server: {{shutdown_grace: 0}}
store: {{url: {store}}}
tasks: {{retention: 0, sweep_interval: 0.5}}
limits: {{send_timeout: 0.5}}
log: {{level: error}}
agents:
  talk: {{type: python, function: "{agent}:talk"}}
  census: {{type: python, function: "{agent}:census"}}
"""

SEND_BUFFER = 16384
"""What the kernel is to hold of a stream: a viewer that does not read is noticed after a few hundred words."""
RESTS = 20
REST_LIMIT = 60
CYCLE_LIMIT = 30
GROWTH_ALLOWED = 24 << 20
"""Bytes that memory and database may have more at the end than in the first fifth. The database keeps the size of its
busiest moment, SQLite's caches (16 MB for each of five connections) follow it, and an allocator is not exact; 300 bytes
lost with every cycle would still be more by the end."""
ESTABLISHED = 1
"""The state in Linux's ``tcp_info``."""
LEAVE = struct.pack("ii", 1, 0)
UPGRADE = (
    "GET /agents/talk/stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(value: Any) -> bytes:
    """A masked text frame; the mask is zero."""
    data = json.dumps(value).encode()
    size = bytes((0x80 | len(data),)) if len(data) < 126 else struct.pack("!BH", 0x80 | 126, len(data))
    return b"\x81" + size + b"\0\0\0\0" + data


class Stream:
    """A connection of a client, and what it has received."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self.expected = b""
        self.received = bytearray()

    async def send(self, data: bytes) -> None:
        with memoryview(data) as rest:
            sent = 0
            while sent < len(data):
                sent += await self._sock.send(rest[sent:])

    async def wait_for(self, text: bytes) -> None:
        self.expected = text
        while text not in self.received:
            data = await self._sock.recv(65536)
            if not data:
                raise ConnectionError(f"closed before {text!r}: {bytes(self.received[-300:])!r}")
            self.received += data

    async def read_all(self) -> None:
        with suppress(OSError):
            while data := await self._sock.recv(65536):
                self.received += data

    async def wait_closed(self) -> None:
        """Returns when the other side has ended the connection, without reading."""
        while self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED:  # noqa: ASYNC110
            await trio.sleep(0.1)

    @property
    def last_seq(self) -> int:
        """Of the last chunk that is complete enough to have its time."""
        end = self.received.rfind(b'"timestamp"')
        at = self.received.rfind(b'"seq":', 0, end)
        return 0 if at < 0 else int(self.received[at + 6 : self.received.index(b",", at)])

    def reset_on_close(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LEAVE)


class Clients:
    """One coroutine for each kind of cycle."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self._address = (host, port)
        self._host = f"{host}:{port}"
        self._upgrade = UPGRADE.format(host=self._host).encode()
        self._random = random.Random(seed)
        self._names = 0
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self.stuck = ""
        """What the last cycle that took too long was waiting for."""
        self.slowest: defaultdict[str, float] = defaultdict(float)
        """Of each kind the longest, in seconds."""
        self._kinds: dict[Callable[[str], Awaitable[None]], int] = {
            self.cut: 60,
            self.complete: 8,
            self.resume_by_attach: 7,
            self.resume_by_events: 7,
            self.grace: 5,
            self.detach: 3,
            self.question: 4,
            self.stall: 2,
            self.plain: 2,
            self.session: 2,
        }

    async def cycle(self) -> None:
        (kind,) = self._random.choices(list(self._kinds), list(self._kinds.values()))
        self._names += 1
        name = kind.__name__
        began = trio.current_time()
        try:
            with trio.fail_after(CYCLE_LIMIT):
                await kind(f"t{self._names}")
        except (OSError, AssertionError, trio.TooSlowError) as error:
            self.failed.append(f"{name}: {error!r} {self.stuck if isinstance(error, trio.TooSlowError) else ''}")
        self.done[name] += 1
        self.slowest[name] = max(self.slowest[name], trio.current_time() - began)

    @asynccontextmanager
    async def connected(self, *, receive_buffer: int | None = None) -> AsyncIterator[Stream]:
        with trio.socket.socket() as sock:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await sock.connect(self._address)
            stream = Stream(sock)
            try:
                yield stream
            except trio.Cancelled:
                self.stuck = f"waits for {stream.expected!r}, has {bytes(stream.received[-300:])!r}"
                raise

    @asynccontextmanager
    async def websocket(self, first: Any, *, receive_buffer: int | None = None) -> AsyncIterator[Stream]:
        """With its first frame sent right behind the upgrade."""
        async with self.connected(receive_buffer=receive_buffer) as stream:
            await stream.send(self._upgrade + frame(first))
            yield stream

    @asynccontextmanager
    async def streaming(self, name: str, text: str, policy: Any = "cancel", **task: Any) -> AsyncIterator[Stream]:
        request = {"taskId": name, "input": {"content": text}, "onDisconnect": policy, **task}
        async with self.websocket(request) as stream:
            yield stream

    async def request(self, method: str, path: str, body: Any = None, *, accept: str = "*/*") -> bytes:
        """The whole response, head included."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\nAccept: {accept}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        async with self.connected() as stream:
            await stream.send(head.encode() + data)
            await stream.read_all()
            return bytes(stream.received)

    # --- cycles

    async def cut(self, name: str) -> None:
        async with self.streaming(name, "hold 3") as stream:
            await stream.wait_for(b'"word ')
            way = self._random.randrange(3)
            if way == 0:
                stream.reset_on_close()
            elif way == 1:
                await stream.send(b"\x88\x82\0\0\0\0" + struct.pack("!H", 1000))
                await stream.read_all()

    async def complete(self, name: str) -> None:
        async with self.streaming(name, "end 5") as stream:
            await stream.wait_for(b'"final":true')

    async def resume_by_attach(self, name: str) -> None:
        async with self.streaming(name, "hold 3", "continue") as stream:
            await stream.wait_for(b'"word ')
            stream.reset_on_close()
        async with self.websocket({"type": "attach", "taskId": name, "after": stream.last_seq}) as again:
            await again.wait_for(b'"ok"')
            await again.send(frame({"type": "cancel", "taskId": name}))
            await again.wait_for(b'"final":true')
            assert f'"seq":{stream.last_seq + 1},'.encode() in again.received
            assert f'"seq":{stream.last_seq},'.encode() not in again.received

    async def resume_by_events(self, name: str) -> None:
        async with self.streaming(name, "end 30", "continue") as stream:
            await stream.wait_for(b'"word ')
        path = f"/agents/talk/tasks/{name}/events?after={stream.last_seq}"
        answer = await self.request("GET", path, accept="text/event-stream")
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 404")), answer  # the sweep may have been quicker
        assert answer.startswith(b"HTTP/1.1 404") or b'"final":true' in answer

    async def grace(self, name: str) -> None:
        async with self.streaming(name, "hold 3", {"graceMs": 100}) as stream:
            await stream.wait_for(b'"word ')
        if self._random.random() < 0.5:
            async with self.websocket({"type": "attach", "taskId": name}) as again:
                await again.wait_for(b'"type"')  # also that it has gone already

    async def detach(self, name: str) -> None:
        async with self.streaming(name, "hold 3", timeoutMs=300) as stream:
            await stream.wait_for(b'"chunkType"')  # where nothing is quick, this is its end already
            await stream.send(frame({"type": "detach", "taskId": name}))
            await stream.wait_for(b'"of":"detach"')

    async def question(self, name: str) -> None:
        async with self.streaming(name, "ask 2") as stream:
            await stream.wait_for(b'"prompt"')
            if self._random.random() < 0.5:
                await stream.send(frame({"type": "input", "taskId": name, "input": {"content": "yes"}}))
                await stream.wait_for(b'"final":true')

    async def stall(self, name: str) -> None:
        """Does not read until it has been cut, then comes back for the rest."""
        request = {"taskId": name, "input": {"content": "end 1000"}, "onDisconnect": "continue"}
        async with self.websocket(request, receive_buffer=4096) as stream:
            await stream.wait_closed()
            await stream.read_all()
        assert b'"final":true' not in stream.received, "it was not cut"
        async with self.websocket({"type": "attach", "taskId": name, "after": stream.last_seq}) as again:
            await again.wait_for(b"}")
            if b'"task_not_found"' not in again.received:  # else it has been swept
                await again.wait_for(b'"final":true')

    async def plain(self, name: str) -> None:
        answer = await self.request("POST", "/agents/talk/tasks", {"taskId": name, "input": {"content": "end 3"}})
        assert b'"status":"completed"' in answer, answer

    async def session(self, name: str) -> None:
        answer = await self.request("POST", "/sessions", {"agentId": "talk"})
        session = json.loads(answer.partition(b"\r\n\r\n")[2])["sessionId"]
        async with self.streaming(name, "hold 3", "continue", context={"sessionId": session}) as stream:
            await stream.wait_for(b'"word ')
        assert (await self.request("DELETE", f"/sessions/{session}")).startswith(b"HTTP/1.1 204")


# --- the server, and what it holds ------------------------------------------------------------------------------------


class Server:
    """``hector serve``, with what can be seen of it from outside."""

    def __init__(self, pid: int, clients: Clients, database: Path | None) -> None:
        self._pid = pid
        self._clients = clients
        self._database = database
        self._started = time.monotonic()

    async def rest(self, cycles: int) -> dict[str, float]:
        """A sample once nothing runs any more and everything swept is gone, or when that takes too long."""
        began = time.monotonic()
        while True:
            sample = await self._sample(cycles)
            busy = sample["running"] + sample["websockets"] + sample["rows"] + sample["connections"] - 1
            if busy == 0 or time.monotonic() - began > REST_LIMIT:
                return sample
            await trio.sleep(0.2)

    async def _sample(self, cycles: int) -> dict[str, float]:
        metrics = (await self._clients.request("GET", "/metrics")).decode()
        gauges = {
            line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if line.startswith("hector_")
        }
        answer = await self._clients.request("POST", "/agents/census/tasks", {"input": {"content": "count"}})
        task = json.loads(answer.partition(b"\r\n\r\n")[2])
        await self._clients.request("DELETE", f"/agents/census/tasks/{task['taskId']}")
        return {
            "cycles": cycles,
            "seconds": round(time.monotonic() - self._started, 1),
            "tasks": task["output"]["content"]["tasks"],
            "objects": task["output"]["content"]["objects"],
            "descriptors": len(os.listdir(f"/proc/{self._pid}/fd")),
            "threads": task["output"]["content"]["threads"],
            "rss": self._memory("Rss:"),
            "pss": self._memory("Pss:"),
            "running": sum(value for name, value in gauges.items() if name.startswith("hector_tasks{")),
            "connections": gauges["hector_connections"],
            "websockets": gauges["hector_websockets"],
            "resets": gauges["hector_connections_reset_total"],
            "rows": await self._rows(),
            "database": gauges["hector_store_bytes"],
        }

    def _memory(self, which: str) -> int:
        return int(Path(f"/proc/{self._pid}/smaps_rollup").read_text().partition(which)[2].split()[0]) * 1024

    async def _rows(self) -> int:
        if self._database is None:
            page = (await self._clients.request("GET", "/agents/talk/tasks?pageSize=1")).partition(b"\r\n\r\n")[2]
            sessions = (await self._clients.request("GET", "/sessions?pageSize=1")).partition(b"\r\n\r\n")[2]
            return int(json.loads(page)["total"]) + int(json.loads(sessions)["total"])
        tables = ("tasks", "bodies", "segments", "sessions", "messages", "idempotency")
        with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)) as database:
            return sum(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)


@asynccontextmanager
async def served(folder: Path, store: str, seed: int) -> AsyncIterator[tuple[Server, Clients]]:
    agent = Path(__file__).with_name("agent.py")
    (folder / "config.yaml").write_text(CONFIG.format(store=store, agent=agent))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        host, port = listener.getsockname()
        command = [
            sys.executable,
            "-m",
            "hector_trio",
            "serve",
            "--config",
            "config.yaml",
            "--fd",
            str(listener.fileno()),
        ]
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with (folder / "log").open("wb") as log:
            command += ["--fd", str(listener.fileno())]
            process = await trio.lowlevel.open_process(
                command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=log, pass_fds=[listener.fileno()]
            )
    assert process.stdout is not None
    async with process.stdout:
        try:
            said = b""
            while b"listening" not in said:
                said += (more := await process.stdout.receive_some())
                assert more, (folder / "log").read_text()
            clients = Clients(host, port, seed)
            yield Server(process.pid, clients, None if store == "memory" else folder / store), clients
        finally:
            process.terminate()
            with trio.move_on_after(20, shield=True):
                await process.wait()


# --- the run ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "cycles": 9, "seconds": 9, "tasks": 7, "descriptors": 12, "threads": 9, "connections": 12, "running": 9, "rows": 7,
    "objects": 9, "rss": 9, "pss": 9, "database": 10, "resets": 8,
}  # fmt: skip


def line(sample: dict[str, float]) -> str:
    shown = ""
    for name, width in COLUMNS.items():
        value = sample[name]
        text = (
            f"{value / 2**20:.1f}M"
            if name in ("rss", "pss", "database")
            else f"{value:g}"
            if value < 1e5
            else f"{value:.0f}"
        )
        shown += text.rjust(width)
    return shown


async def run(server: Server, clients: Clients, cycles: int, at_once: int) -> list[dict[str, float]]:
    """The samples at rest: after a hundredth of the cycles, after every twentieth part, and at the end."""
    samples = []
    done = 0
    async with trio.open_nursery() as nursery:  # what the store opens when many read at once, it keeps
        for _ in range(500):
            nursery.start_soon(clients.request, "GET", "/agents/talk/tasks?pageSize=100")
    for goal in [cycles // 100, *(cycles * n // RESTS for n in range(1, RESTS + 1))]:
        left = goal - done

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await clients.cycle()

        async with trio.open_nursery() as nursery:
            for _ in range(min(at_once, left)):
                nursery.start_soon(work)
        done = goal
        samples.append(await server.rest(done))
        print(line(samples[-1]), flush=True)
    await trio.sleep(11)  # Trio's idle threads end after ten seconds
    samples.append(await server.rest(done))
    print(line(samples[-1]), flush=True)
    return samples


def verdict(samples: list[dict[str, float]], failed: list[str]) -> list[str]:
    """What has not come back."""
    early, last = samples[: 1 + RESTS // 5], samples[-1]
    wrong = []
    for name in ("tasks", "descriptors", "threads", "connections", "running", "websockets", "rows"):
        before = max(sample[name] for sample in early)
        if last[name] > before:
            wrong.append(f"{name}: {last[name]:g}, at the beginning {before:g}")
    for name in ("pss", "database"):
        before = max(sample[name] for sample in early)
        if last[name] > before + GROWTH_ALLOWED:
            wrong.append(f"{name}: {last[name] / 2**20:.1f}M, at the beginning {before / 2**20:.1f}M")
    if failed:
        wrong.append(f"{len(failed)} cycles failed, the first with {failed[0]}")
    return wrong


async def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        store = "memory" if options.store == "memory" else "soak.db"
        async with served(Path(folder), store, options.seed) as (server, clients):
            print("".join(name.rjust(width) for name, width in COLUMNS.items()), flush=True)
            began = time.monotonic()
            samples = await run(server, clients, options.cycles, options.at_once)
            seconds = time.monotonic() - began
        errors = (Path(folder) / "log").read_text()
    wrong = verdict(samples, clients.failed)
    if errors:
        wrong.append(f"the server has logged errors, the first: {errors[:1000]}")
    print(f"{options.cycles} cycles in {seconds:.0f} s; of each kind: {dict(clients.done)}")
    print("\n".join(f"NOT BACK: {each}" for each in wrong) or "everything is back where it was")
    if options.json:
        result = {"samples": samples, "wrong": wrong, "done": clients.done, "seconds": seconds}
        await trio.Path(options.json).write_text(json.dumps(result))
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--at-once", type=int, default=200, help="clients at one time")
    parser.add_argument("--store", choices=["sqlite", "memory"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the samples there")
    sys.exit(trio.run(main, parser.parse_args()))
