"""Frames, bounded compression and refusals, checked with another implementation of the protocol as the peer."""

from __future__ import annotations

import json
import struct
import tracemalloc
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameProtocol

from hector_trio.frames import (
    BINARY,
    CLOSE,
    NO_STATUS,
    PING,
    PONG,
    TEXT,
    BoundedDeflate,
    close,
    frame,
    frames,
    handshake_fault,
    head_too_long,
    joined,
    plain_frame,
    problem,
    problem_alone,
    request_fault,
    wants_websocket,
)

SIZES = [0, 1, 125, 126, 127, 65535, 65536, 70000]


def read_by_a_client(data: bytes) -> list[Event]:
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(data)
    return list(client.events())


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_client_reads_a_message_of_any_length(size: int) -> None:
    assert read_by_a_client(frame(TEXT, b"x" * size)) == [TextMessage("x" * size)]
    assert read_by_a_client(frame(BINARY, b"\x00" * size)) == [BytesMessage(bytearray(size))]


def test_a_client_reads_pings_and_pongs() -> None:
    assert read_by_a_client(frame(PING, b"a") + frame(PONG, b"b")) == [Ping(b"a"), Pong(b"b")]


@given(st.lists(st.sampled_from(SIZES), max_size=6))
def test_many_frames_in_one_piece_are_the_same_bytes_as_one_by_one(sizes: list[int]) -> None:
    payloads = [b"x" * size for size in sizes]
    assert frames(TEXT, payloads) == b"".join(frame(TEXT, payload) for payload in payloads)


@given(st.sampled_from([1000, 1001, 1008, 1009, 1011, 1012, 1013, 3000, 4101, 4999]), st.text(max_size=200))
def test_a_client_reads_the_code_and_as_much_of_the_reason_as_fits_whole_characters(code: int, reason: str) -> None:
    data = close(code, reason)
    assert data[0] == CLOSE
    assert len(data) <= 2 + 125
    (event,) = read_by_a_client(data)
    assert isinstance(event, CloseConnection)
    assert event.code == code
    kept = event.reason or ""
    assert reason.startswith(kept)
    assert kept == reason or len((kept + reason[len(kept)]).encode()) > 123


def test_a_reason_that_is_no_unicode_is_sent_all_the_same() -> None:
    assert read_by_a_client(close(1000, "a\ud800b")) == [CloseConnection(1000, "a?b")]


def test_a_close_without_a_status_has_no_payload_and_no_reason() -> None:
    assert close(NO_STATUS, "not sent") == bytes((CLOSE, 0))
    assert read_by_a_client(close(NO_STATUS)) == [CloseConnection(1005, "")]


# --- bounded compression ----------------------------------------------------------------------------------------------


class Pair:
    """A client that compresses, and a server that takes messages of up to ``limit`` inflated bytes."""

    def __init__(self, limit: int, offer: str = "permessage-deflate") -> None:
        self.theirs = PerMessageDeflate()
        self.ours = BoundedDeflate(limit)
        accepted = self.ours.accept(offer)
        assert isinstance(accepted, str)
        self.theirs.finalize(f"permessage-deflate; {accepted}")
        self.client = Connection(ConnectionType.CLIENT, [self.theirs])
        self.server = Connection(ConnectionType.SERVER, [self.ours])

    def deliver(self, *events: Event, step: int = 1 << 20) -> list[Event]:
        """What the server reads of what the client sends, in pieces of ``step`` bytes."""
        data = b"".join(self.client.send(event) for event in events)
        read: list[Event] = []
        for start in range(0, len(data), step):
            self.server.receive_data(data[start : start + step])
            read += self.server.events()
        return read

    def text(self, *events: Event, step: int = 1 << 20) -> str:
        read = self.deliver(*events, step=step)
        assert all(isinstance(event, TextMessage) for event in read)
        return "".join(event.data for event in read if isinstance(event, TextMessage))


