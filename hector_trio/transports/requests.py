"""What a request's body and query say, read strictly and refused with the place of every fault. Pure; no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, TypeVar

import msgspec

from hector_trio.errors import FieldError, InvalidRequest
from hector_trio.models import ID_PATTERN, Content, GraceMs, SessionRequest, TaskRequest, is_id

T = TypeVar("T")

MAX_NUMBER: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly (RFC 7493, 2.2); for times and sequence numbers."""

DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 100

_NO_ID: Final = "must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not . or .."

_BOM: Final = b"\xef\xbb\xbf"


def invalid(pointer: str, message: str) -> InvalidRequest:
    """The refusal of one thing at ``pointer`` (RFC 6901; a query parameter or header stands there by its name)."""
    return _refusal([FieldError(pointer, message)])


def _refusal(faults: Sequence[FieldError]) -> InvalidRequest:
    """The refusal of all that is wrong. Its detail says what its errors say: a reader of either misses nothing."""
    said = (f"{each.pointer.removeprefix('/') or 'The body'}: {each.message}" for each in faults)
    return InvalidRequest("; ".join(said), errors=tuple(faults))


# --- JSON -------------------------------------------------------------------------------------------------------------


def decode_json(data: bytes, type_: type[T], *, max_depth: int) -> T:
    """``data`` as ``type_``. Unknown keys are ignored, as is a byte order mark (RFC 8259, 8.1).

    Raises: InvalidRequest, naming the place, for anything that is not JSON in UTF-8, is nested deeper than
    ``max_depth``, holds a number out of range or half a surrogate pair, or does not fit the type. What is returned can
    always be encoded again.
    """
    data = data.removeprefix(_BOM)
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise invalid("", f"is not UTF-8 (byte {error.start})") from None
    if not text or text.isspace():
        raise invalid("", "is empty; JSON is expected")
    if is_deeper(data, max_depth):
        raise invalid("", f"is nested deeper than {max_depth} levels")
    try:
        of_type: Any = type_
        decoded: T = _decoder(of_type).decode(data)
    except msgspec.ValidationError as error:
        pointer, message = fault(str(error))
        raise invalid(pointer, message) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise invalid("", _malformed(error, text)) from None
    except RecursionError:
        raise invalid("", "is nested too deep") from None
    return decoded


@lru_cache(maxsize=64)
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


# A first half (after an even number of backslashes) behind which something else stands than a second half.
_HALF_PAIR = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9A-Fa-f]{2}(?:[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])")


def _malformed(error: Exception, data: str) -> str:
    """The decoder's words (they hold positions and single characters only) as ours."""
    text = str(error)
    # Near the end of the data the decoder takes half a pair for the end.
    if "surrogate" in text or (("truncated" in text or "unexpected end" in text) and _HALF_PAIR.search(data)):
        return "holds half of a surrogate pair (\\uD800 to \\uDFFF mean something in pairs only)"
    if text.startswith("JSON is malformed"):
        return "is not JSON" + text.removeprefix("JSON is malformed")
    return "is not JSON: it ends too early" if "truncated" in text else "is not JSON"


_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS: Final = bytes(each for each in range(256) if each not in b"[]{}")


def is_deeper(data: bytes, max_depth: int) -> bool:
    """Whether arrays and objects are nested deeper than ``max_depth``. Linear; counts only, as a rule."""
    if data.count(b"[") + data.count(b"{") <= max_depth:
        return False
    # Brackets within strings do not count: without escapes, every second part between quotes lies outside of them.
    outside = b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    steps = memoryview(outside.translate(_STEPS, _NO_BRACKETS)).cast("b")
    return max(accumulate(steps), default=0) > max_depth


_PATH = re.compile(r" - at `(?P<key>key in )?\$(?P<path>.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]|(?P<any>\[\.\.\.\])")


def fault(text: str) -> tuple[str, str]:
    """A ValidationError's text as a JSON pointer (RFC 6901) and the message without the place.

    A member of a free object is not named by the decoder: the pointer then ends at that object.
    """
    found = _PATH.search(text)
    message = text if found is None else text[: found.start()]
    pointer = ""
    for step in _STEP.finditer("" if found is None else found["path"]):
        if step["any"] is not None:
            break
        pointer += "/" + (step["index"] or step["name"].replace("~", "~0").replace("/", "~1"))
    missing = _MISSING.match(message)
    if missing is not None:
        return f"{pointer}/{missing['name']}", "is required"
    if message.endswith(f"matching regex {ID_PATTERN!r}"):
        return pointer, _NO_ID
    return pointer, message[:1].lower() + message[1:]


