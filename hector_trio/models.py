"""The wire's types (JSON through msgspec): what clients send and get on REST, SSE and the WebSocket."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from hector_trio.errors import FieldError

ID_PATTERN = r"^[A-Za-z0-9._~-]{1,128}$"
_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}\Z")

Id = Annotated[str, Meta(pattern=ID_PATTERN, description="1 to 128 characters of A-Z a-z 0-9 . _ ~ -")]
Timestamp = Annotated[str, Meta(description="RFC 3339, UTC, with Z", extra_json_schema={"format": "date-time"})]
Status = Literal["pending", "running", "input_required", "completed", "failed", "cancelled"]
ChunkType = Literal["text", "data", "error", "metadata", "done"]
Json = dict[str, Any]


def is_id(text: str) -> bool:
    """Whether ``text`` may name a task, a session, an agent or a request (``.`` and ``..`` may not)."""
    return _ID.match(text) is not None and text not in (".", "..")


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.")


def timestamp(ms: int) -> str:
    """``ms`` (milliseconds since the epoch) as the wire's RFC 3339 text."""
    return f"{_second(ms // 1000)}{ms % 1000:03d}Z"


class Content(Struct, frozen=True, rename="camel"):
    """An input or an output: a media type and its content (text, or any JSON); of an input also, or instead, a finished
    upload."""

    type: str = "text/plain"
    content: Any = ""
    upload_id: str | UnsetType = UNSET


class GraceMs(Struct, frozen=True, rename={"grace_ms": "graceMs"}):
    grace_ms: Annotated[int, Meta(ge=0)]


class TaskContext(Struct, frozen=True, rename="camel"):
    session_id: Id | None = None
    user_id: str | None = None
    metadata: Json | None = None


class TaskRequest(Struct, frozen=True, rename="camel"):
    """A request to run an agent. Unknown keys are ignored."""

    input: Content
    task_id: Id | None = None
    parameters: Json | None = None
    context: TaskContext | None = None
    timeout_ms: Annotated[int, Meta(ge=1)] | None = None
    on_disconnect: Literal["cancel", "continue"] | GraceMs | None = None
    multitask: Literal["enqueue", "reject", "interrupt"] | None = None


class Answering(Struct, frozen=True):
    """The answer to a task that waits for input."""

    input: Content


class TaskError(Struct, frozen=True, omit_defaults=True):
    """Why a task failed."""

    code: str
    message: str
    details: Any = None


class Task(Struct, frozen=True, rename="camel"):
    """A task as clients see it. ``output`` is there once the task has ended, as far as it came."""

    task_id: str
    agent_id: str
    status: Status
    metadata: Json
    started_at: Timestamp
    session_id: str | UnsetType = UNSET
    output: Content | UnsetType = UNSET
    error: TaskError | UnsetType = UNSET
    ended_at: Timestamp | UnsetType = UNSET
    prompt: Any = UNSET
    """What it asks while it is ``input_required``."""


class ArtifactChunk(Struct, frozen=True, rename="camel", omit_defaults=True):
    """Of which A2A artifact a chunk is a part, and what the chunk itself does not say about that part."""

    id: str
    append: bool = False
    """Whether it goes on; else the artifact is new, or replaced."""
    last: bool = False
    url: bool = False
    """The chunk's content is the address of a file."""
    filename: str | None = None
    media_type: str | None = None
    part_metadata: Json | None = None
    name: str | None = None
    description: str | None = None
    metadata: Json | None = None
    extensions: list[str] | None = None


class Chunk(Struct, frozen=True, rename="camel"):
    """One entry of a task's log. The first six are always there; ``final`` is true for exactly one chunk, the last."""

    task_id: str
    seq: int
    chunk_type: ChunkType
    content: Any
    timestamp: Timestamp
    final: bool = False
    first_seq: int | UnsetType = UNSET
    status: Status | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    media_type: str | UnsetType = UNSET
    encoding: Literal["base64"] | UnsetType = UNSET
    retryable: bool | UnsetType = UNSET
    artifact: ArtifactChunk | UnsetType = UNSET
    reply: str | UnsetType = UNSET
    """The chunk is the task's whole answer, a bare A2A message with this id."""

    @property
    def data(self) -> bytes:
        """The bytes of a chunk that has a ``media_type``, whichever way they came. Raises ValueError for any other."""
        if isinstance(self.content, bytes):
            return self.content
        if self.encoding is UNSET or not isinstance(self.content, str):
            raise ValueError(f"Chunk {self.seq} of task {self.task_id!r} holds no bytes")
        return base64.b64decode(self.content)


