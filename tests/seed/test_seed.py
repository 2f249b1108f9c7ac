"""Every runnable snippet of SESSIONS_AND_STREAMING.md does what its reader expects, twice in a row.

The JavaScript ones run in a browser and in Node: see tests/interop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.seed import snippets as seed
from tests.seed.process import LIMIT, Home, Output

CHUNK_KEYS = {"taskId", "seq", "chunkType", "content", "timestamp", "final"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("seed"))


@pytest.fixture(scope="module")
def address(home: Home) -> Iterator[str]:
    with home.seed_server() as address:
        yield address


def get(address: str, path: str, accept: str = "application/json") -> Any:
    request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=LIMIT) as response:
        body = response.read().decode()
    return json.loads(body) if accept == "application/json" else body


def chunks_of(address: str, task_id: str) -> list[dict[str, Any]]:
    """A task's log, followed to its final chunk."""
    events = get(address, f"/agents/assistant/tasks/{task_id}/events", "text/event-stream")
    return [json.loads(line[5:]) for line in events.splitlines() if line.startswith("data:")]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["content"] for chunk in chunks if chunk["chunkType"] == "text")


def check_chunks(chunks: list[dict[str, Any]], task_id: str) -> None:
    """What the seed says of a stream: every field on every chunk, and the last one is final."""
    assert len(chunks) > 1
    for chunk in chunks:
        assert chunk.keys() >= CHUNK_KEYS
        assert chunk["taskId"] == task_id
        assert chunk["timestamp"].endswith("Z")
        assert datetime.fromisoformat(chunk["timestamp"])
    assert [chunk["final"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["chunkType"] == "done"


def test_the_promise_stands_as_it_was_given() -> None:
    digest = hashlib.sha256(seed.SEED.read_bytes()).hexdigest()
    assert digest == "9633f919f553ec4eb5b210940115614343a6e8a7ce3218e74ee2bd1562f9c082"


def test_every_runnable_snippet_is_known() -> None:
    assert [(each.title, each.language) for each in seed.snippets() if each.language] == [
        (seed.SESSION_FLOW, "bash"),
        (seed.STREAMING_FLOW, "javascript"),
        (seed.CHAT_SCRIPT, "bash"),
        (seed.PYTHON_STREAM, "python"),
        (seed.COMBINED, "javascript"),
        (seed.TEST_SESSIONS, "bash"),
        (seed.TEST_STREAMING, "bash"),
    ]


@pytest.mark.parametrize(
    ("question", "topic"), [("What are AI agents?", "AI agents"), ("Explain quantum computing", "quantum computing")]
)
def test_the_session_flow_keeps_the_conversation(home: Home, address: str, question: str, topic: str) -> None:
    script = seed.snippet(seed.SESSION_FLOW).replace("What are AI agents?", question)
    create, ask, follow_up, end = seed.commands(script)

    session = json.loads(home.shell(seed.at(create, address)))
    shown = json.loads(seed.shown_answer(script))
    assert session.keys() == shown.keys()
    assert session["agentId"] == shown["agentId"]
    assert session["state"] == shown["state"]
    assert session["metadata"] == shown["metadata"]
    session_id = session["sessionId"]

    answer = json.loads(home.shell(seed.at(ask, address, session_id)))
    assert answer["status"] == "completed"
    assert topic.lower() in answer["output"]["content"].lower()

    answer = json.loads(home.shell(seed.at(follow_up, address, session_id)))
    assert f"3 examples of {topic}" in answer["output"]["content"]

    later = get(address, f"/sessions/{session_id}")
    assert later["lastActivityAt"] > session["lastActivityAt"]
    assert get(address, f"/sessions/{session_id}/messages")["total"] == 4

    assert home.shell(seed.at(end, address, session_id)) == ""
    assert session_id not in {each["sessionId"] for each in get(address, "/sessions")["sessions"]}


@pytest.mark.parametrize("tools", ["installed", "stand-ins"])
def test_the_chat_script_starts_its_server_and_is_remembered(tmp_path: Path, tools: str) -> None:
    home = Home(tmp_path, stand_ins=tools == "stand-ins")
    for name in ("Alice", "Bob"):
        with home.listening() as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            script = seed.at(seed.without_comments_in_bodies(seed.snippet(seed.CHAT_SCRIPT)), address)
            (tmp_path / "chat.sh").write_text(script.replace("Alice", name))
            with home.start(["bash", "chat.sh"], fds=[listener.fileno()]) as process:
                assert process.stdout is not None
                output = Output(process.stdout)
                try:
                    process.wait(LIMIT)
                finally:
                    # The script leaves its server running; it is still in the script's group.
                    os.killpg(process.pid, signal.SIGTERM)
                    said = output.rest()
            assert process.returncode == 0, said
        (session_id,) = re.findall(r"(?m)^Session ID: (\S+)$", said)
        starts = [each.start() for each in re.finditer(r'\{"taskId"', said)]
        first, second = (json.JSONDecoder().raw_decode(said, start)[0] for start in starts)
        assert name in first["output"]["content"]
        assert second["output"]["content"] == f"Your name is {name}."
        assert {first["sessionId"], second["sessionId"]} == {session_id}


def test_the_python_example_prints_a_stream_and_ends(home: Home, address: str) -> None:
    script = seed.at(seed.snippet(seed.PYTHON_STREAM), address)
    for subject in ("AI", "rain"):
        text = script.replace("a short poem about AI", f"a short poem about {subject}")
        (home.folder / "stream.py").write_text(text)
        lines = home.run(["python", "stream.py"]).splitlines()
        assert lines[0].startswith("[text] ")
        assert lines[-1] == "[done] "
        log = chunks_of(address, "stream-test-1")
        check_chunks(log, "stream-test-1")
        assert f"some lines about {subject}" in text_of(log)
    # The second run has taken the name; the first is still readable.
    assert "some lines about AI" in text_of(chunks_of(address, "stream-test-1~1"))


def test_the_manual_session_tests_work_with_a_form_content_type(tmp_path: Path) -> None:
    home = Home(tmp_path)
    script, serve, create, list_all = seed.commands(seed.snippet(seed.TEST_SESSIONS))
    assert script == "./test-sessions.sh"
    with home.listening() as listener, home.serving(serve.split(), fds=[listener.fileno()]) as url:
        address = url.removeprefix("http://")
        for run in (1, 2):
            session = json.loads(home.shell(seed.at(create, address)))
            assert session["agentId"] == "assistant"
            listed = json.loads(home.shell(seed.at(list_all, address)))
            assert listed["total"] == run
            assert session in listed["sessions"]
            said = home.shell(f"cd examples && {script}", {"HECTOR_SERVER": url})
            assert "agent: Your name is Alice." in said


def test_the_manual_streaming_tests_work(home: Home, address: str) -> None:
    install, example, line = seed.commands(seed.snippet(seed.TEST_STREAMING))
    assert install == "pip install websocket-client"  # in the extra `test`
    for prompt in ("", " 'What are AI agents?'"):
        said = home.shell(example + prompt, {"HECTOR_SERVER": f"http://{address}"})
        assert said.endswith("\ncompleted\n")

    # Where websocat closes at the end of its input, that is leaving, and cancels; -n keeps it there to read.
    line = seed.at(line, address)
    path = "/agents/assistant/tasks?pageSize=100"
    before = {task["taskId"] for task in get(address, path)["tasks"]}
    home.shell(line)
    started = {task["taskId"] for task in get(address, path)["tasks"]} - before
    assert all(chunks_of(address, task_id)[-1]["status"] == "cancelled" for task_id in started)
    for prompt in ("Hello", "My name is Alice"):
        said = home.shell(line.replace("websocat ", "websocat -n ").replace("Hello", prompt))
        chunks = [json.loads(each) for each in said.splitlines()]
        check_chunks(chunks, chunks[0]["taskId"])
        assert prompt.split()[-1] in text_of(chunks)
