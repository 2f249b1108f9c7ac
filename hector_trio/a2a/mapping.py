"""What a task's log is in A2A: chunks become artifacts and status updates, their fold a Task; messages become requests.

The same log gives the same objects, however often and from whatever place it is read.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import replace

from hector_trio.a2a.types import (
    INTERRUPTED,
    TERMINAL,
    Artifact,
    Message,
    Part,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
    is_unset,
)
from hector_trio.models import ArtifactChunk, Chunk, ChunkType, Content, timestamp

OUTPUT: Final = "output"
"""The id of the artifact that holds what an agent emits without naming an artifact."""

PartLike: TypeAlias = "Part | str | bytes | dict[str, Any] | list[Any]"
"""A part, or what one is made of: a text, bytes, or data."""


# --- from A2A: what a message is to an agent --------------------------------------------------------------------------


def content_of(message: Message) -> Content:
    """A message as an input: one data part as it is, anything else as text in which every part has its place."""
    parts = message.parts
    if len(parts) == 1 and not is_unset(parts[0].data):
        return Content("application/json", parts[0].data)
    return Content("text/plain", "\n".join(map(_text_of, parts)))


def _text_of(part: Part) -> str:
    if part.text is not None:
        return part.text
    if part.raw is not None:
        kind = part.media_type or "application/octet-stream"
        if kind.startswith("text/"):
            return part.raw.decode("utf-8", "replace")
        return f"[{part.filename or 'file'}: {kind}, {len(part.raw)} bytes]"
    if part.url is not None:
        return f"[{part.filename or 'file'}: {part.url}]"
    return msgspec.json.encode(part.data).decode()


def media_type_of(part: Part) -> str:
    """What a part is, where it does not say so itself."""
    if part.media_type:
        return part.media_type
    if part.text is not None:
        return "text/plain"
    return "application/octet-stream" if is_unset(part.data) else "application/json"


def part_of(value: PartLike) -> Part:
    if isinstance(value, Part):
        return value
    if isinstance(value, str):
        return Part(text=value)
    if isinstance(value, bytes | bytearray | memoryview):
        return Part(raw=bytes(value), media_type="application/octet-stream")
    return Part(data=value)


# --- from agents: what goes into the log ------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A chunk to be emitted."""

    kind: ChunkType
    content: Any
    extra: dict[str, Any]


def artifact_pieces(parts: Sequence[Part], about: ArtifactChunk) -> list[Piece]:
    """An artifact as chunks, one for each part; who knows only the seed sees text and data."""
    pieces = []
    for n, part in enumerate(parts):
        artifact = replace(
            about,
            append=about.append or n > 0,
            last=about.last and n == len(parts) - 1,
            url=part.url is not None,
            filename=part.filename,
            media_type=part.media_type if part.raw is None else None,
            part_metadata=part.metadata,
        )
        extra: dict[str, Any] = {"artifact": artifact}
        if part.raw is not None:
            extra |= {"media_type": part.media_type or "application/octet-stream", "encoding": "base64"}
            pieces.append(Piece("data", base64.b64encode(part.raw).decode(), extra))
        elif part.text is not None:
            pieces.append(Piece("text", part.text, extra))
        else:
            pieces.append(Piece("data", part.data if part.url is None else part.url, extra))
    return pieces


def reply_piece(parts: Sequence[Part], message_id: str) -> Piece:
    """A bare message as one chunk."""
    if len(parts) == 1 and parts[0].text is not None and parts[0] == Part(text=parts[0].text):
        return Piece("text", parts[0].text, {"reply": message_id})
    return Piece("data", msgspec.to_builtins(list(parts)), {"reply": message_id})


# --- to A2A -----------------------------------------------------------------------------------------------------------


def context_of(task_id: str, session_id: str | None) -> str:
    """The context of a task; one without a session is a context of its own."""
    return session_id or task_id


def question_message(task_id: str, session_id: str | None, seq: int, prompt: Any) -> Message:
    """What a task that waits for input has asked, in the chunk ``seq``."""
    part = Part(text=prompt) if isinstance(prompt, str) and prompt else Part(data=prompt)
    return _said(task_id, context_of(task_id, session_id), seq, part)


def _said(task_id: str, context_id: str, seq: int, part: Part) -> Message:
    return Message(f"{task_id}.{seq}", "ROLE_AGENT", [part], context_id=context_id, task_id=task_id)


class _Building:
    """An artifact as far as it came; adjacent plain text is kept in pieces and is one part in the end."""

    def __init__(self, artifact: Artifact) -> None:
        self.about = artifact
        self.parts: list[Part | list[str]] = []
        self.add(artifact.parts[0])

    def add(self, part: Part) -> None:
        if part.text is None or part.metadata is not None or part.filename or part.media_type:
            self.parts.append(part)
        elif self.parts and isinstance(last := self.parts[-1], list):
            last.append(part.text)
        else:
            self.parts.append([part.text])

    def built(self) -> Artifact:
        return replace(self.about, parts=[_joined(each) if isinstance(each, list) else each for each in self.parts])


