"""Rollback protection: which store this is, and the log that the anchor is the head of."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "freshness",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("store", sa.Uuid, nullable=False),
        sa.Column("armed", sa.Integer, nullable=False),
    )
    op.create_table(
        "freshness_log",
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("instance", sa.Uuid, nullable=True),
        sa.Column("root", sa.LargeBinary, nullable=False),
        sa.Column("mac", sa.LargeBinary, nullable=False),
    )
