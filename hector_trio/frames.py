"""Rules of the wire that need no state: WebSocket frames, bounded permessage-deflate, requests that are refused."""

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from http import HTTPStatus

import h11
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from .errors import Forbidden, HectorError, InvalidRequest, NotFound, PayloadTooLarge, RateLimited
from .models import Problem, encode

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
"""First bytes of an unfragmented frame: FIN and the opcode (5.2)."""

NO_STATUS = 1005
"""What a Close frame without a code means; it never stands on the wire (7.4.1)."""

_SHORT, _MIDDLE, _LONG = struct.Struct("!BB").pack, struct.Struct("!BBH").pack, struct.Struct("!BBQ").pack


REASONS = {1002: "protocol error", 1007: "invalid payload", 1009: "message too big"}
"""What our Close frames say of a peer's frames that cannot be taken; a parser's own words are for nobody else."""


def frame(first: int, payload: bytes) -> bytes:
    """One server frame (never masked, 5.1) around *payload*."""
    size = len(payload)
    if size < 126:
        return _SHORT(first, size) + payload
    if size < 65536:
        return _MIDDLE(first, 126, size) + payload
    return _LONG(first, 127, size) + payload


def frames(first: int, payloads: Sequence[bytes]) -> bytes:
    """One frame for each payload, in order, as one piece of bytes."""
    parts: list[bytes] = []
    for payload in payloads:
        size = len(payload)
        if size < 126:
            parts.append(_SHORT(first, size))
        elif size < 65536:
            parts.append(_MIDDLE(first, 126, size))
        else:
            parts.append(_LONG(first, 127, size))
        parts.append(payload)
    return b"".join(parts)


def close(code: int, reason: str = "") -> bytes:
    """A Close frame, for 1005 one without a code. A reason beyond 123 bytes is cut between characters (5.5.1)."""
    if code == NO_STATUS:
        return frame(CLOSE, b"")
    text = reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
    return frame(CLOSE, struct.pack("!H", code) + text.encode())


_MAY_CLOSE = frozenset((1000, 1001))


