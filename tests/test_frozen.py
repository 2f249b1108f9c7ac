"""Viewers that are slow or do not read, through real sockets: they cost nobody else anything, and miss nothing."""

from __future__ import annotations

import json
import re
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
import trio
from trio.testing import MockClock

from hector_trio import connection
from hector_trio.agents import Context
from hector_trio.models import Chunk
from hector_trio.task import decode_chunk
from tests import HANG
from tests.clock import skip
from tests.engines import agent
from tests.serving import Served, serving, settings_of
from tests.sockets import connect_raw
from tests.test_cli import served

Kind = Literal["websocket", "sse"]
KINDS = pytest.mark.parametrize("kind", ["websocket", "sse"])
BUFFER = 65536
"""What the kernel is to hold of a connection on the server's side, so that a socket is full early."""
SEND_TIMEOUT = 10.0
_EVENT = re.compile(rb"\ndata: (\{.*\})\n\n")


@asynccontextmanager
async def serving_narrow(function: Any, **limits: Any) -> AsyncIterator[Served]:
    """A server whose sockets are full early, with the function as its agent ``a``."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    settings = settings_of(server={"fd": listener.detach()}, limits={"send_timeout": SEND_TIMEOUT, **limits})
    async with serving(settings, agent(function)) as server:
        yield server


class Viewer:
    """One that follows the task ``t`` from its beginning, over a plain socket, when it is told to read."""

    def __init__(self, stream: trio.SocketStream, kind: Kind) -> None:
        self.stream = stream
        self.chunks: list[Chunk] = []
        self.was_reset = False
        self._kind = kind
        self._buffer = bytearray()

    async def read(self, most: int = 65536) -> bool:
        """Takes what has come; ``False`` when nothing more will, because the server has closed or reset."""
        try:
            data = await self.stream.receive_some(most)
        except trio.BrokenResourceError:
            self.was_reset = True
            return False
        self._buffer += data
        self.chunks += map(decode_chunk, self._lines())
        return bool(data)

    @property
    def has_all(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].final

    async def read_to_final(self) -> None:
        while not self.has_all:
            assert await self.read()

    def _lines(self) -> Iterator[bytes]:
        """What is complete in the buffer."""
        if self._kind == "sse":
            while (found := _EVENT.search(self._buffer)) is not None:
                line = bytes(found[1])
                del self._buffer[: found.end()]
                yield line
            return
        while len(self._buffer) >= 2:
            size, head = self._buffer[1], 2
            if size == 126:
                head = 4
            elif size == 127:
                head = 10
            if len(self._buffer) < head:
                return
            if head > 2:
                size = int.from_bytes(self._buffer[2:head])
            if len(self._buffer) < head + size:
                return
            payload = bytes(self._buffer[head : head + size])
            if self._buffer[0] == 0x81 and b'"chunkType"' in payload:
                yield payload
            del self._buffer[: head + size]


@asynccontextmanager
async def viewing(
    url: str, kind: Kind, prompt: str = "go", *, receive_buffer: int | None = None
) -> AsyncIterator[Viewer]:
    """Starts to follow ``t``, and the task if it is the first to."""
    body = json.dumps({"taskId": "t", "input": {"content": prompt}, "onDisconnect": "continue"})
    if kind == "websocket":
        peer = await connect_raw(url, "a", receive_buffer=receive_buffer)
        async with peer.stream:
            await peer.send_text(body)
            yield Viewer(peer.stream, kind)
        return
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, _, port = url.removeprefix("http://").rpartition(":")
    await sock.connect((host, int(port)))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(
            f"POST /agents/a/tasks HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        yield Viewer(stream, kind)


async def come_back(server: Served, kind: Kind, after: int) -> list[Chunk]:
    """What there is for a viewer that has everything up to ``after``."""
    if kind == "websocket":
        peer = await connect_raw(server.url, "a")
        async with peer.stream:
            await peer.send_text(json.dumps({"type": "attach", "taskId": "t", "after": after}))
            viewer = Viewer(peer.stream, kind)
            with trio.fail_after(HANG):
                await viewer.read_to_final()
            return viewer.chunks
    async with server.client() as client:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        answer = await client.get("/agents/a/tasks/t/events", headers=headers)
        return [decode_chunk(line[6:].encode()) for line in answer.text.split("\n") if line.startswith("data: ")]


def tiles(chunks: list[Chunk], after: int = 0) -> bool:
    """Whether the numbers of the chunks, joined or not, follow each other without a hole."""
    for chunk in chunks:
        if (chunk.first_seq or chunk.seq) != after + 1:
            return False
        after = chunk.seq
    return True


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.content for chunk in chunks if chunk.chunk_type == "text")


class Lockstep:
    """An agent that emits a chunk when all viewers but the frozen ones have the one before."""

    COUNT = 200
    TEXT = "x" * 2000

    def __init__(self, viewers: int) -> None:
        self.has = [0] * viewers
        self._moved = trio.lowlevel.ParkingLot()

    async def __call__(self, ctx: Context) -> None:
        for n in range(self.COUNT):
            while min(self.has) < n:
                await self._moved.park()
            await ctx.emit_text(f"{n}{self.TEXT}")

    async def watch(self, number: int, viewer: Viewer) -> None:
        while not viewer.has_all:
            assert await viewer.read()
            self.has[number] = len(viewer.chunks)
            self._moved.unpark_all()


@KINDS
async def test_one_frozen_viewer_among_a_hundred_holds_up_nobody_is_cut_and_comes_back_for_the_rest(
    kind: Kind, clock: MockClock
) -> None:
    """Every viewer but the frozen one is at most one chunk behind all the time, or the agent would not go on."""
    lockstep = Lockstep(99)
    before = connection.statistics().reset
    async with serving_narrow(lockstep) as server, AsyncExitStack() as viewers:
        url = server.url
        frozen = await viewers.enter_async_context(viewing(url, kind, receive_buffer=4096))
        others = [await viewers.enter_async_context(viewing(url, kind)) for _ in range(99)]
        with trio.fail_after(2 * HANG):
            async with trio.open_nursery() as watching:
                for number, viewer in enumerate(others):
                    watching.start_soon(lockstep.watch, number, viewer)
        complete = others[0].chunks
        assert len(complete) == lockstep.COUNT + 1
        assert text_of(complete) == "".join(f"{n}{lockstep.TEXT}" for n in range(lockstep.COUNT))
        assert all(viewer.chunks == complete for viewer in others)

        assert connection.statistics().reset == before
        await skip(clock, SEND_TIMEOUT)  # nothing more comes, so the last byte was accepted before that
        assert connection.statistics().reset == before + 1
        with trio.fail_after(5):
            while await frozen.read():
                pass
        assert frozen.was_reset
        assert 0 < len(frozen.chunks) < lockstep.COUNT // 2
        after = frozen.chunks[-1].seq
        assert frozen.chunks + await come_back(server, kind, after) == complete


@KINDS
async def test_a_viewer_slower_than_the_stream_catches_up_with_joined_text(kind: Kind, clock: MockClock) -> None:
    words = [f"{n} " for n in range(20_000)]

    async def burst(ctx: Context) -> None:
        for word in words:
            await ctx.emit_text(word)

    async with serving_narrow(burst, send_timeout=30) as server:
        async with viewing(server.url, kind, receive_buffer=4096) as viewer:
            with trio.fail_after(2 * HANG):
                while not viewer.has_all:
                    await skip(clock, 0.05)  # so slow is it: at most 160 kB a second
                    await viewer.read(8192)
        assert tiles(viewer.chunks)
        assert text_of(viewer.chunks) == "".join(words)
        assert len(viewer.chunks) < len(words) / 4
        whole = await come_back(server, kind, 0)
        assert tiles(whole)
        assert text_of(whole) == "".join(words)
        # also somebody who comes back in the middle of what was joined gets exactly the rest
        for after in (1, viewer.chunks[-2].seq - 1, len(words)):
            rest = await come_back(server, kind, after)
            assert tiles(rest, after)
            assert text_of(rest) == "".join(words[after:])
            assert rest[-1] == whole[-1]


def resident(pid: int) -> int:
    """Bytes of memory that a process occupies."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


CONFIG = """
llms: {burst: {type: demo, words_per_second: 0}}
agents: {a: {llm: burst}}
limits: {send_timeout: 600}
"""


@KINDS
async def test_frozen_viewers_cost_no_memory_that_grows_with_the_log(tmp_path: Path, kind: Kind) -> None:
    """Fifty that never read, of a task that writes twelve megabytes: nobody holds more for them than one write."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    async with served(tmp_path, "--config", "config.yaml") as (process, url), AsyncExitStack() as viewers:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            body = {"taskId": "warm", "input": {"content": "Count to 100000"}}
            assert (await client.post("/agents/a/tasks", json=body)).json()["status"] == "completed"
            before = resident(process.process.pid)
            for _ in range(50):
                await viewers.enter_async_context(viewing(url, kind, "Count to 100000", receive_buffer=4096))
            with trio.fail_after(HANG):
                while (await client.get("/agents/a/tasks/t")).json().get("status") != "completed":
                    pass
            grown = resident(process.process.pid) - before
            assert "t" in (await client.get("/agents/a/tasks")).text
    assert grown < 50 * (1 << 20)
