"""The Context that the engine gives to an agent: emits go to the task's log, state to the session."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import trio
from msgspec import UNSET

from hector_trio.a2a.mapping import PartLike, artifact_pieces, part_of, reply_piece
from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.agents import Resume
from hector_trio.errors import InvalidRequest, RunError, SessionNotFound
from hector_trio.log import TaskLog, now_ms
from hector_trio.models import ArtifactChunk, Content, Message, TaskRequest
from hector_trio.stores import Store
from hector_trio.task import EXTENSION_REQUIRED, REJECTED, Question, StoredRequest, TaskRow
from hector_trio.uploads import UploadedFile, Uploads


class RunContext:
    """One run. See ``hector_trio.agents.Context`` for what each member promises."""

    __slots__ = (
        "_ask",
        "_file",
        "_log",
        "_owner",
        "_replies",
        "_run",
        "_session_bytes",
        "_store",
        "_uploads",
        "agent_id",
        "deadline",
        "emit_text",
        "history",
        "input",
        "message",
        "request",
        "resume",
        "session_id",
        "state",
        "task_id",
        "user_id",
    )

    def __init__(
        self,
        row: TaskRow,
        request: TaskRequest,
        log: TaskLog,
        store: Store,
        *,
        history: list[Message],
        state: dict[str, Any],
        deadline: float,
        session_bytes: int,
        ask: Callable[[Any, Any, Any, bool], None],
        run: object,
        message: A2aMessage | None = None,
        replies: bool = False,
        uploads: Uploads | None = None,
    ) -> None:
        self.task_id = row.task_id
        self.agent_id = row.agent_id
        self.session_id = row.session_id
        self.user_id = request.context.user_id if request.context is not None else None
        self.request = request
        self.input: Content = request.input
        self.history = history
        self.state = state
        self.deadline = deadline
        self._owner = row.owner
        self._log = log
        self.emit_text = log.emit_text  # no layer between: it is called for every token
        self._store = store
        self.resume = _resume(row.question)
        self._session_bytes = session_bytes
        self._ask = ask  # together with the run, not bound to it: there is one for all runs
        self._run = run
        self.message = message
        self._replies = replies
        self._uploads = uploads
        answer = row.question.answer if row.question is not None else None
        self._file = request.input if answer is None or answer.upload_id is UNSET else answer

    @property
    def text(self) -> str:
        content = self.input.content
        return content if isinstance(content, str) else msgspec.json.encode(content).decode()

    @property
    def parameters(self) -> dict[str, Any]:
        return self.request.parameters or {}

    async def upload(self) -> UploadedFile | None:
        if self._uploads is None or self._file.upload_id is UNSET:
            return None
        try:
            return await self._uploads.use(self._owner, self._file.upload_id, self._file.type)
        except InvalidRequest:
            raise RunError("upload_gone", "The upload was removed before the task had read it") from None

    async def emit_data(self, value: Any) -> None:
        await self._log.emit("data", value)

    async def emit_metadata(self, value: Any) -> None:
        await self._log.emit("metadata", value)

    async def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        await self._log.emit("error", message, code=code)

    async def emit_bytes(self, data: bytes, media_type: str) -> None:
        await self._log.emit_bytes(data, media_type)

    async def emit_status(self, message: Any = None) -> None:
        await self._log.emit("metadata", {"status": "working"} | ({} if message is None else {"message": message}))

    async def artifact(
        self,
        *parts: PartLike,
        artifact_id: str | None = None,
        name: str | None = None,
        description: str | None = None,
        metadata: dict[str, Any] | None = None,
        extensions: list[str] | None = None,
        append: bool = False,
        last: bool = False,
    ) -> str:
        if not parts:
            raise InvalidRequest("artifact takes at least one part")
        about = ArtifactChunk(
            artifact_id or str(uuid.uuid4()),
            append=append,
            last=last,
            name=name,
            description=description,
            metadata=metadata,
            extensions=extensions,
        )
        for piece in artifact_pieces([part_of(each) for each in parts], about):
            await self._log.emit(piece.kind, piece.content, **piece.extra)
        return about.id

    async def reply(self, *parts: PartLike) -> None:
        if not parts:
            raise InvalidRequest("reply takes at least one part")
        if not self._replies:
            raise RunError("reply_not_declared", "Declare the agent with replies=True: it answers with a bare message")
        if self._log.begun:
            raise RunError("reply_too_late", "Something was emitted already, so the answer is a task and no message")
        piece = reply_piece([part_of(each) for each in parts], str(uuid.uuid4()))
        await self._log.emit(piece.kind, piece.content, **piece.extra)

    async def reject(self, reason: str) -> NoReturn:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise RunError(REJECTED, reason)

    def require_extension(self, uri: str) -> None:
        if not isinstance(self.request, StoredRequest) or uri not in self.request.extensions:
            raise RunError(EXTENSION_REQUIRED, uri)

    async def ask(self, question: Any, *, saved: Any = None, auth: bool = False) -> NoReturn:
        self._ask(self._run, question, saved, auth)
        await trio.lowlevel.checkpoint()  # the run is cancelled, and parked once everything in it has ended
        raise RunError("ask_shielded", "ask ends the run, so it cannot be called under a shield")

    async def update_state(self, patch: dict[str, Any]) -> None:
        if self.session_id is None:
            raise InvalidRequest("The task belongs to no session, so there is no state to update")
        try:
            row = await self._store.update_session(
                self._owner, self.session_id, now=now_ms(), state=patch, limit_bytes=self._session_bytes
            )
        except SessionNotFound:
            raise SessionNotFound("The session ended while its task was running") from None
        self.state = row.state


def _resume(question: Question | None) -> Resume | None:
    if question is None or question.answer is None:
        return None
    return Resume(question.question, question.answer.content, question.saved)
