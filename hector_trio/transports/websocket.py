"""The WebSocket of an agent (PROTOCOL section 4): task requests in, chunks out, many tasks on one socket."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import msgspec
import structlog
import trio
from msgspec import UNSET, Struct, UnsetType
from quart import Websocket, websocket

from hector_trio.auth import Principal
from hector_trio.engine import Order
from hector_trio.errors import (
    AgentNotFound,
    Draining,
    HectorError,
    InvalidRequest,
    RateLimited,
    TaskNotFound,
)
from hector_trio.log import Follower, Wakeup
from hector_trio.models import TaskRequest, encode
from hector_trio.stores import Accepted
from hector_trio.task import TaskRow
from hector_trio.transports import Services
from hector_trio.transports.guard import SUBPROTOCOL
from hector_trio.transports.problems import refused
from hector_trio.transports.quart_app import LEFT_AT, HectorQuart
from hector_trio.transports.requests import check_task_request, decode_json
from hector_trio.transports.routes import PRINCIPAL

SEND_MANY: Final = "hector.send_many"
"""The ASGI scope extension that takes many frames for one write."""

BATCH: Final = 64
"""Chunks that one task may put into a round before the next task's turn comes."""

ROUND_BYTES: Final = 256 * 1024
"""About how much leaves in one round; who has not been served then is served first in the next."""

MAX_ECHO: Final = 128
"""Characters of a client's own words that an answer repeats."""

MAX_REPLIES: Final = 256
"""Answers to control frames that may wait for the socket before the next frame is read."""

log = structlog.stdlib.get_logger("hector_trio.websocket")

SendMany = Callable[[list[bytes]], Awaitable[None]]


class Envelope(Struct):
    """What tells a control frame from a task: only clients that send a ``type`` get frames with one."""

    type: Any = UNSET
    task_id: Any = msgspec.field(default=UNSET, name="taskId")


class CancelFrame(Struct):
    task_id: str | UnsetType = msgspec.field(default=UNSET, name="taskId")
    reason: str | UnsetType = UNSET


class PingFrame(Struct):
    id: Any = UNSET


class Ok(Struct, tag="ok", tag_field="type", rename="camel"):
    of: str
    task_id: str | UnsetType = UNSET
    task_ids: list[str] | UnsetType = UNSET
    status: str | UnsetType = UNSET
    last_seq: int | UnsetType = UNSET


class Refusal(Struct, tag="error", tag_field="type", rename="camel"):
    of: str
    code: str
    detail: str
    task_id: str | UnsetType = UNSET


def add_websocket(app: HectorQuart, services: Services) -> None:
    """Puts ``WS /agents/<id>/stream`` on ``app``."""

    @app.websocket("/agents/<agent_id>/stream")
    async def stream(agent_id: str) -> None:
        if agent_id not in services.engine.agents:
            raise AgentNotFound(f"There is no agent {agent_id!r}")
        if services.engine.draining:
            raise Draining("The server is shutting down; it takes no new streams", retry_after=5)
        if services.metrics.open_streams("websocket") >= services.settings.limits.sockets:
            raise RateLimited(
                f"{services.settings.limits.sockets} WebSockets are open; no more are taken", retry_after=5
            )
        current: Websocket = websocket._get_current_object()  # type: ignore[attr-defined]
        scope = cast(dict[str, Any], current.scope)
        await current.accept(subprotocol=scope.get(SUBPROTOCOL))
        with services.metrics.stream("websocket"):
            await Socket(services, agent_id, current).serve()


