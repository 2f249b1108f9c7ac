"""Streams of the Python client over connections that break: a real server that restarts, a wire that is cut.

A scripted server stands in for what ours does not send.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from hector_trio import errors
from hector_trio.agents import Agent, Context
from hector_trio.client import ChunkStream, Client, ConnectionFailed, EventChunks, GraceMs, UnexpectedAnswer
from hector_trio.client.limits import FIRST_DELAY, MAX_DELAY
from hector_trio.client.reconnecting import Retry
from hector_trio.config import Settings
from hector_trio.models import Chunk
from tests import HANG
from tests.clock import skip
from tests.cutting import Cut, How, Wire, wire_to
from tests.engines import Steered, agent
from tests.serving import Served, serving
from tests.test_cli import served

HOWS: tuple[How, ...] = ("fin", "rst", "silence")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is silent is given up in less than a second, and what is lost made again at once."""
    monkeypatch.setattr("hector_trio.client.reconnecting.FIRST_DELAY", FIRST_DELAY / 10)
    monkeypatch.setattr("hector_trio.client.websocket.SILENCE", 0.5)
    monkeypatch.setattr("hector_trio.client.websocket.CONNECT_LIMIT", 0.5)
    monkeypatch.setattr("hector_trio.client.events.SILENCE", 0.5)


