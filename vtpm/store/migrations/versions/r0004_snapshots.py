"""Snapshots of hibernated instances."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "snapshots",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("blob", sa.LargeBinary, nullable=False),
        sa.Column("attached", sa.Boolean, nullable=False),
    )
    op.create_table(
        "snapshot_uses",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("token", sa.LargeBinary, nullable=False),
    )
