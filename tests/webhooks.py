"""A webhook for tests: a real loopback server that keeps what it is told and answers as a test has planned.

async with webhook() as hook:
    hook.plan(500, 503, 200)              # the first three answers; then 200
    … name hook.url …
    seen = await hook.wait(4)             # seen[0].body, seen[0].headers
"""

from __future__ import annotations

import json
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import h11
import trio


class Seen(NamedTuple):
    """One request."""

    method: str
    target: str
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def state(self) -> str | None:
        """The state that it tells of, if any."""
        update = self.body.get("statusUpdate")
        return None if update is None else str(update["status"]["state"]).removeprefix("TASK_STATE_")

    @property
    def text(self) -> str:
        """The text that it tells."""
        update = self.body.get("artifactUpdate")
        return "" if update is None else "".join(part.get("text", "") for part in update["artifact"]["parts"])


class Reply(NamedTuple):
    status: int
    headers: dict[str, str] = {}  # noqa: RUF012
    after: trio.Event | None = None
    """Waited for before the answer is sent."""


class Hook:
    """See the module."""

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.origin = f"{scheme}://127.0.0.1:{port}"
        self.url = f"{self.origin}/hook?secret=in-the-query"
        self.seen: list[Seen] = []
        self.always = Reply(200)
        self.under_way = 0
        self.most_under_way = 0
        self.cut = 0
        """Connections that ended without a request."""
        self._planned: deque[Reply] = deque()
        self._moved = trio.lowlevel.ParkingLot()

    def plan(self, *replies: Reply | int) -> None:
        """The next answers; then ``always``."""
        self._planned.extend(Reply(each) if isinstance(each, int) else each for each in replies)

    async def wait(self, count: int) -> list[Seen]:
        """Returns all that was seen once there is so much."""
        with trio.fail_after(20):
            while len(self.seen) < count:
                await self._moved.park()
        return self.seen

    async def wait_state(self, state: str) -> list[Seen]:
        """Returns all that was seen once a state has been told."""
        with trio.fail_after(20):
            while not any(each.state == state for each in self.seen):
                await self._moved.park()
        return self.seen

    @property
    def states(self) -> list[str]:
        return [each.state for each in self.seen if each.state is not None]

    @property
    def text(self) -> str:
        return "".join(each.text for each in self.seen)

    async def serve(self, stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER)
        content, request = b"", None
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some()))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    content += bytes(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    self.cut += 1
                    return
            assert request is not None
            reply = self._planned.popleft() if self._planned else self.always
            self._saw(request, content)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            try:
                if reply.after is not None:
                    await reply.after.wait()
            finally:
                self.under_way -= 1
            headers = {"Content-Length": "2", **reply.headers}
            told = connection.send(h11.Response(status_code=reply.status, headers=list(headers.items())))
            await stream.send_all((told or b"") + (connection.send(h11.Data(data=b"ok")) or b""))
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            self.cut += 1
        finally:
            with trio.move_on_after(1, shield=True):
                await stream.aclose()

    def _saw(self, request: h11.Request, content: bytes) -> None:
        headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        self.seen.append(Seen(request.method.decode(), request.target.decode(), headers, content))
        self._moved.unpark_all()


@asynccontextmanager
async def webhook(tls: ssl.SSLContext | None = None) -> AsyncIterator[Hook]:
    """Ends with all its connections."""
    async with trio.open_nursery() as nursery:
        if tls is None:
            listeners: list[Any] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        else:
            listeners = await trio.open_ssl_over_tcp_listeners(0, tls, host="127.0.0.1", https_compatible=True)
        first = listeners[0] if tls is None else listeners[0].transport_listener
        hook = Hook(first.socket.getsockname()[1], "http" if tls is None else "https")
        nursery.start_soon(partial(trio.serve_listeners, hook.serve, listeners))
        yield hook
        nursery.cancel_scope.cancel()
