"""The command line as a user runs it: real processes, real signals, a real terminal where one matters."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import trio
import trustme

from hector_trio.agents import Context
from hector_trio.client import Client
from hector_trio.models import Content, LiveTree, Session, Task
from tests import HANG
from tests.engines import Steered, agent
from tests.fake_model import says, serve_fake_model
from tests.serving import serving, settings_of

PROMPT = r"\x1b\[\?2004h"
"""What the terminal is told when a line can be typed: pastes come in brackets."""
ROOT = Path(__file__).parent.parent
HECTOR = (sys.executable, "-m", "hector_trio")
CLEAN = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("HECTOR_", "OPENAI_"))},
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "error",
    "PROMPT_TOOLKIT_NO_CPR": "1",
    "TERM": "xterm",
}


@dataclass
class Done:
    """A process that has ended."""

    code: int
    out: str
    err: str


async def hector(*arguments: str, stdin: bytes = b"", **environ: str) -> Done:
    """Runs a command to its end."""
    with trio.fail_after(HANG):
        done = await trio.run_process(
            [*HECTOR, *arguments],
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**CLEAN, **environ},
        )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


class Running:
    """A process that runs, and what it has said so far."""

    def __init__(self, process: trio.Process, output: trio.abc.ReceiveStream | None) -> None:
        self.process = process
        self.said = ""
        self._output = output

    async def wait_said(self, pattern: str) -> re.Match[str]:
        """Reads on until ``pattern`` is found after what was found before."""
        assert self._output is not None
        with trio.fail_after(HANG):
            while (found := re.search(pattern, self.said)) is None:
                try:
                    data = await self._output.receive_some()
                except trio.BrokenResourceError:
                    data = b""  # the other side of a terminal is closed
                assert data, f"ended without saying {pattern!r}; left: {self.said!r}"
                self.said += data.decode()
        self.said = self.said[found.end() :]
        return found

    async def wait(self) -> int:
        with trio.fail_after(HANG):
            return await self.process.wait()


@asynccontextmanager
async def running(command: Sequence[str], *, cwd: Path | None = None, **options: Any) -> AsyncIterator[Running]:
    """A process with its output in a pipe; at the end it is killed, and so is what it has started."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": CLEAN, "cwd": cwd, **options}
    options.setdefault("start_new_session", True)
    process = await trio.lowlevel.open_process(list(command), **options)
    try:
        yield Running(process, process.stdout)
    finally:
        with trio.move_on_after(HANG, shield=True):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)


@asynccontextmanager
async def served(folder: Path, *flags: str, **environ: str) -> AsyncIterator[tuple[Running, str]]:
    """``hector serve`` in a folder of its own, and its URL."""
    command = [*HECTOR, "serve", "--port", "0", *flags]
    async with running(command, cwd=folder, stderr=subprocess.PIPE, env={**CLEAN, **environ}) as process:
        found = await process.wait_said(r"listening  (\S+)")
        yield process, found[1]


