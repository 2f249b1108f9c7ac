"""The README says what is so: its commands, options, settings and snippets exist and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import trio

from hector_trio import __version__
from hector_trio.cli import hector
from hector_trio.config import describe, load
from tests.seed.process import Home
from tests.test_cli import CLEAN, HECTOR, running, served

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}

    def walk(group: click.Group, prefix: str) -> None:
        with click.Context(group) as context:
            for name in group.list_commands(context):
                command = group.get_command(context, name)
                assert command is not None
                found[f"{prefix}{name}"] = command
                if isinstance(command, click.Group):
                    walk(command, f"{prefix}{name} ")

    walk(hector, "")
    return found


def options() -> set[str]:
    return {
        option
        for command in [hector, *commands().values()]
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--")
    }


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_option_in_the_readme_exists() -> None:
    ours = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= options()


def test_every_option_is_in_the_readme() -> None:
    told = set(re.findall(r"--[a-z][a-z-]+", README))
    assert options() - told <= {"--help", "--version", "--no-access-log"}


def test_every_command_is_in_the_readme_and_every_command_in_it_exists() -> None:
    table = README[README.index("## The command line") : README.index("## From Python")]
    told = set(re.findall(r"`hector ([a-z]+)", table))
    assert told == {name for name in commands() if " " not in name} - {"version"}
    subcommands = re.search(r"`hector sessions ([a-z\\|]+)`", table)
    assert subcommands is not None
    assert set(subcommands[1].replace("\\", "").split("|")) == {
        name.split()[1] for name in commands() if name.startswith("sessions ")
    }


def test_every_setting_named_in_the_readme_exists() -> None:
    keys = {
        ".".join(str(part) for part in key.path) if not isinstance(key.path, str) else key.path for key in describe()
    }
    leaves = {key.rpartition(".")[2] for key in keys}
    for name in ("auth.tokens", "shutdown_grace", "llms", "agents", "instructions", "base_url", "api_key", "model"):
        assert name in README
        assert name.rpartition(".")[2] in leaves | {key.partition(".")[0] for key in keys}


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_every_configuration_in_the_readme_is_accepted(number: int) -> None:
    load(blocks("yaml")[number], {"OPENAI_API_KEY": "k"}, source="README.md")


async def run(command: list[str]) -> str:
    with trio.fail_after(30):
        done = await trio.run_process(command, capture_stdout=True, stdin=b"", env=CLEAN)
    return done.stdout.decode()


async def test_the_python_clients_in_the_readme_run(tmp_path: Path) -> None:
    clients = [block for block in blocks("python") if "localhost:8080" in block]
    assert len(clients) == 2
    async with served(tmp_path, "--store", "memory") as (_, url):
        for client in clients:
            client = client.replace("localhost:8080", url.removeprefix("http://"))
            assert await run([sys.executable, "-c", client])


async def test_the_python_server_in_the_readme_runs(tmp_path: Path) -> None:
    (server,) = (block for block in blocks("python") if "app.run()" in block)
    program = server.replace("app.run()", "app.run(port=0)")
    async with running([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        url = (await process.wait_said(r"listening  (\S+)"))[1]
        assert (await run([*HECTOR, "call", f"{url}/agents/shout", "not so loud"])).strip() == "NOT SO LOUD"


async def test_the_session_in_the_readme_remembers(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("bash") if "SESSION=" in block)
    async with served(tmp_path, "--store", "memory") as (_, url):
        home = Home(tmp_path / "home")  # with a stand-in where there is no curl
        said = await trio.to_thread.run_sync(home.shell, block.replace("http://localhost:8080", url))
    assert said.count("Alice") >= 3


def test_continuous_integration_runs_exactly_the_readmes_test_command() -> None:
    test_command = next(line for line in README.splitlines() if line.endswith("/pytest"))
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_first_command_is_on_the_first_screen() -> None:
    assert "hector serve" in "\n".join(README.splitlines()[:25])
    assert f"hector_trio {__version__}" in README


def test_every_file_that_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