@pytest.fixture
def patient(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in earnest: a process of its own may take more than a moment to answer."""
    monkeypatch.undo()


@asynccontextmanager
async def wired(
    agents: dict[str, Agent] | None = None, settings: Settings | None = None, **options: Any
) -> AsyncIterator[tuple[Served, Wire, Client]]:
    """A server, a wire to it, and a client at the other end."""
    with trio.fail_after(HANG):
        async with serving(settings, agents) as server, wire_to(server.address) as wire:
            async with Client(wire.url, **options) as client:
                yield server, wire, client


class Counting:
    """An agent that counts to the number it is given, and counts its runs."""

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()

    async def __call__(self, ctx: Context) -> None:
        self.runs[ctx.task_id] += 1
        for number in range(1, int(ctx.text) + 1):
            await ctx.emit_text(f"{number} ")


def counted(limit: int) -> str:
    return "".join(f"{number} " for number in range(1, limit + 1))


async def read(chunks: ChunkStream | EventChunks, after: int = 0) -> list[Chunk]:
    """The rest of a stream, which has every number exactly once."""
    found = []
    async for chunk in chunks:
        assert (chunk.first_seq or chunk.seq) == after + 1
        after = chunk.seq
        found.append(chunk)
    return found


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.content for chunk in chunks if chunk.chunk_type == "text")


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", range(3))
async def test_a_stream_that_is_cut_again_and_again_gives_each_chunk_once(how: How, seed: int) -> None:
    where = random.Random(seed)
    counting = Counting()
    async with wired(agent(counting)) as (_, wire, client):
        wire.cuts += [Cut(how, down=where.randrange(12_000)) for _ in range(3 if how == "silence" else 12)]
        async with client.stream("a", "20000") as chunks:
            received = await read(chunks)
        assert text_of(received) == counted(20_000)
        assert (received[-1].final, received[-1].status, chunks.status) == (True, "completed", "completed")
        assert counting.runs == {chunks.task_id: 1}
        assert not wire.cuts


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("up", [1, 300, 420, 700])
async def test_a_task_whose_acceptance_is_unknown_runs_once(how: How, up: int) -> None:
    counting = Counting()
    async with wired(agent(counting)) as (_, wire, client):
        # In the handshake, at its end, in the middle of the task frame, and after it.
        wire.cuts += [Cut(how, up=up), Cut(how, down=300), Cut(how, up=up)]
        async with client.stream("a", "50") as chunks:
            assert text_of(await read(chunks)) == counted(50)
        assert counting.runs == {chunks.task_id: 1}


@pytest.mark.parametrize("down", [0, 1, 100, 200, 240])
async def test_a_cut_before_the_first_chunk_is_mended(down: int) -> None:
    async with wired(agent(Counting())) as (_, wire, client):
        wire.cuts += [Cut("fin", down=down), Cut("rst", down=down)]
        async with client.stream("a", "50") as chunks:
            assert text_of(await read(chunks)) == counted(50)
        assert wire.connections == 3


async def test_a_connection_on_which_nothing_is_said_but_which_is_there_is_kept(
    monkeypatch: pytest.MonkeyPatch, clock: MockClock
) -> None:
    monkeypatch.setattr("hector_trio.client.websocket.SILENCE", 10.0)
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client), client.stream("a", "x") as chunks:
        assert (await anext(chunks)).content == "<x"
        for _ in range(10):  # three times as long as what counts as silence
            await skip(clock, 3)
        steered.let("x")
        assert text_of(await read(chunks, 1)) == ">"
        assert wire.connections == 1


async def test_the_connection_is_mended_while_the_reader_is_busy() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client):
        async with client.stream("a", "x", on_disconnect=GraceMs(2000)) as chunks:
            await anext(chunks)
            wire.cut("rst")
            while wire.connections < 2:
                await trio.lowlevel.checkpoint()
            steered.let("x")
            await steered.wait_ended("x")
            assert text_of(await read(chunks, 1)) == ">"


@pytest.mark.parametrize("how", HOWS)
async def test_events_that_are_cut_give_each_chunk_once(how: How) -> None:
    where = random.Random(1)
    async with wired(agent(Counting())) as (_, wire, client):
        task = await client.submit("a", "10000")
        wire.cut("rst")  # the connection that is kept for the next request
        wire.cuts += [Cut(how, down=where.randrange(12_000)) for _ in range(4)]
        async with client.events("a", task.task_id) as events:
            received = await read(events)
        assert text_of(received) == counted(10_000)
        assert received[-1].status == "completed"
        assert not wire.cuts


async def test_a_wait_for_a_chunk_that_is_given_up_loses_none() -> None:
    async def slowly(ctx: Context) -> None:
        for number in range(1, 101):
            await ctx.emit_text(f"{number} ")
            await trio.sleep(0.001 if number % 25 else 0.1)

    async def read_impatiently(chunks: ChunkStream | EventChunks, patience: float) -> None:
        received: list[Chunk] = []
        cut = False
        while not received or not received[-1].final:
            with trio.move_on_after(patience):
                received.append(await anext(chunks))
            if len(received) == 30 and not cut:
                wire.cut("rst")
                cut = True
        assert text_of(received) == counted(100)

    async with wired(agent(slowly)) as (_, wire, client):
        async with client.stream("a", "x") as chunks:
            await read_impatiently(chunks, 0.0005)
        task = await client.submit("a", "x")
        async with client.events("a", task.task_id) as events:
            await read_impatiently(events, 0.05)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 50])
async def test_a_reader_takes_its_time_and_the_connection_lasts(
    window: int, monkeypatch: pytest.MonkeyPatch, clock: MockClock
) -> None:
    monkeypatch.setattr("hector_trio.client.websocket.SILENCE", 10.0)
    monkeypatch.setattr("hector_trio.client.events.SILENCE", 10.0)
    counting = Counting()
    async with wired(agent(counting)) as (_, wire, client):
        async with client.stream("a", "3000", window=window) as chunks:
            first = await anext(chunks)
            async with client.events("a", chunks.task_id) as events:
                await read(events)  # to its end, while the other has read one chunk
            for _ in range(8):  # twice as long as what counts as silence, and more
                await skip(clock, 3)
            received = [first, *await read(chunks, first.seq)]
        assert text_of(received) == counted(3000)
        assert wire.connections == 2


async def test_a_window_is_kept_to_through_cuts() -> None:
    async with wired(agent(Counting())) as (_, wire, client):
        async with client.stream("a", "2000", window=8) as chunks:
            received = []
            async for chunk in chunks:
                received.append(chunk)
                if len(received) % 10 == 0 and wire.connections < 30:
                    wire.cut("rst")
                if len(received) % 10 == 5:
                    await trio.testing.wait_all_tasks_blocked(0.001)
        assert text_of(received) == counted(2000)


# --- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["break", "cancel", "error"])
async def test_leaving_cancels_the_task_at_once_whatever_its_grace(how: str) -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, _, client):
        with trio.CancelScope() as scope:
            try:
                async with client.stream("a", "x", on_disconnect=GraceMs(60_000)) as chunks:
                    await anext(chunks)
                    if how == "cancel":
                        scope.cancel()
                        await anext(chunks)
                    elif how == "error":
                        raise KeyError("mine")
            except KeyError:
                pass
        await steered.wait_ended("x")
        assert (await client.task("a", chunks.task_id)).status == "cancelled"


@pytest.mark.parametrize("how", ["break", "cancel"])
async def test_a_stream_that_is_left_as_soon_as_it_is_there_leaves_no_task(how: str) -> None:
    steered = Steered()
    async with wired(agent(steered)) as (server, _, client):
        for _ in range(10):
            with trio.CancelScope() as scope:
                async with client.stream("a", "x", on_disconnect=GraceMs(60_000)):
                    if how == "cancel":
                        scope.cancel()
                        await trio.lowlevel.checkpoint()
        while server.engine.running:
            await trio.lowlevel.checkpoint()
        assert {task.status for task in await client.tasks("a")} <= {"cancelled"}


async def test_leaving_while_the_connection_is_lost_cancels_by_another() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client):
        async with client.stream("a", "x", on_disconnect=GraceMs(60_000)) as chunks:
            await anext(chunks)
            wire.cuts += [Cut("rst", down=0)] * 100
            wire.cut("rst")
            while wire.connections < 4:
                await trio.lowlevel.checkpoint()
            wire.cuts.clear()
        await steered.wait_ended("x")


async def test_leaving_does_not_wait_for_a_server_that_cannot_be_reached() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client):
        with trio.CancelScope() as scope:
            async with client.stream("a", "x", on_disconnect=GraceMs(300)) as chunks:
                await anext(chunks)
                wire.cuts += [Cut("rst", down=0)] * 1000
                wire.cut("rst")
                while wire.connections < 4:
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                began = trio.current_time()
                await anext(chunks)
        assert scope.cancelled_caught
        assert trio.current_time() - began < 1
        await steered.wait_ended("x")  # its grace is over


async def test_a_stream_that_continues_is_resumed_and_goes_on_when_it_is_left() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client):
        async with client.stream("a", "x", on_disconnect="continue") as chunks:
            await anext(chunks)
            wire.cut("rst")
        steered.let("x")
        async with client.events("a", chunks.task_id) as events:
            assert text_of(await read(events)) == "<x>"


async def test_a_task_that_dies_with_its_connection_tells_so_on_the_next() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client):
        async with client.stream("a", "x", on_disconnect="cancel") as chunks:
            await anext(chunks)
            wire.cut("rst")
            received = await read(chunks, 1)
        assert [chunk.status for chunk in received] == ["cancelled"]


async def test_a_detached_stream_ends_and_its_task_does_not() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, _, client):
        async with client.stream("a", "x", on_disconnect="cancel") as chunks:
            await anext(chunks)
            await chunks.detach()
            assert await read(chunks, 1) == []
            assert chunks.final is None
        steered.let("x")
        async with client.events("a", chunks.task_id) as events:
            assert text_of(await read(events)) == "<x>"


async def test_a_cancel_that_is_asked_for_while_the_connection_is_lost_is_said_later() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, wire, client), client.stream("a", "x") as chunks:
        await anext(chunks)
        wire.cuts += [Cut("rst", down=0)] * 3
        wire.cut("rst")
        await chunks.cancel("enough")
        (last,) = await read(chunks, 1)
        assert (last.status, last.reason) == ("cancelled", "enough")
        assert wire.connections == 5


async def test_cut_streams_leave_no_task_and_no_descriptor_behind() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (server, wire, client):
        await client.agents()

        async def one(text: str) -> None:
            async with client.stream("a", text) as chunks:
                await anext(chunks)
                wire.cut(random.choice(("fin", "rst")))
                if int(text) % 2:
                    steered.let(text)
                    assert text_of(await read(chunks, 1)) == ">"

        async def settle() -> tuple[int, int]:
            await trio.lowlevel.checkpoint()
            while server.engine.running or wire.open:
                await trio.lowlevel.checkpoint()
            return trio.lowlevel.current_statistics().tasks_living, len(os.listdir("/proc/self/fd"))

        for text in range(4):
            await one(str(text))
        wire.cut("rst")
        before = await settle()
        for text in range(4, 204):
            await one(str(text))
        wire.cut("rst")
        with trio.fail_after(10):
            while (after := await settle()) > before or after[1] > before[1]:
                pass
        assert steered.running == 0


# --- questions --------------------------------------------------------------------------------------------------------


class Asking:
    """An agent that asks twice and says what it was told."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    async def __call__(self, ctx: Context) -> None:
        if ctx.resume is None:
            await ctx.emit_text("Hello. ")
            await ctx.ask("Your name?", saved=[])
        self.answers.append(ctx.resume.answer)
        said = [*ctx.resume.saved, ctx.resume.answer]
        if len(said) == 1:
            await ctx.ask({"question": "Your age?"}, saved=said)
        await ctx.emit_text(" ".join(map(str, said)))


async def test_questions_are_answered_in_the_stream() -> None:
    async with wired(agent(Asking())) as (_, _, client), client.stream("a", "x") as chunks:
        assert chunks.status == "pending"
        assert [(await anext(chunks)).content, chunks.status] == ["Hello. ", "running"]
        await anext(chunks)
        assert (chunks.status, chunks.prompt) == ("input_required", "Your name?")
        await chunks.answer("Zoe")
        await anext(chunks)
        assert (chunks.status, chunks.prompt) == ("input_required", {"question": "Your age?"})
        await chunks.answer(7)
        assert text_of(await read(chunks, chunks.last_seq)) == "Zoe 7"
        assert (chunks.status, chunks.prompt) == ("completed", None)
        with pytest.raises(errors.NotWaiting):
            await chunks.answer("more")


async def test_an_answer_that_nobody_waits_for_is_refused_and_the_stream_goes_on() -> None:
    steered = Steered()
    async with wired(agent(steered)) as (_, _, client), client.stream("a", "x") as chunks:
        await anext(chunks)
        with pytest.raises(errors.NotWaiting):
            await chunks.answer("what?")
        steered.let("x")
        assert text_of(await read(chunks, 1)) == ">"


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("more", [1, 40, 90, 130, 200])
async def test_an_answer_is_taken_once_wherever_the_connection_breaks(how: How, more: int) -> None:
    """``more``: bytes that pass in one direction after the question, up to the cut."""
    asking = Asking()
    for direction in ("up", "down"):
        asking.answers.clear()
        async with wired(agent(asking)) as (_, wire, client), client.stream("a", "x") as chunks:
            await anext(chunks)
            await anext(chunks)
            (connection,) = wire.open
            setattr(connection, direction, more)
            connection.how = how
            for answer in ("Zoe", 7):
                await chunks.answer(answer)
                if answer == "Zoe":
                    await anext(chunks)
                    assert chunks.prompt == {"question": "Your age?"}
            assert text_of(await read(chunks, chunks.last_seq)) == "Zoe 7"
            assert asking.answers == ["Zoe", 7]


async def test_an_answer_that_was_given_up_can_be_given_again() -> None:
    asking = Asking()
    async with wired(agent(asking)) as (_, wire, client), client.stream("a", "x") as chunks:
        await anext(chunks)
        await anext(chunks)
        wire.cuts += [Cut("rst", down=0)] * 1000
        wire.cut("rst")
        while wire.connections < 3:
            await trio.lowlevel.checkpoint()
        with trio.move_on_after(0.01) as scope:
            await chunks.answer("Tom")
        assert scope.cancelled_caught
        wire.cuts.clear()
        await chunks.answer("Zoe")
        await anext(chunks)
        await chunks.answer(7)
        assert text_of(await read(chunks, chunks.last_seq)) == "Zoe 7"
        assert asking.answers == ["Zoe", 7]


async def test_a_question_and_its_answer_by_rest() -> None:
    async with wired(agent(Asking())) as (_, _, client):
        task = await client.run("a", "x", on_disconnect="cancel")
        assert (task.status, task.prompt) == ("input_required", "Your name?")
        task = await client.answer("a", task.task_id, "Zoe")
        assert (task.status, task.prompt) == ("input_required", {"question": "Your age?"})
        task = await client.answer("a", task.task_id, 7)
        assert task.status == "completed"
        with pytest.raises(errors.NotWaiting):
            await client.answer("a", task.task_id, "more")
        with pytest.raises(errors.TaskNotFound):
            await client.answer("a", "nothing", "more")


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
async def test_bytes_come_through_cuts_as_they_are(binary: bool) -> None:
    pieces = [random.Random(n).randbytes(3000) for n in range(20)]

    async def draw(ctx: Context) -> None:
        for piece in pieces:
            await ctx.emit_text("a picture")
            await ctx.emit_bytes(piece, "image/png")

    async with wired(agent(draw)) as (_, wire, client):
        wire.cuts += [Cut("rst", down=300 + 7001 * n) for n in range(4)]
        async with client.stream("a", "x", binary=binary) as chunks:
            received = await read(chunks)
        bytes_ = [chunk for chunk in received if chunk.chunk_type == "data"]
        assert [chunk.data for chunk in bytes_] == pieces
        assert {chunk.media_type for chunk in bytes_} == {"image/png"}
        assert all(isinstance(chunk.content, bytes) == binary for chunk in bytes_)
        with pytest.raises(ValueError, match="holds no bytes"):
            received[0].data  # noqa: B018
        task = await client.run("a", "x")
        async with client.events("a", task.task_id) as events:
            assert [chunk.data for chunk in await read(events) if chunk.chunk_type == "data"] == pieces


# --- a server that goes and comes -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


CONFIG = """
llms:
  demo: {type: demo, words_per_second: 400}
agents:
  assistant: {llm: demo}
"""


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("how", ["kill", "term"])
async def test_a_restart_ends_a_running_task_and_the_stream_says_so(tmp_path: Path, how: str) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    port = free_port()
    serve = partial(served, tmp_path, "--config", "config.yaml", "--port", str(port), "--shutdown-grace", "0.1")
    with trio.fail_after(HANG):
        async with Client(f"http://127.0.0.1:{port}") as client, AsyncExitStack() as stack:
            async with serve() as (process, _):
                chunks = await stack.enter_async_context(client.stream("assistant", "Count to 100000"))
                received = [await anext(chunks) for _ in range(20)]
                process.process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
                await process.wait()
            async with serve():
                received += await read(chunks, received[-1].seq)
                assert received[-1].status == "failed"
                assert received[-1].code == "interrupted"
                numbers = text_of(received).split()
                assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
                async with client.events("assistant", chunks.task_id) as events:
                    assert await read(events) == received or how == "term"
                task = await client.task("assistant", chunks.task_id)
                assert task.status == "failed"


@pytest.mark.usefixtures("patient")
async def test_a_task_that_waited_in_the_queue_runs_after_a_restart_and_the_stream_has_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    port = free_port()
    serve = partial(served, tmp_path, "--config", "config.yaml", "--port", str(port))
    with trio.fail_after(HANG):
        async with Client(f"http://127.0.0.1:{port}") as client, AsyncExitStack() as stack:
            async with serve() as (process, _):
                session = (await client.create_session("assistant")).session_id
                await client.submit("assistant", "Count to 100000", session_id=session)
                stream = client.stream("assistant", "Count to 50", session_id=session)
                chunks = await stack.enter_async_context(stream)
                while {task.status for task in await client.session_tasks(session)} != {"running", "pending"}:
                    pass  # what has not begun would run after the restart, and this one for minutes
                process.process.send_signal(signal.SIGKILL)
                await process.wait()
            async with serve():
                received = await read(chunks)
                assert text_of(received).split() == [str(n) for n in range(1, 51)]
                assert received[-1].status == "completed"


ASKER = """
async def ask(ctx):
    if ctx.resume is None:
        await ctx.ask("Your name?")
    await ctx.emit_text(ctx.resume.answer)
"""


@pytest.mark.usefixtures("patient")
async def test_an_answer_that_a_server_is_too_late_for_is_taken_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "asker.py").write_text(ASKER)
    (tmp_path / "config.yaml").write_text("agents:\n  a: {type: python, function: asker.py:ask}\n  b: {}\n")
    port = free_port()
    serve = partial(served, tmp_path, "--config", "config.yaml", "--port", str(port), "--shutdown-grace", "1")
    with trio.fail_after(HANG):
        async with Client(f"http://127.0.0.1:{port}") as client, AsyncExitStack() as stack:
            async with serve() as (process, _):
                chunks = await stack.enter_async_context(client.stream("a", "x"))
                await anext(chunks)
                assert chunks.prompt == "Your name?"
                other = await stack.enter_async_context(client.stream("b", "Count to 100000"))
                await anext(other)
                process.process.send_signal(signal.SIGTERM)
                with pytest.raises(errors.Draining):
                    while True:
                        await client.submit("b", "count to 1")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(chunks.answer, "Zoe")
                    await process.wait()
                    await stack.enter_async_context(serve())
                assert text_of(await read(chunks, 1)) == "Zoe"
                assert (await read(other, other.last_seq))[-1].code == "interrupted"


