"""Streams of A2A as server-sent events: what leaves together, and that nothing is left open."""

from __future__ import annotations

import trio

from hector_trio.a2a import errors
from hector_trio.a2a import types as a2a
from hector_trio.transports.a2a_edge import ServerSentEvents, refusal_headers, status_reply
from hector_trio.transports.a2a_stream import Event


class Given:
    """Events as a test gives them."""

    def __init__(self, *given: list[Event] | errors.A2AError) -> None:
        self.given = list(given)
        self.closed = 0

    def __aiter__(self) -> Given:
        return self

    async def __anext__(self) -> list[Event]:
        await trio.lowlevel.checkpoint()
        if not self.given:
            raise StopAsyncIteration
        first = self.given.pop(0)
        if isinstance(first, errors.A2AError):
            raise first
        return first

    def nudge(self) -> None:
        self.given.append([])

    async def aclose(self) -> None:
        self.closed += 1


def event(n: int) -> Event:
    return Event(str(n), a2a.StreamResponse(message=a2a.Message(str(n), "ROLE_AGENT", [a2a.Part(text="x")])))


def failed(error: errors.A2AError) -> bytes:
    return b"event: error\n\n"


async def test_what_is_ready_leaves_together_and_silence_is_a_comment() -> None:
    given = Given([event(1), event(2)], [], [event(3)])
    stream = ServerSentEvents(given, a2a.encode, failed)
    pieces = [piece async for piece in stream]
    assert [piece.count(b"\ndata: ") for piece in pieces] == [2, 0, 1]
    assert pieces[0].startswith(b'id: 1\ndata: {"message":')
    assert pieces[1] == b":\n\n"
    await stream.aclose()
    assert given.closed == 1


async def test_an_error_in_the_middle_is_the_last_event() -> None:
    stream = ServerSentEvents(Given([event(1)], errors.UnavailableError("no"), [event(2)]), a2a.encode, failed)
    pieces = [piece async for piece in stream]
    assert len(pieces) == 2
    assert pieces[1] == b"event: error\n\n"


def test_a_refusal_says_when_to_come_back_and_how_to_show_who_one_is() -> None:
    assert refusal_headers(errors.UnavailableError("x", retry_after=7), 503) == {"Retry-After": "7"}
    assert refusal_headers(errors.ResourceExhaustedError("x"), 429) == {"Retry-After": "1"}
    reply = status_reply(errors.UnauthenticatedError("who?"))
    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
