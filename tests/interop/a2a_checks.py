"""The official JavaScript SDK of A2A, its 1.x and its 0.3: its clients of our server, and its servers as our agents."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.interop.browser_checks import api
from tests.interop.sdk import PACKAGES, SPEAKERS, Client, Driver, Program, Refused, Speaker, text_of, told
from tests.interop.web import Hook, Wire, serving_hook, wire_to
from tests.seed.process import LIMIT, Home, Output

NODES = os.environ.get("INTEROP_NODES", "none").split(os.pathsep)
"""The first one runs clients, the last one servers."""
RESUME = "urn:hector-trio:a2a:resume:v1"
TOKEN = "correct-horse-battery"


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drivers(packages: Path) -> Iterator[dict[str, Driver]]:
    with contextlib.ExitStack() as stack:
        yield {each: stack.enter_context(Driver(NODES[0], packages, "a2a_client.mjs", each)) for each in PACKAGES}


def agent(**more: Any) -> dict[str, Any]:
    return {"type": "python", "function": "tests.interop.a2a_agents:speak", **more}


def serving(
    home: Home, name: str, agents: dict[str, Any], fds: Sequence[int] = (), **sections: Any
) -> contextlib.AbstractContextManager[str]:
    config = {
        "server": {"port": 0, "http2": True, "shutdown_grace": 0.1},
        "store": {"url": "memory"},
        "agents": agents,
        **sections,
    }
    (home.folder / f"{name}.yaml").write_text(json.dumps(config))
    return home.serving(["hector", "serve", "--config", f"{name}.yaml"], fds=fds)


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[str]:
    agents = {
        "speaker": agent(a2a={"input_modes": ["text/plain"]}),
        "replier": agent(replies=True),
        "strict": agent(a2a={"extensions": [{"uri": "urn:x:must", "required": True}]}),
        "quiet": agent(a2a={"push": False, "streaming": False}),
        "release": {"type": "python", "function": "tests.interop.a2a_agents:release"},
    }
    sections: dict[str, Any] = {
        "store": {"url": "speaking.db"},
        "push": {"allow_loopback": True, "interval": 0},
        "default_agent": "speaker",
    }
    with serving(home, "speaking", agents, **sections) as url:
        yield url


@pytest.fixture(params=SPEAKERS, ids=" ".join)
def speaker(request: pytest.FixtureRequest) -> Speaker:
    found: Speaker = request.param
    return found


@pytest.fixture
def client(drivers: dict[str, Driver], speaker: Speaker, server: str) -> Client:
    return Client(drivers[speaker.package], speaker, f"{server}/a2a/speaker/")


def release(server: str, name: str) -> bool:
    """Opens a gate of the agent's; whether its work of this name was stopped."""
    body = {"input": {"type": "text/plain", "content": name}}
    task = api(f"{server}/agents/release/tasks", "POST", json=body)
    return bool(task["output"]["content"]["stopped"])


def log_of(server: str, task_id: str) -> list[dict[str, Any]]:
    page = api(f"{server}/agents/speaker/tasks/{task_id}/events?pageSize=100")
    chunks: list[dict[str, Any]] = page["chunks"]
    return chunks


def unique() -> str:
    return uuid.uuid4().hex


# --- its clients ------------------------------------------------------------------------------------------------------


def test_an_agent_is_found_by_its_card(drivers: dict[str, Driver], speaker: Speaker, server: str) -> None:
    driver = drivers[speaker.package]
    for url, path in (
        (f"{server}/a2a/speaker/", None),
        (f"{server}/a2a/speaker/.well-known/agent-card.json", ""),
        (f"{server}/agents/speaker/", None),
        (server, None),  # the default agent's
    ):
        client = Client(driver, speaker, url, path)
        assert client.card()["name"] == "speaker"
        if not speaker.old:
            assert client.transport == f"{speaker.binding} {speaker.version}"


def test_a_message_is_sent_and_its_answer_waited_for(client: Client) -> None:
    task = client.send("hi")
    assert (task.kind, task.state, task.artifacts) == ("task", "completed", [["You said: hi"]])
    assert task.history == [["hi"]]
    again = client.get(task.task_id)
    assert (again.state, again.artifacts, again.context_id) == (task.state, task.artifacts, task.context_id)
    following = client.send("more", about={"contextId": task.context_id})
    assert (following.context_id, following.state) == (task.context_id, "completed")
    assert following.task_id != task.task_id


