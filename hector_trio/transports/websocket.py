"""The WebSocket of an agent (PROTOCOL section 4): task requests in, chunks out, many tasks on one socket."""

from __future__ import annotations

import math
from base64 import b64decode
from itertools import groupby
from typing import Annotated, Any, Final

import msgspec
import structlog
import trio
from msgspec import UNSET, Meta, Struct, UnsetType
from quart import websocket

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
from hector_trio.log import Follower
from hector_trio.models import Content, Status, TaskRequest, encode
from hector_trio.task import TaskRow, decode_chunk
from hector_trio.transports import Services
from hector_trio.transports.problems import refused
from hector_trio.transports.quart_app import LEFT_AT, HectorQuart
from hector_trio.transports.requests import MAX_NUMBER, check_content, check_task_request, decode_json, invalid
from hector_trio.transports.routes import PRINCIPAL
from hector_trio.transports.sse import BEHIND_CHUNKS, Lag, starting_point
from hector_trio.transports.wires import VIEW, QuartWire, Shortcut, Wire
from hector_trio.wakeup import Wakeup

BATCH: Final = 64
"""Chunks that one task may put into a round before the next task's turn comes."""

AT_ONCE: Final = 512
"""Chunks of one task that leave in the moment they are committed; more are left to the sender."""

ROUND_BYTES: Final = 256 * 1024
"""About how much leaves in one round; who has not been served then is served first in the next."""

MAX_ECHO: Final = 128
"""Characters of a client's own words that an answer repeats."""

MAX_WINDOW: Final = 1_000_000
"""The widest window."""

UNSEEN_INTERVAL: Final = 0.5
"""Seconds between looks at tasks that a socket has started and does not follow."""

TOKEN_EXPIRED: Final = 4501
"""The close code for a client whose token no longer counts; it is not to come back with it."""

MAX_REPLIES: Final = 256
"""Answers to control frames that may wait for the socket before the next frame is read."""

log = structlog.stdlib.get_logger("hector_trio.websocket")


class Envelope(Struct, rename="camel"):
    """What tells a control frame from a task: only clients that send a ``type`` get frames with one."""

    type: Any = UNSET
    task_id: Any = UNSET
    window: Any = UNSET
    pause: Any = UNSET
    binary: Any = UNSET


class Viewing(Struct, frozen=True):
    """How a task is to be followed."""

    window: Annotated[int, Meta(ge=1, le=MAX_WINDOW)] | None = None
    """Frames of the task that may be unacknowledged."""
    pause: bool = False
    """Whether the agent waits when they are."""
    binary: bool = False
    """Whether chunks of bytes come as binary frames."""


class CancelFrame(Struct, rename="camel"):
    task_id: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class PingFrame(Struct):
    id: Any = UNSET


class AttachFrame(Struct, rename="camel"):
    task_id: str
    after: Annotated[int, Meta(ge=0, le=MAX_NUMBER)] = 0


class DetachFrame(Struct, rename="camel"):
    task_id: str


class InputFrame(Struct, rename="camel"):
    task_id: str
    input: Content


class CreditFrame(Struct, rename="camel"):
    task_id: str
    frames: Annotated[int, Meta(ge=1, le=MAX_WINDOW)]


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


def add_websocket(app: HectorQuart, services: Services) -> Shortcut:
    """Puts ``WS /agents/<id>/stream`` on ``app``, as the last of all that is put there; returns the application that
    stands before it and serves the same stream without it where that makes no difference."""

    @app.websocket("/agents/<agent_id>/stream", endpoint=VIEW)
    async def stream(agent_id: str) -> None:
        if agent_id not in services.engine.agents:
            raise AgentNotFound(f"There is no agent {agent_id!r}")
        if services.engine.draining:
            raise Draining("The server is shutting down; it takes no new streams", retry_after=5)
        if services.metrics.open_streams("websocket") >= services.settings.limits.sockets:
            raise RateLimited(
                f"{services.settings.limits.sockets} WebSockets are open; no more are taken", retry_after=5
            )
        wire = QuartWire(websocket._get_current_object())  # type: ignore[attr-defined]
        await Socket(services, agent_id, wire).serve()

    return Shortcut(app, services, lambda wire, agent_id: Socket(services, agent_id, wire).serve())


class BinaryFrame(bytes):
    """A frame that leaves as a binary one."""


