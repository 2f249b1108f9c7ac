"""Configuration: YAML text and an environment mapping become frozen settings; an unknown key is an error with its path.

The settings are built in layers, each overriding the one before, key by key: the defaults below, ``HECTOR_*``
variables, the config file, the command line. The structs are the only list of keys there is: what may stand in a file,
which variables exist and what the reference says all follow from them and from their docstrings.

Paths inside a config file (TLS files, the store, the Unix socket, files of Python agents) are relative to the folder
of that file; paths from variables, flags and defaults are relative to the working directory.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import NODEFAULT, Meta, Struct, field

from hector_trio.errors import ConfigError
from hector_trio.models import is_id

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=1)]

# --- the settings -----------------------------------------------------------------------------------------------------


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    """Serve https and wss with this certificate."""

    cert: str
    """File of the certificate chain (PEM)."""
    key: str
    """File of the private key (PEM)."""


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that are logged."""
    format: Literal["auto", "text", "json"] = "auto"
    """``auto``: text on a terminal, JSON lines otherwise."""
    access: bool = False
    """One line per request."""
    prompts: bool = False
    """Whether inputs and outputs may appear in the log."""


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Where sessions, tasks and their logs are kept."""

    url: str = ".hector/hector.db"
    """A path of a SQLite file, or ``memory`` (everything is lost at the end)."""
    durability: Literal["process", "full"] = "process"
    """``process``: what was acknowledged survives the death of the process; ``full``: also the loss of power."""


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the server listens, and whom it believes."""

    host: list[str] = field(default_factory=lambda: ["127.0.0.1", "::1"])
    """Addresses to listen on, one or a list. Anything but loopback needs ``auth.tokens`` or ``insecure``."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    """TCP port; 0: any free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead of host and port."""
    fd: Annotated[int, Meta(ge=0)] | None = None
    """Number of an inherited listening socket to use instead of host and port (socket activation)."""
    tls: Tls | None = None
    """Serve https and wss with this certificate."""
    root_path: str = ""
    """Prefix under which a proxy publishes this server, such as ``/hector``."""
    base_url: str | None = None
    """The server's public address in agent cards; without it cards follow the request's (trusted) host."""
    trusted_proxies: list[str] = field(default_factory=list)
    """Addresses or networks whose ``X-Forwarded-*`` count; ``unix``: whoever is on the Unix socket; ``*``: all."""
    allow_origins: list[str] = field(default_factory=list)
    """Origins of browser pages that may call besides loopback and the server's own; ``*``: all, without credentials."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names accepted on a loopback bind besides loopback names; ``*.example.com``: any subdomain; ``*``: all."""
    insecure: bool = False
    """Allow a bind that others can reach without any token."""
    shutdown_grace: Annotated[float, Meta(ge=0)] = 10.0
    """Seconds that running streams may go on after SIGTERM."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a client could make grow, with its bound."""

    body_bytes: Bytes = 1 << 20
    """Size of a request's body and of a WebSocket message."""
    json_depth: Count = 64
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
    sync_agents: Count = 40
    """Worker threads for agents written as plain functions."""


class Tasks(Struct, frozen=True, forbid_unknown_fields=True):
    """How long tasks may run and are kept."""

    timeout: Seconds = 600.0
    """Seconds after which a task that names no ``timeoutMs`` is cut."""
    max_timeout: Seconds = 3600.0
    """The most seconds that a task's own ``timeoutMs`` may ask for."""
    retention: Annotated[float, Meta(ge=0)] = 7 * 86400.0
    """Seconds that ended tasks without a session are kept."""
    sweep_interval: Seconds = 60.0
    """Seconds between two looks for tasks and sessions whose time is over."""


class Token(Struct, frozen=True, forbid_unknown_fields=True):
    """One bearer token and whose it is."""

    name: str
    """The owner of everything created with this token. ``local`` owns what was created before there were tokens."""
    token: str
    """The secret, at least 16 characters; take it from the environment: ``${NAME}``."""
    role: Literal["admin", "user", "viewer"] = "user"
    """``viewer`` reads, ``user`` also runs and changes, ``admin`` also sees ``/metrics``. Each sees its own things."""


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may call. Without tokens, whoever can reach the port."""

    tokens: list[Token] = field(default_factory=list)
    """Bearer tokens that are accepted; with none, everybody is the same local user."""


class DemoLlm(Struct, frozen=True, forbid_unknown_fields=True, tag="demo", tag_field="type"):
    """The built-in model: offline, deterministic, honest about being none."""

    words_per_second: Annotated[float, Meta(ge=0)] = 25.0
    """Pace of the answer; 0: as fast as it can."""


class OpenAiLlm(Struct, frozen=True, forbid_unknown_fields=True, tag="openai", tag_field="type"):
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


class LlmAgent(Struct, frozen=True, forbid_unknown_fields=True, tag="llm", tag_field="type"):
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
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else for the card."""


