"""What every store decides in the same way: page tokens, names of replaced tasks, patches, what may be appended."""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec

from hector_trio.errors import FieldError, InvalidRequest, PreconditionFailed, RateLimited, TaskExists
from hector_trio.session import SessionRow, check_size, etag, merge_patch
from hector_trio.stores import Append
from hector_trio.task import ENDED

R = TypeVar("R")


def time_of(now: int | None) -> int:
    """``now``, or what the clock says (milliseconds since the epoch)."""
    return time.time_ns() // 1_000_000 if now is None else now


# --- pages ------------------------------------------------------------------------------------------------------------


def fitting(rows: Iterable[R], size: Callable[[R], int], limit: int, limit_bytes: int) -> tuple[list[R], bool]:
    """The first of ``rows``: one, then no more than ``limit`` and than fit into ``limit_bytes``; and whether there is
    one more. Takes no row behind that one, so that a cursor reads no further."""
    found: list[R] = []
    room = limit_bytes
    for row in rows:
        if len(found) >= limit:
            return found, True
        room -= size(row)
        if found and room < 0:
            return found, True
        found.append(row)
    return found, False


# --- page tokens ------------------------------------------------------------------------------------------------------
# A token is the position after which a list goes on, and a checksum over it and the question that was asked. The
# checksum catches tokens of other lists and accidents, not attackers: the question is asked again with every page, so
# a forged position shows nothing that its caller may not see anyway.


def page_token(position: int, question: tuple[Any, ...]) -> str:
    """The token with which ``question`` goes on after ``position`` (0 or more, below 2**63)."""
    place = position.to_bytes(8, "big")
    seal = blake2b(place + msgspec.json.encode(question, order="deterministic"), digest_size=10).digest()
    return base64.urlsafe_b64encode(place + seal).decode()


def page_position(token: str, question: tuple[Any, ...]) -> int | None:
    """Where a page begins; ``None`` for the first (``token`` is empty).

    Raises: InvalidRequest for a token that was not made for this question.
    """
    if not token:
        return None
    try:
        position = int.from_bytes(base64.b64decode(token.encode("ascii"), b"-_")[:8], "big")
    except (binascii.Error, UnicodeEncodeError):
        position = -1
    if not 0 <= position < 2**63 or page_token(position, question) != token:
        wrong = "not a token of this list"
        raise InvalidRequest(f"pageToken: {wrong}", errors=(FieldError("/pageToken", wrong),))
    return position


def pair_token(first: int, second: int, question: tuple[Any, ...]) -> str:
    """As ``page_token``, of a list that is in the order of two numbers."""
    return f"{page_token(first, question)}.{page_token(second, (first, *question))}"


def pair_position(token: str, question: tuple[Any, ...]) -> tuple[int, int] | None:
    """As ``page_position``. Raises: InvalidRequest."""
    if not token:
        return None
    head, _, tail = token.partition(".")
    first = page_position(head or ".", question)
    assert first is not None
    second = page_position(tail or ".", (first, *question))
    assert second is not None
    return first, second


# --- names of replaced tasks ------------------------------------------------------------------------------------------
# An ended task whose id is used again goes on as "{id}~1", "{id}~2" … Every id is seen as a stem and a number ("a~2" is
# ("a", 2), "a" is ("a", 0)), whoever made it. So the highest number of a stem, which an index answers at once, is
# enough to know a free name, also where a client chose an id that looks like ours.

_NUMBERED = re.compile(r"(.+)~([1-9][0-9]{0,8})", re.DOTALL)
_LONGEST = 128


def split_name(task_id: str) -> tuple[str, int]:
    """A task id as its stem and number; different ids never give the same pair."""
    match = _NUMBERED.fullmatch(task_id)
    return (task_id, 0) if match is None else (match[1], int(match[2]))


def next_name(task_id: str, highest: Callable[[str], int]) -> str:
    """The free name under which the ended task ``task_id`` goes on; ``highest`` tells a stem's highest number or 0.

    An id too long for the suffix within 128 characters loses as many of its last characters as the suffix needs.

    Raises: TaskExists when a client has used up the numbers (beyond 999,999,999) itself.
    """
    for digits in range(1, 10):
        stem = task_id[: _LONGEST - 1 - digits]
        number = highest(stem) + 1
        if number >= 10**9:
            break
        name = f"{stem}~{number}"
        if len(name) <= _LONGEST:
            return name
    raise TaskExists(f"No name is left for the ended task {task_id}", task_id=task_id)


# --- sessions ---------------------------------------------------------------------------------------------------------


def patched(
    row: SessionRow, *, now: int, state: Any, metadata: Any, if_match: str | None, limit_bytes: int
) -> SessionRow:
    """The session after the merge patches (``None``: none); ``row`` stays as it is.

    Raises: PreconditionFailed when ``if_match`` is not the ETag of ``row``; InvalidRequest when a patch would leave
    anything but an object; PayloadTooLarge when both together would have more than ``limit_bytes`` as JSON.
    """
    if if_match is not None and if_match != etag(row):
        raise PreconditionFailed(f"Session {row.session_id} has changed")
    members = {"state": merge_patch(row.state, {} if state is None else state)}
    members["metadata"] = merge_patch(row.metadata, {} if metadata is None else metadata)
    for name, value in members.items():
        if not isinstance(value, dict):
            wrong = "must be an object"
            raise InvalidRequest(f"{name}: {wrong}", errors=(FieldError(f"/{name}", wrong),))
    check_size(members["state"], members["metadata"], limit_bytes)
    return msgspec.structs.replace(row, last_activity_at=max(row.last_activity_at, now), **members)


class Quota:
    """Counts an owner's sessions only when the limit may be near: counting costs as much as there are.

    It remembers a number that is never too small, for nobody else adds sessions: the last count and all since.
    """

    def __init__(self) -> None:
        self._at_most: dict[str, int] = {}

    def admits(self, owner: str, limit: int, count: Callable[[], int]) -> bool:
        """Whether ``owner``, who has ``count()`` sessions, may have one more; that one is taken as made."""
        held = self._at_most.get(owner, limit)
        if held >= limit:
            held = count()
        if len(self._at_most) >= 10_000:
            self._at_most.clear()
        self._at_most[owner] = held + 1
        return held < limit


def text_of(value: Any) -> str:
    """A metadata value as filters compare it: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# --- appends ----------------------------------------------------------------------------------------------------------


def check_pushes(others: int, limit: int) -> None:
    """Whether a task that has ``others`` may have one more webhook. Raises: RateLimited."""
    if others >= limit:
        raise RateLimited(f"A task can have no more than {limit} push notification configurations")


def check_appends(appends: Sequence[Append]) -> None:
    """Raises ValueError for appends that contradict themselves (a bug of the caller, never a race)."""
    if len({append.key for append in appends}) != len(appends):
        raise ValueError("at most one append per task in a call")
    for append in appends:
        if append.last_seq < append.first_seq - 1 or (append.last_seq >= append.first_seq) != bool(append.data):
            raise ValueError(f"append to task {append.key}: the data does not fit its numbers")
        change = append.change
        if change is not None and (change.status in ENDED) != (change.ended_at is not None):
            raise ValueError(f"append to task {append.key}: {change.status!r} with ended_at={change.ended_at}")
