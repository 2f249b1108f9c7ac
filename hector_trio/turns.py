"""Whose turn it is: the tasks of one session run one after the other, in order of arrival."""

from __future__ import annotations

from collections.abc import Hashable

import trio


class Turn:
    """A place in a session's queue. The first in it may run; ``leave`` lets the next one."""

    __slots__ = ("_event", "_turns", "holder", "interrupted", "session", "task_id")

    def __init__(self, turns: Turns, session: Hashable, task_id: str) -> None:
        self._turns = turns
        self._event = trio.Event()
        self.session = session
        self.task_id = task_id
        self.interrupted = False
        """Whether whoever comes to hold this place is to give way to a newer task."""
        self.holder: object = None
        """Whoever uses this place (the engine puts its run here)."""

    def _go(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Returns when everybody in front has left. Cancelled: the place is still taken; ``leave`` gives it back."""
        await self._event.wait()

    def leave(self) -> None:
        """Idempotent."""
        self._turns._leave(self)


class Turns:
    """All sessions' queues; a session without tasks costs nothing."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, list[Turn]] = {}

    def enter(self, session: Hashable, task_id: str, *, next_up: bool = False) -> Turn:
        """A place at the end, or with ``next_up`` right behind the task that has its turn now."""
        turn = Turn(self, session, task_id)
        queue = self._queues.setdefault(session, [])
        if next_up and queue:
            queue.insert(1, turn)
        else:
            queue.append(turn)
        if queue[0] is turn:
            turn._go()
        return turn

    def waiting(self, session: Hashable) -> list[Turn]:
        """All places of a session, the one that has its turn first."""
        return list(self._queues.get(session, ()))

    def length(self, session: Hashable) -> int:
        return len(self._queues.get(session, ()))

    def _leave(self, turn: Turn) -> None:
        queue = self._queues.get(turn.session)
        if queue is None or turn not in queue:
            return
        first = queue[0] is turn
        queue.remove(turn)
        if not queue:
            del self._queues[turn.session]
        elif first:
            queue[0]._go()
