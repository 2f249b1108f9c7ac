"""The chunks of a task that this client started: one stream of them over as many WebSockets as it takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio
from msgspec import UNSET

from hector_trio.client.bodies import content_of
from hector_trio.client.errors import ConnectionFailed, unwrapped
from hector_trio.client.exchange import Answer, Exchange, prompt_of
from hector_trio.client.limits import CLOSE_LIMIT, RETRY_HELD
from hector_trio.client.reconnecting import Retry
from hector_trio.client.websocket import Socket
from hector_trio.errors import HectorError, NotWaiting
from hector_trio.models import Chunk, Status

Connect = Callable[[], AbstractAsyncContextManager[Socket]]


class ChunkStream:
    """The chunks of a task that this client started, each exactly once, until the final one. Made by ``Client.stream``.

    A lost connection is made again, and goes on where it broke; that takes no doing and shows only in the time it
    takes. Adjacent text may come joined, from ``first_seq`` to ``seq``. A wait for a chunk may be cancelled: the next
    one has it. One task at a time may iterate.

    Iterating raises, once, the task's refusal (SessionNotFound, SessionBusy, TaskExists, InvalidRequest,
    RateLimited …), StoreUnavailable when the server could not keep the task's log, and ConnectionFailed, with the last
    cause and the last Close frame's code, when the connection cannot be mended: the code says so, or the limit is
    reached.
    """

    def __init__(self, exchange: Exchange, window: int, retry: Retry) -> None:
        self.task_id = exchange.task_id
        self.last_seq = 0
        """The number of the last chunk that was given out."""
        self.status: Status = "pending"
        """How it stands with the task, as far as chunks were given out: ``input_required`` when it asks something."""
        self.prompt: Any = None
        """What the task asks (text or any JSON) while it is ``input_required``."""
        self.final: Chunk | None = None
        """The final chunk, once it was given out: its ``status`` says how the task has ended."""
        self._exchange = exchange
        self._retry = retry
        self._arrived, self._chunks = trio.open_memory_channel[Chunk](2 * window)
        self._due = trio.Event()
        self._moved = trio.lowlevel.ParkingLot()
        self._failure: HectorError | None = None
        self._talking = False
        self._leaving = False
        self._ended = False
        """Nothing comes any more."""

    def __aiter__(self) -> ChunkStream:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._chunks.receive()
        except trio.EndOfChannel:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure from failure.__cause__
            raise StopAsyncIteration from None
        self.last_seq = chunk.seq
        asked = prompt_of(chunk)
        self.prompt = None if asked is UNSET else asked
        self.status = "running" if asked is UNSET else "input_required"
        if chunk.final:
            self.final = chunk
            self.status = "completed" if chunk.status is UNSET else chunk.status
        self._exchange.taken()
        if self._exchange.credit_due:
            self._due.set()
        return chunk

    async def cancel(self, reason: str | None = None) -> None:
        """Asks the server to cancel the run; go on iterating for what is left and the final ``done`` chunk.

        Where the connection is lost at the moment, the server is asked when it is there again. Does nothing after the
        final chunk.
        """
        self._exchange.cancel(reason)
        self._due.set()
        await trio.lowlevel.checkpoint()

    async def answer(self, content: Any) -> None:
        """Answers what the task asks (``prompt``), and returns when the server has accepted it; then iterate on.

        ``content`` is as for ``Client.stream``. A connection lost in between is no matter: it is taken once. Cancelled:
        it may still be sent. Raises: NotWaiting, InvalidRequest, RateLimited, Draining …, and what ends the stream.
        """
        if self._exchange.over or self._ended or self._exchange.answer is not None:
            raise NotWaiting(f"Task {self.task_id!r} does not wait for an answer", task_id=self.task_id)
        answer = Answer(content_of(content), self._exchange.reached)
        self._exchange.answer = answer
        self._due.set()
        try:
            while not answer.settled and not self._ended:
                await self._moved.park()
        finally:
            self._exchange.answer = None
        if answer.refusal is not None:
            raise answer.refusal
        if not answer.settled and self._failure is not None:
            raise self._failure

    async def detach(self) -> None:
        """Stops following, so that leaving does not cancel the task; it runs on. Returns when the server knows it.

        What has come may still be iterated. Raises: what ends the stream.
        """
        self._exchange.detach()
        self._due.set()
        while not self._ended:
            await self._moved.park()
        if not self._exchange.over and self._failure is not None:
            raise self._failure

    # --- the connections

    async def _keep(self, connect: Connect, scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        """Until the end: a connection, and whenever it is lost, another. Starts with the first."""
        opened = False
        try:
            with scope:
                while not self._leaving:
                    try:
                        async with connect() as socket:
                            self._retry.opened()
                            if not opened:
                                task_status.started()
                                opened = True
                            self._talking = True
                            try:
                                await self._converse(socket)
                            finally:
                                self._talking = False
                                self._moved.unpark_all()
                            return
                    except HectorError as error:
                        self._exchange.disconnected()
                        if self._exchange.over:
                            raise
                        delay = self._retry.after(error)
                    await trio.sleep(delay)
        except HectorError as error:
            if not opened:
                raise
            self._failure = error
        finally:
            self._ended = True
            self._exchange.disconnected()
            self._arrived.close()
            self._moved.unpark_all()

    async def _converse(self, socket: Socket) -> None:
        """One connection: what is due is said, what comes is taken. Returns after the final chunk, or to leave.

        Raises: ConnectionFailed, and the server's refusals.
        """
        attached_at: float | None = None
        refusal: HectorError | None = None
        self._exchange.connected(self._chunks.statistics().current_buffer_used)
        self._due.set()
        with unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._speak, socket)
                try:
                    while not self._exchange.over:
                        chunk = self._exchange.take(await socket.receive())
                        if chunk is not None and not self._leaving:
                            self._retry.progress()
                            await self._arrived.send(chunk)
                        if attached_at is None and self._exchange.attached:
                            attached_at = trio.current_time()
                        self._due.set()
                        self._moved.unpark_all()
                except HectorError as error:
                    if self._exchange.over:
                        refusal = error
                    elif not self._leaving:
                        raise
                    self._exchange.disconnected()
                    self._due.set()
                finally:
                    if attached_at is not None and socket.heard_at - attached_at >= RETRY_HELD:
                        self._retry.progress()
        if refusal is not None:
            raise refusal

    async def _speak(self, socket: Socket) -> None:
        """Says what is due, in whole frames, whoever is cancelled meanwhile; in the end hangs up."""
        try:
            while True:
                self._due = trio.Event()
                for frame in self._exchange.frames():
                    await socket.send(frame)
                parting = self._leaving and not (self._exchange.attached and self._exchange.cancelling)
                if self._exchange.over or parting:
                    with trio.move_on_after(CLOSE_LIMIT):
                        await socket.aclose()
                    return
                await self._due.wait()
        except HectorError:
            pass  # who listens hears of it, after what has come before

    async def _leave(self, *, cancels: bool, cancel: Callable[[], Awaitable[object]]) -> None:
        """Ends the task, if leaving is to do that, and hangs up. The caller sets a limit."""
        self._leaving = True
        cancels = cancels and not self._exchange.over and self._failure is None
        if cancels:
            self._exchange.cancel()
        self._due.set()
        while self._talking:
            await self._moved.park()
        if cancels and self._exchange.cancelling and not self._exchange.over:
            await self._cancel_otherwise(cancel)

    @staticmethod
    async def _cancel_otherwise(cancel: Callable[[], Awaitable[object]]) -> None:
        """The task may not be there yet, or the server out of reach: then its grace ends it."""
        for _ in range(2):  # the first may have taken a connection that is as dead
            try:
                await cancel()
                return
            except ConnectionFailed:
                pass
            except HectorError:
                return


@asynccontextmanager
async def open_stream(
    connect: Connect,
    exchange: Exchange,
    window: int,
    retry: Retry,
    *,
    cancels: bool,
    cancel: Callable[[], Awaitable[object]],
) -> AsyncIterator[ChunkStream]:
    """See ``Client.stream``. ``cancels``: leaving does, by ``cancel`` where there is no connection to say it on."""
    chunks = ChunkStream(exchange, window, retry)
    scope = trio.CancelScope()
    with unwrapped():
        async with trio.open_nursery() as nursery:

            async def keep(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                await chunks._keep(connect, scope, task_status)

            await nursery.start(keep)
            # A cancel from outside reaches the block, and the connection outlives that for as long as it takes to tell
            # the server, which has a limit.
            scope.shield = True
            try:
                yield chunks
            finally:
                with trio.move_on_after(CLOSE_LIMIT, shield=True):
                    await chunks._leave(cancels=cancels, cancel=cancel)
                scope.cancel()