def _joined(pieces: list[str]) -> Part:
    """The pieces as one part, and as one piece from now on: it costs what is new the next time."""
    pieces[:] = ["".join(pieces)]
    return Part(text=pieces[0])


class TaskSnapshot(Struct, frozen=True):
    """A task as it was behind one chunk."""

    seq: int
    task: Task
    """Without history and metadata."""
    gap: bool
    """Whether a part of the log is no longer held."""
    reply: Message | None
    """The whole answer, if that is a bare message."""
    code: str | None
    said: str | None
    """How the task failed, and what was said about it."""

    @property
    def ended(self) -> bool:
        return self.task.status.state in TERMINAL


class TaskView:
    """A task as A2A sees it, chunk by chunk: each gives the events that it is, and all together give the Task."""

    def __init__(self, task_id: str, session_id: str | None, created_at: int, *, keep: bool = True) -> None:
        """``created_at`` in milliseconds since the epoch. ``keep``: whether what the chunks say is kept; for somebody
        who wants the events only, the ids of the artifacts are enough."""
        self.task_id = task_id
        self.context_id = context_of(task_id, session_id)
        self.seq = 0
        """The last chunk that it has taken."""
        self.status = TaskStatus("TASK_STATE_SUBMITTED", timestamp=timestamp(created_at))
        self.gap = False
        """Whether a part of the log is no longer held."""
        self.code: str | None = None
        self.said: str | None = None
        """How the task failed, and what was said about it."""
        self.reply: Message | None = None
        """Set when the whole answer is a bare message."""
        self._created_at = created_at
        self._replied_at = 0
        """The chunk that the reply was."""
        self._keep = keep
        self._begun: dict[str, int] = {}
        """The ids of artifacts of which something has come, and the chunk that was the first of it."""
        self._artifacts: dict[str, _Building] = {}

    @property
    def state(self) -> TaskState:
        return self.status.state

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    @property
    def interrupted(self) -> bool:
        return self.state in INTERRUPTED

    def task(self) -> Task:
        """The Task as of now, without history and metadata."""
        return Task(self.task_id, self.status, context_id=self.context_id, artifacts=self.artifacts() or None)

    def snapshot(self) -> TaskSnapshot:
        return TaskSnapshot(self.seq, self.task(), self.gap, self.reply, self.code, self.said)

    def going_on(self, seq: int | None = None) -> TaskView:
        """A view that goes on where this one is and keeps nothing; costs the names of the artifacts.

        ``seq``: it goes on behind that chunk, one that this view has taken, and is to be given that chunk first: what
        the task's state was then, that chunk says.
        """
        view = TaskView(self.task_id, None, self._created_at, keep=False)
        view.context_id = self.context_id
        if seq is None:
            view.seq, view.status, view.gap = self.seq, self.status, self.gap
            view.code, view.said, view.reply = self.code, self.said, self.reply
        elif seq:
            view.seq = seq
            view.status = TaskStatus("TASK_STATE_WORKING", timestamp=view.status.timestamp)
            view.reply = self.reply if self._replied_at <= seq else None
        view._begun = {name: first for name, first in self._begun.items() if seq is None or first <= seq}
        return view

    def artifacts(self) -> list[Artifact]:
        return [each.built() for each in self._artifacts.values()]

    def works(self, at: str) -> list[StreamResponse]:
        """A run has begun at ``at``: what that is to a client, who is told once."""
        if self.state == "TASK_STATE_WORKING" or self.ended:
            return []
        return [self._status(TaskStatus("TASK_STATE_WORKING", timestamp=at))]

    def take(self, chunk: Chunk) -> list[StreamResponse]:
        """The events that the next chunk is, in order. Chunks come one after the other and none twice."""
        self.seq = chunk.seq
        if chunk.chunk_type == "text" and chunk.artifact is UNSET and chunk.reply is UNSET:
            event = self._text(chunk.content)
            if self.status.state == "TASK_STATE_WORKING":
                return [event]
            return [*self.works(chunk.timestamp), event]
        if chunk.final:
            return self._end(chunk)
        if chunk.chunk_type == "metadata" and isinstance(chunk.content, dict):
            status = chunk.content.get("status")
            if status == "input_required":
                return [*self.works(chunk.timestamp), self._ask(chunk, chunk.content)]
            self.gap |= "gap" in chunk.content
            if status == "working":
                return [self._note(chunk, chunk.content.get("message"), None)]
        begun = self.works(chunk.timestamp)
        if chunk.reply is not UNSET:
            self.reply, self._replied_at = _reply(self.context_id, chunk), chunk.seq
            return [*begun, StreamResponse(message=self.reply)]
        if chunk.chunk_type in ("text", "data"):
            return [*begun, self._artifact(chunk)]
        if chunk.chunk_type == "error":
            metadata = {"code": chunk.code} if chunk.code is not UNSET else None
            return [*begun, self._note(chunk, chunk.content, metadata)]
        return [*begun, self._note(chunk, None, _object(chunk.content))]

    def _end(self, chunk: Chunk) -> list[StreamResponse]:
        metadata: dict[str, Any] = {}
        message = None
        begun: list[StreamResponse] = []
        state: TaskState
        if chunk.status == "failed":
            state = "TASK_STATE_REJECTED" if chunk.code == "rejected" else "TASK_STATE_FAILED"
            self.code, self.said = str(chunk.code), chunk.content
            metadata = {"code": chunk.code}
            if chunk.retryable is not UNSET:
                metadata["retryable"] = chunk.retryable
            message = self._message(chunk, chunk.content or "The task failed")
        elif chunk.status == "cancelled":
            state = "TASK_STATE_CANCELED"
            if chunk.reason is not UNSET:
                metadata = {"reason": chunk.reason}
        else:
            state = "TASK_STATE_COMPLETED"
            begun = self.works(chunk.timestamp)
        return [*begun, self._status(TaskStatus(state, message, chunk.timestamp), metadata)]

    def _ask(self, chunk: Chunk, content: dict[str, Any]) -> StreamResponse:
        auth = content.get("reason") == "auth"
        message = self._message(chunk, content.get("prompt"))
        state: TaskState = "TASK_STATE_AUTH_REQUIRED" if auth else "TASK_STATE_INPUT_REQUIRED"
        return self._status(TaskStatus(state, message, chunk.timestamp))

    def _note(self, chunk: Chunk, said: Any, metadata: dict[str, Any] | None) -> StreamResponse:
        """Something is said while the work goes on."""
        message = None if said is None else self._message(chunk, said)
        return self._status(TaskStatus("TASK_STATE_WORKING", message, chunk.timestamp), metadata)

    def _message(self, chunk: Chunk, said: Any) -> Message:
        part = Part(text=said) if isinstance(said, str) and said else Part(data=said)
        return _said(self.task_id, self.context_id, chunk.seq, part)

    def _status(self, status: TaskStatus, metadata: dict[str, Any] | None = None) -> StreamResponse:
        self.status = status
        return StreamResponse(
            status_update=TaskStatusUpdateEvent(self.task_id, self.context_id, status, metadata or None)
        )

    def _text(self, text: str) -> StreamResponse:
        """As ``_artifact``, of what most chunks are."""
        return self._piece(Artifact(OUTPUT, [Part(text=text)]), append=OUTPUT in self._begun)

    def _artifact(self, chunk: Chunk) -> StreamResponse:
        about = chunk.artifact
        if isinstance(about, ArtifactChunk):
            part = Part(**_content(chunk, about), filename=about.filename, metadata=about.part_metadata)
            artifact = Artifact(about.id, [part], about.name, about.description, about.metadata, about.extensions)
            append = about.append and about.id in self._begun
            last = about.last
        else:
            artifact = Artifact(OUTPUT, [Part(**_content(chunk, None))])
            append, last = OUTPUT in self._begun, False
        return self._piece(artifact, append=append, last=last)

    def _piece(self, artifact: Artifact, *, append: bool, last: bool = False) -> StreamResponse:
        self._begun.setdefault(artifact.artifact_id, self.seq)
        if self._keep:
            if append:
                self._artifacts[artifact.artifact_id].add(artifact.parts[0])
            else:
                self._artifacts[artifact.artifact_id] = _Building(artifact)
        return StreamResponse(
            artifact_update=TaskArtifactUpdateEvent(self.task_id, self.context_id, artifact, append, last)
        )


