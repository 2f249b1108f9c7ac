"""The Agent protocol and its Context: what a run may see and do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from msgspec import Struct, field

from hector_trio.models import Content, Message, TaskRequest


class AgentInfo(Struct, frozen=True):
    """What the card says about an agent."""

    agent_id: str
    name: str
    description: str = ""
    version: str = "1.0.0"
    input_types: list[str] = field(default_factory=lambda: ["text/plain", "application/json"])
    output_types: list[str] = field(default_factory=lambda: ["text/plain", "application/json"])
    metadata: dict[str, Any] = field(default_factory=dict)


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
    """Seconds on Trio's clock (``trio.current_time()``) at which the run is cut."""

    @property
    def text(self) -> str:
        """The input as text: text as it is, anything else as JSON."""

    @property
    def parameters(self) -> dict[str, Any]: ...

    async def emit_text(self, text: str) -> None: ...

    async def emit_data(self, value: Any) -> None:
        """Any JSON."""

    async def emit_metadata(self, value: Any) -> None:
        """Any JSON about the answer rather than of it (token counts, sources)."""

    async def emit_error(self, message: str, *, code: str = "agent_warning") -> None:
        """Tells of something that went wrong without ending the run (raise ``RunError`` to end it)."""

    async def update_state(self, patch: dict[str, Any]) -> None:
        """Merges into the session's state (RFC 7396), committed when it returns. Raises InvalidRequest outside a
        session."""


class Agent(Protocol):
    info: AgentInfo

    async def run(self, ctx: Context) -> None:
        """Answers ``ctx.input``. Returning completes the task; an exception fails it."""


AgentFunction = Callable[[Context], Awaitable[None]]
