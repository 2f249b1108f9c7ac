"""A2A's messages as Protocol Buffers: one table of their fields, and a codec from and to ProtoJSON's values. Pure.

Values are those that JSON has, with two differences: ``bytes`` are bytes, and numbers in free objects that are whole
are ints. Unknown fields are ignored. Only what these messages need is here: no groups, no extensions, no packed fields.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple


class Malformed(ValueError):
    """The bytes are not a message of that kind."""


class Field(NamedTuple):
    """One field: its number, and ``kind``, which is a scalar, an enum, one of ``SPECIAL`` or a message."""

    number: int
    name: str
    """In JSON."""
    kind: str
    many: str
    """``*``: a list of them; ``%``: an object of them, by strings."""


ENUMS: Final[dict[str, tuple[str, ...]]] = {
    "TaskState": tuple(
        f"TASK_STATE_{name}"
        for name in (
            "UNSPECIFIED", "SUBMITTED", "WORKING", "COMPLETED", "FAILED", "CANCELED", "INPUT_REQUIRED", "REJECTED",
            "AUTH_REQUIRED",
        )
    ),
    "Role": ("ROLE_UNSPECIFIED", "ROLE_USER", "ROLE_AGENT"),
}  # fmt: skip
"""The names by their numbers."""

SPECIAL: Final = frozenset(("Struct", "Value", "Timestamp", "Duration", "Any"))

_FIELDS: Final[dict[str, str]] = {
    "Part": "1 text, 2 raw bytes, 3 url, 4 data Value, 5 metadata Struct, 6 filename, 7 mediaType",
    "Message": "1 messageId, 2 contextId, 3 taskId, 4 role Role, 5 parts *Part, 6 metadata Struct,"
    "7 extensions *string, 8 referenceTaskIds *string",
    "Artifact": "1 artifactId, 2 name, 3 description, 4 parts *Part, 5 metadata Struct, 6 extensions *string",
    "TaskStatus": "1 state TaskState, 2 message Message, 3 timestamp Timestamp",
    "Task": "1 id, 2 contextId, 3 status TaskStatus, 4 artifacts *Artifact, 5 history *Message, 6 metadata Struct",
    "TaskStatusUpdateEvent": "1 taskId, 2 contextId, 3 status TaskStatus, 4 metadata Struct",
    "TaskArtifactUpdateEvent": "1 taskId, 2 contextId, 3 artifact Artifact, 4 append bool, 5 lastChunk bool,"
    "6 metadata Struct",
    "StreamResponse": "1 task Task, 2 message Message, 3 statusUpdate TaskStatusUpdateEvent,"
    "4 artifactUpdate TaskArtifactUpdateEvent",
    "SendMessageResponse": "1 task Task, 2 message Message",
    "AuthenticationInfo": "1 scheme, 2 credentials",
    "TaskPushNotificationConfig": "1 tenant, 2 id, 3 taskId, 4 url, 5 token, 6 authentication AuthenticationInfo",
    "SendMessageConfiguration": "1 acceptedOutputModes *string,"
    "2 taskPushNotificationConfig TaskPushNotificationConfig, 3 historyLength int32, 4 returnImmediately bool",
    "SendMessageRequest": "1 tenant, 2 message Message, 3 configuration SendMessageConfiguration, 4 metadata Struct",
    "GetTaskRequest": "1 tenant, 2 id, 3 historyLength int32",
    "ListTasksRequest": "1 tenant, 2 contextId, 3 status TaskState, 4 pageSize int32, 5 pageToken,"
    "6 historyLength int32, 7 statusTimestampAfter Timestamp, 8 includeArtifacts bool",
    "ListTasksResponse": "1 tasks *Task, 2 nextPageToken, 3 pageSize int32, 4 totalSize int32",
    "CancelTaskRequest": "1 tenant, 2 id, 3 metadata Struct",
    "SubscribeToTaskRequest": "1 tenant, 2 id",
    "GetTaskPushNotificationConfigRequest": "1 tenant, 2 taskId, 3 id",
    "DeleteTaskPushNotificationConfigRequest": "1 tenant, 2 taskId, 3 id",
    "ListTaskPushNotificationConfigsRequest": "1 taskId, 2 pageSize int32, 3 pageToken, 4 tenant",
    "ListTaskPushNotificationConfigsResponse": "1 configs *TaskPushNotificationConfig, 2 nextPageToken",
    "GetExtendedAgentCardRequest": "1 tenant",
    "AgentInterface": "1 url, 2 protocolBinding, 3 tenant, 4 protocolVersion",
    "AgentProvider": "1 url, 2 organization",
    "AgentExtension": "1 uri, 2 description, 3 required bool, 4 params Struct",
    "AgentCapabilities": "1 streaming bool, 2 pushNotifications bool, 3 extensions *AgentExtension,"
    "4 extendedAgentCard bool",
    "AgentSkill": "1 id, 2 name, 3 description, 4 tags *string, 5 examples *string, 6 inputModes *string,"
    "7 outputModes *string, 8 securityRequirements *SecurityRequirement",
    "AgentCardSignature": "1 protected, 2 signature, 3 header Struct",
    "AgentCard": "1 name, 2 description, 3 supportedInterfaces *AgentInterface, 4 provider AgentProvider, 5 version,"
    "6 documentationUrl, 7 capabilities AgentCapabilities, 8 securitySchemes %SecurityScheme,"
    "9 securityRequirements *SecurityRequirement, 10 defaultInputModes *string, 11 defaultOutputModes *string,"
    "12 skills *AgentSkill, 13 signatures *AgentCardSignature, 14 iconUrl",
    "StringList": "1 list *string",
    "SecurityRequirement": "1 schemes %StringList",
    "SecurityScheme": "1 apiKeySecurityScheme APIKeySecurityScheme, 2 httpAuthSecurityScheme HTTPAuthSecurityScheme,"
    "3 oauth2SecurityScheme OAuth2SecurityScheme, 4 openIdConnectSecurityScheme OpenIdConnectSecurityScheme,"
    "5 mtlsSecurityScheme MutualTlsSecurityScheme",
    "APIKeySecurityScheme": "1 description, 2 location, 3 name",
    "HTTPAuthSecurityScheme": "1 description, 2 scheme, 3 bearerFormat",
    "OAuth2SecurityScheme": "1 description, 2 flows OAuthFlows, 3 oauth2MetadataUrl",
    "OpenIdConnectSecurityScheme": "1 description, 2 openIdConnectUrl",
    "MutualTlsSecurityScheme": "1 description",
    "OAuthFlows": "1 authorizationCode AuthorizationCodeOAuthFlow, 2 clientCredentials ClientCredentialsOAuthFlow,"
    "3 implicit ImplicitOAuthFlow, 4 password PasswordOAuthFlow, 5 deviceCode DeviceCodeOAuthFlow",
    "AuthorizationCodeOAuthFlow": "1 authorizationUrl, 2 tokenUrl, 3 refreshUrl, 4 scopes %string, 5 pkceRequired bool",
    "ClientCredentialsOAuthFlow": "1 tokenUrl, 2 refreshUrl, 3 scopes %string",
    "ImplicitOAuthFlow": "1 authorizationUrl, 2 refreshUrl, 3 scopes %string",
    "PasswordOAuthFlow": "1 tokenUrl, 2 refreshUrl, 3 scopes %string",
    "DeviceCodeOAuthFlow": "1 deviceAuthorizationUrl, 2 tokenUrl, 3 refreshUrl, 4 scopes %string",
    "google.rpc.Status": "1 code int32, 2 message, 3 details *Any",
    "google.rpc.ErrorInfo": "1 reason, 2 domain, 3 metadata %string",
    "google.rpc.BadRequest": "1 fieldViolations *google.rpc.BadRequest.FieldViolation",
    "google.rpc.BadRequest.FieldViolation": "1 field, 2 description",
    "google.rpc.RetryInfo": "1 retryDelay Duration",
}
"""Number, name and kind of each field; without a kind it is a string."""


def _read(fields: str) -> Iterator[Field]:
    for each in fields.split(","):
        number, name, *rest = each.split()
        kind = rest[0] if rest else "string"
        yield Field(int(number), name, kind.lstrip("*%"), kind[0] if kind[0] in "*%" else "")


MESSAGES: Final = {name: {each.name: each for each in _read(fields)} for name, fields in _FIELDS.items()}
_BY_NUMBER: Final = {name: {each.number: each for each in fields.values()} for name, fields in MESSAGES.items()}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINTS: Final = frozenset(("bool", "int32", *ENUMS))
_DOUBLE: Final = struct.Struct("<d")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_1, _YEAR_10000 = -62135596800, 253402300800
"""Seconds between which a time lies."""


# --- writing ----------------------------------------------------------------------------------------------------------


def encode(name: str, value: Mapping[str, Any]) -> bytes:
    """The message ``name`` with what ``value`` holds; members that the message does not have are left out."""
    fields = MESSAGES[name]
    out = bytearray()
    for key, item in value.items():
        field = fields.get(key)
        if field is None or (item is None and field.kind != "Value"):
            continue
        if field.many == "*":
            for each in item:
                _put(out, field.number, field.kind, each)
        elif field.many == "%":
            for label, each in item.items():
                entry = bytearray()
                _put(entry, 1, "string", label)
                _put(entry, 2, field.kind, each)
                _put_bytes(out, field.number, entry)
        else:
            _put(out, field.number, field.kind, item)
    return bytes(out)


def _put(out: bytearray, number: int, kind: str, value: Any) -> None:
    if kind == "string":
        _put_bytes(out, number, value.encode("utf-8", "replace"))
    elif kind in _VARINTS:
        _put_varint(out, number << 3 | _VARINT)
        _put_varint(out, ENUMS[kind].index(value) if kind in ENUMS else int(value) & (1 << 64) - 1)
    elif kind == "bytes":
        _put_bytes(out, number, value)
    elif kind in SPECIAL:
        _put_bytes(out, number, _WRITERS[kind](value))
    else:
        _put_bytes(out, number, encode(kind, value))


def _put_bytes(out: bytearray, number: int, data: bytes | bytearray) -> None:
    _put_varint(out, number << 3 | _BYTES)
    _put_varint(out, len(data))
    out += data


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _struct(value: Mapping[str, Any]) -> bytes:
    out = bytearray()
    for key, each in value.items():
        entry = bytearray()
        _put(entry, 1, "string", key)
        _put_bytes(entry, 2, _value(each))
        _put_bytes(out, 1, entry)
    return bytes(out)


def _value(value: Any) -> bytes:
    out = bytearray()
    if value is None:
        out += b"\x08\x00"
    elif isinstance(value, bool):
        out += b"\x20\x01" if value else b"\x20\x00"
    elif isinstance(value, str):
        _put(out, 3, "string", value)
    elif isinstance(value, dict):
        _put_bytes(out, 5, _struct(value))
    elif isinstance(value, list | tuple):
        items = bytearray()
        for each in value:
            _put_bytes(items, 1, _value(each))
        _put_bytes(out, 6, items)
    else:
        out += b"\x11" + _DOUBLE.pack(float(value))
    return bytes(out)


def _timestamp(value: str) -> bytes:
    since = datetime.fromisoformat(value) - _EPOCH
    return _seconds(since.days * 86400 + since.seconds, since.microseconds * 1000)


def _duration(value: str) -> bytes:
    return _seconds(int(value.removesuffix("s")), 0)


def _seconds(seconds: int, nanos: int) -> bytes:
    out = bytearray()
    for number, part in ((1, seconds), (2, nanos)):
        if part:
            _put_varint(out, number << 3 | _VARINT)
            _put_varint(out, part & (1 << 64) - 1)
    return bytes(out)


def _any(value: Mapping[str, Any]) -> bytes:
    out = bytearray()
    url: str = value["@type"]
    _put(out, 1, "string", url)
    _put_bytes(out, 2, encode(url.rpartition("/")[2], value))
    return bytes(out)


_WRITERS: Final = {"Struct": _struct, "Value": _value, "Timestamp": _timestamp, "Duration": _duration, "Any": _any}


# --- reading ----------------------------------------------------------------------------------------------------------


def decode(name: str, data: bytes, *, max_depth: int = 64) -> dict[str, Any]:
    """What the message ``name`` in ``data`` holds. Enums that are not known are their numbers.

    Raises: Malformed, also for messages or free values nested deeper than ``max_depth``.
    """
    fields = _BY_NUMBER[name]
    result: dict[str, Any] = {}
    pieces: dict[Field, list[bytes]] = {}
    for number, wire, item in _items(data, max_depth):
        field = fields.get(number)
        if field is None:
            continue
        if wire != (_VARINT if field.kind in _VARINTS and field.many != "%" else _BYTES):
            raise Malformed(f"{name}.{field.name} is of another type")
        if field.many == "*":
            result.setdefault(field.name, []).append(_scalar(field.kind, item, max_depth))
        elif field.many == "%":
            label, value = _entry(field.kind, item, max_depth)
            result.setdefault(field.name, {})[label] = value
        elif field.kind in _VARINTS or field.kind in ("string", "bytes"):
            result[field.name] = _scalar(field.kind, item, max_depth)
        else:
            pieces.setdefault(field, []).append(item)  # a message that comes in pieces is all of them
    for field, parts in pieces.items():
        result[field.name] = _scalar(field.kind, b"".join(parts), max_depth)
    return result


def _items(data: bytes, max_depth: int) -> Iterator[tuple[int, int, Any]]:
    """The fields in ``data``: number, wire type, and the number or the bytes that it holds."""
    if max_depth <= 0:
        raise Malformed("it is nested too deep")
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise Malformed("there is no field of that number")
        item: Any
        if wire == _VARINT:
            item, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            item = data[at : at + size]
            at += size
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
            item = data[at : at + size]
            at += size
        else:
            raise Malformed("it holds a group")
        if at > end:
            raise Malformed("it ends too early")
        yield number, wire, item


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Malformed("it ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise Malformed("a number is too long")


def _scalar(kind: str, item: Any, max_depth: int) -> Any:
    """One value. ``max_depth``: of the message that it stands in."""
    if kind == "string":
        return _text(item)
    if kind == "bytes":
        return item
    if kind == "bool":
        return bool(item)
    if kind == "int32":
        return (item & (1 << 32) - 1 ^ 1 << 31) - (1 << 31)
    if kind in ENUMS:
        return ENUMS[kind][item] if item < len(ENUMS[kind]) else item
    if kind in SPECIAL:
        return _READERS[kind](item, max_depth - 1)
    return decode(kind, item, max_depth=max_depth - 1)


def _text(item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError:
        raise Malformed("a text is not UTF-8") from None


def _entry(kind: str, data: bytes, max_depth: int) -> tuple[str, Any]:
    label, value = "", None
    for number, wire, item in _items(data, max_depth):
        if number in (1, 2) and wire != _BYTES:
            raise Malformed("an entry is of another type")
        if number == 1:
            label = _text(item)
        elif number == 2:
            value = _scalar(kind, item, max_depth)
    return label, _scalar(kind, b"", max_depth) if value is None and kind != "Value" else value


def _read_struct(data: bytes, max_depth: int) -> dict[str, Any]:
    result = {}
    for number, wire, item in _items(data, max_depth):
        if number == 1 and wire == _BYTES:
            label, value = _entry("Value", item, max_depth)
            result[label] = value
    return result


def _read_value(data: bytes, max_depth: int) -> Any:
    result: Any = None
    for number, wire, item in _items(data, max_depth):
        match number, wire:
            case 1, 0:
                result = None
            case 2, 1:
                result = _number(*_DOUBLE.unpack(item))
            case 3, 2:
                result = _text(item)
            case 4, 0:
                result = bool(item)
            case 5, 2:
                result = _read_struct(item, max_depth - 1)
            case 6, 2:
                items = _items(item, max_depth - 1)
                result = [
                    _read_value(each, max_depth - 1) for inner, kind, each in items if (inner, kind) == (1, _BYTES)
                ]
            case _:
                raise Malformed("a value is of another type")
    return result


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise Malformed("JSON has no such number")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _read_timestamp(data: bytes, max_depth: int) -> str:
    parts = {number: item for number, wire, item in _items(data, max_depth) if wire == _VARINT}
    seconds = (parts.get(1, 0) ^ 1 << 63) - (1 << 63)
    nanos = parts.get(2, 0)
    if not _YEAR_1 <= seconds < _YEAR_10000 or nanos > 999_999_999:
        raise Malformed("there is no such time")
    at = _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _read_duration(data: bytes, max_depth: int) -> str:
    parts = {number: item for number, wire, item in _items(data, max_depth) if wire == _VARINT}
    return f"{parts.get(1, 0)}s"


def _read_any(data: bytes, max_depth: int) -> dict[str, Any]:
    parts = {number: item for number, wire, item in _items(data, max_depth) if wire == _BYTES}
    url = _text(parts.get(1, b""))
    name = url.rpartition("/")[2]
    return {"@type": url, **(decode(name, parts.get(2, b""), max_depth=max_depth) if name in MESSAGES else {})}


_READERS: Final = {
    "Struct": _read_struct,
    "Value": _read_value,
    "Timestamp": _read_timestamp,
    "Duration": _read_duration,
    "Any": _read_any,
}
