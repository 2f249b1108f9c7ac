"""A task's log as server-sent events: replay, live, resume, the end, and what leaving does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import httpx2
import pytest
import trio
import trio.testing

from hector_trio.agents import Context
from hector_trio.errors import InvalidRequest, StoreUnavailable
from hector_trio.sse import Decoder, Event
from hector_trio.transports import sse
from hector_trio.transports.sse import events, starting_point
from tests.engines import Steered, agent, wait_ended
from tests.serving import Served, serving

ASK = {"Accept": "text/event-stream"}


class Reader:
    """A client's side of one stream, over a socket of its own: leaving it is closing the socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw = b""
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._decoder = Decoder()
        self._events: list[Event] = []

    async def ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        fields = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **headers}
        data = self._http.send(h11.Request(method=method, target=path, headers=list(fields.items()))) or b""
        data += self._http.send(h11.Data(body)) or b""
        await self._stream.send_all(data + (self._http.send(h11.EndOfMessage()) or b""))
        head = await self._next()
        assert isinstance(head, h11.Response)
        self.status = head.status_code
        self.headers = {name.decode().title(): value.decode() for name, value in head.headers}

    async def _next(self) -> Any:
        with trio.fail_after(5):
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some())
        return event

    async def piece(self) -> bytes | None:
        """What came together; ``None`` at the end."""
        event = await self._next()
        if not isinstance(event, h11.Data):
            return None
        self.raw += event.data
        return bytes(event.data)

    async def read(self) -> Event | None:
        """The next event; ``None`` at the end."""
        while not self._events:
            piece = await self.piece()
            if piece is None:
                return None
            self._events += self._decoder.feed(piece)
        return self._events.pop(0)

    async def rest(self) -> list[Event]:
        found = []
        while (event := await self.read()) is not None:
            found.append(event)
        return found


def chunks(found: list[Event]) -> list[Any]:
    return [json.loads(event.data) for event in found]


@asynccontextmanager
async def following(server: Served, path: str, **headers: str) -> AsyncIterator[Reader]:
    async with await trio.open_tcp_stream(*server.address) as stream:
        reader = Reader(stream)
        await reader.ask("GET", path, {**ASK, **headers})
        assert reader.status == 200
        yield reader


@asynccontextmanager
async def asking(server: Served, agent_id: str, text: str, **more: Any) -> AsyncIterator[Reader]:
    body = {"input": {"type": "text/plain", "content": text}, **more}
    async with await trio.open_tcp_stream(*server.address) as stream:
        reader = Reader(stream)
        await reader.ask("POST", f"/agents/{agent_id}/tasks", ASK, json.dumps(body).encode())
        assert reader.status == 200
        yield reader


async def start(client: httpx2.AsyncClient, text: str = "x") -> str:
    """A running task of agent ``a``; the path of its log."""
    body = {"input": {"type": "text/plain", "content": text}, "taskId": text}
    assert (await client.post("/agents/a/tasks", json=body, headers={"Prefer": "respond-async"})).status_code == 202
    return f"/agents/a/tasks/{text}/events"


async def test_a_streamed_post_gives_every_chunk_with_its_number_and_says_where_the_task_is() -> None:
    async with serving() as server, server.client() as client:
        async with asking(server, "assistant", "Hello", taskId="t") as reader:
            headers = reader.headers
            found = await reader.rest()
        assert headers["Content-Type"].startswith("text/event-stream")
        assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
        assert headers["Location"] == "/agents/assistant/tasks/t"
        assert [event.id for event in found] == [str(seq) for seq in range(1, len(found) + 1)]
        assert {event.event for event in found} == {"message"}
        stored = (await client.get("/agents/assistant/tasks/t/events?pageSize=100")).json()
        assert chunks(found) == stored["chunks"]
        assert chunks(found)[-1]["final"] is True


