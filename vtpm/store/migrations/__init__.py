"""Alembic migrations of the store; run by vtpm.store.database when a database is opened."""
