"""The Store protocol as a plain list of what was accepted: slow, and too simple to be wrong in the ways of a store."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from hector_trio.errors import (
    IdempotencyMismatch,
    InvalidRequest,
    PreconditionFailed,
    RateLimited,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    TaskExists,
    TaskNotFound,
    TaskRunning,
)
from hector_trio.session import MessageRow, SessionRow, etag
from hector_trio.stores import Append, Idempotency, NewTask, Segment
from hector_trio.task import TaskRow

ENDS = ("completed", "failed", "cancelled")


class PlainSession:
    def __init__(self, row: SessionRow) -> None:
        self.row = row
        self.messages: list[tuple[PlainTask, MessageRow]] = []


class PlainTask:
    def __init__(self, row: TaskRow, session: PlainSession | None) -> None:
        self.row = row
        self.session = session
        self.log: list[Segment] = []
        self.pruned = False

    @property
    def ended(self) -> bool:
        return self.row.status in ENDS


class Plain:
    """Everything in the order in which it was accepted. What a store answers or raises is asked of the method of the
    same name; keys and new names of replaced tasks are the store's to choose, and are told (``add``, ``rename``)."""

    def __init__(self) -> None:
        self.tasks: list[PlainTask] = []
        self.sessions: list[PlainSession] = []
        self.keys: dict[tuple[str, str, str], tuple[Idempotency, PlainTask]] = {}
        self.highest_key = 0

    # --- what is there
    def gone(self, session: PlainSession | None, now: int) -> bool:
        """Expired, and no task of it at work."""
        if session is None or session.row.ttl_seconds is None:
            return False
        if now < session.row.last_activity_at + session.row.ttl_seconds * 1000:
            return False
        return all(task.ended for task in self.tasks if task.session is session)

    def session(self, owner: str, session_id: str) -> PlainSession | None:
        name = (owner, session_id)
        return next((each for each in self.sessions if (each.row.owner, each.row.session_id) == name), None)

    def live_session(self, owner: str, session_id: str, now: int) -> PlainSession:
        session = self.session(owner, session_id)
        if session is None or self.gone(session, now):
            raise SessionNotFound(session_id)
        return session

    def named(self, owner: str, agent_id: str, task_id: str) -> PlainTask | None:
        name = (owner, agent_id, task_id)
        rows = (task for task in self.tasks if (task.row.owner, task.row.agent_id, task.row.task_id) == name)
        return next(rows, None)

    def task(self, key: int) -> PlainTask | None:
        return next((task for task in self.tasks if task.row.key == key), None)

    # --- tasks
    def find_idempotent(self, owner: str, key: Idempotency, now: int) -> PlainTask | None:
        held, task = self.keys.get((owner, key.route, key.key), (None, None))
        if held is None or task is None or held.expires_at <= now or self.gone(task.session, now):
            return None
        if held.body_hash != key.body_hash:
            raise IdempotencyMismatch(key.key)
        return task

    def create_task(self, new: NewTask) -> tuple[str, PlainTask | None]:
        """How it is accepted, and the task that was there already: the one to follow, or the one that is replaced."""
        if new.idempotency is not None:
            task = self.find_idempotent(new.owner, new.idempotency, new.created_at)
            if task is not None:
                return "replayed", task
        if new.session_id is not None:
            session = self.live_session(new.owner, new.session_id, new.created_at)
            if session.row.agent_id != new.agent_id:
                raise SessionMismatch(new.session_id)
        same = self.named(new.owner, new.agent_id, new.task_id)
        if same is not None and not same.ended:
            if same.row.fingerprint != new.fingerprint:
                raise TaskExists(new.task_id)
            self.remember(new, same)
            return "running", same
        return "created", same

    def remember(self, new: NewTask, task: PlainTask) -> None:
        if new.idempotency is not None:
            self.keys[new.owner, new.idempotency.route, new.idempotency.key] = (new.idempotency, task)

    def add(self, new: NewTask, key: int) -> PlainTask:
        """The task that a store has made of ``new`` under ``key``."""
        assert key > self.highest_key
        self.highest_key = key
        row = TaskRow(
            key=key,
            owner=new.owner,
            agent_id=new.agent_id,
            task_id=new.task_id,
            status="pending",
            request=new.request,
            fingerprint=new.fingerprint,
            policy=new.policy,
            instance=new.instance,
            metadata=new.metadata,
            created_at=new.created_at,
            session_id=new.session_id,
            status_at=new.created_at,
        )
        session = None if new.session_id is None else self.session(new.owner, new.session_id)
        if session is not None:
            self.touch(session, new.created_at)
        self.tasks.append(PlainTask(row, session))
        self.remember(new, self.tasks[-1])
        return self.tasks[-1]

    def rename(self, task: PlainTask, name: str) -> None:
        """The new name that a store has given to a replaced task."""
        match = re.fullmatch(r"(.+)~([1-9][0-9]*)", name)
        assert match is not None
        assert len(name) <= 128
        assert task.row.task_id.startswith(match[1])
        assert len(match[1]) == len(task.row.task_id) or len(name) == 128
        assert self.named(task.row.owner, task.row.agent_id, name) is None
        task.row = replace(task.row, task_id=name)

    def append(self, appends: Iterable[Append]) -> frozenset[int]:
        return frozenset(append.key for append in appends if not self._append(append))

    def _append(self, append: Append) -> bool:
        task = self.task(append.key)
        if task is None or task.ended or task.row.instance != append.instance:
            return False
        if task.row.last_seq + 1 != append.first_seq:
            return False
        task.row = replace(task.row, last_seq=append.last_seq)
        if append.data:
            task.log.append(Segment(append.first_seq, append.last_seq, append.data))
        change = append.change
        if change is not None:
            names = ("status", "output", "error", "ended_at", "question", "mark")
            if change.status_at is not None:
                task.row = replace(task.row, status_at=change.status_at)
            task.row = replace(task.row, **{name: getattr(change, name) for name in names})
        if task.session is not None:
            if append.message is not None:
                task.session.messages.append((task, append.message))
                self.touch(task.session, append.message.created_at)
            if change is not None and change.ended_at is not None:
                self.touch(task.session, change.ended_at)
        return True

    def set_policy(self, key: int, policy: str) -> None:
        task = self.task(key)
        if task is not None and not task.ended:
            task.row = replace(task.row, policy=policy)

    def take_over(self, instance: str) -> list[TaskRow]:
        left = [task for task in self.tasks if not task.ended and task.row.instance != instance]
        for task in left:
            task.row = replace(task.row, instance=instance)
        return [task.row for task in left]

    def delete_task(self, owner: str, agent_id: str, task_id: str) -> None:
        task = self.named(owner, agent_id, task_id)
        if task is None:
            raise TaskNotFound(task_id)
        if not task.ended:
            raise TaskRunning(task_id)
        self.remove(task)

    def remove(self, task: PlainTask) -> None:
        self.tasks.remove(task)
        self.keys = {name: held for name, held in self.keys.items() if held[1] is not task}

    def list_tasks(self, owner: str, now: int, **filters: str) -> list[TaskRow]:
        found = [task.row for task in self.tasks if task.row.owner == owner and not self.gone(task.session, now)]
        return [row for row in reversed(found) if all(getattr(row, name) == filters[name] for name in filters)]

    # --- sessions
    def touch(self, session: PlainSession, at: int) -> None:
        session.row = replace(session.row, last_activity_at=max(session.row.last_activity_at, at))

    def create_session(self, row: SessionRow, limit: int) -> None:
        same = self.session(row.owner, row.session_id)
        if same is not None and not self.gone(same, row.created_at):
            raise SessionExists(row.session_id)
        if len(self.list_sessions(row.owner, row.created_at, None)) >= limit:
            raise RateLimited(row.owner)
        if same is not None:
            self.remove_session(same)
        self.sessions.append(PlainSession(row))

    def update_session(
        self, owner: str, session_id: str, now: int, state: Any, metadata: Any, if_match: str | None
    ) -> SessionRow:
        session = self.live_session(owner, session_id, now)
        if if_match not in (None, etag(session.row)):
            raise PreconditionFailed(session_id)
        for patch in (state, metadata):
            if patch is not None and not isinstance(patch, dict):
                raise InvalidRequest("must be an object")
        session.row = replace(
            session.row, state=_merged(session.row.state, state), metadata=_merged(session.row.metadata, metadata)
        )
        self.touch(session, now)
        return session.row

    def delete_session(self, owner: str, session_id: str) -> None:
        session = self.session(owner, session_id)
        if session is None:
            raise SessionNotFound(session_id)
        self.remove_session(session)

    def remove_session(self, session: PlainSession) -> None:
        for task in [task for task in self.tasks if task.session is session]:
            self.remove(task)
        self.sessions.remove(session)

    def list_sessions(self, owner: str, now: int, metadata: dict[str, str] | None) -> list[SessionRow]:
        found = [each.row for each in self.sessions if each.row.owner == owner and not self.gone(each, now)]
        return [row for row in reversed(found) if all(_says(row, *pair) for pair in (metadata or {}).items())]

    def messages(self, session: PlainSession | None) -> list[MessageRow]:
        lines = [] if session is None else session.messages
        return [replace(line, task_id=task.row.task_id) if task in self.tasks else line for task, line in lines]

    # --- housekeeping
    def sweep(self, now: int, tasks_ended_before: int, logs_ended_before: int | None) -> None:
        """All that a sweep may remove."""
        self.keys = {name: held for name, held in self.keys.items() if held[0].expires_at > now}
        for task in list(self.tasks):
            if task.session is None and task.row.ended_at is not None and task.row.ended_at < tasks_ended_before:
                self.remove(task)
        for session in [session for session in self.sessions if self.gone(session, now)]:
            self.remove_session(session)
        for task in self.tasks:
            ended_at = task.row.ended_at
            if ended_at is not None and logs_ended_before is not None and ended_at < logs_ended_before:
                task.log = task.log[-1:]


def _merged(target: dict[str, Any], patch: dict[str, Any] | None) -> dict[str, Any]:
    """RFC 7396, section 2."""
    merged = dict(target)
    for name, value in (patch or {}).items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            inner = merged.get(name)
            merged[name] = _merged(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _says(row: SessionRow, name: str, text: str) -> bool:
    if name not in row.metadata:
        return False
    value = row.metadata[name]
    return text == (value if isinstance(value, str) else msgspec.json.encode(value).decode())
