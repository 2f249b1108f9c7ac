"""The routes of sessions: create, list, read, patch, remove; their messages and tasks."""

from __future__ import annotations

import uuid
from typing import Any, Final

from msgspec import UNSET, Struct

from hector_trio.errors import (
    AgentNotFound,
    Draining,
    FieldError,
    InvalidRequest,
    PreconditionFailed,
    RateLimited,
    SessionExists,
    SessionNotFound,
)
from hector_trio.log import now_ms
from hector_trio.models import (
    Json,
    MessageList,
    Session,
    SessionList,
    SessionPatch,
    SessionRequest,
    TaskList,
    TaskRequest,
)
from hector_trio.session import SessionRow, check_size, etag, wire_message, wire_session
from hector_trio.task import wire_task
from hector_trio.transports.negotiation import entity_tags, matches_strongly, matches_weakly
from hector_trio.transports.requests import check_session_request, metadata_filter, page_size
from hector_trio.transports.rest_tasks import PAGE, RUN_ANSWERS, RUN_HEADERS, RUN_REFUSALS, create_session_task
from hector_trio.transports.routes import Answer, Call, Header, Query, Reply, Route, json_reply


class PatchBody(Struct, rename="camel"):
    """A patch as it comes: the two writable members, and those that cannot be changed, to refuse them by name."""

    state: Json | Any = UNSET
    metadata: Json | Any = UNSET
    session_id: Any = UNSET
    agent_id: Any = UNSET
    created_at: Any = UNSET
    last_activity_at: Any = UNSET
    expires_at: Any = UNSET
    ttl_seconds: Any = UNSET


def check_patch(body: PatchBody) -> SessionPatch:
    """RFC 7396, for the members that a client may change. Raises: InvalidRequest with every fault."""
    faults = []
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if value is UNSET:
            continue
        words = name.split("_")
        pointer = "/" + words[0] + "".join(word.title() for word in words[1:])
        if name not in ("state", "metadata"):
            faults.append(FieldError(pointer, "cannot be changed"))
        elif not isinstance(value, dict):
            faults.append(FieldError(pointer, "must be an object"))
    if faults:
        text = "; ".join(f"{each.pointer.removeprefix('/')}: {each.message}" for each in faults)
        raise InvalidRequest(text, errors=tuple(faults))
    return SessionPatch(body.state, body.metadata)


async def create_session(call: Call) -> Reply:
    engine = call.services.engine
    if engine.draining:
        raise Draining("The server is shutting down; it takes no new work", retry_after=5)
    request = await call.read(SessionRequest)
    check_session_request(request)
    if request.agent_id not in engine.agents:
        raise AgentNotFound(f"There is no agent {request.agent_id[:128]!r}")
    now = now_ms()
    row = SessionRow(
        owner=call.owner,
        session_id=request.session_id or str(uuid.uuid4()),
        agent_id=request.agent_id,
        created_at=now,
        last_activity_at=now,
        state=request.state or {},
        metadata=request.metadata or {},
        ttl_seconds=request.ttl_seconds,
    )
    check_size(row.state, row.metadata, call.services.settings.limits.session_bytes)
    await engine.store.create_session(row, limit=call.services.settings.limits.sessions)
    return json_reply(wire_session(row), 201, Location=call.path(f"/sessions/{row.session_id}"), ETag=etag(row))


async def list_sessions(call: Call) -> Reply:
    page = await call.services.engine.store.list_sessions(
        call.owner,
        now=now_ms(),
        agent_id=call.query.get("agent_id"),
        metadata=metadata_filter(call.query),
        limit=page_size(call.query),
        token=call.query.get("pageToken", ""),
    )
    return json_reply(SessionList([wire_session(row) for row in page.items], page.total, page.next_token))


async def get_session(call: Call) -> Reply:
    row = await _find(call)
    tag = etag(row)
    if matches_weakly(call.header("If-None-Match") or "", tag):
        return Reply(304, headers={"ETag": tag})
    return json_reply(wire_session(row), ETag=tag)


async def patch_session(call: Call) -> Reply:
    patch = check_patch(await call.read(PatchBody))
    row = await call.services.engine.store.update_session(
        call.owner,
        call.ids["sessionId"],
        now=now_ms(),
        state=None if patch.state is UNSET else patch.state,
        metadata=None if patch.metadata is UNSET else patch.metadata,
        if_match=await _if_match(call),
        limit_bytes=call.services.settings.limits.session_bytes,
    )
    return json_reply(wire_session(row), ETag=etag(row))


