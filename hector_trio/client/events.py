"""The chunks of a task that exists, read as server-sent events."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx2
import trio

from hector_trio import sse
from hector_trio.client.bodies import decode_frame, refused
from hector_trio.client.errors import ConnectionFailed, UnexpectedAnswer, mapped, refusal
from hector_trio.client.limits import CLOSE_LIMIT, MAX_MESSAGE
from hector_trio.models import Chunk


@asynccontextmanager
async def open_events(http: httpx2.AsyncClient, url: str, after: int) -> AsyncIterator[EventChunks]:
    """See ``Client.events``."""
    headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
    request = http.build_request("GET", url, params={"after": str(after)}, headers=headers)
    with mapped(url):
        response = await http.send(request, stream=True)
    try:
        if response.status_code != 200:
            with mapped(url):
                raise refusal(response.status_code, response.headers, await response.aread(), url)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UnexpectedAnswer(f"{url} did not answer with an event stream")
        async with _parts_of(response) as parts:
            yield EventChunks(parts, url)
    finally:
        with trio.move_on_after(CLOSE_LIMIT, shield=True):
            await response.aclose()


@asynccontextmanager
async def _parts_of(response: httpx2.Response) -> AsyncIterator[AsyncGenerator[bytes]]:
    """The body as it arrives.

    Leaving before its end reads on under a cancel, so that httpx2's chain of generators unwinds here and now; closing
    the outermost would leave the inner ones to the garbage collector.
    """
    parts = response.aiter_raw()
    try:
        yield parts
    finally:
        with trio.CancelScope(shield=True) as leaving, suppress(httpx2.HTTPError):
            leaving.cancel()
            async for _ in parts:
                pass


class EventChunks:
    """The chunks of a task, read as server-sent events, until the final one. Made by ``Client.events``."""

    def __init__(self, parts: AsyncGenerator[bytes], url: str) -> None:
        self.last_seq = 0
        """The number of the last chunk that was given out: where ``events(after=…)`` may go on."""
        self.final: Chunk | None = None
        """The final chunk, once it was given out."""
        self._parts = parts
        self._url = url
        self._decoder = sse.Decoder(MAX_MESSAGE)
        self._events: deque[sse.Event] = deque()

    def __aiter__(self) -> EventChunks:
        return self

    async def __anext__(self) -> Chunk:
        if self.final is not None:
            raise StopAsyncIteration
        while not self._events:
            try:
                with mapped(self._url):
                    part = await anext(self._parts)
                self._events += self._decoder.feed(part)
            except StopAsyncIteration:
                raise ConnectionFailed(f"{self._url}: the stream ended too soon", url=self._url) from None
            except sse.EventTooLarge as error:
                raise UnexpectedAnswer(f"{self._url}: {error}") from None
        chunk = decode_frame(self._events.popleft().data, self._url)
        if chunk is None:
            raise UnexpectedAnswer(f"{self._url} sent what is no chunk")
        if chunk.seq == 0:
            raise refused(chunk, chunk.task_id)
        self.last_seq = chunk.seq
        if chunk.final:
            self.final = chunk
        return chunk
