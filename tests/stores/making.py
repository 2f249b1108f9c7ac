"""Short ways to make what stores are given."""

from __future__ import annotations

from typing import Any

from hector_trio.session import MessageRow, SessionRow
from hector_trio.stores import Append, Change, Idempotency, NewTask, Store
from hector_trio.task import TaskRow

ME = "instance-1"
NOW = 1_000_000


def new_task(task_id: str = "t", **members: Any) -> NewTask:
    known: dict[str, Any] = {
        "owner": "alice",
        "agent_id": "a",
        "task_id": task_id,
        "request": b'{"input":{}}',
        "fingerprint": "f",
        "policy": "cancel",
        "instance": ME,
        "metadata": {},
        "created_at": NOW,
    }
    return NewTask(**(known | members))


def new_session(session_id: str = "s", **members: Any) -> SessionRow:
    known: dict[str, Any] = {
        "owner": "alice",
        "session_id": session_id,
        "agent_id": "a",
        "created_at": NOW,
        "last_activity_at": NOW,
        "state": {},
        "metadata": {},
    }
    return SessionRow(**(known | members))


def chunks(key: int, first: int, *data: bytes, **members: Any) -> Append:
    return Append(key, members.pop("instance", ME), first, first + len(data) - 1, b"\n".join(data), **members)


def completed(at: int = NOW) -> Change:
    return Change("completed", ended_at=at)


def message(content: Any = "hello", task_id: str = "t", at: int = NOW, **members: Any) -> MessageRow:
    return MessageRow(members.pop("role", "user"), "text/plain", content, "a", task_id, at, **members)


def idempotency(key: str = "k", body: str = "b", expires_at: int = NOW + 1000) -> Idempotency:
    return Idempotency("POST /agents/a/tasks", key, body, expires_at)


async def accept(store: Store, task_id: str = "t", **members: Any) -> TaskRow:
    """A new task's row."""
    accepted = await store.create_task(new_task(task_id, **members))
    assert accepted.how == "created"
    return accepted.task


async def end(store: Store, row: TaskRow, at: int = NOW) -> None:
    """Ends a task that has no chunks."""
    assert await store.append([chunks(row.key, 1, b"end", change=completed(at))]) == frozenset()


async def ended(store: Store, task_id: str = "t", at: int = NOW, **members: Any) -> TaskRow:
    row = await accept(store, task_id, **members)
    await end(store, row, at)
    return row