async def test_a_reader_gets_what_was_and_then_what_comes() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        async with following(server, path) as reader:
            first = await reader.read()
            assert first is not None
            assert json.loads(first.data)["content"] == "<x"
            steered.let("x")
            assert [chunk["content"] for chunk in chunks(await reader.rest())] == [">", ""]


async def test_what_is_ready_leaves_in_one_piece() -> None:
    async with serving() as server, server.client() as client:
        await client.post("/agents/assistant/tasks", json={"input": {"content": "Hello"}, "taskId": "t"})
        async with following(server, "/agents/assistant/tasks/t/events") as reader:
            piece = await reader.piece()
            assert piece is not None
            assert piece.count(b"\n\n") > 10
            assert await reader.piece() is None


async def test_a_silent_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.01)
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        async with following(server, path + "?after=1") as reader:
            while reader.raw.count(b":\n\n") < 3:
                await reader.piece()
            steered.let("x")
            assert chunks(await reader.rest())[-1]["final"] is True


def test_a_comment_comes_within_the_promised_three_seconds() -> None:
    assert sse.KEEP_ALIVE < 3


async def test_a_browser_that_comes_back_goes_on_where_it_was_and_stops_at_the_end() -> None:
    async with serving() as server, server.client() as client:
        await client.post("/agents/assistant/tasks", json={"input": {"content": "Hello"}, "taskId": "t"})
        path = "/agents/assistant/tasks/t/events"
        async with following(server, path) as reader:
            whole = await reader.rest()
        async with following(server, f"{path}?after=0", **{"Last-Event-ID": "3"}) as reader:
            assert await reader.rest() == whole[3:]
        last = len(whole)
        for seen in (last, last + 5):
            stopped = await client.get(path, headers={**ASK, "Last-Event-ID": str(seen)})
            assert (stopped.status_code, stopped.content) == (204, b"")
        for after in (last - 1, last, last + 5):
            async with following(server, f"{path}?after={after}") as reader:
                assert await reader.rest() == whole[-1:]


async def test_a_number_that_a_live_task_has_not_reached_or_that_is_none_is_refused() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        for query, headers, pointer in (
            ("?after=99", {}, "/after"),
            ("?after=x", {}, "/after"),
            ("?after=-1", {}, "/after"),
            ("", {"Last-Event-ID": "99"}, "/Last-Event-ID"),
            ("", {"Last-Event-ID": "x"}, "/Last-Event-ID"),
        ):
            refused = await client.get(path + query, headers={**ASK, **headers})
            assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, pointer)
        steered.let("x")


@pytest.mark.parametrize(
    ("ended", "after", "last_event_id", "begin"),
    [
        (False, 0, None, 0),
        (False, 5, None, 5),
        (False, 0, 5, 5),
        (True, 4, None, 4),
        (True, 5, None, 4),
        (True, 9, None, 4),
        (True, 0, 4, 4),
        (True, 0, 5, None),
        (True, 3, 9, None),
    ],
)
def test_where_a_reader_begins(ended: bool, after: int, last_event_id: int | None, begin: int | None) -> None:
    assert starting_point(ended=ended, last_seq=5, after=after, last_event_id=last_event_id) == begin


@pytest.mark.parametrize(("after", "last_event_id"), [(6, None), (0, 6)])
def test_a_reader_cannot_begin_beyond_a_live_log(after: int, last_event_id: int | None) -> None:
    with pytest.raises(InvalidRequest):
        starting_point(ended=False, last_seq=5, after=after, last_event_id=last_event_id)


def test_events_have_the_numbers_of_their_chunks() -> None:
    assert events([b'{"taskId":"x","seq":7,"a":1}', b'{"taskId":"x","seq":8,"a":2}']) == (
        b'id: 7\ndata: {"taskId":"x","seq":7,"a":1}\n\nid: 8\ndata: {"taskId":"x","seq":8,"a":2}\n\n'
    )


