"""What is read and written without h11 is what h11 would have read and written."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.http1 import Ordinary, answer_head, ordinary

LIMIT = 65536


def parsed(data: bytes) -> tuple[Ordinary, h11.Connection]:
    """What h11 reads, all of it; it raises what it does not take."""
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(data)
    request = parser.next_event()
    assert isinstance(request, h11.Request)
    body = b""
    while isinstance(event := parser.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert parser.trailing_data == (b"", False)
    return Ordinary(data, request.method.decode(), request.target, list(request.headers), body), parser


PIECES = st.sampled_from(
    [
        *(b"GET", b"POST", b"HEAD", b"BREW", b"get", b" ", b"  ", b"/", b"/a?b=c", b"*", b"http://h/", b"/caf\xc3\xa9"),
        *(b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b": ", b":", b"\t", b"\0", b"\x7f", b"\x85"),
        *(b"Host: h", b"host:h", b"Host : h", b" folded", b"Content-Length: 3", b"content-length: 0", b"abc", b"abcd"),
        *(b"Content-Length: +3", b"Content-Length: 3, 3", b"Transfer-Encoding: chunked", b"Connection: close"),
        *(b"Connection: keep-alive", b"Expect: 100-continue", b"Upgrade: websocket", b"X: \xe9 y", b"X-Y:  z  ", b"X:"),
    ]
)
LINES = st.lists(
    st.sampled_from([b"Host: h", b"host:  h\t", b"Accept: */*", b"X:", b"X: \xe9 y\x0b", b"Content-Length: 3"]),
    max_size=4,
).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
ALMOST = st.builds(
    lambda line, fields, body: line + fields + b"\r\n" + body,
    st.sampled_from([b"GET / HTTP/1.1\r\n", b"POST /sessions?x HTTP/1.1\r\n", b"PUT / HTTP/1.0\r\n"]),
    LINES,
    st.sampled_from([b"", b"abc", b"abcd"]),
)


@given(st.one_of(ALMOST, st.lists(PIECES, max_size=14).map(b"".join)))
def test_what_is_taken_without_h11_is_what_h11_takes(data: bytes) -> None:
    request = ordinary(data, LIMIT)
    if request is not None:
        theirs, parser = parsed(data)
        assert request == theirs
        assert parser.our_state is h11.SEND_RESPONSE
        assert parser.their_state is h11.DONE  # not MUST_CLOSE: the connection may stay open


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /sessions/a?b=%20 HTTP/1.1\r\nUser-Agent: x/1 (y; z)\r\nHost: h:1\r\nConnection: Keep-Alive\r\n\r\n",
        b"POST /sessions HTTP/1.1\r\nhost:h\r\ncontent-length:  3 \r\n\r\nabc",
        b"DELETE /x HTTP/1.1\r\nHost: h\r\nX: caf\xc3\xa9\t!\r\nY:\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_ordinary_requests_are_taken(data: bytes) -> None:
    assert ordinary(data, LIMIT) == parsed(data)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: h\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: h\r\n\r\n",
        b"GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_everything_else_is_left_to_h11(data: bytes) -> None:
    assert ordinary(data, LIMIT) is None


def test_a_head_may_be_as_long_as_the_limit_and_no_longer() -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 100 + b"\r\n\r\n"
    assert ordinary(head, len(head)) is not None
    assert ordinary(head, len(head) - 1) is None


NAMES = st.sampled_from(
    [b"content-type", b"X-A", b"content-length", b"connection", b"host", b"transfer-encoding", b"x y"]
)
VALUES = st.sampled_from(
    [b"", b"3", b"0", b"a b", b"close", b"chunked", b" a", b"a ", b"a\r\nb: c", b"a\n", b"\xe9", b"\0"]
)


@given(
    st.sampled_from(["GET", "HEAD", "POST"]),
    st.sampled_from([200, 201, 204, 304, 404, 500]),
    st.lists(st.tuples(NAMES, VALUES), max_size=4),
)
def test_a_head_that_is_written_without_h11_is_what_h11_writes(
    method: str, status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    head = answer_head(method, status, headers)
    if head is not None:
        _, parser = parsed(b"%b / HTTP/1.1\r\nHost: h\r\n\r\n" % method.encode())
        assert head.data == parser.send(h11.Response(status_code=status, headers=headers))
        body = b"x" * head.size
        sent = parser.send(h11.Data(data=body)) if body else b""
        assert (sent or b"") + (parser.send(h11.EndOfMessage()) or b"") == body
        assert head.bodiless == (method == "HEAD" or status in (204, 304))
        assert parser.our_state is h11.DONE


def test_heads_of_one_length_are_written_and_others_left_to_h11() -> None:
    sized = [(b"content-type", b"text/plain"), (b"content-length", b"3")]
    head = answer_head("GET", 200, sized)
    assert head == (b"HTTP/1.1 200 \r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\n", 3, False)
    assert answer_head("HEAD", 200, sized) == (head.data, 0, True)
    assert answer_head("GET", 204, []) == (b"HTTP/1.1 204 \r\n\r\n", 0, True)
    assert answer_head("GET", 200, []) is None
    assert answer_head("GET", 200, [*sized, (b"connection", b"close")]) is None
    assert answer_head("GET", 200, [*sized, (b"x", b"y\r\nz: injected")]) is None
