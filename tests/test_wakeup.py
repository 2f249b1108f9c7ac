"""An alarm is never lost: whatever comes before, during and after a wait."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from hector_trio.wakeup import Wakeup


async def test_a_wake_before_the_wait_is_kept_and_several_are_one() -> None:
    wakeup = Wakeup()
    wakeup.wake()
    wakeup.wake()
    with trio.fail_after(5):
        await wakeup.wait()
    with trio.move_on_after(0) as scope:
        await wakeup.wait()
    assert scope.cancelled_caught


async def test_a_wait_is_always_a_checkpoint() -> None:
    wakeup = Wakeup()
    wakeup.wake()
    with trio.testing.assert_checkpoints():
        await wakeup.wait()


async def test_a_wait_that_was_cancelled_can_be_waited_again() -> None:
    wakeup = Wakeup()
    with trio.move_on_after(0):
        await wakeup.wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wakeup.wait)
        await trio.testing.wait_all_tasks_blocked()
        wakeup.wake()
        with trio.fail_after(5):
            await trio.testing.wait_all_tasks_blocked()


async def test_a_wake_that_meets_a_cancelled_wait_is_there_for_the_next() -> None:
    wakeup = Wakeup()
    wakeup.wake()
    with trio.CancelScope() as scope:
        scope.cancel()
        await wakeup.wait()
    assert scope.cancelled_caught
    with trio.fail_after(5):
        await wakeup.wait()


@pytest.mark.parametrize("seed", range(20))
async def test_no_wake_is_lost_whatever_the_schedule(seed: int) -> None:
    chance = random.Random(seed)
    wakeup = Wakeup()
    made = taken = 0

    async def make() -> None:
        nonlocal made
        for _ in range(200):
            for _ in range(chance.randrange(4)):
                await trio.lowlevel.checkpoint()
            made += 1
            for _ in range(chance.randrange(1, 3)):
                wakeup.wake()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            while taken < 200:
                with trio.CancelScope() as scope:
                    if chance.random() < 0.3:
                        nursery.start_soon(_cancel, scope)
                    while taken == made:
                        await wakeup.wait()
                taken = made
                for _ in range(chance.randrange(4)):
                    await trio.lowlevel.checkpoint()


async def test_a_second_waiter_is_told_so_and_the_first_goes_on() -> None:
    wakeup = Wakeup()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wakeup.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await wakeup.wait()
        wakeup.wake()


async def _cancel(scope: trio.CancelScope) -> None:
    await trio.lowlevel.checkpoint()
    scope.cancel()