def test_a_message_need_not_be_waited_for(client: Client, server: str) -> None:
    name = unique()
    task = client.send(f"hold {name}", wait=False)
    assert task.state in ("submitted", "working")
    assert client.get(task.task_id).state in ("submitted", "working")
    stream = client.resubscribe(task.task_id)
    events = [stream.next()]
    for gate in (name, f"{name}!"):
        release(server, gate)
    events += stream.rest()
    assert events[-1].state == "completed"
    assert text_of(events) == "one two three"


def test_each_event_of_a_stream_is_what_the_log_says(client: Client, server: str) -> None:
    events = client.stream("parts").rest()
    first, *rest = events
    assert (first.kind, first.history) == ("task", [["parts"]])
    assert {each.task_id for each in events} == {first.task_id}
    assert {each.context_id for each in events} == {first.context_id}
    found = []
    for each in rest:
        if each.kind == "status":
            found.append((each.state, each.said))
        else:
            [parts] = each.artifacts
            found.append((each.raw["artifact"]["artifactId"], parts))
    unnamed = client.speaker.version == "0.3" and client.speaker.binding == "HTTP+JSON"  # whose files had no names
    expected: list[Any] = []
    for chunk in log_of(server, first.task_id):
        artifact = chunk.get("artifact", {})
        content = chunk["content"]
        if chunk["chunkType"] == "done":
            expected.append(("completed", []))
        elif chunk["chunkType"] == "metadata":
            expected.append(("working", [content["message"]]))
        elif artifact.get("url"):
            name = None if unnamed else artifact["filename"]
            expected.append((artifact["id"], [(content, name, artifact["mediaType"])]))
        elif chunk.get("encoding"):
            expected.append(("output", [(content, None, chunk["mediaType"])]))
        else:
            said = {"data": content} if chunk["chunkType"] == "data" else content
            expected.append((artifact.get("id", "output"), [said]))
    assert [each for each in found if each != ("working", [])] == expected
    assert [kind for kind, _ in expected] == ["working", *["output"] * 2, *["A"] * 3, "B", "output", "completed"]
    task = client.get(first.task_id)
    assert task.artifacts == [
        [{"data": {"n": 1}}, ("AP8=", None, "image/png"), "done"],
        ["doc", {"data": {"k": [1]}}, " more"],
        [("https://x.example/y", None if unnamed else "y", "text/plain")],
    ]
    assert task.raw["artifacts"][1]["name"] == "Doc"


def test_a_long_stream_that_is_read_late_arrives_whole_and_in_order(client: Client) -> None:
    stream = client.stream("count 3000")
    events = [stream.next()]
    assert client.send("hi").state == "completed"
    events += stream.rest()
    assert text_of(events) == "".join(f"{n} " for n in range(3000))
    assert events[-1].state == "completed"
    assert text_of([client.get(events[0].task_id)]) == text_of(events)


def test_a_stream_that_was_cut_is_subscribed_to_again_and_misses_nothing(
    drivers: dict[str, Driver], speaker: Speaker, server: str
) -> None:
    name = unique()
    with wire_to(server) as wire:
        client = Client(drivers[speaker.package], speaker, f"{wire.url}/a2a/speaker/")
        stream = client.stream(f"hold {name}")
        task_id = stream.until("one ")[0].task_id
        wire.cut()
        with pytest.raises(Refused):
            stream.rest()
        release(server, name)
        stream = client.resubscribe(task_id)
        events = [stream.next()]
        if text_of(events) == "one ":
            events += stream.until("two ")
        assert (events[0].kind, text_of(events)) == ("task", "one two ")
        stream.leave()  # which stops nothing
        stream = client.resubscribe(task_id)
        events = [stream.next()]
        assert text_of(events) == "one two "
        release(server, f"{name}!")
        events += stream.rest()
        assert (text_of(events), events[-1].state) == ("one two three", "completed")


