"""The peer of our A2A server: the official SDK's, under uvicorn, with a streaming agent.

``python -m tests.bench.a2a_sdk memory`` or, with a file for SQLite, ``python -m tests.bench.a2a_sdk PATH``.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from a2a.helpers import new_task_from_user_message, new_text_part
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_jsonrpc_routes
from a2a.server.tasks import DatabaseTaskStore, InMemoryTaskStore, TaskStore, TaskUpdater
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette

from tests.bench.load import TEXT


class Burst(AgentExecutor):
    """Appends as many pieces of text to one artifact as it is asked for."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        task = context.current_task or new_task_from_user_message(context.message)
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        await updater.start_work()
        for number in range(int(context.get_user_input())):
            await updater.add_artifact([new_text_part(TEXT)], artifact_id="answer", append=number > 0)
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.task_id is not None
        assert context.context_id is not None
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def card(port: int) -> AgentCard:
    return AgentCard(
        name="burst",
        description="burst",
        version="1.0.0",
        supported_interfaces=[
            AgentInterface(url=f"http://127.0.0.1:{port}/a2a/burst", protocol_binding="JSONRPC", protocol_version="1.0")
        ],
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="burst", name="burst", description="burst", tags=["burst"])],
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


def main(store: str) -> None:
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = sock.getsockname()[1]
    tasks = open_store(store)

    @asynccontextmanager
    async def ready(app: Starlette) -> AsyncIterator[None]:
        if isinstance(tasks, DatabaseTaskStore):
            await tasks.initialize()  # left to the first requests, all of them would create the table
        yield

    answering = DefaultRequestHandler(Burst(), tasks, card(port))
    app = Starlette(routes=create_jsonrpc_routes(answering, "/a2a/burst"), lifespan=ready)
    print(port, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run([sock])  # given as ``fd``, it would not be TCP to it


if __name__ == "__main__":
    main(*sys.argv[1:])
