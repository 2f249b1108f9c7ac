"""The stream of one task for A2A: a cursor on its log, and the view that the log adds up to, read on by who pulls."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Final, NamedTuple, Protocol

import msgspec
import trio

from hector_trio.a2a import errors
from hector_trio.a2a import types as a2a
from hector_trio.a2a.mapping import TaskSnapshot, TaskView
from hector_trio.engine import Engine
from hector_trio.errors import HectorError
from hector_trio.log import now_ms
from hector_trio.models import timestamp
from hector_trio.task import TaskRow, decode_chunk
from hector_trio.views import BATCH, at_work

_PLACE: Final = re.compile(r"([0-9]{1,18})(\.1)?\Z")


class Event(NamedTuple):
    """One event of a stream. ``id`` says where it stands: a client that has it goes on behind it."""

    id: str
    payload: a2a.StreamResponse


class Events(Protocol):
    """A stream: what has happened since the last look, together. Ends where the stream ends (3.1.2, 3.1.6).

    An empty list says that nothing has happened yet. Cutting it never stops the task. Whoever iterates closes it.
    Raises: A2AError when the log cannot be read on.
    """

    def __aiter__(self) -> Events: ...

    async def __anext__(self) -> list[Event]: ...

    def nudge(self) -> None:
        """Have whoever waits for events be given what there is, be it none. Never waits."""
        ...

    async def aclose(self) -> None: ...


class Place(NamedTuple):
    """Where a client stands in a stream: behind a chunk; ``begun``: it was also told that work goes on."""

    seq: int
    begun: bool = False

    @classmethod
    def read(cls, text: str) -> Place:
        """Raises: InvalidParamsError."""
        match = _PLACE.match(text)
        if match is None:
            raise errors.invalid("after", "is not the id of an event of this stream")
        return cls(int(match[1]), match[2] is not None)


class TaskReader:
    """A client's place in a task's log: a cursor, and of what was before it no more than its events need. A context
    manager. It begins with ``snapshot``, ``settle`` or ``go_on``."""

    def __init__(self, engine: Engine, row: TaskRow) -> None:
        self.row = row
        self._views = engine.views
        self.view = TaskView(row.task_id, row.session_id, row.created_at, keep=False)
        self.follower = engine.follow(row, viewer=True)

    def __enter__(self) -> TaskReader:
        self.follower.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.close()

    async def snapshot(self, until: int | None = None) -> TaskSnapshot:
        """The task as it is now, or was when the row was read whose last chunk is ``until``; what is read next comes
        behind that. Raises: HectorError."""
        return self._taken(await self._views.of(self.row).read(self.row, until))

    async def settle(self, *, decides: bool = False) -> TaskSnapshot:
        """As ``snapshot``, once the task has ended, waits for somebody, or (``decides``) has said anything at all."""
        shared = self._views.of(self.row)
        view = await shared.read(self.row, self.row.last_seq)
        while not (view.ended or self._is_asked(view) or view.reply is not None or (decides and view.seq)):
            self.follower.after = before = view.seq
            await self.wait_said()
            view = await shared.read(self.row)
            if view.seq == before:
                break
        return self._taken(view)

    def _taken(self, view: TaskView) -> TaskSnapshot:
        if view.interrupted and not self._is_asked(view):
            view.works(timestamp(now_ms()))
        self.view = view.going_on()
        self.follower.after = view.seq
        return view.snapshot()

    def _is_asked(self, view: TaskView) -> bool:
        """Whether the task waits for somebody, and not with a question that was answered when the row was read."""
        answered = view.seq <= self.row.last_seq and self.row.status != "input_required"
        return view.interrupted and not answered

    async def go_on(self, place: Place) -> None:
        """What is read next comes behind ``place``. Raises: HectorError."""
        self.view = await self._views.of(self.row).behind(self.row, place.seq)
        self.follower.after = place.seq
        if place.begun:
            self.view.works(timestamp(now_ms()))

    async def wait_said(self) -> None:
        """Returns once there is more in the log, or nothing more will be."""
        while not self.follower.ready:
            await self.follower.wakeup.wait()

    @property
    def at_work(self) -> bool:
        return at_work(self.follower, self.view)

    @property
    def ready(self) -> bool:
        """Whether ``read`` would return without waiting for the run."""
        return self.follower.ready or (self.at_work and self.view.state != "TASK_STATE_WORKING")

    async def wait(self) -> None:
        while not self.ready:
            await self.follower.wakeup.wait()

    async def read(self) -> list[Event]:
        """What comes next, waiting for it; ``[]`` at the end. Raises: A2AError."""
        await self.wait()
        if not self.follower.ready:
            begun = self.view.works(timestamp(now_ms()))
            return [Event(f"{self.view.seq}.1", each) for each in begun]
        events: list[Event] = []
        for line in await self._read(BATCH):
            chunk = decode_chunk(line)
            *begun, last = self.view.take(chunk)
            events += [Event(f"{chunk.seq - 1}.1", each) for each in begun]
            events.append(Event(str(chunk.seq), last))
        return events

    async def _read(self, limit: int) -> list[bytes]:
        try:
            lines = await self.follower.read(limit)
        except HectorError as error:
            raise errors.of(error) from error
        if not lines and self.follower.failure is not None:
            raise errors.of(self.follower.failure)
        return lines


class TaskEvents:
    """``Events`` of one task: first a Task, where one is wanted, then what comes."""

    def __init__(
        self,
        reader: TaskReader,
        opening: ExitStack,
        first: Callable[[], Awaitable[Event]] | None,
        *,
        decides: bool = False,
        ends_with_question: bool = False,
        extension: str | None = None,
    ) -> None:
        """``reader`` is open, closed with ``opening``. ``first`` makes the first event and has the reader go on behind
        it; ``decides``: once the agent has said anything. ``extension``: every event's metadata says where it stands.
        """
        self._reader = reader
        self._opening = opening
        self._first = first
        self._decides = decides
        self._ends_with_question = ends_with_question
        self._extension = extension
        self._nudged = False

    def __aiter__(self) -> TaskEvents:
        return self

    def nudge(self) -> None:
        self._nudged = True
        self._reader.follower.wakeup.wake()

    async def __anext__(self) -> list[Event]:
        reader = self._reader
        if self._first is not None:
            while self._decides and not reader.follower.ready:
                if self._nudged:
                    self._nudged = False
                    return []
                await reader.follower.wakeup.wait()
            first, self._first = self._first, None
            try:
                return self._marked([await first()])
            except HectorError as error:
                raise errors.of(error) from error
        if self._over():
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        while not reader.ready:
            if self._nudged:
                self._nudged = False
                return []
            await reader.follower.wakeup.wait()
        events = await reader.read()
        if not events:
            raise StopAsyncIteration
        return self._marked(self._cut(events))

    async def aclose(self) -> None:
        self._opening.close()

    def _over(self) -> bool:
        view = self._reader.view
        if view.ended or view.reply is not None or self._reader.follower.ended:
            return True
        return self._ends_with_question and view.state == "TASK_STATE_INPUT_REQUIRED"

    def _cut(self, events: list[Event]) -> list[Event]:
        """A bare message is all there is (3.1.2)."""
        message = next((each for each in events if each.payload.message is not None), None)
        return events if message is None else [message]

    def _marked(self, events: list[Event]) -> list[Event]:
        if self._extension is None:
            return events
        return [Event(each.id, _mark(each, self._extension)) for each in events]


def _mark(event: Event, uri: str) -> a2a.StreamResponse:
    for name in ("task", "status_update", "artifact_update", "message"):
        found = getattr(event.payload, name)
        if found is not None:
            metadata = {**(found.metadata or {}), uri: {"after": event.id}}
            return a2a.StreamResponse(**{name: msgspec.structs.replace(found, metadata=metadata)})
    return event.payload