def test_a_stream_goes_on_by_number(drivers: dict[str, Driver], speaker: Speaker, server: str) -> None:
    """Our extension, which the SDK knows nothing of: headers and metadata are all that it takes."""
    name = unique()
    with wire_to(server) as wire:
        client = Client(drivers[speaker.package], speaker, f"{wire.url}/a2a/speaker/")
        client.headers = {"A2A-Extensions": RESUME}
        stream = client.stream(f"hold {name}")
        last = stream.until("one ")[-1]
        wire.cut()
        with pytest.raises(Refused):
            stream.rest()
        for gate in (name, f"{name}!"):
            release(server, gate)
        client.headers |= {"Last-Event-ID": last.metadata[RESUME]["after"]}
        events = client.resubscribe(last.task_id).rest()
        assert [each.kind for each in events] == ["artifact", "artifact", "status"]
        assert (text_of(events), events[-1].state) == ("two three", "completed")


def test_a_question_is_asked_and_answered(client: Client) -> None:
    task = client.send("ask")
    assert (task.state, task.said) == ("input-required", ["Which?"])
    answered = client.send("that", about={"taskId": task.task_id, "contextId": task.context_id})
    assert (answered.task_id, answered.context_id) == (task.task_id, task.context_id)
    assert (answered.state, text_of([answered])) == ("completed", "got that")
    assert answered.history == [["ask"], ["Which?"], ["that"]]

    events = client.stream("ask").rest()
    assert (events[-1].state, events[-1].said) == ("input-required", ["Which?"])
    events = client.stream("this", about={"taskId": events[0].task_id}).rest()
    assert (events[-1].state, text_of(events)) == ("completed", "got this")


def test_somebody_is_asked_to_log_in(client: Client) -> None:
    task = client.send("login")
    assert (task.state, task.said) == ("auth-required", ["Who are you?"])
    assert client.send("me", about={"taskId": task.task_id}).state == "completed"


def test_a_cancel_stops_the_work(client: Client, server: str) -> None:
    name = unique()
    stream = client.stream(f"slow {name}")
    task_id = stream.until("begun ")[0].task_id
    watching = client.resubscribe(task_id)
    assert watching.next().task_id == task_id
    assert not release(server, name)
    task = client.cancel(task_id)
    assert (task.task_id, task.state) == (task_id, "canceled")
    assert release(server, name)  # at once: the answer came when the work had stopped
    for each in (stream, watching):
        assert each.rest()[-1].state == "canceled"
    assert client.get(task_id).state == "canceled"
    assert log_of(server, task_id)[-1]["status"] == "cancelled"
    waiting = client.send("ask")
    assert client.cancel(waiting.task_id).state == "canceled"


def test_a_task_may_fail_be_rejected_or_be_a_message(
    client: Client, drivers: dict[str, Driver], speaker: Speaker, server: str
) -> None:
    task = client.send("fail")
    assert (task.state, task.said) == ("failed", ["Nothing left"])
    last = client.stream("reject").rest()[-1]
    assert (last.state, last.said) == ("rejected", ["Not on Sundays"])
    replier = Client(drivers[speaker.package], speaker, f"{server}/a2a/replier/")
    message = replier.send("reply")
    assert (message.kind, message.said) == ("message", ["Just this"])
    assert [(each.kind, each.said) for each in replier.stream("reply").rest()] == [("message", ["Just this"])]


def test_an_agent_that_does_not_stream_is_asked_without(
    drivers: dict[str, Driver], speaker: Speaker, server: str
) -> None:
    """The SDK sees it on the card, and sends instead."""
    quiet = Client(drivers[speaker.package], speaker, f"{server}/a2a/quiet/")
    assert [each.artifacts for each in quiet.stream("hi").rest()] == [[["You said: hi"]]]


def test_as_much_of_the_history_is_told_as_is_wanted(client: Client) -> None:
    task = client.send("ask")
    client.send("that", about={"taskId": task.task_id})
    whole = [["ask"], ["Which?"], ["that"]]
    assert client.get(task.task_id).history == whole
    assert client.get(task.task_id, historyLength=2).history == whole[-2:]
    assert client.get(task.task_id, historyLength=0).history == []
    assert client.send("hi", historyLength=1).history == [["hi"]]


