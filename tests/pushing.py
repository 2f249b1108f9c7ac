"""An agent that says what a test gives it, and an A2A client that names webhooks, of a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import trio

from hector_trio.agents import AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from tests.serving import Served, serving, settings_of
from tests.webhooks import Hook

FAST = {"allow_loopback": True, "backoff": 0.001, "max_backoff": 0.01, "interval": 0}
"""Settings under which nobody waits for long."""


class Speaker:
    """An agent that says what a test gives it, when the test gives it; ``None`` ends the task, ``?`` asks."""

    def __init__(self) -> None:
        self._say, self._heard = trio.open_memory_channel[str | None](1000)
        self.said = trio.Event()

    def say(self, *words: str | None) -> None:
        for word in words:
            self._say.send_nowait(word)

    async def __call__(self, ctx: Context) -> None:
        if ctx.resume is not None:
            await ctx.emit_text(f"<{ctx.resume.answer}>")
        while (word := await self._heard.receive()) is not None:
            if word == "?":
                await ctx.ask("Which?")
            await ctx.emit_text(word)


def speaking(speaker: Any, **about: Any) -> dict[str, Any]:
    return {"a": FunctionAgent(AgentInfo("a", "a", **about), speaker)}


class Client:
    """An A2A client that speaks JSON-RPC."""

    def __init__(self, http: httpx2.AsyncClient, agent_id: str = "a") -> None:
        self.http = http
        self.path = f"/a2a/{agent_id}"

    async def call(self, method: str, **params: Any) -> Any:
        """The result. Raises: AssertionError when it is an error."""
        answer = await self.ask(method, **params)
        assert "error" not in answer, answer
        return answer["result"]

    async def ask(self, method: str, **params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        response = await self.http.post(self.path, json=body, headers={"A2A-Version": "1.0"})
        assert response.status_code == 200, response.text
        return response.json()

    async def send(self, hook: Hook | None = None, text: str = "hi", **more: Any) -> Any:
        """Begins a task and returns it at once; ``hook`` is told of it."""
        config = more.pop("config", {})
        configuration: dict[str, Any] = {"returnImmediately": True}
        if hook is not None:
            configuration["taskPushNotificationConfig"] = {"url": hook.url, **config}
        message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": text}], **more}
        return (await self.call("SendMessage", message=message, configuration=configuration))["task"]

    async def create(self, task_id: str, url: str, **more: Any) -> Any:
        return await self.call("CreateTaskPushNotificationConfig", taskId=task_id, url=url, **more)

    async def list(self, task_id: str, **more: Any) -> Any:
        return await self.call("ListTaskPushNotificationConfigs", taskId=task_id, **more)


@asynccontextmanager
async def served(speaker: Any, about: dict[str, Any] | None = None, **sections: Any) -> AsyncIterator[Client]:
    """A server with an agent ``a``, and a client of it."""
    sections["push"] = FAST | sections.get("push", {})
    async with serving(settings_of(**sections), speaking(speaker, **(about or {}))) as server:
        async with server.client() as http:
            client = Client(http)
            client.server = server  # type: ignore[attr-defined]
            yield client


def server_of(client: Client) -> Served:
    return client.server  # type: ignore[attr-defined,no-any-return]


async def positions(client: Client, task_id: str, until: int) -> None:
    """Returns once all webhooks of a task have been told so much, and this is stored."""
    store = server_of(client).engine.store
    row = await store.get_task("local", "a", task_id)
    assert row is not None
    with trio.fail_after(10):
        while min(push.seq for push in await store.list_pushes(row.key)) < until:
            await trio.lowlevel.checkpoint()


async def nothing_to_tell(client: Client) -> None:
    """Returns once every webhook has been told everything."""
    push = server_of(client).services.push
    assert push is not None
    with trio.fail_after(10):
        while push.open:
            await trio.lowlevel.checkpoint()
