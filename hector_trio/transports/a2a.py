"""The operations of A2A (specification 3.1) over the engine: one table, which every binding's codec serves.

An operation is given who asks (``Caller``) and a request of ``a2a.types``; it returns a response of ``a2a.types``, or
``Events`` when it streams, or raises an ``A2AError``. Nothing here knows JSON-RPC, HTTP or gRPC.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final

import msgspec
import trio
from msgspec import Struct
from msgspec.structs import replace

from hector_trio.a2a import cards, errors, requests
from hector_trio.a2a import types as a2a
from hector_trio.a2a.mapping import TaskSnapshot, content_of, context_of, media_type_of
from hector_trio.agents import Agent
from hector_trio.auth import Principal, Right
from hector_trio.engine import Order
from hector_trio.errors import HectorError, NotWaiting, SessionExists
from hector_trio.log import now_ms
from hector_trio.models import TaskContext, is_id
from hector_trio.push import Wish
from hector_trio.session import SessionRow
from hector_trio.stores import Idempotency
from hector_trio.task import EXTENSION_REQUIRED, StoredRequest, TaskRow
from hector_trio.transports import Services, a2a_push
from hector_trio.transports.a2a_stream import Event, Events, Place, TaskEvents, TaskReader
from hector_trio.transports.a2a_tasks import STATES, history, task_from_row, task_of

__all__ = ["OPERATIONS", "Caller", "Event", "Events", "Operation", "activated", "perform"]

DAY_MS: Final = 24 * 3600 * 1000
"""How long the answer to a question is known by its message's id."""


class Caller(Struct, frozen=True):
    """Who asks, and what a binding knows beside the request."""

    services: Services
    agent: Agent
    principal: Principal
    base: str
    """Where clients reach this server, without a slash at the end; addresses on cards begin with it."""
    extensions: frozenset[str] = frozenset()
    """What the client asked for (``A2A-Extensions``)."""
    after: str | None = None
    """The id of the last event of a stream that the client had before, to go on behind it."""
    legacy: bool = False
    """Whether the client speaks A2A 0.3; requests and answers are translated already."""

    @property
    def owner(self) -> str:
        return self.principal.owner

    @property
    def agent_id(self) -> str:
        return self.agent.info.agent_id


class Operation(Struct, frozen=True):
    """One row of the table."""

    name: str
    """JSON-RPC's method and gRPC's rpc (5.3)."""
    request: type[Any]
    run: Callable[[Caller, Any], Awaitable[Any]]
    """Returns what the table in 5.3 says; ``Events`` when ``streams``; ``None``: an empty response."""
    right: Right
    """What the caller must be allowed to do."""
    streams: bool = False


async def perform(caller: Caller, operation: Operation, request: Any) -> Any:
    """Runs one operation, after the checks that all have in common (3.3.4, 13.1). The only door for codecs.

    Raises: A2AError, and nothing else on purpose.
    """
    try:
        if not caller.principal.may(operation.right):
            raise caller.principal.forbidden(operation.right)
        about = caller.agent.info.a2a
        for each in about.extensions:
            if each.required and each.enforce == "always" and each.uri not in caller.extensions:
                raise _required(each.uri)
        if operation.streams and not about.streaming:
            raise errors.UnsupportedOperationError("This agent does not stream")
        return await operation.run(caller, request)
    except HectorError as error:
        raise errors.of(error) from error


def _required(uri: str) -> errors.A2AError:
    return errors.ExtensionSupportRequiredError(
        f"This agent asks for the extension {uri}; name it in A2A-Extensions", metadata={"extension": uri}
    )


def activated(caller: Caller) -> list[str]:
    """The extensions that the client asked for and gets, for the response's ``A2A-Extensions``."""
    return [each.uri for each in cards.extensions(caller.agent.info.a2a, caller.base) if each.uri in caller.extensions]


# --- sending ----------------------------------------------------------------------------------------------------------


async def send_message(caller: Caller, request: a2a.SendMessageRequest) -> a2a.SendMessageResponse:
    """3.1.1: waits until the task has ended or waits for somebody, unless it is to return at once (3.2.2)."""
    configuration = request.configuration or a2a.SendMessageConfiguration()
    requests.check_history_length(configuration.history_length)
    row = await _accept(caller, request)
    engine = caller.services.engine
    decides = bool(configuration.return_immediately)
    with TaskReader(engine, row) as reader:
        if decides and not caller.agent.info.replies:
            snapshot = await reader.snapshot(row.last_seq)
        else:
            snapshot = await reader.settle(decides=decides)
    _check_extension(snapshot)
    if snapshot.reply is not None:
        return a2a.SendMessageResponse(message=snapshot.reply)
    return a2a.SendMessageResponse(task=await _task(caller, row, snapshot, configuration.history_length))