def refusal(events: list[Event]) -> int:
    """The code with which the server ends the connection because of the last thing it read."""
    assert isinstance(events[-1], CloseConnection)
    return events[-1].code


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_message_of_exactly_the_limit_is_inflated_and_one_byte_more_is_1009(step: int) -> None:
    pair = Pair(1000)
    assert pair.text(TextMessage("x" * 1000), step=step) == "x" * 1000
    assert refusal(pair.deliver(TextMessage("x" * 1001), step=step)) == CloseReason.MESSAGE_TOO_BIG


def test_the_limit_counts_the_fragments_of_a_message_together() -> None:
    fragments = [TextMessage("x" * 500, message_finished=False), TextMessage("y" * 500)]
    assert Pair(1000).text(*fragments) == "x" * 500 + "y" * 500
    assert refusal(Pair(999).deliver(*fragments)) == CloseReason.MESSAGE_TOO_BIG


@pytest.mark.parametrize("offer", ["permessage-deflate", "permessage-deflate; client_no_context_takeover"])
def test_each_message_has_the_whole_limit(offer: str) -> None:
    pair = Pair(1000, offer)
    for n in range(20):
        text = f"{n} " * 300
        assert pair.text(TextMessage(text)) == text


def test_a_control_frame_inside_a_message_is_read_and_disturbs_nothing() -> None:
    pair = Pair(1000)
    read = pair.deliver(
        TextMessage("x" * 400, message_finished=False),
        Ping(b"there?"),
        TextMessage("y" * 400, message_finished=False),
        Pong(b""),
        TextMessage("z" * 200),
        TextMessage("next"),
    )
    assert [event for event in read if not isinstance(event, Message)] == [Ping(b"there?"), Pong(b"")]
    text = "".join(event.data for event in read if isinstance(event, TextMessage))
    assert text == "x" * 400 + "y" * 400 + "z" * 200 + "next"


def test_a_bomb_ends_without_being_inflated() -> None:
    pair = Pair(1000)
    data = pair.client.send(TextMessage("x" * (8 << 20)))
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        pair.server.receive_data(data)
        read = list(pair.server.events())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refusal(read) == CloseReason.MESSAGE_TOO_BIG
    assert peak < 1 << 20


def test_what_is_no_deflate_stream_is_1007() -> None:
    pair = Pair(1000)
    masked = FrameProtocol(client=True, extensions=[])
    data = bytearray(masked.send_data(b"\xff" * 20, fin=True))
    data[0] |= 0x40
    pair.server.receive_data(bytes(data))
    assert refusal(list(pair.server.events())) == CloseReason.INVALID_FRAME_PAYLOAD_DATA


def test_a_message_that_is_not_compressed_passes_between_two_that_are() -> None:
    pair = Pair(1000)
    plain = Connection(ConnectionType.CLIENT)
    read = pair.deliver(TextMessage("one "))
    pair.server.receive_data(plain.send(TextMessage("two ")))
    read += list(pair.server.events())
    read += pair.deliver(TextMessage("three"))
    assert [event.data for event in read if isinstance(event, TextMessage)] == ["one ", "two ", "three"]


@pytest.mark.parametrize(
    "offer",
    [
        "permessage-deflate; client_max_window_bits=many",
        "permessage-deflate; server_max_window_bits=",
        "permessage-deflate; client_max_window_bits=99",
        "permessage-deflate; server_max_window_bits=-1",
    ],
)
def test_an_offer_that_makes_no_sense_is_declined(offer: str) -> None:
    extension = BoundedDeflate(1000)
    assert extension.accept(offer) is None
    assert not extension.enabled()


@pytest.mark.parametrize("bits", [9, 12, 15])
def test_a_smaller_window_is_taken_and_used(bits: int) -> None:
    pair = Pair(10_000, f"permessage-deflate; client_max_window_bits={bits}; server_max_window_bits={bits}")
    for text in ("ab" * 2000, "xyz" * 1000):
        assert pair.text(TextMessage(text)) == text


# --- requests ---------------------------------------------------------------------------------------------------------

UPGRADE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


