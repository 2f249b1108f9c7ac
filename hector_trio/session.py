"""The session: its row, its messages, and the pure rules on them (merge patch, ETag, expiry)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct

from hector_trio.errors import PayloadTooLarge
from hector_trio.models import Message, Session, Status, timestamp


class SessionRow(Struct, frozen=True):
    """A session as the store keeps it. Times are milliseconds since the epoch."""

    owner: str
    session_id: str
    agent_id: str
    created_at: int
    last_activity_at: int
    state: dict[str, Any]
    metadata: dict[str, Any]
    ttl_seconds: int | None = None

    @property
    def expires_at(self) -> int | None:
        """A session expires ``ttl_seconds`` after its last activity."""
        return None if self.ttl_seconds is None else self.last_activity_at + self.ttl_seconds * 1000


class MessageRow(Struct, frozen=True):
    """One line of a conversation as the store keeps it; the store numbers them per session in order of arrival."""

    role: Literal["user", "agent"]
    type: str
    content: Any
    agent_id: str
    task_id: str
    created_at: int
    partial_status: Status | None = None
    """Set on an answer that was cut: how its task ended."""
    original: bytes | None = None
    """The line as an A2A client sent it (``a2a.types.Message`` as JSON); read by ``Store.task_messages`` alone."""


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: ``patch`` applied to ``target``; neither is changed."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def check_size(state: Any, metadata: Any, limit_bytes: int) -> None:
    """Raises: PayloadTooLarge."""
    if len(msgspec.json.encode((state, metadata))) > limit_bytes:
        raise PayloadTooLarge(f"State and metadata of a session may have {limit_bytes} bytes together")


def etag(row: SessionRow) -> str:
    """A strong validator over the two writable members only: activity does not change it."""
    same = msgspec.json.encode((row.state, row.metadata), order="deterministic")
    return '"' + hashlib.sha256(same).hexdigest()[:32] + '"'


def wire_session(row: SessionRow) -> Session:
    expires = row.expires_at
    return Session(
        session_id=row.session_id,
        agent_id=row.agent_id,
        created_at=timestamp(row.created_at),
        last_activity_at=timestamp(row.last_activity_at),
        state=row.state,
        metadata=row.metadata,
        expires_at=UNSET if expires is None else timestamp(expires),
    )


def wire_message(row: MessageRow) -> Message:
    return Message(
        role=row.role,
        content=row.content,
        agent_id=row.agent_id,
        task_id=row.task_id,
        timestamp=timestamp(row.created_at),
        type=row.type,
        partial=UNSET if row.partial_status is None else True,
        status=UNSET if row.partial_status is None else row.partial_status,
    )
