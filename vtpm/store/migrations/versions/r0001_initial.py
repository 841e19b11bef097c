"""The first schema: instances, labels, data keys, states, requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "instances",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(63), nullable=False, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("failure", sa.Text, nullable=False),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("keys", sa.Text, nullable=False),
        sa.Column("engine", sa.String(32), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("boot_id", sa.String(64), nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("updated_at", sa.DateTime, nullable=False),
    )
    op.create_index("ix_instances_state", "instances", ["state"])
    op.create_table(
        "labels",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), nullable=False),
        sa.Column("key", sa.String(63), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.PrimaryKeyConstraint("instance", "key"),
    )
    op.create_index("ix_labels_key_value", "labels", ["key", "value"])
    op.create_table(
        "data_keys",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), primary_key=True),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(128), nullable=False),
        sa.Column("blob", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "states",
        sa.Column("instance", sa.Uuid, sa.ForeignKey("instances.id"), nullable=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("blob", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("instance", "kind"),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("instance", sa.Uuid, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
    op.create_index("ix_requests_created_at", "requests", ["created_at"])
