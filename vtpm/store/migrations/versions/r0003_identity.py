"""Platforms and identities of instances, and the pool of TPMs that wait for an instance to become."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns and the table. What exists was never certified."""
    op.add_column("instances", sa.Column("platform", sa.Text, nullable=False, server_default=""))
    op.add_column("instances", sa.Column("identity", sa.String(16), nullable=False, server_default="UNCERTIFIED"))
    op.create_table(
        "pool",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), primary_key=True),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