# --- codes, limits ----------------------------------------------------------------------------------------------------

LINE = b'{"taskId":%b,"seq":%d,"chunkType":"text","content":"%d ","timestamp":"2026-01-01T00:00:00.000Z","final":false}'
LAST = (
    b'{"taskId":%b,"seq":%d,"chunkType":"done","content":"","timestamp":"2026-01-01T00:00:00.000Z","final":true,'
    b'"status":"completed"}'
)


class Scripted:
    """A server in one function: it knows tasks, sends a chunk per connection and then does what a test says."""

    def __init__(self) -> None:
        self.url = ""
        self.frames: list[dict[str, Any]] = []
        self.then: Callable[[WebSocketConnection], Any] | None = None
        self.cutting = 2
        """So many connections are ended by ``then``; the next sends the final chunk."""
        self.knows = False

    async def serve(self, request: WebSocketRequest) -> None:
        websocket = await request.accept()
        try:
            frame = msgspec.json.decode(await websocket.get_message())
            self.frames.append(frame)
            task_id = msgspec.json.encode(frame["taskId"])
            after = frame.get("after", 0)
            if "type" in frame:
                ok = b'{"type":"ok","of":"attach","taskId":%b,"status":"running","lastSeq":%d}' % (task_id, after)
                await websocket.send_message(ok.decode())
            if len(self.frames) > self.cutting:
                await websocket.send_message((LAST % (task_id, after + 1)).decode())
                await websocket.get_message()
            await websocket.send_message((LINE % (task_id, after + 1, after + 1)).decode())
            assert self.then is not None
            await self.then(websocket)
        except ConnectionClosed:
            pass


