"""A disk that is full, refuses or is read-only, under a real server: on a small filesystem, where we may mount one."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.models import Chunk
from hector_trio.task import decode_chunk, fold
from tests import HANG
from tests.crashes import events_in, frames_in
from tests.sockets import RawPeer, connect_raw
from tests.test_cli import CLEAN, HECTOR, Running, running

CONFIG = """
server: {shutdown_grace: 0.3}
store: {url: disk/hector.db}
llms:
  paced: {type: demo, words_per_second: 200}
  burst: {type: demo, words_per_second: 0}
agents:
  paced: {llm: paced}
  burst: {llm: burst}
"""


READ = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT count(*) FROM tasks").fetchone()
print("reading", flush=True)
sys.stdin.read()
"""


class Disk:
    """Where a test keeps its store. This one takes no byte more, as one that is broken, when a server is told so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *command: str) -> list[str]:
        return list(command)

    def refuse(self, pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def give_room(self, pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class SmallDisk(Disk):
    """A filesystem of a few megabytes, mounted where only ``holder`` and what is started beside it see it."""

    def __init__(self, folder: Path, holder: int) -> None:
        super().__init__(folder)
        self._beside = ["nsenter", f"--target={holder}", "--mount", f"--wd={folder}"]
        self._disk = Path(f"/proc/{holder}/root{folder}/disk")
        self._reader: subprocess.Popen[bytes] | None = None

    def command(self, *command: str) -> list[str]:
        return [*self._beside, *command]

    def remount(self, how: str) -> None:
        subprocess.run(self.command("mount", "-o", f"remount,{how}", "disk"), check=True)

    def refuse(self, pid: int = 0) -> None:
        # while somebody else reads, no room can be won from the write-ahead log
        command = self.command(sys.executable, "-c", READ, "disk/hector.db")
        self._reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._reader.stdout is not None
        assert self._reader.stdout.readline() == b"reading\n"
        size = 1 << 20
        with (self._disk / "ballast").open("wb", buffering=0) as ballast:
            while size:
                try:
                    whole = ballast.write(b"x" * size) == size
                except OSError:
                    whole = False
                if not whole:
                    size //= 2

    def give_room(self, pid: int = 0) -> None:
        (self._disk / "ballast").unlink()
        self.close()

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.communicate()


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    (folder / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=6m tmpfs "$0" && echo mounted && exec sleep infinity'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(folder / "disk")]
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        pytest.skip("this system has no unshare, so no small filesystem can be mounted")
    with holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip("mounting a small filesystem is not permitted here")
            with closing(SmallDisk(folder, holder.pid)) as disk:
                yield disk
        finally:
            holder.kill()


@pytest.fixture(params=["full", "refusing"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if request.param == "full":
        with small_disk(tmp_path) as small:
            yield small
    else:
        yield Disk(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path) as small:
        yield small


@asynccontextmanager
async def starting(disk: Disk) -> AsyncIterator[Running]:
    """``hector serve`` with its store on the disk, and with what it says on stderr in ``log``."""
    (disk.folder / "config.yaml").write_text(CONFIG)
    command = disk.command(*HECTOR, "serve", "--config", "config.yaml", "--port", "0")
    with (disk.folder / "log").open("wb") as log:
        async with running(command, cwd=disk.folder, stderr=log, env=CLEAN) as process:
            yield process


@asynccontextmanager
async def serving_on(disk: Disk) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    async with starting(disk) as process:
        url = (await process.wait_said(r"listening  (http://127\S+)"))[1]
        async with httpx2.AsyncClient(base_url=url, timeout=HANG, trust_env=False, verify=False) as client:
            yield process, client
    assert "Traceback" not in (disk.folder / "log").read_text()


async def refused_start(disk: Disk) -> str:
    """What a server says that does not start."""
    async with starting(disk) as process:
        assert await process.wait() == 1
    said = (disk.folder / "log").read_text()
    assert said.count("\n") == 1, said
    return said


def chunks_of(peer: RawPeer, task_id: str) -> list[Chunk]:
    chunks = [decode_chunk(line) for line in frames_in(bytes(peer.received)) if line.startswith(b'{"taskId"')]
    return [chunk for chunk in chunks if chunk.task_id == task_id]


async def read_on(peer: RawPeer) -> None:
    async with peer.stream:
        await peer.read_on()


async def stream_of(client: httpx2.AsyncClient, path: str, **options: Any) -> list[Chunk]:
    """All events of a stream."""
    answer = await client.get(path, headers={"Accept": "text/event-stream", **options})
    lines = [line for line in answer.text.split("\n") if line.startswith("data: ")]
    return [decode_chunk(line[6:].encode()) for line in lines]


async def reached(client: httpx2.AsyncClient, task_id: str, seq: int) -> None:
    """Returns when a task, which may not have been accepted yet, has so many chunks."""
    with trio.fail_after(HANG):
        while not (await client.get(f"/agents/paced/tasks/{task_id}/events?after={seq - 1}")).json().get("chunks"):
            pass


async def stored(client: httpx2.AsyncClient, task_id: str, agent: str = "paced") -> list[Chunk]:
    chunks: list[Chunk] = []
    token = "0"
    while token:
        page = (await client.get(f"/agents/{agent}/tasks/{task_id}/events?pageSize=100&pageToken={token}")).json()
        chunks += [decode_chunk(httpx2.Response(200, json=each).content) for each in page["chunks"]]
        token = page["nextPageToken"]
    return chunks


async def ended(client: httpx2.AsyncClient, task_id: str) -> dict[str, Any]:
    """The task once it has ended; its row is then what its log adds up to."""
    with trio.fail_after(HANG):
        while "endedAt" not in (task := (await client.get(f"/agents/paced/tasks/{task_id}")).json()):
            pass
    folded = fold(await stored(client, task_id))
    output = folded.output()
    assert task["status"] == folded.status
    assert task.get("output", {}).get("content") == (output.content if output is not None else None)
    return dict(task)


def has_only_committed(seen: list[Chunk], held: list[Chunk]) -> None:
    """A viewer's chunks: those that are held, then one that was never committed and says why there are no more."""
    *before, last = seen
    assert before == held
    assert (last.seq, last.final, last.status, last.code) == (0, True, "failed", "store_unavailable")


