"""HTTP requests to others, over httpx2: sent, read to a bound, and left in the middle without losing a connection."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, Final

import httpx2
import trio

DRAIN_SECONDS: Final = 0.5
"""How long a complete answer waits for the end of its HTTP body, so that the connection can be used again."""

DRAIN_BYTES: Final = 64 * 1024


@cache
def trust() -> ssl.SSLContext:
    """Whom to believe over TLS: the usual authorities, or those that the environment names. Read once, because reading
    them takes a tenth of a second."""
    return httpx2.create_ssl_context()


class TooLarge(Exception):
    """An answer has more bytes than are read of it."""


async def send(client: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The head of the answer; close the response. A cancel at any moment leaves the pool as it was.

    Raises: httpx2.HTTPError.
    """
    with trio.CancelScope() as scope:
        request.extensions = {**request.extensions, "trace": _Connecting(scope).trace}
        response = await client.send(request, stream=True)
    return response  # noqa: RET504 - a scope could swallow a cancel, for all that mypy knows


async def read_whole(response: httpx2.Response, limit: int) -> bytes:
    """The body, which must not be compressed. Raises: TooLarge beyond ``limit`` bytes; httpx2.HTTPError."""
    body = bytearray()
    async with parts_of(response) as parts:
        async for part in parts:
            body += part
            if len(body) > limit:
                raise TooLarge(f"it is larger than {limit} bytes")
    return bytes(body)


class _Connecting:
    """Closes two gaps in which httpcore loses a connection that is cancelled while it is being made.

    A cancel in the TLS handshake leaves the socket to the garbage collector: it is closed here. A cancel that arrives
    after a connection is made and before its request is begun leaves it in the pool for ever, where it takes one of
    ``max_connections``: ``scope`` is shielded for that moment, in which nothing waits for anything outside.
    """

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope
        self._socket: trio.abc.AsyncResource | None = None

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore at every step of a request (its documented ``trace`` extension)."""
        step = event.partition(".")[2]
        if step == "connect_tcp.complete":
            self._socket = info["return_value"]
            self._scope.shield = True
        elif step == "start_tls.complete":
            self._scope.shield = True
        elif step in ("start_tls.started", "send_request_headers.started"):
            self._scope.shield = False
        elif step == "start_tls.failed" and self._socket is not None:
            await self._socket.aclose()


@asynccontextmanager
async def parts_of(response: httpx2.Response) -> AsyncIterator[AsyncGenerator[bytes]]:
    """The response's body as it arrives; left as ``leave`` does."""
    parts = response.aiter_raw()
    try:
        yield parts
    finally:
        await leave(parts)


async def leave(parts: AsyncGenerator[bytes]) -> None:
    """Ends the reading of a body, wherever it is.

    Unwinds httpx2's chain of generators with a read that is cancelled: closing the outermost leaves an inner one to the
    garbage collector.
    """
    with trio.CancelScope(shield=True) as leaving, suppress(httpx2.HTTPError):
        leaving.cancel()
        async for _ in parts:
            pass  # what had arrived before the cancel


async def drain(parts: AsyncGenerator[bytes]) -> None:
    """Reads to the end of the HTTP body, bounded; without it the connection could not be used again."""
    left = DRAIN_BYTES
    with trio.move_on_after(DRAIN_SECONDS):
        try:
            async for part in parts:
                left -= len(part)
                if left < 0:
                    return
        except httpx2.HTTPError:
            return  # the answer is complete; only the connection is lost
