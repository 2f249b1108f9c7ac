"""What alembic runs for a migration: on the connection, and in the transaction, that the store gives it."""

from __future__ import annotations

from alembic import context

from hector_trio.stores.schema import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
