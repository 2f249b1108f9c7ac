"""The settings as frozen structs: the only list of keys there is, with their types, defaults and explanations.

What may stand in a file, which variables exist and what the reference says all follow from these structs and from the
docstrings below their fields; a field that holds a struct is explained by the docstring of that struct.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

# Upper bounds stand where nobody has a use for more: what passes them is a slip, and would overflow somewhere later.
LONG = 10 * 365 * 86400
"""The most seconds that any key takes: ten years."""
Seconds = Annotated[float, Meta(gt=0, le=LONG)]
Span = Annotated[float, Meta(ge=0, le=LONG)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Bytes = Annotated[int, Meta(ge=1, le=1 << 40)]


class Tls(Struct, frozen=True):
    """Serve https and wss with this certificate."""

    cert: str
    """File of the certificate chain (PEM)."""
    key: str
    """File of the private key (PEM)."""


class Log(Struct, frozen=True):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that are logged."""
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON lines otherwise."""
    access: bool = False
    """One line per request."""
    prompts: bool = False
    """Whether inputs and outputs may appear in the log."""


class StoreSettings(Struct, frozen=True):
    """Where sessions, tasks and their logs are kept."""

    url: str = ".hector/hector.db"
    """A path of a SQLite file, or ``memory`` (everything is lost at the end)."""
    durability: Literal["process", "full"] = "process"
    """``process``: what was acknowledged survives the death of the process; ``full``: also the loss of power."""


class Server(Struct, frozen=True):
    """Where the server listens, and whom it believes."""

    host: list[str] = field(default_factory=lambda: ["127.0.0.1", "::1"])
    """Addresses to listen on, one or a list. Anything but loopback needs ``auth`` or ``insecure``."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    """TCP port; 0: any free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead of host and port."""
    fd: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """Number of an inherited listening socket to use instead of host and port (socket activation)."""
    tls: Tls | None = None
    http2: bool = False
    """Speak HTTP/2 too, and with it A2A over gRPC: over TLS by ALPN, else with clients that begin with it (h2c)."""
    root_path: str = ""
    """Prefix under which a proxy publishes this server, such as ``/hector``."""
    base_url: str | None = None
    """The server's public address in agent cards; without it cards follow the request's (trusted) host."""
    card_key: str | None = None
    """File of a private key (PEM) that signs the A2A cards; needs ``base_url`` and the extra ``jwt``."""
    trusted_proxies: list[str] = field(default_factory=list)
    """Addresses or networks whose ``X-Forwarded-*`` count; ``unix``: whoever is on the Unix socket; ``*``: all."""
    allow_origins: list[str] = field(default_factory=list)
    """Origins of browser pages that may call besides loopback and the server's own; ``*``: all, without credentials."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names accepted on a loopback bind besides loopback names; ``*.example.com``: any subdomain; ``*``: all."""
    insecure: bool = False
    """Allow a bind that others can reach without any token."""
    shutdown_grace: Span = 10.0
    """Seconds that running streams may go on after SIGTERM."""
    debug_tree: bool = False
    """Serve ``/debug/tree``, the live tree of tasks, to admins; without tokens, to this machine only."""


class Limits(Struct, frozen=True):
    """Everything a client could make grow, with its bound."""

    body_bytes: Bytes = 1 << 20
    """Size of a request's body and of a WebSocket message."""
    json_depth: Annotated[int, Meta(ge=1, le=512)] = 64
    """Depth of nested lists and objects in a body."""
    connections: Count = 10_000
    """Open TCP connections, of all kinds."""
    sockets: Count = 5_000
    """Open WebSockets."""
    tasks_per_socket: Count = 100
    """Running or queued tasks that one WebSocket started."""
    running: Count = 1_000
    """Runs at once, in all."""
    queued: Count = 10_000
    """Accepted tasks that wait for a turn or a slot, in all."""
    queued_per_session: Count = 100
    """Accepted tasks that wait for their turn in one session."""
    waiting_for_input: Count = 10_000
    """Tasks that wait for input, in all; beyond it ``ask`` fails the run."""
    chunk_bytes: Bytes = 256 * 1024
    """Size of one emitted chunk's content."""
    log_bytes: Bytes = 64 << 20
    """Size of one task's log; beyond it the run fails with ``log_full``."""
    sessions: Count = 100_000
    """Sessions per owner."""
    session_bytes: Bytes = 256 * 1024
    """Size of one session's state and metadata together, as JSON."""
    history_messages: Count = 200
    """Messages of the conversation that a run is given."""
    history_bytes: Bytes = 1 << 20
    """Size of the messages that a run is given, as JSON."""
    first_message_timeout: Seconds = 30.0
    """Seconds that a WebSocket may stay without a first message."""
    idle_after_final: Seconds = 2.0
    """Seconds after which a WebSocket on which only tasks were sent, all of them ended, is closed with 1000."""
    header_timeout: Seconds = 10.0
    """Seconds that a request's head may take to arrive."""
    body_timeout: Seconds = 30.0
    """Seconds without a byte of an announced request body."""
    keep_alive_timeout: Seconds = 75.0
    """Seconds that an idle HTTP connection stays open."""
    send_timeout: Seconds = 10.0
    """Seconds without progress after which a viewer that does not read is cut."""
    ping_interval: Seconds = 20.0
    """Seconds between WebSocket pings; a peer silent for two of them is gone."""
    unread_messages: Count = 1024
    """WebSocket messages that may wait to be handled; beyond it the socket is closed with 1008."""
    unread_bytes: Bytes = 4 << 20
    """Size of those messages together."""
    max_uncommitted: Bytes = 256 * 1024
    """Bytes of one task that may wait for the store before its ``emit`` waits."""
    tail_bytes: Bytes = 256 * 1024
    """Committed bytes of a running task's log that are kept in memory for its readers."""
    view_bytes: Bytes = 64 << 20
    """Size of the logs whose tasks are kept in memory as A2A has them; others are read when a client asks for them."""
    sync_agents: Count = 40
    """Worker threads for agents written as plain functions."""