class Socket:
    """One connection: a reader and a sender in one nursery, and in the same nursery the runs that die with it."""

    def __init__(self, services: Services, agent_id: str, current: Websocket) -> None:
        self._engine = services.engine
        self._limits = services.settings.limits
        self._agent_id = agent_id
        self._metrics = services.metrics
        self._scope = cast(dict[str, Any], current.scope)
        self._principal: Principal = self._scope[PRINCIPAL]
        self._websocket = current
        self._send_many: SendMany = (self._scope.get("extensions") or {}).get(SEND_MANY) or self._send_each
        self._wakeup = Wakeup()
        self._followers: dict[str, Follower] = {}
        self._started: dict[str, TaskRow] = {}
        self._replies: list[bytes] = []
        self._room = trio.lowlevel.ParkingLot()
        self._busy = False
        """Whether a frame is being worked on."""
        self._heard = False
        self._answering = 0
        """Cancels that are not answered yet."""
        self._controlled = False
        """Whether a control frame was ever sent: then the socket stays open after its last task."""
        self._quiet_since: float | None = trio.current_time()
        self._nursery: trio.Nursery

    async def serve(self) -> None:
        self._engine.drain_wakeups.add(self._wakeup)
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._send)
                while True:
                    message = await self._websocket.receive()
                    self._busy = self._heard = True
                    await self._receive(message)
                    self._busy = False
                    self._wakeup.wake()
                    while len(self._replies) > MAX_REPLIES:
                        await self._room.park()
        finally:
            self._engine.drain_wakeups.discard(self._wakeup)
            left_at = self._scope.get(LEFT_AT)
            if left_at is not None and any(row.policy == "cancel" for row in self._started.values()):
                self._metrics.cancelled(trio.current_time() - left_at)  # their runs have ended: so has the nursery
            for follower in self._followers.values():
                follower.close()

    # --- frames from the client

    async def _receive(self, message: str | bytes) -> None:
        """One frame. Whatever is wrong with it is answered, and the socket stays usable."""
        task_id = ""
        control: str | None = None
        try:
            if isinstance(message, bytes):
                raise InvalidRequest("A binary frame cannot be a task request; send JSON as text")
            data = message.encode()
            envelope = decode_json(data, Envelope, max_depth=self._limits.json_depth)
            if isinstance(envelope.task_id, str):
                task_id = envelope.task_id[:MAX_ECHO]
            if envelope.type is not UNSET:
                self._controlled = True
                control = envelope.type[:MAX_ECHO] if isinstance(envelope.type, str) else ""
                await self._control(control, data)
            else:
                await self._task(data)
        except HectorError as error:
            if control is None:
                self._reply(encode(refused(task_id, error)))
            else:
                self._reply(encode(Refusal(control, error.code, error.detail, task_id or UNSET)))
        except Exception:
            log.exception("frame_failed")
            self._reply(encode(refused(task_id, HectorError("An internal error; it has been logged"))))

    async def _task(self, data: bytes) -> None:
        request = decode_json(data, TaskRequest, max_depth=self._limits.json_depth)
        check_task_request(request)
        if len(self._started) >= self._limits.tasks_per_socket:
            raise RateLimited(f"{self._limits.tasks_per_socket} tasks run on this socket already")
        if not self._principal.may_write:
            raise self._principal.forbidden()
        order = Order(self._principal.owner, self._agent_id, request, "cancel")
        self._follow(await self._engine.submit(order, self._nursery))

    def _follow(self, accepted: Accepted) -> None:
        row = accepted.task
        if accepted.how == "created":
            self._started[row.task_id] = row
        if (before := self._followers.pop(row.task_id, None)) is not None:
            before.close()
        self._followers[row.task_id] = self._engine.follow(row, 0, self._wakeup).__enter__()

    async def _control(self, kind: str, data: bytes) -> None:
        depth = self._limits.json_depth
        if kind == "ping":
            ping = decode_json(data, PingFrame, max_depth=depth)
            if ping.id is not UNSET and len(encode(ping.id)) > MAX_ECHO:
                raise InvalidRequest(f"The id of a ping may have {MAX_ECHO} bytes")
            self._reply(encode({"type": "pong"} if ping.id is UNSET else {"type": "pong", "id": ping.id}))
        elif kind == "cancel":
            await self._cancel(decode_json(data, CancelFrame, max_depth=depth))
        else:
            raise InvalidRequest(f"There is no frame of type {kind[:64]!r}")

    async def _cancel(self, frame: CancelFrame) -> None:
        """Decides at once; the answer follows when the final chunk is committed, and no other frame waits for it."""
        reason = "requested" if frame.reason is UNSET else frame.reason[:200]
        rows = list(self._started.values())
        if frame.task_id is not UNSET:
            found = await self._engine.store.get_task(self._principal.owner, self._agent_id, frame.task_id)
            if found is None:
                raise TaskNotFound(f"There is no task {frame.task_id[:MAX_ECHO]!r}")
            rows = [found]
        if not self._principal.may_write:
            raise self._principal.forbidden()
        if self._answering >= self._limits.tasks_per_socket:
            raise RateLimited(f"{self._answering} cancels are being answered on this socket already")
        self._engine.stop(rows, reason)
        self._answering += 1
        self._nursery.start_soon(self._answer_cancel, rows, frame.task_id is UNSET)

    async def _answer_cancel(self, rows: list[TaskRow], every: bool) -> None:
        ended = [await self._engine.wait(row) for row in rows]
        self._answering -= 1
        if every:
            self._reply(encode(Ok("cancel", task_ids=[row.task_id for row in ended], status="cancelled")))
        else:
            (row,) = ended
            self._reply(encode(Ok("cancel", row.task_id, status=row.status, last_seq=row.last_seq)))

    def _reply(self, frame: bytes) -> None:
        self._replies.append(frame)
        self._wakeup.wake()

    # --- frames to the client

    async def _send(self) -> None:
        """Sends what is ready, task by task in turn, everything of a round in one write."""
        while True:
            frames: list[bytes] = []
            for task_id, follower in list(self._followers.items()):
                if follower.ready:
                    frames += await self._next(task_id, follower)
                    if sum(map(len, frames)) > ROUND_BYTES:
                        break  # those served stand at the end by now, so the others come next
            if self._replies:
                frames += self._replies
                self._replies = []
                self._room.unpark_all()
            if frames:
                self._quiet_since = None
                await self._send_many(frames)
                continue
            code, deadline = self._verdict()
            if trio.current_time() >= deadline:
                await self._websocket.close(code)
                self._nursery.cancel_scope.cancel()
                return
            if deadline == math.inf:
                await self._wakeup.wait()
            else:
                with trio.move_on_at(deadline):
                    await self._wakeup.wait()

    async def _next(self, task_id: str, follower: Follower) -> list[bytes]:
        """The next chunks of one task; after its last one it is no longer followed."""
        try:
            lines = await follower.read(BATCH)
            failure = follower.failure
        except HectorError as error:
            lines, failure = [], error
        if failure is not None:
            lines = [*lines, encode(refused(task_id, failure))]
        if self._followers.get(task_id) is follower:
            del self._followers[task_id]
            if failure is not None or follower.ended:
                follower.close()
                self._started.pop(task_id, None)
            else:
                self._followers[task_id] = follower
        return lines

    def _verdict(self) -> tuple[int, float]:
        """With what code, and when, the server closes if nothing more happens (``inf``: not at all)."""
        if self._busy or self._followers or self._started:
            self._quiet_since = None
            return 1000, math.inf
        if self._engine.draining:
            return 1012, -math.inf
        if self._quiet_since is None:
            self._quiet_since = trio.current_time()
        if not self._heard:
            return 1008, self._quiet_since + self._limits.first_message_timeout
        if self._controlled:
            return 1000, math.inf
        return 1000, self._quiet_since + self._limits.idle_after_final

    async def _send_each(self, frames: list[bytes]) -> None:
        """For servers that do not take a batch."""
        for frame in frames:
            await self._websocket.send(frame.decode())
