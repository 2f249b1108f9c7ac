"""Another agent, reached over A2A: its card, and the operations on it, as HTTP requests over httpx2."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx2
import structlog
import trio

from hector_trio import sse
from hector_trio.a2a import errors as a2a_errors
from hector_trio.a2a.bindings import Binding, Outgoing
from hector_trio.a2a.cards import CARD, RESUME
from hector_trio.a2a.dialects import Garbage
from hector_trio.a2a.peers import PeerCard, binding_for, read_card
from hector_trio.a2a.types import SendMessageRequest, StreamResponse, Task
from hector_trio.config import RemoteAgent, is_loopback
from hector_trio.errors import RunError
from hector_trio.outgoing import TooLarge, drain, leave, read_whole, send, trust

MAX_ANSWER: Final = 16 << 20
"""Bytes of one answer or of one event: a whole task may stand in it."""

CANCEL_CONNECTIONS: Final = 16
"""Connections for cancels."""

MAX_CARD: Final = 1 << 20
CARD_AGE: Final = 300.0
"""Seconds that a card counts which does not say how long."""
LONGEST_CARD_AGE: Final = 86400.0
CARD_RETRY: Final = 30.0
"""Seconds until a card that cannot be fetched again is asked for once more; the old one counts meanwhile."""

MAX_EXCERPT: Final = 300
"""Characters of the agent's own words that an error repeats."""

T = TypeVar("T")

log = structlog.stdlib.get_logger("hector_trio.a2a_client")


class PeerError(RunError):
    """The agent cannot be reached (``remote_unreachable``, ``remote_timeout``), the connection broke (``remote_lost``),
    it refused (``remote_unauthorized``, ``remote_not_found``, ``remote_rate_limited``, ``remote_unavailable``,
    ``remote_refused``, ``remote_error``), or what it says makes no sense (``remote_garbage``)."""

    title = "Another agent failed"

    def __init__(
        self,
        code: str,
        message: str,
        *,
        refusal: a2a_errors.A2AError | None = None,
        retryable: bool = False,
        lost: bool = False,
        delivered: bool = True,
    ) -> None:
        details = {"a2a": refusal.reason} if refusal is not None else None
        super().__init__(code, message, details=details, retryable=retryable)
        self.refusal = refusal
        self.lost = lost
        """Whether it is only the connection that is gone."""
        self.delivered = delivered
        """Whether the agent may have got the request."""


@asynccontextmanager
async def open_peer(settings: RemoteAgent) -> AsyncIterator[Peer]:
    """Connections to one agent. Nothing is sent before the first request; redirects are not followed and cookies not
    kept; proxies of the environment count, except for agents on this machine.

    Cancels have connections of their own: they must not wait behind the requests that wait for a connection.
    """
    async with (
        _pool(settings, settings.max_connections) as client,
        _pool(settings, CANCEL_CONNECTIONS) as cancels,
    ):
        yield Peer(settings, client, cancels)