class PythonAgent(Struct, frozen=True, forbid_unknown_fields=True, tag="python", tag_field="type"):
    """An agent written in Python."""

    function: str
    """``module:name`` or ``path/to/file.py:name`` of an ``async def`` or ``def`` that takes the context."""
    name: str | None = None
    """Name on the card; left out: the agent's id."""
    description: str = ""
    """What the card says the agent does."""
    version: str = "1.0.0"
    """Version on the card, in quotes."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything else for the card."""


AgentSettings = LlmAgent | PythonAgent


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything `hector serve` can be told."""

    server: Server = field(default_factory=Server)
    """Where the server listens, and whom it believes."""
    store: StoreSettings = field(default_factory=StoreSettings)
    """Where sessions, tasks and their logs are kept."""
    auth: Auth = field(default_factory=Auth)
    """Who may call. Without tokens, whoever can reach the port."""
    tasks: Tasks = field(default_factory=Tasks)
    """How long tasks may run and are kept."""
    limits: Limits = field(default_factory=Limits)
    """Everything a client could make grow, with its bound."""
    log: Log = field(default_factory=Log)
    """What is logged, and how."""
    llms: dict[str, Llm] = field(default_factory=dict)
    """Models by name. ``demo``, the built-in one, is always there unless it is declared otherwise."""
    agents: dict[str, AgentSettings] = field(default_factory=dict)
    """Agents by id."""
    default_agent: str | None = None
    """The agent meant where none is named. Left out: ``assistant``, or else the first one."""


# --- from text to settings --------------------------------------------------------------------------------------------

Path = tuple[str, ...]

OTHER_VARIABLES = frozenset({"HECTOR_SERVER", "HECTOR_TOKEN", "HECTOR_CONFIG", "HECTOR_CONNECTION"})
"""``HECTOR_*`` names that are no settings: the CLI client's server and token, and what ``hector_trio.asgi`` reads."""

MAX_TEXT = 4 << 20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Bounds of a config: characters, nesting, and values once its YAML aliases are followed."""

MIN_TOKEN = 16
COMMAND_LINE = "command line"


class Overrides(NamedTuple):
    """What the environment says: a mapping shaped like the settings, the variable behind each path, and warnings."""

    values: dict[str, Any]
    names: dict[Path, str]
    warnings: list[str]


class Key(NamedTuple):
    """One key a config file may hold, for the reference. ``default`` is its JSON-like text; "" when it is required."""

    path: str
    type: str
    default: str
    doc: str


def load(
    text: str,
    environ: Mapping[str, str],
    *,
    source: str,
    base: str | None = None,
    flags: Mapping[str, Any] | None = None,
    need_agents: bool = True,
) -> Settings:
    """The settings of a config file's ``text`` over ``environ`` and under ``flags`` (shaped like the settings).

    ``source`` names the file in messages; relative paths in the text are joined to the folder ``base`` (None: kept).
    ``need_agents`` is False for programs that bring their own agents. Reads nothing from outside.

    Raises ConfigError: one line ``source: path.of.key: message`` for each thing that is wrong, the first one first.
    """
    issues = _Issues(source)
    document = _Yaml(environ, issues).read(text)
    overrides = from_environment(environ)
    return _layered(overrides, document, flags or {}, issues, base=base, need_agents=need_agents)


def load_file(
    path: str, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None, *, need_agents: bool = True
) -> Settings:
    """The settings of the config file at ``path``; see ``load``. Also looks whether the files it names are there.

    Raises ConfigError.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    base = os.path.dirname(os.path.abspath(path))
    settings = load(text, environ, source=path, base=base, flags=flags, need_agents=need_agents)
    check_files(settings, source=path)
    return settings


def default_settings(
    environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None, *, need_agents: bool = True
) -> Settings:
    """The settings without a config file: one agent ``assistant``, on the demo model unless ``flags`` declare another.

    Raises ConfigError.
    """
    issues = _Issues("settings")
    overrides = from_environment(environ or {})
    agents = {"assistant": {"name": "Assistant"}} if need_agents else {}
    settings = _layered(overrides, {"agents": agents}, flags or {}, issues, base=None, need_agents=need_agents)
    assistant = settings.agents.get("assistant")
    if not isinstance(assistant, LlmAgent) or assistant.description:
        return settings
    model = settings.llms[assistant.llm]
    said = msgspec.structs.replace(
        assistant,
        description=(
            "A built-in demo without a language model: it streams answers made up by simple rules, to try the server."
            if isinstance(model, DemoLlm)
            else f"Answers with the model {model.model}."
        ),
    )
    return msgspec.structs.replace(settings, agents={**settings.agents, "assistant": said})


def from_environment(environ: Mapping[str, str]) -> Overrides:
    """What the ``HECTOR_*`` variables say. Empty ones count as absent; lists are comma separated.

    A name that is no setting becomes a warning. Raises ConfigError naming the variable whose value is wrong.
    """
    known = {_variable(path): (path, owner, info) for path, owner, info in _plain_fields()}
    issues = _Issues("environment")
    values: dict[str, Any] = {}
    names: dict[Path, str] = {}
    warnings: list[str] = []
    for name in sorted(environ):
        if not name.startswith("HECTOR_") or name in OTHER_VARIABLES or not environ[name]:
            continue
        if name not in known:
            warnings.append(_unknown_variable(name, known))
            continue
        path, owner, info = known[name]
        issues.origins[path] = names[path] = name
        value = _Builder(issues, base=None).field(owner, info, _Expanded(environ[name]), path)
        node = values
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    issues.raise_any()
    return Overrides(values, names, warnings)