async def stream_message(caller: Caller, request: a2a.SendMessageRequest) -> Events:
    """3.1.2: a bare message alone, or a Task and what becomes of it until it has ended or asks for input."""
    configuration = request.configuration or a2a.SendMessageConfiguration()
    requests.check_history_length(configuration.history_length)
    row = await _accept(caller, request)
    with ExitStack() as opening:
        reader = opening.enter_context(TaskReader(caller.services.engine, row))
        decides = caller.agent.info.replies and not row.last_seq

        async def first() -> Event:
            snapshot = await reader.snapshot(None if decides else row.last_seq)
            _check_extension(snapshot)
            if snapshot.reply is not None:
                return Event(str(snapshot.seq), a2a.StreamResponse(message=snapshot.reply))
            return await _event(caller, row, snapshot, configuration.history_length)

        return _events(caller, reader, opening, first, decides=decides, ends_with_question=True)


def _check_extension(snapshot: TaskSnapshot) -> None:
    """Raises: ExtensionSupportRequiredError, when that is how the agent has ended the task."""
    if snapshot.code == EXTENSION_REQUIRED and snapshot.said:
        raise _required(snapshot.said)


async def _accept(caller: Caller, request: a2a.SendMessageRequest) -> TaskRow:
    """The task that a message begins or answers. Raises: A2AError, HectorError."""
    message = request.message
    _check_parts(caller, message)
    configuration = request.configuration or a2a.SendMessageConfiguration()
    wish = None
    if (config := configuration.task_push_notification_config) is not None:
        wish = await a2a_push.check(caller, config, "configuration.taskPushNotificationConfig.")
    if message.task_id:
        return await _answer(caller, message.task_id, message, wish)
    return await _begin(caller, request, wish)


async def _begin(caller: Caller, request: a2a.SendMessageRequest, wish: Wish | None) -> TaskRow:
    message = request.message
    session_id = await _context(caller, message.context_id)
    task_id = str(uuid.uuid4())
    stored = StoredRequest(
        task_id=task_id,
        input=content_of(message),
        context=TaskContext(session_id=session_id, metadata=request.metadata),
        message=message,
        extensions=tuple(sorted(caller.extensions)),
    )
    order = Order(caller.owner, caller.agent_id, stored, "continue")
    engine = caller.services.engine
    if wish is None:
        return (await engine.submit(order)).task
    pusher = a2a_push.pusher_of(caller)
    with pusher.room():
        push = pusher.first(task_id, wish)
        row = (await engine.submit(replace(order, push=push))).task
    pusher.begin(replace(push, key=row.key))
    return row


def _check_parts(caller: Caller, message: a2a.Message) -> None:
    """Raises: ContentTypeNotSupportedError for what the agent does not take."""
    modes = cards.input_modes(caller.agent.info.a2a, caller.agent.info.input_types)
    for n, part in enumerate(message.parts):
        kind = media_type_of(part)
        if not cards.accepts(modes, kind):
            raise errors.ContentTypeNotSupportedError(
                f"message.parts[{n}]: {kind} is not supported; this agent takes {', '.join(modes)}",
                metadata={"mediaType": kind},
            )


async def _context(caller: Caller, context_id: str | None) -> str:
    """The session that is the context (3.4.1), made when it is not there. Somebody else's id is simply not there."""
    store, settings = caller.services.engine.store, caller.services.settings
    if context_id is not None and not is_id(context_id):
        raise errors.invalid("message.contextId", "must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not . or ..")
    now = now_ms()
    if context_id is not None:
        session = await store.get_session(caller.owner, context_id, now=now)
        if session is not None and session.agent_id != caller.agent_id:
            raise errors.invalid("message.contextId", "belongs to another agent")
        if session is not None:
            return context_id
    row = SessionRow(
        owner=caller.owner,
        session_id=context_id or str(uuid.uuid4()),
        agent_id=caller.agent_id,
        created_at=now,
        last_activity_at=now,
        state={},
        metadata={},
        ttl_seconds=max(1, int(settings.tasks.retention)),
    )
    try:
        await store.create_session(row, limit=settings.limits.sessions)
    except SessionExists:
        if context_id is None:
            raise
        return await _context(caller, context_id)  # another message was quicker
    return row.session_id