def request(
    headers: dict[str, str | bytes | None], method: str = "GET", target: str = "/", version: str = "1.1"
) -> h11.Request:
    """A request with the headers of an upgrade, of which some are others or (``None``) missing."""
    both: dict[str, str | bytes | None] = {**UPGRADE, **headers}
    given = [
        (name.encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in both.items()
        if value is not None
    ]
    return h11.Request(method=method, target=target, headers=given, http_version=version)


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({}, True),
        ({"Upgrade": "WebSocket"}, True),
        ({"Connection": "keep-alive, upgrade"}, True),
        ({"Connection": "keep-alive"}, False),
        ({"Connection": "upgraded"}, False),
        ({"Connection": None}, False),
        ({"Upgrade": None}, False),
        ({"Upgrade": "h2c"}, False),
        ({"Upgrade": "websocket2"}, False),
    ],
)
def test_an_upgrade_is_asked_for_with_both_headers(headers: dict[str, str | bytes | None], wanted: bool) -> None:
    assert wants_websocket(request(headers)) is wanted


def test_only_a_get_asks_for_a_websocket() -> None:
    assert not wants_websocket(request({}, method="POST"))


def test_the_upgrade_may_be_named_in_any_of_several_connection_headers() -> None:
    lines = [("Host", "x"), ("Connection", "keep-alive"), ("Connection", "Upgrade"), ("Upgrade", "websocket")]
    assert wants_websocket(h11.Request(method="GET", target="/", headers=lines))


@pytest.mark.parametrize(
    ("method", "target", "version", "headers", "status"),
    [
        ("GET", "/", "1.1", {}, None),
        ("GET", "http://localhost/a", "1.1", {}, None),
        ("GET", "https://localhost/a", "1.1", {}, None),
        ("GET", "/", "1.0", {}, None),
        ("OPTIONS", "*", "1.1", {}, None),
        ("POST", "/", "1.1", {"Content-Length": "3"}, None),
        ("POST", "/", "1.1", {"Transfer-Encoding": "chunked"}, None),
        ("PRI", "*", "2.0", {}, 505),
        ("GET", "/", "0.9", {}, 505),
        ("CONNECT", "localhost:80", "1.1", {}, 501),
        ("GET", "*", "1.1", {}, 400),
        ("GET", "localhost:80", "1.1", {}, 400),
        ("GET", "ftp://localhost/", "1.1", {}, 400),
        ("POST", "/", "1.1", {"Transfer-Encoding": "chunked", "Content-Length": "3"}, 400),
        ("POST", "/", "1.0", {"Transfer-Encoding": "chunked"}, 400),
    ],
)
def test_a_request_that_no_application_should_see_has_its_status(
    method: str, target: str, version: str, headers: dict[str, str | bytes | None], status: int | None
) -> None:
    assert request_fault(request(headers, method, target, version)) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, None),
        ({"Content-Length": "0"}, None),
        ({"Sec-WebSocket-Key": None}, 400),
        ({"Sec-WebSocket-Key": "dG9vIHNob3J0"}, 400),
        ({"Sec-WebSocket-Key": "not base64 at all!!!!!!"}, 400),
        ({"Sec-WebSocket-Key": b"\xff" * 24}, 400),
        ({"Sec-WebSocket-Version": None}, 426),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": "13, 8"}, 426),
        ({"Content-Length": "5"}, 400),
        ({"Transfer-Encoding": "chunked"}, 400),
        ({"Origin": b"http://\xe4"}, 400),
        ({"Sec-WebSocket-Protocol": b"\xff"}, 400),
        ({"User-Agent": b"\xff"}, None),
    ],
)
def test_a_handshake_is_accepted_or_refused_as_the_rfc_says(
    headers: dict[str, str | bytes | None], status: int | None
) -> None:
    assert handshake_fault(request(headers)) == status


def test_a_handshake_needs_http_1_1() -> None:
    assert handshake_fault(request({}, version="1.0")) == 400


def test_the_sizes_tested_stand_on_both_sides_of_every_form_of_the_length() -> None:
    heads = [len(frame(TEXT, b"x" * size)) - size for size in SIZES]
    assert heads == sorted(heads)
    assert {after - before for before, after in pairwise(heads)} == {0, 2, 6}


