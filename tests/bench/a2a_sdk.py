"""The peer of our A2A server: the official SDK's, with the agents that are measured over A2A.

``python -m tests.bench.a2a_sdk memory`` or, with a file for SQLite, ``python -m tests.bench.a2a_sdk PATH``, under
uvicorn; with ``grpc`` behind it the SDK's servicer in a server of grpcio instead. Configurations of webhooks are in
memory in any case: looked up for each event, they would be one more query.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import uvicorn
from a2a.helpers import new_task_from_user_message, new_text_part
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler, GrpcHandler
from a2a.server.routes import create_jsonrpc_routes
from a2a.server.tasks import (
    BasePushNotificationSender,
    DatabaseTaskStore,
    InMemoryPushNotificationConfigStore,
    InMemoryTaskStore,
    TaskStore,
    TaskUpdater,
)
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, a2a_pb2_grpc
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette

from tests.bench.load import LONG, TEXT, Ticks


async def burst(updater: TaskUpdater, count: int) -> None:
    """Appends as many pieces of text to one artifact as it is asked for."""
    for number in range(count):
        await updater.add_artifact([new_text_part(TEXT)], artifact_id="answer", append=number > 0)
    await updater.complete()


async def paced(updater: TaskUpdater, count: int) -> None:
    ticks = Ticks()
    for number in range(count):
        await asyncio.sleep(ticks.until_next())
        ticks.count += 1
        text = ticks.text(ticks.count)
        await updater.add_artifact([new_text_part(text)], artifact_id="answer", append=number > 0)
    await updater.complete()


async def idle(updater: TaskUpdater, count: int) -> None:
    """As many pieces, and then nothing. They come at once: the task is the same as if they had come one by one, for
    which ten thousand take minutes with SQLite."""
    await updater.add_artifact([new_text_part(TEXT)] * count, artifact_id="answer")
    await asyncio.Event().wait()


async def versions(updater: TaskUpdater, count: int) -> None:
    for _ in range(count):
        await updater.add_artifact([new_text_part(LONG)], artifact_id="answer")
    await updater.complete()


async def asks(updater: TaskUpdater, count: int) -> None:
    await updater.requires_input(updater.new_agent_message([new_text_part("Which?")]))


class Agent(AgentExecutor):
    def __init__(self, work: Callable[[TaskUpdater, int], Awaitable[None]]) -> None:
        self._work = work

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        task = context.current_task or new_task_from_user_message(context.message)
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        await updater.start_work()
        await self._work(updater, int(context.get_user_input()))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.task_id is not None
        assert context.context_id is not None
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def card(name: str, port: int) -> AgentCard:
    return AgentCard(
        name=name,
        description=name,
        version="1.0.0",
        supported_interfaces=[
            AgentInterface(
                url=f"http://127.0.0.1:{port}/a2a/{name}", protocol_binding="JSONRPC", protocol_version="1.0"
            )
        ],
        capabilities=AgentCapabilities(streaming=True, push_notifications=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id=name, name=name, description=name, tags=[name])],
    )


def open_store(store: str) -> TaskStore:
    if store == "memory":
        return InMemoryTaskStore()
    engine = create_async_engine(f"sqlite+aiosqlite:///{store}", connect_args={"timeout": 60})

    @event.listens_for(engine.sync_engine, "connect")
    def as_ours(connection: Any, record: Any) -> None:
        """As it comes, 20 streams at once fail with "database is locked", and each commit waits for the disk."""
        for pragma in ("journal_mode=wal", "synchronous=normal"):
            connection.execute(f"PRAGMA {pragma}")

    return DatabaseTaskStore(engine)


def handler(work: Callable[[TaskUpdater, int], Awaitable[None]], tasks: TaskStore, port: int) -> DefaultRequestHandler:
    webhooks = InMemoryPushNotificationConfigStore()
    sender = BasePushNotificationSender(httpx.AsyncClient(timeout=15), webhooks)  # as ours; else it gives up after 5 s
    about = card(work.__name__, port)
    return DefaultRequestHandler(Agent(work), tasks, about, push_config_store=webhooks, push_sender=sender)


async def serve_grpc(tasks: TaskStore) -> None:
    import grpc  # type: ignore[import-untyped]

    server = grpc.aio.server()
    a2a_pb2_grpc.add_A2AServiceServicer_to_server(GrpcHandler(handler(burst, tasks, 0)), server)  # type: ignore[no-untyped-call]
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def serve_http(tasks: TaskStore) -> None:
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = sock.getsockname()[1]
    routes: list[Any] = []
    for work in (burst, paced, idle, versions, asks):
        routes += create_jsonrpc_routes(handler(work, tasks, port), f"/a2a/{work.__name__}")
    print(port, flush=True)
    config = uvicorn.Config(Starlette(routes=routes), log_level="error")
    await uvicorn.Server(config).serve([sock])  # given as ``fd``, it would not be TCP to it


async def main(store: str, binding: str = "") -> None:
    tasks = open_store(store)
    if isinstance(tasks, DatabaseTaskStore):
        await tasks.initialize()  # left to the first requests, all of them would create the table
    await (serve_grpc if binding else serve_http)(tasks)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
