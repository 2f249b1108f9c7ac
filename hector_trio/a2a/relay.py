"""What is to be passed on of another agent's task: its events, and after a cut its snapshots, become steps. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, field

from hector_trio.a2a.types import (
    Artifact,
    Message,
    Part,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskStatus,
    is_unset,
)

MAX_ARTIFACTS = 10_000
"""Artifacts of one task that are told apart; those beyond may come again after a cut."""


class Say(NamedTuple):
    """A piece of the answer. ``artifact``: of which artifact, its parts left aside; ``None``: of none."""

    part: Part
    artifact: Artifact | None = None
    append: bool = False
    last: bool = False


class Tell(NamedTuple):
    """The work goes on, and the agent says how."""

    message: Any
    """Text or any JSON."""


class Ask(NamedTuple):
    """The task waits for somebody. ``auth``: for a permission."""

    question: Any
    auth: bool


class Done(NamedTuple):
    """The task has ended well."""


class Failed(NamedTuple):
    """The task has ended otherwise."""

    code: str
    message: str
    details: Any


Step = Say | Tell | Ask | Done | Failed


class Seen(Struct):
    """How much of an artifact was passed on."""

    characters: int = 0
    others: int = 0
    """Parts that are no text."""


class Relay(Struct, rename="camel"):
    """How far a task has been passed on. It can be kept as JSON and read again."""

    task_id: str | None = None
    context_id: str | None = None
    said: bool = False
    """Whether anything of an answer was passed on."""
    told: str | None = None
    """The id of the last message of a status."""
    seen: dict[str, Seen] = field(default_factory=dict)

    def recognise(self, response: StreamResponse) -> None:
        """Takes note of what the task is called, and of nothing else."""
        if response.task is not None:
            self._belongs(response.task.id, response.task.context_id)
        elif (update := response.status_update or response.artifact_update) is not None:
            self._belongs(update.task_id, update.context_id)

    def take(self, response: StreamResponse) -> list[Step]:
        """What the next event means. Nothing is passed on twice: a Task is what it has more than was seen of it."""
        if response.task is not None:
            return self.take_task(response.task)
        if response.message is not None:
            self.context_id = response.message.context_id or self.context_id
            self.said = True
            return [*(Say(part) for part in response.message.parts), Done()]
        self.recognise(response)
        if response.artifact_update is not None:
            return self._artifact(response.artifact_update)
        if response.status_update is not None:
            return self._status(response.status_update.status)
        return []

    def take_task(self, task: Task) -> list[Step]:
        self._belongs(task.id, task.context_id)
        steps: list[Step] = []
        for artifact in task.artifacts or ():
            steps += self._rest(artifact)
        return [*steps, *self._status(task.status)]

    def _belongs(self, task_id: str, context_id: str | None) -> None:
        self.task_id = task_id
        self.context_id = context_id or self.context_id

    def _artifact(self, update: TaskArtifactUpdateEvent) -> list[Step]:
        artifact = update.artifact
        seen = self.seen.get(artifact.artifact_id)
        append = update.append and seen is not None
        if not append:
            seen = self._note(artifact.artifact_id)
        assert seen is not None
        for part in artifact.parts:
            _count(seen, part)
        return self._says(artifact, artifact.parts, append=append, last=update.last_chunk)

    def _rest(self, artifact: Artifact) -> list[Step]:
        """What of an artifact was not passed on yet."""
        append = artifact.artifact_id in self.seen
        seen = self.seen.get(artifact.artifact_id) or self._note(artifact.artifact_id)
        characters, others = seen.characters, seen.others
        left: list[Part] = []
        for part in artifact.parts:
            if part.text is None:
                if others > 0:
                    others -= 1
                    continue
                left.append(part)
            elif characters >= len(part.text):
                characters -= len(part.text)
                continue
            else:
                left.append(msgspec.structs.replace(part, text=part.text[characters:]) if characters else part)
                characters = 0
            _count(seen, left[-1])
        return self._says(artifact, left, append=append, last=False)

    def _note(self, artifact_id: str) -> Seen:
        seen = Seen()
        if len(self.seen) < MAX_ARTIFACTS:
            self.seen[artifact_id] = seen
        return seen

    def _says(self, artifact: Artifact, parts: list[Part], *, append: bool, last: bool) -> list[Step]:
        self.said = self.said or any(part.text != "" for part in parts)
        about = msgspec.structs.replace(artifact, parts=[])
        return [
            Say(part, about, append=append or n > 0, last=last and n == len(parts) - 1) for n, part in enumerate(parts)
        ]

    def _status(self, status: TaskStatus) -> list[Step]:
        message = status.message
        if message is not None:
            if message.message_id == self.told:
                message = None
            else:
                self.told = message.message_id
        match status.state:
            case "TASK_STATE_SUBMITTED" | "TASK_STATE_WORKING":
                return [] if message is None else [Tell(content_of(message))]
            case "TASK_STATE_INPUT_REQUIRED" | "TASK_STATE_AUTH_REQUIRED":
                auth = status.state == "TASK_STATE_AUTH_REQUIRED"
                asked = status.message  # also one that was shown before
                usual = "The agent needs a permission" if auth else "The agent needs input"
                return [Ask(usual if asked is None else content_of(asked), auth)]
            case "TASK_STATE_COMPLETED":
                return [*self._last_words(message), Done()]
            case "TASK_STATE_REJECTED":
                return [_failed("rejected", "The agent has rejected the task", status.message)]
            case "TASK_STATE_CANCELED":
                return [_failed("remote_canceled", "The task was canceled at the agent", status.message)]
            case _:
                return [_failed("remote_failed", "The agent's task failed", status.message)]

    def _last_words(self, message: Message | None) -> list[Step]:
        """Many agents say their whole answer with the status that ends the task."""
        if message is None:
            return []
        if self.said:
            return [Tell(content_of(message))]
        self.said = True
        return [Say(part) for part in message.parts]


def _count(seen: Seen, part: Part) -> None:
    if part.text is None:
        seen.others += 1
    else:
        seen.characters += len(part.text)


def _failed(code: str, usual: str, message: Message | None) -> Failed:
    said = None if message is None else content_of(message)
    if isinstance(said, str):
        return Failed(code, said or usual, None)
    return Failed(code, usual, said)


def content_of(message: Message) -> Any:
    """A message as text, or, where it is more than text, as the JSON of its parts."""
    if all(part.text is not None for part in message.parts):
        return "\n".join(part.text or "" for part in message.parts)
    if len(message.parts) == 1 and not is_unset(message.parts[0].data):
        return message.parts[0].data
    return msgspec.to_builtins(message.parts)
