"""The one schema, for SQLite and PostgreSQL alike. Changes go through vtpm/store/migrations."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    Uuid,
)

metadata: Final = MetaData()

instances: Final = Table(
    "instances",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    # OFF, ON, FAILED; DELETING: the data key is gone and the rest is about to be; POOLED: nobody's yet (vtpm.store.pool).
    Column("state", String(16), nullable=False, index=True),
    Column("failure", Text, nullable=False),
    Column("profile", Text, nullable=False),
    Column("keys", Text, nullable=False),
    Column("engine", String(32), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("boot_id", String(64), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("created_at", DateTime, nullable=False),
    Column("updated_at", DateTime, nullable=False),
    Column("platform", Text, nullable=False, server_default=""),
    Column("identity", String(16), nullable=False, server_default="UNCERTIFIED"),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

# TPMs that wait for an instance to become: rows of `instances` in the state POOLED. `key` says what they are good for.
pool: Final = Table(
    "pool",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), primary_key=True),
    Column("key", String(64), nullable=False),
    Column("created_at", DateTime, nullable=False),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

labels: Final = Table(
    "labels",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), nullable=False),
    Column("key", String(63), nullable=False),
    Column("value", String(256), nullable=False),
    PrimaryKeyConstraint("instance", "key"),
    Index("ix_labels_key_value", "key", "value"),
)

data_keys: Final = Table(
    "data_keys",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), primary_key=True),
    Column("provider", String(64), nullable=False),
    Column("key_id", String(128), nullable=False),
    Column("blob", LargeBinary, nullable=False),
)

states: Final = Table(
    "states",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), nullable=False),
    Column("kind", Integer, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("blob", LargeBinary, nullable=False),
    PrimaryKeyConstraint("instance", "kind"),
)

snapshots: Final = Table(
    "snapshots",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("blob", LargeBinary, nullable=False),
    # A VM's control connection was open.
    Column("attached", Boolean, nullable=False),
    # Over all but the blob, whose envelope binds the rest.
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

# Which snapshot was used up last; not in the row of the snapshot, which has several pages, as a guest waits for the write.
snapshot_uses: Final = Table(
    "snapshot_uses",
    metadata,
    Column("instance", Uuid, ForeignKey("instances.id"), primary_key=True),
    Column("version", BigInteger, nullable=False),
    # Of the worker that went on from it.
    Column("token", LargeBinary, nullable=False),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

requests: Final = Table(
    "requests",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("instance", Uuid, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("created_at", DateTime, nullable=False, index=True),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

# One row, while rollback protection is in force or being set up: which store this is, for its anchor.
freshness: Final = Table(
    "freshness",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("store", Uuid, nullable=False),
    # 0: the anchor was not written yet.
    Column("armed", Integer, nullable=False),
)

# What the anchor is the head of: roots, and which instances came and went. Each row's MAC covers the row before.
freshness_log: Final = Table(
    "freshness_log",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Integer, nullable=False),
    # Which instance; none for a root.
    Column("instance", Uuid, nullable=True),
    # A root: the digest over the records of the anchor.
    Column("root", LargeBinary, nullable=False),
    Column("mac", LargeBinary, nullable=False),
)

# Not bound to `instances`: a certificate outlives its instance, as the CRL must name it until it expires.
certificates: Final = Table(
    "certificates",
    metadata,
    # 40 hexadecimal digits: no engine has integers of this size.
    Column("serial", String(40), primary_key=True),
    Column("instance", Uuid, nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("algorithm", String(16), nullable=False),
    Column("der", LargeBinary, nullable=False),
    Column("not_before", DateTime, nullable=False),
    Column("not_after", DateTime, nullable=False, index=True),
    Column("issuer_key_id", LargeBinary, nullable=False),
    Column("revoked_at", DateTime, nullable=True, index=True),
    Column("revocation_reason", String(32), nullable=False),
    Column("current", Boolean, nullable=False),
    # SHA-256 over the certified key (SubjectPublicKeyInfo); empty for PLATFORM.
    Column("subject_key", LargeBinary, nullable=False, server_default="", index=True),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

authorities: Final = Table(
    "authorities",
    metadata,
    Column("id", Uuid, primary_key=True),
    # ROOT or ISSUING.
    Column("role", String(16), nullable=False),
    # CURRENT, RETIRED (signs CRLs only), or PENDING (a request whose certificate has not come back).
    Column("state", String(16), nullable=False),
    Column("key_id", LargeBinary, nullable=False),
    # PEM, this CA's certificate first, the root's last; empty while PENDING.
    Column("chain", Text, nullable=False),
    # SEALED: `key` is the sealed private key; PKCS11: `key` is the URI of the key.
    Column("signer", String(16), nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("created_at", DateTime, nullable=False),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)

# The wrapped data keys that seal private keys of authorities, and the key of the rows' MACs.
authority_keys: Final = Table(
    "authority_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("provider", String(64), nullable=False),
    Column("key_id", String(128), nullable=False),
    Column("blob", LargeBinary, nullable=False),
)

counters: Final = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
    # Over the whole row (vtpm.store.macs).
    Column("mac", LargeBinary, nullable=False, server_default=""),
)
