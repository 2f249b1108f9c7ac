"""Server-sent events as bytes (WHATWG HTML, section 9.2): encode events, decode a stream piece by piece. No I/O."""

from __future__ import annotations

from msgspec import Struct

DEFAULT_MAX_EVENT = 1 << 20
"""Bytes that one event (and one line) may have unless told otherwise."""

_BOM = b"\xef\xbb\xbf"


class Event(Struct, frozen=True):
    """One dispatched event. ``id`` is the stream's last event id, which outlives the event that set it."""

    data: str
    id: str = ""
    event: str = "message"


class EventTooLarge(ValueError):
    """An event or a line of the stream is larger than the decoder's bound; the decoder cannot go on."""


def encode(data: bytes, *, id: str | None = None) -> bytes:
    """One event with ``data`` (UTF-8; each of its lines gets a field of its own) and, if given, its ``id``.

    Raises ValueError for an id with a line break or NUL, which the format cannot carry.
    """
    head = b""
    if id is not None:
        if any(c in id for c in "\r\n\0"):
            raise ValueError(f"an event id must not contain line breaks or NUL: {id!r}")
        head = b"id: " + id.encode() + b"\n"
    if b"\n" not in data and b"\r" not in data:
        return head + b"data: " + data + b"\n\n"
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def comment() -> bytes:
    """A line that readers ignore: it keeps an idle connection alive."""
    return b":\n\n"


class Decoder:
    """Eats a stream's bytes as they come and returns the events they complete.

    Lines may end in CR, LF or CRLF and anything may be split between two calls. An event that the stream does not
    complete with an empty line is never given out. ``max_event`` bounds an event's bytes and what is kept between
    calls.
    """

    def __init__(self, max_event: int = DEFAULT_MAX_EVENT) -> None:
        self.last_event_id = ""
        """What a reconnecting client sends as ``Last-Event-ID``."""
        self.retry: int | None = None
        """Milliseconds to wait before reconnecting, once the stream has said so."""
        self._max = max_event
        self._rest = bytearray()
        """The line that is not complete yet."""
        self._after_cr = False
        """The last byte was a CR that ended a line: a LF right after it belongs to it."""
        self._first_line = True
        self._data: list[bytes] = []
        self._data_size = 0
        self._event = ""
        self._id = ""

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes, in order.

        Raises EventTooLarge when an event exceeds the bound; events before it in the same ``data`` are lost.
        """
        if not data:
            return []
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = False
        lines = data.splitlines(keepends=True)
        if not lines:
            return []
        if self._rest:
            if lines[0][-1:] in (b"\n", b"\r") or len(lines) > 1:
                lines[0] = bytes(self._rest) + lines[0]
                self._rest.clear()
            else:
                self._keep(lines[0])
                return []
        last = lines[-1]
        if last[-1:] == b"\r":
            self._after_cr = True
        elif last[-1:] != b"\n":
            self._keep(lines.pop())
        events: list[Event] = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _keep(self, part: bytes) -> None:
        self._rest += part
        if len(self._rest) + self._data_size > self._max:
            raise EventTooLarge(f"an event has more than {self._max} bytes")

    def _line(self, line: bytes) -> Event | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        self._data_size += len(line)
        if self._data_size > self._max:
            raise EventTooLarge(f"an event has more than {self._max} bytes")
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) <= 15:
            self.retry = int(value)
        elif not name:
            # A comment: keep-alives between two events must not add up to a large event.
            self._data_size -= len(line)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        lines, name = self._data, self._event
        self._data_size = 0
        self._event = ""
        if not lines:
            return None
        self._data = []
        return Event(b"\n".join(lines).decode("utf-8", "replace"), self._id, name or "message")
