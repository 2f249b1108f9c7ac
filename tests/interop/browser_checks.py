"""Chromium and the server: the seed's JavaScript, the page at ``/``, the example page, EventSource, foreign origins."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.interop.browser import Browser
from tests.interop.web import Site, wire_to
from tests.seed import snippets as seed
from tests.seed.process import LIMIT, Home

CHUNK_KEYS = {"taskId", "seq", "chunkType", "content", "timestamp", "final"}

# What a snippet does is seen from around it: it is not touched.
AROUND = """<!doctype html><meta charset="utf-8"><title>seed</title><link rel="icon" href="data:,">
<script>
  window.chunks = [], window.logged = [], window.closes = [], window.wrong = [];
  const log = console.log;
  console.log = (...things) => { logged.push(things); log(...things); };
  window.WebSocket = class extends WebSocket {
    constructor(...given) {
      super(...given);
      this.addEventListener('message', (event) => chunks.push(JSON.parse(event.data)));
      this.addEventListener('close', (event) => closes.push({code: event.code, clean: event.wasClean}));
    }
  };
  window.addEventListener('error', (event) => wrong.push(event.message));
  window.addEventListener('unhandledrejection', (event) => wrong.push(String(event.reason)));
</script>
<script type="module">
%s
</script>"""


def api(url: str, method: str = "GET", **options: Any) -> Any:
    # Without TLS, whose certificates would take longer to read than most requests take.
    response = httpx2.request(method, url, timeout=LIMIT, trust_env=False, verify=False, **options)
    assert response.status_code < 300, response.text
    return response.json()


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["content"] for chunk in chunks if chunk["chunkType"] == "text")


def log_of(server: str, task_id: str) -> list[dict[str, Any]]:
    """A task's log, followed to its final chunk."""
    headers = {"Accept": "text/event-stream"}
    url = f"{server}/agents/assistant/tasks/{task_id}/events"
    events = httpx2.get(url, headers=headers, timeout=LIMIT, trust_env=False).text
    return [json.loads(line[5:]) for line in events.splitlines() if line.startswith("data:")]


def submit(server: str, prompt: str) -> str:
    """The id of a task that runs by itself."""
    body = {"input": {"type": "text/plain", "content": prompt}}
    task = api(f"{server}/agents/assistant/tasks", "POST", json=body, headers={"Prefer": "respond-async"})
    return str(task["taskId"])


# --- the seed's two snippets, from another loopback origin ------------------------------------------------------------