def test_tasks_are_listed_page_by_page(client: Client) -> None:
    if client.speaker.version != "1.0":
        with pytest.raises(Refused):
            client.call("listTasks")
        return
    context = client.send("ask").context_id
    ids = [client.send(text, about={"contextId": context}).task_id for text in ("a", "b", "c")]
    page = client.call("listTasks", contextId=context, pageSize=2)
    assert ([each["id"] for each in page["tasks"]], page["totalSize"], page["pageSize"]) == (ids[:0:-1], 4, 2)
    assert not any(each.get("artifacts") for each in page["tasks"])
    page = client.call("listTasks", contextId=context, pageSize=2, pageToken=page["nextPageToken"])
    assert (len(page["tasks"]), page["tasks"][0]["id"], page.get("nextPageToken", "")) == (2, ids[0], "")
    page = client.call("listTasks", contextId=context, status="TASK_STATE_INPUT_REQUIRED")
    assert [told(each).said for each in page["tasks"]] == [["Which?"]]
    since = client.get(ids[2]).raw["status"]["timestamp"]
    page = client.call("listTasks", contextId=context, statusTimestampAfter=since, includeArtifacts=True)
    assert [told(each).artifacts for each in page["tasks"]] == [[["You said: c"]]]


def test_a_server_that_goes_says_so_and_comes_back_with_its_tasks(drivers: dict[str, Driver], home: Home) -> None:
    def started() -> contextlib.AbstractContextManager[str]:
        return serving(home, "going", {"speaker": agent()}, store={"url": "going.db"})

    streams = []
    with started() as url:
        for speaker in SPEAKERS:
            client = Client(drivers[speaker.package], speaker, f"{url}/a2a/speaker/")
            held = client.stream(f"hold {unique()}")
            held.until("one ")
            asked = client.send("ask").task_id
            watching = client.resubscribe(asked)
            assert watching.next().state == "input-required"
            streams.append((held, watching, asked))
    with started() as url:
        for speaker, (held, watching, asked) in zip(SPEAKERS, streams, strict=True):
            last = held.rest()[-1]
            assert (last.state, last.metadata["code"]) == ("failed", "interrupted")
            with pytest.raises(Refused, match="goes on waiting at the next start"):
                watching.rest()
            client = Client(drivers[speaker.package], speaker, f"{url}/a2a/speaker/")
            assert client.get(last.task_id).state == "failed"
            assert text_of([client.send("that", about={"taskId": asked})]) == "got that"


@pytest.fixture
def hook() -> Iterator[Hook]:
    with serving_hook() as hook:
        yield hook


def test_a_webhook_is_configured_told_and_forgotten(client: Client, server: str, hook: Hook) -> None:
    name = unique()
    inline = {**client.webhook(hook.url("/inline")), "id": "inline"}
    task_id = client.send(f"hold {name}", wait=False, push=inline).task_id
    made = client.push_call("create", task_id, "made", client.webhook(hook.url("/made")))
    got = client.push_call("get", task_id, "made")
    assert made == got
    about = got["pushNotificationConfig"] if client.speaker.old else got
    assert (about["id"], about["url"], about["token"]) == ("made", hook.url("/made"), "t-1")
    assert "secret" not in json.dumps(got)
    listed = client.push_call("list", task_id, "")
    configs = listed if client.speaker.old else listed["configs"]
    assert sorted((each.get("pushNotificationConfig") or each)["id"] for each in configs) == ["inline", "made"]
    client.push_call("create", task_id, "never", client.webhook(hook.url("/never")))
    client.push_call("delete", task_id, "never")
    for gate in (name, f"{name}!"):
        release(server, gate)
    seen: dict[str, list[Any]] = {"/inline": [], "/made": []}
    ended: set[str] = set()
    while ended != seen.keys():
        path, headers, body = hook.wait()
        assert headers["X-A2A-Notification-Token"] == "t-1"
        assert headers["Authorization"] == "Bearer secret"
        seen[path].append(told(body))
        if seen[path][-1].kind in ("task", "status") and seen[path][-1].state == "completed":
            ended.add(path)
    for events in seen.values():
        assert {each.task_id for each in events} == {task_id}
        if client.speaker.version == "1.0":
            assert text_of(events).endswith("two three")
        else:
            assert text_of(events[-1:]) == "one two three"