async def _if_match(call: Call) -> str | None:
    """The one entity tag that the session must still have when it is written (RFC 9110, 13.1.1)."""
    header = call.header("If-Match")
    if header is None or entity_tags(header) == "*":
        return None  # a session that is written exists, else the write itself says so
    tag = etag(await _find(call))
    if not matches_strongly(header, tag):
        raise PreconditionFailed(f"Session {call.ids['sessionId']!r} has changed")
    return tag


async def delete_session(call: Call) -> Reply:
    await call.services.engine.delete_session(call.owner, call.ids["sessionId"])
    return Reply(204)


async def list_messages(call: Call) -> Reply:
    page = await call.services.engine.store.list_messages(
        call.owner,
        call.ids["sessionId"],
        now=now_ms(),
        limit=page_size(call.query),
        token=call.query.get("pageToken", ""),
    )
    return json_reply(MessageList([wire_message(row) for row in page.items], page.total, page.next_token))


async def list_session_tasks(call: Call) -> Reply:
    limit = page_size(call.query)
    await _find(call)
    page = await call.services.engine.store.list_tasks(
        call.owner, now=now_ms(), session_id=call.ids["sessionId"], limit=limit, token=call.query.get("pageToken", "")
    )
    return json_reply(TaskList([wire_task(row) for row in page.items], page.total, page.next_token))


async def _find(call: Call) -> SessionRow:
    row = await call.services.engine.store.get_session(call.owner, call.ids["sessionId"], now=now_ms())
    if row is None:
        raise SessionNotFound(f"There is no session {call.ids['sessionId']!r}")
    return row


# --- the table --------------------------------------------------------------------------------------------------------


_SESSION: Final = "/sessions/{sessionId}"

SESSION_ROUTES: Final = (
    Route(
        "POST",
        "/sessions",
        "createSession",
        "Begin a conversation with an agent",
        create_session,
        {201: Answer("The session", Session, headers=("Location", "ETag"))},
        right="write",
        body=SessionRequest,
        refusals=(InvalidRequest, AgentNotFound, SessionExists, RateLimited),
    ),
    Route(
        "GET",
        "/sessions",
        "listSessions",
        "Sessions, newest first; `metadata.KEY=value` filters by a member of their metadata",
        list_sessions,
        {200: Answer("A page of sessions", SessionList)},
        query=(Query("agent_id", {"type": "string"}, "Only sessions of this agent"), *PAGE),
        refusals=(InvalidRequest,),
    ),
    Route(
        "GET",
        _SESSION,
        "getSession",
        "A session",
        get_session,
        {200: Answer("The session", Session, headers=("ETag",)), 304: Answer("It is as `If-None-Match` has it")},
        headers=(Header("If-None-Match", "An `ETag` as given before (RFC 9110, 13.1.2)"),),
        refusals=(SessionNotFound,),
    ),
    Route(
        "PATCH",
        _SESSION,
        "patchSession",
        "Change `state` and `metadata` by a merge patch (RFC 7396)",
        patch_session,
        {200: Answer("The session as it is now", Session, headers=("ETag",))},
        right="write",
        body=SessionPatch,
        headers=(Header("If-Match", "Change it only if its `ETag` is still one of these (RFC 9110, 13.1.1)"),),
        refusals=(InvalidRequest, SessionNotFound, PreconditionFailed),
    ),
    Route(
        "DELETE",
        _SESSION,
        "deleteSession",
        "End a session: its tasks are cancelled, then it is gone with all that belongs to it",
        delete_session,
        {204: Answer("Gone")},
        right="write",
        refusals=(SessionNotFound,),
    ),
    Route(
        "POST",
        _SESSION + "/tasks",
        "createSessionTask",
        "Run the session's agent, with the conversation so far",
        create_session_task,
        RUN_ANSWERS,
        right="write",
        runs=True,
        body=TaskRequest,
        headers=RUN_HEADERS,
        refusals=RUN_REFUSALS,
    ),
    Route(
        "GET",
        _SESSION + "/tasks",
        "listSessionTasks",
        "The session's tasks, newest first",
        list_session_tasks,
        {200: Answer("A page of tasks", TaskList)},
        query=PAGE,
        refusals=(InvalidRequest, SessionNotFound),
    ),
    Route(
        "GET",
        _SESSION + "/messages",
        "listMessages",
        "The conversation, oldest line first",
        list_messages,
        {200: Answer("A page of messages", MessageList)},
        query=PAGE,
        refusals=(InvalidRequest, SessionNotFound),
    ),
)
