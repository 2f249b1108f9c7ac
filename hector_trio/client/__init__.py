"""The Python client, on Trio: sessions and tasks over REST, chunks over the WebSocket or server-sent events.

::

    async with Client("http://127.0.0.1:8080") as client:
        session = await client.create_session("assistant")
        async with client.stream("assistant", "Hello", session_id=session.session_id) as chunks:
            async for chunk in chunks:
                print(chunk.content if chunk.chunk_type == "text" else "", end="")

A stream whose connection is lost is resumed where it broke, by itself, also over a restart of the server: each chunk
comes exactly once. Leaving a stream before its end cancels the task.

A refusal by the server raises the error of ``hector_trio.errors`` that has its code (``AgentNotFound``,
``SessionBusy`` …), or ``RemoteError`` where this client does not know the code. A server that cannot be reached, or a
connection that is lost and cannot be mended, raises ``ConnectionFailed``. A task that *fails* raises nothing: it is a
task with an ``error``, a stream whose last chunk is one.

Deadlines are the caller's: ``with trio.fail_after(30): await client.run(...)``.
"""

from __future__ import annotations

import math
import ssl
import uuid
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import httpx2
import trio

from hector_trio.client.addresses import is_loopback, parse, path_of
from hector_trio.client.bodies import OnDisconnect, T, TaskOptions, content_of, decode, encode, given, task_request
from hector_trio.client.errors import ConnectionFailed, RemoteError, UnexpectedAnswer, mapped, refusal
from hector_trio.client.events import EventChunks, open_events
from hector_trio.client.exchange import Exchange
from hector_trio.client.limits import (
    ANSWER_LIMIT,
    CLOSE_LIMIT,
    CONNECT_LIMIT,
    GRACE,
    PAGE_SIZE,
    RECONNECT_LIMIT,
    WINDOW,
)
from hector_trio.client.reconnecting import Retry
from hector_trio.client.stream import ChunkStream, open_stream
from hector_trio.client.websocket import open_socket
from hector_trio.errors import InvalidRequest
from hector_trio.models import (
    AgentCard,
    AgentList,
    GraceMs,
    Json,
    LiveTree,
    Message,
    MessageList,
    Session,
    SessionList,
    Status,
    Task,
    TaskList,
)

__all__ = [
    "CLOSE_LIMIT",
    "ChunkStream",
    "Client",
    "ConnectionFailed",
    "EventChunks",
    "GraceMs",
    "OnDisconnect",
    "RemoteError",
    "TaskOptions",
    "UnexpectedAnswer",
]


