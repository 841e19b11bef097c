"""Snapshots of hibernated instances: taken with the instance ON, used once, forgotten when it is powered off.

Invariant 2: `use` durably marks the snapshot as used up, and under which token, before a worker that goes on from it runs a
command. Asked again under the same token, as the answer or the worker was lost on the way, it succeeds; under others never.

Statements run on a connection of vtpm.store.commits, in its transaction. Plain SQL on the driver, as a guest waits.
"""

from __future__ import annotations

import sqlite3
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from vtpm.errors import NotFoundError
from vtpm.seal.envelope import StateKind
from vtpm.seal.keys import WrappedKey
from vtpm.store.database import errors, set_pragmas
from vtpm.store.model import SealedState

_TAKE: Final = """
INSERT INTO snapshots (instance, epoch, version, blob, attached)
SELECT ?, ?, ?, ?, ? FROM instances WHERE id = ? AND epoch = ? AND state = 'ON'
ON CONFLICT (instance) DO UPDATE SET
  epoch = excluded.epoch, version = excluded.version, blob = excluded.blob, attached = excluded.attached
WHERE snapshots.version < excluded.version OR (snapshots.version = excluded.version AND snapshots.blob = excluded.blob)
"""
_USE: Final = """
INSERT INTO snapshot_uses (instance, version, token)
SELECT n.instance, n.version, ? FROM snapshots n JOIN instances i ON i.id = n.instance
WHERE n.instance = ? AND n.epoch = ? AND n.version = ? AND i.epoch = n.epoch AND i.state = 'ON'
ON CONFLICT (instance) DO UPDATE SET version = excluded.version, token = excluded.token
WHERE snapshot_uses.version < excluded.version
  OR (snapshot_uses.version = excluded.version AND snapshot_uses.token = excluded.token)
"""
_LOAD: Final = """
SELECT k.provider, k.key_id, k.blob, s.epoch, s.version, s.blob, n.version, n.blob, u.token
FROM data_keys k JOIN states s ON s.instance = k.instance AND s.kind = ?
JOIN snapshots n ON n.instance = k.instance AND n.epoch = ?
LEFT JOIN snapshot_uses u ON u.instance = n.instance AND u.version >= n.version
WHERE k.instance = ?
"""
_ALL: Final = """
SELECT n.instance, n.epoch, n.attached, u.instance FROM snapshots n
LEFT JOIN snapshot_uses u ON u.instance = n.instance AND u.version >= n.version
"""

TOKEN_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class SnapshotCommit:
    """A sealed snapshot that wants to become the instance's only one: under the present epoch, as a later version."""

    instance: uuid.UUID
    epoch: int
    version: int
    blob: bytes = field(repr=False)
    attached: bool


@dataclass(frozen=True, slots=True)
class SnapshotUse:
    """A worker goes on from that snapshot, under `token` of 16 bytes."""

    instance: uuid.UUID
    epoch: int
    version: int
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hibernated:
    """What an instance goes on from; `used_by` is the token under which it is used up, or empty."""

    wrapped_key: WrappedKey
    state: SealedState
    snapshot: SealedState
    used_by: bytes = b""


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """What is known of a snapshot: whether a VM was attached when it was taken, and whether it is used up."""

    attached: bool
    used: bool


def take(connection: sqlite3.Connection, item: SnapshotCommit) -> str:
    """Keep a snapshot; empty, or EPOCH_STALE."""
    instance = item.instance.hex
    values = (instance, item.epoch, item.version, item.blob, item.attached, instance, item.epoch)
    return "" if connection.execute(_TAKE, values).rowcount == 1 else "EPOCH_STALE"


def use(connection: sqlite3.Connection, item: SnapshotUse) -> str:
    """Mark a snapshot as used up by the one who goes on from it; empty, or SNAPSHOT_USED."""
    values = (item.token, item.instance.hex, item.epoch, item.version)
    return "" if connection.execute(_USE, values).rowcount == 1 else "SNAPSHOT_USED"


class SnapshotReader:
    """Reads what a thaw needs, on a connection of its own that stays open."""

    def __init__(self, path: str, url: str) -> None:
        self._path = path
        self._url = url
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            set_pragmas(self._connection)
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def load(self, instance: uuid.UUID, epoch: int) -> Hibernated:
        """Return what `instance`, hibernated under `epoch`, goes on from.

        Raises:
            NotFoundError: SNAPSHOT_MISSING.
        """
        with self._lock, errors(self._url):
            row = self._open().execute(_LOAD, (int(StateKind.PERMANENT), epoch, instance.hex)).fetchone()
        if row is None:
            raise NotFoundError(
                "SNAPSHOT_MISSING",
                "there is no snapshot to go on from",
                subject=str(instance),
            )
        provider, key_id, key, state_epoch, state_version, state, version, snapshot, used_by = row
        return Hibernated(
            WrappedKey(provider, key_id, key),
            SealedState(state_epoch, state_version, state),
            SealedState(epoch, version, snapshot),
            used_by or b"",
        )

    def all(self) -> Mapping[tuple[uuid.UUID, int], SnapshotRow]:
        """Return every snapshot, by instance and epoch."""
        with self._lock, errors(self._url):
            rows = self._open().execute(_ALL).fetchall()
        return {
            (uuid.UUID(instance), epoch): SnapshotRow(bool(attached), used is not None)
            for instance, epoch, attached, used in rows
        }