class Tasks(Struct, frozen=True):
    """How long tasks may run and are kept."""

    timeout: Seconds = 600.0
    """Seconds after which a task that names no ``timeoutMs`` is cut."""
    max_timeout: Seconds = 3600.0
    """The most seconds that a task's own ``timeoutMs`` may ask for."""
    grace: Span = 0.0
    """Seconds that a streamed task which says nothing else goes on when its last viewer has left; 0: none."""
    max_grace: Span = 3600.0
    """The most seconds that a task's own ``graceMs`` may ask for."""
    input_timeout: Span = 86400.0
    """Seconds that a task may wait for input."""
    retention: Span = 7 * 86400.0
    """Seconds that ended tasks without a session are kept."""
    log_retention: Span | None = None
    """Seconds that the chunks of ended tasks are kept, also of those in a session; left out: as long as the task."""
    sweep_interval: Seconds = 60.0
    """Seconds between two looks for tasks and sessions whose time is over."""


class UploadSettings(Struct, frozen=True):
    """Files that clients send in pieces (tus), for tasks to use."""

    path: str | None = None
    """Folder that keeps them. Left out: beside the database, ``hector.db-uploads``; for ``memory`` a temporary one."""
    max_bytes: Bytes = 1 << 30
    """Size of one upload."""
    owner_bytes: Bytes = 4 << 30
    """Size of one owner's uploads together, as they were announced."""
    total_bytes: Bytes = 16 << 30
    """Size of all uploads together, as they were announced."""
    per_owner: Count = 1_000
    """Uploads of one owner, finished or not."""
    expiry: Seconds = 86400.0
    """Seconds after its last byte, or after the last task that used it could have ended, that an upload is kept."""


class PushSettings(Struct, frozen=True):
    """Webhooks that A2A clients name, to be told of their tasks."""

    enabled: bool = True
    """Whether there are any."""
    allow: list[str] = field(default_factory=list)
    """Hosts, addresses or networks that may be called although they are not public; ``*.lan``: all hosts below."""
    allow_loopback: bool = False
    """Whether this machine may be called."""
    timeout: Annotated[float, Meta(gt=0, le=60)] = 15.0
    """Seconds that a request may take, from looking up the name to the answer."""
    attempts: Annotated[int, Meta(ge=1, le=100)] = 8
    """Attempts to deliver an event before it is given up."""
    backoff: Annotated[float, Meta(gt=0, le=3600)] = 1.0
    """Seconds between the first two attempts; each further pause is twice as long."""
    max_backoff: Annotated[float, Meta(gt=0, le=86400)] = 300.0
    """The longest pause between attempts, also if the webhook asks for a longer one."""
    interval: Annotated[float, Meta(ge=0, le=60)] = 0.1
    """Seconds from one request to the next about the same task, unless they are due together; text is joined."""
    per_task: Count = 16
    """Webhooks of one task."""
    webhooks: Count = 10_000
    """Webhooks of all tasks that have not been told everything."""
    concurrent: Count = 200
    """Requests under way, in all."""
    per_host: Count = 8
    """Requests under way to one host."""
    encryption_keys: list[str] = field(default_factory=list)
    """Keys under which webhooks are stored (needs the extra ``jwt``): the first encrypts, all decrypt; none: as is."""


