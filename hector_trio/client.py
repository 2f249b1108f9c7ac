"""The Python client, on Trio: sessions and tasks over REST, chunks over the WebSocket or server-sent events.

::

    async with Client("http://127.0.0.1:8080") as client:
        session = await client.create_session("assistant")
        async with client.stream("assistant", "Hello", session_id=session.session_id) as chunks:
            async for chunk in chunks:
                print(chunk.content if chunk.chunk_type == "text" else "", end="")

A refusal by the server raises the error of ``hector_trio.errors`` that has its code (``AgentNotFound``,
``SessionBusy`` …), or ``RemoteError`` where this client does not know the code. A server that cannot be reached, or a
connection that is lost, raises ``ConnectionFailed``. A task that *fails* raises nothing: it is a task with an
``error``, a stream whose last chunk is one.

Deadlines are the caller's: ``with trio.fail_after(30): await client.run(...)``.
"""

from __future__ import annotations

import ipaddress
import math
import os
import ssl
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlsplit

import h11
import httpx2
import msgspec
import trio
from msgspec import UNSET, Struct, UnsetType
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream
from wsproto.utilities import ProtocolError

from hector_trio import sse
from hector_trio.errors import FieldError, HectorError, InvalidRequest, OutsideError, RunError
from hector_trio.models import (
    AgentCard,
    AgentList,
    Chunk,
    Content,
    Json,
    Message,
    MessageList,
    Session,
    SessionList,
    Status,
    Task,
    TaskList,
)

CONNECT_LIMIT: Final = 10.0
"""Seconds that connecting, and each handshake, may take."""

ANSWER_LIMIT: Final = 60.0
"""Seconds without a byte of an answer, except for one that waits for the end of a task."""

CLOSE_LIMIT: Final = 2.0
"""Seconds that leaving a stream waits for the server's Close frame."""

UNREAD_CHUNKS: Final = 256
"""Chunks of a stream that wait here for a reader that is busy; beyond them the server waits, and at last hangs up."""

MAX_MESSAGE: Final = 16 << 20
"""Bytes of one chunk as JSON."""

PAGE_SIZE: Final = 100

OnDisconnect = Literal["cancel", "continue"]
T = TypeVar("T")


class TaskOptions(TypedDict, total=False):
    """What ``Client.run``, ``submit`` and ``stream`` take by keyword; what is left out or None is up to the server."""

    session_id: str | None
    """The conversation that the task belongs to; without one it stands alone."""
    task_id: str | None
    """The task's id. Naming a running task with the same request follows it; naming an ended one starts a new task."""
    parameters: Json | None
    """What the agent understands of it, such as ``temperature``."""
    metadata: Json | None
    """Goes into the task's context, for the agent."""
    user_id: str | None
    """On whose behalf, for the agent."""
    timeout_seconds: float | None
    """After which the server ends the task as failed."""
    multitask: Literal["enqueue", "reject", "interrupt"] | None
    """If another task has the session's turn: wait (the default), SessionBusy, or cancel that one."""


# --- errors -----------------------------------------------------------------------------------------------------------


class ConnectionFailed(OutsideError):
    """The server cannot be reached, or the connection was lost before the answer was complete.

    ``url`` is what was asked; ``close_code`` and ``close_reason`` are those of the WebSocket's Close frame (1006: there
    was none), ``None`` where no WebSocket was open. What was being asked for may have happened, or may still happen.
    """

    code = "connection_failed"
    title = "The server cannot be reached"
    retryable = True

    def __init__(
        self, detail: str, *, url: str, close_code: int | None = None, close_reason: str | None = None
    ) -> None:
        super().__init__(detail)
        self.url = url
        self.close_code = close_code
        self.close_reason = close_reason


class UnexpectedAnswer(OutsideError):
    """What came back is not what a hector server answers."""

    code = "unexpected_answer"
    title = "The answer is not that of a hector server"


