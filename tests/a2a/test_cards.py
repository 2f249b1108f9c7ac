"""Agent cards: what the specification wants on them, and that both dialects can read them."""

from __future__ import annotations

from typing import Any

import msgspec

from hector_trio.a2a import cards
from hector_trio.a2a import types as a2a
from hector_trio.agents import AgentInfo
from hector_trio.config import A2a, A2aExtension, A2aSkill

BASE = "https://example.com/root"


def card(secured: bool = False, extended: bool = False, **options: Any) -> a2a.AgentCard:
    info = AgentInfo("a", "Agent A", a2a=A2a(**options))
    return cards.card(info, BASE, secured=secured, extended=extended)


def test_a_card_has_all_that_is_required() -> None:
    made = card()
    assert made.description  # REQUIRED, and an empty string is none in ProtoJSON
    for each in (made.skills, made.default_input_modes, made.default_output_modes, made.supported_interfaces):
        assert each
    assert all(each.tags for each in made.skills)
    assert made.supported_interfaces[0] == a2a.AgentInterface("https://example.com/root/a2a/a", "JSONRPC", "1.0")


def test_only_what_is_spoken_is_declared() -> None:
    assert {each.protocol_version for each in card(legacy=False).supported_interfaces} == {"1.0"}
    quiet = card(streaming=False).capabilities
    assert (quiet.streaming, quiet.extensions) == (False, None)
    assert card().capabilities.extensions is not None
    assert card(secured=True).capabilities.extended_agent_card is True
    assert card().capabilities.extended_agent_card is False


def test_the_extended_card_has_more_skills() -> None:
    more = A2aSkill("m", "More", "Does more", ["x"])
    assert [each.id for each in card(extended_skills=[more]).skills] == ["a"]
    assert [each.id for each in card(extended_skills=[more], extended=True).skills] == ["a", "m"]


def test_extensions_are_declared_as_configured() -> None:
    [own, ours] = cards.extensions(A2a(extensions=[A2aExtension("urn:x", required=True, params={"p": 1})]), BASE)
    assert own == a2a.AgentExtension("urn:x", None, True, {"p": 1})
    assert ours.uri == cards.RESUME
    assert not ours.required


def test_a_client_of_0_3_finds_its_way_on_the_card() -> None:
    document = cards.both_dialects(card(secured=True))
    assert document["protocolVersion"] == "0.3.0"
    assert document["url"] == "https://example.com/root/a2a/a"
    assert document["preferredTransport"] == "JSONRPC"
    assert {each["transport"] for each in document["additionalInterfaces"]} == {"JSONRPC", "HTTP+JSON"}
    assert document["supportsAuthenticatedExtendedCard"] is True
    assert document["securitySchemes"]["bearer"]["type"] == "http"
    assert document["security"] == [{"bearer": []}]
    # and one of 1.0 reads it as before
    assert msgspec.convert(document, a2a.AgentCard).supported_interfaces == card().supported_interfaces
    assert "url" not in cards.both_dialects(card(legacy=False))


def test_a_card_of_0_3_is_read_by_its_own_model() -> None:
    from a2a.compat.v0_3.types import AgentCard

    read = AgentCard.model_validate(cards.both_dialects(card(secured=True)))
    assert read.url == "https://example.com/root/a2a/a"


def test_media_types_are_matched_without_parameters_and_with_stars() -> None:
    modes = ["text/plain", "image/*"]
    for kind in ("text/plain", "TEXT/plain; charset=utf-8", "image/png"):
        assert cards.accepts(modes, kind)
    for kind in ("text/html", "application/json", "imagepng"):
        assert not cards.accepts(modes, kind)
    assert cards.accepts(["*/*"], "any/thing")


def test_a_place_to_go_on_from_stands_in_the_metadata() -> None:
    assert cards.resume_after({cards.RESUME: {"after": "4.1"}}) == "4.1"
    assert cards.resume_after({cards.RESUME: {"after": 4}}) == "4"
    nothing: list[Any] = [None, {}, {cards.RESUME: 4}, {cards.RESUME: {}}, {cards.RESUME: {"after": True}}]
    for none in nothing:
        assert cards.resume_after(none) is None
