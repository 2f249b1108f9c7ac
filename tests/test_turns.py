"""Turns: order of arrival, whoever leaves."""

from __future__ import annotations

import trio

from hector_trio.turns import Turn, Turns


async def test_turns_are_taken_in_order_of_arrival() -> None:
    turns = Turns()
    places = [turns.enter("s", "t") for _ in range(5)]
    order: list[int] = []

    async def use(number: int, turn: Turn) -> None:
        await turn.wait()
        order.append(number)
        turn.leave()

    async with trio.open_nursery() as nursery:
        for number, turn in reversed(list(enumerate(places))):
            nursery.start_soon(use, number, turn)
    assert order == [0, 1, 2, 3, 4]
    assert turns.length("s") == 0


async def test_leaving_the_queue_early_blocks_nobody() -> None:
    turns = Turns()
    first, second, third = (turns.enter("s", "t") for _ in range(3))
    second.leave()
    second.leave()
    first.leave()
    with trio.fail_after(1):
        await third.wait()


async def test_an_interrupting_task_comes_right_behind_the_one_that_runs() -> None:
    turns = Turns()
    first, waiting = turns.enter("s", "t"), turns.enter("s", "t")
    newest = turns.enter("s", "t", next_up=True)
    assert turns.waiting("s") == [first, newest, waiting]


async def test_sessions_do_not_wait_for_each_other() -> None:
    turns = Turns()
    turns.enter("a", "t")
    with trio.fail_after(1):
        await turns.enter("b", "t").wait()