class View:
    """A task that this socket follows."""

    __slots__ = (
        "_lag",
        "binary",
        "credit",
        "follower",
        "pauses",
        "window",
    )

    def __init__(self, follower: Follower, viewing: Viewing) -> None:
        self.follower = follower
        self.binary = viewing.binary
        self.window = viewing.window
        self.credit = viewing.window or 0
        """Frames that may be sent, where there is a window."""
        self.pauses = viewing.pause
        self._lag = Lag()
        self._pause()

    @property
    def ready(self) -> bool:
        if self.window is not None and self.credit <= 0 and not self.follower.ended:
            return False
        return self.follower.ready

    def grant(self, frames: int) -> None:
        """Raises: InvalidRequest without a window."""
        if self.window is None:
            raise InvalidRequest("The task is followed without a window, so there is nothing to grant")
        self.credit = min(self.window, self.credit + frames)
        self._pause()

    async def read(self, waited: float) -> list[bytes]:
        """The next frames, as many as it may have. ``waited``: seconds that the last write took.

        Raises: StoreUnavailable.
        """
        if self.window is None:
            lines = await self.follower.read(BATCH, join=self._lag.joins(self.follower, waited))
        else:
            waiting = self.follower.last_seq - self.follower.after
            join = waiting > max(self.credit, BEHIND_CHUNKS)
            lines = await self.follower.read(min(BATCH, self.credit), join=join)
            self.credit -= len(lines)
            self._pause()
        return [binary_frame(line) for line in lines] if self.binary else lines

    def take(self) -> list[bytes] | None:
        """What ``read`` would give at once to a viewer that keeps up; ``None``: ``read`` has to look."""
        if self.window is None:
            lines = self.follower.take(AT_ONCE)
            if lines:
                self._lag.caught_up()
            return lines
        lines = self.follower.take(self.credit)
        if lines:
            self.credit -= len(lines)
            self._pause()
        return lines

    def close(self) -> None:
        if self.pauses:
            self.follower.pause_at(None)
        self.follower.close()

    def _pause(self) -> None:
        if self.pauses:
            self.follower.pause_at(self.follower.after + self.credit)


def binary_frame(line: bytes) -> bytes:
    """A chunk of bytes as a binary frame (PROTOCOL 4); any other chunk as it is."""
    if b'"encoding":"base64"' not in line:
        return line
    chunk = decode_chunk(line)
    if chunk.encoding is UNSET or chunk.media_type is UNSET:
        return line  # it only speaks of one
    task_id, media_type = chunk.task_id.encode(), chunk.media_type.encode()
    head = b"\x01\x00%c%b%b%c%b" % (len(task_id), task_id, chunk.seq.to_bytes(8), len(media_type), media_type)
    return BinaryFrame(head + b64decode(chunk.content))


