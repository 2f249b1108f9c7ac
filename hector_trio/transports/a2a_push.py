"""The operations of A2A on push notification configurations (specification 3.1.7 to 3.1.10)."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from hector_trio.a2a import errors, requests
from hector_trio.a2a import types as a2a
from hector_trio.models import is_id
from hector_trio.push import Pusher, Wish
from hector_trio.reach import NotReachable
from hector_trio.stores import Push
from hector_trio.stores.rules import page_position, page_token
from hector_trio.task import TaskRow

if TYPE_CHECKING:
    from hector_trio.transports.a2a import Caller

LONGEST: Final = 4096
"""Characters that a token, or credentials, may have."""

UNNAMED: Final = "default"
"""What some clients of 0.3 call the configuration to which they gave no id; it has the task's."""

_SCHEME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")
_VALUE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?\Z")


def pusher_of(caller: Caller) -> Pusher:
    """Raises: PushNotificationNotSupportedError (3.3.4)."""
    pusher = caller.services.push
    if pusher is None or not caller.agent.info.a2a.push:
        raise errors.PushNotificationNotSupportedError("This agent sends no push notifications")
    return pusher


async def check(caller: Caller, config: a2a.TaskPushNotificationConfig, where: str = "") -> Wish:
    """What a client asks for, once all of it may be. ``where`` begins the names of fields that are wrong.

    Raises: PushNotificationNotSupportedError, InvalidParamsError.
    """
    pusher = pusher_of(caller)
    if config.id and not is_id(config.id):
        raise errors.invalid(f"{where}id", "must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -, not . or ..")
    token, authentication = config.token or None, config.authentication
    scheme = credentials = None
    if authentication is not None:
        scheme, credentials = authentication.scheme, authentication.credentials or None
        if not _SCHEME.match(scheme):
            raise errors.invalid(f"{where}authentication.scheme", "is no HTTP authentication scheme, such as Bearer")
    for name, value in (("token", token), ("authentication.credentials", credentials)):
        if value is not None and not (len(value) <= LONGEST and _VALUE.match(value)):
            raise errors.invalid(f"{where}{name}", f"must be at most {LONGEST} characters that a header can hold")
    try:
        await pusher.check(config.url)
    except (ValueError, NotReachable) as error:
        raise errors.invalid(f"{where}url", str(error)) from None
    return Wish(config.url, config.id or None, token, scheme, credentials, "0.3" if caller.legacy else "1.0")


async def create(
    caller: Caller, row: TaskRow, config: a2a.TaskPushNotificationConfig
) -> a2a.TaskPushNotificationConfig:
    """3.1.7: from now on the webhook is told of the task; of one that has ended, of its end."""
    wish = await check(caller, config)
    if wish.config_id is None:
        wish = replace(wish, config_id=str(uuid.uuid4()))
    return _config(await pusher_of(caller).add(row, wish), row)


async def get(caller: Caller, row: TaskRow, config_id: str) -> a2a.TaskPushNotificationConfig:
    """3.1.8."""
    found = {push.config_id: push for push in await pusher_of(caller).list(row)}
    push = found.get(config_id)
    if push is None and caller.legacy and config_id == UNNAMED:
        push = found.get(row.task_id)
    if push is not None:
        return _config(push, row)
    raise errors.TaskNotFoundError(
        f"Task {row.task_id} has no push notification configuration {config_id[:128]!r}",
        metadata={"taskId": row.task_id, "configId": config_id[:128]},
    )


async def list_page(
    caller: Caller, row: TaskRow, request: a2a.ListTaskPushNotificationConfigsRequest
) -> a2a.ListTaskPushNotificationConfigsResponse:
    """3.1.9: by their ids."""
    size = requests.page_size(request.page_size)
    question = ("pushes", row.key)
    start = page_position(request.page_token or "", question) or 0
    found = await pusher_of(caller).list(row)
    more = page_token(start + size, question) if len(found) > start + size else ""
    return a2a.ListTaskPushNotificationConfigsResponse(
        [_config(each, row) for each in found[start : start + size]], more
    )


async def delete(caller: Caller, row: TaskRow, config_id: str) -> None:
    """3.1.10: idempotent; nothing is sent any more."""
    await pusher_of(caller).remove(row, config_id)


def _config(push: Push, row: TaskRow) -> a2a.TaskPushNotificationConfig:
    """What its owner is told of it: all but the credentials, which only the webhook is to see again."""
    authentication = None if push.scheme is None else a2a.AuthenticationInfo(push.scheme)
    return a2a.TaskPushNotificationConfig(
        push.url, push.config_id, row.task_id, token=push.token, authentication=authentication
    )
