"""The application under ``hypercorn -k trio``, as a process, and its own rules on what it answers and when."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from hector_trio.client import Client
from hector_trio.config import Settings, Token
from hector_trio.models import TaskError
from hector_trio.server import SelfOpeningApp
from hector_trio.task import decode_chunk
from tests import HANG
from tests.engines import store_of
from tests.hostile import Peer
from tests.serving import settings_of
from tests.sockets import connect_raw
from tests.test_cli import CLEAN, Done, Running, running

HYPERCORN = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", "127.0.0.1:0"]
APP = "hector_trio.asgi:app"


@asynccontextmanager
async def hypercorn(folder: Path, *flags: str, **environ: str) -> AsyncIterator[tuple[Running, str, str]]:
    """Hypercorn in a folder of its own, its URL, and what it has said up to then."""
    env = {**CLEAN, "HECTOR_STORE_URL": "memory", **environ}
    command = [*HYPERCORN, *flags, APP]
    async with running(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        found = await process.wait_said(r"(?s)(.*)Running on (http://127\.0\.0\.1:\d+)")
        yield process, found[2], found[1]


async def refused(folder: Path, **environ: str) -> Done:
    """A start without worker processes, whose exit code Hypercorn would not pass on."""
    with trio.fail_after(HANG):
        done = await trio.run_process(
            [*HYPERCORN, "-w", "0", APP],
            cwd=folder,
            env={**CLEAN, "PYTHONWARNINGS": "", **environ},  # Hypercorn leaves its sockets unclosed then
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


async def test_hypercorn_serves_the_demo_with_our_connection_class(tmp_path: Path) -> None:
    async with hypercorn(tmp_path) as (_, url, said), Client(url) as client:
        assert "connection_class_installed" in said
        task = await client.run("assistant", "count to 3")
        assert task.status == "completed"
        async with client.stream("assistant", "count to 2") as chunks:
            assert [chunk.content async for chunk in chunks if chunk.chunk_type == "text"] == ["1 ", "2"]


async def test_the_configuration_named_by_the_environment_is_served(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("agents: {mine: {description: Of the file}}\n")
    async with (
        hypercorn(tmp_path, HECTOR_CONFIG="own.yaml") as (_, url, _),
        httpx2.AsyncClient(base_url=url, timeout=HANG) as client,
    ):
        agents = (await client.get("/agents")).json()["agents"]
        assert [(agent["agentId"], agent["description"]) for agent in agents] == [("mine", "Of the file")]


async def test_hypercorn_can_be_left_as_it_is_and_says_so(tmp_path: Path) -> None:
    async with hypercorn(tmp_path, HECTOR_CONNECTION="plain") as (_, url, said), Client(url) as client:
        assert "connection_class_not_installed" in said
        assert (await client.run("assistant", "count to 3")).status == "completed"
        async with client.stream("assistant", "count to 2") as chunks:
            assert [chunk.content async for chunk in chunks if chunk.chunk_type == "text"] == ["1 ", "2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("agents: {x: {type: nope}}", "agents.x.type"), ("{", "bad.yaml"), (None, "bad.yaml: cannot be read")],
)
async def test_a_wrong_configuration_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    done = await refused(tmp_path, HECTOR_CONFIG="bad.yaml")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("hector_trio: ")
    assert said in line


async def test_a_wrong_variable_is_one_line(tmp_path: Path) -> None:
    done = await refused(tmp_path, HECTOR_LIMITS_RUNNING="many")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "HECTOR_LIMITS_RUNNING" in line


async def test_a_store_that_another_process_has_ends_the_start_and_names_that_process(tmp_path: Path) -> None:
    store = str(tmp_path / "hector.db")
    async with hypercorn(tmp_path, "-w", "0", HECTOR_STORE_URL=store) as (process, url, _), Client(url) as client:
        done = await refused(tmp_path, HECTOR_STORE_URL=store)
        assert done.code == 1
        assert f"is in use by process {process.process.pid}" in done.err.splitlines()[-2]
        assert (await client.run("assistant", "count to 3")).status == "completed"


@pytest.mark.parametrize("graceful", ["1", "3"])
async def test_sigterm_ends_the_streams_with_their_final_chunks_and_1012_and_the_process_with_0(
    tmp_path: Path, graceful: str
) -> None:
    flags = ("--graceful-timeout", graceful)
    store = str(tmp_path / "hector.db")
    async with hypercorn(tmp_path, *flags, HECTOR_STORE_URL=store) as (process, url, _), Client(url) as client:
        session = (await client.create_session("assistant")).session_id
        raw = await connect_raw(url)
        async with raw.stream, client.stream("assistant", "count to 10000", task_id="cut") as viewer:
            await raw.ask("count to 10000", taskId="t", context={"sessionId": session})
            peer = Peer(raw.stream)
            with trio.fail_after(HANG):
                chunks = [decode_chunk((await peer.frame())[1])]
                waiting = await client.submit("assistant", "count to 3", task_id="w", session_id=session)
                assert waiting.status == "pending"
                process.process.send_signal(signal.SIGTERM)
                while not chunks[-1].final:
                    first, payload = await peer.frame()
                    assert first == 0x81
                    chunks.append(decode_chunk(payload))
                assert (chunks[-1].chunk_type, chunks[-1].status, chunks[-1].code) == ("error", "failed", "interrupted")
                assert [chunk.seq for chunk in chunks] == list(range(1, len(chunks) + 1))
                assert await peer.close_code() == 1012
                assert [chunk.code async for chunk in viewer][-1] == "interrupted"
        assert await process.wait() == 0
    async with store_of("sql", tmp_path) as closed:
        row = await closed.get_task("local", "assistant", "w")
        assert row is not None
        assert row.status == "pending"
    async with hypercorn(tmp_path, HECTOR_STORE_URL=store) as (_, url, _), Client(url) as client:
        for task_id in ("t", "cut"):
            task = await client.task("assistant", task_id)
            assert task.status == "failed"
            assert isinstance(task.error, TaskError)
            assert task.error.code == "interrupted"
        async with client.events("assistant", "w") as events:
            assert [chunk.status async for chunk in events][-1] == "completed"


# --- without a server -------------------------------------------------------------------------------------------------


class Lifespan:
    """What a server says to an application's lifespan and hears of it."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.begin, self.end = trio.Event(), trio.Event()
        self._said = 0

    async def receive(self) -> dict[str, Any]:
        self._said += 1
        if self._said == 1:
            return {"type": "lifespan.startup"}
        await self.end.wait()
        return {"type": "lifespan.shutdown"}

    async def send(self, message: dict[str, Any]) -> None:
        self.heard.append(message)
        self.begin.set()


