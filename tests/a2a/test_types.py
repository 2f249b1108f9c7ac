"""The types of A2A as ProtoJSON: what is read, refused, ignored, left out; that they are the protocol's buffers."""

from __future__ import annotations

import types
from typing import Any, get_args, get_origin

import msgspec
import pytest

from hector_trio.a2a import types as a2a


def read(text: str, type_: Any) -> Any:
    return msgspec.json.decode(text, type=type_)


def test_a_part_is_exactly_one_thing() -> None:
    assert read('{"text":""}', a2a.Part) == a2a.Part(text="")
    assert read('{"raw":"aGk="}', a2a.Part).raw == b"hi"
    assert read('{"data":null}', a2a.Part).data is None
    assert read('{"text":"x","raw":null,"data":null}', a2a.Part) == a2a.Part(text="x")
    for wrong in ("{}", '{"text":"x","url":"y"}', '{"data":1,"raw":"aGk="}', '{"text":null}'):
        with pytest.raises(msgspec.ValidationError):
            read(wrong, a2a.Part)


def test_what_is_not_set_is_not_written() -> None:
    assert a2a.encode(a2a.Part(text="x", media_type="a/b")) == b'{"text":"x","mediaType":"a/b"}'
    assert a2a.encode(a2a.Part(data=None)) == b'{"data":null}'
    assert a2a.encode(a2a.AgentCapabilities(streaming=False)) == b'{"streaming":false}'
    assert a2a.encode(a2a.ListTasksResponse([], "", 50, 0)) == (
        b'{"tasks":[],"nextPageToken":"","pageSize":50,"totalSize":0}'
    )
    assert a2a.encode(a2a.SecurityRequirement({"b": a2a.StringList(["x"])})) == b'{"schemes":{"b":{"list":["x"]}}}'


def test_unknown_fields_are_ignored_and_unknown_values_are_not() -> None:
    assert read('{"id":"x","later":1}', a2a.GetTaskRequest) == a2a.GetTaskRequest("x")
    with pytest.raises(msgspec.ValidationError):
        read('{"status":"TASK_STATE_HAPPY"}', a2a.ListTasksRequest)


def _messages() -> dict[str, Any]:
    from a2a.types import a2a_pb2

    return {message.name: message for message in a2a_pb2.DESCRIPTOR.message_types_by_name.values()}


_NAMES = {"ApiKeySecurityScheme": "APIKeySecurityScheme", "HttpAuthSecurityScheme": "HTTPAuthSecurityScheme"}
OURS = {
    name: each
    for name, each in vars(a2a).items()
    if isinstance(each, type) and issubclass(each, msgspec.Struct) and name not in ("Record", "Struct")
}


@pytest.mark.parametrize("name", OURS)
def test_every_type_has_the_fields_of_the_protocols_buffers(name: str) -> None:
    """The official package's descriptors are the specification's a2a.proto."""
    ours = {each.encode_name for each in msgspec.structs.fields(OURS[name])}
    theirs = {field.json_name for field in _messages()[_NAMES.get(name, name)].fields}
    extra = {"metadata"} if name == "SubscribeToTaskRequest" else set()  # the resume extension's
    assert ours - extra == theirs


def test_no_message_of_the_protocol_is_missing() -> None:
    assert {_NAMES.get(name, name) for name in OURS} == set(_messages())


@pytest.mark.parametrize("name", OURS)
def test_every_field_is_of_the_right_kind(name: str) -> None:
    fields = {field.json_name: field for field in _messages()[_NAMES.get(name, name)].fields}
    for each in msgspec.structs.fields(OURS[name]):
        if each.encode_name not in fields:
            continue
        field = fields[each.encode_name]
        kinds = [kind for kind in get_args(each.type) if isinstance(each.type, types.UnionType)] or [each.type]
        is_list = any(get_origin(_plain(kind)) is list for kind in kinds)
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        assert is_list == (field.is_repeated and not is_map), each.name


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
