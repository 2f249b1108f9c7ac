"""The chunks of a task that this client started, over a WebSocket of its own."""

from __future__ import annotations

from trio_websocket import ConnectionClosed, WebSocketConnection

from hector_trio.client.bodies import decode_frame, encode, given, refused
from hector_trio.client.websocket import lost
from hector_trio.models import Chunk, Json


class ChunkStream:
    """The chunks of a task that this client started, until the final one. Made by ``Client.stream``.

    Iterating raises the task's refusal (SessionNotFound, SessionBusy, TaskExists, InvalidRequest, RateLimited …),
    StoreUnavailable when the server could not keep the task's log, and ConnectionFailed, with the Close frame's code,
    when the connection is lost before the final chunk. One task at a time may iterate.
    """

    def __init__(self, socket: WebSocketConnection, task_id: str, url: str) -> None:
        self.task_id = task_id
        self.last_seq = 0
        """The number of the last chunk that was given out."""
        self.final: Chunk | None = None
        """The final chunk, once it was given out: its ``status`` says how the task has ended."""
        self._socket = socket
        self._url = url
        self._refused = False

    def __aiter__(self) -> ChunkStream:
        return self

    async def __anext__(self) -> Chunk:
        while self.final is None and not self._refused:
            try:
                message = await self._socket.get_message()
            except ConnectionClosed as closed:
                raise lost(self._url, closed) from None
            chunk = decode_frame(message, self._url)
            if chunk is None or not self._is_next(chunk):
                continue
            if chunk.seq == 0:
                self._refused = True
                raise refused(chunk, self.task_id)
            self.last_seq = chunk.seq
            if chunk.final:
                self.final = chunk
            return chunk
        raise StopAsyncIteration

    async def cancel(self, reason: str | None = None) -> None:
        """Asks the server to cancel the run; go on iterating for what is left and the final ``done`` chunk.

        Does nothing after the final chunk. Raises: ConnectionFailed.
        """
        if self.final is None and not self._refused:
            await self._send(given(type="cancel", taskId=self.task_id, reason=reason))

    def _is_next(self, chunk: Chunk) -> bool:
        # A request that the server could not read is refused without a task's id: nothing else was sent here.
        return chunk.seq == 0 or (chunk.seq > self.last_seq and chunk.task_id == self.task_id)

    async def _send(self, frame: Json) -> None:
        try:
            await self._socket.send_message(encode(frame).decode())
        except ConnectionClosed as closed:
            raise lost(self._url, closed) from None
