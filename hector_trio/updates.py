"""A task's log as what a webhook is told of it, in the dialect that it understands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from hector_trio.a2a import v03
from hector_trio.a2a.mapping import TaskView
from hector_trio.a2a.types import INTERRUPTED, TERMINAL, StreamResponse, encode
from hector_trio.engine import Engine
from hector_trio.log import Follower, now_ms
from hector_trio.models import timestamp
from hector_trio.stores import PushDialect
from hector_trio.task import TaskRow, decode_chunk
from hector_trio.views import at_work

BATCH: Final = 64
"""Chunks that are taken from a log together. What comes after them is joined once it is their turn."""


class Update(Struct, frozen=True):
    """Something to tell."""

    seq: int
    """The chunk up to which the log is told then."""
    body: bytes | None
    """``None``: nothing is to be said about it."""
    settles: bool = False
    """Whether a client that learns this needs nothing of what was before: the task has ended, or waits for it."""


class Updates:
    """What becomes of a task. It is a reader of the log only while it waits for something: who waits for the readers of
    a task does not wait for a webhook.

    In A2A 1.0 each update is an event as subscribers get it (4.3.3). In 0.3 it is the task as it is by then, and only a
    change of its state is worth one; of several that come together the last is told.
    """

    def __init__(self, engine: Engine, row: TaskRow, dialect: PushDialect) -> None:
        self.row = row
        self._engine = engine
        self._snapshots = dialect == "0.3"
        self._view = TaskView(row.task_id, row.session_id, row.created_at, keep=False)
        agent = engine.agents.get(row.agent_id)
        self._may_reply = agent is not None and agent.info.replies

    @property
    def ended(self) -> bool:
        return self._view.ended

    async def catch_up(self, until: int, *, quiet: bool) -> None:
        """Takes note of what has been told already; ``quiet``: also that the task is at work, if it is. Raises:
        HectorError when the log cannot be read."""
        self._view = await self._engine.views.of(self.row).behind(self.row, until)
        with self._engine.follow(self.row, until) as follower:
            if quiet and self._at_work(follower):
                self._view.works(timestamp(now_ms()))

    async def read(self) -> list[Update]:
        """What comes next, waiting for it; ``[]`` at the end. Raises: HectorError when the log cannot be read."""
        view = self._view
        with self._engine.follow(self.row, view.seq) as follower:
            while not follower.ready:
                if self._at_work(follower) and (begun := view.works(timestamp(now_ms()))):
                    return await self._updates([(view.seq, each) for each in begun])
                await follower.wakeup.wait()
            lines = await self._lines(follower, BATCH, join=True)
        return await self._updates([event for line in lines for event in self._events(line)])

    def _events(self, line: bytes) -> list[tuple[int, StreamResponse | None]]:
        before = self._view.seq
        replied = self._view.reply is not None
        chunk = decode_chunk(line)
        *begun, last = self._view.take(chunk)
        if replied:  # the message was all there is to tell
            return [(chunk.seq, None)]
        if last.message is not None:
            return [(chunk.seq, last)]
        return [*((before, each) for each in begun), (chunk.seq, last)]

    async def _updates(self, events: Sequence[tuple[int, StreamResponse | None]]) -> list[Update]:
        if self._snapshots and events:
            return [await self._snapshot(events[-1][0], [event for _, event in events if event is not None])]
        return [
            Update(seq, None) if event is None else Update(seq, encode(event), _settles(event)) for seq, event in events
        ]

    async def _snapshot(self, seq: int, events: list[StreamResponse]) -> Update:
        changes = [event for event in events if event.artifact_update is None]
        if not changes:
            return Update(seq, None)
        last = changes[-1]
        if last.message is not None:
            return Update(seq, encode(v03.event(last)), settles=True)
        whole = await self._engine.views.of(self.row).read(self.row, seq)
        task = replace(whole.task(), status=self._view.status)
        return Update(seq, encode(v03.task(task)), _settles(last))

    async def _lines(self, follower: Follower, limit: int, *, join: bool = False) -> list[bytes]:
        lines = await follower.read(limit, join=join)
        if not lines and follower.failure is not None:
            raise follower.failure
        return lines

    def _at_work(self, follower: Follower) -> bool:
        if self._may_reply and not self._view.seq:
            return False  # it may still turn out that there is no task to speak of
        return at_work(follower, self._view)


def _settles(event: StreamResponse) -> bool:
    status = event.status_update
    return event.message is not None or (status is not None and status.status.state in TERMINAL | INTERRUPTED)
