"""What the logs of tasks add up to for A2A, kept while there is room: who asks again, or joins, folds what is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from hector_trio.a2a.mapping import TaskView
from hector_trio.log import Follower, now_ms
from hector_trio.models import timestamp
from hector_trio.task import TaskRow, decode_chunk

BATCH: Final = 128
"""Chunks that are read together at most: what one look at a log costs the others."""

EACH: Final = 2048
"""Bytes that a view counts besides its log's: what is known of a task without any."""


class Views:
    """The views of tasks. Those that were used last are kept, together of no more than ``limit`` bytes of log."""

    def __init__(
        self, follow: Callable[[TaskRow, int], Follower], *, limit: int, log_retention: float | None = None
    ) -> None:
        """``follow`` gives a reader of a task's log behind a chunk. ``log_retention`` in seconds: of tasks that ended
        so long ago nothing is kept that their logs may no longer hold."""
        self._follow = follow
        self._limit = limit
        self._retention = None if log_retention is None else int(log_retention * 1000)
        self._kept: dict[tuple[int, str], SharedView] = {}
        """The one that was used last is the last."""
        self.size = 0
        """Bytes of what is kept, as ``limit`` counts them."""
        self.taken = 0
        """Chunks that were folded so far."""

    def of(self, row: TaskRow) -> SharedView:
        """The view of a task, which may not have read anything yet."""
        name = (row.key, row.task_id)  # a view has the task's id in it, which a later task may take over
        view = self._kept.pop(name, None)
        if view is not None and self._is_past(row):
            self.size -= view.size
            view = None
        if view is None:
            view = SharedView(self, self._follow, row)
            self.size += view.size
        self._kept[name] = view
        self._make_room()
        return view

    def _is_past(self, row: TaskRow) -> bool:
        return row.ended_at is not None and self._retention is not None and row.ended_at < now_ms() - self._retention

    def grew(self, view: SharedView, chunks: int, size: int) -> None:
        """``view`` has taken so many chunks, of so many bytes."""
        self.taken += chunks
        view.size += size
        if self._kept.get(view.name) is view:
            self.size += size
            self._make_room()

    def _make_room(self) -> None:
        while self.size > self._limit:
            name = next(iter(self._kept))
            self.size -= self._kept.pop(name).size


class SharedView:
    """One task's: whoever reads it on does so for all. Not kept any longer, it is still good for who has it."""

    def __init__(self, views: Views, follow: Callable[[TaskRow, int], Follower], row: TaskRow) -> None:
        self.name = (row.key, row.task_id)
        self.size = EACH
        self._views = views
        self._follow = follow
        self._view = TaskView(row.task_id, row.session_id, row.created_at)
        self._reading = trio.Lock()

    async def read(self, row: TaskRow, until: int | None = None) -> TaskView:
        """Reads on to what is committed (or up to a chunk), takes note whether the task is at work, and returns the
        view: somebody else's next turn may change it, so it is used before the next await.

        It may be beyond ``until`` already. Cancelled or failed: what was read stays read. Raises: HectorError when the
        log cannot be read.
        """
        view = self._view
        async with self._reading:
            with self._follow(row, view.seq) as follower:
                while follower.ready and not (view.ended or follower.ended) and (until is None or view.seq < until):
                    lines = await follower.read(BATCH if until is None else min(BATCH, until - view.seq))
                    if not lines:
                        if follower.failure is not None:
                            raise follower.failure
                        break
                    for line in lines:
                        view.take(decode_chunk(line))
                    self._views.grew(self, len(lines), sum(map(len, lines)))
                    await trio.lowlevel.checkpoint()
                if until is None and at_work(follower, view):
                    view.works(timestamp(now_ms()))
        return view

    async def behind(self, row: TaskRow, seq: int) -> TaskView:
        """A view of what comes behind a chunk, that keeps nothing of it. Raises: HectorError when the log cannot be
        read."""
        behind = (await self.read(row, seq)).going_on(seq)
        if seq:
            with self._follow(row, seq - 1) as follower:
                lines = await follower.read(1)
                if follower.failure is not None:
                    raise follower.failure
            chunk = decode_chunk(lines[0])
            if chunk.seq == seq:  # else it is no longer held
                behind.take(chunk)
        return behind


def at_work(follower: Follower, view: TaskView) -> bool:
    """Whether a run has begun, or the answer to a question was accepted."""
    return follower.status == "running" or (follower.status == "pending" and view.seq > 0)
