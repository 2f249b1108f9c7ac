"""The Python client against the real server: what it returns, what it raises, and what leaving does to the run."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from msgspec import UNSET
from trio_websocket import WebSocketRequest, serve_websocket
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Request

from hector_trio import errors
from hector_trio.agents import Agent, Context
from hector_trio.client import ChunkStream, Client, ConnectionFailed, RemoteError, UnexpectedAnswer
from hector_trio.config import Settings
from hector_trio.models import Chunk, Content
from tests import HANG
from tests.engines import Steered, agent
from tests.serving import Served, serving, settings_of


@asynccontextmanager
async def started(
    agents: dict[str, Agent] | None = None, settings: Settings | None = None
) -> AsyncIterator[tuple[Served, Client]]:
    """A server and a client of it; everything has to happen within a limit."""
    with trio.fail_after(HANG):
        async with serving(settings, agents) as server, Client(server.url) as client:
            yield server, client


@asynccontextmanager
async def peer(answer: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """Something that listens and is no hector server: the URL of it."""
    with trio.fail_after(HANG):
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
            listeners: list[trio.SocketListener] = await nursery.start(serve)
            yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            nursery.cancel_scope.cancel()


async def read(chunks: AsyncIterator[Chunk] | ChunkStream) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.content for chunk in chunks if chunk.chunk_type == "text")


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# --- agents and sessions ----------------------------------------------------------------------------------------------


async def test_the_agents_of_a_server_are_listed_with_their_cards() -> None:
    async with started(agent(Steered(), "other")) as (server, client):
        cards = await client.agents()
        assert sorted(card.agent_id for card in cards) == ["assistant", "other"]
        card = await client.agent("assistant")
        assert card in cards
        assert card.endpoints.stream == server.url.replace("http", "ws", 1) + "/agents/assistant/stream"


async def test_a_session_is_made_read_changed_and_removed() -> None:
    async with started() as (_, client):
        made = await client.create_session("assistant", metadata={"user": "john"}, ttl_seconds=60)
        assert made.expires_at is not UNSET
        assert (await client.session(made.session_id)).metadata == {"user": "john"}
        changed = await client.update_session(made.session_id, state={"n": 1}, metadata={"user": None})
        assert (changed.state, changed.metadata) == ({"n": 1}, {})
        await client.delete_session(made.session_id)
        with pytest.raises(errors.SessionNotFound, match=made.session_id):
            await client.session(made.session_id)


async def test_a_change_that_names_an_older_entity_tag_is_refused() -> None:
    async with started() as (_, client):
        made = await client.create_session("assistant")
        _, etag = await client.session_and_etag(made.session_id)
        assert (await client.update_session(made.session_id, state={"n": 1}, if_match=etag)).state == {"n": 1}
        with pytest.raises(errors.PreconditionFailed):
            await client.update_session(made.session_id, state={"n": 2}, if_match=etag)


async def test_lists_are_read_page_after_page_and_can_be_filtered() -> None:
    async with started(agent(Steered(), "other")) as (_, client):
        made = [await client.create_session("assistant", metadata={"n": str(n % 2)}) for n in range(205)]
        await client.create_session("other")
        assert len(await client.sessions()) == 206
        found = await client.sessions("assistant")
        assert {each.session_id for each in found} == {each.session_id for each in made}
        assert len(await client.sessions("assistant", metadata={"n": "1"})) == 102


async def test_a_conversation_is_remembered_and_can_be_read() -> None:
    async with started() as (_, client):
        session = await client.create_session("assistant")
        await client.run("assistant", "My name is Alice", session_id=session.session_id)
        async with client.stream("assistant", "What is my name?", session_id=session.session_id) as chunks:
            assert "Alice" in text_of(await read(chunks))
        messages = await client.messages(session.session_id)
        assert [message.role for message in messages] == ["user", "agent", "user", "agent"]
        assert len(await client.session_tasks(session.session_id)) == 2


# --- tasks ------------------------------------------------------------------------------------------------------------


async def test_a_run_waits_for_the_end_and_returns_the_task() -> None:
    async with started() as (_, client):
        task = await client.run("assistant", "count to 3", task_id="t", metadata={"a": 1}, user_id="u")
        assert (task.status, task.output) == ("completed", Content("text/plain", "1 2 3"))
        assert await client.task("assistant", "t") == task
        assert [each.task_id for each in await client.tasks("assistant", status="completed")] == ["t"]
        await client.delete_task("assistant", "t")
        with pytest.raises(errors.TaskNotFound):
            await client.task("assistant", "t")


async def test_a_submitted_task_is_returned_at_once_and_can_be_followed_and_cancelled() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        task = await client.submit("a", "x")
        assert task.status in ("pending", "running")
        async with client.events("a", task.task_id) as events:
            assert (await anext(events)).content == "<x"
            cancelled = await client.cancel("a", task.task_id)
            assert cancelled.status == "cancelled"
            last = (await read(events))[-1]
            assert (last.final, last.status) == (True, "cancelled")
            assert events.final == last
        assert await client.cancel("a", task.task_id) == cancelled


async def test_the_log_is_read_from_where_the_caller_says() -> None:
    async with started() as (_, client):
        task = await client.run("assistant", "count to 5")
        async with client.events("assistant", task.task_id) as events:
            whole = await read(events)
        assert text_of(whole) == "1 2 3 4 5"
        async with client.events("assistant", task.task_id, after=whole[1].seq) as events:
            assert [chunk.seq for chunk in await read(events)] == [chunk.seq for chunk in whole[2:]]


async def test_leaving_events_early_leaves_the_task_alone() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        task = await client.submit("a", "x")
        async with client.events("a", task.task_id) as events:
            await anext(events)
        steered.let("x")
        async with client.events("a", task.task_id) as events:
            assert text_of(await read(events)) == "<x>"


async def test_a_failed_task_is_returned_not_raised() -> None:
    async with started() as (_, client):
        task = await client.run("assistant", "fail please")
        assert task.status == "failed"
        assert task.error is not UNSET
        assert task.error.code == "demo_failure"


async def test_a_task_is_ended_after_its_timeout() -> None:
    async with started() as (_, client):
        task = await client.run("assistant", "wait 60 seconds", timeout_seconds=0.05)
        assert task.status == "failed"


async def test_content_is_text_or_any_json_or_named_with_its_type() -> None:
    async def show(ctx: Context) -> None:
        await ctx.emit_data([ctx.input.type, ctx.input.content, ctx.parameters])

    async with started(agent(show)) as (_, client):
        for content, expected in (
            ("x", ["text/plain", "x", {}]),
            ({"k": [1]}, ["application/json", {"k": [1]}, {}]),
            (Content("text/markdown", "*x*"), ["text/markdown", "*x*", {}]),
        ):
            async with client.stream("a", content) as chunks:
                assert (await anext(chunks)).content == expected
        async with client.stream("a", "x", parameters={"p": 1}) as chunks:
            assert (await anext(chunks)).content == ["text/plain", "x", {"p": 1}]


async def test_a_call_with_an_idempotency_key_can_be_repeated() -> None:
    async with started() as (_, client):
        first = await client.run("assistant", "count to 2", idempotency_key="k")
        assert await client.run("assistant", "count to 2", idempotency_key="k") == first
        with pytest.raises(errors.IdempotencyMismatch):
            await client.run("assistant", "count to 3", idempotency_key="k")


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_gives_every_chunk_once_up_to_the_final_one() -> None:
    async with started() as (_, client), client.stream("assistant", "count to 1000") as chunks:
        received = await read(chunks)
        assert text_of(received) == " ".join(str(n) for n in range(1, 1001))
        assert [chunk.final for chunk in received].count(True) == 1
        assert chunks.final == received[-1]
        assert chunks.last_seq == received[-1].seq
        assert received[-1].status == "completed"
        assert await read(chunks) == []
        task = await client.task("assistant", chunks.task_id)
        assert task.status == "completed"


async def test_chunks_arrive_while_the_agent_is_at_work() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client), client.stream("a", "x") as chunks:
        assert (await anext(chunks)).content == "<x"
        assert not steered.ended
        steered.let("x")
        assert text_of(await read(chunks)) == ">"


async def test_leaving_a_stream_early_cancels_the_run() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        async with client.stream("a", "x") as chunks:
            await anext(chunks)
        await steered.wait_ended("x")
        async with client.events("a", chunks.task_id) as events:
            assert (await read(events))[-1].status == "cancelled"


async def test_cancelling_the_reader_cancels_the_run() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        with trio.CancelScope() as scope:
            async with client.stream("a", "x") as chunks:
                async for _chunk in chunks:
                    scope.cancel()
        assert scope.cancelled_caught
        await steered.wait_ended("x")


async def test_leaving_a_stream_that_continues_lets_the_run_end() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        async with client.stream("a", "x", on_disconnect="continue") as chunks:
            await anext(chunks)
        steered.let("x")
        async with client.events("a", chunks.task_id) as events:
            received = await read(events)
        assert text_of(received) == "<x>"
        assert received[-1].status == "completed"


async def test_a_stream_can_be_cancelled_and_still_tells_its_end() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client), client.stream("a", "x") as chunks:
        await anext(chunks)
        await chunks.cancel("enough")
        received = await read(chunks)
        assert (received[-1].status, received[-1].reason) == ("cancelled", "enough")
        await chunks.cancel()


async def test_what_is_raised_inside_a_stream_leaves_as_it_is() -> None:
    async with started(agent(Steered())) as (_, client):
        with pytest.raises(KeyError, match="mine"):
            async with client.stream("a", "x") as chunks:
                await anext(chunks)
                raise KeyError("mine")
        with pytest.raises(ExceptionGroup, match="ours"):
            async with client.stream("a", "y"):
                raise ExceptionGroup("ours", [KeyError("mine")])


async def test_many_streams_run_side_by_side() -> None:
    counts: list[str] = []

    async def one(client: Client, n: int) -> None:
        async with client.stream("assistant", f"count to {n}") as chunks:
            counts.append(text_of(await read(chunks)))

    async with started() as (_, client):
        async with trio.open_nursery() as nursery:
            for n in range(1, 41):
                nursery.start_soon(one, client, n)
        assert sorted(len(count.split()) for count in counts) == list(range(1, 41))


async def test_leaving_the_stream_of_a_server_that_hangs_takes_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hector_trio.client.CLOSE_LIMIT", 0.05)

    async def upgrade_and_hang(stream: trio.SocketStream) -> None:
        websocket = WSConnection(ConnectionType.SERVER)
        websocket.receive_data(bytes(await stream.receive_some()))
        assert isinstance(next(websocket.events()), Request)
        await stream.send_all(websocket.send(AcceptConnection()))
        await trio.sleep_forever()

    async with peer(upgrade_and_hang) as url, Client(url) as client:
        with trio.fail_after(5):
            async with client.stream("a", "x"):
                pass


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_an_unknown_agent_is_refused_by_its_class_on_every_door() -> None:
    async with started() as (_, client):
        for ask in (client.agent("nobody"), client.run("nobody", "x"), client.create_session("nobody")):
            with pytest.raises(errors.AgentNotFound, match="nobody"):
                await ask
        with pytest.raises(errors.AgentNotFound, match="nobody"):
            async with client.stream("nobody", "x"):
                pass


async def test_a_refused_task_is_raised_by_the_stream_and_the_next_one_works() -> None:
    async with started() as (_, client):
        async with client.stream("assistant", "x", session_id="none") as chunks:
            with pytest.raises(errors.SessionNotFound, match="none"):
                await anext(chunks)
            assert await read(chunks) == []
        async with client.stream("assistant", "x", task_id="bad id!") as chunks:
            with pytest.raises(errors.InvalidRequest):
                await anext(chunks)
        async with client.stream("assistant", "count to 2") as chunks:
            assert text_of(await read(chunks)) == "1 2"


async def test_a_refusal_tells_which_task_is_in_the_way() -> None:
    steered = Steered()
    async with started(agent(steered)) as (_, client):
        session = await client.create_session("a")
        task = await client.submit("a", "x", session_id=session.session_id)
        with pytest.raises(errors.SessionBusy) as busy:
            await client.run("a", "y", session_id=session.session_id, multitask="reject")
        assert busy.value.task_id == task.task_id


async def test_what_is_wrong_in_a_request_is_told_member_by_member() -> None:
    async with started() as (_, client):
        with pytest.raises(errors.InvalidRequest) as refused:
            await client.create_session("assistant", ttl_seconds=0)
        assert [each.pointer for each in refused.value.errors] == ["/ttlSeconds"]
        assert any("request " in note for note in refused.value.__notes__)


async def test_without_the_token_nothing_is_answered_and_with_it_everything() -> None:
    token = "0123456789abcdef-token"
    settings = settings_of(auth={"tokens": [{"name": "alice", "token": token}]})
    async with started(settings=settings) as (server, stranger):
        with pytest.raises(errors.Unauthorized):
            await stranger.agents()
        with pytest.raises(errors.Unauthorized):
            async with stranger.stream("assistant", "x"):
                pass
        async with Client(server.url, token=token) as client:
            assert len(await client.agents()) == 1
            async with client.stream("assistant", "count to 2") as chunks:
                assert text_of(await read(chunks)) == "1 2"


async def test_a_code_that_this_client_does_not_know_is_raised_with_the_code() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        body = b'{"code":"out_of_coffee","detail":"There is none","retryable":true}'
        head = b"HTTP/1.1 418 Teapot\r\nContent-Type: application/problem+json\r\nRetry-After: 7\r\n"
        await stream.send_all(head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)

    async with peer(answer) as url, Client(url) as client:
        for door in ("rest", "stream"):
            with pytest.raises(RemoteError, match="There is none") as refused:
                if door == "rest":
                    await client.agents()
                else:
                    async with client.stream("a", "x"):
                        pass
            assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("out_of_coffee", 418, 7)
            assert refused.value.retryable


@pytest.mark.parametrize(
    "url", ["", "localhost:8080", "ftp://x", "http://", "http://u:p@x", "http://x?y", "http://x:y"]
)
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Client(url)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nb", "ä"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Client(token=token)


@pytest.mark.parametrize("agent_id", ["..", ".", ""])
async def test_no_id_leads_elsewhere(agent_id: str) -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(errors.InvalidRequest):
            await client.agent(agent_id)


async def test_an_id_with_odd_characters_is_unknown_and_nothing_else() -> None:
    async with started() as (_, client):
        for agent_id in ("a/b", "a b", "ä", "%2e%2e", "a?b#c"):
            with pytest.raises(errors.NotFound):
                await client.agent(agent_id)
            with pytest.raises(errors.NotFound):
                async with client.stream(agent_id, "x"):
                    pass


# --- connections ------------------------------------------------------------------------------------------------------


async def test_nobody_there_is_told_with_the_address() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with trio.fail_after(HANG):
        async with Client(url) as client:
            with pytest.raises(ConnectionFailed, match=r"Cannot reach http://127\.0\.0\.1:.*refused") as failed:
                await client.agents()
            assert failed.value.url.startswith(url)
            with pytest.raises(ConnectionFailed, match=r"Cannot reach ws://127\.0\.0\.1:.*refused"):
                async with client.stream("a", "x"):
                    pass


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"])
async def test_something_that_is_no_hector_server_is_told_at_once(answer: bytes) -> None:
    async def say(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.aclose()

    async with peer(say) as url, Client(url) as client:
        with trio.fail_after(2):
            with pytest.raises((ConnectionFailed, UnexpectedAnswer)):
                await client.agents()
            with pytest.raises((ConnectionFailed, RemoteError)):
                async with client.stream("a", "x"):
                    pass


async def test_a_server_that_drains_lets_a_stream_end_and_refuses_the_next() -> None:
    steered = Steered()
    async with started(agent(steered), settings_of(server={"shutdown_grace": 5})) as (server, client):
        async with client.stream("a", "x", on_disconnect="continue") as chunks:
            await anext(chunks)
            server.stop.set()
            steered.let("x")
            received = await read(chunks)
            assert received[-1].status == "completed"
        with pytest.raises(errors.OutsideError):
            async with client.stream("a", "y") as chunks:
                await anext(chunks)


async def test_a_stream_that_is_cut_says_so_and_where() -> None:
    async def cut(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.aclose()

    async with peer(cut) as url, Client(url) as client:
        with pytest.raises(ConnectionFailed, match=r"ws://127\.0\.0\.1.*handshake"):
            async with client.stream("a", "x"):
                pass
        with pytest.raises(ConnectionFailed):
            async with client.events("a", "t") as events:
                await anext(events)


async def test_a_close_frame_before_the_end_is_told_with_its_code_and_reason() -> None:
    async def close(request: WebSocketRequest) -> None:
        websocket = await request.accept()
        await websocket.get_message()
        await websocket.aclose(4529, "enough for today")

    with trio.fail_after(HANG):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_websocket, close, "127.0.0.1", 0, None)
            async with Client(f"http://127.0.0.1:{server.port}") as client, client.stream("a", "x") as chunks:
                with pytest.raises(ConnectionFailed, match="4529") as lost:
                    await anext(chunks)
            assert (lost.value.close_code, lost.value.close_reason) == (4529, "enough for today")
            nursery.cancel_scope.cancel()


async def test_https_and_wss_work_with_a_private_ca_and_are_refused_without_it(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = {"cert": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with trio.fail_after(HANG):
        async with serving(settings_of(server={"tls": tls})) as server:
            assert server.url.startswith("https://")
            async with Client(server.url, ssl_context=context) as client:
                assert len(await client.agents()) == 1
                async with client.stream("assistant", "count to 2") as chunks:
                    assert text_of(await read(chunks)) == "1 2"
            async with Client(server.url) as client:
                with pytest.raises(ConnectionFailed, match="certificate"):
                    await client.agents()
                with pytest.raises(ConnectionFailed, match="certificate"):
                    async with client.stream("assistant", "x"):
                        pass
            async with Client(server.url.replace("https", "http")) as client:
                with pytest.raises(ConnectionFailed), trio.fail_after(5):
                    async with client.stream("assistant", "x"):
                        pass


async def test_a_server_below_a_path_is_found_there() -> None:
    async with started(settings=settings_of(server={"root_path": "/hector"})) as (server, _):
        base = server.url.removesuffix("/hector") + "/hector/"
        async with Client(base) as client:
            assert client.url == base.rstrip("/")
            assert (await client.run("assistant", "count to 2")).status == "completed"
            async with client.stream("assistant", "count to 2") as chunks:
                assert text_of(await read(chunks)) == "1 2"


async def test_streams_that_are_left_leave_no_task_behind() -> None:
    steered = Steered()
    async with started(agent(steered)) as (server, client):
        await client.agents()
        before = trio.lowlevel.current_statistics().tasks_living
        for n in range(50):
            async with client.stream("a", str(n)) as chunks:
                await anext(chunks)
            await steered.wait_ended(str(n))
        while server.engine.running or trio.lowlevel.current_statistics().tasks_living > before:
            await trio.lowlevel.checkpoint()
        assert steered.running == 0


def test_importing_the_client_does_not_import_the_server() -> None:
    code = (
        "import sys, hector_trio, hector_trio.client;"
        "print({'quart', 'hypercorn', 'sqlalchemy', 'alembic', 'click', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "set()"
