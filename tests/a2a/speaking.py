"""A small client of A2A for tests: the same calls over either HTTP binding, and streams read event by event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import httpx2
import trio

from hector_trio.agents import Agent, AgentInfo, Context
from hector_trio.agents.function import FunctionAgent
from hector_trio.config import A2a
from tests.serving import Served, serving, settings_of
from tests.transports.test_sse import Reader

Binding = Literal["jsonrpc", "http"]
BINDINGS: tuple[Binding, ...] = ("jsonrpc", "http")
VERSION = {"A2A-Version": "1.0"}


class Refused(Exception):
    """An operation was refused: the binding's code, and the reason of its ErrorInfo."""

    def __init__(self, code: int, error: dict[str, Any]) -> None:
        details = error.get("data") or error.get("details") or []
        self.code = code
        self.message = error["message"]
        self.reason = next((each["reason"] for each in details if each["@type"].endswith("ErrorInfo")), None)
        self.fields = [
            field["field"]
            for each in details
            if each["@type"].endswith("BadRequest")
            for field in each["fieldViolations"]
        ]
        super().__init__(f"{code} {self.reason}: {self.message}")


class Happened(NamedTuple):
    """One event: its id, what it is, and that."""

    id: str
    kind: str
    value: dict[str, Any]


class Stream:
    """The events of a stream, one by one, over a socket of its own: leaving it is closing the socket."""

    def __init__(self, reader: Reader, binding: Binding) -> None:
        self.headers = reader.headers
        self._reader = reader
        self._binding = binding

    @property
    def comments(self) -> int:
        return self._reader.raw.count(b":\n\n")

    async def next(self) -> Happened | None:
        """``None`` at the end. Raises: Refused for an error in the middle."""
        with trio.fail_after(10):
            event = await self._reader.read()
        if event is None:
            return None
        body = json.loads(event.data)
        if "error" in body:
            raise Refused(body["error"]["code"], body["error"])
        [(kind, value)] = (body["result"] if self._binding == "jsonrpc" else body).items()
        return Happened(event.id, kind, value)

    async def rest(self) -> list[Happened]:
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found

    async def until(self, kind: str, **about: Any) -> Happened:
        """The next event of a kind, of which ``about`` is true (``state`` of its status)."""
        while (event := await self.next()) is not None:
            if event.kind == kind and ("state" not in about or state_of(event.value) == about["state"]):
                return event
        raise AssertionError(f"the stream ended before {kind} {about}")


def state_of(value: dict[str, Any]) -> str:
    return str(value["status"]["state"]).removeprefix("TASK_STATE_")


def text_of(value: dict[str, Any]) -> str:
    """All text of a task's artifacts."""
    return "".join(part.get("text", "") for each in value.get("artifacts", []) for part in each["parts"])


