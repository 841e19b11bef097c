"""Rows that carry a MAC. What is there gets its MACs from who has the key, once (vtpm.store.adoption)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the columns, empty."""
    for table in ("instances", "pool", "snapshots", "snapshot_uses", "requests", "certificates", "authorities", "counters"):
        op.add_column(table, sa.Column("mac", sa.LargeBinary, nullable=False, server_default=""))
    op.add_column("certificates", sa.Column("subject_key", sa.LargeBinary, nullable=False, server_default=""))
    op.create_index("ix_certificates_subject_key", "certificates", ["subject_key"])
