"""The operations of A2A (specification 3.1) over the engine: one table, which every binding's codec serves.

An operation is given who asks (``Caller``) and a request of ``a2a.types``; it returns a response of ``a2a.types``, or
``Events`` when it streams, or raises an ``A2AError``. Nothing here knows JSON-RPC, HTTP or gRPC.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from hector_trio.a2a import errors
from hector_trio.a2a import types as a2a
from hector_trio.agents import Agent
from hector_trio.auth import Principal, Right
from hector_trio.errors import HectorError
from hector_trio.transports import Services


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what a binding knows beside the request."""

    services: Services
    agent: Agent
    principal: Principal
    base: str
    """Where clients reach this server, without a slash at the end; addresses on cards begin with it."""
    extensions: frozenset[str] = frozenset()
    """What the client asked for (``A2A-Extensions``)."""
    last_event_id: str | None = None
    """The id of the last event of a stream that the client had before."""

    @property
    def owner(self) -> str:
        return self.principal.owner


class Event(NamedTuple):
    """One event of a stream. ``id`` says where it stands: a client that has it goes on behind it."""

    id: str
    payload: a2a.StreamResponse


class Events(Protocol):
    """A stream: what has happened since the last look, together. Ends where the stream ends (3.1.2, 3.1.6).

    An empty list says that nothing happened for ``KEEP_ALIVE`` seconds. Cutting it never stops the task. Whoever
    iterates closes it. Raises: A2AError when the log cannot be read on.
    """

    def __aiter__(self) -> Events: ...

    async def __anext__(self) -> list[Event]: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Operation:
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
    """Runs one operation, after the checks that all have in common. The only door for codecs.

    Raises: A2AError, and nothing else on purpose.
    """
    try:
        if not caller.principal.may(operation.right):
            raise caller.principal.forbidden(operation.right)
        return await operation.run(caller, request)
    except HectorError as error:
        raise errors.of(error) from error


async def send_message(caller: Caller, request: a2a.SendMessageRequest) -> a2a.SendMessageResponse:
    raise errors.UnsupportedOperationError("not yet")


async def stream_message(caller: Caller, request: a2a.SendMessageRequest) -> Events:
    raise errors.UnsupportedOperationError("not yet")


async def get_task(caller: Caller, request: a2a.GetTaskRequest) -> a2a.Task:
    raise errors.UnsupportedOperationError("not yet")


async def list_tasks(caller: Caller, request: a2a.ListTasksRequest) -> a2a.ListTasksResponse:
    raise errors.UnsupportedOperationError("not yet")


async def cancel_task(caller: Caller, request: a2a.CancelTaskRequest) -> a2a.Task:
    raise errors.UnsupportedOperationError("not yet")


async def subscribe(caller: Caller, request: a2a.SubscribeToTaskRequest) -> Events:
    raise errors.UnsupportedOperationError("not yet")


async def create_push_config(caller: Caller, request: a2a.TaskPushNotificationConfig) -> a2a.TaskPushNotificationConfig:
    raise errors.PushNotificationNotSupportedError("Push notifications are not supported")


async def get_push_config(
    caller: Caller, request: a2a.GetTaskPushNotificationConfigRequest
) -> a2a.TaskPushNotificationConfig:
    raise errors.PushNotificationNotSupportedError("Push notifications are not supported")


async def list_push_configs(
    caller: Caller, request: a2a.ListTaskPushNotificationConfigsRequest
) -> a2a.ListTaskPushNotificationConfigsResponse:
    raise errors.PushNotificationNotSupportedError("Push notifications are not supported")


async def delete_push_config(caller: Caller, request: a2a.DeleteTaskPushNotificationConfigRequest) -> None:
    raise errors.PushNotificationNotSupportedError("Push notifications are not supported")


async def get_extended_card(caller: Caller, request: a2a.GetExtendedAgentCardRequest) -> a2a.AgentCard:
    raise errors.UnsupportedOperationError("not yet")


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
