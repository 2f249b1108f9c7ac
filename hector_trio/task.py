"""The task: its row, its state table, its chunks, and the fold of a complete log into what the task became."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.models import (
    Chunk,
    ChunkType,
    Content,
    GraceMs,
    Status,
    Task,
    TaskError,
    TaskRequest,
    encode,
    timestamp,
)

REJECTED: Final = "rejected"
"""The code of a task that its agent has decided not to perform."""

EXTENSION_REQUIRED: Final = "extension_required"
"""The code of a task whose A2A client did not declare an extension that its agent needs; its message is the URI."""

ENDED: frozenset[str] = frozenset({"completed", "failed", "cancelled"})

NEXT: dict[str, frozenset[str]] = {
    "pending": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"input_required", "completed", "failed", "cancelled"}),
    "input_required": frozenset({"pending", "running", "failed", "cancelled"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""What may follow what. An ended task never changes."""


Mark = Literal["answered", "auth", "rejected", "reply"]
"""Finer than a status: ``pending`` again because its question was ``answered``; ``input_required`` of a permission
(``auth``); ``failed`` because the agent ``rejected`` it; ``completed`` by a bare message, a ``reply``."""


class Question(Struct, frozen=True, rename="camel"):
    """What a task that waits for input has asked, and what its next run is to be given."""

    question: Any
    """The prompt: text, or any JSON."""
    asked_at: int
    """Milliseconds since the epoch."""
    saved: Any = None
    """What the agent wants to have again, as JSON."""
    answer: Content | None = None
    """Once it was answered, until the run that takes it up has begun."""
    auth: bool = False
    """Whether what it asks for is a permission."""
    message: A2aMessage | None = None
    """The answer as an A2A client sent it."""


class StoredRequest(TaskRequest, frozen=True):
    """A request as it is kept: with the A2A message that it came from, if it did."""

    message: A2aMessage | None = None
    extensions: tuple[str, ...] = ()
    """What its A2A client has declared."""


