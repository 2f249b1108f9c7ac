"""The Agent protocol and its Context: what a run may see and do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

from msgspec import Struct, field

from hector_trio.a2a.mapping import PartLike
from hector_trio.a2a.types import Message as A2aMessage
from hector_trio.config import A2a
from hector_trio.models import Content, Message, TaskRequest
from hector_trio.uploads import UploadedFile


class AgentInfo(Struct, frozen=True):
    """What the card says about an agent."""

    agent_id: str
    name: str
    description: str = ""
    version: str = "1.0.0"
    input_types: list[str] = field(default_factory=lambda: ["text/plain", "application/json"])
    output_types: list[str] = field(default_factory=lambda: ["text/plain", "application/json"])
    metadata: dict[str, Any] = field(default_factory=dict)
    grace: float | None = None
    """Seconds that a streamed task which says nothing else goes on without viewers; ``None``: the server's."""
    max_grace: float | None = None
    """The most seconds that a task may ask for; ``None``: the server's."""
    replies: bool = False
    """Whether it may answer with a bare A2A message."""
    a2a: A2a = field(default_factory=A2a)
    """What its A2A card says besides."""


class Resume(NamedTuple):
    """What a run knows that was started by an answer."""

    question: Any
    """As it was asked."""
    answer: Any
    """Text as it is, or any JSON."""
    saved: Any
    """What the run that asked has saved."""


class Context(Protocol):
    """One run, seen from inside. An agent **emits**; it does not yield.

    Every ``emit`` is numbered and queued at once and waits only while more than ``max_uncommitted`` bytes of its task
    wait for the store. A cancel arrives at any await; what was emitted before stays in the log.
    """

    task_id: str
    agent_id: str
    session_id: str | None
    user_id: str | None
    request: TaskRequest
    input: Content
    history: list[Message]
    """The session's conversation before this input, oldest first; empty outside a session."""
    state: dict[str, Any]
    """The session's state as it was when the run began, moved on by ``update_state``."""
    deadline: float
    """Seconds on Trio's clock (``trio.current_time()``) at which the run is cut, and everything below it."""
    message: A2aMessage | None
    """The A2A message that began this run, with all its parts; ``None``: it did not come by A2A."""
    resume: Resume | None
    """Set when this run takes up a task that had asked; ``None`` in its first run."""

    @property
    def text(self) -> str:
        """The input as text: text as it is, anything else as JSON."""

    @property
    def parameters(self) -> dict[str, Any]: ...

    async def upload(self) -> UploadedFile | None:
        """The uploaded file that the input names, or the answer in ``resume``; ``None``: it names none. Raises:
        RunError (``upload_gone``) when its owner has removed it."""

    async def emit_text(self, text: str) -> None: ...

    async def emit_data(self, value: Any) -> None:
        """Any JSON."""

    async def emit_metadata(self, value: Any) -> None:
        """Any JSON about the answer rather than of it (token counts, sources)."""

    async def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        """Tells of something that went wrong without ending the run (raise ``RunError`` to end it)."""

    async def emit_bytes(self, data: bytes, media_type: str) -> None:
        """Bytes of some media type (``image/png``): a ``data`` chunk, in base64 where the wire is JSON."""

    async def emit_status(self, message: Any = None) -> None:
        """Says that the work goes on, and how (text or any JSON): a metadata chunk, for A2A a status update."""

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
        """Emits an A2A artifact, or what is new of one (``append``, with its ``artifact_id``); returns its id.

        A part is a text, bytes, any other JSON, or a ``Part``. Everybody else gets the parts as text and data. Raises:
        InvalidRequest without a part.
        """

    async def reply(self, *parts: PartLike) -> None:
        """Answers with a bare A2A message instead of a task; nothing else is emitted before or after it.

        For agents that are declared with ``replies=True``: their streams begin once they have decided. Everybody else
        gets the message as text or data. Raises: RunError (``reply_not_declared``, ``reply_too_late``).
        """

    async def reject(self, reason: str) -> NoReturn:
        """Ends the task as rejected: ``failed`` with the code ``rejected``, for A2A ``TASK_STATE_REJECTED``."""

    def require_extension(self, uri: str) -> None:
        """Ends the task as ``failed`` unless its A2A client has declared the extension; the client is told to. Raises:
        RunError (``extension_required``)."""

    async def ask(self, question: Any, *, saved: Any = None, auth: bool = False) -> NoReturn:
        """Ends this run: the task is ``input_required`` until somebody answers, which starts a new run of it.

        ``question`` (text or any JSON) is shown to the client, ``saved`` (any JSON) is kept for the new run, which
        finds both and the answer in ``resume``. Nothing else of this run is kept: it ends like a cancelled one, and the
        task waits without slot, turn or Trio task, through restarts too, until ``tasks.input_timeout``.
        ``auth``: it is a permission that is asked for (A2A: ``TASK_STATE_AUTH_REQUIRED``).
        Raises: RunError for what JSON cannot hold, or is too large.
        """

    async def update_state(self, patch: dict[str, Any]) -> None:
        """Merges into the session's state (RFC 7396), committed when it returns. Raises InvalidRequest outside a
        session."""


class Agent(Protocol):
    info: AgentInfo

    async def run(self, ctx: Context) -> None:
        """Answers ``ctx.input``. Returning completes the task; an exception fails it."""


@runtime_checkable
class WithdrawingAgent(Agent, Protocol):
    """An agent whose questions are somebody else's, who waits for the answer as the task does."""

    async def withdraw(self, saved: Any) -> None:
        """A task that has asked, and ``saved`` this, ends without having been answered, in whatever way. Called before
        its final chunk, which waits for it: a cancel comes after ``WITHDRAW_LIMIT`` seconds."""


AgentFunction = Callable[[Context], Awaitable[None]]
