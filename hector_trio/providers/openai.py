"""Any server that speaks OpenAI's chat completions, streamed over plain HTTP: requests, retries and errors."""

from __future__ import annotations

import ipaddress
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2
import msgspec
import trio
from msgspec import UNSET, Struct, UnsetType

from hector_trio import sse
from hector_trio.config import OpenAiLlm
from hector_trio.errors import ConfigError, ModelError
from hector_trio.providers import Delta, ModelRequest, ModelResult, OnDelta
from hector_trio.waiting import retry_after

MAX_EVENT = 1 << 20
"""Bytes of one event of the model's stream."""
MAX_ERROR_BODY = 64 * 1024
"""Bytes that are read of the answer to a refused request."""
MAX_EXCERPT = 200
"""Characters of the server's own error message that are shown."""
MAX_WAIT = 60.0
"""Seconds between two tries at most; a server that asks for more gets no further try."""
_FIRST_WAIT = 0.5
_LONGEST_BACKOFF = 8.0
_DRAIN_SECONDS = 0.5
"""How long a complete answer waits for the end of its HTTP body, so that the connection can be used again."""
_DRAIN_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 5.0
_KEEP_ALIVE_SECONDS = 30.0


@asynccontextmanager
async def open_openai(settings: OpenAiLlm) -> AsyncIterator[OpenAiProvider]:
    """A provider with its own connection pool; closing it closes every connection.

    Nothing is sent before the first request. Proxies and certificates of the environment (``HTTPS_PROXY``,
    ``NO_PROXY``, ``SSL_CERT_FILE`` …) count as they do for other programs, except that a server on this machine is
    never reached through a proxy. Redirects are not followed and cookies not kept. Raises ConfigError for a
    ``base_url``, a key or a header that cannot be sent.
    """
    url = _endpoint(settings)
    async with httpx2.AsyncClient(
        headers=_headers(settings),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=not _is_loopback(url.host),
        timeout=httpx2.Timeout(
            connect=settings.connect_timeout, read=settings.read_timeout, write=settings.read_timeout, pool=None
        ),
        limits=httpx2.Limits(
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
            keepalive_expiry=_KEEP_ALIVE_SECONDS,
        ),
    ) as client:
        yield OpenAiProvider(settings, client, url)


