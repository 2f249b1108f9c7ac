"""What headers ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.errors import InvalidRequest
from hector_trio.transports.negotiation import (
    Preferences,
    entity_tags,
    idempotency_key,
    matches_strongly,
    matches_weakly,
    preferences,
    wants_events,
)


@pytest.mark.parametrize(
    ("accept", "events"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("text/event-stream, */*", True),
        ("*/*, text/event-stream", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=0.5, application/json", False),
        ("application/json;q=0.5, text/event-stream", True),
        ("application/json, text/event-stream", False),
        ("text/event-stream, application/json", True),
        ("text/event-stream;q=nonsense", False),
        ("text/*", False),
    ],
)
def test_events_are_sent_to_who_asks_for_them(accept: str, events: bool) -> None:
    assert wants_events(accept) is events


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [
        ("", Preferences()),
        ("respond-async", Preferences(True)),
        ("Respond-Async, WAIT=10", Preferences(True, 10)),
        ('wait="5"; x=y', Preferences(False, 5)),
        ("wait=1, wait=2", Preferences(False, 1)),
        ("wait=-1", Preferences()),
        ("wait=1e9, wait=" + "9" * 5000, Preferences()),
        ("return=minimal, handling=lenient", Preferences()),
        ("wait=0", Preferences(False, 0)),
    ],
)
def test_known_preferences_are_found_and_others_ignored(prefer: str, expected: Preferences) -> None:
    assert preferences(prefer) == expected


def test_patience_is_endless_unless_it_is_limited() -> None:
    assert Preferences().patience is None
    assert Preferences(respond_async=True).patience == 0
    assert Preferences(respond_async=True, wait=3).patience == 3
    assert Preferences(wait=0).patience == 0


def test_what_was_applied_is_said() -> None:
    assert Preferences(True, 3).applied == "respond-async, wait=3"
    assert Preferences().applied == ""


def test_entity_tags_are_listed_weak_and_strong() -> None:
    assert entity_tags('"a", W/"b" ,"c,d"') == [(False, '"a"'), (True, '"b"'), (False, '"c,d"')]
    assert entity_tags(" * ") == "*"
    assert entity_tags("nonsense") == []


def test_if_match_compares_strongly_and_if_none_match_weakly() -> None:
    assert matches_strongly('"x", "a"', '"a"')
    assert matches_strongly("*", '"a"')
    assert not matches_strongly('W/"a"', '"a"')
    assert not matches_strongly("a", '"a"')
    assert matches_weakly('W/"a"', '"a"')
    assert not matches_weakly("", '"a"')


@given(st.text(alphabet='"W/a, *\\x00é'), st.text(alphabet='awit=;,0 "-'))
def test_any_header_can_be_read(tags: str, prefer: str) -> None:
    entity_tags(tags)
    preferences(prefer)
    wants_events(tags + prefer)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "é"])
def test_a_key_that_is_long_or_unprintable_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest):
        idempotency_key(key)


def test_a_key_is_taken_as_it_is() -> None:
    assert idempotency_key(None) is None
    assert idempotency_key('"8e03978e-40d5"') == '"8e03978e-40d5"'
