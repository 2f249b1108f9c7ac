"""What a task that waits for input has asked, and which logs are still whole."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("bodies", sa.Column("question", sa.Text()))
    op.add_column("tasks", sa.Column("pruned_at", sa.BigInteger()))
    unpruned = sa.text("ended_at IS NOT NULL AND pruned_at IS NULL")
    op.create_index("ix_tasks_unpruned", "tasks", ["ended_at"], sqlite_where=unpruned, postgresql_where=unpruned)


def downgrade() -> None:
    raise NotImplementedError("restore a backup")
