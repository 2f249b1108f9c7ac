"""Each example in Python and bash runs as its first lines say; the others run in tests/interop."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.seed.process import LIMIT, REPOSITORY, Home

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Home(tmp_path_factory.mktemp("server")).seed_server() as address:
        yield f"http://{address}"


def post(url: str, body: dict[str, Any]) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=LIMIT) as response:
        return json.load(response)


def ask(url: str, text: str) -> Any:
    """The ended task of a message."""
    return post(url, {"input": {"type": "text/plain", "content": text}})


def test_every_example_stands_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"`{path.name}`" in text


def test_the_streaming_script_prints_an_answer_and_how_it_ended(home: Home, server: str) -> None:
    said = home.run(["python", "examples/test-streaming.py", "--server", server, "What are AI agents?"])
    assert "pursue a goal" in said
    assert said.endswith("\ncompleted\n")


def test_the_streaming_script_fails_when_the_task_does(home: Home, server: str) -> None:
    with pytest.raises(AssertionError, match=r"ended with 1:(?s:.*)\nfailed\n"):
        home.run(["python", "examples/test-streaming.py", "--server", server, "fail please"])


def test_the_streaming_script_fails_for_an_agent_that_is_not_there(home: Home, server: str) -> None:
    with pytest.raises(AssertionError, match=r"ended with 1:\ncut\n(?s:.*)404"):
        home.run(["python", "examples/test-streaming.py", "--server", server, "--agent", "nobody"])


@pytest.mark.parametrize("tools", ["installed", "stand-ins"])
def test_the_session_script_checks_that_the_agent_remembers(tmp_path: Path, server: str, tools: str) -> None:
    said = Home(tmp_path, stand_ins=tools == "stand-ins").run(["bash", "examples/test-sessions.sh", server])
    assert "agent: Your name is Alice." in said
    assert "agent: 3 examples of AI agents" in said
    assert "messages kept: 8\n" in said
    assert said.endswith("session ended\n")


def test_the_trio_client_remembers_and_cancels_by_leaving(home: Home, server: str) -> None:
    said = home.run(["python", "examples/trio_client.py", server])
    assert "agent: Your name is Alice." in said
    assert "Left after 20 chunks: the server ended the task as 'cancelled'" in said


def test_the_python_client_remembers_and_cancels(home: Home, server: str) -> None:
    said = home.run(["python", "examples/python_client.py", server])
    assert "agent: Your name is Alice." in said
    assert "asked to stop: cancelled, because seen enough" in said
    assert "left: cancelled after" in said
    assert "agent:  AI agents are programs" in said


def test_the_custom_agents_serve_themselves(home: Home) -> None:
    with home.serving(["python", "examples/custom_agent.py", "--port", "0"]) as url:
        session = post(f"{url}/sessions", {"agentId": "travel_planner"})["sessionId"]
        first = ask(f"{url}/sessions/{session}/tasks", "A trip to Rome")
        assert first["status"] == "completed"
        second = ask(f"{url}/sessions/{session}/tasks", "Then on to Naples!")
        assert second["output"]["content"].startswith("After Rome, now Naples.")

        counted = ask(f"{url}/agents/word_counter/tasks", "to be or not to be")
        assert counted["output"]["content"].startswith("6 words, 4 different ones.")


def test_a_configuration_names_the_custom_agent(home: Home) -> None:
    command = ["hector", "serve", "--config", "configs/custom-agent.yaml", "--port", "0"]
    with home.serving(command) as url:
        task = ask(f"{url}/agents/travel_planner/tasks", "A trip to Rome")
        assert task["status"] == "completed"
        assert "Day 1: arrive in Rome." in task["output"]["content"]


def test_hypercorn_serves_the_example_application(home: Home) -> None:
    command = ["python", "-m", "hypercorn", "-k", "trio", "-b", "127.0.0.1:0", "examples.hypercorn_app:app"]
    with home.serving(command, ready=r"Running on (http://127\.0\.0\.1:\d+)") as url:
        task = ask(f"{url}/agents/parrot/tasks", "Polly wants a cracker")
        assert task["output"]["content"] == "Polly wants a cracker "
