"""What the memory store keeps in order: the keys of lists, and which keys are due when."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Generic, TypeVar

N = TypeVar("N", bound=Hashable)
K = TypeVar("K", bound=tuple[str, ...] | int)


class Lists(Generic[N]):
    """Lists of keys by name, each in ascending order. A list that is empty costs nothing."""

    def __init__(self) -> None:
        self._lists: dict[N, list[int]] = {}

    def add(self, names: Iterable[N], key: int) -> None:
        for name in names:
            insort(self._lists.setdefault(name, []), key)

    def remove(self, names: Iterable[N], key: int) -> None:
        for name in names:
            keys = self._lists[name]
            del keys[bisect_left(keys, key)]
            if not keys:
                del self._lists[name]

    def count(self, name: N) -> int:
        return len(self._lists.get(name, ()))

    def newest(self, name: N, before: int | None = None) -> Iterator[int]:
        """The keys below ``before`` (``None``: all), the greatest first."""
        keys = self._lists.get(name, [])
        start = len(keys) if before is None else bisect_left(keys, before)
        return (keys[n] for n in range(start - 1, -1, -1))


class Due(Generic[K]):
    """Keys and a time for each. To ask for those that are due costs as much as they are, however many are not."""

    def __init__(self) -> None:
        self._times: dict[K, int] = {}
        self._coming: list[tuple[int, K]] = []
        """A heap. Holds entries of keys that are gone or have another time by now, but no more than it holds others."""
        self._late: dict[K, None] = {}
        """Those that were due when somebody asked, in order of time but for those that were set to the past."""

    def __len__(self) -> int:
        return len(self._times)

    def set(self, key: K, at: int) -> None:
        self._late.pop(key, None)
        self._times[key] = at
        heappush(self._coming, (at, key))
        if len(self._coming) > 2 * len(self._times) + 16:
            self._coming = [(at, key) for key, at in self._times.items() if key not in self._late]
            heapify(self._coming)

    def discard(self, key: K) -> None:
        self._times.pop(key, None)
        self._late.pop(key, None)

    def until(self, now: int, limit: int | None = None) -> list[K]:
        """Up to ``limit`` keys whose time is ``now`` or before. They stay until they are discarded."""
        while self._coming and self._coming[0][0] <= now:
            at, key = heappop(self._coming)
            if self._times.get(key) == at:
                self._late[key] = None
        return list(islice((key for key in self._late if self._times[key] <= now), limit))
