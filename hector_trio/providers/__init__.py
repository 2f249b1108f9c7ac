"""The Provider protocol: a model that answers a conversation, piece by piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

from msgspec import Struct, field


class Turn(Struct, frozen=True):
    """One line of the conversation that a model is given."""

    role: Literal["system", "user", "assistant"]
    content: str


class ModelRequest(Struct, frozen=True):
    turns: list[Turn]
    parameters: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters by the provider's names (``temperature``, ``max_tokens`` …)."""


class Delta(Struct, frozen=True):
    """A piece of an answer. Models give text; the demo model also gives the other kinds."""

    content: Any
    kind: Literal["text", "data", "metadata", "error"] = "text"


class ModelResult(Struct, frozen=True):
    """How an answer ended. ``usage`` as the provider reports it (token counts), empty when it does not."""

    finish_reason: str = "stop"
    usage: dict[str, Any] = field(default_factory=dict)


OnDelta = Callable[[Delta], Awaitable[None]]


class Provider(Protocol):
    """A model. One call is one request to the model's server; a cancel closes its connection at once."""

    name: str
    """For people and logs: ``openai gpt-x at http://…`` or ``demo``; never a secret."""

    async def stream(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult:
        """Calls ``on_delta`` for each piece as it arrives, waits for it, and returns when the answer is complete.

        Raises ModelError (see its codes). A cancel leaves nothing behind: no connection, no task.
        """
