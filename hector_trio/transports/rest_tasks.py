"""The routes of tasks: run one and wait, stream or poll; read its log; cancel and remove it."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from typing import Final, get_args

import msgspec
import trio

from hector_trio.engine import Engine, Order
from hector_trio.errors import (
    AgentNotFound,
    IdempotencyMismatch,
    InvalidRequest,
    NotWaiting,
    RateLimited,
    SessionBusy,
    SessionMismatch,
    SessionNotFound,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.log import now_ms
from hector_trio.models import Answering, ChunkList, Status, Task, TaskContext, TaskList, TaskRequest, encode
from hector_trio.stores import PAGE_BYTES, Idempotency
from hector_trio.task import TaskRow, session_of, wire_task
from hector_trio.transports.negotiation import MAX_KEY, Preferences, idempotency_key, preferences, wants_events
from hector_trio.transports.requests import (
    canonical,
    check_content,
    check_task_request,
    choice,
    page_size,
    sequence,
)
from hector_trio.transports.routes import Answer, Call, Header, Query, Reply, Route, json_reply
from hector_trio.transports.sse import EventStream, starting_point

DAY_MS: Final = 24 * 3600 * 1000
"""How long an ``Idempotency-Key`` is remembered."""


# --- run --------------------------------------------------------------------------------------------------------------


async def create_task(call: Call) -> Reply:
    agent_id = call.ids["agentId"]
    request = await call.read(TaskRequest)
    check_task_request(request)
    return await _run(call, agent_id, request, f"POST /agents/{agent_id}/tasks")


async def create_session_task(call: Call) -> Reply:
    session_id = call.ids["sessionId"]
    request = await call.read(TaskRequest)
    check_task_request(request)
    session = await call.services.engine.store.get_session(call.owner, session_id, now=now_ms())
    if session is None:
        raise SessionNotFound(f"There is no session {session_id!r}")
    named = session_of(request)
    if named not in (None, session_id):
        raise SessionMismatch(f"The path names the session {session_id!r}, the body {named!r}")
    context = msgspec.structs.replace(request.context or TaskContext(), session_id=session_id)
    request = msgspec.structs.replace(request, context=context)
    return await _run(call, session.agent_id, request, f"POST /sessions/{session_id}/tasks")


async def _run(call: Call, agent_id: str, request: TaskRequest, route: str) -> Reply:
    """Submits, and answers as the client asked to be answered.

    A run with the policy ``cancel`` lives in this request's nursery. So the answer is then not given before its end,
    whatever is preferred: 202 would end the request, and with it the run (RFC 7240, 2: a preference may be ignored).
    """
    engine = call.services.engine
    streamed = wants_events(call.header("Accept") or "")
    idempotency = await _idempotency(call, route)
    order = Order(call.owner, agent_id, request, "cancel" if streamed else "continue", idempotency)
    accepted = await engine.submit(order, call.nursery)
    headers = {"Idempotency-Replayed": "true"} if accepted.how == "replayed" else {}
    return await _answer(call, accepted.task, 0, headers, streamed, started=accepted.how == "created")


async def _answer(
    call: Call, row: TaskRow, after: int, headers: dict[str, str], streamed: bool, *, started: bool
) -> Reply:
    """The task, or its chunks beyond ``after``. ``started``: this request has started the run."""
    engine = call.services.engine
    location = call.path(f"/agents/{row.agent_id}/tasks/{row.task_id}")
    if streamed:
        left = partial(engine.left, row) if started else None
        stream = EventStream(engine.follow(row, after, viewer=True), call.services.metrics, left, until=call.until)
        return Reply(events=stream, headers=headers | {"Location": location})
    asked = preferences(call.header("Prefer") or "")
    if started and row.policy == "cancel":
        asked = Preferences()
    answered = False
    try:
        with engine.follow(row, viewer=asked.patience != 0):  # who waits for the answer has not left
            row = await _wait(engine, row, asked.patience)
        answered = True
    finally:
        if started:
            engine.left(row, answered=answered)
    body = encode(wire_task(row))
    if row.ended or row.status == "input_required":
        return Reply(200, body, headers=headers | {"Content-Location": location})
    if asked.applied:
        headers["Preference-Applied"] = asked.applied
    return Reply(202, body, headers=headers | {"Location": location})


async def _wait(engine: Engine, row: TaskRow, patience: float | None) -> TaskRow:
    """The row when the task has ended or waits for input, or when ``patience`` (seconds) has. Raises: StoreUnavailable
    when the store refuses the task's last chunk: its end would have to wait for the store."""
    if row.ended or patience == 0:
        return row
    with trio.move_on_after(math.inf if patience is None else patience):
        return await engine.wait(row)
    return await engine.store.get_task_by_key(row.key) or row


