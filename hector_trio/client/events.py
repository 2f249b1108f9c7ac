"""The chunks of a task that exists, read as server-sent events, over as many connections as it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import httpx2
import trio

from hector_trio import sse
from hector_trio.client.bodies import Control, check_next, decode_frame, refused
from hector_trio.client.errors import ConnectionFailed, UnexpectedAnswer, mapped, refusal
from hector_trio.client.limits import CLOSE_LIMIT, CONNECT_LIMIT, MAX_MESSAGE, RETRY_HELD, SILENCE
from hector_trio.client.reconnecting import Retry
from hector_trio.errors import Draining, HectorError
from hector_trio.models import Chunk

Connect = Callable[[int], AbstractAsyncContextManager[AsyncGenerator[bytes]]]


@asynccontextmanager
async def open_events(http: httpx2.AsyncClient, url: str, after: int, retry: Retry) -> AsyncIterator[EventChunks]:
    """See ``Client.events``."""
    async with AsyncExitStack() as connection:
        chunks = EventChunks(connection, partial(_connect, http, url), after, url, retry)
        await chunks._persist(chunks._open)
        yield chunks


@asynccontextmanager
async def _connect(http: httpx2.AsyncClient, url: str, after: int) -> AsyncIterator[AsyncGenerator[bytes]]:
    headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
    # The server says something every three seconds.
    timeout = httpx2.Timeout(connect=CONNECT_LIMIT, read=SILENCE, write=SILENCE, pool=None)
    request = http.build_request("GET", url, params={"after": str(after)}, headers=headers, timeout=timeout)
    with mapped(url):
        response = await http.send(request, stream=True)
    try:
        if response.status_code != 200:
            with mapped(url):
                raise refusal(response.status_code, response.headers, await response.aread(), url)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UnexpectedAnswer(f"{url} did not answer with an event stream")
        async with _parts_of(response) as parts:
            yield parts
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
    """The chunks of a task, each exactly once, until the final one. Made by ``Client.events``.

    A wait for a chunk may be cancelled: the next one has it. One task at a time may iterate.
    """

    def __init__(self, connection: AsyncExitStack, connect: Connect, after: int, url: str, retry: Retry) -> None:
        self.last_seq = after
        """The number of the last chunk that was given out: where ``events(after=…)`` may go on."""
        self.final: Chunk | None = None
        """The final chunk, once it was given out."""
        self._connection = connection
        self._connect = connect
        self._url = url
        self._retry = retry
        self._parts: AsyncGenerator[bytes] | None = None
        self._opened_at = 0.0
        self._decoder = sse.Decoder(MAX_MESSAGE)
        self._events: deque[sse.Event] = deque()

    def __aiter__(self) -> EventChunks:
        return self

    async def __anext__(self) -> Chunk:
        if self.final is not None:
            raise StopAsyncIteration
        while True:
            while not self._events:
                await self._persist(self._read)
            chunk = decode_frame(self._events.popleft().data, self._url)
            if isinstance(chunk, Control):
                raise UnexpectedAnswer(f"{self._url} sent what is no chunk")
            if chunk.seq > 0:
                break
            error = refused(chunk, chunk.task_id)
            if error.code != Draining.code:
                raise error
            # else the stream ends with that, and the next one goes on
        if not (chunk.final and chunk.seq <= self.last_seq):  # which is what an ended task says to one who has all
            check_next(chunk, self.last_seq, self._url)
        self._retry.progress()
        self.last_seq = chunk.seq
        if chunk.final:
            self.final = chunk
        return chunk

    async def _persist(self, step: Callable[[], Awaitable[None]]) -> None:
        """Does ``step``, on a new connection when one is lost. Raises: what cannot be mended."""
        while True:
            try:
                return await step()
            except HectorError as error:
                await self._connection.aclose()
                self._parts = None
                delay = self._retry.after(error)
            await trio.sleep(delay)

    async def _open(self) -> None:
        self._parts = await self._connection.enter_async_context(self._connect(self.last_seq))
        self._decoder = sse.Decoder(MAX_MESSAGE)
        self._opened_at = trio.current_time()
        self._retry.opened()

    async def _read(self) -> None:
        """What comes next, a part of an event or many."""
        if self._parts is None:
            await self._open()
        assert self._parts is not None
        try:
            with mapped(self._url):
                self._events += self._decoder.feed(await anext(self._parts))
        except StopAsyncIteration:
            raise ConnectionFailed(f"{self._url}: the stream ended too soon", url=self._url) from None
        except sse.EventTooLarge as error:
            raise UnexpectedAnswer(f"{self._url}: {error}") from None
        if trio.current_time() - self._opened_at >= RETRY_HELD:
            self._retry.progress()
