"""Whether a lost connection is made again, when, and when no more (PROTOCOL section 4)."""

from __future__ import annotations

import random
from typing import Final

import trio

from hector_trio.client.errors import ConnectionFailed
from hector_trio.client.limits import FIRST_DELAY, FIRST_TRIES, MAX_DELAY
from hector_trio.errors import HectorError

_AGAIN: Final = frozenset({1000, 1001, 1005, 1006, 1011, 1012, 1013})
"""Besides the four of the protocol: 1000 and 1005 before the final chunk are a proxy's. And 1011, a server's fault: it
ends a connection while the task's log goes on, attaching starts nothing twice, and where the fault is met again and
again the limit ends it, with 1011 as the reason."""


def can_be_mended(error: HectorError) -> bool:
    """Whether what ``error`` has ended can be had by asking again."""
    if isinstance(error, ConnectionFailed):
        return error.close_code is None or error.close_code in _AGAIN or 4000 <= error.close_code < 4500
    return error.retryable


class Retry:
    """How long to wait before the next try: jittered, longer each time, until there is progress or the limit."""

    def __init__(self, url: str, limit: float) -> None:
        self._url = url
        self._limit = limit
        self._opened = False
        self._tries = 0
        self._since: float | None = None

    def opened(self) -> None:
        """There was a connection: from now on they are made again, and not for the first time."""
        if not self._opened:
            self._opened = True
            self.progress()

    def progress(self) -> None:
        """There is something to show for the tries: what comes now counts anew."""
        self._tries = 0
        self._since = None

    def after(self, error: HectorError) -> float:
        """Seconds to wait before the next try. Raises: ``error``, or at the limit ConnectionFailed because of it."""
        now = trio.current_time()
        self._since = now if self._since is None else self._since
        self._tries += 1
        if not can_be_mended(error) or self._limit == 0:
            raise error
        if not self._opened and (self._tries >= FIRST_TRIES or not isinstance(error, ConnectionFailed)):
            raise error
        delay = random.uniform(0.5, 1) * min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(self._tries - 1, 16))
        delay = max(delay, min(MAX_DELAY, error.retry_after or 0))
        spent = now - self._since
        if spent + delay > self._limit:
            raise self._given_up(error, spent) from error
        return delay

    def _given_up(self, error: HectorError, seconds: float) -> ConnectionFailed:
        detail = f"{error.detail}; not mended in {seconds:.0f} seconds, at try {self._tries}"
        if isinstance(error, ConnectionFailed):
            return ConnectionFailed(detail, url=self._url, close_code=error.close_code, close_reason=error.close_reason)
        return ConnectionFailed(detail, url=self._url)