class Client:
    """One server, and the connections to it.

    Use it as an async context manager; leaving it closes every connection. It may be used by many tasks at once.
    ``url`` may have a path, when a proxy serves hector under one. ``token`` goes as bearer token with every request.
    ``reconnect_limit``: seconds that a stream tries to mend its connection without getting any further; 0: not at all.
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
        reconnect_limit: float = RECONNECT_LIMIT,
    ) -> None:
        self._address = parse(url)
        if not 0 <= reconnect_limit < math.inf:
            raise InvalidRequest(f"reconnect_limit must be 0 or more seconds: {reconnect_limit!r}")
        self._headers = {"user-agent": "hector_trio"}
        if token is not None:
            if not token.isascii() or not token.isprintable() or " " in token or not token:
                raise InvalidRequest("The token has characters that cannot stand in a header, or none at all")
            self._headers["authorization"] = f"Bearer {token}"
        local = is_loopback(self._address.host)
        if ssl_context is None:
            # Where none is used, an empty one: loading the certificates takes longer than a request to this machine.
            unused = local and not self._address.tls
            ssl_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if unused else httpx2.create_ssl_context()
        self._ssl_context = ssl_context
        self._reconnect_limit = reconnect_limit
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
        body = given(agentId=agent_id, sessionId=session_id, metadata=metadata, state=state, ttlSeconds=ttl_seconds)
        return decode(Session, await self._request("POST", "sessions", body=body))

    async def session(self, session_id: str) -> Session:
        """Raises: SessionNotFound."""
        return await self._get(Session, "sessions", session_id)

    async def session_and_etag(self, session_id: str) -> tuple[Session, str]:
        """A session, and what ``update_session(if_match=…)`` takes. Raises: SessionNotFound."""
        response = await self._request("GET", "sessions", session_id)
        return decode(Session, response), response.headers.get("etag", "")

    async def sessions(
        self, agent_id: str | None = None, *, metadata: Mapping[str, str] | None = None
    ) -> list[Session]:
        """All sessions, newest first, of one agent or with these members in their metadata; reads page after page."""
        query = {f"metadata.{key}": value for key, value in (metadata or {}).items()}
        return await self._all(SessionList, "sessions", query=given(agent_id=agent_id, **query))

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
        body = given(state=state, metadata=metadata)
        return decode(Session, await self._request("PATCH", "sessions", session_id, body=body, headers=headers))

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

        Or until it asks something: then its status is ``input_required``, its ``prompt`` what it asks; see ``answer``.
        ``content``: text, a ``Content`` with its media type, or anything that JSON can say. A cancel, or a lost
        connection, leaves the task running unless ``on_disconnect`` is ``"cancel"``. ``idempotency_key`` makes it safe
        to repeat the call.
        Raises: AgentNotFound, SessionNotFound, SessionMismatch, SessionBusy, TaskExists, IdempotencyMismatch,
        InvalidRequest, PayloadTooLarge, RateLimited, Draining, StoreUnavailable.
        """
        body = task_request(content, on_disconnect, options)
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
        body = task_request(content, "continue", options)
        return await self._post_task(agent_id, body, idempotency_key, waits=False)

    async def answer(self, agent_id: str, task_id: str, content: Any) -> Task:
        """Answers what a task asks, and waits until it has ended or asks again, as ``run`` does.

        ``content`` as for ``run``. A cancel, or a lost connection, leaves open whether the answer was taken: ``task``
        tells. Raises: TaskNotFound, NotWaiting, InvalidRequest, RateLimited, Draining, StoreUnavailable.
        """
        body = {"input": content_of(content)}
        return decode(
            Task, await self._request("POST", "agents", agent_id, "tasks", task_id, "input", body=body, waits=True)
        )

    async def task(self, agent_id: str, task_id: str) -> Task:
        """Raises: AgentNotFound, TaskNotFound."""
        return await self._get(Task, "agents", agent_id, "tasks", task_id)

    async def tasks(self, agent_id: str, *, status: Status | None = None) -> list[Task]:
        """An agent's tasks, newest first; reads page after page. Raises: AgentNotFound."""
        return await self._all(TaskList, "agents", agent_id, "tasks", query=given(status=status))

    async def cancel(self, agent_id: str, task_id: str) -> Task:
        """Cancels a task and returns it, ended; one that has ended stays as it is. Raises: TaskNotFound."""
        return decode(Task, await self._request("POST", "agents", agent_id, "tasks", task_id, "cancel"))

    async def delete_task(self, agent_id: str, task_id: str) -> None:
        """Removes an ended task and its log. Raises: TaskNotFound, TaskRunning."""
        await self._request("DELETE", "agents", agent_id, "tasks", task_id)

    # --- the server

    async def tree(self, limit: int | None = None) -> LiveTree:
        """What lives in the server, at most ``limit`` of a kind below one node. For admins.

        Raises: NotFound (the server does not show it: ``server.debug_tree``), Forbidden.
        """
        query = {} if limit is None else {"limit": str(limit)}
        return decode(LiveTree, await self._request("GET", "debug", "tree", query=query))

    # --- chunks

    def events(self, agent_id: str, task_id: str, after: int = 0) -> AbstractAsyncContextManager[EventChunks]:
        """Follows a task that exists: its chunks with a ``seq`` above ``after``, those to come included.

        A lost connection is made again, and each chunk comes once. Leaving stops following and leaves the task alone.
        Raises: TaskNotFound, InvalidRequest (a running task has not come as far as ``after``); iterating raises
        ConnectionFailed when the connection cannot be mended.
        """
        url = self._url("agents", agent_id, "tasks", task_id, "events")
        return open_events(self._http, url, after, Retry(url, self._reconnect_limit))

    def stream(
        self,
        agent_id: str,
        content: Any,
        *,
        on_disconnect: OnDisconnect | None = None,
        window: int = WINDOW,
        binary: bool = False,
        **options: Unpack[TaskOptions],
    ) -> AbstractAsyncContextManager[ChunkStream]:
        """Runs an agent and gives its chunks as they come, over a WebSocket of its own.

        A lost connection is made again and resumed; the server is asked to let the task run on for 30 seconds without
        one, unless ``on_disconnect`` says otherwise: ``GraceMs(ms)``, ``"continue"`` for as long as it takes, or
        ``"cancel"`` at once.
        Leaving the block before the final chunk, also by a cancel, cancels the task, unless ``on_disconnect`` is
        ``"continue"`` or it was told to ``detach``. It takes at most ``CLOSE_LIMIT`` seconds.

        ``window``: chunks that may wait here for the reader; one that is slow delays nobody. ``binary``: bytes come as
        they are, not in base64; ``Chunk.data`` has them in both cases. Options as for ``run``; a ``task_id`` is made up
        when none is given. One that was used before is no good for this: when the connection is lost before the first
        chunk, it cannot be told whether the task that has ended under it is the new one.
        Raises when entered: AgentNotFound, Unauthorized, Forbidden, Draining, ConnectionFailed. The refusal of the task
        itself is raised by the iteration: see ``ChunkStream``.
        """
        if window < 1:
            raise InvalidRequest(f"window must be 1 or more chunks: {window!r}")
        if on_disconnect is None and self._reconnect_limit > 0:
            on_disconnect = GraceMs(int(GRACE * 1000))
        task_id = options.get("task_id") or str(uuid.uuid4())
        body = task_request(content, on_disconnect, {**options, "task_id": task_id})
        encode(body)  # what cannot be said is to be told here, not when it is said
        path = self._address.path + path_of("agents", agent_id, "stream")
        url = self._address.socket_url + path
        return open_stream(
            partial(open_socket, self._address, path, self._headers, self._ssl_context),
            Exchange(body, window, binary=binary, url=url),
            window,
            Retry(url, self._reconnect_limit),
            cancels=on_disconnect != "continue",
            cancel=partial(self.cancel, agent_id, task_id),
        )

    # --- requests

    def _url(self, *segments: str) -> str:
        return self._address.url + path_of(*segments)

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
            data = encode(body)
        timeout = self._http.timeout
        if waits:
            timeout = httpx2.Timeout(connect=CONNECT_LIMIT, read=None, write=ANSWER_LIMIT, pool=None)
        with mapped(url):
            response = await self._http.request(
                method, url, content=data, params=query or None, headers=sent, timeout=timeout
            )
        if response.status_code >= 300:
            raise refusal(response.status_code, response.headers, response.content, url)
        return response

    async def _get(self, kind: type[T], *segments: str) -> T:
        return decode(kind, await self._request("GET", *segments))

    async def _all(self, kind: Any, *segments: str, query: Mapping[str, str] | None = None) -> list[Any]:
        """The items of every page of a list."""
        items: list[Any] = []
        token = ""
        while True:
            page_query = {**(query or {}), "pageSize": str(PAGE_SIZE), **({"pageToken": token} if token else {})}
            page = decode(kind, await self._request("GET", *segments, query=page_query))
            items += getattr(page, kind.__struct_fields__[0])
            token = page.next_page_token
            if not token:
                return items

    async def _post_task(self, agent_id: str, body: Json, key: str | None, *, waits: bool) -> Task:
        headers = {} if waits else {"prefer": "respond-async"}
        if key is not None:
            headers["idempotency-key"] = key
        return decode(
            Task, await self._request("POST", "agents", agent_id, "tasks", body=body, headers=headers, waits=waits)
        )
