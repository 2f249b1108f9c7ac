"""The gRPC binding: a stock client is served, refused, told in time and let go."""

from __future__ import annotations

import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
import pytest
import trio
import trustme
from a2a.types import a2a_pb2 as pb
from a2a.types import a2a_pb2_grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from h2.errors import ErrorCodes
from h2.events import ResponseReceived, StreamReset, TrailersReceived
from msgspec.structs import replace

from hector_trio import Part
from hector_trio.a2a.cards import RESUME
from hector_trio.a2a.protobuf import encode
from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import Settings, Tls
from hector_trio.transports.a2a import OPERATIONS
from hector_trio.transports.a2a_grpc import RESPONSES, SERVICE, STATUS, seconds_of, trailers
from tests.a2a.speaking import Speaker, agent_of, speaking
from tests.hostile import Peer, pause
from tests.issuer import ISSUER, Signer, issuing
from tests.serving import Served, serving, settings_of
from tests.test_http2 import Client

T = TypeVar("T")
VERSION = (("a2a-version", "1.0"),)
ON = settings_of(server={"http2": True})
TOKEN = "secret-token-of-a-test"
AUTHORITY = trustme.CA()


@pytest.fixture(params=["plain", "tls"])
def on(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """The settings of a server of gRPC, without TLS and with it."""
    if request.param == "plain":
        return ON
    made = AUTHORITY.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = Tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    return settings_of(server={"http2": True, "tls": tls})


def trusted(*alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.set_alpn_protocols(alpn)
    return context


class Caller:
    """A stock client: its calls block, so each is made in a thread."""

    def __init__(self, served: Served, metadata: Any = VERSION, **options: Any) -> None:
        if served.url.startswith("https:"):
            trusted = grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())
            self.channel = grpc.secure_channel(served.host, trusted, **options)
        else:
            self.channel = grpc.insecure_channel(served.host, **options)
        self.stub: Any = a2a_pb2_grpc.A2AServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.metadata = metadata

    async def __call__(self, method: str, request: Any, *, within: float = 10) -> Any:
        """``within``: the deadline that the server is told, in seconds."""
        call = getattr(self.stub, method)
        return await blocking(lambda: call(request, timeout=within, metadata=self.metadata))

    async def all(self, method: str, request: Any) -> list[Any]:
        call = getattr(self.stub, method)
        return await blocking(lambda: list(call(request, timeout=10, metadata=self.metadata)))

    async def refused(self, method: str, request: Any, **options: Any) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            await self(method, request, **options)
        return caught.value


async def blocking(work: Callable[[], T]) -> T:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


@asynccontextmanager
async def calling(function: Any = None, *, settings: Any = ON, **options: Any) -> AsyncIterator[tuple[Served, Caller]]:
    async with speaking(function or agent, settings=settings, **options) as (served, _):
        caller = Caller(served)
        try:
            yield served, caller
        finally:
            await blocking(caller.channel.close)


async def agent(ctx: Context) -> None:
    match ctx.text:
        case "ask" if ctx.resume is None:
            await ctx.ask("Which?")
        case "file":
            await ctx.artifact(Part(raw=b"\0abc", filename="f", media_type="text/plain"), name="made")
            await ctx.artifact(Part(data={"a": [1, 2.5, None, True, "x"]}), name="free")
        case "slow":
            await ctx.emit_text("begun ")
            await trio.sleep_forever()
        case _:
            for word in (ctx.text, " and", " more"):
                await ctx.emit_text(word)


def message(text: str, tenant: str = "a", **more: Any) -> pb.SendMessageRequest:
    said = pb.Message(message_id=f"m-{text}", role=pb.ROLE_USER, parts=[pb.Part(text=text)], **more)
    return pb.SendMessageRequest(message=said, tenant=tenant)


def text_of(artifacts: Any) -> str:
    return "".join(part.text for each in artifacts for part in each.parts)


def status_of(error: Any) -> Any:
    found = dict(error.trailing_metadata())
    return status_pb2.Status.FromString(found["grpc-status-details-bin"])


def info_of(error: Any) -> Any:
    info = error_details_pb2.ErrorInfo()
    assert status_of(error).details[0].Unpack(info)
    return info


# ---- what it carries


async def test_a_message_is_sent_and_its_task_is_got_and_listed(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        task = (await caller("SendMessage", message("hi"))).task
        assert task.status.state == pb.TASK_STATE_COMPLETED
        assert text_of(task.artifacts) == "hi and more"
        assert task.status.HasField("timestamp")
        again = await caller("GetTask", pb.GetTaskRequest(id=task.id, tenant="a"))
        assert again == task
        listed = await caller("ListTasks", pb.ListTasksRequest(tenant="a", include_artifacts=True, page_size=5))
        assert [each.id for each in listed.tasks] == [task.id]
        assert (listed.total_size, listed.page_size, listed.next_page_token) == (1, 5, "")
        none = await caller("GetTask", pb.GetTaskRequest(id=task.id, tenant="a", history_length=0))
        assert not none.history


async def test_bytes_and_free_values_arrive_as_they_are() -> None:
    async with calling() as (_, caller):
        task = (await caller("SendMessage", message("file"))).task
        [made], [free] = [each.parts for each in task.artifacts]
        assert (made.raw, made.filename, made.media_type) == (b"\0abc", "f", "text/plain")
        assert list(free.data.struct_value["a"]) == [1, 2.5, None, True, "x"]


async def test_a_stream_begins_with_the_task_and_ends_with_its_end(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        events = await caller.all("SendStreamingMessage", message("hi"))
        assert events[0].HasField("task")
        assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
        parts = [each.artifact_update.artifact for each in events]
        assert text_of([*events[0].task.artifacts, *parts]) == "hi and more"


async def test_a_stream_goes_on_behind_a_place_that_metadata_names() -> None:
    async with calling() as (_, caller):
        task = (await caller("SendMessage", message("hi"))).task
        caller.metadata = (*VERSION, ("a2a-extensions", RESUME), ("last-event-id", "0"))
        events = await caller.all("SubscribeToTask", pb.SubscribeToTaskRequest(id=task.id, tenant="a"))
        whole = text_of(each.artifact_update.artifact for each in events)
        assert whole == "hi and more"
        place = events[-2].artifact_update.metadata[RESUME]["after"]
        caller.metadata = (*VERSION, ("a2a-extensions", RESUME), ("last-event-id", place))
        rest = await caller.all("SubscribeToTask", pb.SubscribeToTaskRequest(id=task.id, tenant="a"))
        assert rest == events[-1:]
        stream = caller.stub.SubscribeToTask(
            pb.SubscribeToTaskRequest(id=task.id, tenant="a"), metadata=caller.metadata
        )
        assert ("a2a-extensions", RESUME) in await blocking(stream.initial_metadata)


async def test_a_task_that_asks_is_answered() -> None:
    async with calling() as (_, caller):
        asked = (await caller("SendMessage", message("ask"))).task
        assert asked.status.state == pb.TASK_STATE_INPUT_REQUIRED
        answered = (await caller("SendMessage", message("that", task_id=asked.id))).task
        assert answered.status.state == pb.TASK_STATE_COMPLETED
        assert answered.context_id == asked.context_id


async def test_a_task_is_subscribed_to_and_canceled(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        request = message("slow")
        request.configuration.return_immediately = True
        task = (await caller("SendMessage", request)).task
        stream = caller.stub.SubscribeToTask(pb.SubscribeToTaskRequest(id=task.id, tenant="a"), metadata=VERSION)
        first = await blocking(lambda: next(stream))
        assert first.task.id == task.id
        canceled = await caller("CancelTask", pb.CancelTaskRequest(id=task.id, tenant="a"))
        assert canceled.status.state == pb.TASK_STATE_CANCELED
        rest = await blocking(lambda: list(stream))
        assert rest[-1].status_update.status.state == pb.TASK_STATE_CANCELED


async def test_webhooks_are_configured() -> None:
    settings = settings_of(server={"http2": True}, push={"enabled": True, "allow_loopback": True})
    async with calling(settings=settings) as (_, caller):
        task = (await caller("SendMessage", message("ask"))).task
        wish = pb.TaskPushNotificationConfig(task_id=task.id, tenant="a", url="http://127.0.0.1:1/hook", id="c")
        made = await caller("CreateTaskPushNotificationConfig", wish)
        about = {"task_id": task.id, "id": made.id, "tenant": "a"}
        assert (await caller("GetTaskPushNotificationConfig", pb.GetTaskPushNotificationConfigRequest(**about))) == made
        every = pb.ListTaskPushNotificationConfigsRequest(task_id=task.id, tenant="a")
        assert list((await caller("ListTaskPushNotificationConfigs", every)).configs) == [made]
        gone = pb.DeleteTaskPushNotificationConfigRequest(**about)
        assert (await caller("DeleteTaskPushNotificationConfig", gone)).ByteSize() == 0
        assert not (await caller("ListTaskPushNotificationConfigs", every)).configs


async def test_the_tenant_names_the_agent_and_nothing_the_default_one(on: Settings) -> None:
    async def other(ctx: Context) -> None:
        await ctx.emit_text("other")

    agents = {**agent_of(agent), "b": FunctionAgent(AgentInfo("b", "Agent B"), other)}
    async with serving(replace(on, default_agent="b"), agents) as served:
        caller = Caller(served)
        assert text_of((await caller("SendMessage", message("hi", ""))).task.artifacts) == "other"
        assert text_of((await caller("SendMessage", message("hi"))).task.artifacts) == "hi and more"
        error = await caller.refused("SendMessage", message("hi", "nobody"))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        await blocking(caller.channel.close)


async def test_the_card_says_where_it_is_if_it_is_there() -> None:
    for settings, expected in ((ON, 1), (None, 0)):
        async with speaking(agent, settings=settings) as (served, _), served.client() as http:
            card = (await http.get("/a2a/a/.well-known/agent-card.json")).json()
            found = [each for each in card["supportedInterfaces"] if each["protocolBinding"] == "GRPC"]
            assert len(found) == expected
            for each in found:
                assert each == {"url": served.host, "protocolBinding": "GRPC", "protocolVersion": "1.0", "tenant": "a"}


@pytest.mark.parametrize("on", ["tls"], indirect=True)
async def test_over_tls_http_1_1_is_spoken_on_the_same_port(on: Settings) -> None:
    async with calling(settings=on) as (served, caller):
        stream = caller.stub.SendStreamingMessage(message("slow"), metadata=VERSION)
        task = (await blocking(lambda: next(stream))).task
        for alpn, spoken in ((("h2", "http/1.1"), "h2"), (("http/1.1",), "http/1.1")):
            async with await trio.open_ssl_over_tcp_stream(*served.address, ssl_context=trusted(*alpn)) as peer:
                await peer.do_handshake()
                assert peer.selected_alpn_protocol() == spoken
        async with served.client(verify=trusted("http/1.1")) as http:
            speaker = Speaker(http)
            assert (await speaker.get(task.id))["status"]["state"] == "TASK_STATE_WORKING"
            await speaker.ask("CancelTask", {"id": task.id})
        rest = await blocking(lambda: list(stream))
        assert rest[-1].status_update.status.state == pb.TASK_STATE_CANCELED


@pytest.mark.parametrize("on", ["tls"], indirect=True)
async def test_a_client_that_does_not_know_the_authority_sends_nothing(on: Settings) -> None:
    async with calling(settings=on) as (served, caller):
        with grpc.secure_channel(served.host, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())) as channel:
            stranger: Any = a2a_pb2_grpc.A2AServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as caught:
                await blocking(lambda: stranger.SendMessage(message("hi"), metadata=VERSION, timeout=10))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not (await caller("ListTasks", pb.ListTasksRequest(tenant="a"))).tasks


async def test_a_compressed_message_is_read() -> None:
    async with calling() as (served, _):
        caller = Caller(served, compression=grpc.Compression.Gzip)
        task = (await caller("SendMessage", message("hi" * 1000))).task
        assert text_of(task.artifacts).startswith("hihi")
        deflated = await Caller(served, compression=grpc.Compression.Deflate).refused(
            "SendMessage", message("x" * 2000)
        )
        assert deflated.code() == grpc.StatusCode.UNIMPLEMENTED


# ---- what is refused


async def test_an_error_carries_its_status_its_message_and_its_details(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        error = await caller.refused("GetTask", pb.GetTaskRequest(id="nöne%", tenant="a"))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert error.details() == "Task 'nöne%' was not found"
        info = info_of(error)
        assert (info.reason, info.domain) == ("TASK_NOT_FOUND", "a2a-protocol.org")
        assert dict(info.metadata) == {"taskId": "nöne%"}
        assert status_of(error).code == 5
        error = await caller.refused("ListTasks", pb.ListTasksRequest(page_size=1000, tenant="a"))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        bad = error_details_pb2.BadRequest()
        assert status_of(error).details[1].Unpack(bad)
        assert bad.field_violations[0].field == "pageSize"
        error = await caller.refused("SendMessage", pb.SendMessageRequest(tenant="a"))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "Object missing required field `message`",
        )


async def test_an_error_of_a_stream_is_its_end(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        with pytest.raises(grpc.RpcError) as caught:
            await caller.all("SubscribeToTask", pb.SubscribeToTaskRequest(id="none", tenant="a"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert info_of(caught.value).reason == "TASK_NOT_FOUND"


@pytest.mark.parametrize("version", [None, "0.3", "2.0", "1"])
async def test_another_version_is_refused(version: str | None) -> None:
    async with calling() as (_, caller):
        caller.metadata = () if version is None else (("a2a-version", version),)
        error = await caller.refused("SendMessage", message("hi"))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert info_of(error).reason == "VERSION_NOT_SUPPORTED"


async def test_who_has_no_token_is_refused_in_the_words_of_grpc() -> None:
    settings = settings_of(server={"http2": True}, auth={"tokens": [{"name": "n", "token": TOKEN}]})
    async with calling(settings=settings) as (_, caller):
        error = await caller.refused("SendMessage", message("hi"))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert info_of(error).reason == "UNAUTHENTICATED"
        caller.metadata = (*VERSION, ("authorization", f"Bearer {TOKEN}"))
        assert (await caller("SendMessage", message("hi"))).task.id
        card = await caller("GetExtendedAgentCard", pb.GetExtendedAgentCardRequest(tenant="a"))
        assert card.security_schemes["bearer"].http_auth_security_scheme.scheme == "Bearer"
        assert card.supported_interfaces[2].tenant == "a"


async def test_a_stream_ends_when_its_token_expires_and_its_task_goes_on() -> None:
    jwt = {"issuer": ISSUER, "audience": ["hector"], "leeway": 0}
    key = Signer("one")
    async with issuing(key) as issuer:
        settings = settings_of(server={"http2": True}, auth={"jwt": {**jwt, "jwks_url": issuer.url}})
        async with calling(settings=settings) as (_, caller):
            caller.metadata = (*VERSION, ("authorization", f"Bearer {key.sign(exp=int(time.time()) + 2)}"))
            stream = caller.stub.SendStreamingMessage(message("slow"), metadata=caller.metadata)
            first = await blocking(lambda: next(stream))
            with pytest.raises(grpc.RpcError) as caught:
                await blocking(lambda: list(stream))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            caller.metadata = (*VERSION, ("authorization", f"Bearer {key.sign()}"))
            task = await caller("GetTask", pb.GetTaskRequest(id=first.task.id, tenant="a"))
            assert task.status.state == pb.TASK_STATE_WORKING


async def test_what_is_not_there_and_what_is_too_large_is_refused() -> None:
    async with calling() as (served, caller):
        for path in ("/lf.a2a.v1.A2AService/Nothing", "/grpc.health.v1.Health/Check", "/a2a/a"):
            call = caller.channel.unary_unary(path)
            with pytest.raises(grpc.RpcError) as caught:
                await blocking(lambda call=call: call(b"", timeout=10))  # type: ignore[misc]
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        error = await caller.refused("SendMessage", message("x" * (2 << 20)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        bomb = Caller(served, compression=grpc.Compression.Gzip)
        error = await bomb.refused("SendMessage", message("x" * (3 << 20)))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "larger than" in error.details()
        call = caller.channel.unary_unary(f"{SERVICE}GetTask")
        with pytest.raises(grpc.RpcError) as caught:
            await blocking(lambda: call(b"\xff\xff", timeout=10, metadata=VERSION))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_every_operation_has_its_message_and_every_error_its_status() -> None:
    assert set(RESPONSES) | {"DeleteTaskPushNotificationConfig"} == set(OPERATIONS)
    assert {code.name: code.value[0] for code in grpc.StatusCode} == dict(STATUS)


def test_a_message_of_trailers_is_ascii_and_comes_back() -> None:
    headers = dict(trailers("INTERNAL", "ein Ümlaut\n100 %"))
    assert headers[b"grpc-message"] == b"ein %C3%9Cmlaut%0A100 %25"


@pytest.mark.parametrize(("text", "seconds"), [("5S", 5), ("2M", 120), ("1H", 3600), ("20m", 0.02), ("7u", 7e-6)])
def test_a_deadline_has_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


# ---- ends


async def test_a_deadline_ends_the_call_and_not_the_task(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        error = await caller.refused("SendMessage", message("slow"), within=0.3)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        listed = await caller("ListTasks", pb.ListTasksRequest(tenant="a"))
        assert [each.status.state for each in listed.tasks] == [pb.TASK_STATE_WORKING]


async def test_the_server_keeps_a_deadline_of_itself() -> None:
    async with calling() as (served, _), raw(served) as client:
        body = encode("SendMessageRequest", {"tenant": "a", "message": said("slow")})
        stream = await ask(client, "SendMessage", body, (b"grpc-timeout", b"100m"))
        headers = (await client.next(ResponseReceived, stream)).headers
        assert headers is not None
        assert dict(headers)[b"grpc-status"] == b"4"


async def test_a_client_that_cancels_ends_its_stream_and_not_the_task(on: Settings) -> None:
    async with calling(settings=on) as (served, caller):
        stream = caller.stub.SendStreamingMessage(message("slow"), metadata=VERSION)
        first = await blocking(lambda: next(stream))
        assert served.services.metrics.open_streams("grpc") == 1
        await blocking(stream.cancel)
        with trio.fail_after(10):
            while served.services.metrics.open_streams("grpc"):
                await pause(0.01)
        task = await caller("GetTask", pb.GetTaskRequest(id=first.task.id, tenant="a"))
        assert task.status.state == pb.TASK_STATE_WORKING


async def test_a_stream_goes_on_while_others_call_on_the_same_connection(on: Settings) -> None:
    async with calling(settings=on) as (_, caller):
        stream = caller.stub.SendStreamingMessage(message("slow"), metadata=VERSION)
        first = await blocking(lambda: next(stream))
        for n in range(20):
            assert (await caller("SendMessage", message(f"{n}"))).task.status.state == pb.TASK_STATE_COMPLETED
        await caller("CancelTask", pb.CancelTaskRequest(id=first.task.id, tenant="a"))
        rest = await blocking(lambda: list(stream))
        assert rest[-1].status_update.status.state == pb.TASK_STATE_CANCELED


async def test_many_clients_stream_at_once() -> None:
    async with calling() as (served, _):
        counts: list[int] = []
        lock = threading.Lock()

        async def one(n: int) -> None:
            caller = Caller(served, options=[("grpc.use_local_subchannel_pool", 1)])
            events = await caller.all("SendStreamingMessage", message(f"{n}"))
            with lock:
                counts.append(len(events))
            await blocking(caller.channel.close)

        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(one, n)
        assert len(counts) == 10
        assert served.services.metrics.open_streams("grpc") == 0


# ---- what no stock client sends


@asynccontextmanager
async def raw(served: Served, **options: Any) -> AsyncIterator[Client]:
    with trio.fail_after(20):
        tcp = await trio.open_tcp_stream(*served.address)
        secure = served.url.startswith("https:")
        stream = trio.SSLStream(tcp, trusted("h2"), server_hostname=served.address[0]) if secure else tcp
        async with stream:
            client = Client(Peer(stream), **options)
            await client.flush()
            yield client


def said(text: str) -> dict[str, Any]:
    return {"messageId": f"m-{text}", "role": "ROLE_USER", "parts": [{"text": text}]}


async def ask(client: Client, method: str, message: bytes, *more: tuple[bytes, bytes], flag: int = 0) -> int:
    kind = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"a2a-version", b"1.0"))
    stream_id = client.h2.get_next_available_stream_id()
    path = f"{SERVICE}{method}".encode()
    head = [(b":method", b"POST"), (b":path", path), (b":scheme", b"http"), (b":authority", b"localhost"), *kind, *more]
    client.h2.send_headers(stream_id, head)
    client.h2.send_data(stream_id, struct.pack("!BI", flag, len(message)) + message, end_stream=True)
    await client.flush()
    return stream_id


async def trailers_of(client: Client, stream_id: int) -> dict[bytes, bytes]:
    headers = (await client.next(TrailersReceived, stream_id)).headers
    assert headers is not None
    return dict(headers)


@pytest.mark.parametrize(
    ("body", "flag"), [(b"", 1), (b"\x1f\x8b\xff", 1), (b"\xff" * 50, 0), (b"", 2), (b"\x12\x05ab", 0)]
)
async def test_a_message_that_is_none_is_refused_and_the_connection_goes_on(body: bytes, flag: int) -> None:
    async with calling() as (served, _), raw(served) as client:
        stream = await ask(client, "GetTask", body, (b"grpc-encoding", b"gzip"), flag=flag)
        headers = (await client.next(ResponseReceived, stream)).headers
        assert headers is not None
        assert dict(headers)[b"grpc-status"] == b"3"
        stream = await ask(client, "ListTasks", encode("ListTasksRequest", {"tenant": "a"}))
        assert (await trailers_of(client, stream))[b"grpc-status"] == b"0"


async def test_a_stream_nobody_gives_a_window_to_is_cut_and_its_task_goes_on(on: Settings) -> None:
    settings = replace(on, limits=replace(on.limits, send_timeout=0.3))
    async with calling(settings=settings) as (served, caller), raw(served, window=0) as client:
        body = encode("SendMessageRequest", {"tenant": "a", "message": said("slow")})
        asked = await ask(client, "SendStreamingMessage", body)
        assert (await client.next(StreamReset, asked)).error_code == ErrorCodes.CANCEL
        listed = await caller("ListTasks", pb.ListTasksRequest(tenant="a"))
        assert [each.status.state for each in listed.tasks] == [pb.TASK_STATE_WORKING]