async def _idempotency(call: Call, route: str) -> Idempotency | None:
    key = idempotency_key(call.header("Idempotency-Key"))
    if key is None:
        return None
    body_hash = hashlib.sha256(canonical(await call.data())).hexdigest()
    return Idempotency(route, key, body_hash, now_ms() + DAY_MS)


# --- read, cancel, remove ---------------------------------------------------------------------------------------------


async def list_agent_tasks(call: Call) -> Reply:
    agent_id = call.ids["agentId"]
    _check_agent(call)
    page = await call.services.engine.store.list_tasks(
        call.owner,
        agent_id=agent_id,
        status=choice(call.query, "status", get_args(Status)),
        limit=page_size(call.query),
        token=call.query.get("pageToken", ""),
    )
    return json_reply(TaskList([wire_task(row) for row in page.items], page.total, page.next_token))


async def get_task(call: Call) -> Reply:
    return json_reply(wire_task(await _find(call)))


async def cancel_task(call: Call) -> Reply:
    row = await _find(call)
    return json_reply(wire_task(await call.services.engine.cancel(row)))


async def answer_task(call: Call) -> Reply:
    """The answer starts the task's next run, and is answered like a request for a task."""
    engine = call.services.engine
    answer = await call.read(Answering)
    row = await _find(call)
    check_content(answer.input)
    after = row.last_seq
    streamed = wants_events(call.header("Accept") or "")
    idempotency = await _idempotency(call, f"POST /agents/{row.agent_id}/tasks/{row.task_id}/input")
    for last in (False, True):
        if idempotency is not None and (replayed := await engine.answered(row, idempotency)) is not None:
            return await _answer(call, replayed, 0, {"Idempotency-Replayed": "true"}, streamed, started=False)
        try:
            row = await engine.answer(row, answer.input, call.nursery, idempotency)
            break
        except NotWaiting:
            if last or idempotency is None:
                raise  # else the same answer may just have been accepted
    return await _answer(call, row, after, {}, streamed, started=engine.runs_in(row, call.nursery))


async def delete_task(call: Call) -> Reply:
    await _find(call)
    await call.services.engine.store.delete_task(call.owner, call.ids["agentId"], call.ids["taskId"])
    return Reply(204)


async def _find(call: Call) -> TaskRow:
    row = await call.services.engine.find(call.owner, call.ids["agentId"], call.ids["taskId"])
    if row is None:
        _check_agent(call)
        raise TaskNotFound(f"There is no task {call.ids['taskId']!r} of agent {call.ids['agentId']!r}")
    return row


def _check_agent(call: Call) -> None:
    if call.ids["agentId"] not in call.services.engine.agents:
        raise AgentNotFound(f"There is no agent {call.ids['agentId']!r}")


# --- the log ----------------------------------------------------------------------------------------------------------


async def task_events(call: Call) -> Reply:
    token, text = call.query.get("pageToken", ""), call.header("Last-Event-ID")
    after = sequence(call.query.get("after", "0"), "after")
    place = sequence(token, "pageToken") if token else after
    last_event_id = sequence(text, "Last-Event-ID") if text else None
    limit = page_size(call.query)
    row = await _find(call)
    if wants_events(call.header("Accept") or ""):
        return await _stream(call, row, after, last_event_id)
    return await _page(call.services.engine, row, place, limit)


async def _stream(call: Call, row: TaskRow, after: int, last_event_id: int | None) -> Reply:
    engine = call.services.engine
    if not row.ended and max(after, last_event_id or 0) > engine.last_seq(row):
        # The task may have moved on and ended since its row was read.
        row = await engine.store.get_task_by_key(row.key) or row
    ended = row.ended and not engine.is_unfinished(row)
    begin = starting_point(ended=ended, last_seq=engine.last_seq(row), after=after, last_event_id=last_event_id)
    if begin is None:
        return Reply(204)
    if call.method == "HEAD":
        return Reply(media_type="text/event-stream")
    return Reply(events=EventStream(engine.follow(row, begin, viewer=True), call.services.metrics, until=call.until))


