"""A2A's messages as Protocol Buffers: the table is the protocol's, the codec does what the official one does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.json_format import MessageToDict, ParseDict  # type: ignore[import-untyped]
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from hector_trio.a2a import errors, protobuf
from hector_trio.a2a.protobuf import ENUMS, MESSAGES, Malformed, decode, encode

SCALARS = {5: "int32", 8: "bool", 9: "string", 12: "bytes"}


def theirs(descriptor: Any) -> dict[str, tuple[int, str, str]]:
    """The fields of an official message as our table has them."""
    found: dict[str, Any] = {}
    for field in descriptor.fields:
        kind, many = SCALARS.get(field.type), "*" if field.is_repeated else ""
        about = field.message_type or field.enum_type
        if field.message_type is not None and about.GetOptions().map_entry:
            many, value = "%", about.fields_by_name["value"]
            kind = SCALARS.get(value.type) or value.message_type.name
        elif about is not None:
            kind = about.full_name if about.full_name.startswith("google.rpc") else about.name
        found[field.json_name] = (field.number, kind, many)
    return found


def messages() -> Iterator[tuple[str, Any]]:
    for name, descriptor in pb.DESCRIPTOR.message_types_by_name.items():
        yield name, descriptor
    for module in (error_details_pb2, status_pb2):
        for name, descriptor in module.DESCRIPTOR.message_types_by_name.items():
            if f"google.rpc.{name}" in MESSAGES:
                yield f"google.rpc.{name}", descriptor
    nested = error_details_pb2.BadRequest.DESCRIPTOR.nested_types_by_name["FieldViolation"]
    yield "google.rpc.BadRequest.FieldViolation", nested


OFFICIAL = dict(messages())


def test_every_message_of_the_protocol_is_in_the_table_and_no_other() -> None:
    assert set(MESSAGES) == set(OFFICIAL)


@pytest.mark.parametrize("name", [*OFFICIAL])
def test_every_field_has_its_number_and_its_kind(name: str) -> None:
    expected = theirs(OFFICIAL[name])
    extra = {"google.rpc.BadRequest.FieldViolation": {"reason", "localizedMessage"}}.get(name, set())
    assert {key: tuple(field[:1] + field[2:]) for key, field in MESSAGES[name].items()} == {
        key: value for key, value in expected.items() if key not in extra
    }


@pytest.mark.parametrize("name", [*ENUMS])
def test_every_enum_has_its_names_by_their_numbers(name: str) -> None:
    values = pb.DESCRIPTOR.enum_types_by_name[name].values
    assert ENUMS[name] == tuple(value.name for value in sorted(values, key=lambda value: value.number))


LEAVES: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=5)
LEAVES |= st.floats(allow_nan=False, allow_infinity=False, width=32)
FREE = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
OBJECT = st.dictionaries(st.text(max_size=3), FREE, max_size=3)
TEXT = st.text(min_size=1, max_size=20)
SIMPLE: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXT,
    "bytes": st.binary(min_size=1, max_size=9),
    "bool": st.just(True),
    "int32": st.integers(-(2**31), 2**31 - 1).filter(bool),
    "Struct": OBJECT,
    "Value": FREE,
    "Timestamp": st.datetimes().map(lambda at: at.isoformat(timespec="microseconds") + "Z"),
    "TaskState": st.sampled_from(ENUMS["TaskState"][1:]),
    "Role": st.sampled_from(ENUMS["Role"][1:]),
}
ONE_OF = {"Part": ("text", "raw", "url", "data"), "OAuthFlows": (), "SecurityScheme": ()}
ONE_OF |= {"StreamResponse": (), "SendMessageResponse": ()}


def values(name: str, depth: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """What a message may hold."""

    def of(field: protobuf.Field) -> st.SearchStrategy[Any]:
        one = SIMPLE[field.kind] if field.kind in SIMPLE else values(field.kind, depth - 1)
        if field.many == "*":
            return st.lists(one, min_size=1, max_size=2)
        return st.dictionaries(TEXT, one, min_size=1, max_size=2) if field.many else one

    fields = {key: of(field) for key, field in MESSAGES[name].items() if depth or field.kind in SIMPLE}
    if name not in ONE_OF:
        return st.fixed_dictionaries({}, optional=fields)
    among = ONE_OF[name] or tuple(fields)
    rest = {key: each for key, each in fields.items() if key not in among}
    return st.sampled_from([key for key in among if key in fields] or [""]).flatmap(
        lambda chosen: st.fixed_dictionaries({chosen: fields[chosen]} if chosen else {}, optional=rest)
    )


NAMES = ["SendMessageRequest", "Task", "StreamResponse", "ListTasksRequest", "AgentCard", "TaskPushNotificationConfig"]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_official_codec_reads_what_is_written_and_what_it_writes_is_read(name: str, data: st.DataObject) -> None:
    value = data.draw(values(name))
    ours = encode(name, value)
    official = getattr(pb, name).FromString(ours)
    assert decode(name, ours) == value
    assert decode(name, official.SerializeToString()) == value
    again = ParseDict(MessageToDict(official), getattr(pb, name)())
    assert again == official


@given(st.binary(max_size=200), st.sampled_from([*MESSAGES]))
@settings(max_examples=500, deadline=None)
def test_no_bytes_do_more_than_be_refused(data: bytes, name: str) -> None:
    with contextlib.suppress(Malformed):
        decode(name, data)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_message_that_was_damaged_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encode("Task", data.draw(values("Task"))))
    for at in data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), max_size=4)):
        if whole:
            whole[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Malformed):
        decode("Task", bytes(whole))


def nested(levels: int) -> bytes:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return encode("Part", {"data": value})


def test_what_is_nested_too_deep_is_refused() -> None:
    assert decode("Part", nested(20))
    with pytest.raises(Malformed, match="deep"):
        decode("Part", nested(80))
    with pytest.raises(Malformed, match="deep"):
        decode("Part", nested(20), max_depth=10)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("GetTaskRequest", b"\x12"),
        ("GetTaskRequest", b"\x12\x05ab"),
        ("GetTaskRequest", b"\x12\x01\xff"),
        ("GetTaskRequest", b"\x10\x01"),
        ("GetTaskRequest", b"\x00\x01"),
        ("GetTaskRequest", b"\x13\x14"),
        ("GetTaskRequest", b"\x18" + b"\xff" * 11),
        ("TaskStatus", b"\x1a\x0a\x08" + b"\xff" * 8 + b"\x3f"),
        ("Part", b"\x22\x09\x11" + b"\xff" * 8),
        ("Part", b"\x22\x02\x30\x01"),
    ],
)
def test_what_is_no_message_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(Malformed):
        decode(name, data)


def test_unknown_fields_are_ignored_and_pieces_of_a_message_are_one() -> None:
    unknown = b"\xfa\x07\x03abc\xf1\x07" + b"x" * 8 + b"\xf5\x07" + b"x" * 4 + b"\xf0\x07\x01"
    assert decode("GetTaskRequest", unknown + encode("GetTaskRequest", {"id": "t"})) == {"id": "t"}
    first = encode("Task", {"status": {"state": "TASK_STATE_WORKING"}})
    second = encode("Task", {"status": {"timestamp": "2025-01-01T00:00:00.000000Z"}})
    status = {"state": "TASK_STATE_WORKING", "timestamp": "2025-01-01T00:00:00.000000Z"}
    assert decode("Task", first + second) == {"status": status}


def test_an_error_and_its_details_are_read_by_the_official_types() -> None:
    error = errors.InvalidParamsError("no", metadata={"a": "b"}, fields=errors.invalid("x", "y").fields, retry_after=3)
    told = {"code": 3, "message": error.message, "details": errors.details(error)}
    data = encode("google.rpc.Status", told)
    status = status_pb2.Status.FromString(data)
    assert (status.code, status.message, len(status.details)) == (3, "no", 3)
    assert decode("google.rpc.Status", data) == told
