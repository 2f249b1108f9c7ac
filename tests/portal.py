"""Trio for tests that are written step by step, not as one coroutine."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")


class Portal:
    """Runs one coroutine function after the other in one Trio task, in a thread of its own, until it is closed."""

    def __init__(self) -> None:
        self._results: queue.SimpleQueue[outcome.Outcome[Any]] = queue.SimpleQueue()
        self._calls, receive = trio.open_memory_channel[Callable[[], Awaitable[Any]]](math.inf)
        self._thread = threading.Thread(target=trio.run, args=(self._serve, receive), daemon=True)
        self._thread.start()
        self._token: trio.lowlevel.TrioToken = self._results.get(timeout=30).unwrap()

    async def _serve(self, calls: trio.MemoryReceiveChannel[Callable[[], Awaitable[Any]]]) -> None:
        self._results.put(outcome.Value(trio.lowlevel.current_trio_token()))
        async for call in calls:
            self._results.put(await outcome.acapture(call))

    def run(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        """What the call returns or raises; ``queue.Empty`` when it takes too long."""
        self._token.run_sync_soon(self._calls.send_nowait, partial(call, *args))
        result: T = self._results.get(timeout=30).unwrap()
        return result

    def close(self) -> None:
        self._token.run_sync_soon(self._calls.close)
        self._thread.join(30)
        assert not self._thread.is_alive()
