"""The webhooks that are told of tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "pushes",
        sa.Column("task_key", _KEY, autoincrement=False, nullable=False),
        sa.Column("config_id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("token", sa.Text()),
        sa.Column("scheme", sa.Text()),
        sa.Column("credentials", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("over_at", sa.BigInteger()),
        sa.Column("dialect", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["task_key"], ["tasks.key"], name="fk_pushes_task_key", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_key", "config_id", name="pk_pushes"),
    )
    still_open = sa.text("over_at IS NULL")
    op.create_index("ix_pushes_open", "pushes", ["task_key"], sqlite_where=still_open, postgresql_where=still_open)


def downgrade() -> None:
    raise NotImplementedError("restore a backup")