def _content(chunk: Chunk, about: ArtifactChunk | None) -> dict[str, Any]:
    if chunk.chunk_type == "text":
        found: dict[str, Any] = {"text": chunk.content}
    elif chunk.encoding is not UNSET:
        return {"raw": chunk.data, "media_type": chunk.media_type}
    elif about is not None and about.url:
        found = {"url": chunk.content}
    else:
        found = {"data": chunk.content}
    if about is not None and about.media_type is not None:
        found["media_type"] = about.media_type
    return found


def _reply(context_id: str, chunk: Chunk) -> Message:
    assert isinstance(chunk.reply, str)
    text = chunk.chunk_type == "text"
    parts = [Part(text=chunk.content)] if text else msgspec.convert(chunk.content, list[Part])
    return Message(chunk.reply, "ROLE_AGENT", parts, context_id=context_id)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}


# --- history ----------------------------------------------------------------------------------------------------------


class Line(Struct, frozen=True):
    """A line of the conversation that a task has added."""

    role: str
    content: Content
    original: bytes | None = None


_original = msgspec.json.Decoder(Message).decode


def history_of(task_id: str, session_id: str | None, lines: Iterable[Line]) -> list[Message]:
    """The messages of a task, oldest first, each with the ids of its task and context."""
    context_id = context_of(task_id, session_id)
    found = []
    for n, line in enumerate(lines):
        if line.original is not None:
            message = replace(_original(line.original), context_id=context_id, task_id=task_id)
        else:
            text = isinstance(line.content.content, str)
            part = Part(text=line.content.content) if text else Part(data=line.content.content)
            role = "ROLE_USER" if line.role == "user" else "ROLE_AGENT"
            message = Message(f"{task_id}.h{n}", role, [part], context_id=context_id, task_id=task_id)  # type: ignore[arg-type]
        found.append(message)
    return found
