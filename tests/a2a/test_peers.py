"""Cards of others: which interface is taken, of which version, and what a card lacks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.a2a.cards import RESUME
from hector_trio.a2a.dialects import Garbage
from hector_trio.a2a.peers import PeerCard, binding_for, read_card


def read(**members: Any) -> PeerCard:
    return read_card(json.dumps({"name": "x", **members}).encode())


def new(binding: str, version: str = "1.0", url: str = "http://x", **more: Any) -> dict[str, Any]:
    return {"url": url, "protocolBinding": binding, "protocolVersion": version, **more}


@pytest.mark.parametrize(
    ("listed", "taken"),
    [
        ([new("JSONRPC"), new("HTTP+JSON")], ("JSONRPC", "1.0")),
        ([new("HTTP+JSON"), new("JSONRPC")], ("HTTP+JSON", "1.0")),
        ([new("GRPC"), new("urn:mine"), new("JSONRPC")], ("JSONRPC", "1.0")),
        ([new("JSONRPC", "0.3"), new("HTTP+JSON", "1.0")], ("HTTP+JSON", "1.0")),
        ([new("JSONRPC", "0.3.0")], ("JSONRPC", "0.3.0")),
        ([new("JSONRPC", "1.2.7"), new("JSONRPC", "1.0")], ("JSONRPC", "1.2.7")),
        ([new("JSONRPC", "2.0"), new("JSONRPC", url="ftp://x"), new("HTTP+JSON")], ("HTTP+JSON", "1.0")),
    ],
)
def test_the_first_interface_that_can_be_spoken_to_is_taken_and_1_0_before_0_3(
    listed: list[Any], taken: tuple[str, str]
) -> None:
    interface = read(supportedInterfaces=listed).interface
    assert (interface.binding, interface.version) == taken


def test_a_card_of_0_3_names_its_interfaces_otherwise() -> None:
    card = read(
        url="http://x/rpc",
        preferredTransport="GRPC",
        protocolVersion="0.3.0",
        additionalInterfaces=[
            {"url": "http://x/rest", "transport": "HTTP+JSON"},
            {"url": "http://x/rpc", "transport": "JSONRPC"},
        ],
    )
    assert [(each.url, each.binding) for each in card.interfaces] == [
        ("http://x/rest", "HTTP+JSON"),
        ("http://x/rpc", "JSONRPC"),
    ]
    assert read(url="http://x/rpc").interface == ("http://x/rpc", "JSONRPC", "0.3.0", None)
    assert binding_for(card.interface).dialect.version == "0.3"


def test_what_a_card_says_besides() -> None:
    card = read(
        description="d",
        version="7",
        supportedInterfaces=[new("JSONRPC", tenant="t")],
        capabilities={"streaming": True, "extensions": [{"uri": RESUME}, {"uri": "urn:x", "required": True}]},
    )
    assert (card.streaming, card.resumes, card.required, card.interface.tenant) == (True, True, ("urn:x",), "t")
    assert (card.name, card.description, card.version) == ("x", "d", "7")
    bare = read(supportedInterfaces=[new("JSONRPC")])
    assert (bare.streaming, bare.resumes, bare.required) == (False, False, ())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"name":1}', b"\xff", b"[" * 100_000])
def test_what_is_no_card_is_refused(data: bytes) -> None:
    with pytest.raises(Garbage):
        read_card(data)


_json: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["url", "capabilities", "supportedInterfaces", "additionalInterfaces"]), _json))
def test_no_card_breaks_anything(members: dict[str, Any]) -> None:
    try:
        card = read(**members)
    except Garbage:
        return
    assert card.interfaces
