"""What requests of A2A are held to: bodies, service parameters (3.2.6), pages, lengths, times. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from hector_trio.a2a import errors
from hector_trio.errors import FieldError

T = TypeVar("T")

DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 100

Version = Literal["1.0", "0.3"]
_VERSION: Final = re.compile(r"([0-9]{1,9}\.[0-9]{1,9})(\.[0-9]{1,9})?\Z")


def version_of(text: str | None, *, legacy: bool = True) -> Version:
    """What an ``A2A-Version`` means: nothing is 0.3 (3.6.2), the patch number does not count (3.6). ``legacy``: whether
    0.3 is spoken. Raises: VersionNotSupportedError."""
    text = (text or "").strip()
    match = _VERSION.match(text or "0.3")
    if match is not None and match[1] == "1.0":
        return "1.0"
    if match is not None and match[1] == "0.3" and legacy:
        return "0.3"
    raise not_spoken(text, legacy)


def not_spoken(text: str, legacy: bool) -> errors.VersionNotSupportedError:
    """A request that says no version speaks 0.3."""
    said = f"A2A {text[:32]!r} is" if text else "A2A-Version is missing, which means 0.3: that is"
    spoken = "1.0 and 0.3 are" if legacy else "1.0 is"
    return errors.VersionNotSupportedError(
        f"{said} not spoken here; {spoken}", metadata={"supported": "1.0,0.3" if legacy else "1.0"}
    )


def extensions_of(text: str | None) -> frozenset[str]:
    """The URIs of an ``A2A-Extensions``."""
    return frozenset(uri for each in (text or "").split(",") if (uri := each.strip()))


@lru_cache(maxsize=64)
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def decode(data: bytes, type_: type[T]) -> T:
    """A request as ProtoJSON. Unknown fields are ignored (5.7). Raises: InvalidParamsError, naming the field."""
    of_type: Any = type_
    try:
        if _SNAKE.search(data):
            return converted(camel(msgspec.json.decode(data), of_type), type_)
        decoded: T = _decoder(of_type).decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise errors.ParseError("The body is not JSON in UTF-8") from None
    return decoded


_SNAKE: Final = re.compile(rb'"[a-z]+(_[a-z]+)+"\s*:')


def camel(value: Any, type_: Any) -> Any:
    """``value`` with the names of the protocol's fields as JSON has them: those of the protocol's buffers, with
    underscores, are to be read too (ProtoJSON). What clients have named themselves stays as it is."""
    for kind in (type_, *get_args(type_)):
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
            known = {each.name: each for each in msgspec.structs.fields(kind)}
            renamed = {name: each for name, each in value.items() if name not in known}
            for name, each in known.items():
                if name in value or each.encode_name in value:
                    renamed[each.encode_name] = camel(value.get(each.encode_name, value.get(name)), each.type)
            return renamed
        if get_origin(kind) is list and isinstance(value, list):
            return [camel(item, get_args(kind)[0]) for item in value]
    return value


def converted(value: Any, type_: type[T]) -> T:
    """As ``decode``, of JSON that was read already."""
    of_type: Any = type_
    try:
        result: T = msgspec.convert(value, of_type)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    return result


def from_query(values: dict[str, str], type_: type[T]) -> T:
    """A request from the path and the query (11.5): numbers and booleans are texts there. Raises:
    InvalidParamsError."""
    of_type: Any = type_
    try:
        converted: T = msgspec.convert(values, of_type, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    return converted


_PLACE: Final = re.compile(r" - at `\$\.?(.*)`\Z", re.DOTALL)


def _invalid(error: msgspec.ValidationError) -> errors.InvalidParamsError:
    text = str(error)
    match = _PLACE.search(text)
    field = match[1] if match is not None else ""
    said = text[: match.start()] if match is not None else text
    whole = f"{field}: {said}" if field else said
    return errors.InvalidParamsError(whole, fields=(FieldError(field, said),))


def check_history_length(length: int | None) -> None:
    """3.2.4. Raises: InvalidParamsError."""
    if length is not None and length < 0:
        raise errors.invalid("historyLength", "must not be negative")


def page_size(size: int | None) -> int:
    """3.1.4. Raises: InvalidParamsError."""
    if size is None:
        return DEFAULT_PAGE
    if not 1 <= size <= MAX_PAGE:
        raise errors.invalid("pageSize", f"must be from 1 to {MAX_PAGE}")
    return size


def milliseconds(field: str, text: str | None) -> int | None:
    """A timestamp (5.6.1) as milliseconds since the epoch, rounded up. Raises: InvalidParamsError."""
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        if at.tzinfo is None:
            raise ValueError(text)
        since = at - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        raise errors.invalid(field, "must be a time such as 2025-10-28T10:30:00.000Z") from None
    micros = (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds
    return -(-micros // 1000)