@asynccontextmanager
async def on_terminal(*arguments: str, **environ: str) -> AsyncIterator[tuple[Running, trio.lowlevel.FdStream]]:
    """A command with a terminal of its own as stdin, stdout and stderr, and the keyboard of that terminal."""
    ours, theirs = os.openpty()
    # The command has to be the leader of a session whose terminal this is, or Ctrl-C would be nobody's.
    take = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", take, *HECTOR, *arguments]
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**CLEAN, **environ}
        )
    finally:
        os.close(theirs)
    async with trio.lowlevel.FdStream(ours) as terminal:
        try:
            yield Running(process, terminal), terminal
        finally:
            with trio.move_on_after(HANG, shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()


# --- serve ------------------------------------------------------------------------------------------------------------


async def test_serve_says_where_it_listens_whom_it_serves_and_where_its_data_is(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, url):
        await process.wait_said(r"agent +assistant +.*demo")
        await process.wait_said(re.escape(str(tmp_path / ".hector" / "hector.db")))
        curl = (await process.wait_said(r"curl .*"))[0]
        assert url in curl
        async with Client(url) as client:
            assert (await client.run("assistant", "count to 2")).status == "completed"
        assert (tmp_path / ".hector" / "hector.db").exists()


async def test_sigterm_lets_a_stream_end_then_ends_the_server_with_0(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, url):
        async with Client(url) as client, client.stream("assistant", "count to 30") as chunks:
            await anext(chunks)
            process.process.send_signal(signal.SIGTERM)
            received = [chunk async for chunk in chunks]
            assert received[-1].status == "completed"
        assert await process.wait() == 0


async def test_a_stream_that_does_not_end_in_time_is_ended_with_its_final_chunk(tmp_path: Path) -> None:
    async with served(tmp_path, "--shutdown-grace", "0.1") as (process, url):
        async with Client(url) as client, client.stream("assistant", "count to 10000") as chunks:
            await anext(chunks)
            process.process.send_signal(signal.SIGTERM)
            received = [chunk async for chunk in chunks]
            assert (received[-1].status, received[-1].code) == ("failed", "interrupted")
        assert await process.wait() == 0


async def test_sigint_ends_it_also_where_it_was_ignored_and_stdin_is_closed(tmp_path: Path) -> None:
    command = ["sh", "-c", 'trap "" INT; exec "$@" <&-', "sh", *HECTOR, "serve", "--port", "0", "--store", "memory"]
    async with running(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        await process.wait_said("curl")
        process.process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


@pytest.mark.parametrize("how", ["closed", "broken"])
async def test_it_serves_on_an_inherited_socket_when_nobody_reads_its_stdout(tmp_path: Path, how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        command = [*HECTOR, "serve", "--fd", str(number), "--store", "memory"]
        if how == "closed":
            command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        async with running(command, cwd=tmp_path, stderr=subprocess.PIPE, pass_fds=(number,)) as process:
            if how == "broken":
                assert process.process.stdout is not None
                await process.process.stdout.aclose()
            # The request waits in the socket's queue until the server is there.
            async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                with trio.fail_after(HANG):
                    assert (await client.run("assistant", "count to 2")).status == "completed"
            process.process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_a_port_in_use_is_one_line_that_names_who_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        done = await hector("serve", "--host", "127.0.0.1", "--port", port, "--store", str(tmp_path / "x.db"))
    assert done.code == 1
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("hector: ")
    assert port in line
    assert str(os.getpid()) in line


async def test_a_second_process_on_one_store_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, url):
        done = await hector("serve", "--port", "0", "--store", str(tmp_path / ".hector" / "hector.db"))
        assert done.code == 1
        (line,) = done.err.splitlines()
        assert str(process.process.pid) in line
        async with Client(url) as client:
            assert (await client.run("assistant", "count to 2")).status == "completed"


async def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = await hector("serve", "--port", "0", "--store", str(tmp_path / "file" / "x.db"))
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("hector: ")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--frobnicate"], 2, "No such option"),
        (["--port", "70000"], 2, "70000"),
        (["--model", "m"], 2, "--provider openai"),
        (["--provider", "openai"], 2, "--model"),
        (["--provider", "openai", "--model", "m"], 1, "OPENAI_API_KEY"),
        (["--host", "0.0.0.0"], 1, "--insecure"),
        (["--root-path", "x"], 1, "root_path"),
        (["--config", "none.yaml"], 1, "none.yaml"),
        (["--tls-cert", "none.pem"], 2, "--tls-cert needs --tls-key FILE"),
        (["--tls-key", "none.pem"], 2, "--tls-key needs --tls-cert FILE"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], 1, "none.pem"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_reason(flags: list[str], code: int, said: str) -> None:
    done = await hector("serve", "--store", "memory", "--port", "0", *flags)
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err


async def test_flags_override_the_file_and_the_file_overrides_variables(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("agents: {one: {}}\nserver: {port: 1, shutdown_grace: 3}\nstore: {url: memory}\n")
    async with served(tmp_path, "--config", "c.yaml", HECTOR_STORE_URL="elsewhere.db") as (process, url):
        assert not url.endswith(":1")
        await process.wait_said("agent +one")
        await process.wait_said("memory")


async def test_it_serves_on_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with running([*HECTOR, "serve", "--uds", path, "--store", "memory"], cwd=tmp_path) as process:
        await process.wait_said(re.escape(f"listening  unix:{path}"))
        transport = httpx2.AsyncHTTPTransport(uds=path)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/agents")).json()["total"] == 1


async def test_it_serves_https_below_a_path(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    flags = ("--tls-cert", "cert.pem", "--tls-key", "key.pem", "--root-path", "/hector", "--host", "127.0.0.1")
    async with served(tmp_path, *flags) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        assert url.endswith("/hector")
        trusted = str(tmp_path / "ca.pem")
        for more in ([], ["--stream"]):
            done = await hector("call", f"{url}/agents/assistant", "count to 3", *more, SSL_CERT_FILE=trusted)
            assert (done.code, done.out) == (0, "1 2 3\n")
            done = await hector("call", f"{url}/agents/assistant", "count to 3", *more)
            assert done.code == 3
            assert "certificate" in done.err


async def test_a_real_model_is_used_when_the_flags_ask_for_it(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        fake = await serve_fake_model(nursery)
        fake.plan(says("Hello ", "world"))
        flags = ("--provider", "openai", "--model", "some-model", "--base-url", fake.base_url)
        async with served(tmp_path, *flags, OPENAI_API_KEY="sk-0123456789abcdef") as (process, url):
            await process.wait_said(r"agent +assistant +.*some-model")
            done = await hector("call", "assistant", "Hi", HECTOR_SERVER=url)
            assert (done.code, done.out) == (0, "Hello world\n")
            (exchange,) = await fake.wait_requests(1)
            assert exchange.headers["authorization"] == "Bearer sk-0123456789abcdef"
            assert exchange.model == "some-model"
        nursery.cancel_scope.cancel()


async def test_a_key_in_the_environment_is_not_used_unasked_but_the_flag_is_told(tmp_path: Path) -> None:
    async with served(tmp_path, OPENAI_API_KEY="sk-0123456789abcdef") as (process, url):
        await process.wait_said("agent +assistant +.*demo")
        await process.wait_said("hector serve --provider openai --model")
        done = await hector("call", f"{url}/agents/assistant", "count to 2")
        assert done.out == "1 2\n"


# --- what a start loads -----------------------------------------------------------------------------------------------

NOT_ASKED_FOR = (
    *(
        "rich.console",
        "rich.pretty",
        "pygments",
        "prompt_toolkit",
        "alembic",
        "mako",
        "httpx2",
        "httpcore2",
        "trio_websocket",
    ),
    *("jwt", "cryptography", "grpc", "google", "pydantic", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql"),
    *("hector_trio.client", "hector_trio.tree", "hector_trio.webhook", "hector_trio.jwks", "hector_trio.http2"),
    *("hector_trio.providers.openai", "hector_trio.agents.remote", "hector_trio.a2a.signing"),
    *("hector_trio.a2a.protobuf", "hector_trio.transports.a2a_grpc", "hector_trio.transports.rest_debug"),
    "hector_trio.transports.openapi",
)
"""What `hector serve` does without until something configured or asked for needs it. That `rich` is looked for, and not
found, is listed too."""


@pytest.mark.parametrize(
    ("store", "loaded", "not_loaded"),
    [
        ("memory", ["hector_trio.stores.memory"], ["sqlalchemy", "sqlite3", "hector_trio.stores.sql"]),
        ("new.db", ["sqlalchemy", "hector_trio.stores.sql"], ["hector_trio.stores.memory"]),
        ("old.db", ["sqlalchemy", "hector_trio.stores.sql"], ["hector_trio.stores.memory"]),
    ],
)
async def test_a_start_loads_nothing_that_is_not_asked_for(
    tmp_path: Path, store: str, loaded: list[str], not_loaded: list[str]
) -> None:
    if store == "old.db":
        async with served(tmp_path, "--store", store):
            pass
    found = await loaded_by(tmp_path, f"store: {{url: {store}}}\n")
    assert {"quart_trio", "structlog", *loaded} <= found
    assert not {
        name for name in found for each in (*NOT_ASKED_FOR, *not_loaded) if name == each or name.startswith(f"{each}.")
    }


@pytest.mark.parametrize(
    ("asked", "needs"),
    [
        ("server: {http2: true}\n", {"hector_trio.transports.a2a_grpc", "hector_trio.a2a.protobuf"}),
        ("server: {debug_tree: true}\n", {"hector_trio.transports.rest_debug", "hector_trio.tree"}),
        ("llms: {m: {type: openai, model: x, base_url: 'http://127.0.0.1:1'}}\n", {"hector_trio.providers.openai"}),
    ],
)
async def test_a_start_loads_all_that_is_asked_for(tmp_path: Path, asked: str, needs: set[str]) -> None:
    assert needs <= await loaded_by(tmp_path, f"store: {{url: memory}}\n{asked}")


async def loaded_by(folder: Path, config: str) -> set[str]:
    """The modules that `hector serve` has loaded when it has answered its first request."""
    (folder / "c.yaml").write_text(f"agents: {{a: {{}}}}\n{config}")
    command = [*HECTOR, "serve", "--port", "0", "--config", "c.yaml"]
    with (folder / "imports").open("w") as imports:
        environ = {**CLEAN, "PYTHONPROFILEIMPORTTIME": "1"}
        async with running(command, cwd=folder, stderr=imports, env=environ) as process:
            url = (await process.wait_said(r"listening  (\S+)"))[1]
            async with httpx2.AsyncClient() as client:
                assert (await client.get(f"{url}/agents")).json()["total"] == 1
    return set(re.findall(r"^import time: .*\| +(\S+)$", (folder / "imports").read_text(), re.MULTILINE))


async def test_what_a_start_has_loaded_is_not_collected_again_and_agents_find_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gc\n"
        "async def x(ctx):\n"
        "    import rich.traceback\n"
        "    await ctx.emit_text(f'{gc.isenabled()} {gc.get_freeze_count() > 10_000} {rich.traceback.__name__}')\n"
    )
    (tmp_path / "c.yaml").write_text("agents: {a: {type: python, function: mine.py:x}}\nstore: {url: memory}\n")
    async with served(tmp_path, "--config", "c.yaml") as (_, url), Client(url) as client:
        assert (await client.run("a", "x")).output == Content("text/plain", "True True rich.traceback")


# --- check ------------------------------------------------------------------------------------------------------------


async def test_check_sums_up_a_good_configuration_and_warns_of_variables_that_mean_nothing(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("agents: {one: {name: '${HECTOR_NAME}'}}\n")
    done = await hector("check", str(config), HECTOR_PROT="1", HECTOR_NAME="One")
    assert done.code == 0
    assert done.out.startswith(f"{config}: ok; agents: one (demo)")
    assert "HECTOR_PROT" in done.err
    assert "HECTOR_NAME" not in done.err


async def test_check_says_all_that_is_wrong_as_serve_does(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("agents: {one: {llm: none}}\nserver: {prot: 1}\nllms: {m: {type: openai}}\n")
    done = await hector("check", str(config))
    assert done.code == 1
    assert len(done.err.splitlines()) == 3
    assert all(line.startswith(f"hector: {config}: ") for line in done.err.splitlines())
    assert (await hector("serve", "--config", str(config))).err == done.err


async def test_check_finds_what_only_the_start_would(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    (tmp_path / "mine.py").write_text("x = 1\n")
    config.write_text("agents: {one: {type: python, function: mine.py:x}}\nserver: {host: 0.0.0.0}\n")
    done = await hector("check", str(config))
    assert done.code == 1
    assert "--insecure" in done.err
    assert "agents.one.function" in done.err


# --- list, info, call -------------------------------------------------------------------------------------------------


async def test_agents_are_listed_and_shown_for_people_and_for_scripts() -> None:
    async with serving() as server:
        done = await hector("list", HECTOR_SERVER=server.url)
        assert (done.code, done.out.split("\t")[0]) == (0, "assistant")
        done = await hector("--json", "list", "--server", server.url)
        assert json.loads(done.out)["agents"][0]["agentId"] == "assistant"
        done = await hector("info", f"{server.url}/agents/assistant")
        assert "agentId: assistant" in done.out
        card = json.loads((await hector("info", "assistant", "--json", HECTOR_SERVER=server.url)).out)
        assert card["endpoints"]["task"] == f"{server.url}/agents/assistant/tasks"


async def test_a_call_prints_the_answer_and_nothing_else() -> None:
    async with serving() as server:
        for flags in ([], ["--stream"]):
            done = await hector("call", "assistant", "count to 3", *flags, HECTOR_SERVER=server.url)
            assert (done.code, done.out, done.err) == (0, "1 2 3\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--server", "URL", "--json", "call", "assistant", "count to 2", "--task-id", "t"],
        ["call", "--task-id", "t", "--server", "URL", "assistant", "--json", "count to 2"],
        ["--json", "call", "assistant", "--server=URL", "count to 2", "--task-id=t"],
        ["call", "URL/agents/assistant", "count to 2", "--json", "--task-id", "t"],
    ],
)
async def test_flags_may_stand_anywhere(arguments: list[str]) -> None:
    async with serving() as server:
        done = await hector(*(each.replace("URL", server.url) for each in arguments), HECTOR_SERVER="http://x.invalid")
        assert done.code == 0, done.err
        task = json.loads(done.out)
        assert (task["taskId"], task["output"]["content"]) == ("t", "1 2")


async def test_the_prompt_may_come_from_stdin() -> None:
    async with serving() as server:
        for arguments in (["call", "assistant"], ["call", "assistant", "-"]):
            done = await hector(*arguments, stdin=b"count to 3", HECTOR_SERVER=server.url)
            assert done.out == "1 2 3\n"


async def test_tokens_are_printed_as_they_come() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server:
        async with running([*HECTOR, "call", f"{server.url}/agents/a", "x", "--stream"]) as process:
            await process.wait_said("<x")
            assert not steered.ended
            steered.let("x")
            await process.wait_said(">\n")
            assert await process.wait() == 0


async def test_data_is_printed_as_lines_of_json_and_chunks_too_when_asked() -> None:
    async def show(ctx: Context) -> None:
        await ctx.emit_text("Look:")
        await ctx.emit_data({"k": ctx.parameters})

    async with serving(agents=agent(show)) as server:
        call = ["call", f"{server.url}/agents/a", "x", "--param", "n=1", "--param", "s=text"]
        task = json.loads((await hector(*call, "--json")).out)
        assert task["output"]["content"] == "Look:"
        assert (await hector(*call)).out == 'Look:\n{"k":{"n":1,"s":"text"}}\n'
        call.append("--stream")
        assert (await hector(*call)).out == 'Look:\n{"k":{"n":1,"s":"text"}}\n'
        chunks = [json.loads(line) for line in (await hector(*call, "--json")).out.splitlines()]
        assert [chunk["chunkType"] for chunk in chunks] == ["text", "data", "done"]


@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_a_failed_task_is_told_on_stderr_with_1(flags: list[str]) -> None:
    async with serving() as server:
        done = await hector("call", "assistant", "fail please", *flags, HECTOR_SERVER=server.url)
        assert done.code == 1
        assert done.err.startswith("hector: task failed: demo_failure: ")
        assert len(done.err.splitlines()) == 1


async def test_each_kind_of_refusal_has_its_exit_code() -> None:
    async with serving() as server:
        for arguments, code in (
            (["nobody", "x"], 4),
            (["nobody", "x", "--stream"], 4),
            (["assistant", "x", "--session", "none"], 4),
            (["assistant", "x", "--session", "none", "--stream"], 4),
            (["assistant", "x", "--task-id", "bad id"], 1),
            (["assistant", "x", "--timeout", "0"], 2),
            (["assistant", "x", "--server", "garbage"], 2),
            (["assistant", "x", "--token", "two words"], 2),
            (["assistant", "x", "--param", "novalue"], 2),
            (["http://127.0.0.1:1/agents/a", "x"], 3),
            (["http://127.0.0.1:1/agents/a", "x", "--stream"], 3),
            (["http://127.0.0.1:1/nowhere", "x"], 3),
        ):
            done = await hector("call", *arguments, HECTOR_SERVER=server.url)
            assert done.code == code, (arguments, done)
            assert done.out == ""
            assert "Traceback" not in done.err


@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_a_refusal_is_one_line_in_words(flags: list[str]) -> None:
    async with serving() as server:
        done = await hector("call", "assistant", "x", "--task-id", "a/b", *flags, HECTOR_SERVER=server.url)
        assert done.code == 1
        assert done.err == "hector: taskId: must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not . or ..\n"


@pytest.mark.parametrize(
    "arguments", ["list", "list --json", "info assistant", "call assistant x", "call assistant x --stream", "--help"]
)
async def test_an_output_that_is_full_is_one_line(arguments: str) -> None:
    async with serving() as server:
        command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *HECTOR, *arguments.split()]
        with trio.fail_after(HANG):
            done = await trio.run_process(
                command, capture_stderr=True, check=False, env={**CLEAN, "HECTOR_SERVER": server.url}
            )
        assert done.returncode == 1
        assert done.stderr.decode() == "hector: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_ctrl_c_ends_a_call_with_130_and_cancels_its_task(flags: list[str]) -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server:
        async with running([*HECTOR, "call", f"{server.url}/agents/a", "x", *flags], stderr=subprocess.PIPE) as process:
            await steered.wait_started("x")
            process.process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert process.process.stderr is not None
            assert await process.process.stderr.receive_some() == b""
        await steered.wait_ended("x")


async def test_a_reader_that_leaves_ends_the_call_and_cancels_its_task() -> None:
    async with serving() as server:
        command = [*HECTOR, "call", f"{server.url}/agents/assistant", "count to 100000", "--stream", "--task-id", "t"]
        async with running(command, stderr=subprocess.PIPE) as process:
            await process.wait_said("1 2 3")
            assert process.process.stdout is not None
            await process.process.stdout.aclose()
            assert await process.wait() == 141
        async with Client(server.url) as client, client.events("assistant", "t") as events:
            assert [chunk async for chunk in events][-1].status == "cancelled"


async def test_a_terminal_is_never_given_control_characters() -> None:
    async def rude(ctx: Context) -> None:
        await ctx.emit_text("a\x1b]0;title\x07b\n")

    async with serving(agents=agent(rude)) as server:
        async with on_terminal("call", f"{server.url}/agents/a", "x", "--stream") as (process, _):
            await process.wait_said("a\ufffd]0;title\ufffdb")
            assert await process.wait() == 0
        assert (await hector("call", f"{server.url}/agents/a", "x")).out == "a\x1b]0;title\x07b\n"


async def test_a_terminal_gets_a_table() -> None:
    async with serving() as server:
        async with on_terminal("list", HECTOR_SERVER=server.url) as (process, _):
            await process.wait_said("agent")
            await process.wait_said("assistant")
            assert await process.wait() == 0


async def test_a_token_is_taken_from_the_flag_or_the_environment(tmp_path: Path) -> None:
    token = "0123456789abcdef-token"
    (tmp_path / "c.yaml").write_text(f"agents: {{assistant: {{}}}}\nauth: {{tokens: [{{name: a, token: {token}}}]}}\n")
    async with served(tmp_path, "--config", "c.yaml", "--store", "memory") as (_, url):
        assert (await hector("list", HECTOR_SERVER=url)).code == 1
        assert (await hector("list", "--token", token, HECTOR_SERVER=url)).code == 0
        done = await hector("call", "assistant", "count to 2", "--stream", HECTOR_SERVER=url, HECTOR_TOKEN=token)
        assert done.out == "1 2\n"


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_sessions_are_made_listed_shown_read_and_removed() -> None:
    async with serving() as server:
        run = partial(hector, HECTOR_SERVER=server.url)
        session_id = (
            await run("sessions", "create", "assistant", "--metadata", "user=john", "--ttl", "3600")
        ).out.strip()
        await run("call", "assistant", "My name is Alice", "--session", session_id)
        listed = (await run("sessions", "list", "--agent", "assistant", "--metadata", "user=john")).out
        assert listed.split("\t")[:2] == [session_id, "assistant"]
        assert (await run("sessions", "list", "--metadata", "user=jane")).out == ""
        shown = json.loads((await run("sessions", "--json", "show", session_id)).out)
        assert shown["metadata"] == {"user": "john"}
        assert "metadata: " in (await run("sessions", "show", session_id)).out
        lines = (await run("sessions", "messages", session_id)).out.splitlines()
        assert [line.split("\t")[1] for line in lines] == ["user", "agent"]
        assert (await run("sessions", "delete", session_id)).code == 0
        assert (await run("sessions", "show", session_id)).code == 4


# --- questions --------------------------------------------------------------------------------------------------------


async def asks_twice(ctx: Context) -> None:
    if ctx.resume is None:
        await ctx.emit_text("Hello.")
        await ctx.ask("Your name?", saved=[])
    said = [*ctx.resume.saved, ctx.resume.answer]
    if len(said) == 1:
        await ctx.ask({"age of": said[0]}, saved=said)
    await ctx.emit_text(f" {said[0]} is {said[1]}")


@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_a_task_that_asks_waits_for_the_answer_where_there_is_no_terminal(flags: list[str]) -> None:
    async with serving(agents=agent(asks_twice)) as server:
        done = await hector("call", f"{server.url}/agents/a", "x", *flags)
        assert (done.code, done.out) == (5, "Hello.\n" if flags else "")
        assert "hector: the agent asks: Your name?\n" in done.err
        task_id = re.findall(r'hector call a --answer (\S+) "\.\.\."', done.err)[0]
        done = await hector("call", f"{server.url}/agents/a", "Zoe", "--answer", task_id, "--json")
        task = json.loads(done.out)
        assert (done.code, task["status"], task["prompt"]) == (5, "input_required", {"age of": "Zoe"})
        assert 'asks: {"age of":"Zoe"}' in done.err
        done = await hector("call", f"{server.url}/agents/a", "--answer", task_id, stdin=b"7")
        assert (done.code, done.out, done.err) == (0, "Hello. Zoe is 7\n", "")
        done = await hector("call", f"{server.url}/agents/a", "8", "--answer", task_id)
        assert (done.code, done.out) == (1, "")
        assert "does not wait for input" in done.err
        assert (await hector("call", f"{server.url}/agents/a", "8", "--answer", "none")).code == 4
        assert (await hector("call", f"{server.url}/agents/a", "8", "--answer", task_id, "--stream")).code == 2


@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_a_task_that_asks_is_answered_on_the_terminal(flags: list[str]) -> None:
    async with serving(agents=agent(asks_twice)) as server:
        async with on_terminal("call", f"{server.url}/agents/a", "x", *flags) as (process, keyboard):
            await process.wait_said("the agent asks: Your name?")
            await process.wait_said(PROMPT)
            await keyboard.send_all(b"Zoe\r")
            await process.wait_said("the agent asks: .*age of")
            await process.wait_said(PROMPT)
            await keyboard.send_all(b"7\r")
            await process.wait_said("Zoe is 7")
            assert await process.wait() == 0


@pytest.mark.parametrize("key", [b"\x03", b"\x04"])
@pytest.mark.parametrize("flags", [[], ["--stream"]])
async def test_who_leaves_at_a_question_cancels_the_task(flags: list[str], key: bytes) -> None:
    async with serving(agents=agent(asks_twice)) as server:
        async with on_terminal("call", f"{server.url}/agents/a", "x", *flags) as (process, keyboard):
            await process.wait_said("the agent asks: Your name?")
            await process.wait_said(PROMPT)
            await keyboard.send_all(key)
            await process.wait_said("task cancelled")
            assert await process.wait() == 1
        async with Client(server.url) as client:
            assert [task.status for task in await client.tasks("a")] == ["cancelled"]


async def test_in_a_chat_the_next_line_answers_a_question() -> None:
    async with serving(agents=agent(asks_twice)) as server:
        done = await hector("chat", f"{server.url}/agents/a", stdin=b"x\nZoe\n7\ny\n")
        assert done.out == "Hello.\n Zoe is 7\nHello.\n"
        assert done.code == 5
        task_id = re.findall(r"hector call a --answer (\S+)", done.err)[0]
        assert (await hector("call", f"{server.url}/agents/a", "Tom", "--answer", task_id)).code == 5
        async with on_terminal("chat", f"{server.url}/agents/a") as (process, keyboard):
            await process.wait_said(PROMPT)
            for line, then in ((b"x", "asks: Your name"), (b"\x03", "cancelled"), (b"x", "asks: Your name")):
                await keyboard.send_all(line + b"\r" * (line == b"x"))
                await process.wait_said(then)
                await process.wait_said(PROMPT)
            for line, then in ((b"Zoe\r", "age of"), (b"7\r", "Zoe is 7")):
                await keyboard.send_all(line)
                await process.wait_said(then)
                await process.wait_said(PROMPT)
            await keyboard.send_all(b"\x04")
            assert await process.wait() == 0


# --- chat -------------------------------------------------------------------------------------------------------------


async def test_a_chat_by_a_pipe_remembers_and_goes_on_after_a_failed_turn() -> None:
    async with serving() as server:
        lines = b"My name is Alice\nfail please\n\n/nothing\nWhat is my name?\n/session"
        done = await hector("chat", "assistant", stdin=lines, HECTOR_SERVER=server.url)
        assert done.code == 1
        session_id = done.out.splitlines()[-1]
        assert "Your name is Alice." in done.out
        assert f"session {session_id}" in done.err
        assert "task failed: demo_failure" in done.err
        assert "no command /nothing" in done.err
        again = await hector(
            "chat", "assistant", "--session", session_id, stdin=b"What is my name?\n/quit\nx", HECTOR_SERVER=server.url
        )
        assert (again.code, again.out) == (0, "Your name is Alice.\n")


async def test_a_chat_with_an_agent_or_a_session_that_is_not_there_does_not_begin() -> None:
    async with serving(agents=agent(Steered())) as server:
        assert (await hector("chat", "nobody", HECTOR_SERVER=server.url)).code == 4
        assert (await hector("chat", "a", "--session", "none", HECTOR_SERVER=server.url)).code == 4
        async with Client(server.url) as client:
            session = await client.create_session("assistant")
        done = await hector("chat", "a", "--session", session.session_id, HECTOR_SERVER=server.url)
        assert done.code == 1
        assert "assistant" in done.err


async def test_ctrl_c_cancels_the_answer_and_the_chat_goes_on() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server:
        async with on_terminal("chat", f"{server.url}/agents/a") as (process, keyboard):
            session_id = (await process.wait_said(r"session (\S+)"))[1]
            await process.wait_said(PROMPT)
            await keyboard.send_all(b"first\r")
            await process.wait_said("<first")
            await keyboard.send_all(b"\x03")
            await process.wait_said("cancelled")
            await steered.wait_ended("first")
            await process.wait_said(PROMPT)
            await keyboard.send_all(b"\x03")
            await process.wait_said("Ctrl-D or /quit leaves")
            await process.wait_said(PROMPT)
            steered.let("second")
            await keyboard.send_all(b"second\r")
            await process.wait_said("<second>")
            await process.wait_said(PROMPT)
            await keyboard.send_all(b"\x04")
            assert await process.wait() == 0
        async with Client(server.url) as client:
            messages = await client.messages(session_id)
            assert [message.content for message in messages] == ["first", "<first", "second", "<second>"]
            assert messages[1].partial is True


async def test_ctrl_c_while_a_chat_waits_for_a_line_of_a_pipe_ends_it() -> None:
    async with serving() as server:
        command = [*HECTOR, "chat", f"{server.url}/agents/assistant"]
        async with running(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.process.stdin is not None
            await process.process.stdin.send_all(b"count to 3\n")
            await process.wait_said("1 2 3\n")
            process.process.send_signal(signal.SIGINT)
            assert await process.wait() == 130


# --- the program itself -----------------------------------------------------------------------------------------------


async def test_help_names_every_command_and_exit_code() -> None:
    done = await hector("--help")
    assert done.code == 0
    for word in ("serve", "check", "list", "info", "call", "chat", "sessions", "130", "HECTOR_SERVER", "HECTOR_TOKEN"):
        assert word in done.out


async def test_the_version_is_told() -> None:
    assert (await hector("--version")).out == (await hector("version")).out


async def test_help_waits_for_nothing_but_click() -> None:
    code = "import sys, hector_trio.cli; print({'trio', 'msgspec', 'rich', 'quart', 'httpx2'} & set(sys.modules))"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True, env=CLEAN)
    assert done.stdout.decode().strip() == "set()"


async def test_a_command_imports_no_other_and_the_dialects_of_no_other_database() -> None:
    code = (
        "import sys, hector_trio.cli; from hector_trio.stores import sql\n"
        "hector_trio.cli.hector.get_command(None, 'list')\n"
        "unwanted = ('hector_trio.cli.', 'sqlalchemy.dialects.p', 'alembic')\n"
        "print(sorted(name for name in sys.modules if name.startswith(unwanted)))"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True, env=CLEAN)
    assert done.stdout.decode().strip() == str([f"hector_trio.cli.{name}" for name in ("calls", "lines", "output")])


async def test_what_json_prints_is_what_the_client_reads() -> None:

    async with serving() as server:
        made = await hector("sessions", "create", "assistant", "--json", HECTOR_SERVER=server.url)
        msgspec.json.decode(made.out, type=Session)
        done = await hector("call", "assistant", "x", "--json", HECTOR_SERVER=server.url)
        msgspec.json.decode(done.out, type=Task)


# --- tree -------------------------------------------------------------------------------------------------------------


async def test_tree_prints_what_lives_in_the_server_as_lines_or_json() -> None:
    steered = Steered()
    async with (
        serving(settings_of(server={"debug_tree": True}), agent(steered)) as server,
        Client(server.url) as client,
    ):
        async with client.stream("a", "x", task_id="t", on_disconnect="cancel") as chunks:
            await anext(chunks)
            done = await hector("tree", "--server", server.url)
            assert (done.code, done.err) == (0, "")
            lines = done.out.splitlines()
            assert "1 running, 0 queued, 0 waiting for input" in lines[0]
            (run,) = [line for line in lines if line.lstrip().startswith("run a/t ")]
            (socket,) = [line for line in lines if "websocket /agents/a/stream" in line]
            assert lines.index(socket) < lines.index(run)
            assert len(run) - len(run.lstrip()) == len(socket) - len(socket.lstrip()) + 2
            assert "deadline in 10.0 min" in run or "deadline in 9.9 min" in run
            assert "waits for Event.wait in Steered.__call__" in run
            done = await hector("tree", "--json", "--limit", "1", "--server", server.url)
            tree = msgspec.json.decode(done.out, type=LiveTree)
            assert (tree.running, tree.waiting_for_input) == (1, 0)
            steered.let("x")


async def test_tree_watches_until_ctrl_c() -> None:
    async with serving(settings_of(server={"debug_tree": True})) as server:
        async with running([*HECTOR, "tree", "--watch", "--json", "--server", server.url]) as process:
            first = json.loads((await process.wait_said(r"(.+)\n"))[1])
            second = json.loads((await process.wait_said(r"(.+)\n"))[1])
            assert first["at"] < second["at"]
            process.process.send_signal(signal.SIGINT)
            assert await process.wait() == 130


async def test_on_a_terminal_the_tree_is_drawn() -> None:
    async with serving(settings_of(server={"debug_tree": True})) as server:
        async with on_terminal("tree", HECTOR_SERVER=server.url) as (process, _):
            await process.wait_said("waiting for input")
            await process.wait_said("└──")
            assert await process.wait() == 0
        async with on_terminal("tree", "--watch", HECTOR_SERVER=server.url) as (process, keyboard):
            await process.wait_said("waiting for input")
            await process.wait_said("waiting for input")  # a second later
            await keyboard.send_all(b"\x03")
            assert await process.wait() == 130


async def test_a_server_that_does_not_show_its_tree_or_not_to_us_says_so() -> None:
    async with serving() as server:
        done = await hector("tree", "--server", server.url)
        assert (done.code, done.out) == (4, "")
        assert "server.debug_tree: true" in done.err
    token = "0123456789abcdef0123"
    settings = settings_of(
        server={"debug_tree": True}, auth={"tokens": [{"name": "v", "token": token, "role": "viewer"}]}
    )
    async with serving(settings) as server:
        done = await hector("tree", "--server", server.url, "--token", token)
        assert done.code == 1
        assert "may not look inside the server" in done.err
