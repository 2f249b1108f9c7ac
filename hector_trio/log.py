"""The live tail of a task's log: append, wait, read. One writer for all logs groups what waits into one commit."""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

import msgspec
import structlog
import trio
from msgspec import UNSET

from hector_trio.errors import Draining, Gone, HectorError, InvalidRequest, RunError, StoreUnavailable
from hector_trio.models import Chunk, ChunkType, Status, encode, timestamp
from hector_trio.session import MessageRow
from hector_trio.stores import Append, Change, Store
from hector_trio.task import (
    Fold,
    Outcome,
    TaskRow,
    final_chunk,
    gap_line,
    join_lines,
    joined,
    named,
    seq_of,
    split_lines,
)
from hector_trio.wakeup import Wakeup

READ_BYTES: Final = 256 * 1024
"""How much of a log one read of the store brings."""

ENVELOPE: Final = 512
"""What a chunk may have besides its content, in bytes: the id, the time …"""

EMITS_PER_CHECKPOINT: Final = 64
"""An agent that only emits lets others run this often."""

NEVER: Final = 1 << 62
"""A seq that no log reaches."""

_MEDIA_TYPE: Final = re.compile(r"(?=.{3,255}\Z)[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(; ?[!-~ ]*)?\Z")

logger = structlog.stdlib.get_logger("hector_trio.log")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


_stamped_ms = 0
_stamped = b""


def _stamp() -> bytes:
    """The rest of a chunk behind its content, when it is nothing but text; made once a millisecond."""
    global _stamped_ms, _stamped
    ms = time.time_ns() // 1_000_000
    if ms != _stamped_ms:
        _stamped_ms, _stamped = ms, b',"timestamp":"%b","final":false}' % timestamp(ms).encode()
    return _stamped


def _nothing(*_: object) -> None:
    """Nobody has asked to be told."""