class TaskRow(Struct, frozen=True):
    """A task as the store keeps it. Times are milliseconds since the epoch."""

    key: int
    """The store's own number: unique for ever, growing with the order of acceptance."""
    owner: str
    agent_id: str
    task_id: str
    status: Status
    request: bytes
    """The accepted request as JSON (``TaskRequest``)."""
    fingerprint: str
    policy: str
    """``cancel``, ``continue`` or ``grace:<ms>``."""
    instance: str
    """Who runs it; only that instance may append."""
    metadata: dict[str, Any]
    created_at: int
    session_id: str | None = None
    last_seq: int = 0
    output: Content | None = None
    error: TaskError | None = None
    ended_at: int | None = None
    question: Question | None = None
    """Of a task that waits for input, or whose answer was accepted and not yet taken up."""
    status_at: int = 0
    """When it came into its status."""
    mark: Mark | None = None
    """What the status alone does not say."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Outcome(Struct, frozen=True):
    """How a run ended: the state, and the words of the final chunk."""

    status: Literal["completed", "failed", "cancelled"]
    reason: str | None = None
    code: str | None = None
    message: str = ""
    details: Any = None
    retryable: bool = False

    def error(self) -> TaskError | None:
        if self.status != "failed":
            return None
        return TaskError(code=self.code or "internal_error", message=self.message, details=self.details)


def final_chunk(task_id: str, seq: int, now: int, outcome: Outcome) -> Chunk:
    """The one chunk that ends a log (PROTOCOL: ``done`` or ``error``)."""
    if outcome.status == "failed":
        return Chunk(
            task_id=task_id,
            seq=seq,
            chunk_type="error",
            content=outcome.message,
            timestamp=timestamp(now),
            final=True,
            status="failed",
            code=outcome.code or "internal_error",
            retryable=True if outcome.retryable else UNSET,
        )
    return Chunk(
        task_id=task_id,
        seq=seq,
        chunk_type="done",
        content="",
        timestamp=timestamp(now),
        final=True,
        status=outcome.status,
        reason=outcome.reason if outcome.reason is not None else UNSET,
    )


class Fold:
    """What a log adds up to, chunk by chunk: the output so far, and at the end the state."""

    __slots__ = ("_data", "_text", "error", "last_seq", "replied", "size", "status")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._data: list[Any] = []
        self.last_seq = 0
        self.size = 0
        """Bytes of the encoded chunks, where whoever adds them counts them."""
        self.status: Status = "running"
        self.error: TaskError | None = None
        self.replied = False
        """Whether the answer is a bare message."""

    def add(self, chunk_type: ChunkType, content: Any, media_type: str | UnsetType = UNSET) -> None:
        """Takes one chunk that is not final; of bytes, ``content`` is the base64 of them."""
        if chunk_type == "text":
            self._text.append(content)
        elif chunk_type == "data":
            binary = {"mediaType": media_type, "encoding": "base64", "content": content}
            self._data.append(content if media_type is UNSET else binary)
        self.status = "input_required" if chunk_type == "metadata" and asks(content) else "running"

    def add_text(self, text: str) -> None:
        """``add`` of text."""
        self._text.append(text)
        self.status = "running"

    def take(self, chunk: Chunk) -> None:
        """Takes one decoded chunk, the final one included."""
        self.last_seq = chunk.seq
        if not chunk.final:
            self.add(chunk.chunk_type, chunk.content, chunk.media_type)
            self.replied |= chunk.reply is not UNSET
            return
        self.status = chunk.status if chunk.status is not UNSET else "completed"
        if self.status == "failed":
            code = chunk.code if chunk.code is not UNSET else "internal_error"
            self.error = TaskError(code=code, message=str(chunk.content))

    def output(self) -> Content | None:
        """All text as one; without text the data (one value as it is, several as a list); ``None`` without either."""
        if self._text:
            return Content("text/plain", "".join(self._text))
        if self._data:
            return Content("application/json", self._data[0] if len(self._data) == 1 else list(self._data))
        return None


def asks(content: Any) -> bool:
    """Whether a metadata chunk says that the task waits for input."""
    return isinstance(content, dict) and content.get("status") == "input_required"


def fold(chunks: Iterable[Chunk]) -> Fold:
    """Folds a log."""
    result = Fold()
    for chunk in chunks:
        result.take(chunk)
    return result


def policy_of(choice: str | GraceMs | None, default: str, max_grace_ms: int) -> str:
    """The stored form of an ``onDisconnect``. More grace than ``max_grace_ms`` is not given."""
    if choice is None:
        return default
    return f"grace:{min(choice.grace_ms, max_grace_ms)}" if isinstance(choice, GraceMs) else choice


def grace_of(policy: str) -> float | None:
    """Seconds that a task goes on without viewers; ``None``: its policy is another."""
    kind, _, ms = policy.partition(":")
    return int(ms) / 1000 if kind == "grace" else None


def fingerprint(agent_id: str, session_id: str | None, request: TaskRequest) -> str:
    """Equal for requests that ask for the same thing: agent, session, input and parameters."""
    same = (agent_id, session_id, request.input, request.parameters or {})
    return hashlib.sha256(msgspec.json.encode(same, order="deterministic")).hexdigest()


def session_of(request: TaskRequest) -> str | None:
    return request.context.session_id if request.context is not None else None


def wire_task(row: TaskRow) -> Task:
    """The row as clients see it."""
    return Task(
        task_id=row.task_id,
        agent_id=row.agent_id,
        status=row.status,
        metadata=row.metadata if row.mark != "auth" else {**row.metadata, "reason": "auth"},
        started_at=timestamp(row.created_at),
        session_id=UNSET if row.session_id is None else row.session_id,
        output=UNSET if row.output is None else row.output,
        error=UNSET if row.error is None else row.error,
        ended_at=UNSET if row.ended_at is None else timestamp(row.ended_at),
        prompt=row.question.question if row.status == "input_required" and row.question is not None else UNSET,
    )


# --- encoded chunks ---------------------------------------------------------------------------------------------------
# A chunk is encoded once, when it is emitted. Encoded chunks are kept joined by newlines, which JSON text never holds
# unescaped, so a segment of the log keeps its chunks' boundaries and needs no decoding to be sent.


def encode_chunk(chunk: Chunk) -> bytes:
    return encode(chunk)


def join_lines(lines: Iterable[bytes]) -> bytes:
    return b"\n".join(lines)


def split_lines(data: bytes) -> list[bytes]:
    return data.split(b"\n") if data else []


def named(lines: list[bytes], task_id: str) -> list[bytes]:
    """``lines`` under ``task_id``: a task whose id was taken over by a later one is read under its new name."""
    prefix = b'{"taskId":"' + task_id.encode() + b'",'
    if not lines or lines[0].startswith(prefix):
        return lines
    return [prefix + line[line.index(b'"seq":') :] for line in lines]


def seq_of(line: bytes) -> bytes:
    """The digits of an encoded chunk's ``seq``; an id before it holds no quote."""
    start = line.index(_SEQ) + len(_SEQ)
    return line[start : line.index(b",", start)]


def joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """``lines`` with adjacent text as one chunk (``firstSeq`` to ``seq``), up to ``JOIN_BYTES`` of lines each."""
    texts: list[bytes] = []
    size = 0
    for line in lines:
        is_text = line.endswith(_PLAIN) and line.startswith(_TEXT, line.index(_SEQ) + len(_SEQ) + len(seq_of(line)))
        if texts and (not is_text or size + len(line) > JOIN_BYTES):
            yield _join(texts)
            texts, size = [], 0
        if is_text:
            texts.append(line)
            size += len(line)
        else:
            yield line
    if texts:
        yield _join(texts)


def _join(lines: list[bytes]) -> bytes:
    if len(lines) == 1:
        return lines[0]
    chunks = [_decoder.decode(line) for line in lines]
    last = chunks[-1]
    return encode(
        Chunk(
            task_id=last.task_id,
            seq=last.seq,
            chunk_type="text",
            content="".join(chunk.content for chunk in chunks),
            timestamp=last.timestamp,
            first_seq=chunks[0].seq,
        )
    )


def gap_line(task_id: str, first: int, last: int, now: int, reason: str) -> bytes:
    """What stands for the chunks ``first .. last`` that are no longer held."""
    gap = {"gap": {"from": first, "to": last, "reason": reason}}
    return encode(Chunk(task_id=task_id, seq=last, chunk_type="metadata", content=gap, timestamp=timestamp(now)))


JOIN_BYTES: Final = 64 * 1024
"""How much text, as encoded chunks, is joined into one."""

_SEQ: Final = b'","seq":'
_TEXT: Final = b',"chunkType":"text"'
_PLAIN: Final = b'"final":false}'
"""How a chunk ends that says nothing more than all do; a part of an artifact is not joined to others."""
_decoder = msgspec.json.Decoder(Chunk)


def decode_chunk(line: bytes) -> Chunk:
    return _decoder.decode(line)