# --- errors, and who may ---------------------------------------------------------------------------------------------


def test_errors_are_those_that_the_sdk_knows(
    client: Client, drivers: dict[str, Driver], speaker: Speaker, server: str
) -> None:
    ended = client.send("hi").task_id
    quiet = Client(drivers[speaker.package], speaker, f"{server}/a2a/quiet/")
    picture: dict[str, Any] = {"raw": "AP8=", "mediaType": "image/png"}
    if speaker.old:
        picture = {"kind": "file", "file": {"bytes": "AP8=", "mimeType": "image/png"}}
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("TaskNotFoundError", lambda: client.get("nobody")),
        ("TaskNotFoundError", lambda: client.cancel("nobody")),
        ("TaskNotFoundError", lambda: client.resubscribe("nobody").next()),
        ("TaskNotFoundError", lambda: client.send("hi", about={"taskId": "nobody"})),
        ("TaskNotCancelableError", lambda: client.cancel(ended)),
        ("UnsupportedOperationError", lambda: client.resubscribe(ended).next()),
        ("UnsupportedOperationError", lambda: client.send("hi", about={"taskId": ended})),
        ("UnsupportedOperationError", lambda: client.stream("hi", about={"taskId": ended}).next()),
        ("ContentTypeNotSupportedError", lambda: client.send("hi", about={"parts": [picture]})),
        ("PushNotificationNotSupportedError", lambda: quiet.send("hi", push=quiet.webhook("http://127.0.0.1:1/"))),
    ]
    for kind, call in calls:
        with pytest.raises(Refused) as found:
            call()
        error = found.value.cause or found.value  # streams wrap it
        assert kind in error.kinds, error


def test_what_is_wrong_with_a_request_is_said(client: Client) -> None:
    wrong: list[tuple[str, Any]] = [
        ("parts", lambda: client.send("hi", about={"parts": []})),
        ("historyLength", lambda: client.send("hi", historyLength=-1)),
        ("10.0.0.1", lambda: client.send("hi", push=client.webhook("http://10.0.0.1/"))),
    ]
    if client.speaker.version == "1.0":
        wrong.append(("pageSize", lambda: client.call("listTasks", pageSize=1000)))
    for said, call in wrong:
        with pytest.raises(Refused) as found:
            call()
        assert said in found.value.message
        assert ("RequestMalformedError" in found.value.kinds) is not client.speaker.old


def test_an_extension_that_is_asked_for_is_declared(drivers: dict[str, Driver], speaker: Speaker, server: str) -> None:
    strict = Client(drivers[speaker.package], speaker, f"{server}/a2a/strict/")
    with pytest.raises(Refused, match="urn:x:must") as found:
        strict.send("hi")
    assert ("ExtensionSupportRequiredError" in found.value.kinds) is not speaker.old  # which had no such error
    strict.headers = {"X-A2A-Extensions" if speaker.old else "A2A-Extensions": "urn:x:must"}
    assert strict.send("hi").state == "completed"


@pytest.fixture(scope="module")
def secured(home: Home) -> Iterator[str]:
    skills = [{"id": "more", "name": "More", "description": "More", "tags": ["x"]}]
    agents = {"speaker": agent(a2a={"extended_skills": skills})}
    auth = {"tokens": [{"name": "alice", "token": TOKEN}]}
    with serving(home, "secured", agents, auth=auth) as url:
        yield url


def test_a_token_opens_the_agent_and_its_extended_card(
    drivers: dict[str, Driver], speaker: Speaker, secured: str
) -> None:
    driver, url = drivers[speaker.package], f"{secured}/a2a/speaker/"
    stranger = Client(driver, speaker, url)
    for call in (stranger.card, lambda: stranger.send("hi"), lambda: stranger.stream("hi").next()):
        with pytest.raises(Refused, match=r"(?i)unauth|401|token"):
            call()
    clients = []
    if speaker.binding != "GRPC":  # it is the SDK that sends the token, where it is asked for one
        clients.append(Client(driver, speaker, url, token=TOKEN))
    clients.append(Client(driver, speaker, url))
    clients[-1].headers = {"Authorization": f"Bearer {TOKEN}"}
    for client in clients:
        assert client.send("hi").state == "completed"
        assert client.stream("hi").rest()[-1].state == "completed"
        assert [each["id"] for each in client.card()["skills"]] == ["speaker", "more"]


