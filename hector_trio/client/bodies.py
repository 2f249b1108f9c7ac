"""What goes out and comes back as JSON: requests, answers, chunks."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, TypeVar

import httpx2
import msgspec
from msgspec import UNSET, Struct, field

from hector_trio.client.errors import UnexpectedAnswer, error_of
from hector_trio.errors import HectorError, InvalidRequest
from hector_trio.models import Chunk, Content, GraceMs, Json

OnDisconnect = Literal["cancel", "continue"] | GraceMs
T = TypeVar("T")


class TaskOptions(TypedDict, total=False):
    """What ``Client.run``, ``submit`` and ``stream`` take by keyword; what is left out or None is up to the server."""

    session_id: str | None
    """The conversation that the task belongs to; without one it stands alone."""
    task_id: str | None
    """The task's id. Naming a running task with the same request follows it; naming an ended one starts a new task."""
    parameters: Json | None
    """What the agent understands of it, such as ``temperature``."""
    metadata: Json | None
    """Goes into the task's context, for the agent."""
    user_id: str | None
    """On whose behalf, for the agent."""
    timeout_seconds: float | None
    """After which the server ends the task as failed."""
    multitask: Literal["enqueue", "reject", "interrupt"] | None
    """If another task has the session's turn: wait (the default), SessionBusy, or cancel that one."""


def given(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def content_of(content: Any) -> Content:
    if isinstance(content, Content):
        return content
    return Content("text/plain" if isinstance(content, str) else "application/json", content)


def task_request(content: Any, on_disconnect: OnDisconnect | None, options: TaskOptions) -> Json:
    limit = options.get("timeout_seconds")
    if limit is not None and not 0 < limit < math.inf:
        raise InvalidRequest(f"timeout_seconds must be above 0: {limit!r}")
    context = given(
        sessionId=options.get("session_id"), userId=options.get("user_id"), metadata=options.get("metadata")
    )
    return given(
        taskId=options.get("task_id"),
        input=content_of(content),
        parameters=options.get("parameters"),
        context=context or None,
        timeoutMs=None if limit is None else math.ceil(limit * 1000),
        onDisconnect=on_disconnect,
        multitask=options.get("multitask"),
    )


def encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InvalidRequest(f"This cannot be said in JSON: {error}") from None


def decode(kind: type[T], response: httpx2.Response) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnexpectedAnswer(f"{response.url} does not answer like a hector server ({error})") from None


class Control(Struct):
    """A frame that is no chunk: the answer to a control frame."""

    type: str
    of: str = ""
    code: str = ""
    detail: str = ""
    status: str = ""
    last_seq: int = field(default=0, name="lastSeq")


_chunks = msgspec.json.Decoder(Chunk)
_controls = msgspec.json.Decoder(Control)


def decode_frame(message: str | bytes, url: str) -> Chunk | Control:
    """Raises: UnexpectedAnswer."""
    if isinstance(message, bytes):
        return _decode_binary(message, url)
    try:
        return _chunks.decode(message)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return _controls.decode(message)
    except (msgspec.DecodeError, RecursionError):
        raise UnexpectedAnswer(f"{url} sent what is no chunk") from None


def _decode_binary(frame: bytes, url: str) -> Chunk:
    """A chunk of bytes: version, flags, task id, seq, media type, payload (PROTOCOL section 4)."""
    try:
        if frame[0] != 1:
            raise UnexpectedAnswer(f"{url} sent a binary frame of version {frame[0]}")
        at = 3 + frame[2]
        task_id = frame[3:at].decode("ascii")
        seq = int.from_bytes(frame[at : at + 8], "big")
        end = at + 9 + frame[at + 8]
        media_type = frame[at + 9 : end].decode()
    except (IndexError, UnicodeDecodeError):
        end, task_id, seq, media_type = len(frame) + 1, "", 0, ""
    if end > len(frame) or seq == 0:
        raise UnexpectedAnswer(f"{url} sent a binary frame that cannot be read")
    return Chunk(task_id, seq, "data", frame[end:], "", media_type=media_type)


def check_next(chunk: Chunk, reached: int, url: str) -> None:
    """Raises: UnexpectedAnswer unless ``chunk`` goes on right after ``reached``, joined or not, or tells of a gap."""
    first = chunk.seq if chunk.first_seq is UNSET else chunk.first_seq
    if first > reached + 1 and chunk.chunk_type == "metadata" and isinstance(chunk.content, dict):
        gap = chunk.content.get("gap")
        first = gap.get("from", first) if isinstance(gap, dict) else first
    if first != reached + 1 or chunk.seq < first:
        raise UnexpectedAnswer(f"{url} sent chunk {first} to {chunk.seq} after {reached}")


def refused(chunk: Chunk, task_id: str) -> HectorError:
    """The error that a chunk with number 0 stands for: instead of the task's own."""
    code = "" if chunk.code is UNSET else chunk.code
    return error_of(code, str(chunk.content), status=0, retryable=chunk.retryable is True, task_id=task_id)
