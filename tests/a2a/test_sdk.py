"""The official SDK's client against this server: on Trio and on asyncio, over JSON-RPC and HTTP+JSON, 1.0 and 0.3."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
import httpx
import pytest
import trio
from a2a.client import ClientConfig, ClientFactory
from a2a.client.card_resolver import A2ACardResolver
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import TaskNotFoundError

from hector_trio import Part
from hector_trio.agents import Context
from tests.a2a.speaking import speaking
from tests.serving import settings_of

BINDINGS = ("JSONRPC", "HTTP+JSON")
both = pytest.mark.parametrize("binding", BINDINGS)
loops = pytest.mark.parametrize("loop", ["trio", "asyncio"])


async def agent(ctx: Context) -> None:
    match ctx.text:
        case "ask" if ctx.resume is None:
            await ctx.ask("Which?")
        case "file":
            await ctx.artifact(Part(raw=b"abc", filename="f", media_type="text/plain"), name="made")
        case "slow":
            await ctx.emit_text("begun ")
            await trio.sleep_forever()
        case "reject":
            await ctx.reject("no")
        case _:
            for word in (ctx.text, " and", " more"):
                await ctx.emit_text(word)


def message(text: str, **more: Any) -> pb.SendMessageRequest:
    said = pb.Message(message_id=f"m-{text}", role=pb.ROLE_USER, parts=[pb.Part(text=text)], **more)
    return pb.SendMessageRequest(message=said)


async def client_of(http: httpx.AsyncClient, url: str, binding: str, *, streaming: bool = True) -> Any:
    card = await A2ACardResolver(http, f"{url}/a2a/a").get_agent_card()
    config = ClientConfig(httpx_client=http, supported_protocol_bindings=[binding], streaming=streaming)
    return ClientFactory(config).create(card)


async def run_on(loop: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs ``work`` here, or on a loop of asyncio in a thread."""
    with trio.fail_after(30):
        if loop == "trio":
            await work()
        else:
            await trio.to_thread.run_sync(asyncio.run, work(), abandon_on_cancel=True)  # type: ignore[arg-type]


def text_of(task: pb.Task) -> str:
    return "".join(part.text for each in task.artifacts for part in each.parts)


@both
@loops
async def test_a_message_is_sent_and_streamed(binding: str, loop: str) -> None:
    async with speaking(agent) as (served, _):

        async def work() -> None:
            async with httpx.AsyncClient() as http:
                for streaming in (False, True):
                    client = await client_of(http, served.url, binding, streaming=streaming)
                    events = [event async for event in client.send_message(message("hi"))]
                    assert events[0].HasField("task")
                    task = await client.get_task(pb.GetTaskRequest(id=events[0].task.id))
                    assert task.status.state == pb.TASK_STATE_COMPLETED
                    assert text_of(task) == "hi and more"
                    if streaming:
                        assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
                        streamed = text_of(events[0].task) + "".join(
                            part.text for each in events for part in each.artifact_update.artifact.parts
                        )
                        assert streamed == "hi and more"

        await run_on(loop, work)


async def test_the_client_streams_over_grpc_where_the_card_says() -> None:
    async with speaking(agent, settings=settings_of(server={"http2": True})) as (served, _):

        async def work() -> None:
            async with httpx.AsyncClient() as http:
                card = await A2ACardResolver(http, f"{served.url}/a2a/a").get_agent_card()
                config = ClientConfig(
                    httpx_client=http,
                    supported_protocol_bindings=["GRPC"],
                    grpc_channel_factory=grpc.aio.insecure_channel,
                )
                async with ClientFactory(config).create(card) as client:
                    events = [event async for event in client.send_message(message("hi"))]
                    task = await client.get_task(pb.GetTaskRequest(id=events[0].task.id))
                    assert task.status.state == pb.TASK_STATE_COMPLETED
                    assert text_of(task) == "hi and more"
                    with pytest.raises(TaskNotFoundError):
                        await client.get_task(pb.GetTaskRequest(id="none"))

        await run_on("asyncio", work)


