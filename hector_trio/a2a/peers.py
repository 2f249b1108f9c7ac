"""What a client takes from another agent's card, of 1.0 or 0.3: where to talk to it, and in which dialect. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from hector_trio.a2a.bindings import Binding, binding_of
from hector_trio.a2a.cards import RESUME
from hector_trio.a2a.dialects import Current, Dialect, Garbage, OldHttp, OldJsonRpc, listed
from hector_trio.a2a.types import AgentInterface


class Interface(NamedTuple):
    url: str
    binding: str
    version: str
    tenant: str | None


class PeerCard(NamedTuple):
    """An agent as its card describes it, as far as a client needs it."""

    name: str
    description: str
    version: str
    streaming: bool
    resumes: bool
    """Whether it declares our extension for resuming."""
    required: tuple[str, ...]
    """The extensions without which it does not talk to anybody."""
    interfaces: tuple[Interface, ...]
    """Those that it can be talked to at, the one to be preferred first."""
    document: dict[str, Any]
    """The whole card."""

    @property
    def interface(self) -> Interface:
        return self.interfaces[0]


def read_card(data: bytes) -> PeerCard:
    """Raises: Garbage for what is no card, or names no interface that could be talked to."""
    try:
        card = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Garbage(f"the card is no JSON: {error}"[:300]) from None
    if not isinstance(card, dict) or not isinstance(card.get("name"), str):
        raise Garbage("the card is none of an A2A agent: it has no name")
    found = _interfaces(card)
    known = [each for each in found if each.binding in ("JSONRPC", "HTTP+JSON") and _dialect_name(each.version)]
    if not known:
        offered = ", ".join(f"{each.binding} {each.version}" for each in found) or "none"
        raise Garbage(
            f"the card names no interface over JSON-RPC or HTTP+JSON, of A2A 1.0 or 0.3 (it names: {offered})"
        )
    known.sort(key=lambda each: _dialect_name(each.version) != "1.0")  # else in the agent's own order (8.3.2)
    capabilities = card.get("capabilities")
    capabilities = capabilities if isinstance(capabilities, dict) else {}
    extensions = [each for each in listed(capabilities.get("extensions")) if isinstance(each, dict)]
    return PeerCard(
        name=card["name"],
        description=str(card.get("description") or ""),
        version=str(card.get("version") or ""),
        streaming=capabilities.get("streaming") is True,
        resumes=any(each.get("uri") == RESUME for each in extensions),
        required=tuple(str(each.get("uri")) for each in extensions if each.get("required") is True),
        interfaces=tuple(known),
        document=card,
    )


def _interfaces(card: dict[str, Any]) -> list[Interface]:
    """Those of 1.0, else those of 0.3 (a preferred one, and others)."""
    interfaces = card.get("supportedInterfaces")
    if isinstance(interfaces, list):
        pairs = [
            (each.get("url"), each.get("protocolBinding"), each.get("protocolVersion"), each.get("tenant"))
            for each in interfaces
            if isinstance(each, dict)
        ]
    else:
        version = card.get("protocolVersion", "0.3.0")
        pairs = [(card.get("url"), card.get("preferredTransport", "JSONRPC"), version, None)]
        pairs += [
            (each.get("url"), each.get("transport"), version, None)
            for each in listed(card.get("additionalInterfaces"))
            if isinstance(each, dict)
        ]
    return [
        Interface(url, str(binding), str(version or "1.0"), tenant if isinstance(tenant, str) and tenant else None)
        for url, binding, version, tenant in pairs
        if isinstance(url, str) and url.startswith(("http://", "https://"))
    ]


def _dialect_name(version: str) -> str | None:
    if version == "1" or version.startswith("1."):
        return "1.0"
    return "0.3" if version == "0.3" or version.startswith("0.3.") else None


def binding_for(interface: Interface) -> Binding:
    dialect: Dialect
    if _dialect_name(interface.version) == "1.0":
        dialect = Current()
    else:
        dialect = OldJsonRpc() if interface.binding == "JSONRPC" else OldHttp()
    return binding_of(
        AgentInterface(interface.url, interface.binding, interface.version, tenant=interface.tenant), dialect
    )
