"""An alarm for one waiting task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio


class Wakeup:
    """One waiting task's alarm: set from anywhere on the loop, any number of times, taken by one waiter."""

    __slots__ = ("_task", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        """Whether ``wait`` would return at once."""
        self._task: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        self.is_set = True
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Returns once ``wake`` was called since the last return. Always a checkpoint.

        Raises: BusyResourceError if another task waits already.
        """
        if self.is_set:
            await trio.lowlevel.checkpoint()  # cancelled here, the alarm stays for the next wait
            self.is_set = False
            return
        if self._task is not None:
            raise trio.BusyResourceError("Another task waits already")
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        self.is_set = False

    def _abort(self, _: Callable[[], Any]) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
