"""The stream of a WebSocket: frames, messages, heartbeats and both ends of its closing handshake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from time import time
from typing import TYPE_CHECKING, Any, cast

import trio
from hypercorn.protocol.events import Data, Event, Response, StreamClosed
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WebsocketBuffer, WSStream
from hypercorn.trio.task_group import TaskGroup
from wsproto.connection import Connection as WebSocketParser
from wsproto.connection import ConnectionState as ParserState
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage
from wsproto.extensions import Extension
from wsproto.handshake import server_extensions_handshake
from wsproto.utilities import generate_accept_token

from hector_trio import frames
from hector_trio.connection.bounds import Inbox, Phase
from hector_trio.connection.streams import Application, nothing

if TYPE_CHECKING:
    from hector_trio.connection.socket import Connection

EVENTS_PER_CHECKPOINT = 32
EARLY_BYTES = 32768
"""Bytes a client may send behind its upgrade request before it has been answered."""


class WebSocket(Application, WSStream):
    """One WebSocket: wsproto reads, frames are written by hand."""

    def __init__(self, owner: Connection, *args: Any) -> None:
        super().__init__(*args)
        self.owner = owner
        self.inbox = Inbox(owner.limits.max_unread_messages, owner.limits.max_unread_bytes)
        self.task_group = cast(TaskGroup, self)
        self.open = False
        """Accepted, and no Close frame has been sent."""
        del self.buffer
        self._message: WebsocketBuffer | None = None
        """What has come of the message that is being received; few come in pieces."""
        self._early = b""
        self._extensions: Sequence[Extension] = ()
        self._parser: WebSocketParser | None = None
        self._received = 0
        self._quiet = 0
        self._farewell = (1006, "")
        self._gone: Callable[[int], None] = nothing

    # ---- from the client

    async def handle(self, event: Event) -> None:
        kind = type(event)
        if kind is StreamClosed:
            if not self.closed:
                self.closed = True
                self.open = False
                code, reason = self._farewell
                self.inbox.close({"type": "websocket.disconnect", "code": code, "reason": reason})
                self._gone(code)
        elif kind is not Data:
            await super().handle(event)
        elif self.closed:
            pass
        elif self.state in (ASGIWebsocketState.CONNECTED, ASGIWebsocketState.CLOSED):
            while self._early and not self.closed:  # the application is taking it: this stands behind it
                await trio.lowlevel.checkpoint()
            if not self.closed:
                await self._receive(bytes(cast(Data, event).data))
        elif len(self._early) + len(cast(Data, event).data) <= EARLY_BYTES:
            self._early += bytes(cast(Data, event).data)
        else:
            self.state = ASGIWebsocketState.HTTPCLOSED
            await self.refuse(400, f"More than {EARLY_BYTES} bytes were sent before the WebSocket was accepted")
            await self.send(StreamClosed(self.stream_id))

    async def _receive(self, data: bytes) -> None:
        """Take usual frames as they are; from the first other one on, wsproto reads."""
        if self._parser is None:
            data = await self._take_plain(data)
            if not data or self.closed:
                return
            self._parser = WebSocketParser(ConnectionType.SERVER, list(self._extensions))
        self._parser.receive_data(data)
        await self._parse(self._parser)

    async def _take_plain(self, data: bytes) -> bytes:
        """Returns what is left from the first frame on that takes a parser to read."""
        limit = self.owner.limits.max_message_bytes
        start = number = 0
        while start < len(data) and not self.closed:
            found = frames.plain_frame(data, start, limit)
            if found is None:
                return data[start:]
            first, end, payload = found
            if first == frames.TEXT:
                try:
                    text = payload.decode()
                except UnicodeDecodeError:
                    return data[start:]
                if self.open and not self.inbox.put(
                    {"type": "websocket.receive", "bytes": None, "text": text}, len(payload)
                ):
                    await self.fail(1008, "too many unread messages")
            elif first == frames.PING:
                self.owner.pong(payload)
            elif first == frames.CLOSE:
                await self._left(int.from_bytes(payload) if payload else frames.NO_STATUS, "")
            start = end
            number += 1
            if not number % EVENTS_PER_CHECKPOINT:
                await trio.lowlevel.checkpoint()
        return b""

    async def _parse(self, parser: WebSocketParser) -> None:
        """Handle every frame received; let others run now and then, for a packet may hold ten thousand."""
        for number, event in enumerate(parser.events(), 1):
            if isinstance(event, Message):
                await self._take(event)
            elif isinstance(event, Ping):
                self.owner.pong(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                await self._closing(parser, event)
            if self.closed:
                return
            if not number % EVENTS_PER_CHECKPOINT:
                await trio.lowlevel.checkpoint()

    async def _take(self, event: Message[Any]) -> None:
        if not self.open:
            return  # our Close frame is out: only the peer's still matters
        data = event.data
        self._received += len(data) if not isinstance(data, str) or data.isascii() else len(data.encode())
        if self._received > self.owner.limits.max_message_bytes:
            await self.fail(1009, "message too big")
            return
        buffer = self._message = self._message or WebsocketBuffer(self.owner.limits.max_message_bytes)
        buffer.extend(event)
        if event.message_finished:
            size, self._received = self._received, 0
            message = buffer.to_message()
            self._message = None
            if not self.inbox.put(message, size):
                await self.fail(1008, "too many unread messages")

    async def _closing(self, parser: WebSocketParser, event: CloseConnection) -> None:
        if parser.state is not ParserState.REMOTE_CLOSING:
            await self.fail(int(event.code), frames.REASONS.get(int(event.code), ""))
        else:
            await self._left(int(event.code), event.reason or "")

    async def _left(self, code: int, reason: str) -> None:
        self._farewell = (code, reason)
        self._send_close(code, reason)
        await self.send(StreamClosed(self.stream_id))

    async def fail(self, code: int, reason: str) -> None:
        """End the WebSocket from our side at once: a Close frame, no more input, and the application is told."""
        self._farewell = (code, reason)
        self._send_close(code, reason)
        await self.send(StreamClosed(self.stream_id))

    async def beat(self) -> None:
        """One ping interval has passed."""
        moved, self.owner.moved = self.owner.moved, False
        self._quiet = 0 if moved else self._quiet + 1
        if self._quiet >= 2:
            self.owner.hopeless = True
            await self.fail(4101, "silent")
        else:
            self.owner.ping()

    # ---- from the application

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Callable[[Any], Awaitable[None]]:
        scope["extensions"]["hector.send_many"] = self
        return await super().spawn_app(app, config, scope, send)

    def is_own(self, receive: object, send: object) -> bool:
        """Whether the application was given these two by this stream, with nothing in between."""
        return receive == self.receive and send == self.app_send

    def when_gone(self, tell: Callable[[int], None]) -> None:
        """Have *tell* called once, with the code, when no message of the client can come any more, however many are
        unread; now, if that is so already."""
        self._gone = tell
        if self.closed:
            tell(self._farewell[0])

    def together(self, sending: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Await *sending*; the messages it sends leave in one write, at its end and whenever it is made to wait."""
        return self.owner.together(sending)

    async def __call__(self, payloads: Sequence[bytes], *, binary: bool = False) -> None:
        """Send one message for each payload (text must be UTF-8), all in one write.

        Waits only for what the socket did not take, at most `send_timeout` without progress. Once the socket is closing
        or gone it sends nothing and returns after a checkpoint: the end of the connection is told elsewhere. A cancel
        leaves all of it queued. RuntimeError before the WebSocket is accepted.
        """
        self._write_all(payloads, binary)
        await self.owner.pace(len(payloads))

    def send_now(self, payloads: Sequence[bytes]) -> bool:
        """The same for text, without waiting. False: the socket did not take it all, so nothing more is to be sent
        before an empty `send_many` has returned."""
        self._write_all(payloads, False)
        if self.owner.full:
            return False
        self.owner.moved = True
        return True

    @property
    def full(self) -> bool:
        """Whether `send_now` would only queue."""
        return self.owner.full

    def _write_all(self, payloads: Sequence[bytes], binary: bool) -> None:
        if self.open:
            if self._extensions:
                assert self._parser is not None
                kind: Any = BytesMessage if binary else TextMessage
                data = b"".join(self._parser.send(kind(p if binary else p.decode())) for p in payloads)
            else:
                data = frames.frames(frames.BINARY if binary else frames.TEXT, payloads)
            if data:
                self.owner.write(data)
        elif self.state is ASGIWebsocketState.HANDSHAKE:
            raise RuntimeError("The WebSocket has not been accepted")

    async def app_send(self, message: Any) -> None:
        kind = message["type"]
        if kind == "websocket.send" and self.open:
            text = message.get("text")
            payload = text.encode() if text is not None else message["bytes"]
            owner = self.owner
            if self._extensions:
                self._write_all((payload,), text is None)
            else:
                owner.write(frames.frame(frames.TEXT if text is not None else frames.BINARY, payload))
            if owner.is_corked and owner.spend():
                return  # the next checkpoint is not far
        elif self.open and kind == "websocket.close":
            self.state = ASGIWebsocketState.CLOSED
            self._send_close(int(message.get("code") or 1000), message.get("reason") or "")
            self.owner.wait_for(Phase.CLOSING, self.owner.limits.linger_timeout)
        elif self.open or (not self.closed and self.state is not ASGIWebsocketState.CLOSED):
            await WSStream.app_send(self, message)
        await self.owner.pace()

    async def ended(self, code: int) -> None:
        if self.closed or self.state is ASGIWebsocketState.CLOSED:
            return  # either side has closed, and the reader or the deadline does the rest
        if self.open:
            await self.fail(code, "")
        else:
            await WSStream.app_send(self, None)

    def _send_close(self, code: int, reason: str) -> None:
        if self.open:
            self.open = False
            self.owner.write(frames.close(code, reason))

    async def _accept(self, message: Any) -> None:
        """Answer 101, then handle what an eager client has sent before it."""
        subprotocol = message.get("subprotocol")
        if subprotocol is not None and subprotocol not in (self.handshake.subprotocols or ()):
            raise ValueError(f"The client did not offer the subprotocol {subprotocol!r}")
        headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
        headers.append((b"sec-websocket-accept", generate_accept_token(cast(bytes, self.handshake.key))))
        if subprotocol is not None:
            headers.append((b"sec-websocket-protocol", subprotocol.encode()))
        if self.owner.limits.compression and self.handshake.extensions:
            extension = frames.BoundedDeflate(self.owner.limits.max_message_bytes)
            accepted = server_extensions_handshake(self.handshake.extensions, [extension])
            if accepted:
                self._extensions = [extension]
                self._parser = WebSocketParser(ConnectionType.SERVER, list(self._extensions))
                headers.append((b"sec-websocket-extensions", accepted))
        headers.extend(message.get("headers") or ())
        await self.send(Response(stream_id=self.stream_id, status_code=101, headers=headers))
        self.handshake.accepted = True
        self.state = ASGIWebsocketState.CONNECTED
        self.open = True
        self.owner.wait_for(Phase.WEBSOCKET, self.owner.limits.ping_interval)
        await self.config.log.access(self.scope, {"status": 101, "headers": []}, time() - self.start_time)
        try:
            if self._early:
                await self._receive(self._early)
        finally:
            self._early = b""