class OpenAiProvider:
    """A Provider for one model of one server. Made by ``open_openai``."""

    def __init__(self, settings: OpenAiLlm, client: httpx2.AsyncClient, url: httpx2.URL) -> None:
        self._settings = settings
        self._client = client
        self._url = url
        self._server = str(url.copy_with(path="/", query=None)).rstrip("/")
        base = url.path.removesuffix("/chat/completions")
        self.name = f"openai {settings.model} at {self._server}{base}"
        self._secrets = _secrets(settings)
        self._ask_usage = True
        """Whether the server takes ``stream_options``; it is asked until it refuses."""

    async def stream(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult:
        """Sends one request and gives each piece of text to ``on_delta`` as it arrives.

        A server that is busy (429, 408, 5xx) or hangs up without an answer is asked again up to ``max_retries`` times,
        at the time its ``Retry-After`` names; not after the answer has begun, and not when the wait would outlast
        ``MAX_WAIT`` or the caller's deadline. Raises ModelError: ``model_unauthorized``, ``model_not_found``,
        ``model_rejected``, ``model_rate_limited``, ``model_error``, ``model_unreachable``, ``model_timeout``,
        ``model_stream_cut``, ``model_garbage``. A cancel closes the connection at once.
        """
        tries = 0
        while True:
            outcome = await self._attempt(request, on_delta)
            if isinstance(outcome, ModelResult):
                return outcome
            if outcome.without_usage and self._ask_usage:
                self._ask_usage = False
                continue
            wait = outcome.wait
            if wait is None:
                wait = min(_FIRST_WAIT * 2**tries, _LONGEST_BACKOFF) * random.uniform(0.75, 1.25)
            # A cancelled run (deadline -inf) goes on to the sleep, where its cancel arrives.
            too_late = -math.inf < trio.current_effective_deadline() <= trio.current_time() + wait
            if not outcome.again or tries >= self._settings.max_retries or wait > MAX_WAIT or too_late:
                raise outcome.error
            tries += 1
            await trio.sleep(wait)

    async def _attempt(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult | _Failure:
        content = self._body(request)
        with trio.CancelScope() as scope:
            trace = _Connecting(scope).trace
            post = self._client.build_request("POST", self._url, content=content, extensions={"trace": trace})
            try:
                response = await self._client.send(post, stream=True)
            except httpx2.HTTPError as error:
                return self._no_answer(error)
        async with aclosing(response):
            if response.status_code != 200:
                return self._refused(response.status_code, response.headers, await _read_error(response))
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "text/event-stream" or response.headers.get("content-encoding", "identity") != "identity":
                raise self._not_a_stream(kind, await _read_error(response))
            return await self._read(response, on_delta)

    def _body(self, request: ModelRequest) -> bytes:
        body = {
            **self._settings.parameters,
            **request.parameters,
            "model": self._settings.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in request.turns],
            "stream": True,
        }
        if self._ask_usage:
            body["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(body)

    async def _read(self, response: httpx2.Response, on_delta: OnDelta) -> ModelResult:
        decoder = sse.Decoder(MAX_EVENT)
        finish_reason: str | None = None
        usage: dict[str, Any] = {}
        async with _parts_of(response) as parts:
            while (data := await self._next(parts, complete=finish_reason is not None)) is not None:
                try:
                    events = decoder.feed(data)
                except sse.EventTooLarge as error:
                    raise self._error("model_garbage", f"sent garbage: {error}") from None
                for event in events:
                    if event.data == "[DONE]":
                        await _drain(parts)
                        return ModelResult(finish_reason or "stop", usage)
                    piece = self._piece(event.data)
                    if piece.usage:
                        usage = piece.usage
                    for choice in piece.choices or ():
                        if choice.index != 0:
                            continue
                        if choice.delta is not None and (text := choice.delta.content or choice.delta.refusal):
                            await on_delta(Delta(text))
                        finish_reason = choice.finish_reason or finish_reason
        if finish_reason is None:
            raise self._error("model_stream_cut", "ended its stream before the answer was complete", retryable=True)
        return ModelResult(finish_reason, usage)

    async def _next(self, parts: AsyncGenerator[bytes], *, complete: bool) -> bytes | None:
        try:
            return await parts.__anext__()
        except StopAsyncIteration:
            return None
        except httpx2.TimeoutException:
            if complete:
                return None
            silence = f"sent nothing for {self._settings.read_timeout:g} seconds in the middle of its answer"
            raise self._error("model_timeout", silence, retryable=True) from None
        except httpx2.HTTPError:
            if complete:
                return None
            cut = "cut its stream before the answer was complete"
            raise self._error("model_stream_cut", cut, retryable=True) from None

    def _piece(self, data: str) -> _Piece:
        try:
            piece = _decode_piece(data)
        except (msgspec.DecodeError, RecursionError):  # not JSON, or JSON of another shape, or nested absurdly deep
            raise self._error("model_garbage", "sent an event that is not a chat completion chunk") from None
        if piece.error is not None:
            raise self._stream_error(piece.error)
        if piece.choices is UNSET and piece.usage is None:
            raise self._error("model_garbage", "sent an event that is not a chat completion chunk")
        return piece

    # --- errors: what the server did, in words that hold no secret ----------------------------------------------------

    def _error(
        self, code: str, what: str, *, said: str = "", retryable: bool = False, retry_after: int | None = None
    ) -> ModelError:
        excerpt = self._excerpt(said)
        message = f"The model's server at {self._server} {what}" + (f": {excerpt}" if excerpt else "")
        return ModelError(code, message, retryable=retryable, retry_after=retry_after)

    def _excerpt(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        flat = " ".join("".join(c if c.isprintable() else " " for c in text[: MAX_EXCERPT * 4]).split())
        return flat if len(flat) <= MAX_EXCERPT else flat[: MAX_EXCERPT - 1] + "…"

    def _no_answer(self, error: httpx2.HTTPError) -> _Failure:
        match error:
            case httpx2.ConnectTimeout():
                what = f"did not accept a connection within {self._settings.connect_timeout:g} seconds"
                return _Failure(self._error("model_timeout", what, retryable=True))
            case httpx2.TimeoutException():
                what = f"did not answer within {self._settings.read_timeout:g} seconds"
                return _Failure(self._error("model_timeout", what, retryable=True))
            case httpx2.RemoteProtocolError() if "disconnected" not in str(error):
                return _Failure(self._error("model_garbage", "does not speak HTTP"))
            case httpx2.RemoteProtocolError() | httpx2.ReadError() | httpx2.WriteError():
                # The usual cause is a kept connection that the server closed just now: the next try makes a new one.
                cut = self._error("model_stream_cut", "closed the connection without an answer", retryable=True)
                return _Failure(cut, again=True)
            case _:
                unreachable = self._error("model_unreachable", "cannot be reached", said=_reason(error), retryable=True)
                return _Failure(unreachable)

    def _refused(self, status: int, headers: httpx2.Headers, body: bytes) -> _Failure:
        said, kind = _error_of(body)
        what = f"answered {status}"
        if status in (401, 403):
            hint = "" if self._settings.api_key else " (no api_key is configured)"
            return _Failure(self._error("model_unauthorized", what + hint, said=said))
        if status == 404:
            return _Failure(self._error("model_not_found", f"{what} for the model “{self._settings.model}”", said=said))
        if status == 429:
            wait = retry_after(headers, time.time())
            busy = self._error(
                "model_rate_limited",
                what,
                said=said,
                retryable=kind != "insufficient_quota",
                retry_after=None if wait is None else math.ceil(wait),
            )
            return _Failure(busy, again=kind != "insufficient_quota", wait=wait)
        if status == 408 or status >= 500:
            failed = self._error("model_error", what, said=said, retryable=True)
            return _Failure(failed, again=True, wait=retry_after(headers, time.time()))
        if status >= 400:
            # Some servers refuse request members they do not know; this one is ours and can be spared.
            return _Failure(self._error("model_rejected", what, said=said), without_usage=b"stream_options" in body)
        return _Failure(self._error("model_error", f"{what}, which is no answer (redirects are not followed)"))

    def _not_a_stream(self, kind: str, body: bytes) -> ModelError:
        said, _ = _error_of(body)
        if said:
            return self._error("model_error", "answered with an error", said=said)
        return self._error("model_garbage", f"did not answer with an event stream but with “{kind or 'no type'}”"[:200])

    def _stream_error(self, error: Any) -> ModelError:
        said, kind = _error_of(msgspec.json.encode({"error": error}))
        if kind in ("429", "rate_limit_exceeded", "rate_limit_error"):
            return self._error("model_rate_limited", "broke off its answer", said=said, retryable=True)
        return self._error("model_error", "broke off its answer", said=said)


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


class _Failure(Struct, frozen=True):
    """A try that gave nothing out: why, whether another may help and after how many seconds."""

    error: ModelError
    again: bool = False
    wait: float | None = None
    without_usage: bool = False
    """The server refused ``stream_options``."""


# --- the wire ---------------------------------------------------------------------------------------------------------


class _Delta(Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Piece(Struct):
    choices: list[_Choice] | UnsetType | None = UNSET
    usage: dict[str, Any] | None = None
    error: Any = None


_decode_piece = msgspec.json.Decoder(_Piece).decode


def _error_of(body: bytes) -> tuple[str, str]:
    """The message and the kind in an error's JSON, in the shapes that servers use; empty where there is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return "", ""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("error") or value.get("message") or value.get("detail")
    if isinstance(value, dict):
        kind = next((str(value[key]) for key in ("code", "type") if value.get(key)), "")
        message = value.get("message")
        return (message if isinstance(message, str) else "", kind)
    return (value if isinstance(value, str) else "", "")


@asynccontextmanager
async def _parts_of(response: httpx2.Response) -> AsyncIterator[AsyncGenerator[bytes]]:
    """The response's body as it arrives.

    Leaving before its end unwinds httpx2's chain of generators with a read that is cancelled: closing the outermost
    leaves an inner one to the garbage collector.
    """
    parts = response.aiter_raw()
    try:
        yield parts
    finally:
        with trio.CancelScope(shield=True) as leaving, suppress(httpx2.HTTPError):
            leaving.cancel()
            async for _ in parts:
                pass  # what had arrived before the cancel


async def _read_error(response: httpx2.Response) -> bytes:
    """What a refused request is told, bounded in size and time; empty if it comes compressed."""
    body = b""
    if response.headers.get("content-encoding", "identity") != "identity":
        return body
    with trio.move_on_after(_ERROR_BODY_SECONDS):
        async with _parts_of(response) as parts:
            try:
                async for part in parts:
                    body += part
                    if len(body) > MAX_ERROR_BODY:
                        break
            except httpx2.HTTPError:
                pass  # what came of it is enough: the status has already said that it failed
    return body


async def _drain(parts: AsyncGenerator[bytes]) -> None:
    """Reads to the end of the HTTP body, bounded; without it the connection could not be used again."""
    left = _DRAIN_BYTES
    with trio.move_on_after(_DRAIN_SECONDS):
        try:
            async for part in parts:
                left -= len(part)
                if left < 0:
                    return
        except httpx2.HTTPError:
            return  # the answer is complete; only the connection is lost


# --- settings ---------------------------------------------------------------------------------------------------------


def _endpoint(settings: OpenAiLlm) -> httpx2.URL:
    try:
        url = httpx2.URL(settings.base_url.strip())
    except httpx2.InvalidURL as error:
        raise ConfigError(f"base_url is not a URL ({error})") from None
    if url.userinfo:
        raise ConfigError("base_url must not hold a user or password; put the key into api_key")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url must begin with http:// or https:// and a host, not “{settings.base_url}”")
    if not 0 < (url.port or 80) < 65536:
        raise ConfigError(f"base_url has no valid port: “{settings.base_url}”")
    return url.copy_with(path=url.path.rstrip("/") + "/chat/completions", fragment=None)


def _headers(settings: OpenAiLlm) -> dict[str, str]:
    headers = {"user-agent": "hector_trio", "accept": "text/event-stream", "content-type": "application/json"}
    if key := (settings.api_key or "").strip():
        headers["authorization"] = f"Bearer {key}"
    headers |= {name.lower(): value.strip() for name, value in settings.headers.items()}
    # Nothing is decompressed: an answer must not grow in memory, and a token must not wait for a block.
    headers["accept-encoding"] = "identity"
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ConfigError(f"“{name}” is not the name of an HTTP header")
        if not (value.isascii() and value.isprintable()):
            what = "api_key" if name == "authorization" else f"the header “{name}”"
            raise ConfigError(f"{what} has characters that cannot be sent")
    return headers


def _secrets(settings: OpenAiLlm) -> list[str]:
    """What must never be shown, the longest first."""
    values = [settings.api_key or "", *settings.headers.values()]
    return sorted({value.strip() for value in values if len(value.strip()) >= 4}, key=len, reverse=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """The operating system's or TLS's words for why a connection failed."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted, {cause.verify_message}"
        if isinstance(cause, OSError) and cause.strerror:
            # Only the kernel's errors have their words there; Trio puts the address before them.
            return os.strerror(cause.errno) if type(cause.errno) is int and cause.errno > 0 else cause.strerror
    return str(error)


def _causes(error: BaseException | None, depth: int = 8) -> Iterator[BaseException]:
    while error is not None and depth:
        yield error
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__
        depth -= 1