class Socket:
    """One connection and its one nursery: the reader, the sender, and the runs that die with it."""

    __slots__ = (
        "_agent_id",
        "_alarm",
        "_answering",
        "_binary",
        "_busy",
        "_controlled",
        "_ends",
        "_engine",
        "_heard",
        "_idle",
        "_limits",
        "_metrics",
        "_nursery",
        "_owed",
        "_principal",
        "_quiet_since",
        "_replies",
        "_room",
        "_scope",
        "_sending",
        "_started",
        "_until",
        "_views",
        "_waited",
        "_wakeup",
        "_wire",
    )

    def __init__(self, services: Services, agent_id: str, wire: Wire) -> None:
        self._engine = services.engine
        self._limits = services.settings.limits
        self._agent_id = agent_id
        self._metrics = services.metrics
        self._scope = wire.scope
        self._principal: Principal = self._scope[PRINCIPAL]
        self._until = trio.current_time() + self._principal.seconds_left
        """When the token expires, and the socket with it."""
        self._wire = wire
        self._wakeup = Wakeup()
        self._alarm = self._wake if wire.now is None else self._committed
        """What the tasks' logs call."""
        self._sending = False
        """Whether there is a sender: it ends where others can send, and starts it again, as long as it has no deadline
        to look after."""
        self._idle = True
        """Whether it has sent all it could."""
        self._owed = False
        """Whether the socket did not take all that was sent in the sender's place."""
        self._views: dict[str, View] = {}
        self._started: dict[str, TaskRow] = {}
        self._replies: list[bytes] = []
        """Said before the chunks of a round are read: an ``ok`` stands before what it begins, after what it ends."""
        self._ends: list[bytes] = []
        """Answers to cancels, said after the chunks of a round, among them the final ones."""
        self._room: trio.lowlevel.ParkingLot | None = None
        self._busy = False
        """Whether a frame is being worked on."""
        self._binary = False
        """Whether it was ever asked for binary frames."""
        self._waited = 0.0
        """Seconds that the client took for what was sent last."""
        self._heard = False
        self._answering = 0
        """Cancels that are not answered yet."""
        self._controlled = False
        """Whether a control frame was ever sent: then the socket stays open after its last task."""
        self._quiet_since: float | None = trio.current_time()
        self._nursery: trio.Nursery

    async def serve(self) -> None:
        """Accepts, and returns when both sides have nothing more to say; cancelled when the client has left."""
        await self._wire.accept()
        try:
            async with trio.open_nursery() as self._nursery:
                self._wire.tie(self._nursery.cancel_scope)
                self._wake()
                await self._read()
        finally:
            left_at = self._scope.get(LEFT_AT)
            if left_at is not None and any(row.policy == "cancel" for row in self._started.values()):
                self._metrics.cancelled(trio.current_time() - left_at)  # their runs have ended: so has the nursery

    def _wake(self) -> None:
        """Something may be there to be sent, or the time to close is another."""
        if self._sending:
            self._wakeup.wake()
        elif not self._nursery.cancel_scope.cancel_called:
            self._sending = True
            self._nursery.start_soon(self._send, name="sender")

    async def _read(self) -> None:
        with self._metrics.stream("websocket"):
            self._engine.drain_wakeups.add(self._wake)
            try:
                while True:
                    message = self._wire.said(await self._wire.receive())
                    if message is None:
                        await trio.sleep_forever()  # whoever was told of it cancels this
                    self._busy = self._heard = True
                    await self._receive(message)
                    self._busy = False
                    self._wake()
                    while len(self._replies) + len(self._ends) > MAX_REPLIES:
                        self._room = self._room or trio.lowlevel.ParkingLot()
                        await self._room.park()
            finally:
                self._engine.drain_wakeups.discard(self._wake)
                self._leave()

    def _leave(self) -> None:
        """Nobody watches from here any more, and what waits for input from here need not go on waiting."""
        for view in self._views.values():
            view.close()
        for row in self._started.values():
            self._engine.left(row)

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
                await self._control(control, data, envelope)
            else:
                await self._task(data, self._viewing(envelope, data))
        except HectorError as error:
            if control is None:
                self._reply(encode(refused(task_id, error)))
            else:
                self._reply(encode(Refusal(control, error.code, error.detail, task_id or UNSET)))
        except Exception:
            log.exception("frame_failed")
            self._reply(encode(refused(task_id, HectorError("An internal error; it has been logged"))))

    async def _task(self, data: bytes, viewing: Viewing) -> None:
        request = decode_json(data, TaskRequest, max_depth=self._limits.json_depth)
        check_task_request(request)
        if viewing.pause and viewing.window is None:
            raise invalid("/pause", "needs a window")
        self._check_room()
        self._check_write()
        order = Order(self._principal.owner, self._agent_id, request, "cancel")
        accepted = await self._engine.submit(order, self._nursery)
        started = accepted.how == "created"
        if started:
            self._started[accepted.task.task_id] = accepted.task
        self._follow(accepted.task, 0, viewing if started else msgspec.structs.replace(viewing, pause=False))

    def _viewing(self, envelope: Envelope, data: bytes) -> Viewing:
        if envelope.window is envelope.pause is envelope.binary is UNSET:
            return Viewing()
        found = decode_json(data, Viewing, max_depth=self._limits.json_depth)
        self._binary = self._binary or found.binary
        return found

    def _follow(self, row: TaskRow, after: int, viewing: Viewing) -> View:
        before = self._views.pop(row.task_id, None)
        follower = self._engine.follow(row, after, self._alarm, viewer=True).__enter__()
        if before is not None:
            before.close()  # only now: between them the task would have no viewer
        view = self._views[row.task_id] = View(follower, viewing)
        return view

    async def _control(self, kind: str, data: bytes, envelope: Envelope) -> None:
        depth = self._limits.json_depth
        if kind == "ping":
            ping = decode_json(data, PingFrame, max_depth=depth)
            if ping.id is not UNSET and len(encode(ping.id)) > MAX_ECHO:
                raise InvalidRequest(f"The id of a ping may have {MAX_ECHO} bytes")
            self._reply(encode({"type": "pong"} if ping.id is UNSET else {"type": "pong", "id": ping.id}))
        elif kind == "cancel":
            await self._cancel(decode_json(data, CancelFrame, max_depth=depth))
        elif kind == "attach":
            await self._attach(decode_json(data, AttachFrame, max_depth=depth), self._viewing(envelope, data))
        elif kind == "detach":
            await self._detach(decode_json(data, DetachFrame, max_depth=depth))
        elif kind == "input":
            await self._input(decode_json(data, InputFrame, max_depth=depth))
        elif kind == "credit":
            await self._credit(decode_json(data, CreditFrame, max_depth=depth))
        else:
            raise InvalidRequest(f"There is no frame of type {kind[:64]!r}")

    async def _attach(self, frame: AttachFrame, viewing: Viewing) -> None:
        if viewing.pause:
            raise invalid("/pause", "is only for whoever starts the task")
        if frame.task_id not in self._views:
            self._check_room()
        row = await self._find(frame.task_id)
        if not row.ended and frame.after > self._engine.last_seq(row):
            row = await self._engine.store.get_task_by_key(row.key) or row  # it may have moved on and ended since
        last = self._engine.last_seq(row)
        ended = row.ended and not self._engine.is_unfinished(row)
        begin = starting_point(ended=ended, last_seq=last, after=frame.after, last_event_id=None)
        view = self._follow(row, begin or 0, viewing)
        self._reply(encode(Ok("attach", row.task_id, status=view.follower.status, last_seq=view.follower.last_seq)))

    async def _detach(self, frame: DetachFrame) -> None:
        task_id = frame.task_id
        if task_id not in self._views and task_id not in self._started:
            raise TaskNotFound(f"Task {task_id[:MAX_ECHO]!r} is not followed on this socket")
        if task_id in self._started:
            row = self._started[task_id]
            await self._engine.detach(row)
            if row.policy == "cancel" and task_id in self._started:
                self._started[task_id] = msgspec.structs.replace(row, policy="continue")
        view = self._views.pop(task_id, None)
        status: Status | UnsetType = UNSET
        last_seq: int | UnsetType = UNSET
        if view is not None:
            status, last_seq = view.follower.status, view.follower.last_seq
            view.close()
        self._reply(encode(Ok("detach", task_id, status=status, last_seq=last_seq)))

    async def _input(self, frame: InputFrame) -> None:
        check_content(frame.input)
        row = await self._find(frame.task_id)
        self._check_write()
        row = await self._engine.answer(row, frame.input, self._nursery)
        if self._engine.runs_in(row, self._nursery):
            self._started[row.task_id] = row
        self._reply(encode(Ok("input", row.task_id, status=row.status, last_seq=row.last_seq)))

    async def _credit(self, frame: CreditFrame) -> None:
        """Credit for the last frames of a task comes when it is no longer followed, and changes nothing."""
        if (view := self._views.get(frame.task_id)) is not None:
            view.grant(frame.frames)
            status, last_seq = view.follower.status, view.follower.last_seq
        else:
            row = await self._find(frame.task_id)
            status, last_seq = row.status, self._engine.last_seq(row)
        self._reply(encode(Ok("credit", frame.task_id, status=status, last_seq=last_seq)))

    async def _cancel(self, frame: CancelFrame) -> None:
        """Decides at once; the answer follows when the final chunk is committed, and no other frame waits for it."""
        reason = "requested" if frame.reason is UNSET else frame.reason[:200]
        rows = list(self._started.values()) if frame.task_id is UNSET else [await self._find(frame.task_id)]
        self._check_write()
        if self._answering >= self._limits.tasks_per_socket:
            raise RateLimited(f"{self._answering} cancels are being answered on this socket already")
        self._engine.stop(rows, reason)
        self._answering += 1
        self._nursery.start_soon(self._answer_cancel, rows, reason, frame.task_id is UNSET)

    async def _answer_cancel(self, rows: list[TaskRow], reason: str, every: bool) -> None:
        try:
            ended = [await self._engine.cancel(row, reason) for row in rows]
        except HectorError as error:
            task_id = UNSET if every else rows[0].task_id
            self._ends.append(encode(Refusal("cancel", error.code, error.detail, task_id)))
        else:
            if every:
                self._ends.append(encode(Ok("cancel", task_ids=[row.task_id for row in ended], status="cancelled")))
            else:
                (row,) = ended
                self._ends.append(encode(Ok("cancel", row.task_id, status=row.status, last_seq=row.last_seq)))
        finally:
            self._answering -= 1
            self._wake()

    async def _find(self, task_id: str) -> TaskRow:
        row = await self._engine.find(self._principal.owner, self._agent_id, task_id)
        if row is None:
            raise TaskNotFound(f"There is no task {task_id[:MAX_ECHO]!r}")
        return row

    def _check_room(self) -> None:
        most = self._limits.tasks_per_socket
        if len(self._started) >= most:  # what it only answered ends unseen
            self._forget_ended()
        if len(self._started) >= most or len(self._views) >= most:
            raise RateLimited(f"{most} tasks run or are followed on this socket already")

    def _forget_ended(self) -> None:
        self._started = {name: row for name, row in self._started.items() if self._engine.is_unfinished(row)}

    def _check_write(self) -> None:
        if not self._principal.may_write:
            raise self._principal.forbidden()

    def _reply(self, frame: bytes) -> None:
        self._replies.append(frame)
        self._wake()

    # --- frames to the client

    def _committed(self) -> None:
        """More of some task's log is there to be read. What can be sent without waiting is sent here and now, on the
        way of the commit; the sender, which would be one more turn of the loop, is woken for the rest only."""
        if not (self._idle and self._send_now()):
            self._wake()

    def _send_now(self) -> bool:
        """Sends what is ready; whether the sender has nothing to do with it any more."""
        stream = self._wire.now
        if stream is None or self._replies or self._ends or self._binary or self._owed or stream.full:
            return False
        done = True
        frames: list[bytes] = []
        for view in self._views.values():
            if view.ready:
                lines = view.take()
                if lines is None:
                    done = False
                    continue
                frames += lines
                if view.follower.ended:
                    done = False
                elif len(frames) > BATCH and sum(map(len, frames)) > ROUND_BYTES:
                    done = False
                    break
        if frames:
            self._waited = 0.0
            if not stream.send_now(frames):
                self._owed = True
                return False
        return done

    async def _send(self) -> None:
        """Sends what is ready, task by task in turn, everything of a round in one write."""
        self._idle = False
        while True:
            if self._owed:
                await self._wire.send_many([])
                self._owed = False
            frames, self._replies = self._replies, []
            for task_id, view in list(self._views.items()):
                if view.ready:
                    frames += await self._next(task_id, view)
                    if sum(map(len, frames)) > ROUND_BYTES:
                        break  # those served stand at the end by now, so the others come next
            frames += self._ends
            self._ends = []
            if self._room is not None:
                self._room.unpark_all()
            if frames and trio.current_time() < self._until:
                self._quiet_since = None
                began = trio.current_time()
                if self._binary:
                    for binary, group in groupby(frames, lambda each: isinstance(each, BinaryFrame)):
                        await self._wire.send_many(list(group), binary=binary)
                else:
                    await self._wire.send_many(frames)
                self._waited = trio.current_time() - began
                continue
            code, deadline = self._verdict()
            if trio.current_time() >= deadline:
                await self._wire.close(code)
                self._nursery.cancel_scope.cancel()
                return
            self._idle = True
            if deadline < math.inf:
                with trio.move_on_at(deadline):
                    await self._wakeup.wait()
            elif self._wire.now is None or self._wakeup.is_set:
                await self._wakeup.wait()
            else:
                self._sending = False
                return
            self._idle = False

    async def _next(self, task_id: str, view: View) -> list[bytes]:
        """The next frames of one task; after its last one it is no longer followed. None of one that was given up or
        replaced while they were read."""
        try:
            frames = await view.read(self._waited)
            failure = view.follower.failure
        except HectorError as error:
            frames, failure = [], error
        if self._views.get(task_id) is not view:
            return []
        del self._views[task_id]
        if failure is not None:
            frames = [*frames, encode(refused(task_id, failure))]
        if failure is not None or view.follower.ended:
            view.close()
            if failure is None:
                self._started.pop(task_id, None)
        else:
            self._views[task_id] = view
        return frames

    def _verdict(self) -> tuple[int, float]:
        """With what code, and when, the server closes if nothing more happens (``inf``: not at all)."""
        code, deadline = self._quiet_verdict()
        return (code, deadline) if deadline < self._until else (TOKEN_EXPIRED, self._until)

    def _quiet_verdict(self) -> tuple[int, float]:
        if self._busy or self._views:
            self._quiet_since = None
            return 1000, math.inf
        if self._started:  # and not followed: nobody tells when they end
            self._forget_ended()
        if self._engine.draining and not any(map(self._engine.is_running, self._started.values())):
            return 1012, -math.inf  # what waits for input does so through the restart
        if self._started:
            self._quiet_since = None
            return 1000, trio.current_time() + UNSEEN_INTERVAL
        if self._quiet_since is None:
            self._quiet_since = trio.current_time()
        if not self._heard:
            return 1008, self._quiet_since + self._limits.first_message_timeout
        if self._controlled:
            return 1000, math.inf
        return 1000, self._quiet_since + self._limits.idle_after_final