async def _answer(caller: Caller, task_id: str, message: a2a.Message, wish: Wish | None) -> TaskRow:
    """A message to a task that waits for one (3.4.3). The same message again, with its id, answers once."""
    engine = caller.services.engine
    row = await _find(caller, task_id)
    if message.context_id and message.context_id != context_of(row.task_id, row.session_id):
        raise errors.invalid("message.contextId", "is not the context of the task")
    digest = hashlib.sha256(msgspec.json.encode(message, order="deterministic")).hexdigest()
    key = Idempotency(f"A2A {row.agent_id}/{row.task_id}", digest, digest, now_ms() + DAY_MS)
    for last in (False, True):
        if (replayed := await engine.answered(row, key)) is not None:
            return replayed
        if row.ended:
            raise errors.UnsupportedOperationError(
                f"Task {row.task_id} has ended; it takes no more messages", metadata={"taskId": row.task_id}
            )
        try:
            if wish is None:
                return await engine.answer(row, content_of(message), None, key, message)
            pusher = a2a_push.pusher_of(caller)
            with pusher.room((row.key, wish.config_id or row.task_id)):
                new = await pusher.next(row, wish)
                answered = await engine.answer(row, content_of(message), None, key, message, new)
            pusher.begin(new.push)
            return answered
        except NotWaiting:
            if last:
                raise
            row = await _find(caller, task_id)  # it may have ended, or been answered by this very message
    raise AssertionError("unreachable")


# --- tasks ------------------------------------------------------------------------------------------------------------


async def get_task(caller: Caller, request: a2a.GetTaskRequest) -> a2a.Task:
    requests.check_history_length(request.history_length)
    row = await _find(caller, request.id)
    return await _task(caller, row, await _snapshot(caller, row), request.history_length)


async def list_tasks(caller: Caller, request: a2a.ListTasksRequest) -> a2a.ListTasksResponse:
    """3.1.4: the caller's tasks of this agent, the last changed first."""
    requests.check_history_length(request.history_length)
    size = requests.page_size(request.page_size)
    status = None if request.status == "TASK_STATE_UNSPECIFIED" else request.status
    page = await caller.services.engine.store.recent_tasks(
        caller.owner,
        caller.agent_id,
        session_id=request.context_id or None,
        states=() if status is None else STATES[status],
        since=requests.milliseconds("statusTimestampAfter", request.status_timestamp_after),
        limit=size,
        token=request.page_token or "",
    )
    tasks = []
    for row in page.items:
        messages = await history(caller.services.engine.store, row, request.history_length)
        if request.include_artifacts:
            tasks.append(task_of(row, await _snapshot(caller, row), messages, artifacts=True))
        else:
            tasks.append(task_from_row(row, messages))
    return a2a.ListTasksResponse(tasks, page.next_token, size, page.total)


async def cancel_task(caller: Caller, request: a2a.CancelTaskRequest) -> a2a.Task:
    """3.1.5: says that a task is canceled once its work has stopped and that is stored."""
    row = await _find(caller, request.id)
    if not row.ended:
        row = await caller.services.engine.cancel(row)
        if row.status == "cancelled":
            return await _task(caller, row, await _snapshot(caller, row), None)
    raise errors.TaskNotCancelableError(
        f"Task {row.task_id} has ended as {row.status}", metadata={"taskId": row.task_id}
    )


async def subscribe(caller: Caller, request: a2a.SubscribeToTaskRequest) -> Events:
    """3.1.6: the Task as it is, then what becomes of it. With a place to go on from, only what comes behind it."""
    row = await _find(caller, request.id)
    after = cards.resume_after(request.metadata) or caller.after
    if after is not None and cards.resumes(caller.agent.info.a2a):
        return await _resumed(caller, row, Place.read(after))
    if row.ended:
        raise errors.UnsupportedOperationError(
            f"Task {row.task_id} has ended; get it instead", metadata={"taskId": row.task_id}
        )
    with ExitStack() as opening:
        reader = opening.enter_context(TaskReader(caller.services.engine, row))
        first = await _event(caller, row, await reader.snapshot(), None)

        async def given() -> Event:
            await trio.lowlevel.checkpoint()
            return first

        return _events(caller, reader, opening, given)


async def _resumed(caller: Caller, row: TaskRow, place: Place) -> Events:
    engine = caller.services.engine
    if place.seq > engine.last_seq(row):
        row = await _find(caller, row.task_id)  # it may have moved on since
        if place.seq > engine.last_seq(row):
            raise errors.invalid("after", f"is beyond the last event, which is {engine.last_seq(row)}")
    with ExitStack() as opening:
        reader = opening.enter_context(TaskReader(engine, row))
        await reader.go_on(place)
        return _events(caller, reader, opening, None)


async def _snapshot(caller: Caller, row: TaskRow) -> TaskSnapshot:
    """The task as it is now."""
    return (await caller.services.engine.views.of(row).read(row)).snapshot()


async def _event(caller: Caller, row: TaskRow, snapshot: TaskSnapshot, history_length: int | None) -> Event:
    """The Task as the first event of a stream, and where that is."""
    return Event(str(snapshot.seq), a2a.StreamResponse(task=await _task(caller, row, snapshot, history_length)))