class Speaker:
    """Speaks A2A 1.0 to one agent."""

    def __init__(
        self, client: httpx2.AsyncClient, agent_id: str = "a", binding: Binding = "jsonrpc", **headers: str
    ) -> None:
        self.client = client
        self.agent_id = agent_id
        self.binding = binding
        self.headers = VERSION | {name.replace("_", "-"): text for name, text in headers.items()}

    async def ask(self, operation: str, params: dict[str, Any] | None = None) -> Any:
        """The result. Raises: Refused."""
        response = await self.client.request(**self._request(operation, params or {}), headers=self.headers)
        body = json.loads(response.content)
        if "error" in body:
            code = body["error"]["code"]
            assert response.status_code == (200 if self.binding == "jsonrpc" else code)
            raise Refused(code, body["error"])
        assert response.status_code == 200
        return body["result"] if self.binding == "jsonrpc" else body

    @asynccontextmanager
    async def stream(
        self, operation: str, params: dict[str, Any] | None = None, **headers: str
    ) -> AsyncIterator[Stream]:
        """Leaving cuts the connection. Raises: Refused."""
        more = {name.replace("_", "-"): text for name, text in headers.items()}
        asked = self._request(operation, params or {})
        request = self.client.build_request(**asked, headers=self.headers | more)
        url = request.url
        async with await trio.open_tcp_stream(url.host, url.port or 80) as socket:
            reader = Reader(socket)
            fields = {name: text for name, text in request.headers.items() if name not in _OWN}
            await reader.ask(request.method, url.raw_path.decode(), fields, request.content)
            if not reader.headers["Content-Type"].startswith("text/event-stream"):
                while await reader.piece() is not None:
                    pass
                error = json.loads(reader.raw)["error"]
                raise Refused(error["code"], error)
            assert reader.status == 200
            yield Stream(reader, self.binding)

    def _request(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        here = f"/a2a/{self.agent_id}"
        if self.binding == "jsonrpc":
            body = {"jsonrpc": "2.0", "id": 7, "method": operation, "params": params}
            return {"method": "POST", "url": here, "json": body}
        method, path = _PATHS[operation]
        named = {name for name in ("id", "taskId") if f"{{{name}}}" in path}
        rest = {name: value for name, value in params.items() if name not in named}
        url = here + path.format(**{name: params[name] for name in named})
        if method == "POST":
            return {"method": method, "url": url, **({"json": rest} if rest else {})}
        query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in rest.items()}
        return {"method": method, "url": url, "params": query}

    async def send(self, text: str = "hi", **more: Any) -> dict[str, Any]:
        """The task (or the message, as ``{"message": …}``) that a message leads to."""
        result: dict[str, Any] = await self.ask("SendMessage", message_of(text, **more))
        found: dict[str, Any] = result.get("task", result)
        return found

    async def get(self, task_id: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("GetTask", {"id": task_id, **more})
        return found


_OWN = ("host", "content-length", "connection", "accept-encoding")
"""Headers that the reader sets itself."""
_PATHS = {
    "SendMessage": ("POST", "/message:send"),
    "SendStreamingMessage": ("POST", "/message:stream"),
    "GetTask": ("GET", "/tasks/{id}"),
    "ListTasks": ("GET", "/tasks"),
    "CancelTask": ("POST", "/tasks/{id}:cancel"),
    "SubscribeToTask": ("POST", "/tasks/{id}:subscribe"),
    "CreateTaskPushNotificationConfig": ("POST", "/tasks/{taskId}/pushNotificationConfigs"),
    "ListTaskPushNotificationConfigs": ("GET", "/tasks/{taskId}/pushNotificationConfigs"),
    "GetTaskPushNotificationConfig": ("GET", "/tasks/{taskId}/pushNotificationConfigs/{id}"),
    "DeleteTaskPushNotificationConfig": ("DELETE", "/tasks/{taskId}/pushNotificationConfigs/{id}"),
    "GetExtendedAgentCard": ("GET", "/extendedAgentCard"),
}
_numbers = iter(range(1, 1 << 62))


def message_of(text: str = "hi", configuration: dict[str, Any] | None = None, **message: Any) -> dict[str, Any]:
    """A request to send one text; ``message``: more members of the message, or others instead."""
    whole = {"messageId": f"m{next(_numbers)}", "role": "ROLE_USER", "parts": [{"text": text}], **message}
    return {"message": whole} if configuration is None else {"message": whole, "configuration": configuration}


AT_ONCE = {"returnImmediately": True}


def agent_of(function: Any, *, replies: bool = False, **a2a: Any) -> dict[str, Agent]:
    info = AgentInfo("a", "Agent A", "Does as it is told", replies=replies, a2a=A2a(**a2a))
    return {"a": FunctionAgent(info, function)}


@asynccontextmanager
async def speaking(
    function: Any,
    binding: Binding = "jsonrpc",
    *,
    settings: Any = None,
    replies: bool = False,
    **a2a: Any,
) -> AsyncIterator[tuple[Served, Speaker]]:
    """A server with the agent ``a``, and a client of it."""
    async with serving(settings or settings_of(), agent_of(function, replies=replies, **a2a)) as served:
        async with served.client() as client:
            yield served, Speaker(client, binding=binding)


async def echo(ctx: Context) -> None:
    await ctx.emit_text(ctx.text)


__all__ = ["AT_ONCE", "BINDINGS", "Binding", "Happened", "Refused", "Speaker", "Stream", "echo", "speaking"]
