"""Server-sent events: what is encoded, and that any split of a stream decodes to the same events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.sse import Decoder, Event, EventTooLarge, comment, encode


def decode(*parts: bytes) -> list[Event]:
    decoder = Decoder()
    return [event for part in parts for event in decoder.feed(part)]


def test_an_event_is_one_data_line_and_an_empty_line() -> None:
    assert encode(b'{"a":1}') == b'data: {"a":1}\n\n'


def test_the_id_comes_before_the_data() -> None:
    assert encode(b"x", id="task-1:7") == b"id: task-1:7\ndata: x\n\n"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_an_id_that_would_break_the_stream_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="event id"):
        encode(b"x", id=bad)


@pytest.mark.parametrize("data", [b"a\nb", b"a\r\nb", b"a\rb"])
def test_data_of_several_lines_cannot_inject_a_field(data: bytes) -> None:
    assert encode(data) == b"data: a\ndata: b\n\n"


def test_a_comment_is_no_event() -> None:
    assert decode(comment(), comment()) == []


def test_empty_data_is_an_event() -> None:
    assert decode(encode(b"")) == [Event("")]


STREAM = (
    b"\xef\xbb\xbf: hello\n\nid: 1\r\ndata: caf\xc3\xa9 \xe2\x82\xac\r\n\r\nevent: note\rdata:a\rdata: b\r\r"
    b"retry: 250\ndata\n\ndata:  two spaces\nid\nunknown: x\n\n: only a comment\n\nevent: nothing\n\n"
    b"data: \xf0\x9f\x98\x80\n\ndata: cut"
)
EVENTS = [
    Event("café €", "1"),
    Event("a\nb", "1", "note"),
    Event("", "1"),
    Event(" two spaces", ""),
    Event("😀", ""),
]


def test_all_line_ends_fields_and_the_byte_order_mark_are_understood() -> None:
    assert decode(STREAM) == EVENTS


def test_every_split_in_two_decodes_to_the_same_events() -> None:
    for cut in range(len(STREAM) + 1):
        assert decode(STREAM[:cut], STREAM[cut:]) == EVENTS


def test_byte_by_byte_decodes_to_the_same_events() -> None:
    assert decode(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


def test_an_event_is_given_out_at_its_empty_line_without_waiting_for_more() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: x\r\r") == [Event("x")]
    assert decoder.feed(b"\ndata: y\n\n") == [Event("y")]


def test_an_unfinished_event_is_not_given_out() -> None:
    assert decode(b"data: x\n") == []


def test_an_id_with_nul_is_ignored_and_an_id_stays_until_the_next() -> None:
    assert decode(b"id: a\ndata: 1\n\nid: b\0c\ndata: 2\n\n") == [Event("1", "a"), Event("2", "a")]


def test_the_last_event_id_moves_with_the_dispatch() -> None:
    decoder = Decoder()
    decoder.feed(b"id: 5\n")
    assert decoder.last_event_id == ""
    decoder.feed(b"\n")
    assert decoder.last_event_id == "5"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(b"3000", 3000), (b"3s", None), (b"", None), (b"-1", None), (b"9" * 5000, None)],
)
def test_retry_takes_digits_only(value: bytes, expected: int | None) -> None:
    decoder = Decoder()
    decoder.feed(b"retry: " + value + b"\n\n")
    assert decoder.retry == expected


def test_broken_utf8_becomes_replacement_characters_and_ends_no_stream() -> None:
    assert decode(b"data: a\xff\xc3\n\ndata: b\n\n") == [Event("a\ufffd\ufffd"), Event("b")]


@pytest.mark.parametrize("part", [b"data: " + b"x" * 99, b"data: x\n", b"x" * 30])
def test_an_endless_event_is_an_error_and_not_memory(part: bytes) -> None:
    decoder = Decoder(max_event=200)

    def feed_for_ever() -> None:
        for _ in range(100):
            decoder.feed(part)

    with pytest.raises(EventTooLarge):
        feed_for_ever()


def test_any_number_of_comments_is_no_large_event() -> None:
    decoder = Decoder(max_event=200)
    for _ in range(100):
        assert decoder.feed(b": keep-alive\n") == []
    assert decoder.feed(b"data: x\n\n") == [Event("x")]


def test_an_event_as_large_as_the_bound_passes() -> None:
    assert len(Decoder(max_event=200).feed(b"data: " + b"x" * 194 + b"\n\n")[0].data) == 194


@given(st.lists(st.binary(max_size=30)), st.integers(1, 20))
def test_what_is_encoded_is_decoded_whatever_the_pieces(payloads: list[bytes], size: int) -> None:
    stream = b"".join(encode(payload, id=str(i)) for i, payload in enumerate(payloads))
    events = decode(*(stream[i : i + size] for i in range(0, len(stream), size)))
    lines = [payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n") for payload in payloads]
    assert events == [Event(line.decode("utf-8", "replace"), str(i)) for i, line in enumerate(lines)]


@given(st.binary(max_size=200), st.integers(1, 20))
def test_garbage_in_any_pieces_decodes_as_garbage_in_one(stream: bytes, size: int) -> None:
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert decode(*pieces) == decode(stream)
