"""The live tail of a task's log: append, wait, read. One writer for all logs groups what waits into one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
import structlog
import trio

from hector_trio.errors import Gone, HectorError, InvalidRequest, RunError, StoreUnavailable
from hector_trio.models import Chunk, ChunkType, encode, timestamp
from hector_trio.session import MessageRow
from hector_trio.stores import Append, Change, Store
from hector_trio.task import Fold, Outcome, TaskRow, final_chunk, join_lines, named, split_lines

READ_BYTES: Final = 256 * 1024
"""How much of a log one read of the store brings."""

ENVELOPE: Final = 512
"""What a chunk may have besides its content, in bytes: the id, the time …"""

EMITS_PER_CHECKPOINT: Final = 32
"""An agent that only emits lets others run this often."""


logger = structlog.stdlib.get_logger("hector_trio.log")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Wakeup:
    """One waiting task's alarm: set from anywhere on the loop, any number of times, taken by one waiter."""

    __slots__ = ("_set", "_task")

    def __init__(self) -> None:
        self._set = False
        self._task: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        self._set = True
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Returns once ``wake`` was called since the last return. Always a checkpoint."""
        if self._set:
            await trio.lowlevel.checkpoint()  # cancelled here, the alarm stays for the next wait
            self._set = False
            return
        self._task = trio.lowlevel.current_task()

        def abort(_: Callable[[], Any]) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._set = False


class TaskLog:
    """The log of a task that runs here: numbers chunks, queues them for the writer, keeps the last committed ones.

    Readers see committed chunks only. The run is the only one that puts.
    """

    def __init__(
        self,
        row: TaskRow,
        writer: LogWriter,
        *,
        max_uncommitted: int,
        max_chunk: int,
        max_log: int,
        tail_bytes: int,
    ) -> None:
        self.key = row.key
        self.task_id = row.task_id
        self.instance = row.instance
        self.fold = Fold()
        self.committed = row.last_seq
        """The last seq that every reader may see."""
        self.final_seq: int | None = None
        """The seq of the committed final chunk."""
        self.failure: HectorError | None = None
        """Why the store refused; what waited then is gone."""
        self.lost = False
        """Whether chunks of the agent were among what is gone: the fold then holds more than the log."""
        self.readers: set[Wakeup] = set()
        self.on_refused: Callable[[HectorError], None] = lambda error: None
        self._writer = writer
        self._max_uncommitted = max_uncommitted
        self._max_chunk = max_chunk
        self._max_log = max_log
        self._tail_bytes = tail_bytes
        self._seq = row.last_seq
        self._bytes = 0
        self._emits = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._change: Change | None = None
        self._message: MessageRow | None = None
        self._final_queued = False
        self._flying: list[bytes] | None = None
        self._flying_final = False
        self._flying_message: MessageRow | None = None
        self._unsaid: MessageRow | None = None
        """The user's line, when the store refused it: the final chunk's append is preceded by it."""
        self._tail: list[bytes] = []
        self._tail_size = 0
        self._tail_first = row.last_seq + 1
        self._progress = trio.lowlevel.ParkingLot()

    # --- the run's side

    def put(self, kind: ChunkType, content: Any, **extra: Any) -> None:
        """Numbers, encodes and queues one chunk.

        Raises: RunError ``chunk_too_large``, ``log_full``, or ``not_json``; the store's failure if it has refused.
        """
        if self.failure is not None:
            raise self.failure
        if self._final_queued:
            raise RunError("run_ended", "The run has ended; nothing can be emitted any more")
        try:
            line = encode(
                Chunk(
                    task_id=self.task_id,
                    seq=self._seq + 1,
                    chunk_type=kind,
                    content=content,
                    timestamp=timestamp(now_ms()),
                    **extra,
                )
            )
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RunError("not_json", f"The agent emitted a {kind} chunk that cannot stand in JSON") from error
        if len(line) > self._max_chunk + ENVELOPE:
            raise RunError("chunk_too_large", f"A {kind} chunk has {len(line)} bytes; {self._max_chunk} are allowed")
        if self._bytes + len(line) > self._max_log:
            raise RunError("log_full", f"The task's log would exceed {self._max_log} bytes")
        self._bytes += len(line)
        self.fold.add(kind, content if isinstance(content, str) else msgspec.json.decode(encode(content)))
        self._queue(line)

    async def emit(self, kind: ChunkType, content: Any, **extra: Any) -> None:
        """``put``, then waits while too much is uncommitted, and lets others run now and then."""
        self.put(kind, content, **extra)
        self._emits += 1
        if self._pending_bytes > self._max_uncommitted:
            while self._pending_bytes > self._max_uncommitted and self.failure is None:
                await self._progress.park()
        elif self._emits % EMITS_PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def emit_text(self, text: str) -> None:
        """Text longer than a chunk may be becomes several chunks."""
        if not isinstance(text, str):
            raise InvalidRequest(f"emit_text takes a string, not {type(text).__name__}")
        limit = max(1, self._max_chunk // 8)  # an escaped character takes up to six bytes, a raw one up to four
        if len(text) <= limit:
            if text:
                await self.emit("text", text)
            return
        for start in range(0, len(text), limit):
            await self.emit("text", text[start : start + limit])

    def change(self, change: Change, message: MessageRow | None = None) -> None:
        """Queues a change of the row (and a line of the conversation) for the next commit."""
        self._change = change
        self._message = message
        self._writer.mark(self)

    async def finish(self, outcome: Outcome, change: Change, message: MessageRow | None) -> None:
        """Appends the final chunk, with the row's last change, and waits for the commit.

        After a refusal of the store it is numbered behind the last committed chunk. Cut while it waits, it may be
        called again: the final chunk is appended once. Raises: StoreUnavailable, Gone.
        """
        if not self._final_queued:
            if self._unsaid is not None:
                self._message, self._unsaid = self._unsaid, None
                self.change(Change("running"), self._message)
                self.failure = None
            if self._message is not None:
                await self.settled()  # a change holds one line of the conversation: the user's goes first
                if self.failure is not None:
                    raise self.failure
            self.failure = None
            self._change = change
            self._message = message
            self._final_queued = True
            self._queue(encode(final_chunk(self.task_id, self._seq + 1, now_ms(), outcome)))
        await self.settled()
        if self.failure is not None:
            raise self.failure

    async def settled(self) -> None:
        """Returns when nothing waits for the store any more: all is committed, or the store has refused."""
        while (self._pending_bytes or self._change is not None or self._flying is not None) and self.failure is None:
            await self._progress.park()

    def _queue(self, line: bytes) -> None:
        self._seq += 1
        self._pending.append(line)
        self._pending_bytes += len(line)
        self._writer.mark(self)

    # --- the writer's side

    def take(self) -> Append:
        """Everything that waits, as one append; ``committed`` or ``refused`` follows."""
        lines, self._pending = self._pending, []
        last = self._seq
        append = Append(
            key=self.key,
            instance=self.instance,
            first_seq=last - len(lines) + 1,
            last_seq=last,
            data=join_lines(lines),
            change=self._change,
            message=self._message,
        )
        self._flying = lines
        self._flying_final = self._final_queued
        self._flying_message = self._message
        self._change = self._message = None
        return append

    def commit(self, append: Append) -> None:
        lines = self._flying or []
        self._flying = self._flying_message = None
        self._tail += lines
        size = sum(map(len, lines))
        self._pending_bytes -= size
        self._tail_size += size
        self.committed = append.last_seq
        if self._flying_final:
            self.final_seq = append.last_seq
        if self._tail_size > 2 * self._tail_bytes:
            self._trim()
        self._moved()

    def refuse(self, error: HectorError) -> None:
        """The store has refused: what waits is discarded and the numbers go back to the last committed chunk."""
        self.failure = error
        lines = len(self._pending) + len(self._flying or ()) - self._final_queued
        self.lost = self.lost or lines > 0
        for message in (self._flying_message, self._message):
            if message is not None and message.role == "user":
                self._unsaid = message
        self._pending, self._flying, self._flying_message = [], None, None
        self._pending_bytes = 0
        self._change = self._message = None
        self._final_queued = False
        self._seq = self.committed
        self._moved()
        self.on_refused(error)

    async def unread(self) -> None:
        """Returns when nobody follows any more."""
        while self.readers:
            await self._progress.park()

    def left(self, reader: Wakeup) -> None:
        self.readers.discard(reader)
        if not self.readers:
            self._progress.unpark_all()

    def _moved(self) -> None:
        self._progress.unpark_all()
        for reader in self.readers:
            reader.wake()

    def _trim(self) -> None:
        drop = 0
        while self._tail_size > self._tail_bytes:
            self._tail_size -= len(self._tail[drop])
            drop += 1
        del self._tail[:drop]
        self._tail_first += drop

    # --- the readers' side

    def lines_after(self, after: int) -> list[bytes] | None:
        """Committed chunks beyond ``after``; ``None`` when memory no longer holds all of them: ask the store."""
        if after + 1 < self._tail_first:
            return None
        return self._tail[after + 1 - self._tail_first :]


class LogWriter:
    """Commits what all logs have waiting: one transaction per round, as many rounds as the store can do."""

    def __init__(self, store: Store, *, committed: Callable[[int], None] = lambda chunks: None) -> None:
        self._store = store
        self._dirty: dict[TaskLog, None] = {}
        self._wakeup = Wakeup()
        self._committed = committed

    def mark(self, log: TaskLog) -> None:
        if not self._dirty:
            self._wakeup.wake()
        self._dirty[log] = None

    async def run(self) -> None:
        """Runs until cancelled. A log whose append is refused is told so; the others go on."""
        while True:
            while not self._dirty:
                await self._wakeup.wait()
            logs, self._dirty = self._dirty, {}
            appends = [(log, log.take()) for log in logs]
            try:
                refused = await self._store.append([append for _, append in appends])
            except HectorError as error:
                self._refuse(logs, error)
                continue
            except Exception:
                logger.exception("append_failed")
                self._refuse(logs, StoreUnavailable("The store failed; its error has been logged"))
                continue
            chunks = 0
            for log, append in appends:
                if append.key in refused:
                    self._refuse([log], Gone("The task is gone, or another instance's by now"))
                else:
                    chunks += append.last_seq - append.first_seq + 1
                    log.commit(append)
            self._committed(chunks)

    def _refuse(self, logs: Iterable[TaskLog], error: HectorError) -> None:
        for log in logs:
            self._dirty.pop(log, None)  # what it queued meanwhile is discarded with the rest
            log.refuse(error)


class Follower:
    """A reader's place in a task's log. A context manager; costs a cursor.

    ``read`` gives whatever is committed beyond ``after``, first from the store, then live from memory: no duplicate, no
    hole, never a live chunk before the replay. Several followers may share one ``wakeup`` (one reader of many tasks).
    """

    def __init__(
        self, store: Store, row: TaskRow, log: TaskLog | None, *, after: int = 0, wakeup: Wakeup | None = None
    ) -> None:
        self.task_id = row.task_id
        self.after = after
        self.failure: HectorError | None = None
        """Set once ``read`` has ended because the store refused: nothing more comes, and no final chunk."""
        self.wakeup = wakeup if wakeup is not None else Wakeup()
        self._store = store
        self._key = row.key
        self._log = log
        self._final_seq = row.last_seq if row.ended else None
        self._rest: list[bytes] = []
        """What a read of the store brought beyond the limit of that read."""

    def __enter__(self) -> Follower:
        if self._log is not None:
            self._log.readers.add(self.wakeup)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._log is not None:
            self._log.left(self.wakeup)

    @property
    def ended(self) -> bool:
        """Whether the final chunk has been given out, or nothing can follow."""
        log = self._log
        final = self._final_seq if log is None or log.final_seq is None else log.final_seq
        return self.failure is not None or (final is not None and self.after >= final)

    @property
    def ready(self) -> bool:
        """Whether ``read`` would return without waiting for the run."""
        log = self._log
        return log is None or bool(self._rest) or log.committed > self.after or log.failure is not None or self.ended

    async def read(self, limit: int = 1 << 30) -> list[bytes]:
        """The next encoded chunks (at most ``limit``), waiting for at least one; ``[]`` when there will be no more.

        Raises: StoreUnavailable when the log cannot be read.
        """
        while not self.ended:
            log = self._log
            if self._rest:
                return self._give(self._rest, limit)
            if log is None:
                lines = await self._stored()
                if not lines:
                    if self._final_seq is not None:
                        self.failure = Gone("The task's log is no longer held")
                    self._final_seq = self.after
                return self._give(lines, limit)
            held = log.lines_after(self.after)
            if held is None:
                lines = await self._stored()
                if not lines:
                    self.failure = Gone("The task's log is no longer held")
                return self._give(lines, limit)
            if held:
                self.after += len(held[:limit])
                return held[:limit]
            if log.failure is not None:
                self.failure = log.failure
                return []
            await self.wakeup.wait()
        return []

    async def _stored(self) -> list[bytes]:
        lines: list[bytes] = []
        for segment in await self._store.read_log(self._key, self.after, READ_BYTES):
            chunks = split_lines(segment.data)
            lines += chunks[max(0, self.after + 1 - segment.first_seq) :]
        return named(lines, self.task_id)

    def _give(self, lines: list[bytes], limit: int) -> list[bytes]:
        """The first of what was read, and keeps the rest: reading on must not read again."""
        given, self._rest = lines[:limit], lines[limit:]
        self.after += len(given)
        return given