class RemoteError(HectorError):
    """A refusal with a code that this client does not know: see ``code``, ``status`` (of HTTP, 0 in a stream)."""

    def __init__(self, code: str, detail: str, *, status: int, retryable: bool = False, **more: Any) -> None:
        super().__init__(detail, **more)
        # On the instance, where the classes of the tree have them on the class.
        self.__dict__.update(code=code, retryable=retryable)
        self.status = status


def _tree(root: type[HectorError]) -> Iterator[type[HectorError]]:
    for each in root.__subclasses__():
        if not issubclass(each, RunError | RemoteError) and "code" in each.__dict__:
            yield each
        yield from _tree(each)


_CLASSES: Final = {each.code: each for each in _tree(HectorError) if each is not ConnectionFailed}


class _Problem(Struct):
    """A problem as far as it can be read; another program's may lack anything."""

    code: str
    detail: str = ""
    title: str = ""
    retryable: bool = False
    request_id: str = msgspec.field(default="", name="requestId")
    task_id: str | None = msgspec.field(default=None, name="taskId")
    errors: tuple[FieldError, ...] = ()


def _error(code: str, detail: str, *, status: int, retryable: bool, **more: Any) -> HectorError:
    known = _CLASSES.get(code)
    if known is None:
        return RemoteError(code, detail, status=status, retryable=retryable, **more)
    return known(detail, **more)


def _refusal(status: int, headers: Mapping[str, str], body: bytes, url: str) -> HectorError:
    """The error that an HTTP answer with ``status`` stands for."""
    seconds = headers.get("retry-after", "")
    retry_after = int(seconds) if seconds.isdecimal() and len(seconds) < 9 else None
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.DecodeError, RecursionError):
        # Not from a hector server: a proxy before it, or another program.
        what = f"{url} answered {status}"
        return RemoteError(f"http_{status}", what, status=status, retryable=status in (429, 502, 503, 504))
    error = _error(
        problem.code,
        problem.detail or problem.title or problem.code,
        status=status,
        retryable=problem.retryable,
        errors=problem.errors,
        retry_after=retry_after,
        task_id=problem.task_id,
    )
    if problem.request_id:
        error.add_note(f"request {problem.request_id}")
    return error


def _why(error: BaseException) -> str:
    """The reason at the bottom of a failed connection, in the system's words."""
    seen: list[BaseException] = []
    queue: deque[BaseException | None] = deque([error])
    while queue:
        each = queue.popleft()
        if each is None or each in seen:
            continue
        seen.append(each)
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted ({each.verify_message})"
        if isinstance(each, OSError) and each.strerror:
            named = isinstance(each.errno, int) and each.errno > 0  # else it is getaddrinfo's, with words of its own
            return os.strerror(each.errno or 0) if named else each.strerror
        queue += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        queue += (each.__cause__, each.__context__)
    return str(error) or type(error).__name__


@contextmanager
def _mapped(url: str) -> Iterator[None]:
    """httpx2's errors as ours."""
    try:
        yield
    except httpx2.TimeoutException:
        raise ConnectionFailed(f"Cannot reach {url}: no answer in time", url=url) from None
    except httpx2.TransportError as error:
        raise ConnectionFailed(f"Cannot reach {url}: {_why(error)}", url=url) from error
    except httpx2.DecodingError as error:
        raise UnexpectedAnswer(f"{url} sent what cannot be decompressed") from error


# --- the client -------------------------------------------------------------------------------------------------------


