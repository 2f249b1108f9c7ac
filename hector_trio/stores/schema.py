"""The tables of the SQL store, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, MetaData, Table, Text, text

HEAD = "0004"
"""The newest migration; a store that knows another one is older (and migrated) or newer (and refused)."""

NEVER = 2**63 - 1
"""Stands for "does not expire" and "from the newest on", so that every question has the same shape for an index."""

REMOVED = ""
"""Stands for the owner of what nobody sees any more, and what sweeping removes."""

tables = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s",
    }
)

_KEY = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite gives out numbers only to a column that is called INTEGER."""

_UNPRUNED = "ended_at IS NOT NULL AND pruned_at IS NULL"


def _parent(of: str) -> ForeignKey:
    return ForeignKey(of, ondelete="CASCADE")


instances = Table(
    "instances",
    tables,
    Column("id", Text, primary_key=True),
    Column("pid", Integer, nullable=False),
    Column("host", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("checks", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    tables,
    Column("key", _KEY, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("last_activity_at", BigInteger, nullable=False),
    Column("ttl_seconds", BigInteger),
    Column("expires_at", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Index("ix_sessions_name", "owner", "session_id", unique=True),
    # expires_at last: a list is counted without a look at the rows
    Index("ix_sessions_owner", "owner", "key", "expires_at"),
    Index("ix_sessions_agent", "owner", "agent_id", "key", "expires_at"),
    Index("ix_sessions_expiry", "expires_at"),
    sqlite_autoincrement=True,
)

# One row for each top-level member of a session's metadata: a digest of its name and text, which an index can hold
# however long the text is, and which compares in the same way in every database.
labels = Table(
    "labels",
    tables,
    Column("session_key", _KEY, _parent("sessions.key"), primary_key=True, autoincrement=False),
    Column("digest", LargeBinary, primary_key=True),
    Index("ix_labels_digest", "digest", "session_key"),
    sqlite_with_rowid=False,
)

tasks = Table(
    "tasks",
    tables,
    # AUTOINCREMENT: a key is never used again, so a stale writer cannot hit somebody else's task
    Column("key", _KEY, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("stem", Text, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("instance", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("session_id", Text),
    Column("session_key", _KEY, _parent("sessions.key")),
    Column("last_seq", BigInteger, nullable=False),
    # when all of its log but the end was removed
    Column("pruned_at", BigInteger),
    # when it came into its status, and what the status alone does not say
    Column("status_at", BigInteger, nullable=False, server_default="0"),
    Column("mark", Text),
    Index("ix_tasks_name", "owner", "agent_id", "task_id", unique=True),
    Index("ix_tasks_stem", "owner", "agent_id", "stem", "number"),
    Index("ix_tasks_owner", "owner", "key", "status"),
    Index("ix_tasks_agent", "owner", "agent_id", "key", "status"),
    Index("ix_tasks_session", "session_key", "key", "status"),
    Index("ix_tasks_recent", "owner", "agent_id", "status_at", "key"),
    # the same conditions stand in the migrations for PostgreSQL; here they would import its dialect at every start
    Index("ix_tasks_unfinished", "key", sqlite_where=text("ended_at IS NULL")),
    Index("ix_tasks_retention", "session_key", "ended_at"),
    Index("ix_tasks_unpruned", "ended_at", sqlite_where=text(_UNPRUNED)),
    sqlite_autoincrement=True,
)

# What clients make as large as they like stands beside the task: its row is rewritten with every append.
bodies = Table(
    "bodies",
    tables,
    Column("task_key", _KEY, _parent("tasks.key"), primary_key=True, autoincrement=False),
    Column("request", LargeBinary, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("output", Text),
    Column("error", Text),
    Column("question", Text),
)

segments = Table(
    "segments",
    tables,
    Column("task_key", _KEY, _parent("tasks.key"), primary_key=True, autoincrement=False),
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

messages = Table(
    "messages",
    tables,
    Column("session_key", _KEY, _parent("sessions.key"), primary_key=True, autoincrement=False),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    # not a foreign key: a conversation keeps its lines when a task of it is deleted
    Column("task_key", BigInteger, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("partial_status", Text),
    # as an A2A client sent it
    Column("original", LargeBinary),
    Index("ix_messages_task", "task_key", "n"),
)

idempotency = Table(
    "idempotency",
    tables,
    Column("owner", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_hash", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("task_key", _KEY, _parent("tasks.key"), nullable=False),
    Index("ix_idempotency_expiry", "expires_at"),
    Index("ix_idempotency_task", "task_key"),
)

pushes = Table(
    "pushes",
    tables,
    Column("task_key", _KEY, _parent("tasks.key"), primary_key=True, autoincrement=False),
    Column("config_id", Text, primary_key=True),
    Column("url", Text, nullable=False),
    Column("token", Text),
    Column("scheme", Text),
    Column("credentials", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("instance", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    # when there was nothing more to tell
    Column("over_at", BigInteger),
    Column("dialect", Text, nullable=False),
    Index("ix_pushes_open", "task_key", sqlite_where=text("over_at IS NULL")),
)