def _events(
    caller: Caller,
    reader: TaskReader,
    opening: ExitStack,
    first: Callable[[], Awaitable[Event]] | None,
    **how: bool,
) -> Events:
    """From here on the stream holds what was opened."""
    marked = cards.RESUME in caller.extensions and cards.resumes(caller.agent.info.a2a)
    return TaskEvents(
        reader,
        opening.pop_all(),
        first,
        extension=cards.RESUME if marked else None,
        **how,
    )


async def _find(caller: Caller, task_id: str) -> TaskRow:
    row = None
    if is_id(task_id):
        row = await caller.services.engine.find(caller.owner, caller.agent_id, task_id)
    if row is None:
        raise errors.TaskNotFoundError(f"Task {task_id[:128]!r} was not found", metadata={"taskId": task_id[:128]})
    return row


async def _task(caller: Caller, row: TaskRow, snapshot: TaskSnapshot, history_length: int | None) -> a2a.Task:
    """The Task with its history. ``row`` may be older than the snapshot."""
    store = caller.services.engine.store
    if not row.ended:
        row = await store.get_task_by_key(row.key) or row
    return task_of(row, snapshot, await history(store, row, history_length))


# --- push notifications -----------------------------------------------------------------------------------------------


async def create_push_config(caller: Caller, request: a2a.TaskPushNotificationConfig) -> a2a.TaskPushNotificationConfig:
    a2a_push.pusher_of(caller)
    return await a2a_push.create(caller, await _find(caller, request.task_id or ""), request)


async def get_push_config(
    caller: Caller, request: a2a.GetTaskPushNotificationConfigRequest
) -> a2a.TaskPushNotificationConfig:
    a2a_push.pusher_of(caller)
    return await a2a_push.get(caller, await _find(caller, request.task_id), request.id)


async def list_push_configs(
    caller: Caller, request: a2a.ListTaskPushNotificationConfigsRequest
) -> a2a.ListTaskPushNotificationConfigsResponse:
    a2a_push.pusher_of(caller)
    return await a2a_push.list_page(caller, await _find(caller, request.task_id), request)


async def delete_push_config(caller: Caller, request: a2a.DeleteTaskPushNotificationConfigRequest) -> None:
    a2a_push.pusher_of(caller)
    await a2a_push.delete(caller, await _find(caller, request.task_id), request.id)


# --- the card ---------------------------------------------------------------------------------------------------------


def card(services: Services, agent: Agent, base: str, *, extended: bool = False) -> a2a.AgentCard:
    """What an agent says of itself here, signed where there is a key (8.4): as it is on every binding."""
    secured, push = services.authenticator.required, services.push is not None and agent.info.a2a.push
    grpc = services.settings.server.http2
    made = cards.card(agent.info, base, secured=secured, push=push, extended=extended, grpc=grpc)
    if services.signer is None:
        return made
    signed = services.signer.signed(cards.both_dialects(made))
    signatures = msgspec.convert(signed["signatures"], list[a2a.AgentCardSignature])
    return replace(made, signatures=signatures)


async def get_extended_card(caller: Caller, request: a2a.GetExtendedAgentCardRequest) -> a2a.AgentCard:
    """3.1.11: for clients that have shown who they are; where nobody is asked to, there is none."""
    if not caller.services.authenticator.required:
        raise errors.UnsupportedOperationError("This agent has no extended card")
    return card(caller.services, caller.agent, caller.base, extended=True)


OPERATIONS: Final[Mapping[str, Operation]] = {
    each.name: each
    for each in (
        Operation("SendMessage", a2a.SendMessageRequest, send_message, "write"),
        Operation("SendStreamingMessage", a2a.SendMessageRequest, stream_message, "write", streams=True),
        Operation("GetTask", a2a.GetTaskRequest, get_task, "read"),
        Operation("ListTasks", a2a.ListTasksRequest, list_tasks, "read"),
        Operation("CancelTask", a2a.CancelTaskRequest, cancel_task, "write"),
        Operation("SubscribeToTask", a2a.SubscribeToTaskRequest, subscribe, "read", streams=True),
        Operation("CreateTaskPushNotificationConfig", a2a.TaskPushNotificationConfig, create_push_config, "write"),
        Operation("GetTaskPushNotificationConfig", a2a.GetTaskPushNotificationConfigRequest, get_push_config, "read"),
        Operation(
            "ListTaskPushNotificationConfigs", a2a.ListTaskPushNotificationConfigsRequest, list_push_configs, "read"
        ),
        Operation(
            "DeleteTaskPushNotificationConfig",
            a2a.DeleteTaskPushNotificationConfigRequest,
            delete_push_config,
            "write",
        ),
        Operation("GetExtendedAgentCard", a2a.GetExtendedAgentCardRequest, get_extended_card, "read"),
    )
}
