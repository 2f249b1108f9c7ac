"""Configuration: YAML text and an environment mapping become frozen settings; an unknown key is an error with its path."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=1)]


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    cert: str
    key: str


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON otherwise."""
    access: bool = False
    prompts: bool = False
    """Whether inputs and outputs may appear in the log."""


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = ".hector/hector.db"
    """A path of a SQLite file, or ``memory``."""
    durability: Literal["process", "full"] = "process"
    """``process``: survives the death of the process; ``full``: also the loss of power."""


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    host: list[str] = field(default_factory=lambda: ["127.0.0.1", "::1"])
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    uds: str | None = None
    fd: int | None = None
    tls: Tls | None = None
    root_path: str = ""
    base_url: str | None = None
    trusted_proxies: list[str] = field(default_factory=list)
    """Addresses or networks whose ``X-Forwarded-*`` count."""
    allow_origins: list[str] = field(default_factory=list)
    allowed_hosts: list[str] = field(default_factory=list)
    insecure: bool = False
    shutdown_grace: Annotated[float, Meta(ge=0)] = 10.0
    """Seconds that running streams may go on after SIGTERM."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a client could make grow, with its bound."""

    body_bytes: Bytes = 1 << 20
    json_depth: Count = 64
    connections: Count = 10_000
    sockets: Count = 5_000
    """Open WebSockets."""
    tasks_per_socket: Count = 100
    """Running or queued tasks that one WebSocket started."""
    running: Count = 1_000
    """Runs at once, in all."""
    queued: Count = 10_000
    """Accepted tasks that wait for a turn or a slot, in all."""
    queued_per_session: Count = 100
    chunk_bytes: Bytes = 256 * 1024
    """Size of one emitted chunk's content."""
    log_bytes: Bytes = 64 << 20
    """Size of one task's log; beyond it the run fails with ``log_full``."""
    sessions: Count = 100_000
    """Sessions per owner."""
    history_messages: Count = 200
    """Messages of the conversation that a run is given."""
    first_message_timeout: Seconds = 30.0
    """Seconds that a WebSocket may stay without a first message."""
    idle_after_final: Seconds = 2.0
    """Seconds after which a WebSocket on which only tasks were sent, all of them ended, is closed with 1000."""
    header_timeout: Seconds = 10.0
    body_timeout: Seconds = 30.0
    """Seconds without a byte of an announced request body."""
    keep_alive_timeout: Seconds = 75.0
    send_timeout: Seconds = 10.0
    """Seconds without progress after which a viewer that does not read is cut."""
    ping_interval: Seconds = 20.0
    unread_messages: Count = 1024
    unread_bytes: Bytes = 4 << 20
    max_uncommitted: Bytes = 256 * 1024
    """Bytes of one task that may wait for the store before its ``emit`` waits."""
    tail_bytes: Bytes = 256 * 1024
    """Committed bytes of a running task's log that are kept in memory for its readers."""
    sync_agents: Count = 40
    """Worker threads for agents written as plain functions."""


class Tasks(Struct, frozen=True, forbid_unknown_fields=True):
    timeout: Seconds = 600.0
    """Default and, without ``max_timeout``, the usual bound of a task."""
    max_timeout: Seconds = 3600.0
    retention: Annotated[float, Meta(ge=0)] = 7 * 86400.0
    """Seconds that ended tasks without a session are kept."""
    sweep_interval: Seconds = 60.0


class Token(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    """The owner of everything created with this token."""
    token: str
    role: Literal["admin", "user", "viewer"] = "user"


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    tokens: list[Token] = field(default_factory=list)


class DemoLlm(Struct, frozen=True, forbid_unknown_fields=True, tag="demo", tag_field="type"):
    """The built-in model: offline, deterministic, honest about being none."""

    words_per_second: Annotated[float, Meta(ge=0)] = 25.0
    """0: as fast as it can."""


class OpenAiLlm(Struct, frozen=True, forbid_unknown_fields=True, tag="openai", tag_field="type"):
    """Any server that speaks OpenAI's chat completions."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key: str | None = None
    connect_timeout: Seconds = 10.0
    read_timeout: Seconds = 120.0
    """Seconds without a byte from the model's server."""
    max_retries: Annotated[int, Meta(ge=0, le=20)] = 3
    max_connections: Count = 200
    headers: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


Llm = DemoLlm | OpenAiLlm


class LlmAgent(Struct, frozen=True, forbid_unknown_fields=True, tag="llm", tag_field="type"):
    llm: str
    name: str | None = None
    description: str = ""
    version: str = "1.0.0"
    instructions: str = ""
    """The system prompt."""
    parameters: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class PythonAgent(Struct, frozen=True, forbid_unknown_fields=True, tag="python", tag_field="type"):
    function: str
    """``module:name`` or ``path/to/file.py:name`` of an ``async def`` or ``def`` that takes the context."""
    name: str | None = None
    description: str = ""
    version: str = "1.0.0"
    metadata: dict[str, Any] = field(default_factory=dict)


AgentSettings = LlmAgent | PythonAgent


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything `hector serve` can be told."""

    server: Server = field(default_factory=Server)
    store: StoreSettings = field(default_factory=StoreSettings)
    auth: Auth = field(default_factory=Auth)
    tasks: Tasks = field(default_factory=Tasks)
    limits: Limits = field(default_factory=Limits)
    log: Log = field(default_factory=Log)
    llms: dict[str, Llm] = field(default_factory=dict)
    agents: dict[str, AgentSettings] = field(default_factory=dict)
    default_agent: str | None = None