def test_the_lists_of_a_handshake_are_joined_in_order_and_all_else_stays() -> None:
    headers = [(b"connection", b"Upgrade"), (b"x", b"1"), (b"connection", b"keep-alive"), (b"x", b"2"), (b"host", b"a")]
    assert sorted(joined(headers)) == [
        (b"connection", b"Upgrade, keep-alive"), (b"host", b"a"), (b"x", b"1"), (b"x", b"2"),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n"])
def test_a_head_is_too_long_once_its_end_is_not_within_the_limit(end: bytes) -> None:
    head = b"a" * 10 + end
    assert not head_too_long(head, len(head))
    assert not head_too_long(head + b"body" * 100, len(head))
    assert head_too_long(head, len(head) - 1)
    assert not head_too_long(b"a" * 10, 10)
    assert head_too_long(b"a" * 11, 10)


@pytest.mark.parametrize("status", [400, 403, 404, 408, 426, 431, 499, 500, 501, 502, 503, 505])
def test_a_refusal_is_a_problem_of_its_status(status: int) -> None:
    headers, body = problem(status, "id")
    told = json.loads(body)
    assert (told["status"], told["requestId"], told["instance"]) == (status, "id", "")
    assert told["retryable"] is (status in (408, 503))
    assert (b"x-request-id", b"id") in headers
    assert json.loads(problem(status, "id", "why")[1])["detail"] == "why"


def test_a_refusal_alone_is_a_response_that_a_client_understands() -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    client.receive_data(problem_alone(503, "id"))
    response, data, end = (client.next_event() for _ in range(3))
    assert isinstance(response, h11.Response)
    assert (response.status_code, dict(response.headers)[b"retry-after"]) == (503, b"1")
    assert isinstance(data, h11.Data)
    assert json.loads(bytes(data.data))["code"] == "rate_limited"
    assert isinstance(end, h11.EndOfMessage)


@given(
    first=st.sampled_from([0x01, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A, 0x8B, 0xC1, 0x91]),
    payload=st.binary(max_size=300),
    mask=st.binary(min_size=4, max_size=4),
    masked=st.sampled_from([True, True, True, False]),
    longer=st.sampled_from([False, False, True]),
    cut=st.integers(0, 12),
    before=st.binary(max_size=3),
)
def test_a_plain_frame_is_read_as_the_parser_reads_it_or_left_to_it(
    first: int, payload: bytes, mask: bytes, masked: bool, longer: bool, cut: int, before: bytes
) -> None:
    bit = 0x80 if masked else 0
    size = len(payload)
    head = bytes((first, bit | size)) if size < 126 and not longer else struct.pack("!BBH", first, bit | 126, size)
    body = bytes(b ^ mask[i % 4] for i, b in enumerate(payload)) if masked else payload
    data = head + (mask if masked else b"") + body
    data = data[: len(data) - cut] if cut < 6 else data
    found = plain_frame(before + data + b"rest", len(before), 250)
    if cut < 6 and cut:
        found = plain_frame(before + data, len(before), 250)
    if found is None:
        return
    parser = Connection(ConnectionType.SERVER)
    parser.receive_data(data)
    (event,) = parser.events()
    opcode, end, plain = found
    assert end == len(before) + len(data)
    assert len(plain) <= 250
    match event:
        case TextMessage():
            assert (opcode, plain.decode()) == (TEXT, event.data)
            assert event.message_finished
        case Ping():
            assert (opcode, plain) == (PING, bytes(event.payload))
        case Pong():
            assert (opcode, plain) == (PONG, bytes(event.payload))
        case CloseConnection():
            if parser.state is ConnectionState.REMOTE_CLOSING:
                assert opcode == CLOSE
                assert (int.from_bytes(plain) if plain else NO_STATUS) == event.code
            else:  # what it says is no text, which whoever takes the frame has to look at
                assert opcode == TEXT
                with pytest.raises(UnicodeDecodeError):
                    plain.decode()
        case _:
            raise AssertionError(event)


@pytest.mark.parametrize("text", ["", "x", "é" * 60, "x" * 125, "x" * 126, "x" * 65535])
def test_a_usual_text_is_a_plain_frame(text: str) -> None:
    payload = text.encode()
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else struct.pack("!BBH", 0x81, 0xFE, size)
    mask = b"\x01\x80\xff\x00"
    data = head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
    assert plain_frame(data, 0, 1 << 20) == (TEXT, len(data), payload)