class Token(Struct, frozen=True):
    """One bearer token and whose it is."""

    name: str
    """The owner of everything created with this token. ``local`` owns what was created before there were tokens."""
    token: str
    """The secret, at least 16 characters; take it from the environment: ``${NAME}``."""
    role: Literal["admin", "user", "viewer"] = "user"
    """``viewer`` reads, ``user`` also runs and changes, ``admin`` also sees ``/metrics``. Each sees its own things."""


Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class Jwt(Struct, frozen=True):
    """Also accept JSON Web Tokens of this issuer (needs the extra: ``pip install "hector_trio[jwt]"``)."""

    issuer: str
    """What a token must have as ``iss``, to the letter."""
    audience: list[str]
    """What a token must have among its ``aud``, one or a list."""
    jwks_url: str | None = None
    """Address of the issuer's public keys (a JSON Web Key Set); https, or http on this machine."""
    jwks_file: str | None = None
    """File of the keys instead; it is read again like an address, so replacing it replaces the keys."""
    algorithms: list[Algorithm] = field(default_factory=lambda: ["RS256", "ES256", "EdDSA"])
    """Signatures that are accepted. Those made with a shared secret (HS256 and its like) cannot be."""
    owner_claim: str = "sub"
    """Claim that names the owner, as ``tokens[].name`` does. Take one that is unique and not chosen by its holder."""
    role_claim: str | None = None
    """Claim that holds the role, one or a list, the mightiest counts; a dot leads into an object: ``realm.roles``."""
    role: Literal["admin", "user", "viewer"] = "user"
    """The role of those whose token names none."""
    leeway: Annotated[float, Meta(ge=0, le=600)] = 30.0
    """Seconds that the issuer's clock may differ from ours."""
    refresh: Seconds = 300.0
    """Seconds after which the keys are fetched again; a token with an unknown key has them fetched at once."""
    keep: Seconds = 86400.0
    """Seconds that fetched keys are good for while their address does not answer; then tokens get 503."""


class Auth(Struct, frozen=True):
    """Who may call. Without tokens, whoever can reach the port."""

    tokens: list[Token] = field(default_factory=list)
    """Bearer tokens that are accepted; with none, and no ``jwt``, everybody is the same local user."""
    jwt: Jwt | None = None

    @property
    def required(self) -> bool:
        """Whether callers need a token at all."""
        return bool(self.tokens) or self.jwt is not None


class DemoLlm(Struct, frozen=True, tag="demo", tag_field="type"):
    """The built-in model: offline, deterministic, honest about being none."""

    words_per_second: Annotated[float, Meta(ge=0, le=1_000_000)] = 25.0
    """Pace of the answer; 0: as fast as it can."""


class OpenAiLlm(Struct, frozen=True, tag="openai", tag_field="type"):
    """Any server that speaks OpenAI's chat completions."""

    model: str
    """The model's name, as its server knows it."""
    base_url: str = "https://api.openai.com/v1"
    """The API's address, without ``/chat/completions``."""
    api_key: str | None = None
    """The key, if the server wants one; take it from the environment: ``${OPENAI_API_KEY}``."""
    connect_timeout: Seconds = 10.0
    """Seconds that connecting to the model's server may take."""
    read_timeout: Seconds = 120.0
    """Seconds without a byte from the model's server."""
    max_retries: Annotated[int, Meta(ge=0, le=20)] = 3
    """Further attempts after a refused connection, 429 or 5xx, as long as nothing of the answer has arrived."""
    max_connections: Count = 200
    """Connections to the model's server at once."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of each request to the model's server."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Members of each request's body, such as ``temperature``; agents and tasks may override them."""


Llm = DemoLlm | OpenAiLlm


class A2aSkill(Struct, frozen=True):
    """One thing that an agent is good at, as its A2A card says it."""

    id: str
    """Unique among the agent's skills."""
    name: str
    """For people."""
    description: str
    """What it does."""
    tags: list[str]
    """Words to find it by, one at least."""
    examples: list[str] = field(default_factory=list)
    """Prompts that it answers."""
    input_modes: list[str] = field(default_factory=list)
    """Media types that it takes; none: the agent's."""
    output_modes: list[str] = field(default_factory=list)
    """Media types that it gives; none: the agent's."""


class A2aExtension(Struct, frozen=True):
    """An A2A extension that an agent offers or asks for."""

    uri: str
    """Its name."""
    description: str = ""
    """How the agent uses it."""
    required: bool = False
    """Refuse clients that do not declare it."""
    enforce: Literal["always", "agent"] = "always"
    """``agent``: only where the agent itself asks for it (``ctx.require_extension``)."""
    params: dict[str, Any] = field(default_factory=dict)
    """What it wants to have said about it."""