def test_a_signed_card_is_found_genuine(drivers: dict[str, Driver], home: Home) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (home.folder / "card.pem").write_bytes(pem)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        section = {"fd": listener.fileno(), "base_url": url, "card_key": "card.pem"}
        agents = {"speaker": agent(description="Größe")}
        with serving(home, "signed", agents, [listener.fileno()], server=section) as address:
            assert address == url
            client = Client(drivers["a2a-1"], SPEAKERS[0], f"{url}/a2a/speaker/")
            assert client.card(verify=True)["description"] == "Größe"


# --- its servers ------------------------------------------------------------------------------------------------------

PEERS = [("a2a-1", path) for path in ("rpc", "http", "rpc03", "http03", "plain")]
PEERS += [("a2a-0.3", path) for path in ("rpc03", "http03")]


class Peer(NamedTuple):
    """An agent of the SDK's, and its likeness on a server of ours."""

    url: str
    near: str
    """Where the likeness is."""
    far: str
    """Where it is itself."""
    wire: Wire
    """Between them."""

    def ask(self, text: str, **more: Any) -> dict[str, Any]:
        body = {"input": {"content": text}, **more}
        task: dict[str, Any] = api(f"{self.near}/tasks", "POST", json=body)
        return task

    def open(self, name: str) -> None:
        api(f"{self.far}/open/{name}", "POST")

    def wait_stopped(self, name: str) -> None:
        api(f"{self.far}/stopped/{name}")


@pytest.fixture(scope="module")
def farther(packages: Path) -> Iterator[dict[str, tuple[str, Wire]]]:
    """The SDK's servers, and the wires that lead there."""
    with contextlib.ExitStack() as stack:
        found = {}
        for package in PACKAGES:
            program = stack.enter_context(Program(NODES[-1], packages, "a2a_server.mjs", package))
            address = program.find("^listening (.*)")
            wire = stack.enter_context(wire_to(address))
            program.tell(wire.url)
            program.find("^(ready)")
            found[package] = address, wire
        yield found


@pytest.fixture(scope="module")
def nearer(home: Home, farther: dict[str, tuple[str, Wire]]) -> Iterator[str]:
    urls = {f"{package}-{path}": f"{farther[package][1].url}/{path}" for package, path in PEERS}
    agents = {name: {"type": "a2a", "url": url} for name, url in urls.items()}
    with serving(home, "nearer", agents) as url:
        yield url


@pytest.fixture(params=PEERS, ids=" ".join)
def peer(request: pytest.FixtureRequest, nearer: str, farther: dict[str, tuple[str, Wire]]) -> Peer:
    package, path = request.param
    far, wire = farther[package]
    return Peer(f"{wire.url}/{path}", f"{nearer}/agents/{package}-{path}", far, wire)


