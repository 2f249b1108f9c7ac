"""A store for the simulation: a disk that survives, and before it a process's store that delays, refuses and dies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, Final, Protocol

import trio

from hector_trio.errors import StoreUnavailable
from hector_trio.stores import Accepted, Append, NewTask, StoreStatistics
from hector_trio.stores.memory import MemoryStore
from hector_trio.task import TaskRow

WRITES: Final = frozenset(
    {
        "append", "check", "create_session", "create_task", "delete_push", "delete_session", "delete_task",
        "move_pushes", "put_push", "set_policy", "sweep", "take_over", "take_over_pushes", "update_session",
    }
)  # fmt: skip

SLOW: Final = 0.2
"""Seconds: an operation that takes longer is a fault, and what it delays is not held against the server."""


class Witness(Protocol):
    """Is told of everything that reaches the disk, at the instant at which it does."""

    def created(self, row: TaskRow) -> None: ...

    def policy_set(self, key: int, policy: str) -> None: ...

    def appended(self, append: Append, refused: bool, row: TaskRow | None) -> None: ...


class Disk(MemoryStore):
    """What survives a crash. ``MemoryStore`` waits only before it begins, so each change is there whole or not."""

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self._witness = witness

    async def create_task(self, new: NewTask) -> Accepted:
        accepted = await super().create_task(new)
        if accepted.how == "created":
            self._witness.created(accepted.task)
        return accepted

    async def append(self, appends: Sequence[Append]) -> frozenset[int]:
        refused = await super().append(appends)
        for append in appends:
            self._witness.appended(append, append.key in refused, self.row(append.key))
        return refused

    async def set_policy(self, key: int, policy: str) -> None:
        await super().set_policy(key, policy)
        self._witness.policy_set(key, policy)

    def row(self, key: int) -> TaskRow | None:
        task = self._tasks.get(key)
        return None if task is None else task.row

    def rows(self) -> list[TaskRow]:
        return [task.row for task in self._tasks.values()]

    def lines(self, key: int) -> list[bytes]:
        """The whole log of a task, as it is kept."""
        return [line for segment in self._tasks[key].log for line in segment.data.split(b"\n")]

    def conversation(self, owner: str, session_id: str) -> list[tuple[int, str]] | None:
        """The key of the task and the role of each line; ``None`` without such a session."""
        session = self._sessions.get((owner, session_id))
        return None if session is None else [(key, message.role) for key, message in session.messages]


class Weather:
    """How stores do at the moment. The schedule changes it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.delays: tuple[float, ...] = (0.0,)
        """One of these, twice, is what an operation takes."""
        self.full = False
        """Whether writes are refused."""
        self.broken = False
        """Whether reads are refused too."""
        self.hiccups = 0.0
        """The share of operations that are refused for no reason."""
        self._bad_at = -1.0

    @property
    def bad(self) -> bool:
        return self.full or self.broken or self.hiccups > 0 or max(self.delays) > SLOW

    def change(
        self, *, delays: tuple[float, ...] = (0.0,), full: bool = False, broken: bool = False, hiccups: float = 0.0
    ) -> None:
        self._bad_at = self.calm_since
        self.delays, self.full, self.broken, self.hiccups = delays, full, broken, hiccups

    @property
    def calm_since(self) -> float:
        """The end of the last spell in which the store was not well, now if it is not; -1: it always was."""
        return trio.current_time() if self.bad else self._bad_at


class SimulatedStore:
    """The Store protocol as one process sees it. Writes take turns, in order, as they do before one writer thread.

    A write that is cancelled before it has begun never happens; one that has begun is finished, and its caller learns
    what became of it. After ``die`` nothing happens any more, whatever is tried.
    """

    def __init__(self, disk: Disk, weather: Weather) -> None:
        self._disk = disk
        self._weather = weather
        self._died = trio.Event()
        self._turn = trio.StrictFIFOLock()
        self._at_work = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._disk, name)
        return partial(self._write if name in WRITES else self._read, method)

    def statistics(self) -> StoreStatistics:
        return self._disk.statistics()

    def die(self) -> None:
        self._died.set()

    @property
    def busy(self) -> bool:
        """Whether an operation is under way."""
        return self._at_work > 0

    @property
    def busy_seconds(self) -> float:
        """For how long in all an operation was under way."""
        return self._busy_seconds + (trio.current_time() - self._busy_since if self._at_work else 0.0)

    async def _write(self, method: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        with self._working():
            async with self._turn:
                await self._pause()
                await trio.lowlevel.checkpoint_if_cancelled()
                self._admit(write=True)
                with trio.CancelScope(shield=True):  # it has begun; the pauses are bounded
                    result = await method(*args, **options)
                    await self._pause()
                if self._died.is_set():
                    raise StoreUnavailable("The process is dead")
                return result

    async def _read(self, method: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        with self._working():
            await self._pause()
            self._admit(write=False)
            result = await method(*args, **options)
            await self._pause()
            return result

    @contextmanager
    def _working(self) -> Iterator[None]:
        if self._at_work == 0:
            self._busy_since = trio.current_time()
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            if self._at_work == 0:
                self._busy_seconds += trio.current_time() - self._busy_since

    def _admit(self, *, write: bool) -> None:
        weather = self._weather
        if self._died.is_set():
            raise StoreUnavailable("The process is dead")
        hiccup = weather.hiccups > 0 and weather.random.random() < weather.hiccups
        if weather.broken or hiccup or (write and weather.full):
            raise StoreUnavailable("The disk is full" if weather.full else "The store cannot be reached")

    async def _pause(self) -> None:
        delay = self._weather.random.choice(self._weather.delays)
        if delay > 0:
            with trio.move_on_after(delay):
                await self._died.wait()
        elif self._weather.random.random() < 0.5:
            await trio.lowlevel.checkpoint()
