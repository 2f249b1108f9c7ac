"""REST beside Quart: the same answers to the byte, only where nobody looks, and nothing for somebody who left."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio
import trio.testing
from quart import has_request_context, signals

from tests.engines import Steered, agent
from tests.serving import Served, serving, settings_of

CREATE = b'{"agentId":"assistant","sessionId":"s","state":{"a":[1]}}'


def request_of(line: str, body: bytes = b"", *headers: str) -> bytes:
    head = [f"{line} HTTP/1.1", "Host: localhost", "X-Request-Id: r1", *headers]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


ASKED = [
    request_of("POST /sessions", CREATE),
    request_of("POST /sessions", CREATE),
    request_of("POST /sessions", b"{"),
    request_of("POST /sessions", b'{"agentId":"nobody"}'),
    request_of("POST /sessions"),
    request_of("GET /sessions/s"),
    request_of("GET /sessions/s", b"", "If-None-Match: *"),
    request_of("GET /sessions/s", b"", "Origin: http://localhost:3000"),
    request_of("HEAD /sessions/s"),
    request_of("GET /sessions/none"),
    request_of("GET /sessions/a%20b"),
    request_of("GET /sessions/.."),
    request_of("GET /sessions?pageSize=0"),
    request_of("GET /sessions?pageSize=1&pageSize=2&metadata.a=%FF"),
    request_of("PATCH /sessions/s", b'{"metadata":{"x":1}}', 'If-Match: "other"'),
    request_of("PATCH /sessions/s", b'{"metadata":{"x":1}}'),
    request_of("POST /sessions/s/tasks", b'{"input":{"content":"Hello"},"taskId":"t"}', "Prefer: wait=5"),
    request_of("POST /sessions/s/tasks", b'{"input":{"content":"Hello"}}', "Idempotency-Key: "),
    request_of("GET /agents/assistant/tasks/t"),
    request_of("GET /agents/assistant/tasks/t/events"),
    request_of("DELETE /agents/assistant/tasks/t"),
    request_of("DELETE /sessions/s"),
    request_of("OPTIONS /sessions"),
    request_of("PUT /sessions"),
    request_of("GET /agents"),
    request_of("GET /agents/"),
    request_of("GET /agents/assistant"),
    request_of("GET /health/live"),
    request_of("GET /health/ready"),
    request_of("GET /openapi.json"),
    request_of("GET /"),
    request_of("GET /uploads/none"),
    request_of("GET /nothing"),
    request_of("GET /agents/assistant/stream"),
]


async def answer(stream: trio.SocketStream, request: bytes) -> bytes:
    """The answer to *request*, which says how long it is."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some()
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    missing = int(found[1]) - len(body) if found and not request.startswith(b"HEAD") else 0
    while missing > 0:
        more = await stream.receive_some()
        assert more, data
        data, missing = data + more, missing - len(more)
    return data


def timeless(data: bytes) -> bytes:
    data = re.sub(rb"\r\ndate: [^\r]*", b"", data)
    data = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", b"TIME", data)
    return re.sub(rb"127\.0\.0\.1:\d+", b"HOST", data)


async def answers(split: bool, root: str) -> list[bytes]:
    found = []
    async with serving(settings_of(server={"root_path": root})) as server:
        port = int(server.host.removesuffix(root).rpartition(":")[2])
        for asked in ASKED:
            request = asked.replace(b" /", b" %b/" % root.encode(), 1)
            with trio.fail_after(10):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    head, blank, body = request.partition(b"\r\n\r\n")
                    if split and body:
                        await stream.send_all(head + blank + body[:1])
                        await trio.testing.wait_all_tasks_blocked()
                        await stream.send_all(body[1:])
                    else:
                        await stream.send_all(request)
                    found.append(timeless(await answer(stream, request)))
    return found


@pytest.mark.parametrize("root", ["", "/below"])
@pytest.mark.parametrize("split", [False, True])
async def test_both_ways_give_the_same_bytes(split: bool, root: str) -> None:
    direct = await answers(split, root)

    with signals.request_started.connected_to(nothing):
        through_quart = await answers(split, root)
    for request, ours, theirs in zip(ASKED, direct, through_quart, strict=True):
        assert ours == theirs, request


async def seen_by_the_store(server: Served, ask: bytes) -> bool:
    """Whether a request is answered within a request of Quart's."""
    store: Any = server.engine.store
    original = store.list_sessions
    seen = []

    async def list_sessions(*arguments: Any, **options: Any) -> Any:
        seen.append(has_request_context())
        return await original(*arguments, **options)

    store.list_sessions = list_sessions
    async with await trio.open_tcp_stream(*server.address) as stream:
        await stream.send_all(ask)
        assert (await answer(stream, ask)).startswith(b"HTTP/1.1 200")
    store.list_sessions = original
    return seen == [True]


async def test_quart_is_asked_only_when_somebody_listens_there() -> None:
    async with serving() as server:
        ask = request_of("GET /sessions")
        assert not await seen_by_the_store(server, ask)
        with signals.request_finished.connected_to(nothing):
            assert await seen_by_the_store(server, ask)
        assert not await seen_by_the_store(server, ask)
        assert await seen_by_the_store(server, request_of("GET /sessions", b"", "Accept: text/event-stream"))
        assert await seen_by_the_store(server, request_of("HEAD /sessions"))


async def do_nothing(*_: Any, **__: Any) -> None:
    pass


nothing: Any = do_nothing


@pytest.mark.usefixtures("either_rest")
async def test_who_leaves_ends_what_was_done_for_him() -> None:
    async with serving() as server:
        store: Any = server.engine.store
        waiting, ended = trio.Event(), trio.Event()

        async def list_sessions(*_: Any, **__: Any) -> None:
            try:
                waiting.set()
                await trio.sleep_forever()
            finally:
                ended.set()

        store.list_sessions = list_sessions
        with trio.fail_after(5):
            async with await trio.open_tcp_stream(*server.address) as stream:
                await stream.send_all(request_of("GET /sessions"))
                await waiting.wait()
            await ended.wait()


@pytest.mark.usefixtures("either_rest")
async def test_a_run_of_somebody_who_leaves_goes_by_its_policy() -> None:
    for policy, status in (("cancel", "cancelled"), ("continue", "completed")):
        steered = Steered()
        async with serving(agents=agent(steered)) as server:
            body = b'{"input":{"content":"x"},"taskId":"t","onDisconnect":"%b"}' % policy.encode()
            with trio.fail_after(5):
                async with await trio.open_tcp_stream(*server.address) as stream:
                    await stream.send_all(request_of("POST /agents/a/tasks", body))
                    await steered.wait_started("x")
                row = await server.engine.store.get_task("local", "a", "t")
                assert row is not None
                if policy == "continue":
                    steered.let("x")
                assert (await server.engine.wait(row)).status == status


@pytest.mark.usefixtures("either_rest")
async def test_requests_in_one_packet_are_answered_in_order() -> None:
    async with serving() as server, await trio.open_tcp_stream(*server.address) as stream:
        with trio.fail_after(5):
            await stream.send_all(
                request_of("GET /sessions/none") + request_of("GET /agents") + request_of("GET /sessions")
            )
            data = b""
            while data.count(b"HTTP/1.1 ") < 3 or not data.endswith(b"}"):
                data += await stream.receive_some()
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"404", b"200", b"200"]
