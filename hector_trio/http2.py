"""HTTP/2 on one connection of ``connection``: streams, windows, and what a peer may make us do, all with a bound.

``h2`` reads and makes the frames; the streams are those of HTTP/1.1 with another way to write. As there, everything
that decides is synchronous, and only a sender waits: for the socket, and here for the window that its peer opens.

- What a stream has not sent stays with the stream, and its application waits until all of it has left: at most one
  message each. A peer that opens no window for `send_timeout` loses the stream.
- What several streams say in one turn of the loop leaves in one write.
- What an application has not read is what the stream's window lets come; the window opens when it is taken.
- The reader pauses while the peer does not read our answers, or while too many applications of cancelled streams have
  not ended; frames that only make work, and streams beyond those it may open, are counted against a budget.
- WebSockets are spoken over HTTP/1.1 only.
"""

from __future__ import annotations

import re
from contextlib import suppress
from math import inf
from typing import Any, Final

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hypercorn.events import Event as ConnectionEvent
from hypercorn.events import RawData
from hypercorn.protocol.events import (
    Body,
    EndBody,
    Event,
    InformationalResponse,
    Request,
    Response,
    StreamClosed,
    Trailers,
)
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import ConnectionState
from hyperframe.frame import GoAwayFrame

from hector_trio.connection.bounds import Phase, contain
from hector_trio.connection.socket import Connection
from hector_trio.connection.streams import NO_GROUP, HttpRequest
from hector_trio.http1 import RawHeaders

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_STREAMS: Final = 100
"""Open streams of one connection; beyond: REFUSED_STREAM, which says that nothing was done (RFC 9113, 5.1.2)."""
MAX_RUNNING: Final = 2 * MAX_STREAMS
"""Applications of one connection that have not ended, with those whose stream was cancelled; beyond, reading stops."""
STREAM_WINDOW: Final = 65535
"""Bytes of a request's body that may come before the application has taken them (the protocol's default)."""
CONNECTION_WINDOW: Final = 1 << 20
"""The same, of all streams together."""
MAX_BACKLOG: Final = 1 << 18
"""Bytes queued for the socket beyond which no more is read: a peer that does not read is not answered for ever."""
MAX_COLLECTED: Final = 16384
"""Bytes of answers that wait for those of other streams, to leave with them."""
SLICE: Final = 8192
"""Bytes that are handled before others have their turn: nine hundred frames, if they are empty."""
PATIENCE: Final = 1000.0
"""Frames without use of their own (pings, settings, resets, refused streams, empty data) that a peer may send at once,
..."""
PATIENCE_PER_SECOND: Final = 100.0
"""... and that are forgiven each second. Beyond: ENHANCE_YOUR_CALM, the connection ends."""
SMALL_WINDOW: Final = 32
"""A window that is opened by less has no use: it would be filled by a frame that is mostly head."""

_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}\Z")
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*\Z")
_AUTHORITY: Final = re.compile(rb"[\x21-\x7e]+\Z")
_HOP: Final = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class Http2Stream(HttpRequest):
    """One request and its response."""

    def __init__(self, protocol: Http2, *args: Any) -> None:
        super().__init__(protocol.owner, *args)
        self.protocol = protocol
        self.complete = False
        """Whether all of the request has come."""
        self.head: RawHeaders | None = None
        """Of the response, while it waits for what leaves with it."""
        self.unsent = bytearray()
        self.trailers: RawHeaders | None = None
        self.said = False
        """Whether the application has said all of its response."""
        self.moved_at = 0.0
        """When a byte was sent, or the first that could not be was added."""
        self.moved = trio.lowlevel.ParkingLot()
        self.asked = False
        """Whether a client that waits for it was told to send the body (RFC 9110, 10.1.1)."""
        self.returned = False
        """Whether what the application has not taken counts no longer against the window of all."""

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Any:
        scope["extensions"].pop("http.response.push", None)
        self.protocol.running += 1
        return await super().spawn_app(app, config, scope, send)

    async def _run(self) -> None:
        try:
            await super()._run()
        finally:
            self.protocol.left()

    async def receive(self) -> Any:
        """As the base class; the peer may send as much again as was taken. A body of which nothing comes for
        `body_timeout` while it is wanted ends the stream."""
        if not self.complete and not self.closed:
            if (b"expect", b"100-continue") in self.scope["headers"] and not self.asked:
                self.asked = True
                await self.protocol.stream_send(InformationalResponse(self.stream_id, headers=[], status_code=100))
            with trio.move_on_after(self.owner.limits.body_timeout) as scope:
                return self._taken(await self.inbox.receive())
            if scope.cancelled_caught:
                await self.protocol.reset(self, ErrorCodes.CANCEL)
        return self._taken(await self.inbox.receive())

    def _taken(self, message: Any) -> Any:
        if message["type"] == "http.request" and not self.returned:
            self.protocol.acknowledge(len(message["body"]), self.stream_id)
        return message

    async def app_send(self, message: Any) -> None:
        if not self.closed:
            await HTTPStream.app_send(self, message)
        await self.owner.pace()
        while self.unsent:
            await self.moved.park()

    async def respond(self, status: int, headers: RawHeaders, body: bytes) -> None:
        if not self.closed:
            start: Any = {"type": "http.response.start", "status": status, "headers": headers}
            await HTTPStream.app_send(self, start)
        await self.app_send({"type": "http.response.body", "body": body, "more_body": False})


