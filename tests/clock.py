"""A clock that goes like any other and that a test puts forward, instead of waiting for the server's timers."""

from __future__ import annotations

from trio.testing import MockClock, wait_all_tasks_blocked


async def skip(clock: MockClock, seconds: float) -> None:
    """Lets ``seconds`` pass at once, and everything happen that is due by then.

    Of the timers that are set already: one that is set while they pass begins after them. What others do meanwhile, in
    threads and other processes, is not waited for.
    """
    await wait_all_tasks_blocked()
    clock.jump(seconds)
    await wait_all_tasks_blocked()
