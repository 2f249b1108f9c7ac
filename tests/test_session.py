"""The pure rules on sessions."""

from __future__ import annotations

import msgspec
import pytest

from hector_trio.errors import PayloadTooLarge
from hector_trio.session import SessionRow, check_size, etag, merge_patch, wire_session

ROW = SessionRow(
    owner="o", session_id="s", agent_id="a", created_at=0, last_activity_at=1000, state={"n": 1}, metadata={}
)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_does_what_the_appendix_of_rfc_7396_says(target: object, patch: object, result: object) -> None:
    before = msgspec.json.encode((target, patch))
    assert merge_patch(target, patch) == result
    assert msgspec.json.encode((target, patch)) == before


def test_state_and_metadata_have_a_limit_together() -> None:
    check_size({"a": "x" * 50}, {}, 100)
    with pytest.raises(PayloadTooLarge):
        check_size({"a": "x" * 50}, {"b": "x" * 50}, 100)


def test_activity_does_not_change_the_etag_but_state_does() -> None:
    assert etag(msgspec.structs.replace(ROW, last_activity_at=99)) == etag(ROW)
    assert etag(msgspec.structs.replace(ROW, state={"n": 2})) != etag(ROW)


def test_a_session_expires_after_its_last_activity() -> None:
    row = msgspec.structs.replace(ROW, ttl_seconds=60)
    assert row.expires_at == 61_000
    assert wire_session(row).expires_at == "1970-01-01T00:01:01.000Z"
    assert b"expiresAt" not in msgspec.json.encode(wire_session(ROW))
