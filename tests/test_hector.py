"""``Hector``, as the scripts that use it do: registered, run as a process, in a nursery, and under Hypercorn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from quart import request
from quart_trio import QuartTrio

from hector_trio import Client, Context, Hector
from hector_trio.agents.function import FunctionAgent, SyncContext
from hector_trio.errors import ConfigError, StartError
from hector_trio.server import Serving
from tests import HANG
from tests.test_cli import CLEAN, running

SCRIPT = """
from hector_trio import Context, Hector

app = Hector()

@app.agent("echo", description="Says it again")
async def echo(ctx: Context) -> None:
    await ctx.emit_text(ctx.text)

@app.agent("endless")
async def endless(ctx: Context) -> None:
    while True:
        await ctx.emit_text("again ")

if __name__ == "__main__":
    app.run(port=0, host=["127.0.0.1"], shutdown_grace=0.2)
"""


async def echo(ctx: Context) -> None:
    await ctx.emit_text(ctx.text)


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests counts, and nothing is written."""
    for name in os.environ.keys() - CLEAN.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("HECTOR_STORE_URL", "memory")


@asynccontextmanager
async def served(app: Hector) -> AsyncIterator[Serving]:
    stop = trio.Event()
    with trio.fail_after(HANG):
        async with trio.open_nursery() as nursery:
            yield await nursery.start(partial(app.serve, port=0, host=["127.0.0.1"], stop=stop))
            stop.set()


async def cards(url: str) -> dict[str, Any]:
    async with httpx2.AsyncClient(base_url=url, timeout=HANG, trust_env=False) as client:
        return {card["agentId"]: card for card in (await client.get("/agents")).json()["agents"]}


# --- the decorator ----------------------------------------------------------------------------------------------------


async def test_a_function_stays_what_it_is_and_its_card_says_what_the_decorator_said() -> None:
    app = Hector()
    assert app.agent("echo", name="Echo", description="Again", version="2.0", metadata={"by": "us"})(echo) is echo
    async with served(app) as serving:
        card = (await cards(serving.url))["echo"]
    assert (card["name"], card["description"], card["version"]) == ("Echo", "Again", "2.0")
    assert card["metadata"]["by"] == "us"


async def test_without_more_words_a_card_has_the_id_and_the_docstring() -> None:
    app = Hector()

    @app.agent("documented")
    async def documented(ctx: Context) -> None:
        """Says nothing, well."""

    app.agent("bare")(echo)
    async with served(app) as serving:
        found = await cards(serving.url)
    assert found["documented"]["description"] == "Says nothing, well."
    assert (found["bare"]["name"], found["bare"]["description"], found["bare"]["version"]) == ("bare", "", "1.0.0")


@pytest.mark.parametrize("agent_id", ["", "with space", "a/b", "..", "x" * 129, "ä", "line\n"])
def test_an_id_that_is_none_is_refused_where_it_is_written(agent_id: str) -> None:
    with pytest.raises(ConfigError, match="agent id"):
        Hector().agent(agent_id)


def test_an_id_is_given_once() -> None:
    app = Hector()
    app.agent("echo")(echo)
    with pytest.raises(ConfigError, match="'echo' is taken"):
        app.agent("echo")


def test_a_function_that_yields_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match="emit"):

        @Hector().agent("a")
        async def yielding(ctx: Context) -> Any:
            yield "no"


# --- in a running loop ------------------------------------------------------------------------------------------------


async def test_it_serves_in_a_nursery_until_it_is_stopped() -> None:
    app = Hector()
    app.agent("echo")(echo)
    async with served(app) as serving:
        async with Client(serving.url) as client:
            task = await client.run("echo", "hello")
            assert task.output
            assert task.output.content == "hello"
        url = httpx2.URL(serving.url)
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream(url.host, url.port or 0)


async def test_only_its_own_agents_are_served_without_a_configuration() -> None:
    app = Hector()
    app.agent("echo")(echo)
    async with served(app) as serving:
        assert list(await cards(serving.url)) == ["echo"]


async def test_without_any_agent_the_demo_is_served() -> None:
    async with served(Hector()) as serving:
        assert list(await cards(serving.url)) == ["assistant"]