def plain_frame(data: bytes, start: int, limit: int) -> tuple[int, int, bytes] | None:
    """The first byte, the end in *data* and the unmasked payload of the client's frame at *start*, if it is whole and
    of the most frequent kinds: a text in one frame of at most *limit* bytes, a ping, a pong, a usual Close without a
    reason. ``None`` says nothing about what else it is: a parser of the protocol decides."""
    if len(data) < start + 6:
        return None
    first, size = data[start], data[start + 1] - 0x80
    begin = start + 2
    if size == 126 and first == TEXT:
        size = int.from_bytes(data[begin : begin + 2])
        begin += 2
        if size < 126:
            return None
    elif not 0 <= size < 126 or first not in (TEXT, PING, PONG, CLOSE):
        return None
    mask, begin = data[begin : begin + 4], begin + 4
    end = begin + size
    if end > len(data) or size > limit:
        return None
    repeated = (mask * (size // 4 + 1))[:size]
    payload = (int.from_bytes(data[begin:end]) ^ int.from_bytes(repeated)).to_bytes(size)
    if first == CLOSE and payload and (size != 2 or int.from_bytes(payload) not in _MAY_CLOSE):
        return None
    return first, end, payload


class BoundedDeflate(PerMessageDeflate):
    """permessage-deflate whose inflated messages end at *limit* bytes with 1009, checked before more is inflated."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._left = limit

    def accept(self, offer: str) -> bool | str | None:
        """As the base class; an offer whose parameters are no numbers is declined instead of raising ValueError."""
        try:
            return super().accept(offer)
        except ValueError:
            return None

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        if opcode.iscontrol():
            # A control frame may stand inside a fragmented message, whose state it must leave alone.
            self._inbound_is_compressible = False
            return RsvBits(False, False, False)
        if opcode is not Opcode.CONTINUATION:
            self._left = self._limit
        return super().frame_inbound_header(proto, opcode, rsv, payload_length)

    def frame_inbound_payload_data(self, proto: FrameDecoder | FrameProtocol, data: bytes) -> bytes | CloseReason:
        if not self._inbound_compressed or not self._inbound_is_compressible:
            return data
        return self._inflate(data)

    def frame_inbound_complete(self, proto: FrameDecoder | FrameProtocol, fin: bool) -> bytes | CloseReason | None:
        if not fin or not self._inbound_is_compressible:
            return None
        if not self._inbound_compressed:
            self._inbound_compressed = None
            return None
        rest = self._inflate(b"\x00\x00\xff\xff")
        if self.client_no_context_takeover:
            self._decompressor = None
        self._inbound_compressed = None
        return rest

    def _inflate(self, data: bytes) -> bytes | CloseReason:
        assert self._decompressor is not None
        try:
            # One byte more than allowed: to be allowed to end exactly at the limit, and never to inflate further.
            inflated = self._decompressor.decompress(data, self._left + 1)
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        self._left -= len(inflated)
        return CloseReason.MESSAGE_TOO_BIG if self._left < 0 else inflated


def wants_websocket(request: h11.Request) -> bool:
    """Whether *request* asks for an upgrade to a WebSocket."""
    upgrade = connection = b""
    for name, value in request.headers:
        if name == b"upgrade":
            upgrade = value
        elif name == b"connection":
            connection += b"," + value
    tokens = {token.strip() for token in connection.lower().split(b",")}
    return upgrade.strip().lower() == b"websocket" and b"upgrade" in tokens and request.method == b"GET"


def joined(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """*headers* with the lists of a handshake on one line each, which means the same (RFC 9110, 5.3)."""
    lists: dict[bytes, bytes] = {}
    others = []
    for name, value in headers:
        if name in _LISTS:
            lists[name] = lists[name] + b", " + value if name in lists else value
        else:
            others.append((name, value))
    return others + list(lists.items())


def head_too_long(data: bytes, limit: int) -> bool:
    """Whether the request head that *data* begins with takes more than *limit* bytes, as far as can be said yet."""
    return len(data) > limit and _BLANK_LINE.search(data, 0, limit) is None


def request_fault(request: h11.Request) -> int | None:
    """The status with which a request is refused before an application sees it."""
    if request.http_version not in (b"1.1", b"1.0"):
        return 505  # among them the preface of HTTP/2
    if request.method == b"CONNECT":
        return 501
    if not request.target.startswith((b"/", b"http://", b"https://")) and (request.method, request.target) != (
        b"OPTIONS",
        b"*",
    ):
        return 400
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        return 400  # two lengths, or one that the version does not know: what smuggling is made of (RFC 9112, 6.1)
    return None


_BLANK_LINE = re.compile(rb"\n\r?\n")
_LISTS = (b"connection", b"sec-websocket-extensions", b"sec-websocket-protocol")
_HANDSHAKE = (b"upgrade", b"connection", b"origin", b"host")


def handshake_fault(request: h11.Request) -> int | None:
    """The status with which the upgrade to a WebSocket is refused (RFC 6455, 4.2.1)."""
    key = version = None
    for name, value in request.headers:
        if name.startswith(b"sec-websocket-") or name in _HANDSHAKE:
            if not value.isascii():
                return 400
            if name == b"sec-websocket-key":
                key = value
            elif name == b"sec-websocket-version":
                version = value
        elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return 400
    if request.http_version != b"1.1" or key is None:
        return 400
    if version != b"13":
        return 426
    try:
        return None if len(base64.b64decode(key, validate=True)) == 16 else 400
    except binascii.Error:
        return 400


_TIMEOUT = ("request_timeout", "The request took too long", True)
_REFUSALS: dict[int, tuple[type[HectorError] | tuple[str, str, bool], str]] = {
    400: (InvalidRequest, "The request is not well-formed, or not a handshake that RFC 6455 allows"),
    403: (Forbidden, "The application refused the WebSocket"),
    404: (NotFound, "Nothing is served under this name"),
    408: (_TIMEOUT, "The request was not complete in time"),
    426: (InvalidRequest, "WebSockets are spoken in version 13 only"),
    431: (PayloadTooLarge, "The head of the request is too large"),
    500: (HectorError, "An internal error; it has been logged"),
    501: (InvalidRequest, "The method or the transfer coding is not implemented"),
    503: (RateLimited, "No more connections are taken"),
    505: (InvalidRequest, "HTTP is spoken in the versions 1.0 and 1.1 only"),
}


def problem(status: int, request_id: str, detail: str = "") -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer that no application gives (RFC 9457), after which the connection ends."""
    kind, usual = _REFUSALS.get(status) or _REFUSALS[500 if status >= 500 else 400]
    code, title, retryable = kind if isinstance(kind, tuple) else (kind.code, kind.title, kind.retryable)
    body = encode(
        Problem(
            type=f"urn:hector:problem:{code}",
            title=title,
            status=status,
            detail=detail or usual,
            instance="",
            code=code,
            retryable=retryable,
            request_id=request_id,
        )
    )
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
        (b"x-request-id", request_id.encode()),
    ]
    if status == 426:
        headers += [(b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")]
    elif status == 503:
        headers.append((b"retry-after", b"1"))
    return headers, body


def problem_alone(status: int, request_id: str) -> bytes:
    """`problem` as the bytes of a whole response, for where no request is read."""
    headers, body = problem(status, request_id)
    head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode() + head + b"\r\n" + body
