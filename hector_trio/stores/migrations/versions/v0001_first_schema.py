"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out, not taken from the schema module: that one moves on, a migration does not.
_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _session(name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name=name, ondelete="CASCADE")


def _task(name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["task_key"], ["tasks.key"], name=name, ondelete="CASCADE")


def upgrade() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("checks", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_instances"),
    )
    _sessions()
    _tasks()
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("task_key", _KEY, nullable=False),
        _task("fk_idempotency_task_key"),
        sa.PrimaryKeyConstraint("owner", "route", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_expiry", "idempotency", ["expires_at"])
    op.create_index("ix_idempotency_task", "idempotency", ["task_key"])


def _sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("key", _KEY, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_activity_at", sa.BigInteger(), nullable=False),
        sa.Column("ttl_seconds", sa.BigInteger()),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_sessions"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_sessions_name", "sessions", ["owner", "session_id"], unique=True)
    op.create_index("ix_sessions_owner", "sessions", ["owner", "key", "expires_at"])
    op.create_index("ix_sessions_agent", "sessions", ["owner", "agent_id", "key", "expires_at"])
    op.create_index("ix_sessions_expiry", "sessions", ["expires_at"])
    op.create_table(
        "labels",
        sa.Column("session_key", _KEY, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        _session("fk_labels_session_key"),
        sa.PrimaryKeyConstraint("session_key", "digest", name="pk_labels"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_labels_digest", "labels", ["digest", "session_key"])
    op.create_table(
        "messages",
        sa.Column("session_key", _KEY, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("task_key", sa.BigInteger(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("partial_status", sa.Text()),
        _session("fk_messages_session_key"),
        sa.PrimaryKeyConstraint("session_key", "n", name="pk_messages"),
    )


def _tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("key", _KEY, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("stem", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("session_id", sa.Text()),
        sa.Column("session_key", _KEY),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        _session("fk_tasks_session_key"),
        sa.PrimaryKeyConstraint("key", name="pk_tasks"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_tasks_name", "tasks", ["owner", "agent_id", "task_id"], unique=True)
    op.create_index("ix_tasks_stem", "tasks", ["owner", "agent_id", "stem", "number"])
    op.create_index("ix_tasks_owner", "tasks", ["owner", "key", "status"])
    op.create_index("ix_tasks_agent", "tasks", ["owner", "agent_id", "key", "status"])
    op.create_index("ix_tasks_session", "tasks", ["session_key", "key", "status"])
    unfinished = sa.text("ended_at IS NULL")
    op.create_index("ix_tasks_unfinished", "tasks", ["key"], sqlite_where=unfinished, postgresql_where=unfinished)
    op.create_index("ix_tasks_retention", "tasks", ["session_key", "ended_at"])
    op.create_table(
        "bodies",
        sa.Column("task_key", _KEY, autoincrement=False, nullable=False),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("output", sa.Text()),
        sa.Column("error", sa.Text()),
        _task("fk_bodies_task_key"),
        sa.PrimaryKeyConstraint("task_key", name="pk_bodies"),
    )
    op.create_table(
        "segments",
        sa.Column("task_key", _KEY, nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        _task("fk_segments_task_key"),
        sa.PrimaryKeyConstraint("task_key", "first_seq", name="pk_segments"),
    )


def downgrade() -> None:
    raise NotImplementedError("restore a backup")