class Http2:
    """The protocol object of a connection, in the place of HTTP/1.1's. Its methods never wait, except `room`, and
    `handle` for its turn."""

    stream: None = None
    """There is no WebSocket."""

    def __init__(self, owner: Connection, client: tuple[str, int] | None, server: tuple[str, int] | None) -> None:
        self.owner = owner
        self.running = 0
        """Applications that have not ended."""
        self._client, self._server = client, server
        self._state = ConnectionState(owner.state)
        self._streams: dict[int, Http2Stream] = {}
        """Those that are open, or whose response has not left."""
        self._draining = False
        self._opened = False
        """Whether windows of more than one stream have."""
        self._patience, self._patient_at = PATIENCE, trio.current_time()
        self._ended = trio.lowlevel.ParkingLot()
        self._collected = 0
        """Bytes of answers that wait to leave together."""
        self._collector: trio.lowlevel.ParkingLot | None = None
        """Where the task that lets them leave waits; made for the second stream that is open at a time."""
        limit = owner.limits.max_header_bytes
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: limit,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            },
        )
        self._h2.decoder.max_header_list_size = limit
        self._h2.initiate_connection()
        # It has been said. To h2 one stream more would be the end of the connection; here it is refused by itself.
        del self._h2.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS]
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - STREAM_WINDOW)
        self._flush()
        self._settle()

    # ---- from the peer

    async def handle(self, event: ConnectionEvent) -> None:
        """Take bytes, or the end of the connection. Whatever fails ends this connection and no other."""
        try:
            if isinstance(event, RawData):
                await self._receive(event.data)
            else:
                await self._leave_all()
        except ProtocolError:
            self._flush()  # h2 has made the GOAWAY that says why
            await self._end()
        except (Exception, BaseExceptionGroup) as error:
            self.owner.reset("sent what could not be handled")
            contain(error, "A connection failed")

    async def _receive(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE):
            if start:
                await trio.lowlevel.checkpoint()
            if self.owner.gone or self.owner.finishing:
                return
            for event in self._h2.receive_data(data[start : start + SLICE]):
                await self._take(event)
                if self.owner.finishing:
                    return
            if self._opened:  # once for all of them: a peer may say so a thousand times
                self._opened = False
                await self._send_all()
            self._flush()
        self._settle()

    async def _take(self, event: object) -> None:
        if isinstance(event, RequestReceived):
            assert event.stream_id is not None
            assert event.headers is not None
            await self._begin(event.stream_id, event.headers, event.stream_ended is not None)
        elif isinstance(event, DataReceived):
            await self._take_data(event)
        elif isinstance(event, StreamEnded):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None:
                stream.complete = True
                await stream.handle(EndBody(stream.stream_id))
        elif isinstance(event, StreamReset):
            stream = self._streams.get(event.stream_id or 0)
            if stream is not None:
                await self._drop(stream)
            await self._bear()
        elif isinstance(event, WindowUpdated):
            stream = self._streams.get(event.stream_id or 0)
            if event.stream_id == 0:
                self._opened = True
            elif stream is not None:
                await self._go_on(stream)
            if (event.delta or 0) < SMALL_WINDOW:
                await self._bear()
        elif isinstance(event, RemoteSettingsChanged):
            self._opened = True
            await self._bear()
        elif isinstance(event, ConnectionTerminated):
            await self._end()
        elif isinstance(event, PingReceived | PriorityUpdated | UnknownFrameReceived):
            await self._bear()

    async def _bear(self) -> None:
        """Count a frame that has no use of its own, and end the connection when there are too many."""
        now = trio.current_time()
        self._patience = min(PATIENCE, self._patience + (now - self._patient_at) * PATIENCE_PER_SECOND) - 1
        self._patient_at = now
        if self._patience < 0:
            self._say_goodbye(ErrorCodes.ENHANCE_YOUR_CALM)
            await self._end()

    async def _take_data(self, event: DataReceived) -> None:
        stream_id, data, size = event.stream_id or 0, event.data or b"", event.flow_controlled_length or 0
        stream = self._streams.get(stream_id)
        if stream is None or stream.closed:
            self.acknowledge(size, stream_id)
            return
        self.acknowledge(size - len(data), stream_id)  # padding
        if data:
            await stream.handle(Body(stream_id, data))
        elif event.stream_ended is None:
            await self._bear()

    async def _begin(self, stream_id: int, given: Any, complete: bool) -> None:
        """A complete head: refuse it here, or give it to the application."""
        if self._draining or len(self._streams) >= MAX_STREAMS:
            with suppress(ProtocolError):  # the peer has reset it already
                self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            await self._bear()
            return
        pseudo, headers = split(given)
        fault = head_fault(pseudo, headers)
        if fault:
            head = [(b":status", b"%d" % fault), (b"content-length", b"0")]
            with suppress(ProtocolError):
                self._h2.send_headers(stream_id, head, end_stream=True)
                if not complete:
                    self._h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            return
        owner = self.owner
        stream = self._streams[stream_id] = Http2Stream(
            self, owner.app, owner.config, owner.context, NO_GROUP, owner.tls, self._client, self._server,
            self.stream_send, stream_id,
        )  # fmt: skip
        await stream.handle(
            Request(
                stream_id=stream_id,
                headers=headers,
                http_version="2",
                method=pseudo[b":method"].decode(),
                raw_path=pseudo[b":path"],
                state=self._state,
            )
        )
        await owner.context.mark_request()

    def acknowledge(self, size: int, stream_id: int) -> None:
        """Let the peer send *size* bytes more, on the stream (if it is there still) and in all."""
        if size and not self.owner.finishing:
            with suppress(ProtocolError):
                self._h2.acknowledge_received_data(size, stream_id)
                self._flush()

    @property
    def is_ahead(self) -> bool:
        """Whether nothing more is to be read for a while."""
        return self.running > MAX_RUNNING or self.owner.backlog > MAX_BACKLOG

    async def room(self) -> None:
        """Wait, in the reader, until that is over; `send_timeout` holds for a peer that does not read."""
        while self.is_ahead:
            if self.owner.backlog > MAX_BACKLOG:
                await self.owner.emptied()
            else:
                await self._ended.park()

    def left(self) -> None:
        """An application has ended."""
        self.running -= 1
        self._ended.unpark_all()

    # ---- to the peer

    async def stream_send(self, event: Event) -> None:
        """What a stream says. Nothing is sent for one that the peer has reset meanwhile."""
        stream = self._streams.get(event.stream_id)
        if stream is None or self.owner.finishing:
            return
        try:
            if isinstance(event, Response):
                self._respond(stream, event)
            elif isinstance(event, InformationalResponse):
                self._h2.send_headers(stream.stream_id, _head(event.status_code, event.headers))
                self._flush()
            elif isinstance(event, Body):
                if not stream.unsent:
                    stream.moved_at = trio.current_time()
                stream.unsent += event.data
                self._send_some(stream)
            elif isinstance(event, Trailers):
                stream.trailers = [*(stream.trailers or ()), *event.headers]
            elif isinstance(event, EndBody):
                stream.said = True
                self._send_some(stream)
            elif isinstance(event, StreamClosed):
                await self._closed(stream)
        except ProtocolError:
            await self.reset(stream, ErrorCodes.INTERNAL_ERROR)  # the peer has done so too, or a header is no header

    def _respond(self, stream: Http2Stream, event: Response) -> None:
        stream.head = _head(event.status_code, [*event.headers, *self.owner.server.response_headers(stream.config)])
        for name, _ in stream.head:
            if name in (b"content-length", b"grpc-status"):
                return  # leaves with its body, or is all there is
        self._write_head(stream)
        self._flush_soon()

    def _write_head(self, stream: Http2Stream, *, end: bool = False) -> None:
        if stream.head is not None:
            head, stream.head = stream.head, None
            self._h2.send_headers(stream.stream_id, head, end_stream=end)

    async def _send_all(self) -> None:
        """A window has opened for all: one frame each in turn, as long as there is room."""
        waiting = before = [stream for stream in self._streams.values() if stream.unsent]
        while waiting:
            waiting = [stream for stream in waiting if self._send_frame(stream)]
        for stream in before:
            if not stream.unsent:
                await self._go_on(stream)

    async def _go_on(self, stream: Http2Stream) -> None:
        """Its window has opened."""
        try:
            self._send_some(stream)
        except ProtocolError:
            await self.reset(stream, ErrorCodes.INTERNAL_ERROR)

    def _send_some(self, stream: Http2Stream) -> None:
        """Send what the windows allow, and the end when all has left."""
        while self._send_frame(stream):
            pass
        if stream.said and not stream.unsent:
            if stream.trailers:
                self._write_head(stream)
                self._h2.send_headers(stream.stream_id, stream.trailers, end_stream=True)
            elif stream.head is not None:
                self._write_head(stream, end=True)
            else:
                self._h2.end_stream(stream.stream_id)
            self._forget(stream)
        self._flush_soon()
        if stream.unsent:
            self.owner.deadline = min(self.owner.deadline, stream.moved_at + self.owner.limits.send_timeout)

    def _send_frame(self, stream: Http2Stream) -> bool:
        """Send one frame of data; False: there is nothing, or no room."""
        if not stream.unsent:
            return False
        self._write_head(stream)
        room = min(self._h2.local_flow_control_window(stream.stream_id), self._h2.max_outbound_frame_size)
        if room <= 0:
            return False
        data = bytes(memoryview(stream.unsent)[:room])
        self._h2.send_data(stream.stream_id, data)
        del stream.unsent[:room]
        self._collected += len(data)
        stream.moved_at = trio.current_time()
        if not stream.unsent:
            stream.moved.unpark_all()
        return True

    def _flush_soon(self) -> None:
        """As `_flush`, but with what others of several streams say until it is the turn of the collector."""
        if len(self._streams) < 2 or self._collected > MAX_COLLECTED:
            self._flush()
        elif self._collector is not None:
            self._collector.unpark_all()
        else:
            self._collector = trio.lowlevel.ParkingLot()
            self.owner.spawn(self._collect, "collector")

    async def _collect(self) -> None:
        assert self._collector is not None
        while not self.owner.gone and not self.owner.finishing:
            self._flush()
            await self._collector.park()

    def _flush(self) -> None:
        self._collected = 0
        data = self._h2.data_to_send()
        if data:
            self.owner.write(data)

    # ---- ends

    async def _closed(self, stream: Http2Stream) -> None:
        """The application has no more to say: that was all, or its response stays incomplete."""
        if stream.said:
            await stream.handle(StreamClosed(stream.stream_id))
        else:
            await self.reset(stream, ErrorCodes.INTERNAL_ERROR)

    def _forget(self, stream: Http2Stream) -> None:
        """All of the response has left."""
        self._streams.pop(stream.stream_id, None)
        if not stream.complete:
            self._h2.reset_stream(stream.stream_id, ErrorCodes.NO_ERROR)  # the rest of the request is not wanted
        self._return(stream)
        self._settle()

    async def reset(self, stream: Http2Stream, code: ErrorCodes) -> None:
        """End a stream from our side."""
        with suppress(ProtocolError):
            self._h2.reset_stream(stream.stream_id, code)
        self._flush()
        await self._drop(stream)

    async def _drop(self, stream: Http2Stream) -> None:
        """A stream has ended before its response had left: its application is told."""
        self._streams.pop(stream.stream_id, None)
        stream.unsent.clear()
        stream.moved.unpark_all()
        self._return(stream)
        await stream.handle(StreamClosed(stream.stream_id))
        self._settle()

    def _return(self, stream: Http2Stream) -> None:
        """What an application will not take any more counts no longer against the window of all."""
        if not stream.returned:
            stream.returned = True
            self.acknowledge(stream.inbox.bytes, stream.stream_id)

    def _settle(self) -> None:
        """Set the deadline: of the stream that has stalled longest, or of an idle connection."""
        owner, limits = self.owner, self.owner.limits
        if owner.finishing or owner.gone:
            return
        if not self._streams:
            owner.wait_for(Phase.IDLE, 0 if self._draining else limits.keep_alive_timeout)
            return
        stalled = min((each.moved_at for each in self._streams.values() if each.unsent), default=None)
        owner.wait_for(Phase.BODY, inf)
        if stalled is not None:
            owner.deadline = stalled + limits.send_timeout

    async def time_out(self) -> None:
        """A stream's peer has opened no window in time."""
        latest = trio.current_time() - self.owner.limits.send_timeout
        for stream in [each for each in self._streams.values() if each.unsent and each.moved_at <= latest]:
            await self.reset(stream, ErrorCodes.CANCEL)
        self._settle()

    def drain(self) -> None:
        """The server is shutting down: what is open may end, nothing is begun. Idempotent."""
        if not self._draining:
            self._draining = True
            self._say_goodbye(ErrorCodes.NO_ERROR)

    def leave(self) -> None:
        """End a connection on which nothing is open."""
        if not self._draining:
            self._say_goodbye(ErrorCodes.NO_ERROR)
        self.owner.finish()

    def _say_goodbye(self, code: ErrorCodes) -> None:
        """A GOAWAY past h2, which would let nothing be sent after it."""
        frame = GoAwayFrame(0, last_stream_id=self._h2.highest_inbound_stream_id, error_code=int(code))
        self._flush()
        self.owner.write(frame.serialize())

    async def _end(self) -> None:
        """Nothing more is read or written."""
        self.owner.finish()
        await self._leave_all()

    async def _leave_all(self) -> None:
        for stream in list(self._streams.values()):
            await self._drop(stream)
        if self._collector is not None:
            self._collector.unpark_all()