class A2a(Struct, frozen=True):
    """What an agent's A2A card says, and with that what it does."""

    streaming: bool = True
    """Whether clients may stream and subscribe."""
    push: bool = True
    """Whether clients may have push notifications."""
    skills: list[A2aSkill] = field(default_factory=list)
    """What it is good at; left out: one skill, which is the agent itself."""
    extended_skills: list[A2aSkill] = field(default_factory=list)
    """Further skills that only the card for authenticated clients shows."""
    extensions: list[A2aExtension] = field(default_factory=list)
    """Extensions that it offers or asks for."""
    legacy: bool = True
    """Whether clients of A2A 0.3 are served, and find their way on the card."""
    resume: bool = True
    """Whether streams can be resumed by number (an extension of ours)."""
    input_modes: list[str] = field(default_factory=list)
    """Media types that it takes; none: text/plain and application/json."""
    output_modes: list[str] = field(default_factory=list)
    """Media types that it gives; none: text/plain and application/json."""
    provider: str | None = None
    """Who provides it."""
    provider_url: str | None = None
    """The provider's address."""
    documentation_url: str | None = None
    """Where it is described."""
    icon_url: str | None = None
    """Its picture."""


class LlmAgent(Struct, frozen=True, tag="llm", tag_field="type"):
    """An agent that hands the conversation to a model."""

    llm: str = "demo"
    """Key of the model under ``llms``. Left out: the one called ``default``, or the only one, or ``demo``."""
    name: str | None = None
    """Name on the card; left out: the agent's id."""
    description: str = ""
    """What the card says the agent does."""
    version: str = "1.0.0"
    """Version on the card, in quotes."""
    instructions: str = ""
    """The system prompt."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Members of the model's request, such as ``temperature``; they override those of the model."""
    grace: Span | None = None
    """``tasks.grace`` of this agent; left out: the server's."""
    max_grace: Span | None = None
    """``tasks.max_grace`` of this agent; left out: the server's."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else for the card."""
    a2a: A2a = field(default_factory=A2a)


class PythonAgent(Struct, frozen=True, tag="python", tag_field="type"):
    """An agent written in Python."""

    function: str
    """``module:name`` or ``path/to/file.py:name`` of an ``async def`` or ``def`` that takes the context."""
    name: str | None = None
    """Name on the card; left out: the agent's id."""
    description: str = ""
    """What the card says the agent does."""
    version: str = "1.0.0"
    """Version on the card, in quotes."""
    grace: Span | None = None
    """``tasks.grace`` of this agent; left out: the server's."""
    max_grace: Span | None = None
    """``tasks.max_grace`` of this agent; left out: the server's."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else for the card."""
    replies: bool = False
    """Whether it may answer with a bare A2A message (``ctx.reply``)."""
    a2a: A2a = field(default_factory=A2a)


class RemoteAgent(Struct, frozen=True, tag="a2a", tag_field="type"):
    """An agent somewhere else, over A2A 1.0 or 0.3."""

    url: str
    """Address of the agent or of its card; without a card there, ``/.well-known/agent-card.json`` is looked for."""
    token: str | None = None
    """Bearer token for it, sent to the origin of ``url`` only; take it from the environment: ``${NAME}``."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of each request to it, such as an API key; sent like the token."""
    connect_timeout: Seconds = 10.0
    """Seconds that connecting to it may take."""
    read_timeout: Seconds = 60.0
    """Seconds without a byte from it, after which a stream is taken up again and any other request has failed."""
    max_connections: Count = 100
    """Connections to it at once."""
    name: str | None = None
    """Name on the card; left out: the agent's id."""
    description: str = ""
    """What the card says the agent does."""
    version: str = "1.0.0"
    """Version on the card, in quotes."""
    grace: Span | None = None
    """``tasks.grace`` of this agent; left out: the server's."""
    max_grace: Span | None = None
    """``tasks.max_grace`` of this agent; left out: the server's."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else for the card."""
    a2a: A2a = field(default_factory=A2a)


AgentSettings = LlmAgent | PythonAgent | RemoteAgent


class Settings(Struct, frozen=True):
    """Everything `hector serve` can be told."""

    server: Server = field(default_factory=Server)
    store: StoreSettings = field(default_factory=StoreSettings)
    auth: Auth = field(default_factory=Auth)
    tasks: Tasks = field(default_factory=Tasks)
    limits: Limits = field(default_factory=Limits)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    push: PushSettings = field(default_factory=PushSettings)
    log: Log = field(default_factory=Log)
    llms: dict[str, Llm] = field(default_factory=dict)
    """Models by name. ``demo``, the built-in one, is always there unless it is declared otherwise."""
    agents: dict[str, AgentSettings] = field(default_factory=dict)
    """Agents by id."""
    default_agent: str | None = None
    """The agent meant where none is named. Left out: ``assistant``, or else the first one."""
