"""A WebSocket to the server: opened, watched for silence, always closed, and its failures as ours."""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import h11
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream
from wsproto.utilities import ProtocolError

from hector_trio.client.addresses import Address
from hector_trio.client.bodies import encode
from hector_trio.client.errors import ConnectionFailed, refusal, reraise, why
from hector_trio.client.limits import CONNECT_LIMIT, MAX_MESSAGE, SILENCE
from hector_trio.errors import HectorError
from hector_trio.models import Json

_UNREAD_FRAMES: Final = 16
"""Frames that have come and are not looked at yet."""


@asynccontextmanager
async def open_socket(
    address: Address, path: str, headers: Mapping[str, str], ssl_context: ssl.SSLContext
) -> AsyncIterator[Socket]:
    """A WebSocket and its reader. Leaving just hangs up: who wants to part in order awaits its ``aclose`` before."""
    url = address.socket_url + path
    # The stream is ours: the library leaves it open when the server closes or refuses.
    stream = _Watched(await _connect(address, url, ssl_context))
    opened = False
    try:
        async with trio.open_nursery() as nursery:
            connection = await _handshake(nursery, stream, address, path, headers)
            opened = True
            yield Socket(connection, stream, url)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What went wrong on the wire is told as ours; what the caller raised leaves as it came, not in a group.
        wire, own = group.split((ProtocolError, h11.ProtocolError, HandshakeError))
        if own is None:
            assert wire is not None
            raise _wire_error(_first(wire), url, opened=opened) from None
        if len(own.exceptions) > 1:
            raise own from None
        reraise(own.exceptions[0])
    finally:
        await trio.aclose_forcefully(stream)


class Socket:
    """A WebSocket that is over, too, when nothing is heard from the server any more."""

    def __init__(self, connection: WebSocketConnection, stream: _Watched, url: str) -> None:
        self._connection = connection
        self._stream = stream
        self._url = url

    @property
    def heard_at(self) -> float:
        """When the last byte has come."""
        return self._stream.heard_at

    async def receive(self) -> str | bytes:
        """Raises: ConnectionFailed, with the Close frame's code."""
        asked_at = -math.inf
        while True:
            heard_at = self.heard_at
            asked = asked_at >= heard_at
            with trio.move_on_at(heard_at + (SILENCE if asked else SILENCE / 2)):
                try:
                    return await self._connection.get_message()
                except ConnectionClosed as closed:
                    raise _lost(self._url, closed) from None
            if self.heard_at > heard_at:
                continue
            if asked:
                silence = f"{self._url}: lost before the end (nothing was heard for {SILENCE:g} seconds)"
                raise ConnectionFailed(silence, url=self._url, close_code=1006)
            asked_at = trio.current_time()
            with trio.move_on_after(SILENCE / 2):
                await self.send({"type": "ping"})

    async def send(self, frame: Json) -> None:
        """Raises: ConnectionFailed; InvalidRequest for what JSON cannot say."""
        try:
            await self._connection.send_message(encode(frame).decode())
        except ConnectionClosed as closed:
            raise _lost(self._url, closed) from None

    async def aclose(self) -> None:
        """Says goodbye and waits for the server to do so."""
        await self._connection.aclose()


async def _connect(address: Address, url: str, ssl_context: ssl.SSLContext) -> trio.abc.Stream:
    """Raises: ConnectionFailed."""
    try:
        with trio.fail_after(CONNECT_LIMIT):
            tcp = await trio.open_tcp_stream(address.host, address.port)
            if not address.tls:
                return tcp
            tls = trio.SSLStream(
                tcp,
                ssl_context,
                server_hostname=address.host,
                https_compatible=True,
            )
            try:
                await tls.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(tls)
                raise
            return tls
    except trio.TooSlowError:
        raise ConnectionFailed(f"Cannot reach {url}: no answer in time", url=url) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectionFailed(f"Cannot reach {url}: {why(error)}", url=url) from error


async def _handshake(
    nursery: trio.Nursery, stream: _Watched, address: Address, path: str, headers: Mapping[str, str]
) -> WebSocketConnection:
    """Raises: ConnectionFailed; in the nursery, the reader raises what the server answers instead of the upgrade."""
    with trio.move_on_after(CONNECT_LIMIT) as scope:
        stream.on_end = scope.cancel
        socket = await wrap_client_stream(
            nursery,
            stream,  # type: ignore[arg-type]  # any stream will do: it is only read, written and closed
            address.host_header,
            path,
            extra_headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            message_queue_size=_UNREAD_FRAMES,
            max_message_size=MAX_MESSAGE,
            receive_buffer_size=1 << 16,
        )
        stream.on_end = lambda: None
        return socket
    url = address.socket_url + path
    raise ConnectionFailed(f"Cannot reach {url}: no answer to the WebSocket's handshake", url=url)


class _Watched(trio.abc.Stream):
    """A stream that tells when something has come, and when it is over.

    trio-websocket waits for ever for a handshake that the peer breaks off.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.heard_at = trio.current_time()
        self._stream = stream
        self.on_end: Callable[[], None] = lambda: None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            self.on_end()
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            self.on_end()
            raise
        if not data:
            self.on_end()
        self.heard_at = trio.current_time()
        return data

    async def aclose(self) -> None:
        self.on_end()
        await self._stream.aclose()


def _wire_error(error: BaseException, url: str, *, opened: bool) -> HectorError:
    if isinstance(error, ConnectionRejected):
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in error.headers}
        return refusal(error.status_code, headers, error.body or b"", url)
    if opened:
        return ConnectionFailed(f"{url} broke the WebSocket's protocol ({error})", url=url, close_code=1002)
    return ConnectionFailed(f"{url} does not speak WebSocket", url=url)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    each: BaseException = group
    while isinstance(each, BaseExceptionGroup):
        each = each.exceptions[0]
    return each


_CLOSE_WORDS: Final = {
    1000: "the server closed it",
    1001: "the server goes away",
    1006: "the connection was cut",
    1008: "the server refuses what was sent",
    1009: "a message was too large",
    1011: "a fault in the server",
    1012: "the server is shutting down",
    1013: "the server asks to try later",
    4100: "it was read too slowly",
    4101: "nothing was heard from this side",
    4501: "the token has expired",
    4529: "the quota is used up",
}


def _lost(url: str, closed: ConnectionClosed) -> ConnectionFailed:
    code = 1006 if closed.reason is None else closed.reason.code
    reason = None if closed.reason is None else closed.reason.reason
    words = _CLOSE_WORDS.get(code, "the server closed it")
    said = f"{words}: {reason}" if reason else words
    return ConnectionFailed(
        f"{url}: lost before the end ({code}: {said})", url=url, close_code=code, close_reason=reason
    )