# --- decided without I/O ----------------------------------------------------------------------------------------------


def split(given: Any) -> tuple[dict[bytes, bytes], RawHeaders]:
    """The pseudo-headers and the headers of a head, ``host`` for ``:authority``, one ``cookie`` (RFC 9113, 8.2.3)."""
    pseudo: dict[bytes, bytes] = {}
    headers: RawHeaders = []
    cookies: list[bytes] = []
    for name, value in given:
        if name.startswith(b":"):
            pseudo[bytes(name)] = bytes(value)
        elif name == b"cookie":
            cookies.append(bytes(value))
        else:
            headers.append((bytes(name), bytes(value)))
    if cookies:
        headers.append((b"cookie", b"; ".join(cookies)))
    authority = pseudo.get(b":authority")
    if authority is not None and all(name != b"host" for name, _ in headers):
        headers.insert(0, (b"host", authority))
    return pseudo, headers


def head_fault(pseudo: dict[bytes, bytes], headers: RawHeaders) -> int | None:
    """The status with which a request is refused before an application sees it."""
    if pseudo.get(b":method") == b"CONNECT" or b":protocol" in pseudo:
        return 501  # among them WebSockets over HTTP/2 (RFC 8441), which our settings do not offer
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if _METHOD.match(method) is None or method != method.upper():
        return 400
    if _TARGET.match(path) is None and (method, path) != (b"OPTIONS", b"*"):
        return 400
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or _AUTHORITY.match(hosts[0]) is None or pseudo.get(b":authority", hosts[0]) != hosts[0]:
        return 400
    return None


def _head(status: int, headers: Any) -> RawHeaders:
    """As HTTP/2 has it: names in lower case, none that speaks of the connection (RFC 9113, 8.2.2)."""
    head = [(b":status", b"%d" % status)]
    return head + [(low, value) for name, value in headers if (low := name.lower()) not in _HOP]