@asynccontextmanager
async def scripted(
    then: Callable[[WebSocketConnection], Any], **options: Any
) -> AsyncIterator[tuple[Scripted, Client]]:
    script = Scripted()
    script.then = then
    with trio.fail_after(HANG):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_websocket, script.serve, "127.0.0.1", 0, None)
            async with Client(f"http://127.0.0.1:{server.port}") as client:
                yield script, client
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4000, 4100, 4101, 4499])
async def test_after_these_codes_a_stream_goes_on(code: int) -> None:
    async with scripted(lambda websocket: websocket.aclose(code, "so it is")) as (script, client):
        async with client.stream("a", "x") as chunks:
            assert text_of(await read(chunks)) == "1 2 "
    assert [frame.get("type") for frame in script.frames] == [None, "attach", "attach"]
    assert [frame.get("after") for frame in script.frames] == [None, 1, 2]
    assert [frame.get("onDisconnect") for frame in script.frames] == [{"graceMs": 30000}, None, None]


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1008, 1009, 3000, 4500, 4501, 4529, 4999])
async def test_after_these_codes_a_stream_ends_and_says_why(code: int) -> None:
    async with scripted(lambda websocket: websocket.aclose(code, "so it is")) as (script, client):
        async with client.stream("a", "x") as chunks:
            assert (await anext(chunks)).content == "1 "
            with pytest.raises(ConnectionFailed, match=f"{code}: .*so it is") as failed:
                await anext(chunks)
            assert (failed.value.close_code, failed.value.close_reason) == (code, "so it is")
            assert await read(chunks) == []
    assert len(script.frames) == 1


