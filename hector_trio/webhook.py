"""One request to a webhook: resolved, checked and connected to exactly the address that was checked."""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import httpcore2
import httpx2
import trio

from hector_trio.reach import Address, NotReachable, Reach, Webhook
from hector_trio.waiting import retry_after

Resolve: TypeAlias = "Callable[[str, int], Awaitable[Sequence[Address]]]"
"""The addresses of a host, in the order in which to try them. Raises: OSError."""

MOST_ADDRESSES: Final = 4
"""Addresses of one host that are tried."""

DRAINED: Final = 64 * 1024
"""Bytes of an answer that are read, out of politeness: nobody looks at them."""

DRAIN_SECONDS: Final = 1.0
"""How long that may take."""

CHECK_SECONDS: Final = 5.0
"""How long whoever names a webhook waits for the look-up of its name."""

LOOKUPS: Final = 32
"""Names that are looked up at once: a thread each, and a slow name server holds it for long."""


class Answer(NamedTuple):
    """What became of one request."""

    status: int | None
    """``None``: no answer came."""
    reason: str
    """For logs: the status, or why there is none."""
    retry_after: float | None = None
    """Seconds that the webhook asks to wait."""

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Webhooks:
    """Sends requests to webhooks. Holds nothing open between them."""

    def __init__(
        self, reach: Reach, timeout: float, *, tls: ssl.SSLContext | None = None, resolve: Resolve | None = None
    ) -> None:
        """``timeout`` in seconds: of a request, from the look-up of the name to the head of the answer. ``tls``: whom
        to trust; left out: as httpx2 does."""
        self._reach = reach
        self._timeout = timeout
        self._tls = tls
        self._lookups = trio.CapacityLimiter(LOOKUPS)
        self._resolve = resolve or self._look_up
        self._loading = trio.Lock()
        self._network = httpcore2.TrioBackend()

    async def check(self, webhook: Webhook) -> None:
        """Raises: NotReachable for a host that has an internal address now. One without any is not refused: names come
        and go, and each request looks again."""
        addresses: Sequence[Address] = ()
        with trio.move_on_after(min(self._timeout, CHECK_SECONDS)):
            try:
                addresses = await self._resolve(webhook.host, webhook.port)
            except OSError:
                return
        self._reach.check(webhook.host, addresses)

    async def post(self, webhook: Webhook, headers: Iterable[tuple[str, str]], body: bytes) -> Answer:
        """Sends ``body`` once, within the time for it, over a connection of its own, and follows no redirect. Raises
        nothing on purpose."""
        answer = Answer(None, "timeout")
        with trio.move_on_after(self._timeout) as scope:
            try:
                answer = await self._post(webhook, headers, body, scope)
            except NotReachable as error:
                answer = Answer(None, str(error))
            except httpcore2.ConnectError:
                answer = Answer(None, "no connection")
            except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
                answer = Answer(None, type(error).__name__)  # OSError: of TLS
        return answer

    async def _post(
        self, webhook: Webhook, headers: Iterable[tuple[str, str]], body: bytes, scope: trio.CancelScope
    ) -> Answer:
        url = httpcore2.URL(scheme=webhook.scheme, host=webhook.host, port=webhook.port, target=webhook.target)
        sent = [("Host", webhook.authority), ("Connection", "close"), *headers]
        tls = await self._trust() if webhook.scheme == "https" else None
        pinned = _Pinned(self._connect)
        try:
            async with (
                httpcore2.AsyncHTTPConnection(url.origin, tls, network_backend=pinned) as connection,
                connection.stream("POST", url, headers=sent, content=body) as response,
            ):
                told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
                answer = Answer(response.status, str(response.status), retry_after(told, time.time()))
                length = told.get("content-length", "")
                if length.isdecimal() and len(length) < 10 and 0 < int(length) <= DRAINED:
                    scope.deadline = math.inf  # the answer is there
                    with trio.move_on_after(DRAIN_SECONDS), suppress(httpcore2.NetworkError, httpcore2.ProtocolError):
                        await response.aread()
                return answer
        finally:
            await pinned.close()

    async def _trust(self) -> ssl.SSLContext:
        async with self._loading:
            if self._tls is None:
                self._tls = await trio.to_thread.run_sync(httpx2.create_ssl_context)  # takes a tenth of a second
        return self._tls

    async def _connect(self, host: str, port: int) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise httpcore2.ConnectError("no such host") from error
        self._reach.check(host, addresses)
        addresses = addresses[:MOST_ADDRESSES]
        failure: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                return await self._network.connect_tcp(str(address), port, timeout=self._timeout / len(addresses))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _look_up(self, host: str, port: int) -> Sequence[Address]:
        try:
            return [ipaddress.ip_address(host)]
        except ValueError:
            pass
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await trio.to_thread.run_sync(ask, limiter=self._lookups, abandon_on_cancel=True)
        except UnicodeError as error:  # a label that is too long
            raise OSError("no such host") from error
        return [ipaddress.ip_address(str(address[0])) for *_, address in found]


class _Pinned(httpcore2.AsyncNetworkBackend):
    """httpcore's way to connect, with ours to choose the address. Name and certificate are still those of the host."""

    def __init__(self, connect: Callable[[str, int], Awaitable[httpcore2.AsyncNetworkStream]]) -> None:
        self._connect = connect
        self._stream: httpcore2.AsyncNetworkStream | None = None

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        self._stream = await self._connect(host, port)
        return self._stream

    async def close(self) -> None:
        """httpcore forgets a connection that is cancelled in the TLS handshake, or just before the request."""
        if self._stream is not None:
            await self._stream.aclose()