@both
@loops
async def test_a_task_asks_is_answered_listed_canceled_and_subscribed_to(binding: str, loop: str) -> None:
    async with speaking(agent) as (served, _):

        async def work() -> None:
            async with httpx.AsyncClient() as http:
                client = await client_of(http, served.url, binding, streaming=False)
                [event] = [event async for event in client.send_message(message("ask"))]
                asked = event.task
                assert asked.status.state == pb.TASK_STATE_INPUT_REQUIRED
                assert asked.status.message.parts[0].text == "Which?"
                [event] = [event async for event in client.send_message(message("that", task_id=asked.id))]
                assert event.task.status.state == pb.TASK_STATE_COMPLETED
                assert event.task.context_id == asked.context_id
                listed = await client.list_tasks(pb.ListTasksRequest(context_id=asked.context_id))
                assert [each.id for each in listed.tasks] == [asked.id]
                assert (listed.total_size, listed.next_page_token) == (1, "")

                streaming = await client_of(http, served.url, binding)
                stream = streaming.send_message(message("slow"))
                first = await anext(stream)
                subscribed = streaming.subscribe(pb.SubscribeToTaskRequest(id=first.task.id))
                assert (await anext(subscribed)).task.id == first.task.id
                canceled = await client.cancel_task(pb.CancelTaskRequest(id=first.task.id))
                assert canceled.status.state == pb.TASK_STATE_CANCELED
                for each in (stream, subscribed):
                    last = [event async for event in each][-1]
                    assert last.status_update.status.state == pb.TASK_STATE_CANCELED

        await run_on(loop, work)


@both
async def test_errors_are_told_apart(binding: str) -> None:
    from a2a.utils import errors

    async with speaking(agent) as (served, _), httpx.AsyncClient() as http:
        client = await client_of(http, served.url, binding, streaming=False)
        with pytest.raises(errors.TaskNotFoundError):
            await client.get_task(pb.GetTaskRequest(id="nobody"))
        [event] = [event async for event in client.send_message(message("hi"))]
        with pytest.raises(errors.TaskNotCancelableError):
            await client.cancel_task(pb.CancelTaskRequest(id=event.task.id))
        with pytest.raises(errors.UnsupportedOperationError):
            [_ async for _ in client.send_message(message("hi", task_id=event.task.id))]


@both
async def test_artifacts_and_rejections_arrive(binding: str) -> None:
    async with speaking(agent) as (served, _), httpx.AsyncClient() as http:
        client = await client_of(http, served.url, binding, streaming=False)
        [event] = [event async for event in client.send_message(message("file"))]
        [artifact] = event.task.artifacts
        assert (artifact.name, artifact.parts[0].raw, artifact.parts[0].filename) == ("made", b"abc", "f")
        [event] = [event async for event in client.send_message(message("reject"))]
        assert event.task.status.state == pb.TASK_STATE_REJECTED


@both
async def test_a_client_that_speaks_0_3_only_is_served(binding: str) -> None:
    """The same client, to whom the card declares nothing but 0.3: it then speaks that."""
    async with speaking(agent) as (served, _), httpx.AsyncClient() as http:
        card = await A2ACardResolver(http, f"{served.url}/a2a/a").get_agent_card()
        legacy = [each for each in card.supported_interfaces if each.protocol_version == "0.3"]
        del card.supported_interfaces[:]
        card.supported_interfaces.extend(legacy)
        for streaming in (False, True):
            config = ClientConfig(httpx_client=http, supported_protocol_bindings=[binding], streaming=streaming)
            client = ClientFactory(config).create(card)
            events = [event async for event in client.send_message(message("hi"))]
            task = await client.get_task(pb.GetTaskRequest(id=events[0].task.id))
            assert (task.status.state, text_of(task)) == (pb.TASK_STATE_COMPLETED, "hi and more")
            with pytest.raises(TaskNotFoundError):
                await client.get_task(pb.GetTaskRequest(id="none"))