class TaskLog:
    """The log of a task that has not ended: numbers chunks, queues them for the writer, keeps the last committed ones.

    Readers see committed chunks only. The run is the only one that puts; one run after the other, when the task asks
    for input between them. Whoever reads before the answer goes on reading after it.
    """

    __slots__ = (
        "_change",
        "_emits",
        "_final_queued",
        "_flying",
        "_flying_final",
        "_flying_message",
        "_max_chunk",
        "_max_log",
        "_max_text",
        "_max_uncommitted",
        "_message",
        "_paused_at",
        "_pending",
        "_pending_bytes",
        "_progress",
        "_seq",
        "_tail",
        "_tail_bytes",
        "_tail_first",
        "_tail_size",
        "_text_head",
        "_unsaid",
        "_writer",
        "committed",
        "failure",
        "final_seq",
        "fold",
        "folded",
        "instance",
        "key",
        "lost",
        "marked",
        "on_readers",
        "on_refused",
        "readers",
        "status",
        "task_id",
        "viewers",
    )

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
        self.folded = row.last_seq == 0
        """Whether ``fold`` says what the log holds; else ``restore`` is to be called before anything is put."""
        self.status: Status = row.status
        """As committed."""
        self.committed = row.last_seq
        """The last seq that every reader may see."""
        self.final_seq: int | None = None
        """The seq of the committed final chunk."""
        self.failure: HectorError | None = None
        """Why the store refused; what waited then is gone."""
        self.lost = False
        """Whether chunks of the agent were among what is gone: the fold then holds more than the log."""
        self.marked = False
        """Whether the writer knows that something waits."""
        self.readers: set[Follower] = set()
        self.viewers = 0
        """Readers that count as somebody who watches."""
        self.on_readers: Callable[[TaskLog], None] = _nothing
        """Called when readers have come or gone."""
        self.on_refused: Callable[[TaskLog], None] = _nothing
        """Called when the store has refused; ``failure`` says why."""
        self._writer = writer
        self._max_uncommitted = max_uncommitted
        self._max_chunk = max_chunk
        self._max_text = max(1, max_chunk // 8)  # an escaped character takes up to six bytes, a raw one up to four
        self._max_log = max_log
        self._text_head = b'{"taskId":"%b","seq":' % row.task_id.encode()
        self._tail_bytes = tail_bytes
        self._seq = row.last_seq
        self._emits = 0
        self._paused_at = NEVER
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
        self._progress: trio.lowlevel.ParkingLot | None = None

    # --- the run's side

    @property
    def begun(self) -> bool:
        """Whether it holds anything, committed or not."""
        return self._seq > 0

    def put(self, kind: ChunkType, content: Any, **extra: Any) -> int:
        """Numbers, encodes and queues one chunk; returns its number.

        Raises: RunError ``chunk_too_large``, ``log_full``, or ``not_json``; the store's failure if it has refused.
        """
        self._check_open()
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
        self._check_size(kind, len(line))
        self.fold.size += len(line)
        plain = content if isinstance(content, str) else msgspec.json.decode(encode(content))
        self.fold.add(kind, plain, extra.get("media_type", UNSET))
        self.fold.replied |= "reply" in extra
        self._queue(line)
        return self._seq

    def _put_text(self, text: str) -> None:
        """``put`` of text: the same bytes, by far the most frequent, without an object for each."""
        if self.failure is not None or self._final_queued:
            self._check_open()
        try:
            line = b'%b%d,"chunkType":"text","content":%b%b' % (self._text_head, self._seq + 1, encode(text), _stamp())
        except ValueError as error:
            raise RunError("not_json", "The agent emitted a text chunk that cannot stand in JSON") from error
        size = len(line)
        if size > self._max_chunk + ENVELOPE or self.fold.size + size > self._max_log:
            self._check_size("text", size)
        self.fold.size += size
        self.fold.add_text(text)
        self._seq += 1
        self._pending.append(line)
        self._pending_bytes += size
        if not self.marked:
            self._writer.mark(self)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._final_queued:
            raise RunError("run_ended", "The run has ended; nothing can be emitted any more")

    def _check_size(self, kind: ChunkType, size: int) -> None:
        if size > self._max_chunk + ENVELOPE:
            raise RunError("chunk_too_large", f"A {kind} chunk has {size} bytes; {self._max_chunk} are allowed")
        if self.fold.size + size > self._max_log:
            raise RunError("log_full", f"The task's log would exceed {self._max_log} bytes")

    async def emit(self, kind: ChunkType, content: Any, **extra: Any) -> None:
        """``put``, then waits while too much is uncommitted or a viewer has it pause, and lets others run at times."""
        self.put(kind, content, **extra)
        if self._is_due():
            await self._give_way()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    def _is_due(self) -> bool:
        """Whether whoever has emitted is to wait, or to let others run."""
        self._emits += 1
        return (
            self._emits % EMITS_PER_CHECKPOINT == 0
            or self._pending_bytes > self._max_uncommitted
            or self._seq > self._paused_at
        )

    async def _give_way(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._pending_bytes > self._max_uncommitted and self.failure is None:
            await self._progressed()
        while self._seq > self._paused_at and self.failure is None:
            await self._progressed()

    async def emit_text(self, text: str) -> None:
        """Text longer than a chunk may be becomes several chunks."""
        if not isinstance(text, str):
            raise InvalidRequest(f"emit_text takes a string, not {type(text).__name__}")
        for start in range(0, len(text), self._max_text):
            self._put_text(text[start : start + self._max_text])
            if self._is_due():
                await self._give_way()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()

    async def emit_bytes(self, data: bytes, media_type: str) -> None:
        """A ``data`` chunk of bytes; in JSON they are base64."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidRequest(f"emit_bytes takes bytes, not {type(data).__name__}")
        if not isinstance(media_type, str) or not _MEDIA_TYPE.match(media_type):
            raise InvalidRequest("emit_bytes takes a media type such as image/png, of at most 255 characters")
        await self.emit("data", b64encode(data).decode(), media_type=media_type, encoding="base64")

    async def _progressed(self) -> None:
        self._progress = self._progress or trio.lowlevel.ParkingLot()
        await self._progress.park()

    def _tell_progress(self) -> None:
        if self._progress is not None:
            self._progress.unpark_all()

    def pause_at(self, seq: int | None) -> None:
        """Has ``emit`` wait once a chunk beyond ``seq`` is emitted, until it is moved on; ``None``: no longer."""
        self._paused_at = NEVER if seq is None else seq
        self._tell_progress()

    def restore(self, fold: Fold) -> None:
        """Takes what the committed part of the log adds up to."""
        self.fold, self.folded = fold, True

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
            self._queue(encode(final_chunk(self.task_id, self._seq + 1, change.ended_at or now_ms(), outcome)))
        await self.settled()
        if self.failure is not None:
            raise self.failure

    async def settled(self) -> None:
        """Returns when nothing waits for the store any more: all is committed, or the store has refused."""
        while (self._pending_bytes or self._change is not None or self._flying is not None) and self.failure is None:
            await self._progressed()

    def _queue(self, line: bytes) -> None:
        self._seq += 1
        self._pending.append(line)
        self._pending_bytes += len(line)
        if not self.marked:
            self._writer.mark(self)

    # --- the writer's side

    def take(self) -> Append:
        """Everything that waits, as one append; ``committed`` or ``refused`` follows."""
        lines, self._pending = self._pending, []
        self.marked = False
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
        """The readers are not told: the writer does that once for all it has committed."""
        lines = self._flying or []
        self._flying = self._flying_message = None
        self._tail += lines
        size = sum(map(len, lines))
        self._pending_bytes -= size
        self._tail_size += size
        self.committed = append.last_seq
        if append.change is not None:
            self.status = append.change.status
        if self._flying_final:
            self.final_seq = append.last_seq
        if self._tail_size > 2 * self._tail_bytes:
            self._trim()
        self._tell_progress()

    def refuse(self, error: HectorError) -> None:
        """The store has refused: what waits is discarded and the numbers go back to the last committed chunk."""
        self.failure = error
        self.marked = False
        lines = len(self._pending) + len(self._flying or ()) - self._final_queued
        if lines:
            self.lost, self.folded = True, False
        for message in (self._flying_message, self._message):
            if message is not None and message.role == "user":
                self._unsaid = message
        self._pending, self._flying, self._flying_message = [], None, None
        self._pending_bytes = 0
        self._change = self._message = None
        self._final_queued = False
        self._seq = self.committed
        self._tell_progress()
        for reader in self.readers:
            reader.alarm()
        self.on_refused(self)

    async def unread(self) -> None:
        """Returns when nobody follows any more."""
        while self.readers:
            await self._progressed()

    def came(self, reader: Follower) -> None:
        self.readers.add(reader)
        self.viewers += reader.viewer
        self.on_readers(self)

    def left(self, reader: Follower) -> None:
        if reader in self.readers:
            self.readers.discard(reader)
            self.viewers -= reader.viewer
            if not self.readers:
                self._tell_progress()
            self.on_readers(self)

    def _trim(self) -> None:
        drop = 0
        while self._tail_size > self._tail_bytes:
            self._tail_size -= len(self._tail[drop])
            drop += 1
        del self._tail[:drop]
        self._tail_first += drop

    # --- the readers' side

    def lines_after(self, after: int, limit: int = NEVER) -> list[bytes] | None:
        """Committed chunks beyond ``after``; ``None`` when memory no longer holds all of them: ask the store."""
        if after + 1 < self._tail_first:
            return None
        start = after + 1 - self._tail_first
        return self._tail[start : start + limit]


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
        log.marked = True

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
            alarms: dict[Callable[[], None], None] = {}  # one reader may follow many of these logs
            for log, append in appends:
                if append.key in refused:
                    self._refuse([log], Gone("The task is gone, or another instance's by now"))
                else:
                    chunks += append.last_seq - append.first_seq + 1
                    log.commit(append)
                    for reader in log.readers:
                        alarms[reader.alarm] = None
            for alarm in alarms:
                alarm()
            self._committed(chunks)

    def _refuse(self, logs: Iterable[TaskLog], error: HectorError) -> None:
        for log in logs:
            self._dirty.pop(log, None)  # what it queued meanwhile is discarded with the rest
            log.refuse(error)


def _no_log() -> None:
    return None


class Follower:
    """A reader's place in a task's log. A context manager; costs a cursor.

    ``read`` gives whatever is committed beyond ``after``, first from the store, then live from memory: no duplicate, no
    hole that is not said, never a live chunk before the replay. Several followers may share one ``wakeup`` (one reader
    of many tasks), or one ``alarm``, which is called instead whenever there may be something to read: on the way of
    every commit, so it must not wait, raise, or come or go as a reader. A ``viewer`` is somebody who watches: a task
    whose policy is a grace goes on while it has one.
    """

    __slots__ = (
        "_final_seq",
        "_live",
        "_log",
        "_rest",
        "_row",
        "_store",
        "after",
        "alarm",
        "failure",
        "task_id",
        "viewer",
        "wakeup",
    )

    def __init__(
        self,
        store: Store,
        row: TaskRow,
        live: Callable[[], TaskLog | None] = _no_log,
        *,
        after: int = 0,
        wakeup: Wakeup | None = None,
        alarm: Callable[[], None] | None = None,
        viewer: bool = False,
    ) -> None:
        """``live`` gives the log of a task that has not ended. It is asked when this is entered: one that was taken
        before may no longer be the one that is written to."""
        self.task_id = row.task_id
        self.after = after
        self.viewer = viewer
        self.failure: HectorError | None = None
        """Set once ``read`` has ended because the store refused: nothing more comes, and no final chunk."""
        self.wakeup = wakeup if wakeup is not None else Wakeup()
        self.alarm = alarm if alarm is not None else self.wakeup.wake
        self._store = store
        self._row = row
        self._live = live
        self._log: TaskLog | None = None
        self._final_seq = row.last_seq if row.ended else None
        self._rest: list[bytes] = []
        """What a read of the store brought beyond the limit of that read."""

    def __enter__(self) -> Follower:
        self._log = self._live()
        self._live = _no_log
        if self._log is not None:
            self._log.came(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._log is not None:
            self._log.left(self)

    def pause_at(self, seq: int | None) -> None:
        """See ``TaskLog.pause_at``."""
        if self._log is not None:
            self._log.pause_at(seq)

    @property
    def status(self) -> Status:
        """The task's state, as far as it is committed."""
        return self._row.status if self._log is None else self._log.status

    @property
    def last_seq(self) -> int:
        """The last committed seq."""
        return self._row.last_seq if self._log is None else self._log.committed

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

    def take(self, limit: int) -> list[bytes] | None:
        """What ``read`` would return at once, of chunks as they are; ``None`` where it takes ``read`` to tell: nothing
        is there, more than ``limit`` chunks are, or the store must be asked."""
        log = self._log
        if log is None or self._rest or not 0 < log.committed - self.after <= limit:
            return None
        held = log.lines_after(self.after)
        if held:
            self.after += len(held)
        return held

    async def read(self, limit: int = 1 << 30, *, join: bool = False) -> list[bytes]:
        """The next encoded chunks (at most ``limit``), waiting for at least one; ``[]`` when there will be no more.

        Each has its ``seq`` in it. ``join``: adjacent text comes as one chunk, so that ``limit`` holds more of it.
        Chunks that the store no longer holds are one metadata chunk that says so (PROTOCOL 3, gap).
        Raises: StoreUnavailable when the log cannot be read.
        """
        while not self.ended:
            log = self._log
            if self._rest:
                return self._give(self._rest, limit, join)
            held = None if log is None else log.lines_after(self.after, NEVER if join else limit)
            if held is None:
                gap = await self._stored()
                if gap is not None:
                    return [gap]
                if self._rest:
                    return self._give(self._rest, limit, join)
                if log is not None or self._final_seq is not None:
                    self.failure = Gone("The task's log is no longer held")
                    return []
                await self._look_again()
                continue
            if held:
                given = list(islice(joined(held), limit)) if join else held
                self.after = int(seq_of(given[-1])) if join else self.after + len(given)
                return given
            assert log is not None
            if log.failure is not None:
                self.failure = log.failure
                return []
            await self.wakeup.wait()
        return []

    async def _look_again(self) -> None:
        """All that is stored was read of a task that had not ended when it was found, and that is not at work here."""
        row = await self._store.get_task_by_key(self._row.key)
        if row is None:
            self.failure = Gone("The task's log is no longer held")
        elif row.ended:
            self._row, self._final_seq = row, row.last_seq
        else:
            self.failure = Draining("The task does not run now; it goes on at the server's next start", retry_after=5)

    async def _stored(self) -> bytes | None:
        """Reads on from the store; where that no longer holds the next chunk, steps over the gap and returns it."""
        lines: list[bytes] = []
        at = self.after
        for segment in await self._store.read_log(self._row.key, self.after, READ_BYTES):
            if segment.first_seq > at + 1:
                if lines:
                    break  # the next read begins at the gap
                gap = gap_line(self.task_id, at + 1, segment.first_seq - 1, now_ms(), "retention")
                self.after = segment.first_seq - 1
                self._rest = named(split_lines(segment.data), self.task_id)
                return gap
            lines += split_lines(segment.data)[at + 1 - segment.first_seq :]
            at = segment.last_seq
        self._rest = named(lines, self.task_id)
        return None

    def _give(self, lines: list[bytes], limit: int, join: bool) -> list[bytes]:
        """The first of what was read, and keeps the rest: reading on must not read again."""
        given = list(islice(joined(lines), limit)) if join else lines[:limit]
        count = int(seq_of(given[-1])) - self.after if join else len(given)
        self._rest = lines[count:]
        self.after += count
        return given
