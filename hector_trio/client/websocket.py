"""A WebSocket to the server: opened, watched while it opens, and its failures as ours."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import h11
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream
from wsproto.utilities import ProtocolError

from hector_trio.client.addresses import Address
from hector_trio.client.errors import ConnectionFailed, refusal, why
from hector_trio.client.limits import CONNECT_LIMIT, MAX_MESSAGE, UNREAD_CHUNKS
from hector_trio.errors import HectorError


@asynccontextmanager
async def open_socket(
    address: Address, path: str, headers: Mapping[str, str], ssl_context: ssl.SSLContext
) -> AsyncIterator[WebSocketConnection]:
    """A WebSocket and its reader. Leaving just hangs up: who wants to part in order awaits its ``aclose`` before."""
    url = address.socket_url + path
    stream = _Watched(await _connect(address, url, ssl_context))
    opened = False
    try:
        async with trio.open_nursery() as nursery:
            socket = await _handshake(nursery, stream, address, path, headers)
            opened = True
            yield socket
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What went wrong on the wire is told as ours; what the caller raised leaves as it came, not in a group.
        wire, own = group.split((ProtocolError, h11.ProtocolError, HandshakeError))
        if own is None:
            assert wire is not None
            raise _wire_error(_first(wire), url, opened=opened) from None
        if len(own.exceptions) > 1:
            raise
        _reraise(own.exceptions[0])
    finally:
        await trio.aclose_forcefully(stream)


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
            message_queue_size=UNREAD_CHUNKS,
            max_message_size=MAX_MESSAGE,
            receive_buffer_size=1 << 16,
        )
        stream.on_end = lambda: None
        return socket
    url = address.socket_url + path
    raise ConnectionFailed(f"Cannot reach {url}: no answer to the WebSocket's handshake", url=url)


class _Watched(trio.abc.Stream):
    """A stream that tells when it is over.

    trio-websocket waits for ever for a handshake that the peer breaks off.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
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


def _reraise(error: BaseException) -> None:
    """Raises ``error`` with the context that it had."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context


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


def lost(url: str, closed: ConnectionClosed) -> ConnectionFailed:
    code = 1006 if closed.reason is None else closed.reason.code
    reason = None if closed.reason is None else closed.reason.reason
    words = _CLOSE_WORDS.get(code, "the server closed it")
    said = f"{words}: {reason}" if reason else words
    return ConnectionFailed(
        f"{url}: lost before the end ({code}: {said})", url=url, close_code=code, close_reason=reason
    )
