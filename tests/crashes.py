"""A server that is killed again and again under load: its clients, what they were told, and whether it is still so."""

from __future__ import annotations

import json
import random
import signal
import socket
import sqlite3
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import h11
import httpx2
import msgspec
import trio

from hector_trio.log import READ_BYTES, now_ms
from hector_trio.models import Task
from hector_trio.stores.sql import SqlStore, open_sql
from hector_trio.task import TaskRow, decode_chunk, fold, split_lines, wire_task
from tests import HANG
from tests.sockets import RawPeer
from tests.test_cli import CLEAN, HECTOR, running

CONFIG = """
server: {shutdown_grace: 0.3}
log: {level: warning, format: text}
tasks: {timeout: 30}
llms:
  paced: {type: demo, words_per_second: 300}
  burst: {type: demo, words_per_second: 0}
agents:
  paced: {llm: paced}
  burst: {llm: burst}
  asks: {type: python, function: asks.py:asks}
"""

ASKS = """
async def asks(ctx):
    count = 0 if ctx.resume is None else ctx.resume.saved
    await ctx.emit_text(f"{count} {None if ctx.resume is None else ctx.resume.answer} ")
    if count < 2:
        await ctx.ask(f"question {count}", saved=count + 1)
    await ctx.emit_bytes(bytes(range(256)), "application/octet-stream")
"""
"""An agent that asks twice."""

AGENTS = ("paced", "burst", "asks")
OWNER = "local"
REFUSALS = ("draining", "store_unavailable", "rate_limited", "gone", "session_not_found")
"""What an error may say that is not of the log."""
LEFT: tuple[type[BaseException], ...] = (
    httpx2.TransportError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    OSError,
)
"""What a client sees when its server dies."""


class Seen(msgspec.Struct, rename="camel"):
    """What has to be known of a received chunk."""

    task_id: str
    seq: int
    content: Any
    final: bool
    code: str | None = None
    first_seq: int | None = None


_seen = msgspec.json.Decoder(Seen)


# --- what clients were told -------------------------------------------------------------------------------------------


