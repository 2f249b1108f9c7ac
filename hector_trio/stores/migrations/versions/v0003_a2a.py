"""When a task came into its status, what the status does not say, and lines as A2A clients sent them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("status_at", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("mark", sa.Text()))
    op.execute("UPDATE tasks SET status_at = coalesce(ended_at, created_at)")
    op.create_index("ix_tasks_recent", "tasks", ["owner", "agent_id", "status_at", "key"])
    op.add_column("messages", sa.Column("original", sa.LargeBinary()))
    op.create_index("ix_messages_task", "messages", ["task_key", "n"])


def downgrade() -> None:
    raise NotImplementedError("restore a backup")