def secrets(settings: Settings) -> list[str]:
    """Every secret the settings hold, for the log to hide."""
    found = [token.token for token in settings.auth.tokens]
    for llm in settings.llms.values():
        if isinstance(llm, OpenAiLlm):
            found += [llm.api_key or "", *llm.headers.values()]
    return [secret for secret in found if secret]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to ``host`` (an address or a name)."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(settings: Settings, bound: Sequence[str] | None = None) -> None:
    """Refuses to serve others without tokens.

    ``bound`` are the addresses of sockets that somebody else opened (``server.fd``, Hypercorn's own binds); without
    it, those of the settings count; a Unix socket has none.

    Raises ConfigError.
    """
    if settings.auth.tokens or settings.server.insecure:
        return
    if bound is None:
        bound = [] if settings.server.uds is not None or settings.server.fd is not None else settings.server.host
    open_to = [host for host in bound if not is_loopback(host)]
    if open_to:
        raise ConfigError(
            f"listening on {', '.join(open_to)} would let everybody who can reach this machine run agents: declare"
            " auth.tokens in the config, or say --insecure if something else guards the port"
        )


def check_files(settings: Settings, *, source: str) -> None:
    """Looks whether the files that the settings name can be read.

    Raises ConfigError.
    """
    issues = _Issues(source)
    tls = settings.server.tls
    named: list[tuple[Path, str]] = []
    if tls is not None:
        named += [(("server", "tls", "cert"), tls.cert), (("server", "tls", "key"), tls.key)]
    for agent_id, agent in settings.agents.items():
        if isinstance(agent, PythonAgent):
            file = agent.function.rpartition(":")[0]
            if file.endswith(".py"):
                named.append((("agents", agent_id, "function"), file))
    for path, file in named:
        if not os.path.isfile(file):
            issues.add(path, f"there is no file {file}")
        elif not os.access(file, os.R_OK):
            issues.add(path, f"{file} cannot be read by this user")
    issues.raise_any()


def describe() -> list[Key]:
    """Every key a config file may hold, in the order of the structs; parses this module's source for the docstrings."""
    docs = _docstrings()
    keys: list[Key] = []
    seen: set[str] = set()

    def walk(cls: Any, prefix: str, note: str) -> None:
        for info in msgspec.structs.fields(cls):
            path = prefix + info.name
            inner, _ = _without_none(info.type)
            variants = _variants(inner)
            if path not in seen:
                seen.add(path)
                keys.append(Key(path, _words(info.type), _default_text(info), note + docs[cls.__name__, info.name]))
            element = _variants(get_args(inner)[-1]) if get_origin(inner) in (dict, list) else []
            if variants:
                walk(variants[0], path + ".", "")
            elif get_origin(inner) is list and element:
                walk(element[0], path + "[].", "")
            elif element:
                name = f"{path}.{'ID' if path == 'agents' else 'NAME'}."
                tags = [str(variant.__struct_config__.tag) for variant in element]
                default = "llm" if path == "agents" else ""
                keys.append(Key(name + "type", f"one of {', '.join(tags)}", default, f"What kind: {', '.join(tags)}."))
                for variant, tag in zip(element, tags, strict=True):
                    walk(variant, name, f"({tag}) ")

    walk(Settings, "", "")
    return keys


# --- what is wrong, and where -----------------------------------------------------------------------------------------