async def test_without_room_new_work_is_refused_what_runs_ends_reading_goes_on_and_with_room_all_is_well(
    disk: Disk,
) -> None:
    async with serving_on(disk) as (process, client), trio.open_nursery() as nursery:
        pid = process.process.pid
        session = (await client.post("/sessions", json={"agentId": "paced"})).json()["sessionId"]
        done = await client.post(f"/sessions/{session}/tasks", json={"input": {"content": "My name is Alice"}})
        assert done.json()["status"] == "completed"
        messages = (await client.get(f"/sessions/{session}/messages")).json()

        url = str(client.base_url).rstrip("/")
        peer = await connect_raw(url, "paced")
        await peer.ask("Count to 100000", taskId="socket")
        await peer.wait_for(b'"content":"20 "')
        nursery.start_soon(read_on, peer)
        streamed: list[Chunk] = []

        async def stream() -> None:
            body = {"taskId": "stream", "input": {"content": "Count to 100000"}, "context": {"sessionId": session}}
            answer = await client.post("/agents/paced/tasks", json=body, headers={"Accept": "text/event-stream"})
            streamed.extend(decode_chunk(line) for line in events_in(b"HTTP/1.1 200 OK\r\n\r\n" + answer.content))

        waited: list[httpx2.Response] = []

        async def wait() -> None:
            body = {"taskId": "wait", "input": {"content": "Count to 100000"}}
            waited.append(await client.post("/agents/paced/tasks", json=body))

        async with trio.open_nursery() as viewers:
            viewers.start_soon(stream)
            viewers.start_soon(wait)
            for task_id in ("stream", "wait"):
                await reached(client, task_id, 20)
            disk.refuse(pid)

        # what ran has ended for its viewers, with what is committed and nothing else
        await peer.wait_for(b'"code":"store_unavailable"')
        has_only_committed(chunks_of(peer, "socket"), await stored(client, "socket"))
        has_only_committed(streamed, await stored(client, "stream"))
        assert (waited[0].status_code, waited[0].json()["code"]) == (503, "store_unavailable")
        for task_id in ("socket", "stream", "wait"):
            held = await stored(client, task_id)
            assert not held[-1].final
            assert [chunk.seq for chunk in held] == list(range(1, len(held) + 1))

        # new work is refused, by every door
        work = {"input": {"content": "Hi"}}
        for answer in (
            await client.post("/agents/burst/tasks", json=work),
            await client.post("/agents/burst/tasks", json=work, headers={"Prefer": "respond-async"}),
            await client.post("/agents/burst/tasks", json=work, headers={"Accept": "text/event-stream"}),
            await client.post(f"/sessions/{session}/tasks", json=work),
            await client.post("/sessions", json={"agentId": "burst"}),
            await client.patch(f"/sessions/{session}", json={"state": {"a": 1}}),
            await client.get("/health/ready"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), answer.text
            assert int(answer.headers["Retry-After"]) > 0
            assert str(disk.folder) not in answer.text
        other = await connect_raw(url, "paced")
        async with other.stream:
            await other.ask("Hi", taskId="refused")
            await other.wait_for(b'"taskId":"refused"')
            has_only_committed(chunks_of(other, "refused"), [])

        # reading goes on
        assert (await client.get("/health/live")).status_code == 200
        assert [task["taskId"] for task in (await client.get(f"/sessions/{session}/tasks")).json()["tasks"]][1:] == [
            done.json()["taskId"]
        ]
        said = (await client.get(f"/sessions/{session}/messages")).json()["messages"]
        assert said[:2] == messages["messages"]
        assert [line["content"] for line in said[2:]] == ["Count to 100000"]
        assert (await client.get(f"/agents/paced/tasks/{done.json()['taskId']}")).json() == done.json()
        replayed = await stream_of(client, f"/agents/paced/tasks/{done.json()['taskId']}/events")
        assert fold(replayed).status == "completed"

        disk.give_room(pid)
        seen = {"socket": chunks_of(peer, "socket")[:-1], "stream": streamed[:-1]}
        for task_id in ("socket", "stream", "wait"):
            task = await ended(client, task_id)
            assert (task["status"], task["error"]["code"]) == ("failed", "store_unavailable")
            if task_id in seen:  # who comes back gets the rest, which is the end
                rest = await stream_of(
                    client, f"/agents/paced/tasks/{task_id}/events", **{"Last-Event-ID": str(len(seen[task_id]))}
                )
                assert [chunk.final for chunk in rest] == [True]
                assert seen[task_id] + rest == await stored(client, task_id)
        assert (await client.get("/health/ready")).status_code == 200
        answer = await client.post(f"/sessions/{session}/tasks", json={"input": {"content": "What is my name?"}})
        assert "Alice" in answer.json()["output"]["content"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "drain"])
