"""HTTP/1.1 on one connection: its requests one after the other, and the upgrade to a WebSocket."""

from __future__ import annotations

from collections.abc import Awaitable
from math import inf
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import h11
import trio
from hypercorn.events import Event as ConnectionEvent
from hypercorn.events import RawData
from hypercorn.protocol.events import Body, Data, EndBody, Event, Request, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.typing import ConnectionState

from hector_trio import frames, http1
from hector_trio.connection.bounds import Phase, contain
from hector_trio.connection.streams import NO_GROUP, HttpRequest
from hector_trio.connection.websocket import WebSocket

if TYPE_CHECKING:
    from hector_trio.connection.socket import Connection

BODY_AHEAD = 262144
"""Bytes of a request body read ahead of the application."""


class Http1(H11Protocol):
    """HTTP/1.1 on one connection, and its upgrade to a WebSocket. Its methods never wait, except `room` and `handle`
    in the reader."""

    def __init__(self, owner: Connection, client: tuple[str, int] | None, server: tuple[str, int] | None) -> None:
        # Instead of the base class's own, which makes a parser and an event that most connections never need
        self.app, self.config, self.context = owner.app, owner.config, owner.context
        self.client, self.server, self.ssl = client, server, owner.tls
        self.send = owner.protocol_send
        self.task_group = NO_GROUP
        self.keep_alive_requests = 0
        self.stream: HttpRequest | WebSocket | None = None
        self.connection_state = ConnectionState(owner.state)
        self.owner = owner
        self._h11: h11.Connection | H11WSConnection | None = None
        self._head = b""
        """A response head that waits for its body, so that both leave in one write."""
        self._only_head = False
        """Whether the request is a HEAD, whose answer has no body."""
        self._skipped = False
        """Whether an empty line was found in front of this request."""
        self._paused = False
        self._recycled: trio.lowlevel.ParkingLot | None = None
        self._ordinary: http1.Ordinary | None = None
        """The request that is being answered, if h11 has not been told of it."""
        self._answered: tuple[http1.Head, int, http1.RawHeaders] | None = None
        """The head of its answer, its status and its headers, as long as it waits for its body."""
        self._complete = False
        """Whether its answer is."""
        self._upgraded = False
        """Whether what the client sends belongs to a WebSocket of which h11 was not told."""

    @property
    def connection(self) -> h11.Connection | H11WSConnection:
        """h11's view, made when there is something to ask."""
        if self._h11 is None:
            self._h11 = self._parser(b"")
        return self._h11

    @connection.setter
    def connection(self, parser: h11.Connection | H11WSConnection) -> None:
        self._h11 = parser

    def _parser(self, data: bytes) -> h11.Connection:
        """The parser of a connection on which *data* was received first."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self.owner.limits.max_header_bytes)
        if data:
            parser.receive_data(data)
        return parser

    async def handle(self, event: ConnectionEvent) -> None:
        """Take bytes, or the end of the connection."""
        if type(event) is RawData:
            if self._upgraded:
                if self.stream is not None:
                    await self._contained(self.stream.handle(Data(STREAM_ID, event.data)))
                return
            parser = self._h11
            unread = parser is not None and (parser.their_state is not h11.IDLE or parser.trailing_data[0])
            if self.stream is None and not unread:
                request = http1.ordinary(event.data, self.owner.limits.max_header_bytes)
                if request is not None:
                    await self._contained(self._upgrade(request) if request.upgrade else self._start_ordinary(request))
                    return
        await self._contained(super().handle(event))

    async def _upgrade(self, request: http1.Ordinary) -> None:
        """Give a faultless handshake to the application."""
        self._ordinary, self._upgraded = request, True
        self.owner.wait_for(Phase.ANSWER, inf)
        self.keep_alive_requests += 1
        stream = self.stream = WebSocket(self.owner, *self._stream_arguments())
        await stream.handle(Request(STREAM_ID, request.headers, "1.1", "GET", request.target, self.connection_state))
        if stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        await self.context.mark_request()

    async def _start_ordinary(self, request: http1.Ordinary) -> None:
        """Give a whole request to the application, all at once."""
        self._ordinary = request
        self._only_head = request.method == "HEAD"
        self._complete = False
        self.owner.wait_for(Phase.ANSWER, inf)
        self.keep_alive_requests += 1
        stream = self.stream = HttpRequest(self.owner, *self._stream_arguments())
        _, method, target, headers, body, _ = request
        await stream.handle(Request(STREAM_ID, headers, "1.1", method, target, self.connection_state))
        if stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        stream.inbox.put({"type": "http.request", "body": body, "more_body": False}, len(body))
        await self.context.mark_request()

    def _tell_parser(self) -> None:
        """Something about the answer is not ordinary: let h11 continue, as if it had read the request."""
        request, answered = self._ordinary, self._answered
        self._ordinary = self._answered = None
        self._complete = False
        if request is not None and request.upgrade:
            parser = self._parser(request.data)
            parser.next_event()
            self.connection = H11WSConnection(parser)
        elif request is not None:
            self.connection = self._parser(request.data + self.connection.trailing_data[0])
            while type(self.connection.next_event()) is not h11.EndOfMessage:
                pass
            if answered is not None:
                _, status, headers = answered
                self._head = self._encode(h11.Response(status_code=status, headers=headers))

    async def _contained(self, step: Awaitable[None]) -> None:
        """Whatever fails while bytes are handled ends this connection and no other."""
        try:
            await step
        except (Exception, BaseExceptionGroup) as error:
            self.owner.reset("sent what could not be handled")
            contain(error, "A connection failed")

    @property
    def is_ahead(self) -> bool:
        """Whether the client is so far ahead of the application that the reader is to wait."""
        stream = self.stream
        if isinstance(stream, HttpRequest) and stream.inbox.bytes > BODY_AHEAD:
            return True
        return self._paused and len(self.connection.trailing_data[0]) > self.owner.limits.max_header_bytes

    async def room(self) -> None:
        """Wait, in the reader, until the client is no longer too far ahead of the application."""
        owner = self.owner
        stream = self.stream
        if isinstance(stream, HttpRequest) and stream.inbox.bytes > BODY_AHEAD:
            owner.deadline = inf
            await stream.inbox.wait_below(BODY_AHEAD // 2)
            if owner.phase is Phase.BODY:
                owner.wait_for(Phase.BODY, owner.limits.body_timeout)
        else:
            # Not reading also means not noticing that the client has left: for a while only.
            with trio.move_on_after(owner.limits.header_timeout) as scope:
                self._recycled = self._recycled or trio.lowlevel.ParkingLot()
                await self._recycled.park()
            if scope.cancelled_caught:
                owner.reset("sent more than it waits for")

    async def time_out(self) -> None:
        """A head or a body was not completed in time."""
        if self.connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(408)
        self.owner.finish()
        await self._close_stream()

    async def _handle_events(self) -> None:
        connection = self.connection
        if isinstance(connection, H11WSConnection):
            passed = connection.next_event()
            if isinstance(passed, Data) and self.stream is not None:
                await self.stream.handle(passed)
            return
        self._paused = self._ordinary is not None
        if self._paused:
            return
        if connection.their_state is h11.IDLE:
            if not self._begins():
                return
            connection = self.connection
        while not self.owner.finishing and self.connection is connection:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    self._answer(error.error_status_hint)
                self.owner.finish()
                await self._close_stream()
                return
            if isinstance(event, h11.Request):
                await self._start(event)
            elif isinstance(event, h11.Data) and self.stream is not None:
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
                self.owner.wait_for(Phase.ANSWER, inf)
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            else:
                self._paused = event is h11.PAUSED
                return
        if self.connection is not connection:
            await self._handle_events()  # upgraded: what followed the request is early data

    def _begins(self) -> bool:
        """Whether what was received may be the begin of a head. One empty line before it is dropped (RFC 9112, 2.2),
        and a head that is too long is refused although it came in one piece, which the parser lets pass."""
        owner = self.owner
        data = self.connection.trailing_data[0]
        if not self._skipped and data.startswith(b"\r"):
            if data == b"\r":
                return False
            if data.startswith(b"\r\n"):
                self._skipped = True
                data = data[2:]
                self.connection = self._parser(data)
                if not data and self.keep_alive_requests:
                    owner.wait_for(Phase.IDLE, owner.limits.keep_alive_timeout)
        if frames.head_too_long(data, owner.limits.max_header_bytes):
            self._answer(431)
            owner.finish()
            return False
        return bool(data)

    def ask_for_body(self) -> None:
        """The application wants the body: tell a client that waits for it to be wanted (RFC 9110, 10.1.1)."""
        if self._ordinary is None and self.connection.they_are_waiting_for_100_continue:
            self.owner.write(self._encode(h11.InformationalResponse(status_code=100, headers=[])))
            self.owner.wait_for(Phase.BODY, self.owner.limits.body_timeout)

    async def _start(self, request: h11.Request) -> None:
        """A complete head: refuse it here, or give it to the application."""
        self._only_head = request.method == b"HEAD"
        upgrade = frames.wants_websocket(request)
        fault = frames.request_fault(request) or (upgrade and frames.handshake_fault(request))
        if fault:
            self._answer(fault)
            self.owner.finish()
            return
        target = request.target
        if not target.startswith((b"/", b"*")):
            # The absolute form, which every server must accept (RFC 9112, 3.2.2)
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
        connection = self.connection
        if upgrade:
            self.stream = WebSocket(self.owner, *self._stream_arguments())
            self.connection = H11WSConnection(cast(h11.Connection, connection))
            self.owner.wait_for(Phase.ANSWER, inf)
        else:
            self.stream = HttpRequest(self.owner, *self._stream_arguments())
            waiting = connection.they_are_waiting_for_100_continue  # we for the application, the client for us
            self.owner.wait_for(Phase.BODY, inf if waiting else self.owner.limits.body_timeout)
        self.keep_alive_requests += 1
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=frames.joined(request.headers) if upgrade else list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=target,
                state=self.connection_state,
            )
        )
        if self.stream.closed:
            self.owner.finish()  # refused by Hypercorn, for its server name
        await self.context.mark_request()

    def _stream_arguments(self) -> tuple[Any, ...]:
        return (
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )

    def _answer(self, status: int) -> None:
        """A response that no application gives, after which the connection ends."""
        headers, body = frames.problem(status, str(uuid4()))
        data = self._encode(h11.Response(status_code=status, headers=headers))
        if not self._only_head:
            data += self._encode(h11.Data(data=body))
        self.owner.write(data + self._encode(h11.EndOfMessage()))

    async def stream_send(self, event: Event) -> None:
        kind = type(event)
        if kind is Response and cast(Response, event).status_code >= 200:
            self._respond(cast(Response, event))
        elif kind is Body:
            self._write_body(cast(Body, event).data)
        elif kind is EndBody:
            self._write_end()
        elif kind is not Response or not self._switch(cast(Response, event)):
            await super().stream_send(event)

    def _switch(self, event: Response) -> bool:
        """Write the 101 to a handshake of which h11 was not told, unless there is something about it to be checked."""
        if self._ordinary is None:
            return False
        data = http1.switching([*event.headers, *self.owner.server.response_headers(self.config)])
        if data is None:
            self._tell_parser()
            return False
        self._ordinary = None
        self.owner.write(data)
        return True

    def answer(self, stream: HttpRequest, status: int, headers: http1.RawHeaders, body: bytes) -> bool:
        """Write the whole answer to an ordinary request. False, and nothing is done, if one of both is not ordinary."""
        if self._ordinary is None or stream is not self.stream:
            return False
        head = http1.answer_head(self._ordinary.method, status, self._completed(headers))
        if head is None or not (head.bodiless or head.size == len(body)):
            return False
        self.owner.write(head.data if head.bodiless else head.data + body)
        self._complete = True
        return True

    def _completed(self, headers: http1.RawHeaders) -> http1.RawHeaders:
        headers = [*headers, *self.owner.server.response_headers(self.config)]
        if self._is_last():
            headers = [each for each in headers if each[0].lower() != b"connection"]
            headers.append((b"connection", b"close"))  # RFC 9112, 9.6
        return headers

    def _is_last(self) -> bool:
        """Whether the connection ends with this answer: also if more of its request is to come, which is not read."""
        return (
            self.context.terminated.is_set()
            or isinstance(self.stream, WebSocket)
            or self.keep_alive_requests >= self.config.keep_alive_max_requests
            or (self._ordinary is None and self.connection.their_state is h11.SEND_BODY)
        )

    def _respond(self, event: Response) -> None:
        headers = self._completed(event.headers)
        if self._ordinary is not None and not self._ordinary.upgrade:
            head = http1.answer_head(self._ordinary.method, event.status_code, headers)
            if head is not None:
                self._answered = head, event.status_code, headers
                return
        self._tell_parser()
        self._head = self._encode(h11.Response(status_code=event.status_code, headers=headers))
        if not any(name.lower() == b"content-length" for name, _ in headers):
            self._write_head()  # a stream: its client wants to know now that it has begun

    def _write_body(self, data: bytes) -> None:
        if self._answered is not None and len(data) == self._answered[0].size:
            self.owner.write(self._answered[0].data + data)
            self._answered, self._complete = None, True
            return
        self._tell_parser()
        self._write(h11.Data(data=data))

    def _write_end(self) -> None:
        if self._complete:
            return
        if self._answered is not None and not self._answered[0].size:
            self.owner.write(self._answered[0].data)
            self._answered, self._complete = None, True
            return
        self._tell_parser()
        self._write(h11.EndOfMessage())

    def _write(self, event: h11.Data | h11.EndOfMessage) -> None:
        data = self._head + self._encode(event)
        self._head = b""
        if data:
            self.owner.write(data)

    def _write_head(self) -> None:
        if self._head:
            self.owner.write(self._head)
            self._head = b""

    def _encode(self, event: h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage) -> bytes:
        try:
            return self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is h11.ERROR:
                return b""  # the client broke the protocol and has been told so
            raise

    async def _maybe_recycle(self) -> None:
        """The response is complete, or never will be: get ready for the next request, or end the connection."""
        if not self._complete:
            self._tell_parser()
            self._write_head()
        await self._close_stream()
        if self._upgraded:
            self.owner.finish()
            return
        connection = self.connection
        if self._recycled is not None:
            self._recycled.unpark_all()
        reusable = self._complete or (connection.our_state is h11.DONE and connection.their_state is h11.DONE)
        if self.context.terminated.is_set() or not reusable:
            self.owner.finish()
            return
        if self._complete:
            self._ordinary, self._complete = None, False
        else:
            connection.start_next_cycle()
        self._only_head = self._skipped = False
        self.owner.wait_for(Phase.IDLE, self.owner.limits.keep_alive_timeout)
        if connection.trailing_data[0]:
            self.owner.wait_for(Phase.HEAD, self.owner.limits.header_timeout)
            await self._contained(self._handle_events())
