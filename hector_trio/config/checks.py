"""What only several keys together can get wrong, or the keys and the machine: references, files, open doors."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import Any

from hector_trio.config.issues import Issues, Path, nearest
from hector_trio.config.settings import PythonAgent, Settings
from hector_trio.errors import ConfigError
from hector_trio.models import is_id


def check_references(tree: dict[str, Any], issues: Issues, need_agents: bool) -> None:
    """Looks whether what is named by one key is declared under another; also where the rest of the tree is wrong."""
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
        if isinstance(llm, str) and isinstance(llms, dict) and llm not in llms:
            names = list(llms)
            issues.add(
                ("agents", agent_id, "llm"),
                f"no model {llm!r} is declared under llms{nearest(llm, names)} (there are: {', '.join(names)})",
            )
    default = tree.get("default_agent")
    if isinstance(default, str) and default not in agents and need_agents:
        names = list(agents)
        issues.add(
            ("default_agent",),
            f"there is no agent {default!r}{nearest(default, names)} (there are: {', '.join(names)})",
        )
    for name in llms if isinstance(llms, dict) else ():
        if not is_id(name):
            issues.add(("llms", name), "a model's name is 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")


def check_together(settings: Settings, issues: Issues) -> None:
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
    jwt = settings.auth.jwt
    if jwt is not None:
        if (jwt.jwks_url is None) == (jwt.jwks_file is None):
            issues.add(("auth", "jwt"), "say where the keys are: jwks_url or jwks_file, one of them")
        for key in ("audience", "algorithms"):
            if not getattr(jwt, key):
                issues.add(("auth", "jwt", key), "the list is empty, so no token could be accepted")
    tasks = settings.tasks
    if tasks.timeout > tasks.max_timeout:
        issues.add(("tasks", "timeout"), f"{tasks.timeout:g} is more than tasks.max_timeout, {tasks.max_timeout:g}")
    limits = settings.limits
    for smaller, larger, why in (
        ("chunk_bytes", "log_bytes", "no such chunk would fit into a log"),
        ("body_bytes", "unread_bytes", "a message of that size would close its WebSocket"),
    ):
        size, room = getattr(limits, smaller), getattr(limits, larger)
        if size > room:
            issues.add(("limits", smaller), f"{size} is more than limits.{larger}, {room}: {why}")
    uploads = settings.uploads
    for smaller, larger in (("max_bytes", "owner_bytes"), ("owner_bytes", "total_bytes")):
        size, room = getattr(uploads, smaller), getattr(uploads, larger)
        if size > room:
            issues.add(("uploads", smaller), f"{size} is more than uploads.{larger}, {room}")
    server = settings.server
    if server.card_key is not None and server.base_url is None:
        issues.add(("server", "card_key"), "a signed card names this server's public address: set server.base_url")
    if not server.host and server.uds is None and server.fd is None:
        issues.add(("server", "host"), "the list is empty; name an address, such as 127.0.0.1")
    if server.uds is not None and server.fd is not None:
        issues.add(("server", "uds"), "listen on server.uds or on server.fd, not on both")


def check_files(settings: Settings, *, source: str) -> None:
    """Looks whether the files that the settings name can be read.

    Raises ConfigError.
    """
    issues = Issues(source)
    tls = settings.server.tls
    named: list[tuple[Path, str]] = []
    if tls is not None:
        named += [(("server", "tls", "cert"), tls.cert), (("server", "tls", "key"), tls.key)]
    if settings.server.card_key is not None:
        named.append((("server", "card_key"), settings.server.card_key))
    if settings.auth.jwt is not None and settings.auth.jwt.jwks_file is not None:
        named.append((("auth", "jwt", "jwks_file"), settings.auth.jwt.jwks_file))
    for agent_id, agent in settings.agents.items():
        if isinstance(agent, PythonAgent):
            file = agent.function.rpartition(":")[0]
            if file.endswith(".py"):
                named.append((("agents", agent_id, "function"), file))
    store = settings.store.url
    if store != "memory" and os.path.isdir(store):
        issues.add(
            ("store", "url"), f"{store} is a folder; name a file in it, such as {os.path.join(store, 'hector.db')}"
        )
    for path, file in named:
        if not os.path.isfile(file):
            issues.add(path, f"there is no file {file}")
        elif not os.access(file, os.R_OK):
            issues.add(path, f"{file} cannot be read by this user")
    issues.raise_any()


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
    if settings.auth.required or settings.server.insecure:
        return
    if bound is None:
        bound = [] if settings.server.uds is not None or settings.server.fd is not None else settings.server.host
    open_to = [host for host in bound if not is_loopback(host)]
    if open_to:
        raise ConfigError(
            f"listening on {', '.join(open_to)} would let everybody who can reach this machine run agents: declare"
            " auth.tokens or auth.jwt in the config, or say --insecure if something else guards the port"
        )
