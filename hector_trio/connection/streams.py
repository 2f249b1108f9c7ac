"""The application of a stream, with its task, its inbox and its end; and the stream of an HTTP request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from math import inf
from time import time
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.protocol.events import Body, EndBody, Event, Response, StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.typing import AppWrapper

from hector_trio import frames, http1
from hector_trio.connection.bounds import Inbox, contain

if TYPE_CHECKING:
    from hector_trio.connection.h1 import Http1
    from hector_trio.connection.socket import Connection

NO_GROUP = TaskGroup()
"""What the streams of the base classes are given; ours start their tasks themselves."""


def nothing(*_: object) -> None:
    """Nobody has asked to be told."""


class Application:
    """What both kinds of stream share: the application's task, its inbox, and its end.

    A mixin for Hypercorn's streams, which call the methods here through what they take for their task group.
    """

    owner: Connection
    inbox: Inbox[Any]
    app: AppWrapper
    scope: Any
    closed: bool
    stream_id: int
    config: Config
    send: Callable[[Event], Awaitable[None]]
    start_time: float

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        """Called by the base class when the scope is complete: start the application."""
        kind = "websocket" if scope["type"] == "websocket" else f"request {scope['method']}"
        self.owner.spawn(self._run, f"{kind} {scope['path']}")
        return self._put

    def spawn(self, func: Callable[..., Any], *args: Any) -> None:
        """Called by the base class for its pings, which are sent by the connection's deadline instead."""

    async def _put(self, event: Mapping[str, Any]) -> None:
        if event["type"] in ("http.disconnect", "websocket.disconnect"):
            self.inbox.close(event)
        else:
            self.inbox.put(event, len(event.get("body") or b""))

    async def _run(self) -> None:
        """Run the application; whatever it raises ends this stream and no other."""
        code = 1012  # a cancel from outside: the server is going
        try:
            if type(self.app) is ASGIWrapper:  # it only adds a coroutine
                await self.app.app(self.scope, self.receive, self.app_send)
            else:
                await self.app(self.scope, self.receive, self.app_send, trio.to_thread.run_sync, trio.from_thread.run)
            code = 1000
        except (Exception, BaseExceptionGroup) as error:
            contain(error, f"The application failed on {self.scope['type']} {self.scope['path']}")
            code = 1011
        finally:
            try:
                await self.ended(code)
            except (Exception, BaseExceptionGroup) as error:
                self.owner.reset("cannot be answered")
                contain(error, "The end of a response failed")

    def receive(self) -> Awaitable[Any]:
        """What the application calls for its next event."""
        return self.inbox.receive()

    async def _send_error_response(self, status_code: int) -> None:
        """Called by the base classes where there is no application to answer, or none that did."""
        await self.refuse(status_code)

    async def refuse(self, status: int, detail: str = "") -> None:
        """Answer in the application's place."""
        headers, body = frames.problem(status, str(uuid4()), detail)
        await self.send(Response(stream_id=self.stream_id, status_code=status, headers=headers))
        if self.scope.get("method") != "HEAD":
            await self.send(Body(stream_id=self.stream_id, data=body))
        await self.send(EndBody(stream_id=self.stream_id))
        await self.config.log.access(self.scope, {"status": status, "headers": []}, time() - self.start_time)

    async def app_send(self, message: Any) -> None:
        raise NotImplementedError

    async def ended(self, code: int) -> None:
        """The application has ended; *code* closes its WebSocket if it has not done so itself. Does not wait."""
        raise NotImplementedError


class HttpRequest(Application, HTTPStream):
    """One HTTP request and its response."""

    def __init__(self, owner: Connection, *args: Any) -> None:
        super().__init__(*args)
        self.owner = owner
        self.inbox = Inbox(inf, inf)  # bounded by `Http1.room`: the reader stops, TCP tells the client
        self.task_group = cast(TaskGroup, self)
        self._gone: Callable[[], None] = nothing

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        scope["extensions"]["hector.request"] = self
        return await super().spawn_app(app, config, scope, send)

    def is_own(self, receive: object, send: object) -> bool:
        """Whether the application was given these two by this stream, with nothing in between."""
        return receive == self.receive and send == self.app_send

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Have *tell* called once if the client leaves before its answer is complete; now, if it has left already."""
        self._gone = tell
        if self.closed:
            tell()

    async def handle(self, event: Event) -> None:
        left = type(event) is StreamClosed and not self.closed and self.state is not ASGIHTTPState.CLOSED
        await super().handle(event)
        if left:
            self._gone()

    def receive(self) -> Awaitable[Any]:
        protocol = cast("Http1", self.owner.protocol)  # a stream of HTTP/2 has its own way to receive
        if protocol.stream is self:
            protocol.ask_for_body()
        return self.inbox.receive()

    async def app_send(self, message: Any) -> None:
        if not self.closed:
            await HTTPStream.app_send(self, message)
        await self.owner.pace()

    async def respond(self, status: int, headers: http1.RawHeaders, body: bytes) -> None:
        """Send a whole answer: what `http.response.start` and one `http.response.body` do, in one step if it is an
        ordinary one."""
        protocol = cast("Http1", self.owner.protocol)
        if self.state is ASGIHTTPState.REQUEST and protocol.answer(self, status, headers, body):
            self.state = ASGIHTTPState.CLOSED
            told = {"status": status, "headers": headers}
            await self.config.log.access(self.scope, cast(Any, told), time() - self.start_time)
            await self.send(StreamClosed(self.stream_id))
            await self.owner.pace()
        else:
            await self.app_send({"type": "http.response.start", "status": status, "headers": headers})
            await self.app_send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_error_response(self, status_code: int) -> None:
        await super()._send_error_response(status_code)
        self.state = ASGIHTTPState.CLOSED

    async def ended(self, code: int) -> None:
        await HTTPStream.app_send(self, None)