@pytest.mark.parametrize(("policy", "end"), [(None, "cancelled"), ("cancel", "cancelled"), ("continue", "completed")])
async def test_leaving_a_streamed_post_cancels_its_task_unless_it_is_to_continue(policy: str | None, end: str) -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server:
        more = {"onDisconnect": policy} if policy else {}
        async with asking(server, "a", "x", taskId="t", **more) as reader:
            assert await reader.read() is not None
        if policy == "continue":
            steered.let("x")
        await steered.wait_ended("x")
        row = await server.engine.store.get_task("local", "a", "t")
        assert row is not None
        with trio.fail_after(5):
            assert (await server.engine.wait(row)).status == end


async def test_leaving_a_followed_task_changes_nothing() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        async with following(server, path) as reader:
            await reader.read()
        async with following(server, path) as reader:
            await reader.read()
            steered.let("x")
            assert chunks(await reader.rest())[-1]["status"] == "completed"


async def test_a_reader_is_forgotten_when_it_leaves() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        row = await server.engine.store.get_task("local", "a", "x")
        assert row is not None
        log = server.engine._runs[row.key].log
        for _ in range(3):
            async with following(server, path) as reader:
                await reader.read()
        with trio.fail_after(5):
            await log.unread()
        assert b'open_streams{transport="sse"} 0.0' in (await client.get("/metrics")).content
        steered.let("x")


async def test_a_store_that_refuses_ends_streams_with_one_uncommitted_error_and_waiting_with_503() -> None:
    started, fail = trio.Event(), trio.Event()

    async def slow(ctx: Context) -> None:
        await ctx.emit_text("seen")
        started.set()
        await fail.wait()
        await ctx.emit_text("lost")
        await trio.sleep_forever()

    async with serving(agents=agent(slow)) as server, server.client() as client:
        store: Any = server.engine.store
        append = store.append
        answers: list[httpx2.Response] = []

        async def wait() -> None:
            answers.append(await client.post("/agents/a/tasks", json={"input": {"content": "x"}, "taskId": "x"}))

        async def refuse(appends: Any) -> Any:
            raise StoreUnavailable("The disk is full")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await started.wait()
            async with following(server, "/agents/a/tasks/x/events") as reader:
                assert await reader.read() is not None
                store.append = refuse
                fail.set()
                (last,) = await reader.rest()
        chunk = json.loads(last.data)
        assert last.id == "1"  # a browser comes back after what it has really seen
        assert {name: chunk[name] for name in ("seq", "chunkType", "code", "final", "status")} == {
            "seq": 0,
            "chunkType": "error",
            "code": "store_unavailable",
            "final": True,
            "status": "failed",
        }
        assert (answers[0].status_code, answers[0].json()["taskId"]) == (503, "x")
        store.append = append
        row = await store.get_task("local", "a", "x")
        error = (await wait_ended(server.engine, row)).error
        assert error is not None
        assert error.code == "store_unavailable"


async def test_head_of_a_log_ends_at_once() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        path = await start(client)
        with trio.fail_after(5):
            head = await client.head(path, headers=ASK)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Type"] == "text/event-stream"
        steered.let("x")


async def test_a_task_parked_by_a_drain_is_answered_with_202() -> None:
    steered = Steered()
    async with serving(agents=agent(steered)) as server, server.client() as client:
        await client.post("/sessions", json={"agentId": "a", "sessionId": "s"})
        busy = {"input": {"content": "x"}}
        await client.post("/sessions/s/tasks", json=busy, headers={"Prefer": "respond-async"})
        await steered.wait_started("x")
        answers: list[httpx2.Response] = []

        async def wait() -> None:
            answers.append(await client.post("/sessions/s/tasks", json={"input": {"content": "y"}}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            with trio.fail_after(5):
                while server.engine.queued < 1:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(server.engine.drain, 0)
        assert (answers[0].status_code, answers[0].json()["status"]) == (202, "pending")
        assert "Location" in answers[0].headers
