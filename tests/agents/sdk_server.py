"""The official SDK's server under uvicorn, as a program: one agent per binding and dialect, on a free loopback port.

``python -m tests.agents.sdk_server`` prints its address. The agent does what its input begins with: ``say``,
``message``, ``ask``, ``auth``, ``fail``, ``reject``, ``last``, ``count``, ``wait``. ``GET /ended/NAME`` waits until the
agent's waiting task was cancelled.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import uvicorn
from a2a.server.agent_execution import AgentExecutor
from a2a.server.request_handlers import DefaultRequestHandlerV2
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, Part
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

ended: dict[str, asyncio.Event] = {}


async def wait_ended(request: Any) -> JSONResponse:
    await asyncio.wait_for(ended.setdefault(request.path_params["name"], asyncio.Event()).wait(), 5)
    return JSONResponse(True)


class Executor(AgentExecutor):
    async def execute(self, context: Any, event_queue: Any) -> None:
        from a2a.helpers.proto_helpers import new_task_from_user_message, new_text_message
        from a2a.types import Role

        text = context.get_user_input()
        if text.startswith("message"):
            await event_queue.enqueue_event(new_text_message("a bare message", role=Role.ROLE_AGENT))
            return
        answered = context.current_task is not None
        if not answered:
            message = context.message
            message.task_id, message.context_id = context.task_id, context.context_id
            await event_queue.enqueue_event(new_task_from_user_message(message))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)

        def said(words: str) -> Any:
            return updater.new_agent_message([Part(text=words)])

        await updater.start_work(said("thinking"))
        if answered:
            await updater.add_artifact([Part(text=f"answered {text}")], artifact_id="r")
            await updater.complete()
        elif text.startswith("ask"):
            await updater.requires_input(said("Which?"))
        elif text.startswith("auth"):
            await updater.requires_auth(said("Log in"))
        elif text.startswith("fail"):
            await updater.failed(said("broken"))
        elif text.startswith("reject"):
            await updater.reject(said("not mine"))
        elif text.startswith("last"):
            await updater.complete(said("last words"))
        elif text.startswith("count"):
            for number in range(10):
                await updater.add_artifact([Part(text=f"{number} ")], artifact_id="r", append=number > 0)
                await asyncio.sleep(0.1)
            await updater.complete()
        elif text.startswith("wait"):
            await updater.add_artifact([Part(text="waiting ")], artifact_id="r")
            try:
                await asyncio.Event().wait()
            finally:
                ended.setdefault(text.split()[-1], asyncio.Event()).set()
        else:
            for number, word in enumerate(("You ", "said: ", text)):
                await updater.add_artifact([Part(text=word)], artifact_id="r", append=number > 0)
                await asyncio.sleep(0.01)
            await updater.add_artifact([Part(raw=b"\x00\xff", media_type="image/png")], artifact_id="p", name="Picture")
            await updater.complete()

    async def cancel(self, context: Any, event_queue: Any) -> None:
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def card(url: str, binding: str, version: str, *, streaming: bool) -> AgentCard:
    return AgentCard(
        name="sdk",
        description="The official SDK",
        version="1.0.0",
        supported_interfaces=[AgentInterface(url=url, protocol_binding=binding, protocol_version=version)],
        capabilities=AgentCapabilities(streaming=streaming),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="s", name="s", description="s", tags=["t"])],
    )


def main() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    base = f"http://127.0.0.1:{sock.getsockname()[1]}"
    mounts: list[Any] = [Route("/ended/{name}", wait_ended)]
    for name, binding, version, streaming in (
        ("rpc", "JSONRPC", "1.0", True),
        ("http", "HTTP+JSON", "1.0", True),
        ("rpc03", "JSONRPC", "0.3", True),
        ("http03", "HTTP+JSON", "0.3", True),
        ("plain", "JSONRPC", "1.0", False),
    ):
        about = card(f"{base}/{name}/", binding, version, streaming=streaming)
        handler = DefaultRequestHandlerV2(Executor(), InMemoryTaskStore(), about)
        old = version == "0.3"
        routes = (
            create_jsonrpc_routes(handler, "/", enable_v0_3_compat=old)
            if binding == "JSONRPC"
            else create_rest_routes(handler, enable_v0_3_compat=old)
        )
        mounts.append(Mount(f"/{name}", routes=[*create_agent_card_routes(about), *routes]))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=mounts), log_level="warning"))
    sys.stdout.write(f"{base}\n")
    sys.stdout.flush()
    asyncio.run(server.serve(sockets=[sock]))


if __name__ == "__main__":
    main()