class _Issues:
    """Collects what is wrong. ``origins`` names, for paths that do not come from ``source``, where they come from."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []
        self.origins: dict[Path, str] = {}

    def origin(self, path: Path) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.source

    def add(self, path: Path, message: str) -> None:
        where = ".".join(path).replace(".[", "[")
        self.lines.append(": ".join(part for part in (self.origin(path), where, message) if part))

    def raise_any(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


def _nearest(word: str, words: Sequence[str]) -> str:
    """`` (did you mean x?)``, or nothing when no word is near."""
    import difflib

    near = difflib.get_close_matches(word.lower(), words, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Expanded(str):
    """Text that came from a variable as a whole: it takes the type of the key where it stands."""


_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class _Yaml:
    """Reads YAML into plain mappings, lists and values; adds what is wrong to the issues.

    It walks PyYAML's nodes itself, because PyYAML keeps the last of two equal keys in silence, follows aliases without
    bound, and makes dates and sets of things that are text to us.
    """

    def __init__(self, environ: Mapping[str, str], issues: _Issues) -> None:
        self._environ = environ
        self._issues = issues
        self._nodes = 0
        self._open: set[int] = set()

    def read(self, text: str) -> Any:
        """Raises ConfigError at once where nothing sensible can follow: syntax and bounds."""
        import yaml

        if len(text) > MAX_TEXT:
            raise ConfigError(f"{self._issues.source}: is longer than {MAX_TEXT} characters")
        kind: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        loader: Any = None
        try:
            # The C composer recurses without a guard of its own, so depth is checked on the events first.
            depth = 0
            for event in yaml.parse(text, Loader=kind):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    mark = event.start_mark
                    raise ConfigError(
                        f"{self._issues.source}: line {mark.line + 1 if mark else '?'}: nested deeper than {MAX_DEPTH}"
                    )
            loader = kind(text)
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, ())
        except yaml.MarkedYAMLError as error:
            raise ConfigError(self._syntax(error, text)) from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{self._issues.source}: {' '.join(str(error).split())}") from None
        finally:
            if loader is not None:
                loader.dispose()

    def _syntax(self, error: Any, text: str) -> str:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part) or "is not YAML"
        if mark is None:
            return f"{self._issues.source}: {message}"
        lines = text.splitlines()
        line = lines[mark.line] if mark.line < len(lines) else ""
        if "${" in line and ("{" in line.replace("${", "") or "[" in line):
            message += "; inside [ ] and { } a ${VARIABLE} must stand in quotes"
        elif "\t" in line:
            message += "; YAML indents with spaces, never with tabs"
        return f"{self._issues.source}: line {mark.line + 1}, column {mark.column + 1}: {message}"

    def _value(self, loader: Any, node: Any, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{self._issues.source}: more than {MAX_NODES} values; are aliases (*name) nested?")
        if id(node) in self._open:
            self._issues.add(path, "the alias contains itself")
            return None
        self._open.add(id(node))
        try:
            if node.id == "scalar":
                return self._scalar(loader, node, path)
            if node.id == "sequence":
                return [self._value(loader, item, (*path, f"[{at}]")) for at, item in enumerate(node.value)]
            return self._mapping(loader, node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, loader: Any, node: Any, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                parts = self._value(loader, value, path)
                for part in parts if isinstance(parts, list) else [parts]:
                    if isinstance(part, dict):
                        merged = {**part, **merged}
                    else:
                        self._issues.add(path, "<< takes a mapping or a list of mappings")
                continue
            if key.id != "scalar":
                self._issues.add(path, f"line {key.start_mark.line + 1}: a key is text, not a list or mapping")
                continue
            name: str = key.value
            if name in own:
                here = key.start_mark.line + 1
                self._issues.add((*path, name), f"declared twice, in lines {lines[name]} and {here}")
            lines[name] = key.start_mark.line + 1
            own[name] = self._value(loader, value, (*path, name))
        return {**merged, **own}

    def _scalar(self, loader: Any, node: Any, path: Path) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag in ("str", "timestamp", "value", "merge"):
            return self._expanded(node.value, path)
        if tag not in ("null", "bool", "int", "float"):
            self._issues.add(path, f"the YAML tag {node.tag} means nothing here")
            return None
        try:
            value = getattr(loader, f"construct_yaml_{tag}")(node)
        except (ValueError, KeyError):
            self._issues.add(path, f"{node.value!r} is no {tag}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._issues.add(path, f"{node.value} is no finite number")
            return None
        return value

    def _expanded(self, text: str, path: Path) -> str:
        if "${" not in text:
            return text
        failed = False

        def replace(match: re.Match[str]) -> str:
            nonlocal failed
            if match[0] == "$${":
                return "${"
            name, has_default, default = (match[1] or "").partition(":-")
            if match[1] is None or not _NAME.match(name):
                self._issues.add(path, "write ${NAME} or ${NAME:-default} for a variable, and $${ for a literal ${")
            elif value := self._environ.get(name, ""):
                return value
            elif has_default:
                return default
            elif name in self._environ:
                return ""
            else:
                self._issues.add(
                    path, f"the environment variable {name} is not set; set it, or give a default: ${{{name}:-value}}"
                )
            failed = True
            return ""

        whole = _VARIABLE.fullmatch(text)
        result = _VARIABLE.sub(replace, text)
        if failed:
            return _FAILED
        return _Expanded(result) if whole is not None and whole[1] is not None else result


_FAILED = _Expanded("\0")
"""Stands where an expansion failed, so that the key does not also count as missing or as wrong."""


# --- layers -----------------------------------------------------------------------------------------------------------


def _layered(
    overrides: Overrides,
    document: Any,
    flags: Mapping[str, Any],
    issues: _Issues,
    *,
    base: str | None,
    need_agents: bool,
) -> Settings:
    """Defaults < variables < file < flags, completed, checked and built. Raises ConfigError."""
    if document is not None and not isinstance(document, dict):
        issues.add((), "a config is a mapping with the keys " + ", ".join(Settings.__struct_fields__))
        issues.raise_any()
    tree: dict[str, Any] = {}
    _put(tree, overrides.values, (), issues.origins, overrides.names.__getitem__)
    _put(tree, document or {}, (), issues.origins, None)
    _put(tree, _given(flags), (), issues.origins, lambda path: COMMAND_LINE)
    _complete(tree, issues)
    settings = _Builder(issues, base=base).value(Settings, tree, ())
    _check_references(tree, issues, need_agents)
    issues.raise_any()
    assert isinstance(settings, Settings)
    _check_together(settings, issues)
    issues.raise_any()
    return settings


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given: not None, () or a mapping of nothing but such."""
    given: dict[str, Any] = {}
    for key, value in flags.items():
        kept = _given(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        if kept is not None and kept not in ([], {}):
            given[key] = kept
    return given


def _put(
    tree: dict[str, Any],
    layer: Mapping[str, Any],
    path: Path,
    origins: dict[Path, str],
    name: Callable[[Path], str] | None,
) -> None:
    """Merges ``layer`` into ``tree``, key by key, and notes in ``origins`` what did not come from the file."""
    for key, value in layer.items():
        here = (*path, key)
        below = tree.get(key)
        if isinstance(value, Mapping):
            # Another kind of model or agent is another thing: it inherits nothing.
            same_kind = isinstance(below, dict) and below.get("type", value.get("type")) == value.get(
                "type", below.get("type")
            )
            node: dict[str, Any] = below if same_kind and below is not None else {}
            tree[key] = node
            _put(node, value, here, origins, name)
            continue
        if value is None and isinstance(below, dict):
            # `limits:` with nothing but comments below it.
            continue
        tree[key] = value
        for known in [known for known in origins if known[: len(here)] == here]:
            del origins[known]
        if name is not None:
            origins[here] = name(here)


def _complete(tree: dict[str, Any], issues: _Issues) -> None:
    """Adds what may be left out: the demo model, and each agent's type and model."""
    if tree.get("llms") is None:
        tree["llms"] = {}
    llms = tree["llms"]
    if not isinstance(llms, dict):
        llms = {}
    declared = list(llms)
    llms.setdefault("demo", {"type": "demo"})
    agents = tree.get("agents")
    if not isinstance(agents, dict):
        return
    for agent_id, agent in agents.items():
        if agent is None:
            agents[agent_id] = agent = {}
        if not isinstance(agent, dict):
            continue
        agent.setdefault("type", "llm")
        if agent["type"] != "llm" or agent.get("llm") is not None:
            continue
        if "default" in llms:
            agent["llm"] = "default"
        elif len(declared) > 1:
            issues.add(("agents", agent_id, "llm"), f"say which of the declared models it uses: {', '.join(declared)}")
            agent["llm"] = declared[0]
        else:
            agent["llm"] = declared[0] if declared else "demo"
    if tree.get("default_agent") is None and agents:
        tree["default_agent"] = "assistant" if "assistant" in agents else next(iter(agents))


def _check_references(tree: dict[str, Any], issues: _Issues, need_agents: bool) -> None:
    agents, llms = tree.get("agents"), tree.get("llms")
    if agents is None or agents == {}:
        if need_agents:
            issues.add(("agents",), "is missing; declare at least one agent, such as `agents: {assistant: {}}`")
        return
    if not isinstance(agents, dict):
        return
    for agent_id, agent in agents.items():
        if not is_id(agent_id):
            issues.add(("agents", agent_id), "an agent's id is 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
        llm = agent.get("llm") if isinstance(agent, dict) else None
        if isinstance(llm, str) and llm is not _FAILED and isinstance(llms, dict) and llm not in llms:
            names = list(llms)
            issues.add(
                ("agents", agent_id, "llm"),
                f"no model {llm!r} is declared under llms{_nearest(llm, names)} (there are: {', '.join(names)})",
            )
    default = tree.get("default_agent")
    if isinstance(default, str) and default is not _FAILED and default not in agents and need_agents:
        names = list(agents)
        issues.add(
            ("default_agent",),
            f"there is no agent {default!r}{_nearest(default, names)} (there are: {', '.join(names)})",
        )
    for name in llms if isinstance(llms, dict) else ():
        if not is_id(name):
            issues.add(("llms", name), "a model's name is 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")


def _check_together(settings: Settings, issues: _Issues) -> None:
    """What only two keys together can get wrong."""
    names: dict[str, int] = {}
    values: dict[str, int] = {}
    for at, token in enumerate(settings.auth.tokens):
        path = ("auth", "tokens", f"[{at}]")
        if token.name in names:
            issues.add((*path, "name"), f"{token.name!r} is already the name of tokens[{names[token.name]}]")
        if token.token in values:
            issues.add((*path, "token"), f"is the same as that of tokens[{values[token.token]}]")
        names.setdefault(token.name, at)
        values.setdefault(token.token, at)
    tasks = settings.tasks
    if tasks.timeout > tasks.max_timeout:
        issues.add(("tasks", "timeout"), f"{tasks.timeout:g} is more than tasks.max_timeout, {tasks.max_timeout:g}")
    server = settings.server
    if not server.host and server.uds is None and server.fd is None:
        issues.add(("server", "host"), "the list is empty; name an address, such as 127.0.0.1")
    if server.uds is not None and server.fd is not None:
        issues.add(("server", "uds"), "listen on server.uds or on server.fd, not on both")


# --- building and checking values -------------------------------------------------------------------------------------


class _Wrong:
    """Stands for a value that could not be built; an issue says why."""


_WRONG = _Wrong()


class _Builder:
    """Turns plain mappings into the structs, adding an issue for everything that does not fit."""

    def __init__(self, issues: _Issues, *, base: str | None) -> None:
        self._issues = issues
        self._base = base

    def value(self, tp: Any, value: Any, path: Path, *, secret: bool = False) -> Any:
        """``value`` as a ``tp``, or ``_WRONG``."""
        if value is _FAILED:
            return _WRONG
        inner, optional = _without_none(tp)
        if optional and (value is None or (value == "" and isinstance(value, _Expanded))):
            return None
        if variants := _variants(inner):
            return self._struct(variants, value, path)
        if get_origin(inner) is dict:
            return self._dict(inner, value, path, secret)
        if get_origin(inner) is list:
            return self._list(get_args(inner)[0], value, path)
        if inner is Any:
            return _plain(value)
        return self._leaf(inner, tp, value, path, secret)

    def field(self, owner: Any, info: msgspec.structs.FieldInfo, value: Any, path: Path) -> Any:
        """``value`` as the field ``info`` of the struct ``owner``, with the field's own rules."""
        name = (owner, info.name)
        built = self.value(info.type, value, path, secret=name in _SECRET)
        if built is _WRONG or built is None:
            return built
        if name in _STRIPPED:
            built = built.rstrip("/")
        check = _CHECKS.get(name, lambda item: None)
        single = not isinstance(built, list)
        good = True
        for at, item in enumerate([built] if single else built):
            message = check(item)
            if message is not None:
                good = False
                self._issues.add(path if single else (*path, f"[{at}]"), message)
        if not good:
            return _WRONG
        return self._located(built, path) if name in _PATHS else built

    def _struct(self, variants: list[Any], value: Any, path: Path) -> Any:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self._issues.add(path, f"expected a mapping, got {_shown(value)}")
            return _WRONG
        cls, rest = self._variant(variants, value, path)
        if cls is None:
            return _WRONG
        fields = {info.name: info for info in msgspec.structs.fields(cls)}
        good = True
        built: dict[str, Any] = {}
        for key in rest:
            if key not in fields:
                good = False
                self._issues.add((*path, key), _unknown_key(key, cls, list(fields), variants))
        for name, info in fields.items():
            if rest.get(name) is None and not info.required and not _without_none(info.type)[1]:
                continue  # `key:` with nothing behind it is its default
            if name in rest:
                built[name] = self.field(cls, info, rest[name], (*path, name))
                good = good and built[name] is not _WRONG
            elif info.required:
                good = False
                self._issues.add((*path, name), f"is missing; it takes {_words(info.type)}")
        return cls(**built) if good else _WRONG

    def _variant(self, variants: list[Any], value: dict[str, Any], path: Path) -> tuple[Any, dict[str, Any]]:
        """The struct meant by the mapping's ``type``, and the mapping without it; (None, …) after adding an issue."""
        if len(variants) == 1:
            return variants[0], value
        by_tag = {str(cls.__struct_config__.tag): cls for cls in variants}
        kind = value.get("type")
        choices = ", ".join(by_tag)
        if kind is None:
            self._issues.add((*path, "type"), f"is missing; it is one of {choices}")
        elif kind is not _FAILED and kind not in by_tag:
            near = _nearest(str(kind), list(by_tag))
            self._issues.add((*path, "type"), f"expected one of {choices}, got {_shown(kind)}{near}")
        cls = by_tag.get(kind) if isinstance(kind, str) else None
        return cls, {key: item for key, item in value.items() if key != "type"}

    def _dict(self, tp: Any, value: Any, path: Path, secret: bool) -> Any:
        if not isinstance(value, dict):
            what = "ids to agents, such as `agents: {assistant: {}}`" if path == ("agents",) else "names to values"
            self._issues.add(path, f"expected a mapping of {what}, got {_shown(value, secret)}")
            return _WRONG
        item = get_args(tp)[1]
        built = {key: self.value(item, each, (*path, key), secret=secret) for key, each in value.items()}
        return _WRONG if any(each is _WRONG for each in built.values()) else built

    def _list(self, item: Any, value: Any, path: Path) -> Any:
        if isinstance(value, _Expanded):
            value = [_Expanded(part.strip()) for part in value.split(",") if part.strip()]
        elif isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            self._issues.add(path, f"expected {_words(list[item])}, got {_shown(value)}")
            return _WRONG
        built = [self.value(item, each, (*path, f"[{at}]")) for at, each in enumerate(value)]
        return _WRONG if any(each is _WRONG for each in built) else built

    def _leaf(self, inner: Any, tp: Any, value: Any, path: Path, secret: bool) -> Any:
        try:
            built = msgspec.convert(_plain(value), inner, strict=not isinstance(value, _Expanded))
            if not isinstance(built, float) or math.isfinite(built):
                return built
        except msgspec.ValidationError:
            pass
        message = f"expected {_words(tp)}, got {_shown(value, secret)}"
        if isinstance(value, str) and get_origin(inner) is Literal:
            message += _nearest(value, [str(choice) for choice in get_args(inner)])
        elif inner is str and isinstance(value, int | float):
            message += "; put it in quotes"
        self._issues.add(path, message)
        return _WRONG

    def _located(self, value: str, path: Path) -> str:
        """A relative path from the config file, joined to the file's folder."""
        if self._base is None or path in self._issues.origins or value == "memory" or "://" in value:
            return value
        file, colon, name = value.rpartition(":") if path[0] == "agents" else (value, "", "")
        if path[0] == "agents" and not file.endswith(".py"):
            return value  # a module's name
        return os.path.normpath(os.path.join(self._base, file)) + colon + name


def _unknown_key(key: str, cls: Any, names: list[str], variants: list[Any]) -> str:
    tagged = ["type"] if len(variants) > 1 else []
    for other in variants:
        if other is not cls and key in other.__struct_fields__:
            return f"belongs to `type: {other.__struct_config__.tag}`, and this is `type: {cls.__struct_config__.tag}`"
    return f"unknown key{_nearest(key, names)} (allowed: {', '.join(tagged + names)})"


def _plain(value: Any) -> Any:
    """``value`` without our own kinds of text."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _shown(value: Any, secret: bool = False) -> str:
    """``value`` for a message, never a secret."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool() if not secret:
            return str(value).lower()
        case str() if secret:
            return "other text"
        case _ if secret:
            return "something else"
        case str():
            return repr(str(value) if len(value) <= 60 else value[:57] + "...")
        case _:
            return str(value)[:60]


def _without_none(tp: Any) -> tuple[Any, bool]:
    """``X | None`` as X and True; any other type as itself and False."""
    if get_origin(tp) in (Union, UnionType) and NoneType in get_args(tp):
        rest = [arg for arg in get_args(tp) if arg is not NoneType]
        return (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007 - the members are a tuple
    return tp, False


def _variants(tp: Any) -> list[Any]:
    """The structs a value of this type may be; none for anything but structs and unions of them."""
    members = get_args(tp) if get_origin(tp) in (Union, UnionType) else (tp,)
    return list(members) if all(isinstance(cls, type) and issubclass(cls, Struct) for cls in members) else []


def _words(tp: Any) -> str:
    """A type, in words."""
    inner, optional = _without_none(tp)
    if optional:
        return f"{_words(inner)}, or nothing"
    if get_origin(inner) is Literal:
        return f"one of {', '.join(map(str, get_args(inner)))}"
    if get_origin(inner) is list:
        variants = _variants(get_args(inner)[0])
        return f"a list of {'mappings' if variants else 'texts'}"
    if get_origin(inner) is dict or _variants(inner):
        return "a mapping"
    meta = next((each for each in get_args(inner)[1:] if isinstance(each, Meta)), Meta())
    plain = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    words = {str: "text", bool: "true or false", int: "an integer", float: "a number"}[plain]
    if meta.gt is not None:
        return f"{words} above {meta.gt}"
    if meta.ge is not None and meta.le is not None:
        return f"{words} from {meta.ge} to {meta.le}"
    return f"{words} of at least {meta.ge}" if meta.ge is not None else words


def _default_text(info: msgspec.structs.FieldInfo) -> str:
    if info.required:
        return ""
    default = info.default if info.default is not NODEFAULT else info.default_factory()
    if isinstance(default, Struct):
        return "{}"
    return msgspec.json.encode(default).decode()


# --- rules of single values -------------------------------------------------------------------------------------------


_HOSTNAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?\Z")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[^/\s:@?#\[\]]+)(:[0-9]{1,5})?\Z")
_VISIBLE = re.compile(r"[\x21-\x7e]+\Z")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?\Z")
_FUNCTION = re.compile(r"(?P<where>.+):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)\Z")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_host(host: str) -> str | None:
    if host.startswith("[") and host.endswith("]") and _is_address(host[1:-1]):
        return f"write the address without brackets: {host[1:-1]}"
    if _is_address(host) or (_HOSTNAME.match(host) and not re.fullmatch(r"[0-9.]+", host)):
        return None
    return f"{host!r} is no address or host name, such as 127.0.0.1, ::1 or 0.0.0.0"


def _check_proxy(text: str) -> str | None:
    if text in ("*", "unix"):
        return None
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return f"{text!r} is no address or network, such as 10.0.0.5, 10.0.0.0/8, unix or *"
    return None


def _check_origin(text: str) -> str | None:
    if text in ("*", "null") or _ORIGIN.match(text.lower()):
        return None
    if _ORIGIN.match(text.lower().rstrip("/")):
        return f"an origin has no path: write {text.rstrip('/')}"
    return f"{text!r} is no origin, such as https://app.example.com (scheme, host, port; no path), null or *"


def _check_allowed_host(text: str) -> str | None:
    name = text.removeprefix("*.")
    if text == "*" or _is_address(text.strip("[]")) or _HOSTNAME.match(name):
        return None
    return f"{text!r} is no host name, such as hector.lan or *.example.com (without port)"


def _check_url(text: str) -> str | None:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        good = good and not parts.query and not parts.fragment and _VISIBLE.match(text) is not None
    except ValueError:
        good = False
    return None if good else f"{text!r} is no http(s) address, such as https://hector.example.com"


def _check_root_path(text: str) -> str | None:
    if text == "" or (text.startswith("/") and _VISIBLE.match(text) and not set("?#") & set(text)):
        return None
    return f"{text!r} is no path prefix, such as /hector"


def _check_path(text: str) -> str | None:
    if text.startswith("~"):
        return "~ is not expanded here; write ${HOME}/..."
    return None if text and "\0" not in text else "is empty"


def _check_function(text: str) -> str | None:
    match = _FUNCTION.match(text)
    if match is not None and (match["where"].endswith(".py") or _MODULE.match(match["where"])):
        return _check_path(text)
    return f"{text!r} is no function, such as package.module:name or path/to/file.py:name"


def _check_token(text: str) -> str | None:
    if len(text) < MIN_TOKEN:
        return f"is too short: {len(text)} characters, at least {MIN_TOKEN}; make one with `openssl rand -hex 32`"
    return None if _VISIBLE.match(text) else "holds spaces or characters that cannot stand in a header"


def _check_key(text: str) -> str | None:
    return None if _VISIBLE.match(text) else "holds spaces or characters that cannot stand in a header"


def _check_owner(text: str) -> str | None:
    if 1 <= len(text) <= 128 and text.isprintable() and text == text.strip():
        return None
    return f"{text!r} is no name of 1 to 128 visible characters"


def _check_headers(headers: dict[str, str]) -> str | None:
    for name, value in headers.items():
        if not _HEADER_NAME.match(name):
            return f"{name!r} is no header name"
        if not _HEADER_VALUE.match(value):
            return f"the value of {name} is empty or holds characters that cannot stand in a header"
    return None


def _check_text(text: str) -> str | None:
    return None if text.strip() else "is empty"


_CHECKS: dict[tuple[type, str], Callable[[Any], str | None]] = {
    (Server, "host"): _check_host,
    (Server, "uds"): _check_path,
    (Server, "root_path"): _check_root_path,
    (Server, "base_url"): _check_url,
    (Server, "trusted_proxies"): _check_proxy,
    (Server, "allow_origins"): _check_origin,
    (Server, "allowed_hosts"): _check_allowed_host,
    (Tls, "cert"): _check_path,
    (Tls, "key"): _check_path,
    (StoreSettings, "url"): _check_path,
    (Token, "name"): _check_owner,
    (Token, "token"): _check_token,
    (OpenAiLlm, "model"): _check_text,
    (OpenAiLlm, "base_url"): _check_url,
    (OpenAiLlm, "api_key"): _check_key,
    (OpenAiLlm, "headers"): _check_headers,
    (PythonAgent, "function"): _check_function,
}
_SECRET = {(Token, "token"), (OpenAiLlm, "api_key"), (OpenAiLlm, "headers")}
_STRIPPED = {(Server, "root_path"), (Server, "base_url"), (OpenAiLlm, "base_url")}
_PATHS = {(Server, "uds"), (Tls, "cert"), (Tls, "key"), (StoreSettings, "url"), (PythonAgent, "function")}


# --- names of variables and keys --------------------------------------------------------------------------------------


def _plain_fields() -> Iterator[tuple[Path, Any, msgspec.structs.FieldInfo]]:
    """Every key that one variable can hold: no mappings, no lists of them."""

    def walk(cls: Any, path: Path) -> Iterator[tuple[Path, Any, msgspec.structs.FieldInfo]]:
        for info in msgspec.structs.fields(cls):
            inner, _ = _without_none(info.type)
            here = (*path, info.name)
            if variants := _variants(inner):
                yield from walk(variants[0], here)
            elif get_origin(inner) is not dict and not (get_origin(inner) is list and _variants(get_args(inner)[0])):
                yield here, cls, info

    return walk(Settings, ())


def _variable(path: Path) -> str:
    return "HECTOR_" + "_".join(path).upper()


def _unknown_variable(name: str, known: Mapping[str, Any]) -> str:
    for prefix in ("HECTOR_AUTH_TOKENS", "HECTOR_AGENTS", "HECTOR_LLMS"):
        if name == prefix or name.startswith(prefix + "_"):
            key = prefix.removeprefix("HECTOR_").lower().replace("_", ".", 1)
            return f"{name}: {key} can be declared in a config file only; the variable is ignored"
    import difflib

    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"{name}: no such setting{f'; did you mean {near[0]}?' if near else ''}; the variable is ignored"


def _docstrings() -> dict[tuple[str, str], str]:
    """The docstring below each field of each struct in this module."""
    import ast
    import inspect
    import sys

    docs: dict[tuple[str, str], str] = {}
    for cls in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for line, below in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[cls.name, line.target.id] = " ".join(str(below.value.value).split())
    return docs