# --- what the types cannot say ----------------------------------------------------------------------------------------


_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}[ \t]*(;[\t\x20-\x7e]*)?\Z")


def check_task_request(request: TaskRequest) -> None:
    """The rules on a task request that its type does not hold. Raises: InvalidRequest with every fault."""
    faults: list[FieldError] = []
    if request.task_id is not None:
        _check_id(request.task_id, "/taskId", faults)
    if request.context is not None and request.context.session_id is not None:
        _check_id(request.context.session_id, "/context/sessionId", faults)
    if request.timeout_ms is not None:
        _check_number(request.timeout_ms, "/timeoutMs", faults)
    if isinstance(request.on_disconnect, GraceMs):
        _check_number(request.on_disconnect.grace_ms, "/onDisconnect/graceMs", faults)
    _check_content(request.input, faults)
    _raise(faults)


def check_content(content: Content) -> None:
    """The rules on an ``input`` that its type does not hold. Raises: InvalidRequest with every fault."""
    faults: list[FieldError] = []
    _check_content(content, faults)
    _raise(faults)


def _check_content(content: Content, faults: list[FieldError]) -> None:
    kind = content.type
    if len(kind) > 255 or _MEDIA_TYPE.match(kind) is None:
        faults.append(FieldError("/input/type", "must be a media type, such as text/plain"))
    elif kind.lower().startswith("text/") and not isinstance(content.content, str):
        faults.append(FieldError("/input/content", f"must be a string where the type is {kind}"))


def check_session_request(request: SessionRequest) -> None:
    """The rules on a request for a session that its type does not hold. Raises: InvalidRequest with every fault."""
    faults: list[FieldError] = []
    if request.session_id is not None:
        _check_id(request.session_id, "/sessionId", faults)
    _raise(faults)


def _check_id(text: str, pointer: str, faults: list[FieldError]) -> None:
    if not is_id(text):
        faults.append(FieldError(pointer, _NO_ID))


def _check_number(number: int, pointer: str, faults: list[FieldError]) -> None:
    if number > MAX_NUMBER:
        faults.append(FieldError(pointer, f"must be at most {MAX_NUMBER}"))


def _raise(faults: list[FieldError]) -> None:
    if faults:
        raise _refusal(faults)


# --- the query --------------------------------------------------------------------------------------------------------


def page_size(query: Mapping[str, str]) -> int:
    """``pageSize``: 1 to 100, 50 when it is not given. Raises: InvalidRequest."""
    return count(query, "pageSize", DEFAULT_PAGE, MAX_PAGE)


def count(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A parameter that is a number from 1 to ``most``, ``default`` when it is not given. Raises: InvalidRequest."""
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise invalid(f"/{name}", f"must be an integer from 1 to {most}")
    return int(text)


def sequence(text: str, name: str) -> int:
    """A number of a chunk, or 0, as a query parameter or header gives it. Raises: InvalidRequest."""
    if not re.fullmatch(r"[0-9]{1,16}", text, re.ASCII) or int(text) > MAX_NUMBER:
        raise invalid(f"/{name}", f"must be an integer from 0 to {MAX_NUMBER}")
    return int(text)


def choice(query: Mapping[str, str], name: str, choices: Iterable[str]) -> str | None:
    """A parameter that is one of ``choices``, ``None`` when it is not given. Raises: InvalidRequest."""
    value = query.get(name)
    allowed = tuple(choices)
    if value is not None and value not in allowed:
        raise invalid(f"/{name}", f"must be one of {', '.join(allowed)}")
    return value


def metadata_filter(query: Mapping[str, str]) -> dict[str, str] | None:
    """All ``metadata.KEY=value`` as one mapping, ``None`` when there is none."""
    found = {
        key.removeprefix("metadata."): value for key, value in query.items() if key.startswith("metadata.") and key[9:]
    }
    return found or None


def canonical(data: bytes) -> bytes:
    """The body's JSON without its spelling: equal for bodies that say the same. ``data`` has been decoded before.

    Raises: InvalidRequest for a number out of range in what that has ignored.
    """
    return msgspec.json.encode(decode_json(data, object, max_depth=MAX_NUMBER), order="deterministic")