async def _page(engine: Engine, row: TaskRow, after: int, limit: int) -> Reply:
    """Committed chunks as they stand, in one page: nothing is decoded, nothing is waited for."""
    lines: list[bytes] = []
    size = 0
    with engine.follow(row, after) as follower:
        while len(lines) < limit and size < PAGE_BYTES and follower.ready and not follower.ended:
            more = await follower.read(limit - len(lines))
            if not more:
                break
            lines += more
            size += sum(map(len, more))
        last, total = follower.after, max(engine.last_seq(row), follower.after if lines else 0)
    token = str(last) if lines and last < total else ""
    body = b'{"chunks":[%b],"total":%d,"nextPageToken":"%b"}' % (b",".join(lines), total, token.encode())
    return Reply(body=body)


# --- the table --------------------------------------------------------------------------------------------------------


PAGE: Final = (
    Query(
        "pageSize",
        {"type": "integer", "minimum": 1, "maximum": 100, "default": 50},
        "How many items a page may hold",
    ),
    Query("pageToken", {"type": "string", "default": ""}, "`nextPageToken` of the page before"),
)
_AFTER = Query("after", {"type": "integer", "minimum": 0, "default": 0}, "Only chunks with a greater seq")
RUN_ANSWERS: Final = {
    200: Answer(
        "The task has ended (its `status` says how) or waits for input, or its chunks as they come",
        Task,
        events=True,
        headers=("Location",),
    ),
    202: Answer("The task runs on", Task, headers=("Location", "Preference-Applied")),
}
RUN_HEADERS: Final = (
    Header("Prefer", "`respond-async`: do not wait; `wait=N`: wait at most N seconds (RFC 7240)"),
    Header(
        "Idempotency-Key",
        "Makes it safe to repeat the request: for 24 hours the same key answers the same task",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    ),
)
RUN_REFUSALS: Final = (
    InvalidRequest,
    AgentNotFound,
    SessionNotFound,
    SessionMismatch,
    TaskExists,
    SessionBusy,
    IdempotencyMismatch,
    RateLimited,
)
_TASK_REFUSALS: Final = (AgentNotFound, TaskNotFound)
_TASK: Final = "/agents/{agentId}/tasks/{taskId}"

TASK_ROUTES: Final = (
    Route(
        "POST",
        "/agents/{agentId}/tasks",
        "createTask",
        "Run an agent: wait for the end, stream it, or be told where to look",
        create_task,
        RUN_ANSWERS,
        right="write",
        runs=True,
        body=TaskRequest,
        headers=RUN_HEADERS,
        refusals=RUN_REFUSALS,
    ),
    Route(
        "GET",
        "/agents/{agentId}/tasks",
        "listAgentTasks",
        "The agent's tasks, newest first",
        list_agent_tasks,
        {200: Answer("A page of tasks", TaskList)},
        query=(Query("status", {"type": "string", "enum": list(get_args(Status))}, "Only these"), *PAGE),
        refusals=(InvalidRequest, AgentNotFound),
    ),
    Route("GET", _TASK, "getTask", "A task", get_task, {200: Answer("The task", Task)}, refusals=_TASK_REFUSALS),
    Route(
        "DELETE",
        _TASK,
        "deleteTask",
        "Remove an ended task and its log",
        delete_task,
        {204: Answer("Removed")},
        right="write",
        refusals=(*_TASK_REFUSALS, TaskRunning),
    ),
    Route(
        "POST",
        _TASK + "/cancel",
        "cancelTask",
        "Cancel a task; an ended one stays as it is",
        cancel_task,
        {200: Answer("The task, ended", Task)},
        right="write",
        refusals=_TASK_REFUSALS,
    ),
    Route(
        "POST",
        _TASK + "/input",
        "answerTask",
        "Answer a task that waits for input: wait for the end, stream it, or be told where to look",
        answer_task,
        RUN_ANSWERS,
        right="write",
        runs=True,
        body=Answering,
        headers=RUN_HEADERS,
        refusals=(InvalidRequest, *_TASK_REFUSALS, NotWaiting, IdempotencyMismatch, RateLimited),
    ),
    Route(
        "GET",
        _TASK + "/events",
        "readTask",
        "A task's log: a page of it, or as server-sent events, replayed and then live",
        task_events,
        {
            200: Answer("Chunks", ChunkList, events=True),
            204: Answer("The task has ended and `Last-Event-ID` is its last chunk"),
        },
        query=(_AFTER, *PAGE),
        headers=(
            Header(
                "Last-Event-ID",
                "Only chunks with a greater seq; for server-sent events",
                {"type": "integer", "minimum": 0},
            ),
        ),
        refusals=(InvalidRequest, *_TASK_REFUSALS),
    ),
)
