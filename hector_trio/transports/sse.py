"""Server-sent events (WHATWG HTML, 9.2): a task's log as a stream, and where a reader may begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import structlog
import trio

from hector_trio.errors import HectorError
from hector_trio.log import Follower
from hector_trio.models import encode
from hector_trio.observability import Metrics
from hector_trio.sse import comment
from hector_trio.task import seq_of
from hector_trio.transports.problems import refused
from hector_trio.transports.requests import invalid

KEEP_ALIVE: Final = 2.5
"""Seconds without a chunk after which a comment is sent; PROTOCOL promises 3."""

BLOCKED: Final = 0.02
"""Seconds after which a write counts as one that waited for its viewer."""

BEHIND: Final = 1.0
"""Seconds that a viewer may be more than ``BEHIND_CHUNKS`` behind before text is joined for it."""

BEHIND_CHUNKS: Final = 64

BATCH: Final = 1024
"""Chunks that leave together at most."""

log = structlog.stdlib.get_logger("hector_trio.sse")


class Lag:
    """Tells when a viewer is so slow that it is given joined text until it has caught up."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = math.inf

    def caught_up(self) -> None:
        self._since = math.inf

    def joins(self, follower: Follower, waited: float) -> bool:
        """Whether to join what is read next. ``waited``: seconds that the last write took."""
        if follower.last_seq - follower.after <= BEHIND_CHUNKS:
            self._since = math.inf
            return False
        now = trio.current_time()
        self._since = min(self._since, now)
        return waited > BLOCKED and now - self._since > BEHIND


class EventStream:
    """The chunks of one task as events, replayed and then live, ending after the final one. Costs a cursor.

    Whatever is ready leaves as one message. A log that cannot be read on ends with one uncommitted ``error`` event
    (seq 0) that carries no id, so that a browser comes back where it was. A viewer slower than the stream gets adjacent
    text joined.
    """

    def __init__(
        self, follower: Follower, metrics: Metrics, left: Callable[[], None] | None = None, *, until: float = math.inf
    ) -> None:
        """``left`` is called at the end of the stream by which a task was started. ``until``: the
        ``trio.current_time()`` at which the stream ends, wherever it is then; a reader may come back with a new token.
        """
        self._until = until
        self._follower = follower
        self._metrics = metrics
        self._left = left
        self._lag = Lag()
        self._given_at = math.inf
        self._open = ExitStack()
        self._begun = False
        self._done = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        if not self._begun:
            self._begin()
            if not self._follower.ready:
                return comment()  # tells proxies and readers at once that the stream is open
        if self._done or trio.current_time() >= self._until:
            raise StopAsyncIteration
        lines: list[bytes] | None = None
        try:
            if self._follower.ready:
                join = self._lag.joins(self._follower, trio.current_time() - self._given_at)
                lines = await self._follower.read(BATCH, join=join)
            else:
                with trio.move_on_at(min(trio.current_time() + KEEP_ALIVE, self._until)):
                    lines = await self._follower.read(BATCH)
        except HectorError as error:
            return self._fail(error)
        if lines:
            self._given_at = trio.current_time()
            return events(lines)
        self._given_at = math.inf
        if lines is None:
            return comment()
        if self._follower.failure is not None:
            return self._fail(self._follower.failure)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._done = True
        self._open.close()
        if self._left is not None:
            self._left()

    def _begin(self) -> None:
        self._begun = True
        self._open.enter_context(self._metrics.stream("sse"))
        self._open.enter_context(self._follower)

    def _fail(self, error: HectorError) -> bytes:
        log.warning("stream_failed", task_id=self._follower.task_id, code=error.code, detail=error.detail)
        self._done = True
        return b"data: " + encode(refused(self._follower.task_id, error)) + b"\n\n"


def events(lines: list[bytes]) -> bytes:
    """Encoded chunks as events. JSON holds no line break, so none is looked for."""
    return b"".join(b"id: %b\ndata: %b\n\n" % (seq_of(line), line) for line in lines)


def starting_point(*, ended: bool, last_seq: int, after: int, last_event_id: int | None) -> int | None:
    """The seq after which a reader begins; ``None``: there is nothing for it, answer 204.

    ``last_event_id`` wins over ``after``, because a browser that comes back repeats the address of its first request.
    A reader of an ended task that has it all is told to stop by 204 when it is a browser that came back, and gets the
    final chunk once more when it asked with ``after``. Raises: InvalidRequest for a seq that a live task has not
    reached.
    """
    if last_event_id is not None:
        if ended and last_event_id >= last_seq:
            return None
        wanted, name = last_event_id, "Last-Event-ID"
    else:
        wanted, name = min(after, last_seq - 1) if ended else after, "after"
    if wanted > last_seq:
        raise invalid(f"/{name}", f"is beyond the last chunk, which is {last_seq}")
    return max(wanted, 0)
