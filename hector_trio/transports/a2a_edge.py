"""What both HTTP bindings of A2A share: the caller behind a request, streams as server-sent events, media types."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Any, Final

import structlog
import trio
from msgspec import Struct
from msgspec.structs import replace

from hector_trio.a2a import cards, errors
from hector_trio.a2a import types as a2a
from hector_trio.a2a.requests import extensions_of
from hector_trio.agents import Agent
from hector_trio.auth import CHALLENGE
from hector_trio.observability import Metrics
from hector_trio.sse import comment
from hector_trio.transports.a2a import Caller, Event, Events, Operation, activated, perform
from hector_trio.transports.negotiation import matches_weakly
from hector_trio.transports.problems import RETRY_AFTER
from hector_trio.transports.routes import Call, Reply

JSON: Final = "application/json"

KEEP_ALIVE: Final = 2.5
"""Seconds without an event after which a stream says that it is still there; 3 are promised."""

STARTED: Final = formatdate(usegmt=True)
"""A card does not change while the server runs."""

log = structlog.stdlib.get_logger("hector_trio.a2a")

INTERNAL: Final = errors.InternalError("An internal error; it has been logged")
"""All that a client learns of a bug."""


def caller_of(call: Call, agent: Agent, *, legacy: bool = False) -> Caller:
    """``legacy``: it speaks 0.3, so the header of 0.3 counts too."""
    names = ("A2A-Extensions", "X-A2A-Extensions") if legacy else ("A2A-Extensions",)
    asked = frozenset[str]().union(*(extensions_of(call.header(name)) for name in names))
    return Caller(call.services, agent, call.principal, call.base, asked, call.header("Last-Event-ID"), legacy)


def after(caller: Caller, place: str | None) -> Caller:
    """The same caller, who goes on behind ``place``."""
    return caller if place is None else replace(caller, after=place)


def unread(call: Call) -> errors.A2AError:
    """The refusal of a body that is not JSON: of what it says that it is, where it says that it is something else."""
    kind = (call.header("Content-Type") or JSON).partition(";")[0].strip().lower()
    if kind in (JSON, a2a.MEDIA_TYPE, "application/x-www-form-urlencoded"):  # curl's, whatever is sent
        return errors.ParseError("Invalid JSON payload")
    return errors.ContentTypeNotSupportedError(f"A body in JSON is expected, not {kind[:128]}")


async def performed(caller: Caller, operation: Operation, request: Any) -> Any:
    """``perform``; a bug is logged, and is an InternalError too. Raises: A2AError."""
    try:
        return await perform(caller, operation, request)
    except errors.A2AError:
        raise
    except Exception:
        log.exception("a2a_operation_failed", operation=operation.name)
        raise INTERNAL from None


def headers_for(caller: Caller, *, legacy: bool = False) -> dict[str, str]:
    """What every answer to this caller says: the extensions that are in use."""
    used = activated(caller)
    return {"X-A2A-Extensions" if legacy else "A2A-Extensions": ", ".join(used)} if used else {}


def refusal_headers(error: errors.A2AError, status: int) -> dict[str, str]:
    headers = {}
    seconds = error.retry_after if error.retry_after is not None else RETRY_AFTER.get(status)
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    if status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    return headers


def status_reply(
    error: errors.A2AError,
    media_type: str = a2a.MEDIA_TYPE,
    shape: Callable[[errors.A2AError], dict[str, Any]] = errors.http_body,
) -> Reply:
    """An error over HTTP+JSON (11.6)."""
    status = errors.codes_of(error).http
    return Reply(status, a2a.encode(shape(error)), media_type, refusal_headers(error, status))


def card_reply(call: Call, card: a2a.AgentCard, media_type: str, headers: Mapping[str, str]) -> Reply:
    """A card, which clients may keep (8.6): 304 where the client has it already. ``headers`` say for whom it is."""
    body = a2a.encode(cards.both_dialects(card))
    tag = cards.entity_tag(body)
    headers = {**headers, "ETag": tag, "Last-Modified": STARTED}
    known = call.header("If-None-Match")
    if matches_weakly(known, tag) if known is not None else call.header("If-Modified-Since") == STARTED:
        return Reply(304, headers=headers)
    return Reply(body=body, media_type=media_type, headers=headers)


class ServerSentEvents:
    """A stream of A2A as server-sent events: one message for all that is ready, each event with its id.

    Says that it is open, and that it still is, with comments. An error in the middle is the last event.
    """

    def __init__(
        self,
        events: Events,
        encode: Callable[[a2a.StreamResponse], bytes],
        failed: Callable[[errors.A2AError], bytes],
        until: float = math.inf,
    ) -> None:
        """``until``: the ``trio.current_time()`` at which it ends, wherever it is then."""
        self._until = until
        self._events = events
        self._encode = encode
        self._failed = failed
        self._done = False
        self._said_at = trio.current_time()

    def __aiter__(self) -> ServerSentEvents:
        return self

    async def __anext__(self) -> bytes:
        if self._done or trio.current_time() >= self._until:
            raise StopAsyncIteration
        try:
            events = await anext(self._events)
        except errors.A2AError as error:
            self._done = True
            return self._failed(error)
        if trio.current_time() >= self._until:
            raise StopAsyncIteration
        self._said_at = trio.current_time()
        if not events:
            return comment()
        return b"".join(b"id: %b\ndata: %b\n\n" % (each.id.encode(), self._encode(each.payload)) for each in events)

    async def keep_alive(self) -> None:
        """Has it say so when it was silent for ``KEEP_ALIVE``, and end in time. To be run beside it: an event costs no
        timer."""
        while True:
            await trio.sleep_until(min(self._said_at + KEEP_ALIVE, self._until))
            if trio.current_time() >= min(self._said_at + KEEP_ALIVE, self._until):
                self._said_at = trio.current_time()
                self._events.nudge()
                if self._said_at >= self._until:
                    await trio.sleep_forever()

    async def aclose(self) -> None:
        self._done = True
        await self._events.aclose()


def stream_reply(
    call: Call,
    events: Events,
    encode: Callable[[a2a.StreamResponse], bytes],
    failed: Callable[[errors.A2AError], bytes],
    headers: dict[str, str],
) -> Reply:
    """The answer that streams. What the stream holds is given back however the request ends, also before its head."""
    stream = ServerSentEvents(events, encode, failed, call.until)
    call.nursery.start_soon(_beside, stream, call.services.metrics, name="a2a stream")
    return Reply(events=stream, headers=headers)


async def _beside(stream: ServerSentEvents, metrics: Metrics) -> None:
    with metrics.stream("sse"):
        try:
            await stream.keep_alive()
        finally:
            await stream.aclose()


class Dialect(Struct, frozen=True):
    """How a version of the protocol has what operations return."""

    result: Callable[[Any], Any]
    event: Callable[[a2a.StreamResponse], Any]


def _same(value: Any) -> Any:
    return value


CURRENT: Final = Dialect(_same, _same)

View = Callable[[Call], Awaitable[Reply]]

__all__ = ["CURRENT", "JSON", "Dialect", "Event", "View", "after", "caller_of", "performed", "stream_reply"]