@contextlib.contextmanager
def streaming(peer: Peer, text: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a task of the likeness, as they come."""
    headers = {"Accept": "text/event-stream"}
    body = {"input": {"content": text}, "onDisconnect": "continue"}
    with (
        httpx2.Client(trust_env=False, verify=False, timeout=LIMIT) as client,
        client.stream("POST", f"{peer.near}/tasks", json=body, headers=headers) as response,
    ):
        yield chunks_of(response)


def chunks_of(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    until = time.monotonic() + LIMIT
    for line in response.iter_lines():
        assert time.monotonic() < until, "nothing but comments"
        if line.startswith("data:"):
            yield json.loads(line[5:])


def next_text(chunks: Iterator[dict[str, Any]]) -> str:
    return str(next(chunk for chunk in chunks if chunk["chunkType"] == "text")["content"])


def words(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["content"] for chunk in chunks if chunk["chunkType"] == "text")


def test_an_answer_of_a_server_of_the_sdk_is_passed_on(peer: Peer) -> None:
    task = peer.ask("hi")
    assert (task["status"], task["output"]["content"]) == ("completed", "You said: hi")
    chunks = api(f"{peer.near}/tasks/{task['taskId']}/events")["chunks"]
    (picture,) = [chunk for chunk in chunks if chunk["chunkType"] == "data"]
    assert (picture["content"], picture["mediaType"]) == ("AP8=", "image/png")
    thought = [chunk["content"] for chunk in chunks if chunk["chunkType"] == "metadata"]
    assert {"status": "working", "message": "thinking"} in thought or peer.near.endswith("plain")
    task = peer.ask("message")
    assert (task["status"], task["output"]["content"]) == ("completed", "a bare message")


def test_an_answer_of_a_server_of_the_sdk_comes_piece_by_piece(peer: Peer) -> None:
    name = unique()
    with streaming(peer, f"hold {name}") as chunks:
        assert next_text(chunks) == "one "
        peer.open(name)
        assert next_text(chunks) == "two "
        peer.open(f"{name}!")
        rest = list(chunks)
    assert (words(rest), rest[-1]["status"]) == ("three", "completed")


def test_a_cut_on_the_way_to_a_server_of_the_sdk_is_made_up_for(peer: Peer) -> None:
    name = unique()
    with streaming(peer, f"hold {name}") as chunks:
        assert next_text(chunks) == "one "
        before = peer.wire.connections
        peer.wire.cut()
        peer.open(name)
        assert next_text(chunks) == "two "  # although nobody heard it
        peer.wire.cut()
        peer.open(f"{name}!")
        rest = list(chunks)
    assert (words(rest), rest[-1]["status"]) == ("three", "completed")
    assert peer.wire.connections > before


def test_a_server_of_the_sdk_is_told_to_stop(peer: Peer) -> None:
    name = unique()
    with streaming(peer, f"wait {name}") as chunks:
        task_id = next(each for each in chunks if each["chunkType"] == "text")["taskId"]
        assert api(f"{peer.near}/tasks/{task_id}/cancel", "POST")["status"] == "cancelled"
    peer.wait_stopped(name)


def test_a_question_of_a_server_of_the_sdk_is_asked_here(peer: Peer) -> None:
    task = peer.ask("ask")
    assert (task["status"], task["prompt"]) == ("input_required", "Which?")
    task = api(f"{peer.near}/tasks/{task['taskId']}/input", "POST", json={"input": {"content": "Monday"}})
    assert (task["status"], task["output"]["content"]) == ("completed", "answered Monday")


def test_a_failure_of_a_server_of_the_sdk_is_one_here(peer: Peer) -> None:
    for text, code, said in (
        ("fail", "remote_failed", "broken"),
        ("throw", "remote_failed", "a bug"),
        ("reject", "rejected", "not mine"),
    ):
        task = peer.ask(text)
        assert (task["status"], task["error"]["code"]) == ("failed", code)
        assert said in task["error"]["message"]


ends = pytest.mark.parametrize("peer", [PEERS[0], PEERS[-1]], indirect=True, ids=" ".join)


@ends
def test_a_deadline_stops_a_server_of_the_sdk(peer: Peer) -> None:
    name = unique()
    task = peer.ask(f"wait {name}", timeoutMs=1000)
    assert (task["status"], task["error"]["code"]) == ("failed", "timeout")
    peer.wait_stopped(name)


@ends
def test_the_command_line_speaks_to_a_server_of_the_sdk(home: Home, peer: Peer) -> None:
    said = home.shell(
        f"""
        hector info {peer.url}
        hector call {peer.url} hi
        printf 'one\\ntwo\\n' | hector chat {peer.url}
        """
    )
    assert "description: The official SDK\n" in said
    for text in ("hi", "one", "two"):
        assert f"You said: {text}\n" in said
    name = unique()
    with home.start(["hector", "call", peer.url, f"wait {name}", "--stream", "--json"]) as process:
        assert process.stdout is not None
        output = Output(process.stdout)
        try:
            output.find("(waiting)")
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT) == 130
        finally:
            process.kill()
            output.rest()
    peer.wait_stopped(name)