class SessionRequest(Struct, frozen=True, rename="camel"):
    agent_id: str
    session_id: Id | None = None
    metadata: Json | None = None
    state: Json | None = None
    ttl_seconds: Annotated[int, Meta(ge=1, le=10 * 365 * 86400)] | None = None


class SessionPatch(Struct, frozen=True):
    """RFC 7396 merge patches of a session's two writable members."""

    state: Json | UnsetType = UNSET
    metadata: Json | UnsetType = UNSET


class Session(Struct, frozen=True, rename="camel"):
    session_id: str
    agent_id: str
    created_at: Timestamp
    last_activity_at: Timestamp
    state: Json
    metadata: Json
    expires_at: Timestamp | UnsetType = UNSET


class Message(Struct, frozen=True, rename="camel"):
    """One line of a conversation. ``partial`` marks an answer that was cut (``status`` says how its task ended)."""

    role: Literal["user", "agent"]
    content: Any
    agent_id: str
    task_id: str
    timestamp: Timestamp
    type: str = "text/plain"
    partial: bool | UnsetType = UNSET
    status: Status | UnsetType = UNSET


class Endpoints(Struct, frozen=True):
    task: str
    stream: str
    status: str


class AgentCard(Struct, frozen=True, rename="camel"):
    agent_id: str
    name: str
    description: str
    version: str
    capabilities: dict[str, Any]
    endpoints: Endpoints
    input_types: list[str]
    output_types: list[str]
    auth: Json
    metadata: Json = field(default_factory=dict)


class AgentList(Struct, frozen=True):
    agents: list[AgentCard]
    total: int


class SessionList(Struct, frozen=True, rename="camel"):
    sessions: list[Session]
    total: int
    next_page_token: str


class TaskList(Struct, frozen=True, rename="camel"):
    tasks: list[Task]
    total: int
    next_page_token: str


class MessageList(Struct, frozen=True, rename="camel"):
    messages: list[Message]
    total: int
    next_page_token: str


class ChunkList(Struct, frozen=True, rename="camel"):
    chunks: list[Chunk]
    total: int
    next_page_token: str


class LiveNode(Struct, frozen=True, rename="camel", omit_defaults=True, gc=False):
    """A task of Trio's, or what stands for some, in the live tree. Nothing in it was said by users or models."""

    kind: str
    """``connection``, ``request``, ``sse``, ``websocket``, ``run``, ``model call`` …; ``task``: any other."""
    name: str = ""
    """The peer's address, the path without its query, agent and task id, the model and its server …"""
    tasks: int = 1
    """How many tasks of Trio's it stands for, those below it not counted."""
    age_ms: int | UnsetType = UNSET
    state: Literal["queued", "running", "finishing"] = "running"
    waits_for: str = ""
    """The function it waits in, and that function's caller; empty while it runs."""
    deadline_ms: int | UnsetType = UNSET
    """Until it will be cancelled; without one it has no deadline, or is being cancelled."""
    cancel: Literal["pending", "shielded"] | UnsetType = UNSET
    """Whether it has been cancelled: it will notice where it waits next, or a shield holds the cancel off."""
    children: list[LiveNode] = []
    omitted: dict[str, int] = {}
    """How many children of which kind are not shown."""


class LiveTree(Struct, frozen=True, rename="camel"):
    """What lives in the server: the tree of Trio's tasks, and the engine's counts."""

    at: Timestamp
    tasks: int
    """Tasks of Trio's."""
    running: int
    queued: int
    waiting_for_input: int
    """Tasks that wait for input: they have no task of Trio's."""
    root: LiveNode


class Problem(Struct, frozen=True, rename="camel", omit_defaults=True):
    """RFC 9457 problem details with our stable ``code``."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool | UnsetType = UNSET
    request_id: str = ""
    task_id: str | UnsetType = UNSET
    errors: tuple[FieldError, ...] | UnsetType = UNSET


encode = msgspec.json.Encoder(decimal_format="number").encode
