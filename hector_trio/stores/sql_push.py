"""Webhooks in SQL: the statements, and what is done with them inside a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from hector_trio.errors import TaskNotFound
from hector_trio.stores import NewPush, Push, PushMove
from hector_trio.stores.rules import check_pushes
from hector_trio.stores.schema import pushes, tasks
from hector_trio.stores.sql_removal import HELD

_COLUMNS: Final = (
    pushes.c.task_key,
    pushes.c.config_id,
    pushes.c.url,
    pushes.c.created_at,
    pushes.c.instance,
    pushes.c.seq,
    pushes.c.token,
    pushes.c.scheme,
    pushes.c.credentials,
    pushes.c.over_at,
    pushes.c.dialect,
)
"""In the order of the members of ``Push``."""

_THIS = (pushes.c.task_key == bindparam("of_task"), pushes.c.config_id == bindparam("of_id"))
_TASK = select(tasks.c.key).where(tasks.c.key == bindparam("of_task"), HELD)
_OTHERS = select(func.count()).where(_THIS[0], pushes.c.config_id != bindparam("of_id"))
_LIST = (
    select(*_COLUMNS)
    .join_from(pushes, tasks, tasks.c.key == pushes.c.task_key)
    .where(_THIS[0], HELD)
    .order_by(pushes.c.config_id)
)
_OPEN = (
    select(*_COLUMNS)
    .join_from(pushes, tasks, tasks.c.key == pushes.c.task_key)
    .where(pushes.c.over_at.is_(None), HELD)
    .order_by(pushes.c.task_key, pushes.c.config_id)
)
_DELETE = delete(pushes).where(*_THIS)
_INSERT = insert(pushes)
_MOVE = (
    update(pushes)
    .where(*_THIS, select(tasks.c.key).where(tasks.c.key == pushes.c.task_key, HELD).exists())
    .values(seq=bindparam("new_seq"), over_at=bindparam("new_over_at"))
)


def _push(row: Sequence[Any]) -> Push:
    return Push(*row)


def put(connection: Connection, new: NewPush) -> None:
    if connection.execute(_TASK, {"of_task": new.push.key}).one_or_none() is None:
        raise TaskNotFound("The task is gone")
    check(connection, new)
    keep(connection, new.push)


def check(connection: Connection, new: NewPush) -> None:
    """Raises: RateLimited."""
    this = {"of_task": new.push.key, "of_id": new.push.config_id}
    check_pushes(connection.execute(_OTHERS, this).scalar_one(), new.limit)


def keep(connection: Connection, push: Push) -> None:
    connection.execute(_DELETE, {"of_task": push.key, "of_id": push.config_id})
    connection.execute(
        _INSERT,
        {
            "task_key": push.key,
            "config_id": push.config_id,
            "url": push.url,
            "token": push.token,
            "scheme": push.scheme,
            "credentials": push.credentials,
            "created_at": push.created_at,
            "instance": push.instance,
            "seq": push.seq,
            "over_at": push.over_at,
            "dialect": push.dialect,
        },
    )


def of_task(connection: Connection, key: int) -> list[Push]:
    return [_push(row) for row in connection.execute(_LIST, {"of_task": key})]


def remove(connection: Connection, key: int, config_id: str) -> None:
    connection.execute(_DELETE, {"of_task": key, "of_id": config_id})


def move(connection: Connection, moves: Sequence[PushMove]) -> frozenset[tuple[int, str]]:
    gone = set()
    for each in moves:
        values = {"of_task": each.key, "of_id": each.config_id, "new_seq": each.seq, "new_over_at": each.over_at}
        if not connection.execute(_MOVE, values).rowcount:
            gone.add((each.key, each.config_id))
    return frozenset(gone)


def take_over(connection: Connection, instance: str) -> list[Push]:
    orphaned = (pushes.c.over_at.is_(None), pushes.c.instance != instance)
    mine = pushes.c.instance == instance
    connection.execute(update(pushes).where(*orphaned).values(instance=instance))
    return [_push(row) for row in connection.execute(_OPEN.where(mine))]