async def test_the_agents_of_a_configuration_and_its_own_are_served_together(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("agents: {assistant: {description: Of the file}}\nlimits: {json_depth: 5}\n")
    app = Hector(tmp_path / "c.yaml")
    app.agent("echo")(echo)
    async with served(app) as serving:
        found = await cards(serving.url)
        assert set(found) == {"assistant", "echo"}
        async with Client(serving.url) as client:
            for agent in found:
                assert (await client.run(agent, "count to 2")).status == "completed"
    assert app.settings().limits.json_depth == 5


def test_a_configuration_need_not_have_agents_where_python_has_some(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("limits: {json_depth: 5}\n")
    app = Hector(str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match="agent"):
        app.settings()
    app.agent("echo")(echo)
    assert app.settings().agents == {}


def test_an_agent_of_the_configuration_is_not_replaced_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("agents: {assistant: {}, echo: {}}\n")
    app = Hector(tmp_path / "c.yaml")
    app.agent("echo")(echo)
    with pytest.raises(ConfigError, match=r"c\.yaml: agents\.echo: .*declared in Python too"):
        app.settings()


def test_what_is_said_in_python_wins_over_the_file_and_that_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HECTOR_PORT", "1001")
    monkeypatch.setenv("HECTOR_ROOT_PATH", "/env")
    (tmp_path / "c.yaml").write_text("server: {port: 1002, shutdown_grace: 2}\nagents: {assistant: {}}\n")
    server = Hector(tmp_path / "c.yaml").settings(port=1003).server
    assert (server.port, server.shutdown_grace) == (1003, 2)


def test_a_key_of_the_server_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="prot"):
        Hector().settings(prot=8080)


async def test_a_configuration_that_is_not_there_is_told_when_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"none\.yaml"):
        await Hector(tmp_path / "none.yaml").serve()


async def test_all_plain_functions_together_are_bounded_by_sync_agents(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("limits: {sync_agents: 1}\n")
    app = Hector(tmp_path / "c.yaml")
    release = threading.Semaphore(0)
    inside: list[str] = []

    def wait(ctx: SyncContext) -> None:
        inside.append(ctx.agent_id)
        assert release.acquire(timeout=HANG)

    app.agent("one")(wait)
    app.agent("two")(lambda ctx: wait(ctx))
    async with served(app) as serving, Client(serving.url) as client:
        one = serving.services.engine.agents["one"]
        assert isinstance(one, FunctionAgent)
        assert one.limiter is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, "one", "x")
            nursery.start_soon(client.run, "two", "x")
            while one.limiter.statistics().tasks_waiting < 1 or not inside:
                await trio.lowlevel.checkpoint()
            assert len(inside) == 1
            release.release()
            release.release()
    assert sorted(inside) == ["one", "two"]


# --- as a process -----------------------------------------------------------------------------------------------------


async def test_run_announces_serves_and_drains_at_a_signal(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**CLEAN, "HECTOR_STORE_URL": "memory"}
    async with running([sys.executable, "script.py"], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        url = (await process.wait_said(r"listening  (\S+)"))[1]
        await process.wait_said(r"agent +echo +Says it again")
        await process.wait_said("curl ")
        async with Client(url) as client:
            task = await client.run("echo", "hello")
            assert task.output
            assert task.output.content == "hello"
            async with client.stream("endless", "x") as chunks:
                await anext(chunks)
                process.process.send_signal(signal.SIGTERM)
                last = [chunk async for chunk in chunks][-1]
            assert (last.final, last.code) == (True, "interrupted")
        assert await process.wait() == 0


async def test_its_application_is_served_by_hypercorn(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**CLEAN, "HECTOR_STORE_URL": "memory"}
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-b", "127.0.0.1:0", "script:app.asgi"]
    async with running(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said = await process.wait_said(r"(?s)connection_class_installed.*Running on (http://127\.0\.0\.1:\d+)")
        async with Client(said[1]) as client:
            task = await client.run("echo", "hello")
            assert task.output
            assert task.output.content == "hello"
            async with client.stream("echo", "again") as chunks:
                assert [chunk.content async for chunk in chunks] == ["again", ""]
        process.process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_what_is_put_on_quart_is_there_beside_what_is_ours() -> None:
    app = Hector()
    app.agent("echo")(echo)
    seen: list[str] = []

    @app.quart
    def prepare(quart: QuartTrio) -> None:
        @quart.get("/mine")
        async def mine() -> str:
            return "mine"

        @quart.before_request
        async def look() -> None:
            seen.append(request.path)

    async with served(app) as serving:
        async with httpx2.AsyncClient(base_url=serving.url, timeout=HANG, trust_env=False) as client:
            assert (await client.get("/mine")).text == "mine"
            assert (await client.get("/agents/echo")).json()["agentId"] == "echo"
    assert seen == ["/mine", "/agents/echo"]
