"""What a request's headers ask for: gRPC, Accept, Prefer, entity tags, Idempotency-Key. Pure; no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import Struct

from hector_trio.transports.requests import invalid

MAX_KEY: Final = 255
"""Characters of an ``Idempotency-Key``."""


def is_grpc(scope: Mapping[str, Any]) -> bool:
    """Whether a request is a call of gRPC."""
    if scope["type"] != "http" or scope["http_version"] != "2" or scope["method"] != "POST":
        return False
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return kind == b"application/grpc" or kind.startswith((b"application/grpc+", b"application/grpc;"))


def wants_events(accept: str) -> bool:
    """Whether ``Accept`` (RFC 9110, 12.5.1) asks for server-sent events rather than JSON.

    They are sent only to who names them, and then if JSON is not wanted more; of two that are wanted the same, the one
    that stands first. Anything unreadable asks for JSON.
    """
    events, json, ahead = 0.0, 0.0, False
    for item in accept.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((_quality(each[2:]) for each in parameters if each.startswith("q=")), 1.0)
        if name == "text/event-stream":
            events, ahead = quality, json == 0
        elif name in ("application/json", "application/*", "application/problem+json"):
            json = max(json, quality)
    return events > 0 and (events > json or (events == json and ahead))


def _quality(text: str) -> float:
    return float(text) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", text) else 0.0


class Preferences(Struct, frozen=True):
    """``Prefer`` (RFC 7240) as far as this server knows it. ``wait``: seconds."""

    respond_async: bool = False
    wait: int | None = None

    @property
    def patience(self) -> float | None:
        """Seconds to wait for the end of a task before answering 202; ``None``: until it ends."""
        if self.wait is not None:
            return self.wait
        return 0 if self.respond_async else None

    @property
    def applied(self) -> str:
        """The value of ``Preference-Applied`` (RFC 7240, 3) for an answer that did not wait for the end."""
        names = ["respond-async"] if self.respond_async else []
        return ", ".join(names if self.wait is None else [*names, f"wait={self.wait}"])


def preferences(prefer: str) -> Preferences:
    """What is not understood is ignored (RFC 7240, 2); of a preference given twice the first counts."""
    respond_async = False
    wait: int | None = None
    for item in prefer.split(","):
        name, _, value = item.partition(";")[0].partition("=")
        name, value = name.strip().lower(), value.strip().strip('"')
        if name == "respond-async":
            respond_async = True
        elif name == "wait" and wait is None and re.fullmatch(r"[0-9]{1,9}", value, re.ASCII):
            wait = int(value)
    return Preferences(respond_async, wait)


_TAG = re.compile(r'\s*(W/)?("[\x21\x23-\x7e\x80-\xff]*")\s*(?:,|\Z)')


def entity_tags(header: str) -> list[tuple[bool, str]] | Literal["*"]:
    """``If-Match`` and ``If-None-Match`` (RFC 9110, 13.1): weak or not, and the tag with its quotes."""
    if header.strip() == "*":
        return "*"
    return [(found[1] is not None, found[2]) for found in _TAG.finditer(header)]


def matches_strongly(header: str, etag: str) -> bool:
    """``If-Match``: the strong comparison (RFC 9110, 8.8.3.2); a weak tag never matches."""
    tags = entity_tags(header)
    return tags == "*" or (False, etag) in tags


def matches_weakly(header: str, etag: str) -> bool:
    """``If-None-Match``: the weak comparison (RFC 9110, 8.8.3.2)."""
    tags = entity_tags(header)
    return tags == "*" or any(tag == etag for _, tag in tags)


def idempotency_key(header: str | None) -> str | None:
    """``Idempotency-Key`` as given. Raises: InvalidRequest when it is empty, long, or not printable ASCII."""
    if header is None:
        return None
    if not re.fullmatch(rf"[\x20-\x7e]{{1,{MAX_KEY}}}", header):
        raise invalid("/Idempotency-Key", f"must be 1 to {MAX_KEY} printable ASCII characters")
    return header