class Client:
    """One server, and the connections to it.

    Use it as an async context manager; leaving it closes every connection. It may be used by many tasks at once.
    ``url`` may have a path, when a proxy serves hector under one. ``token`` goes as bearer token with every request.
    ``ssl_context`` replaces the default one of https and wss, for a private CA. REST requests go through the proxy that
    the environment names (``HTTPS_PROXY``, ``NO_PROXY``), except to this machine; WebSockets go directly.

    Raises: InvalidRequest for a ``url`` or a ``token`` that cannot be used.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        token: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._address = _parse(url)
        self._headers = {"user-agent": "hector_trio"}
        if token is not None:
            if not token.isascii() or not token.isprintable() or " " in token or not token:
                raise InvalidRequest("The token has characters that cannot stand in a header, or none at all")
            self._headers["authorization"] = f"Bearer {token}"
        local = _is_loopback(self._address.host)
        if ssl_context is None:
            # Where none is used, an empty one: loading the certificates takes longer than a request to this machine.
            unused = local and not self._address.tls
            ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if unused else httpx2.create_ssl_context()
        self._ssl_context = ssl_context
        self._http = httpx2.AsyncClient(
            headers=self._headers,
            verify=ssl_context,
            trust_env=not local,
            timeout=httpx2.Timeout(connect=CONNECT_LIMIT, read=ANSWER_LIMIT, write=ANSWER_LIMIT, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        )

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return self._address.url

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.move_on_after(CLOSE_LIMIT, shield=True):
            await self._http.__aexit__(kind, error, trace)

    # --- agents

    async def agents(self) -> list[AgentCard]:
        """The cards of all agents, in a stable order."""
        return (await self._get(AgentList, "agents")).agents

    async def agent(self, agent_id: str) -> AgentCard:
        """An agent's card. Raises: AgentNotFound."""
        return await self._get(AgentCard, "agents", agent_id)

    # --- sessions

    async def create_session(
        self,
        agent_id: str,
        *,
        session_id: str | None = None,
        metadata: Json | None = None,
        state: Json | None = None,
        ttl_seconds: int | None = None,
    ) -> Session:
        """Begins a conversation with an agent.

        ``ttl_seconds``: it ends when it has not been used for so long. Raises: AgentNotFound, InvalidRequest,
        SessionExists, RateLimited.
        """
        body = _given(agentId=agent_id, sessionId=session_id, metadata=metadata, state=state, ttlSeconds=ttl_seconds)
        return _decode(Session, await self._request("POST", "sessions", body=body))

    async def session(self, session_id: str) -> Session:
        """Raises: SessionNotFound."""
        return await self._get(Session, "sessions", session_id)

    async def session_and_etag(self, session_id: str) -> tuple[Session, str]:
        """A session, and what ``update_session(if_match=…)`` takes. Raises: SessionNotFound."""
        response = await self._request("GET", "sessions", session_id)
        return _decode(Session, response), response.headers.get("etag", "")

    async def sessions(
        self, agent_id: str | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> list[Session]:
        """All sessions, newest first, of one agent or with these members in their metadata; reads page after page."""
        query = {f"metadata.{key}": value for key, value in (metadata or {}).items()}
        return await self._all(SessionList, "sessions", query=_given(agent_id=agent_id, **query))

    async def update_session(
        self,
        session_id: str,
        *,
        state: Json | None = None,
        metadata: Json | None = None,
        if_match: str | None = None,
    ) -> Session:
        """Merges (RFC 7396: a member that is None is removed) into state and metadata.

        ``if_match``: only if it is still as it was when it had this entity tag. Raises: SessionNotFound,
        InvalidRequest, PreconditionFailed.
        """
        headers = {} if if_match is None else {"if-match": if_match}
        body = _given(state=state, metadata=metadata)
        return _decode(Session, await self._request("PATCH", "sessions", session_id, body=body, headers=headers))

    async def delete_session(self, session_id: str) -> None:
        """Cancels what runs in a session and removes it with all that belongs to it. Raises: SessionNotFound."""
        await self._request("DELETE", "sessions", session_id)

    async def messages(self, session_id: str) -> list[Message]:
        """The conversation, oldest line first; reads page after page. Raises: SessionNotFound."""
        return await self._all(MessageList, "sessions", session_id, "messages")

    async def session_tasks(self, session_id: str) -> list[Task]:
        """A session's tasks, newest first; reads page after page. Raises: SessionNotFound."""
        return await self._all(TaskList, "sessions", session_id, "tasks")

    # --- tasks

    async def run(
        self,
        agent_id: str,
        content: Any,
        *,
        idempotency_key: str | None = None,
        on_disconnect: OnDisconnect | None = None,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Runs an agent and waits until the task has ended, well or not: see ``status`` and ``error``.

        ``content``: text, a ``Content`` with its media type, or anything that JSON can say. A cancel, or a lost
        connection, leaves the task running unless ``on_disconnect`` is ``"cancel"``. ``idempotency_key`` makes it safe
        to repeat the call.
        Raises: AgentNotFound, SessionNotFound, SessionMismatch, SessionBusy, TaskExists, IdempotencyMismatch,
        InvalidRequest, PayloadTooLarge, RateLimited, Draining, StoreUnavailable.
        """
        body = _task_request(content, on_disconnect, options)
        return await self._post_task(agent_id, body, idempotency_key, waits=True)

    async def submit(
        self,
        agent_id: str,
        content: Any,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Task:
        """Has an agent run and returns as soon as the task is accepted; follow it with ``events`` or ``task``.

        It runs on whatever becomes of this client. Options and errors as for ``run``.
        """
        body = _task_request(content, "continue", options)
        return await self._post_task(agent_id, body, idempotency_key, waits=False)

    async def task(self, agent_id: str, task_id: str) -> Task:
        """Raises: AgentNotFound, TaskNotFound."""
        return await self._get(Task, "agents", agent_id, "tasks", task_id)

    async def tasks(self, agent_id: str, *, status: Status | None = None) -> list[Task]:
        """An agent's tasks, newest first; reads page after page. Raises: AgentNotFound."""
        return await self._all(TaskList, "agents", agent_id, "tasks", query=_given(status=status))

    async def cancel(self, agent_id: str, task_id: str) -> Task:
        """Cancels a task and returns it, ended; one that has ended stays as it is. Raises: TaskNotFound."""
        return _decode(Task, await self._request("POST", "agents", agent_id, "tasks", task_id, "cancel"))

    async def delete_task(self, agent_id: str, task_id: str) -> None:
        """Removes an ended task and its log. Raises: TaskNotFound, TaskRunning."""
        await self._request("DELETE", "agents", agent_id, "tasks", task_id)

    # --- chunks

    @asynccontextmanager
    async def events(self, agent_id: str, task_id: str, after: int = 0) -> AsyncIterator[EventChunks]:
        """Follows a task that exists: its chunks with a ``seq`` above ``after``, those to come included.

        Leaving stops following and leaves the task alone. Raises: TaskNotFound, InvalidRequest (a running task has not
        come as far as ``after``); iterating raises ConnectionFailed when the stream is lost before the final chunk.
        """
        url = self._url("agents", agent_id, "tasks", task_id, "events")
        headers = {"accept": "text/event-stream", "accept-encoding": "identity"}
        request = self._http.build_request("GET", url, params={"after": str(after)}, headers=headers)
        with _mapped(url):
            response = await self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                with _mapped(url):
                    raise _refusal(response.status_code, response.headers, await response.aread(), url)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise UnexpectedAnswer(f"{url} did not answer with an event stream")
            async with _parts_of(response) as parts:
                yield EventChunks(parts, url)
        finally:
            with trio.move_on_after(CLOSE_LIMIT, shield=True):
                await response.aclose()

    @asynccontextmanager
    async def stream(
        self,
        agent_id: str,
        content: Any,
        *,
        on_disconnect: OnDisconnect | None = None,
        **options: Unpack[TaskOptions],
    ) -> AsyncIterator[ChunkStream]:
        """Runs an agent and gives its chunks as they come, over a WebSocket of its own.

        Leaving the block before the final chunk, or a cancel, closes the socket: the server then cancels the run,
        unless ``on_disconnect`` is ``"continue"``. Leaving waits at most ``CLOSE_LIMIT`` seconds, a cancel not at all.
        Options as for ``run``; a ``task_id`` is made up when none is given.
        Raises when entered: AgentNotFound, Unauthorized, Forbidden, Draining, ConnectionFailed. The refusal of the task
        itself is raised by the iteration: see ``ChunkStream``.
        """
        task_id = options.get("task_id") or str(uuid.uuid4())
        body = _task_request(content, on_disconnect, {**options, "task_id": task_id})
        path = self._address.path + _path("agents", agent_id, "stream")
        async with _open_socket(self._address, path, self._headers, self._ssl_context) as socket:
            chunks = ChunkStream(socket, task_id, self._address.socket_url + path)
            await chunks._send(body)
            yield chunks

    # --- requests

    def _url(self, *segments: str) -> str:
        return self._address.url + _path(*segments)

    async def _request(
        self,
        method: str,
        *segments: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        waits: bool = False,
    ) -> httpx2.Response:
        """An answer below 400. ``waits``: it may be long in coming."""
        url = self._url(*segments)
        sent = dict(headers or {})
        data = None
        if body is not None:
            sent["content-type"] = "application/json"
            data = _encode(body)
        timeout = self._http.timeout
        if waits:
            timeout = httpx2.Timeout(connect=CONNECT_LIMIT, read=None, write=ANSWER_LIMIT, pool=None)
        with _mapped(url):
            response = await self._http.request(
                method, url, content=data, params=query or None, headers=sent, timeout=timeout
            )
        if response.status_code >= 300:
            raise _refusal(response.status_code, response.headers, response.content, url)
        return response

    async def _get(self, kind: type[T], *segments: str) -> T:
        return _decode(kind, await self._request("GET", *segments))

    async def _all(self, kind: Any, *segments: str, query: Mapping[str, str] | None = None) -> list[Any]:
        """The items of every page of a list."""
        items: list[Any] = []
        token = ""
        while True:
            page_query = {**(query or {}), "pageSize": str(PAGE_SIZE), **({"pageToken": token} if token else {})}
            page = _decode(kind, await self._request("GET", *segments, query=page_query))
            items += getattr(page, kind.__struct_fields__[0])
            token = page.next_page_token
            if not token:
                return items

    async def _post_task(self, agent_id: str, body: Json, key: str | None, *, waits: bool) -> Task:
        headers = {} if waits else {"prefer": "respond-async"}
        if key is not None:
            headers["idempotency-key"] = key
        return _decode(
            Task, await self._request("POST", "agents", agent_id, "tasks", body=body, headers=headers, waits=waits)
        )


# --- streams ----------------------------------------------------------------------------------------------------------


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
                raise self._lost(closed) from None
            chunk = _decode_frame(message, self._url)
            if chunk is None or not self._is_next(chunk):
                continue
            if chunk.seq == 0:
                self._refused = True
                raise _error(
                    "" if chunk.code is UNSET else chunk.code,
                    str(chunk.content),
                    status=0,
                    retryable=chunk.retryable is True,
                    task_id=self.task_id,
                )
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
            await self._send(_given(type="cancel", taskId=self.task_id, reason=reason))

    def _is_next(self, chunk: Chunk) -> bool:
        # A request that the server could not read is refused without a task's id: nothing else was sent here.
        return chunk.seq == 0 or (chunk.seq > self.last_seq and chunk.task_id == self.task_id)

    async def _send(self, frame: Json) -> None:
        try:
            await self._socket.send_message(_encode(frame).decode())
        except ConnectionClosed as closed:
            raise self._lost(closed) from None

    def _lost(self, closed: ConnectionClosed) -> ConnectionFailed:
        return _lost(self._url, closed)


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
                with _mapped(self._url):
                    part = await anext(self._parts)
                self._events += self._decoder.feed(part)
            except StopAsyncIteration:
                raise ConnectionFailed(f"{self._url}: the stream ended too soon", url=self._url) from None
            except sse.EventTooLarge as error:
                raise UnexpectedAnswer(f"{self._url}: {error}") from None
        chunk = _decode_frame(self._events.popleft().data, self._url)
        if chunk is None:
            raise UnexpectedAnswer(f"{self._url} sent what is no chunk")
        if chunk.seq == 0:
            code = "" if chunk.code is UNSET else chunk.code
            raise _error(code, str(chunk.content), status=0, retryable=chunk.retryable is True, task_id=chunk.task_id)
        self.last_seq = chunk.seq
        if chunk.final:
            self.final = chunk
        return chunk


class _Control(Struct):
    """A frame that is no chunk."""

    type: str
    code: str | UnsetType = UNSET
    detail: str = ""


_chunks = msgspec.json.Decoder(Chunk)
_controls = msgspec.json.Decoder(_Control)


def _decode_frame(message: str | bytes, url: str) -> Chunk | None:
    """A chunk, or None for the good answer to a control frame. Raises the error of a bad one, and UnexpectedAnswer."""
    try:
        return _chunks.decode(message)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        control = _controls.decode(message)
    except (msgspec.DecodeError, RecursionError):
        raise UnexpectedAnswer(f"{url} sent what is no chunk") from None
    if control.type == "error":
        raise _error("" if control.code is UNSET else control.code, control.detail, status=0, retryable=False)
    return None


# --- the socket -------------------------------------------------------------------------------------------------------


_CLOSE_WORDS: Final = {
    1000: "the server closed it",
    1001: "the server goes away",
    1006: "the connection was cut",
    1008: "the server refuses what was sent",
    1009: "a message was too large",
    1011: "a fault in the server",
    1012: "the server is shutting down",
    1013: "the server asks to try later",
    4100: "it was read too slowly",
    4101: "nothing was heard from this side",
    4501: "the token has expired",
    4529: "the quota is used up",
}


def _lost(url: str, closed: ConnectionClosed) -> ConnectionFailed:
    code = 1006 if closed.reason is None else closed.reason.code
    reason = None if closed.reason is None else closed.reason.reason
    words = _CLOSE_WORDS.get(code, "the server closed it")
    said = f"{words}: {reason}" if reason else words
    return ConnectionFailed(
        f"{url}: lost before the end ({code}: {said})", url=url, close_code=code, close_reason=reason
    )


class _Watched(trio.abc.Stream):
    """A stream that tells when it is over.

    trio-websocket waits for ever for a handshake that the peer breaks off.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.on_end: Callable[[], None] = lambda: None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            self.on_end()
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            self.on_end()
            raise
        if not data:
            self.on_end()
        return data

    async def aclose(self) -> None:
        self.on_end()
        await self._stream.aclose()


@asynccontextmanager
async def _open_socket(
    address: _Address, path: str, headers: Mapping[str, str], ssl_context: ssl.SSLContext
) -> AsyncIterator[WebSocketConnection]:
    """A WebSocket and its reader. Leaving sends Close and waits a little for the answer; a cancel just hangs up."""
    url = address.socket_url + path
    stream = _Watched(await _connect(address, url, ssl_context))
    opened = False
    try:
        async with trio.open_nursery() as nursery:
            socket = await _handshake(nursery, stream, address, path, headers)
            opened = True
            try:
                yield socket
            finally:
                with trio.move_on_after(CLOSE_LIMIT):
                    await socket.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # What went wrong on the wire is told as ours; what the caller raised leaves as it came, not in a group.
        wire, own = group.split((ProtocolError, h11.ProtocolError, HandshakeError))
        if own is None:
            assert wire is not None
            raise _wire_error(_first(wire), url, opened=opened) from None
        if len(own.exceptions) > 1:
            raise
        _reraise(own.exceptions[0])
    finally:
        await trio.aclose_forcefully(stream)


async def _connect(address: _Address, url: str, ssl_context: ssl.SSLContext) -> trio.abc.Stream:
    """Raises: ConnectionFailed."""
    try:
        with trio.fail_after(CONNECT_LIMIT):
            tcp = await trio.open_tcp_stream(address.host, address.port)
            if not address.tls:
                return tcp
            tls = trio.SSLStream(
                tcp,
                ssl_context,
                server_hostname=address.host,
                https_compatible=True,
            )
            try:
                await tls.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(tls)
                raise
            return tls
    except trio.TooSlowError:
        raise ConnectionFailed(f"Cannot reach {url}: no answer in time", url=url) from None
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectionFailed(f"Cannot reach {url}: {_why(error)}", url=url) from error


async def _handshake(
    nursery: trio.Nursery, stream: _Watched, address: _Address, path: str, headers: Mapping[str, str]
) -> WebSocketConnection:
    """Raises: ConnectionFailed; in the nursery, the reader raises what the server answers instead of the upgrade."""
    with trio.move_on_after(CONNECT_LIMIT) as scope:
        stream.on_end = scope.cancel
        socket = await wrap_client_stream(
            nursery,
            stream,  # type: ignore[arg-type]  # any stream will do: it is only read, written and closed
            address.host_header,
            path,
            extra_headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            message_queue_size=UNREAD_CHUNKS,
            max_message_size=MAX_MESSAGE,
            receive_buffer_size=1 << 16,
        )
        stream.on_end = lambda: None
        return socket
    url = address.socket_url + path
    raise ConnectionFailed(f"Cannot reach {url}: no answer to the WebSocket's handshake", url=url)


def _wire_error(error: BaseException, url: str, *, opened: bool) -> HectorError:
    if isinstance(error, ConnectionRejected):
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in error.headers}
        return _refusal(error.status_code, headers, error.body or b"", url)
    if opened:
        return ConnectionFailed(f"{url} broke the WebSocket's protocol ({error})", url=url, close_code=1002)
    return ConnectionFailed(f"{url} does not speak WebSocket", url=url)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    each: BaseException = group
    while isinstance(each, BaseExceptionGroup):
        each = each.exceptions[0]
    return each


def _reraise(error: BaseException) -> None:
    """Raises ``error`` with the context that it had."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context


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


# --- addresses, bodies ------------------------------------------------------------------------------------------------


class _Address(Struct, frozen=True):
    """Where a server is."""

    tls: bool
    host: str
    port: int
    host_header: str
    path: str
    """Below which it is served; no slash at the end."""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host_header}{self.path}"

    @property
    def socket_url(self) -> str:
        """Without the path."""
        return f"{'wss' if self.tls else 'ws'}://{self.host_header}"


def _parse(url: str) -> _Address:
    """Raises: InvalidRequest."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.strip().isprintable():
        raise InvalidRequest(f"{url!r} is no server's address, such as http://127.0.0.1:8080")
    if "@" in parts.netloc:
        raise InvalidRequest("A server's address holds no user and password; give a token instead")
    if parts.query or parts.fragment:
        raise InvalidRequest(f"A server's address ends before ? and #: {url!r}")
    tls = parts.scheme == "https"
    name = f"[{host}]" if ":" in host else host
    shown = name if port is None else f"{name}:{port}"
    return _Address(tls, host, port or (443 if tls else 80), shown, parts.path.rstrip("/"))


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(*segments: str) -> str:
    for each in segments:
        if each in ("", ".", ".."):
            raise InvalidRequest(f"{each!r} is no id")
    return "".join("/" + quote(each, safe="~") for each in segments)


def _given(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _task_request(content: Any, on_disconnect: OnDisconnect | None, options: TaskOptions) -> Json:
    if not isinstance(content, Content):
        content = Content("text/plain" if isinstance(content, str) else "application/json", content)
    limit = options.get("timeout_seconds")
    if limit is not None and not 0 < limit < math.inf:
        raise InvalidRequest(f"timeout_seconds must be above 0: {limit!r}")
    context = _given(
        sessionId=options.get("session_id"), userId=options.get("user_id"), metadata=options.get("metadata")
    )
    return _given(
        taskId=options.get("task_id"),
        input=content,
        parameters=options.get("parameters"),
        context=context or None,
        timeoutMs=None if limit is None else math.ceil(limit * 1000),
        onDisconnect=on_disconnect,
        multitask=options.get("multitask"),
    )


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InvalidRequest(f"This cannot be said in JSON: {error}") from None


def _decode(kind: type[T], response: httpx2.Response) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnexpectedAnswer(f"{response.url} does not answer like a hector server ({error})") from None