@asynccontextmanager
async def living(settings: Settings) -> AsyncIterator[SelfOpeningApp]:
    app = SelfOpeningApp(settings, {})
    lifespan = Lifespan()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app, {"type": "lifespan"}, lifespan.receive, lifespan.send)
            await lifespan.begin.wait()
            yield app
            lifespan.end.set()
    assert [message["type"] for message in lifespan.heard] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


async def answered(app: SelfOpeningApp, server: Any, kind: str = "http") -> tuple[int, bytes]:
    """The answer to a request for the agents that came in at the address ``server``."""
    scope: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http" if kind == "http" else "ws",
        "path": "/agents",
        "raw_path": b"/agents",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": server,
        "subprotocols": [],
        "state": {},
        "extensions": {"websocket.http.response": {}},
    }
    sent: list[dict[str, Any]] = []
    unread = [{"type": f"{kind}.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not unread:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return unread.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with trio.fail_after(5):
        await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def test_a_request_at_an_address_that_others_can_reach_is_refused_without_tokens() -> None:
    async with living(settings_of()) as app:
        for server in (("192.0.2.1", 80), ("0.0.0.0", 80), ("2001:db8::1", 443), ("example.com", 80)):
            for kind in ("http", "websocket"):
                status, body = await answered(app, server, kind)
                assert (status, b"no tokens" in body) == (403, True), server


@pytest.mark.parametrize("server", [("127.0.0.1", 80), ("::1", 80), ("/run/socket", None), None])
async def test_a_request_from_this_machine_is_served_without_tokens(server: Any) -> None:
    async with living(settings_of()) as app:
        status, body = await answered(app, server)
        assert (status, b'"assistant"' in body) == (200, True)


async def test_with_tokens_or_on_purpose_any_address_is_served() -> None:
    token = Token("a", "0123456789abcdef")
    async with living(settings_of(auth={"tokens": [token]}, server={"allowed_hosts": ["*"]})) as app:
        assert (await answered(app, ("192.0.2.1", 80)))[0] == 401
    async with living(settings_of(server={"insecure": True, "allowed_hosts": ["*"]})) as app:
        assert (await answered(app, ("192.0.2.1", 80)))[0] == 200


async def test_a_server_without_a_lifespan_is_told_what_it_needs() -> None:
    with pytest.raises(RuntimeError, match="trio worker"):
        await answered(SelfOpeningApp(settings_of(), {}), ("127.0.0.1", 80))


async def test_a_start_that_fails_is_told_to_the_server_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("This is no database at all, and never was.")
    lifespan = Lifespan()
    app = SelfOpeningApp(settings_of(store={"url": str(tmp_path / "x.db")}), {})
    with trio.fail_after(5):
        await app({"type": "lifespan"}, lifespan.receive, lifespan.send)
    (message,) = lifespan.heard
    assert message["type"] == "lifespan.startup.failed"
    assert re.fullmatch(r"The file \S+ is not a database", message["message"])