def test_the_streaming_snippet_runs_twice_in_a_browser(browser: Browser, server: str, site: Site) -> None:
    snippet = seed.at(seed.snippet(seed.STREAMING_FLOW), server.removeprefix("http://"))
    for prompt, word in (("Explain quantum computing", "qubit"), ("What are AI agents?", "pursue a goal")):
        browser.open(site.put("/seed", AROUND % snippet.replace("Explain quantum computing", prompt)))
        closes = browser.until("closes.length && closes")
        chunks = browser.run("return chunks")
        assert closes[0]["clean"]
        assert all(chunk.keys() >= CHUNK_KEYS for chunk in chunks)
        assert {chunk["taskId"] for chunk in chunks} == {"task-123"}
        assert [chunk["final"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert word in text_of(chunks)
        logged = browser.run("return logged")
        assert [line[0] for line in logged] == ["Chunk:"] * len(chunks) + ["Task complete!"]
        assert browser.run("return wrong") == []
        assert word in text_of(log_of(server, "task-123"))
    assert "qubit" in text_of(log_of(server, "task-123~1"))


def test_the_combined_snippet_runs_twice_in_a_browser(browser: Browser, server: str, site: Site) -> None:
    snippet = seed.at(seed.snippet(seed.COMBINED), server.removeprefix("http://"))
    for prompt, word in (("Hello!", "built-in demo"), ("My name is Zoe", "Hello Zoe")):
        browser.open(site.put("/seed", AROUND % snippet.replace("Hello!", prompt)))
        # The snippet never closes its socket: the server does, two idle seconds after the final chunk.
        assert browser.until("closes.length && closes") == [{"code": 1000, "clean": True}]
        chunks = browser.run("return chunks")
        assert word in text_of(chunks)
        assert chunks[-1]["final"]
        assert browser.run("return logged.length") == len(chunks)
        assert browser.run("return wrong") == []
        session = api(f"{server}/sessions?agent_id=assistant&pageSize=1")["sessions"][0]
        messages = api(f"{server}/sessions/{session['sessionId']}/messages")["messages"]
        assert [message["role"] for message in messages] == ["user", "agent"]
        assert messages[0]["content"] == prompt


# --- the page at / ----------------------------------------------------------------------------------------------------

STATUS = "document.getElementById('status').textContent"
ROWS = "document.getElementById('chunks').rows.length"


def test_the_page_streams_into_a_session_that_remembers(browser: Browser, server: str) -> None:
    browser.open(f"{server}/")
    browser.until("document.querySelector('input[name=agent][value=assistant]:checked')")
    assert "assistant" in browser.text("#code")
    browser.click("#run")
    browser.until(f"{STATUS} === 'completed'")
    assert "pursue a goal" in browser.text("#answer")
    browser.type("#prompt", "Give me 3 examples\n")  # Enter runs it
    browser.until(f"{STATUS} === 'completed' && document.getElementById('messages').children.length === 4")
    assert "3 examples of AI agents" in browser.text("#messages")
    types = browser.run("return Array.from(document.getElementById('chunks').rows, (row) => row.cells[1].textContent)")
    assert types[0] == "text"
    assert types[-1] == "done"
    browser.click("#end")
    browser.until("document.getElementById('end').disabled")
    assert browser.complaints() == []


def test_stop_on_the_page_cancels_the_task_and_keeps_what_came(browser: Browser, server: str) -> None:
    browser.open(f"{server}/")
    browser.until("document.querySelector('input[name=agent]')")
    browser.type("#prompt", "Count to 100000")
    browser.click("#run")
    browser.until(f"{ROWS} > 10")
    browser.click("#stop")
    browser.until(f"{STATUS}.startsWith('stopped')")
    assert browser.text("#status") == "stopped: the server has ended the task as cancelled"
    browser.until("document.getElementById('messages').innerText.includes('cancelled half-way')")
    assert api(f"{server}/agents/assistant/tasks?pageSize=1")["tasks"][0]["status"] == "cancelled"
    assert browser.complaints() == []


def test_the_page_runs_a_single_task_and_shows_every_type_of_chunk(browser: Browser, server: str) -> None:
    browser.open(f"{server}/")
    browser.until("document.querySelector('input[name=agent]')")
    browser.click("input[name=mode][value=task]")
    browser.type("#prompt", "Emit data, metadata and an error")
    browser.click("#run")
    browser.until(f"{STATUS} === 'completed'")
    types = browser.run("return Array.from(document.getElementById('chunks').rows, (row) => row.cells[1].textContent)")
    assert set(types) == {"text", "data", "metadata", "error", "done"}
    assert browser.text("#session").startswith("None yet")
    browser.type("#prompt", "fail please\n")
    assert browser.until(f"{STATUS}.startsWith('failed') && {STATUS}")
    assert browser.complaints() == []


def test_the_page_sends_the_token_it_is_given(browser: Browser, tmp_path: Path) -> None:
    secret = "correct-horse-battery"
    home = Home(tmp_path / "home")
    config = {
        "server": {"port": 0},
        "auth": {"tokens": [{"name": "alice", "token": secret}]},
        "agents": {"assistant": {}},
    }
    (home.folder / "tokens.yaml").write_text(json.dumps(config))
    with home.serving(["hector", "serve", "--config", "tokens.yaml"]) as url:
        browser.open(f"{url}/")
        browser.until("document.getElementById('access').open")  # the list of agents was refused
        browser.complaints()
        browser.type("#token", secret + "\t")
        browser.until("document.querySelector('input[name=agent]')")
        browser.type("#prompt", "My name is Zoe\n")
        browser.until(f"{STATUS} === 'completed'")
        browser.until("document.getElementById('messages').innerText.includes('Hello Zoe')")
        assert browser.complaints() == []


def test_the_page_works_under_the_prefix_of_a_proxy(browser: Browser, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    command = ["hector", "serve", "--port", "0", "--store", "memory", "--root-path", "/hector"]
    with home.serving(command) as url:
        assert url.endswith("/hector")
        for address in (url, f"{url}/"):
            browser.open(address)
            browser.until("document.querySelector('input[name=agent]')")
            browser.type("#prompt", "My name is Zoe\n")
            browser.until(f"{STATUS} === 'completed'")
            assert "Hello Zoe" in browser.text("#answer")
            assert browser.complaints() == []


# --- the example page -------------------------------------------------------------------------------------------------


def test_the_example_page_streams_watches_and_leaves(browser: Browser, server: str, site: Site) -> None:
    html = (Path(__file__).parents[2] / "examples" / "browser.html").read_text()
    browser.open(site.put("/browser.html", html) + f"?server={server}")
    session_id = browser.until("document.body.dataset.ready")
    browser.click("#stream")
    browser.until("document.getElementById('log').textContent.includes('(completed)')")
    browser.type("#prompt", "What is my name?")
    browser.click("#watch")
    browser.until("document.getElementById('log').textContent.split('(completed)').length === 3")
    assert "Your name is Alice." in browser.text("#log")
    browser.type("#prompt", "Count to 100000")
    browser.click("#stream")
    browser.until("document.getElementById('log').textContent.includes(' 12 ')")
    browser.click("#leave")
    browser.until("document.getElementById('log').textContent.includes('(left)')")
    task = api(f"{server}/sessions/{session_id}/tasks?pageSize=1")["tasks"][0]
    assert log_of(server, task["taskId"])[-1]["status"] == "cancelled"
    assert browser.complaints() == []


def test_a_stream_in_a_browser_survives_cuts_and_a_restart(browser: Browser, site: Site, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    config = {
        "server": {"port": 0, "shutdown_grace": 0.1},
        "llms": {"demo": {"type": "demo", "words_per_second": 200}},
        "agents": {"assistant": {"llm": "demo"}},
    }
    (home.folder / "fast.yaml").write_text(json.dumps(config))
    command = ["hector", "serve", "--config", "fast.yaml"]
    examples = Path(__file__).parents[2] / "examples"
    site.put("/hector.js", (examples / "hector.js").read_text())
    said = "document.getElementById('log').textContent"
    with contextlib.ExitStack() as stack:
        with home.serving(command) as url:
            wire = stack.enter_context(wire_to(url))
            browser.open(site.put("/streams.html", (examples / "streams.html").read_text()) + f"?server={wire.url}")
            session_id = browser.until("document.body.dataset.ready")
            browser.type("#prompt", "Count to 400")
            wire.cuts += [30, 2000, 100, 300, 5000, 0, 9000]
            browser.click("#run")
            browser.until(f"{said}.includes('(completed)')")
            assert not wire.cuts
            numbers = " ".join(str(n) for n in range(1, 401))
            assert browser.run(f"return {said}") == f"you: Count to 400\n{numbers}\n(completed)\n\n"

            browser.type("#prompt", "Count to 100000")
            browser.click("#run")
            browser.until(f"{said}.includes('100000') && {said}.endsWith('0 ')")
            browser.click("#cancel")
            browser.until(f"{said}.endsWith('(cancelled)\\n\\n')")
            browser.click("#run")
            browser.until(f"{said}.split('you').length === 4 && {said}.endsWith('0 ')")
            browser.click("#leave")
            browser.until(f"{said}.endsWith('(left)\\n\\n')")
            tasks = api(f"{url}/sessions/{session_id}/tasks")["tasks"]
            assert [task["status"] for task in tasks] == ["cancelled", "cancelled", "completed"]

            browser.click("#run")
            browser.until(f"{said}.split('you').length === 5 && {said}.endsWith('0 ')")
        with home.serving([*command, "--port", url.rpartition(":")[2]]):
            browser.until(f"{said}.endsWith('(failed)\\n\\n')")
            task = api(f"{url}/sessions/{session_id}/tasks?pageSize=1")["tasks"][0]
            numbers = text_of(log_of(url, task["taskId"]))
            assert len(numbers) > 10
            assert browser.run(f"return {said}").endswith(f"you: Count to 100000\n{numbers}\n(failed)\n\n")
            browser.open("about:blank")


# --- EventSource ------------------------------------------------------------------------------------------------------

LISTEN = """
window.chunks = [];
window.source = new EventSource(arguments[0]);
source.onmessage = (event) => chunks.push({...JSON.parse(event.data), id: event.lastEventId});
"""


def listen(browser: Browser, site: Site, url: str) -> None:
    browser.open(site.url())
    browser.run(LISTEN, url)


def check_whole(chunks: list[dict[str, Any]]) -> None:
    """Every number once, in order, and the final chunk at the end."""
    reached = 0
    for chunk in chunks:
        assert chunk.get("firstSeq", chunk["seq"]) == reached + 1
        assert chunk["id"] == str(chunk["seq"])
        reached = chunk["seq"]
    assert chunks[-1]["final"]


@pytest.mark.parametrize("state", ["ended", "running"])
def test_an_event_source_stops_at_the_end_of_a_task(browser: Browser, server: str, site: Site, state: str) -> None:
    task_id = submit(server, "What are AI agents?" if state == "ended" else "Count to 200")
    if state == "ended":
        assert log_of(server, task_id)[-1]["final"]
    path = f"/agents/assistant/tasks/{task_id}/events"
    with wire_to(server) as wire:
        listen(browser, site, wire.url + path)
        # The browser reconnects by itself after the final chunk, and the answer to that, 204, closes it for good.
        browser.until("source.readyState === EventSource.CLOSED")
        chunks = browser.run("return chunks")
        check_whole(chunks)
        assert wire.requests == [(path, None), (path, chunks[-1]["id"])]
        assert wire.statuses == [200, 204]
        # Longer than the time after which it would come back.
        browser.run("return new Promise((resolve) => setTimeout(resolve, 4000))")
        assert len(wire.requests) == 2
        browser.open("about:blank")


def test_an_event_source_that_is_cut_goes_on_where_it_broke(browser: Browser, server: str, site: Site) -> None:
    task_id = submit(server, "Count to 400")
    path = f"/agents/assistant/tasks/{task_id}/events"
    with wire_to(server) as wire:
        listen(browser, site, wire.url + path)
        browser.until("chunks.length > 20")
        wire.cut()
        browser.until("source.readyState === EventSource.CLOSED")
        chunks = browser.run("return chunks")
        check_whole(chunks)
        assert text_of(chunks) == " ".join(str(n) for n in range(1, 401))
        assert wire.requests[1][1] not in (None, chunks[-1]["id"])
        assert wire.requests[-1] == (path, chunks[-1]["id"])
        browser.open("about:blank")


# --- origins ----------------------------------------------------------------------------------------------------------

TRY = """
return (async () => {
  const [server] = arguments;
  const ask = async (path, options) => {
    try { return (await fetch(server + path, options)).status; } catch (error) { return error.name; }
  };
  const socket = await new Promise((resolve) => {
    const ws = new WebSocket(server.replace('http', 'ws') + '/agents/assistant/stream');
    ws.onopen = () => { resolve('open'); ws.close(); };
    ws.onclose = (event) => resolve(event.code);
  });
  const events = await new Promise((resolve) => {
    const source = new EventSource(server + '/agents/assistant/tasks/nothing/events');
    source.onerror = () => resolve(source.readyState === EventSource.CLOSED ? 'refused' : 'again');
  });
  const json = {'Content-Type': 'application/json', 'Idempotency-Key': crypto.randomUUID?.() ?? 'key'};
  return {
    get: await ask('/agents'),
    simple: await ask('/sessions', {method: 'POST', body: '{"agentId": "assistant"}'}),
    preflighted: await ask('/sessions', {method: 'POST', headers: json, body: '{"agentId": "assistant"}'}),
    socket, events,
  };
})()
"""


def test_a_page_of_a_foreign_origin_gets_nothing(browser: Browser, server: str, site: Site) -> None:
    before = api(f"{server}/sessions")["total"]
    browser.open(site.url(host="foreign.test"))
    outcome = browser.run(TRY, server)
    assert outcome == {
        "get": "TypeError",
        "simple": "TypeError",
        "preflighted": "TypeError",
        "socket": 1006,
        "events": "refused",
    }
    assert api(f"{server}/sessions")["total"] == before


def test_a_page_of_an_allowed_origin_may_call(browser: Browser, site: Site, tmp_path: Path) -> None:
    origin = site.url(path="", host="foreign.test")
    home = Home(tmp_path / "home")
    with home.serving(["hector", "serve", "--port", "0", "--store", "memory", "--allow-origin", origin]) as url:
        browser.open(site.url(host="foreign.test"))
        outcome = browser.run(TRY, url)
        assert outcome == {"get": 200, "simple": 201, "preflighted": 201, "socket": "open", "events": "refused"}


@pytest.mark.parametrize("origin", ["http://foreign.test", "https://localhost.foreign.test:8080", "null"])
def test_a_foreign_origin_is_refused_before_the_upgrade(server: str, origin: str) -> None:
    host = server.removeprefix("http://")
    name, port = host.split(":")
    request = (
        f"GET /agents/assistant/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection((name, int(port)), timeout=LIMIT) as connection:
        connection.sendall(request.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 403 ")
