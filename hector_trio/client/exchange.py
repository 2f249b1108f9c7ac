"""One task as its stream knows it: what has to be said on a connection, what an answer means. No I/O."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET, Struct

from hector_trio.client.bodies import Control, check_next, decode_frame, given, refused
from hector_trio.client.errors import UnexpectedAnswer, error_of
from hector_trio.errors import Draining, HectorError, TaskNotFound
from hector_trio.models import Chunk, Content, Json

_INPUT_REQUIRED: Final = "input_required"


class Answer(Struct):
    """An answer on its way."""

    content: Content
    asked: int
    """The number of the last chunk that was there when it was given."""
    said: bool = False
    settled: bool = False
    refusal: HectorError | None = None
    """Why it was refused; ``None`` once it is settled: it was taken."""


class Exchange:
    """What is said to the server about one task, on one connection after the other.

    Whether a task frame has arrived cannot be known when the connection breaks right after it, and a frame that names
    an ended task starts a new one. So every connection but the first begins with an ``attach``, which never starts
    anything, and only where the server does not know the task the frame is said again.
    """

    def __init__(self, task: Json, window: int, *, binary: bool, url: str) -> None:
        self.task_id: str = task["taskId"]
        self.reached = 0
        """The number of the last chunk that has come."""
        self.over = False
        """The final chunk has come, or a refusal, or the task is no longer followed."""
        self.attached = False
        """Whether the server knows, on this connection, that the task is followed."""
        self.answer: Answer | None = None
        self._task = task
        self._window = window
        self._binary = binary or None
        self._url = url
        self._known = False
        """Whether the server has accepted the task, as far as has been heard."""
        self._opened = False
        self._openings: list[Json] = []
        self._cancel: Json | None = None
        self._cancel_said = False
        self._cancelled = False
        self._detach = False
        self._detach_said = False
        self._unread = 0
        """Chunks of earlier connections that have not been taken: this one gets no credit for them."""
        self._owed = 0
        """Chunks that have been taken and are not credited yet."""

    # --- what to say

    def connected(self, unread: int) -> None:
        """A new connection is there, while ``unread`` chunks still wait for the reader."""
        self.disconnected()
        if self._opened:
            self._openings = [self._following({"type": "attach", "taskId": self.task_id, "after": self.reached})]
        else:
            self._openings = [self._following(self._task)]
            self.attached = True  # what is said after it is understood after it
        self._opened = True
        self._unread = unread
        self._owed = 0

    def disconnected(self) -> None:
        self.attached = self._cancel_said = self._detach_said = False
        self._openings = []

    def frames(self) -> list[Json]:
        """What is to be said now."""
        frames, self._openings = self._openings, []
        if not self.attached:
            return frames
        if self._cancel is not None and not self._cancel_said:
            self._cancel_said = True
            frames.append(self._cancel)
        if self.answer is not None and not self.answer.said:
            self.answer.said = True
            frames.append({"type": "input", "taskId": self.task_id, "input": self.answer.content})
        if self._detach and not self._detach_said:
            self._detach_said = True
            frames.append({"type": "detach", "taskId": self.task_id})
        if self.credit_due:
            frames.append({"type": "credit", "taskId": self.task_id, "frames": self._owed})
            self._owed = 0
        return frames

    def _following(self, frame: Json) -> Json:
        return given(**frame, window=self._window, binary=self._binary)

    # --- what the caller wants

    def cancel(self, reason: str | None = None) -> None:
        if self._cancel is None:
            self._cancel = given(type="cancel", taskId=self.task_id, reason=reason)

    def detach(self) -> None:
        self._detach = True

    def taken(self) -> None:
        """The reader has taken a chunk."""
        if self._unread:
            self._unread -= 1
        else:
            self._owed += 1

    @property
    def cancelling(self) -> bool:
        """Whether a cancel is not answered yet. A server that is told it and left at once may not get to hear it."""
        return self._cancel is not None and not self._cancelled

    @property
    def credit_due(self) -> bool:
        return 2 * self._owed >= self._window

    # --- what was said

    def take(self, message: str | bytes) -> Chunk | None:
        """The next chunk, or ``None`` for an answer.

        Raises: the refusal of the task, of an ``attach`` or of a ``cancel``; UnexpectedAnswer.
        """
        frame = decode_frame(message, self._url)
        if isinstance(frame, Control):
            self._control(frame)
            return None
        if frame.seq == 0:
            # A request that the server could not read is refused without a task's id: nothing else was said here.
            error = refused(frame, self.task_id)
            if self._known and error.code == Draining.code:
                return None  # it ends the connection soon, and the next one goes on
            self.over = True
            raise error
        if frame.task_id != self.task_id:
            raise UnexpectedAnswer(f"{self._url} sent a chunk of task {frame.task_id!r}")
        check_next(frame, self.reached, self._url)
        self.reached = frame.seq
        self.attached = self._known = True
        self.over = frame.final
        return frame

    def _control(self, frame: Control) -> None:
        failed = frame.type == "error"
        if frame.of == "attach":
            self._attach_answered(frame)
        elif frame.of == "input":
            # A server that drains ends the connection soon, and the next one is asked.
            if self.answer is not None and frame.code != Draining.code:
                self.answer.settled = True
                self.answer.refusal = _error(frame) if failed else None
        elif frame.of in ("credit", "ping"):
            pass
        elif failed:
            raise _error(frame)
        elif frame.of == "detach":
            self.over = True
        elif frame.of == "cancel":
            self._cancelled = True

    def _attach_answered(self, frame: Control) -> None:
        if frame.type == "error":
            if frame.code != TaskNotFound.code or self._known:
                raise _error(frame)
            self._openings = [self._following(self._task)]
        self.attached = True
        self._known = self._known or frame.type != "error"
        answer = self.answer
        if answer is not None and answer.said and not answer.settled:
            # Its connection was lost before the server's word on it. Had it not come, all would be as it was.
            waits = frame.status == _INPUT_REQUIRED and frame.last_seq == answer.asked
            answer.said = not waits
            answer.settled = not waits


def prompt_of(chunk: Chunk) -> object:
    """What a chunk asks of the client, ``UNSET`` if it asks nothing."""
    content = chunk.content
    if chunk.chunk_type == "metadata" and isinstance(content, dict) and content.get("status") == _INPUT_REQUIRED:
        return content.get("prompt")
    return UNSET


def _error(frame: Control) -> HectorError:
    return error_of(frame.code, frame.detail, status=0, retryable=False)