async def test_a_server_that_does_not_come_back_is_given_up_at_the_limit_with_the_last_cause() -> None:
    steered = Steered()
    async with wired(agent(steered), reconnect_limit=1) as (_, wire, client):
        async with client.stream("a", "x") as chunks:
            await anext(chunks)
            wire.cuts += [Cut("fin", down=0)] * 1000
            began = trio.current_time()
            wire.cut("rst")
            with pytest.raises(ConnectionFailed, match=r"not mended in \d seconds, at try \d+") as failed:
                await anext(chunks)
            assert 0.3 < trio.current_time() - began < 2
            assert isinstance(failed.value.__cause__, ConnectionFailed)
            assert 4 <= wire.connections <= 12


async def test_a_client_that_is_to_mend_nothing_does_not() -> None:
    steered = Steered()
    async with wired(agent(steered), reconnect_limit=0) as (_, wire, client):
        async with client.stream("a", "x") as chunks:
            await anext(chunks)
            wire.cut("rst")
            with pytest.raises(ConnectionFailed) as failed:
                await anext(chunks)
            assert failed.value.close_code == 1006
            assert wire.connections == 1
        await steered.wait_ended("x")  # no grace was asked for


@pytest.mark.parametrize("said", ["hole", "twice", "backwards", "garbage", "another"])
async def test_what_no_server_may_send_ends_the_stream(said: str) -> None:
    async def send(websocket: WebSocketConnection) -> None:
        task_id = msgspec.json.encode(script.frames[0]["taskId"])
        line = {
            "hole": LINE % (task_id, 3, 3),
            "twice": LINE % (task_id, 1, 1),
            "backwards": (LINE % (task_id, 2, 2)).replace(b'"final"', b'"firstSeq":1,"final"'),
            "garbage": b"{",
            "another": LINE % (b'"another"', 2, 2),
        }[said]
        await websocket.send_message(line.decode())
        await websocket.get_message()

    async with scripted(send) as (script, client), client.stream("a", "x") as chunks:
        await anext(chunks)
        with pytest.raises(UnexpectedAnswer):
            await anext(chunks)


