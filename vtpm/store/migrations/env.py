"""Alembic's environment: the connection is handed in by vtpm.store.database."""

from __future__ import annotations

from alembic import context

from vtpm.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transaction_per_migration=False)
with context.begin_transaction():
    context.run_migrations()
