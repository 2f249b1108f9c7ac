"""What requests of A2A are held to: bodies, service parameters (3.2.6), pages, lengths, times. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

import msgspec

from hector_trio.a2a import errors
from hector_trio.errors import FieldError

T = TypeVar("T")

DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 100

Version = Literal["1.0", "0.3"]
_VERSION: Final = re.compile(r"([0-9]{1,9}\.[0-9]{1,9})(\.[0-9]{1,9})?\Z")


def version_of(text: str | None) -> Version:
    """What an ``A2A-Version`` means: nothing is 0.3 (3.6.2), the patch number does not count (3.6). Raises:
    VersionNotSupportedError."""
    text = (text or "").strip()
    if not text:
        return "0.3"
    match = _VERSION.match(text)
    if match is not None and match[1] in ("1.0", "0.3"):
        return "1.0" if match[1] == "1.0" else "0.3"
    raise errors.VersionNotSupportedError(
        f"A2A {text[:32]!r} is not spoken here; 1.0 and 0.3 are", metadata={"supported": "1.0,0.3"}
    )


def extensions_of(text: str | None) -> frozenset[str]:
    """The URIs of an ``A2A-Extensions``."""
    return frozenset(uri for each in (text or "").split(",") if (uri := each.strip()))


@lru_cache(maxsize=64)
def _decoder(type_: Any, strict: bool) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_, strict=strict)


def decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    """A request as ProtoJSON. Unknown fields are ignored (5.7). Raises: InvalidParamsError, naming the field."""
    of_type: Any = type_
    try:
        decoded: T = _decoder(of_type, True).decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise errors.ParseError("The body is not JSON in UTF-8") from None
    return decoded


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