class Witness:
    """Everything that the server has acknowledged, over all its lives."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[str, str], dict[int, bytes]] = {}
        """Of each task of which a client has heard, the chunks as they came, by number."""
        self.joined: dict[tuple[str, str], list[Seen]] = {}
        self.ended: dict[tuple[str, str], Any] = {}
        """Tasks as they were told when they had ended."""
        self.answered: Counter[tuple[str, str]] = Counter()
        """How many answers of a task were accepted."""
        self.detached: set[tuple[str, str]] = set()
        self.sessions: dict[str, int] = {}
        """Of each session the number that was last put into its state."""
        self.deleted: set[str] = set()
        self.doomed: set[str] = set()
        """Sessions whose deletion was asked for."""
        self.fresh: set[tuple[str, str]] = set()
        """Tasks of which something was heard since the last audit."""
        self.bytes = 0
        self._moved = trio.lowlevel.ParkingLot()

    async def wait_bytes(self, count: int) -> None:
        """Returns when clients have received so much since the last audit."""
        while self.bytes < count:
            await self._moved.park()

    def heard(self, data: bytes) -> None:
        self.bytes += len(data)
        self._moved.unpark_all()

    def accepted(self, agent: str, task_id: str) -> None:
        self.chunks.setdefault((agent, task_id), {})
        self.fresh.add((agent, task_id))

    def told(self, agent: str, task: Any) -> None:
        """A task as an answer of REST describes it."""
        self.accepted(agent, task["taskId"])
        if task["status"] in ("completed", "failed", "cancelled"):
            self.ended[agent, task["taskId"]] = task

    def saw(self, agent: str, lines: list[bytes], begins: Mapping[str, int]) -> None:
        """What one viewer was sent, of one task or of several: each without a hole, from the beginning on or from
        behind where it ``begins``."""
        last: dict[str, int] = {}
        for line in lines:
            if line.startswith(b'{"type":'):
                self._answered(agent, json.loads(line))
                continue
            chunk = _seen.decode(line)
            if chunk.seq == 0:
                assert chunk.final, line
                assert chunk.code in REFUSALS, line
                continue
            first, begin = chunk.first_seq or chunk.seq, begins.get(chunk.task_id, 0)
            # whoever has it all is told the final chunk once more
            again = chunk.final and begin > 0 and chunk.task_id not in last
            assert first == last.get(chunk.task_id, begin) + 1 or again, (begins, last, line)
            last[chunk.task_id] = chunk.seq
            name = (agent, chunk.task_id)
            self.accepted(*name)
            if chunk.first_seq is not None:
                self.joined.setdefault(name, []).append(chunk)
            else:
                assert self.chunks[name].setdefault(chunk.seq, line) == line, "two viewers were told different things"

    def _answered(self, agent: str, frame: Any) -> None:
        """The answer to a control frame."""
        if frame["type"] == "ok" and "taskId" in frame:
            self.accepted(agent, frame["taskId"])
            if frame["of"] == "input":
                self.answered[agent, frame["taskId"]] += 1
            elif frame["of"] == "detach":
                self.detached.add((agent, frame["taskId"]))


# --- clients ----------------------------------------------------------------------------------------------------------


def frames_in(data: bytes) -> Iterator[bytes]:
    """The payloads of the complete text frames behind an upgrade; none where it was refused."""
    head, _, data = data.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 101", b"HTTP/1.1 503")) or not data, head
    if not head.startswith(b"HTTP/1.1 101"):
        return
    at = 0
    while len(data) - at >= 2:
        size, skip = data[at + 1], 2
        if size == 126:
            if len(data) - at < 4:
                return
            (size,), skip = struct.unpack_from("!H", data, at + 2), 4
        elif size == 127:
            if len(data) - at < 10:
                return
            (size,), skip = struct.unpack_from("!Q", data, at + 2), 10
        if len(data) - at < skip + size:
            return
        if data[at] == 0x81:
            yield data[at + skip : at + skip + size]
        at += skip + size


def events_in(data: bytes) -> list[bytes]:
    """The data of the complete events in an HTTP response; none in one that is not 200."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    status, body = 0, b""
    with suppress(h11.RemoteProtocolError):
        while not isinstance(event := parser.next_event(), type(h11.NEED_DATA) | type(h11.PAUSED) | h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
    assert status in (0, 200, 204, 400, 404, 503), data
    events = body.split(b"\n\n")[:-1] if status == 200 else []
    return [line[6:] for event in events for line in event.split(b"\n") if line.startswith(b"data: ")]


class Crowd:
    """Clients of one life of the server. Each does one thing after the other until the server is gone."""

    def __init__(self, witness: Witness, url: str, rng: random.Random, life: int) -> None:
        self._witness = witness
        self._url = url
        self._address = url.split("://")[1]
        self._rng = rng
        self._life = life
        self._names: list[tuple[str, str]] = []
        self._heard: list[tuple[str, list[bytes], Mapping[str, int]]] = []
        """Of each stream the agent, what was received, and where it was to begin."""

    async def come(self, clients: int) -> None:
        """Returns when the server is gone and every client has noticed."""
        async with (
            httpx2.AsyncClient(base_url=self._url, timeout=30, trust_env=False, verify=False) as http,
            trio.open_nursery() as nursery,
        ):
            for number in range(clients):
                kinds = (self._socket, self._socket, self._stream, self._follow, self._session, self._ask)
                nursery.start_soon(self._live, kinds[number % len(kinds)], http)
        for heard in self._heard:
            self._witness.saw(*heard)

    async def _live(self, kind: Any, http: httpx2.AsyncClient) -> None:
        with suppress(*LEFT):
            while True:
                await kind(http)

    def _task(self, agent: str) -> dict[str, Any]:
        rng = self._rng
        self._names.append((agent, f"t{self._life}-{len(self._names)}"))
        most = 300 if agent == "paced" else 3000
        task: dict[str, Any] = {
            "taskId": self._names[-1][1],
            "input": {"type": "text/plain", "content": f"Count to {rng.randrange(1, most)}"},
            "onDisconnect": rng.choice(["cancel", "continue", {"graceMs": 100}, {"graceMs": 60_000}]),
        }
        alive = [each for each in self._witness.sessions if each not in self._witness.doomed]
        if agent == "paced" and alive and rng.random() < 0.4:
            task["context"] = {"sessionId": rng.choice(alive)}
            task["multitask"] = rng.choice(["enqueue", "enqueue", "interrupt"])
        return task

    def _known(self) -> tuple[str, str] | None:
        return self._rng.choice(self._names[-50:]) if self._names else None

    async def _socket(self, http: httpx2.AsyncClient) -> None:
        """A WebSocket with a few tasks, also somebody else's, that stays, cancels, detaches, answers, or leaves in one
        of the ways there are."""
        rng, agent = self._rng, self._rng.choice(("paced", "asks"))
        peer = RawPeer(await self._connect())
        begins: dict[str, int] = {}
        try:
            await peer.stream.send_all(
                f"GET /agents/{agent}/stream HTTP/1.1\r\nHost: {self._address}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            for _ in range(rng.randrange(1, 4)):
                task = self._task(agent)
                begins[task["taskId"]] = 0
                await peer.send_text(json.dumps(task))
            names = list(begins)
            known = self._known()
            if known is not None and known[0] == agent and known[1] not in begins:
                begins[known[1]] = rng.choice([0, rng.randrange(30)])
                await self._control(peer, "attach", known[1], after=begins[known[1]])
            await self._hear(peer.stream, peer.received, rng.randrange(0, 60_000))
            way = rng.choice(["input", "input", "cancel", "detach", "close", "fin", "rst", "stay"])
            if way == "input":
                for name in names:
                    await self._control(peer, "input", name, input={"content": "an answer"})
                await self._hear(peer.stream, peer.received, rng.randrange(0, 60_000))
            elif way in ("cancel", "detach"):
                await self._control(peer, way, rng.choice(names))
            elif way != "stay":
                await peer.leave(way)
            if way != "rst":
                await self._hear(peer.stream, peer.received, 1 << 30)
        finally:
            self._heard.append((agent, list(frames_in(bytes(peer.received))), begins))
            await trio.aclose_forcefully(peer.stream)

    async def _control(self, peer: RawPeer, kind: str, task_id: str, **members: Any) -> None:
        await peer.send_text(json.dumps({"type": kind, "taskId": task_id, **members}))

    async def _stream(self, http: httpx2.AsyncClient) -> None:
        """A POST that is answered by a stream."""
        agent = self._rng.choice(AGENTS)
        task = self._task(agent)
        await self._events("POST", f"/agents/{agent}/tasks", agent, json.dumps(task).encode(), {task["taskId"]: 0})

    async def _follow(self, http: httpx2.AsyncClient) -> None:
        """A viewer of somebody else's task, from somewhere on."""
        known = self._known()
        if known is None:
            await trio.lowlevel.checkpoint()
            return
        agent, task_id = known
        after = self._rng.choice([0, self._rng.randrange(30)])
        await self._events("GET", f"/agents/{agent}/tasks/{task_id}/events?after={after}", agent, b"", {task_id: after})

    async def _connect(self) -> trio.SocketStream:
        host, _, port = self._address.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def _events(self, method: str, path: str, agent: str, body: bytes, begins: Mapping[str, int]) -> None:
        received = bytearray()
        async with await self._connect() as stream:
            try:
                await stream.send_all(
                    b"%b %b HTTP/1.1\r\nHost: %b\r\nAccept: text/event-stream\r\nContent-Length: %d\r\n\r\n%b"
                    % (method.encode(), path.encode(), self._address.encode(), len(body), body)
                )
                await self._hear(stream, received, self._rng.randrange(100, 200_000))
                if self._rng.random() < 0.3:
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            finally:
                self._heard.append((agent, events_in(bytes(received)), begins))

    async def _hear(self, stream: trio.SocketStream, received: bytearray, enough: int) -> None:
        """Reads until there is enough, the server has closed, or nothing is to be expected any more."""
        with trio.move_on_after(self._rng.uniform(0.1, 2)):
            while len(received) < enough:
                data = await stream.receive_some(65536)
                if not data:
                    return
                received += data
                self._witness.heard(data)
                if b'"final":true' in received[-400:] and enough < 1 << 30:
                    return

    async def _session(self, http: httpx2.AsyncClient) -> None:
        """A session that is made, counted up in, given tasks, and sometimes deleted."""
        witness, rng = self._witness, self._rng
        answer = await http.post("/sessions", json={"agentId": "paced"})
        if answer.status_code != 201:
            assert answer.json()["code"] in ("draining", "store_unavailable"), answer.text
            await trio.sleep(0.05)
            return
        session = answer.json()["sessionId"]
        witness.sessions[session] = 0
        for number in range(1, rng.randrange(2, 6)):
            answer = await http.patch(f"/sessions/{session}", json={"state": {"n": number}})
            if answer.status_code == 200:
                witness.sessions[session] = number
            task = {**self._task("paced"), "context": {"sessionId": session}, "onDisconnect": "continue"}
            answer = await http.post(f"/sessions/{session}/tasks", json=task, headers={"Prefer": "respond-async"})
            if answer.status_code in (200, 202):
                witness.told("paced", answer.json())
        if rng.random() < 0.3:
            witness.doomed.add(session)
            if (await http.delete(f"/sessions/{session}")).status_code == 204:
                witness.deleted.add(session)

    async def _ask(self, http: httpx2.AsyncClient) -> None:
        """Plain requests: one that waits for its answer, a look, a cancel."""
        witness, rng = self._witness, self._rng
        agent = rng.choice(AGENTS)
        task = {"input": {"content": f"Count to {rng.randrange(1, 30)}"}}
        answer = await http.post(f"/agents/{agent}/tasks", json=task)
        while answer.status_code == 200:
            witness.told(agent, answer.json())
            if answer.json()["status"] != "input_required" or rng.random() < 0.2:
                break
            path = f"/agents/{agent}/tasks/{answer.json()['taskId']}/input"
            answer = await http.post(path, json={"input": {"content": "an answer"}})
            if answer.status_code == 200:
                witness.answered[agent, answer.json()["taskId"]] += 1
        known = self._known()
        if known is not None:
            agent, task_id = known
            way = rng.choice(["", "/cancel", "/events?pageSize=100"])
            path = f"/agents/{agent}/tasks/{task_id}{way}"
            answer = await (http.post(path) if way == "/cancel" else http.get(path))
            if answer.status_code == 200 and not way.startswith("/events"):
                witness.told(agent, answer.json())
            elif answer.status_code == 200:
                lines = [bytes(line) for line in msgspec.json.decode(answer.content, type=Chunks).chunks]
                witness.saw(agent, lines, {})


class Chunks(msgspec.Struct):
    chunks: list[msgspec.Raw]


# --- the lives of a server --------------------------------------------------------------------------------------------


@asynccontextmanager
async def life(folder: Path) -> AsyncIterator[tuple[trio.Process, Any]]:
    """``hector serve`` on the folder's store; its process, and what waits for its URL. It logs into ``log``."""
    with (folder / "log").open("ab") as log:
        command = [*HECTOR, "serve", "--config", "config.yaml", "--port", "0"]
        async with running(command, cwd=folder, stderr=log, env=CLEAN) as process:

            async def url() -> str:
                return (await process.wait_said(r"listening  (http://127\S+)"))[1]

            yield process.process, url


async def torment(folder: Path, rounds: int, seed: int, *, clients: int = 48) -> dict[str, int]:
    """Kills a server ``rounds`` times, at moments that ``seed`` draws: while it starts, migrates, recovers, works and
    shuts down. Looks after each death and in the end at what is left; returns how much there was to look at.

    Raises: AssertionError for whatever is not so any more.
    """
    rng = random.Random(seed)
    witness = Witness()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "asks.py").write_text(ASKS)
    for number in range(rounds):
        # the first lives end while the store is being made
        when = "start" if number < 2 else rng.choice(["start", "migration", "shutdown", "load", "load", "load"])
        if when == "migration":
            take_back_a_migration(folder / ".hector" / "hector.db")
        async with life(folder) as (process, url):
            if when in ("start", "migration"):
                await claimed(folder, process.pid)
                await trio.sleep(rng.uniform(0, 0.4))  # no moment is the wrong one
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(Crowd(witness, await url(), rng, number).come, clients)
                    with trio.move_on_after(5):
                        await witness.wait_bytes(rng.randrange(1_000_000))
                    if when == "shutdown":
                        process.send_signal(signal.SIGTERM)
                        await trio.sleep(rng.uniform(0, 1))
                    process.kill()
            process.kill()
            await process.wait()
        await audit(folder, witness)
    async with life(folder) as (process, url):
        await quiet(await url())
        process.terminate()
        with trio.fail_after(20):
            assert await process.wait() == 0
    return await audit(folder, witness, ended=True)


async def claimed(folder: Path, pid: int) -> None:
    """Returns when the process has taken the store for itself: what it does to it comes after that."""
    lock = folder / ".hector" / "hector.db.lock"
    with trio.fail_after(30):
        while not (lock.exists() and f'"pid": {pid}' in lock.read_text()):  # noqa: ASYNC110  another process
            await trio.sleep(0.002)


def take_back_a_migration(path: Path) -> None:
    """Leaves the store as a version wrote it that did not know of questions; where there is one, it stays as it is."""
    with closing(sqlite3.connect(path)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if "bodies" not in tables or database.execute("SELECT version_num FROM alembic_version").fetchone() != (
            "0003",
        ):
            return
        for statement in (
            "DROP INDEX ix_tasks_recent",
            "ALTER TABLE tasks DROP COLUMN status_at",
            "ALTER TABLE tasks DROP COLUMN mark",
            "DROP INDEX ix_messages_task",
            "ALTER TABLE messages DROP COLUMN original",
            "UPDATE alembic_version SET version_num = '0002'",
        ):
            database.execute(statement)
        if database.execute("SELECT count(*) FROM bodies WHERE question IS NOT NULL").fetchone() == (0,):
            database.execute("DROP INDEX ix_tasks_unpruned")
            database.execute("ALTER TABLE tasks DROP COLUMN pruned_at")
            database.execute("ALTER TABLE bodies DROP COLUMN question")
            database.execute("UPDATE alembic_version SET version_num = '0001'")


async def quiet(url: str) -> None:
    """Returns when every task has ended."""
    async with httpx2.AsyncClient(base_url=url, timeout=30, trust_env=False, verify=False) as http:
        with trio.fail_after(2 * HANG):
            for agent in AGENTS:
                for status in ("pending", "running"):
                    path = f"/agents/{agent}/tasks?status={status}&pageSize=1"
                    while (await http.get(path)).json()["total"]:
                        pass


# --- what is left -----------------------------------------------------------------------------------------------------


async def audit(folder: Path, witness: Witness, *, ended: bool = False) -> dict[str, int]:
    """Compares the store of a dead server with what its clients were told: with what they were told since the last
    audit, or (``ended``: every task is to have ended) with everything."""
    log = (folder / "log").read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 2000 :]
    path = folder / ".hector" / "hector.db"
    names = list(witness.chunks) if ended else list(witness.fresh)
    witness.fresh.clear()
    witness.bytes = 0
    if not path.exists():
        assert not names
        return {}
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    found = {"tasks": 0, "chunks": 0, "sessions": 0, "messages": 0}
    async with open_sql(path, instance="audit") as store:
        for agent, task_id in names:
            row = await store.get_task(OWNER, agent, task_id)
            if row is None:
                assert agent == "paced", "a task is gone"
                assert witness.doomed, "a task is gone"
                continue
            assert row.session_id not in witness.deleted
            found["tasks"] += 1
            found["chunks"] += await check_task(store, row, witness, ended=ended)
        if ended:
            for agent in AGENTS:
                for status in ("pending", "running"):
                    assert not (await store.list_tasks(OWNER, agent_id=agent, status=status)).items
        for session_id, count in witness.sessions.items():
            session = await store.get_session(OWNER, session_id, now=now_ms())
            if session is None:
                assert session_id in witness.doomed, "a session is gone"
                continue
            assert session_id not in witness.deleted, "a deleted session is back"
            assert session.state.get("n", 0) >= count
            if ended:
                found["sessions"] += 1
                found["messages"] += await check_conversation(store, session_id)
    return found


async def check_task(store: SqlStore, row: TaskRow, witness: Witness, *, ended: bool) -> int:
    """The log has no hole and one end, the row is what it adds up to, and everybody was told the truth."""
    lines: list[bytes] = []
    while segments := await store.read_log(row.key, len(lines), READ_BYTES):
        for segment in segments:
            assert segment.first_seq == len(lines) + 1
            lines += split_lines(segment.data)
            assert segment.last_seq == len(lines)
    assert row.last_seq == len(lines)
    chunks = [decode_chunk(line) for line in lines]
    assert [chunk.seq for chunk in chunks] == list(range(1, len(lines) + 1))
    assert [chunk.seq for chunk in chunks if chunk.final] == ([len(lines)] if row.ended else [])
    if row.ended:
        folded = fold(chunks)
        assert (row.status, row.output, row.error) == (folded.status, folded.output(), folded.error)
    elif row.status == "input_required":
        assert row.question is not None
        assert chunks[-1].content == {"status": "input_required", "prompt": row.question.question}
    else:
        assert not ended, row
    name = (row.agent_id, row.task_id)
    asked = sum(chunk.chunk_type == "metadata" and "prompt" in chunk.content for chunk in chunks)
    assert witness.answered[name] <= asked - (row.status == "input_required"), "an answer was forgotten"
    if name in witness.detached:
        assert row.ended or row.policy != "cancel"
        assert row.policy != "continue" or not row.ended or chunks[-1].reason != "client_left"
    for seq, line in witness.chunks[name].items():
        assert seq <= len(lines), f"chunk {seq} of {name} was received and is gone: {line!r}"
        assert lines[seq - 1] == line
    for chunk in witness.joined.get(name, ()):
        assert chunk.first_seq is not None
        assert chunk.seq <= len(lines)
        assert chunk.content == "".join(str(each.content) for each in chunks[chunk.first_seq - 1 : chunk.seq])
    if name in witness.ended:
        assert msgspec.convert(witness.ended[name], Task) == wire_task(row)
    return len(lines)


async def check_conversation(store: SqlStore, session_id: str) -> int:
    """A user's line for every task that has begun, its answer behind it, in the order in which they were accepted."""
    lines: list[tuple[str, str, Any, str | None]] = []
    token = ""
    while True:
        page = await store.list_messages(OWNER, session_id, now=now_ms(), token=token)
        lines += [(each.task_id, each.role, each.content, each.partial_status) for each in page.items]
        token = page.next_token
        if not token:
            break
    rows: dict[str, TaskRow] = {}
    token = ""
    while True:
        tasks = await store.list_tasks(OWNER, session_id=session_id, token=token)
        rows.update((row.task_id, row) for row in tasks.items)
        token = tasks.next_token
        if not token:
            break
    expected: list[tuple[str, str, Any, str | None]] = []
    for task_id in dict.fromkeys(line[0] for line in lines):
        row = rows[task_id]
        request = msgspec.json.decode(row.request)
        expected.append((task_id, "user", request["input"]["content"], None))
        if row.output is not None:
            partial = None if row.status == "completed" else row.status
            expected.append((task_id, "agent", row.output.content, partial))
    assert lines == expected
    begun = {task_id for task_id, row in rows.items() if row.output is not None}
    assert begun <= {line[0] for line in lines}
    return len(lines)