async def test_what_could_not_end_for_want_of_room_ends_at_the_next_start_that_has_some(
    small: SmallDisk, how: signal.Signals
) -> None:
    async with serving_on(small) as (process, client):
        body = {"taskId": "t", "input": {"content": "Count to 100000"}}
        await client.post("/agents/paced/tasks", json=body, headers={"Prefer": "respond-async"})
        await reached(client, "t", 20)
        small.refuse()
        assert await stream_of(client, "/agents/paced/tasks/t/events")  # to its uncommitted end
        held = await stored(client, "t")
        process.process.send_signal(how)
        assert await process.wait() == (0 if how is signal.SIGTERM else -how)
    assert "disk" in await refused_start(small)
    small.give_room()
    async with serving_on(small) as (_, client):
        task = await ended(client, "t")
        assert (task["status"], task["error"]["code"]) == ("failed", "interrupted")
        after = await stored(client, "t")
        assert after[:-1] == held
        assert after[-1].final


async def test_a_start_on_a_read_only_filesystem_is_refused_in_one_line_and_changes_nothing(small: SmallDisk) -> None:
    async with serving_on(small) as (process, client):
        await client.post("/agents/burst/tasks", json={"taskId": "t", "input": {"content": "Count to 3"}})
        process.process.terminate()
        assert await process.wait() == 0
    small.remount("ro")
    assert "Read-only file system" in await refused_start(small)
    small.remount("rw")
    async with serving_on(small) as (_, client):
        assert (await client.get("/agents/burst/tasks/t")).json()["status"] == "completed"


async def test_a_store_that_has_filled_its_disk_by_itself_goes_on_when_that_is_made_larger(small: SmallDisk) -> None:
    async with serving_on(small) as (_, client):
        names: list[str] = []
        while True:
            body = {"taskId": f"t{len(names)}", "input": {"content": "Count to 9999"}}
            answer = await client.post("/agents/burst/tasks", json=body)
            if answer.json().get("status") != "completed":
                break
            names.append(f"t{len(names)}")
        # before the task is accepted, or in the midst of it
        refused = answer.json() if answer.status_code == 503 else answer.json()["error"]
        assert refused["code"] == "store_unavailable"
        assert names
        small.remount("size=12m")
        answer = await client.post("/agents/burst/tasks", json={"input": {"content": "Count to 9999"}})
        assert answer.json()["status"] == "completed"
        for name in names:
            task = (await client.get(f"/agents/burst/tasks/{name}")).json()
            output = fold(await stored(client, name, "burst")).output()
            assert output is not None
            assert task["output"]["content"] == output.content