async def test_what_is_said_to_be_missing_is_no_hole() -> None:
    async def send(websocket: WebSocketConnection) -> None:
        frame = {
            "taskId": script.frames[0]["taskId"], "seq": 7, "chunkType": "metadata", "timestamp": "", "final": False,
            "content": {"gap": {"from": 2, "to": 7, "reason": "retention"}},
        }  # fmt: skip
        await websocket.send_message(msgspec.json.encode(frame).decode())
        await websocket.aclose(1012)

    async with scripted(send) as (script, client), client.stream("a", "x") as chunks:
        script.cutting = 1
        assert [chunk.seq async for chunk in chunks] == [1, 7, 8]


async def test_the_delays_grow_are_jittered_and_end_at_the_limit(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hector_trio.client.reconnecting.FIRST_DELAY", FIRST_DELAY)
    retry = Retry("ws://x", 60)
    cause = ConnectionFailed("cut", url="ws://x", close_code=1006)
    retry.opened()
    delays = []
    with pytest.raises(ConnectionFailed, match="not mended in"):
        while True:
            delays.append(retry.after(cause))
            await trio.sleep(delays[-1])
    assert FIRST_DELAY / 2 <= delays[0] <= FIRST_DELAY
    assert all(delay <= MAX_DELAY for delay in delays)
    assert all(delay >= MAX_DELAY / 2 for delay in delays[7:])
    assert len(set(delays)) == len(delays)
    assert 50 < trio.current_time() <= 60
    retry.progress()
    assert retry.after(cause) <= FIRST_DELAY


async def test_a_server_that_says_when_to_come_back_is_believed_up_to_the_longest_delay() -> None:
    retry = Retry("ws://x", 60)
    retry.opened()
    assert retry.after(errors.Draining("shutting down", retry_after=3)) == 3
    assert retry.after(errors.Draining("shutting down", retry_after=300)) == MAX_DELAY
    with pytest.raises(errors.AgentNotFound):
        retry.after(errors.AgentNotFound("gone"))