def _pool(settings: RemoteAgent, most: int) -> httpx2.AsyncClient:
    timeout = httpx2.Timeout(
        connect=settings.connect_timeout, read=settings.read_timeout, write=settings.read_timeout, pool=None
    )
    return httpx2.AsyncClient(
        headers={"Accept-Encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=not is_loopback(urlsplit(settings.url).hostname or ""),
        timeout=timeout,
        verify=trust(),
        limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
    )


class Peer:
    """One agent. Every operation raises PeerError; a cancel closes its connection at once."""

    def __init__(self, settings: RemoteAgent, client: httpx2.AsyncClient, cancels: httpx2.AsyncClient) -> None:
        self._settings = settings
        self._client = client
        self._cancels = cancels
        self._origin = _origin(settings.url)
        self._credentials = dict(settings.headers)
        if settings.token is not None:
            self._credentials["Authorization"] = f"Bearer {settings.token}"
        self._card: PeerCard | None = None
        self._binding: Binding | None = None
        self._etag: str | None = None
        self._card_url: str | None = None
        self._fresh_until = -math.inf
        self._fetching = trio.Lock()

    @property
    def name(self) -> str:
        return self._settings.url

    # --- the card

    async def card(self) -> PeerCard:
        """The agent's card, as long as it counts; when its server does not answer, the old one does a while longer."""
        async with self._fetching:
            if self._card is None or trio.current_time() >= self._fresh_until:
                try:
                    await self._fetch_card()
                except PeerError as error:
                    if self._card is None:
                        raise
                    log.warning("card_not_fetched", url=self.name, because=error.detail)
                    self._fresh_until = trio.current_time() + CARD_RETRY
            assert self._card is not None
            return self._card

    async def _fetch_card(self) -> None:
        error: PeerError | None = None
        for url in [self._card_url] if self._card_url else card_urls(self._settings.url):
            try:
                await self._fetch_card_at(url)
            except PeerError as failure:
                if failure.run_code != "remote_not_found":
                    raise
                error = error or failure
            else:
                self._card_url = url
                return
        assert error is not None
        raise error

    async def _fetch_card_at(self, url: str) -> None:
        headers = {"Accept": "application/json", **self._credentials_for(url)}
        if self._card is not None and self._etag is not None:
            headers["If-None-Match"] = self._etag
        response = await self._send(Outgoing("GET", url, None), headers)
        async with aclosing(response):
            body = await self._whole(response, MAX_CARD)
        if response.status_code == 200:
            try:
                self._card = read_card(body)
            except Garbage as error:
                raise self._garbage(error) from None
            self._binding = binding_for(self._card.interface)
            self._etag = response.headers.get("etag")
        elif response.status_code != 304 or self._card is None:
            status = response.status_code
            code = {401: "remote_unauthorized", 403: "remote_unauthorized", 404: "remote_not_found"}.get(status)
            raise PeerError(
                code or "remote_error",
                f"{url} answered {status}, and no card",
                retryable=status in (429, 502, 503, 504),
            )
        self._fresh_until = trio.current_time() + age_of(response.headers)

    # --- operations

    async def send(self, request: SendMessageRequest) -> StreamResponse:
        """A message, answered at once or when the agent is done, as the request's configuration wants."""
        binding = await self._ready()
        return self._read(binding.response, await self._ask(binding, binding.send(request, stream=False)))

    async def get(self, task_id: str) -> Task:
        binding = await self._ready()
        return self._read(binding.task, await self._ask(binding, binding.about("get", task_id)))

    async def cancel(self, task_id: str) -> Task:
        binding = await self._ready()
        return self._read(binding.task, await self._ask(binding, binding.about("cancel", task_id), self._cancels))

    async def stream(self, request: SendMessageRequest) -> PeerEvents:
        """A message, answered by events; close them."""
        binding = await self._ready()
        return await self._open(binding, binding.send(request, stream=True), None)

    async def subscribe(self, task_id: str, after: str | None = None) -> PeerEvents:
        """The events of a task; close them. ``after``: the id of the last event that was had, where the agent's card
        says that it resumes; else the first event is the whole task."""
        binding = await self._ready()
        metadata = None if after is None else {RESUME: {"after": after}}
        try:
            return await self._open(binding, binding.about("subscribe", task_id, metadata), after)
        except PeerError as error:
            unknown = type(error.refusal) in (a2a_errors.NotFoundError, a2a_errors.MethodNotFoundError)
            other = binding.subscribe_otherwise(task_id) if unknown else None
            if other is None:
                raise
        return await self._open(binding, other, after)

    async def _ready(self) -> Binding:
        card = self._card or await self.card()  # as it was when the run began
        unknown = [uri for uri in card.required if uri != RESUME]
        if unknown:
            raise PeerError("remote_refused", f"The agent {self.name} talks to nobody without {', '.join(unknown)}")
        assert self._binding is not None
        return self._binding

    async def _ask(self, binding: Binding, outgoing: Outgoing, client: httpx2.AsyncClient | None = None) -> bytes:
        response = await self._send(outgoing, self._headers(binding, outgoing, "application/json"), client)
        async with aclosing(response):
            body = await self._whole(response, MAX_ANSWER)
        if response.status_code >= 300:
            raise self._refused(response.status_code, binding.refusal(response.status_code, body))
        return body

    async def _open(self, binding: Binding, outgoing: Outgoing, after: str | None) -> PeerEvents:
        headers = self._headers(binding, outgoing, "text/event-stream")
        if after is not None:
            headers["Last-Event-ID"] = after
        response = await self._send(outgoing, headers)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if response.status_code == 200 and kind == "text/event-stream":
            return PeerEvents(self, binding, response)
        async with aclosing(response):
            body = await self._whole(response, MAX_ANSWER)
        if response.status_code >= 300:
            raise self._refused(response.status_code, binding.refusal(response.status_code, body))
        # A refusal over JSON-RPC, or an answer that was so short that it needed no stream.
        return PeerEvents(self, binding, None, [self._read(binding.response, body)])

    def _headers(self, binding: Binding, outgoing: Outgoing, accept: str) -> dict[str, str]:
        headers = {
            "Accept": accept,
            "A2A-Version": binding.dialect.version,
            **self._credentials_for(outgoing.url),
        }
        if outgoing.content is not None:
            headers["Content-Type"] = outgoing.media_type
        if self._card is not None and RESUME in self._card.required:
            headers[binding.dialect.extensions_header] = RESUME
        return headers

    def _credentials_for(self, url: str) -> dict[str, str]:
        """To the agent's own origin only: its card may name any other."""
        return dict(self._credentials) if _origin(url) == self._origin else {}

    # --- HTTP, and what goes wrong in it

    async def _send(
        self, outgoing: Outgoing, headers: Mapping[str, str], client: httpx2.AsyncClient | None = None
    ) -> httpx2.Response:
        client = client or self._client
        try:
            request = client.build_request(
                outgoing.method, outgoing.url, content=outgoing.content, headers=dict(headers)
            )
            return await send(client, request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            said = str(error) or type(error).__name__
            detail = f"{_origin(outgoing.url)} cannot be reached: {said}"[:MAX_EXCERPT]
            raise PeerError("remote_unreachable", detail, retryable=True, lost=True, delivered=False) from None
        except httpx2.HTTPError as error:
            raise self.broken(error) from None

    async def _whole(self, response: httpx2.Response, limit: int) -> bytes:
        try:
            return await read_whole(response, limit)
        except TooLarge as error:
            raise self._garbage(Garbage(f"an answer is too large: {error}")) from None
        except httpx2.HTTPError as error:
            raise self.broken(error) from None

    def _read(self, read: Callable[[bytes], T], body: bytes) -> T:
        try:
            return read(body)
        except Garbage as error:
            raise self._garbage(error) from None
        except a2a_errors.A2AError as error:
            raise self._refused(None, error) from None

    def broken(self, error: httpx2.HTTPError) -> PeerError:
        if isinstance(error, httpx2.TimeoutException):
            return PeerError(
                "remote_timeout", f"The agent {self.name} did not answer in time", retryable=True, lost=True
            )
        said = str(error) or type(error).__name__
        return PeerError(
            "remote_lost", f"The connection to {self.name} broke: {said}"[:MAX_EXCERPT], retryable=True, lost=True
        )

    def _garbage(self, error: Garbage) -> PeerError:
        return PeerError("remote_garbage", f"The agent {self.name} makes no sense: {error}"[:MAX_EXCERPT])

    def event(self, binding: Binding, kind: str, data: bytes) -> StreamResponse:
        return self._read(lambda body: binding.event(kind, body), data)

    def too_large(self, error: Exception) -> PeerError:
        return self._garbage(Garbage(str(error)))

    def _refused(self, status: int | None, error: a2a_errors.A2AError) -> PeerError:
        code = _CODES.get(type(error), "remote_refused")
        said = f": {error.message}" if error.message else ""
        answered = f" ({status})" if status is not None else ""
        return PeerError(
            code,
            f"The agent {self.name} has refused{answered}{said}"[:MAX_EXCERPT],
            refusal=error,
            retryable=code in ("remote_rate_limited", "remote_unavailable", "remote_error"),
        )


_CODES: Final[dict[type[a2a_errors.A2AError], str]] = {
    a2a_errors.UnauthenticatedError: "remote_unauthorized",
    a2a_errors.PermissionDeniedError: "remote_unauthorized",
    a2a_errors.TaskNotFoundError: "remote_not_found",
    a2a_errors.NotFoundError: "remote_not_found",
    a2a_errors.ResourceExhaustedError: "remote_rate_limited",
    a2a_errors.UnavailableError: "remote_unavailable",
    a2a_errors.InternalError: "remote_error",
    a2a_errors.InvalidAgentResponseError: "remote_error",
}


class PeerEvents:
    """The events of one stream. Close it, at any moment."""

    def __init__(
        self,
        peer: Peer,
        binding: Binding,
        response: httpx2.Response | None,
        ready: list[StreamResponse] | None = None,
    ) -> None:
        self._peer = peer
        self._binding = binding
        self._response = response
        self._ready = ready or []
        self._parts: AsyncGenerator[bytes] | None = None if response is None else response.aiter_raw()
        self._decoder = sse.Decoder(MAX_ANSWER)
        self._whole = False

    @property
    def last_event_id(self) -> str | None:
        return self._decoder.last_event_id or None

    async def next(self) -> list[StreamResponse] | None:
        """What has arrived, waiting for it; ``None`` at the end of the stream. Raises: PeerError."""
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        while self._parts is not None:
            try:
                data = await anext(self._parts, None)
            except httpx2.HTTPError as error:
                raise self._peer.broken(error) from None
            if data is None:
                self._whole = True
                return None
            try:
                events = self._decoder.feed(data)
            except sse.EventTooLarge as error:
                raise self._peer.too_large(error) from None
            if events:
                return [self._peer.event(self._binding, each.event, each.data.encode()) for each in events]
        return None

    async def drain(self) -> None:
        """Nothing more is wanted: waits a moment for the end, so that the connection can be used again."""
        if self._parts is not None and not self._whole:
            await drain(self._parts)

    async def aclose(self) -> None:
        if self._response is not None and self._parts is not None:
            await leave(self._parts)
            await self._response.aclose()


def card_urls(url: str) -> list[str]:
    """Where the card of the agent at ``url`` may be: at the address itself, below it, or where its server has it."""
    parts = urlsplit(url)
    if parts.path.endswith(".json"):
        return [url]
    return list(dict.fromkeys([url.rstrip("/") + CARD, f"{parts.scheme}://{parts.netloc}{CARD}"]))


def age_of(headers: httpx2.Headers) -> float:
    """Seconds that an answer counts (RFC 9111, 5.2.2)."""
    text = headers.get("cache-control", "").lower()
    match = re.search(r"(?:^|[\s,])max-age=\"?(\d{1,9})", text)
    if "no-store" in text or "no-cache" in text:
        return 0.0
    return min(float(match[1]), LONGEST_CARD_AGE) if match else CARD_AGE


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return url[:MAX_EXCERPT]  # a card may say anything; nothing can be sent there
    return f"{parts.scheme}://{parts.hostname}:{port}"
