"""Agent cards (specification 8): what an agent is, where its bindings are, and the same for clients of 0.3."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from hector_trio.a2a import types as a2a
from hector_trio.config import A2a, A2aSkill

RESUME: Final = "urn:hector-trio:a2a:resume:v1"
"""The extension that resumes a stream by number."""

RESUME_DOCUMENT: Final = "/extensions/a2a-resume"
"""Where it is described."""

CARD: Final = "/.well-known/agent-card.json"
MAX_AGE: Final = 300
"""Seconds that a card may be cached."""

BEARER: Final = "bearer"


class About(Protocol):
    """What is known of an agent."""

    @property
    def agent_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def input_types(self) -> list[str]: ...
    @property
    def output_types(self) -> list[str]: ...
    @property
    def a2a(self) -> A2a: ...


def input_modes(about: A2a, types: Sequence[str]) -> list[str]:
    return list(about.input_modes or types)


def accepts(modes: Sequence[str], kind: str) -> bool:
    """Whether a media type is among ``modes``, of which one may be ``image/*`` or ``*/*``. Parameters do not count."""
    name = kind.partition(";")[0].strip().lower()
    family = name.partition("/")[0]
    return any(mode.partition(";")[0].strip().lower() in (name, f"{family}/*", "*/*") for mode in modes)


def resumes(about: A2a) -> bool:
    return about.streaming and about.resume


def resume_after(metadata: dict[str, Any] | None) -> str | None:
    """Where a request's metadata says that a stream is to go on."""
    found = (metadata or {}).get(RESUME)
    after = found.get("after") if isinstance(found, dict) else None
    return None if after is None or isinstance(after, bool) else str(after)


def extensions(about: A2a, base: str) -> list[a2a.AgentExtension]:
    """What the card declares: the agent's own, and ours."""
    declared = [
        a2a.AgentExtension(each.uri, each.description or None, each.required, each.params or None)
        for each in about.extensions
    ]
    if resumes(about):
        declared.append(
            a2a.AgentExtension(
                RESUME,
                "Streams go on behind the last event that a client has, also after the end of the task",
                params={"document": base + RESUME_DOCUMENT},
            )
        )
    return declared


def card(
    about: About, base: str, *, secured: bool, push: bool = False, extended: bool = False, grpc: bool = False
) -> a2a.AgentCard:
    """The card of an agent below ``base``. ``secured``: a bearer token is needed; ``push``: webhooks are told;
    ``grpc``: HTTP/2 is spoken there."""
    options = about.a2a
    description = about.description or about.name
    skills = [_skill(each) for each in options.skills]
    if not skills:
        skills = [a2a.AgentSkill(about.agent_id, about.name, description, tags=["agent"])]
    if extended:
        skills += [_skill(each) for each in options.extended_skills]
    provider = None
    if options.provider and options.provider_url:
        provider = a2a.AgentProvider(options.provider, options.provider_url)
    return a2a.AgentCard(
        name=about.name,
        description=description,
        supported_interfaces=_interfaces(about, base, grpc=grpc),
        version=about.version,
        capabilities=a2a.AgentCapabilities(
            streaming=options.streaming,
            push_notifications=push,
            extensions=extensions(options, base) or None,
            extended_agent_card=secured,
        ),
        default_input_modes=input_modes(options, about.input_types),
        default_output_modes=list(options.output_modes or about.output_types),
        skills=skills,
        provider=provider,
        documentation_url=options.documentation_url,
        icon_url=options.icon_url,
        security_schemes=_schemes() if secured else None,
        security_requirements=[a2a.SecurityRequirement({BEARER: a2a.StringList([])})] if secured else None,
    )


def _interfaces(about: About, base: str, *, grpc: bool) -> list[a2a.AgentInterface]:
    here = f"{base}/a2a/{about.agent_id}"
    found = [
        a2a.AgentInterface(here, binding, version)
        for version in ((a2a.VERSION, "0.3") if about.a2a.legacy else (a2a.VERSION,))
        for binding in ("JSONRPC", "HTTP+JSON")
    ]
    if grpc:  # all agents are at one address there
        found.insert(2, a2a.AgentInterface(authority(base), "GRPC", a2a.VERSION, tenant=about.agent_id))
    return found


def authority(base: str) -> str:
    """Host and port of an address, as clients of gRPC want it."""
    parts = urlsplit(base)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _skill(skill: A2aSkill) -> a2a.AgentSkill:
    return a2a.AgentSkill(
        skill.id,
        skill.name,
        skill.description,
        skill.tags or ["agent"],
        examples=skill.examples or None,
        input_modes=skill.input_modes or None,
        output_modes=skill.output_modes or None,
    )


def _schemes() -> dict[str, a2a.SecurityScheme]:
    scheme = a2a.HttpAuthSecurityScheme("Bearer", "A token of this server")
    return {BEARER: a2a.SecurityScheme(http_auth_security_scheme=scheme)}


def both_dialects(card: a2a.AgentCard) -> dict[str, Any]:
    """The card with the members by which a client of 0.3 finds its way: one that knows either reads it."""
    document: dict[str, Any] = msgspec.to_builtins(card)
    legacy = [each for each in card.supported_interfaces if each.protocol_version == "0.3"]
    if not legacy:
        return document
    document |= {
        "protocolVersion": "0.3.0",
        "url": legacy[0].url,
        "preferredTransport": legacy[0].protocol_binding,
        "additionalInterfaces": [{"url": each.url, "transport": each.protocol_binding} for each in legacy],
        "supportsAuthenticatedExtendedCard": bool(card.capabilities.extended_agent_card),
    }
    for name, scheme in (document.get("securitySchemes") or {}).items():
        http = scheme.get("httpAuthSecurityScheme")
        if http is not None:
            document["securitySchemes"][name] = scheme | {"type": "http", "scheme": http["scheme"].lower()}
    if card.security_requirements:
        document["security"] = [
            {name: (scopes.items or []) for name, scopes in (each.schemes or {}).items()}
            for each in card.security_requirements
        ]
    return document


def entity_tag(body: bytes) -> str:
    """A strong validator of a card (8.6.1)."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'
