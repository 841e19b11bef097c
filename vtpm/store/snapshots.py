"""Snapshots of hibernated instances: taken with the instance ON, used once, forgotten when it is powered off.

Invariant 2: `use` durably marks the snapshot as used up, and under which token, before a worker that goes on from it runs a
command. Asked again under the same token, as the answer or the worker was lost on the way, it succeeds; under others never.

Statements run on a connection of vtpm.store.commits, in its transaction. Plain SQL on the driver, as a guest waits.
"""

from __future__ import annotations

import hmac
import sqlite3
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vtpm.errors import NotFoundError
from vtpm.seal.envelope import StateKind
from vtpm.seal.keys import WrappedKey
from vtpm.store.database import errors, set_pragmas
from vtpm.store.macs import SNAPSHOT_NAMES, SNAPSHOT_USES, RowMacs, mismatch
from vtpm.store.model import SealedState

_TAKE: Final = """
INSERT INTO snapshots (instance, epoch, version, blob, attached, mac)
SELECT ?, ?, ?, ?, ?, ? FROM instances WHERE id = ? AND epoch = ? AND state = 'ON'
ON CONFLICT (instance) DO UPDATE SET
  epoch = excluded.epoch, version = excluded.version, blob = excluded.blob, attached = excluded.attached,
  mac = excluded.mac
WHERE snapshots.version < excluded.version OR (snapshots.version = excluded.version AND snapshots.blob = excluded.blob)
"""
_USE: Final = """
INSERT INTO snapshot_uses (instance, version, token, mac)
SELECT n.instance, n.version, ?, ? FROM snapshots n JOIN instances i ON i.id = n.instance
WHERE n.instance = ? AND n.epoch = ? AND n.version = ? AND i.epoch = n.epoch AND i.state = 'ON'
ON CONFLICT (instance) DO UPDATE SET version = excluded.version, token = excluded.token, mac = excluded.mac
WHERE snapshot_uses.version < excluded.version
  OR (snapshot_uses.version = excluded.version AND snapshot_uses.token = excluded.token)
"""
_LOAD: Final = """
SELECT k.provider, k.key_id, k.blob, s.epoch, s.version, s.blob, n.blob,
  n.instance, n.epoch, n.version, n.attached, n.mac, u.instance, u.version, u.token, u.mac
FROM data_keys k JOIN states s ON s.instance = k.instance AND s.kind = ?
JOIN snapshots n ON n.instance = k.instance AND n.epoch = ?
LEFT JOIN snapshot_uses u ON u.instance = n.instance
WHERE k.instance = ?
"""
_ALL: Final = """
SELECT n.instance, n.epoch, n.version, n.attached, n.mac, u.instance, u.version, u.token, u.mac FROM snapshots n
LEFT JOIN snapshot_uses u ON u.instance = n.instance
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
    """What is known of a snapshot: whether a VM was attached when it was taken, and whether it is used up.

    `refused`: its row, or that of its use, is not as the service wrote it, and the rest is not known.
    """

    attached: bool
    used: bool
    refused: bool = False


def take(connection: sqlite3.Connection, macs: RowMacs, item: SnapshotCommit) -> str:
    """Keep a snapshot; empty, or EPOCH_STALE."""
    instance = item.instance.hex
    mac = macs.of("snapshots", SNAPSHOT_NAMES, (instance, item.epoch, item.version, item.attached))
    values = (instance, item.epoch, item.version, item.blob, item.attached, mac, instance, item.epoch)
    return "" if connection.execute(_TAKE, values).rowcount == 1 else "EPOCH_STALE"


def use(connection: sqlite3.Connection, macs: RowMacs, item: SnapshotUse) -> str:
    """Mark a snapshot as used up by the one who goes on from it; empty, or SNAPSHOT_USED."""
    instance = item.instance.hex
    mac = macs.of("snapshot_uses", SNAPSHOT_USES.names, (instance, item.version, item.token))
    values = (item.token, mac, instance, item.epoch, item.version)
    return "" if connection.execute(_USE, values).rowcount == 1 else "SNAPSHOT_USED"


class SnapshotReader:
    """Reads what a thaw needs, on a connection of its own that stays open."""

    def __init__(self, path: str, url: str, macs: RowMacs) -> None:
        self._path = path
        self._macs = macs
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
            SealedStateError: ROW_MAC_MISMATCH, of the snapshot or of its use.
        """
        with self._lock, errors(self._url):
            row = self._open().execute(_LOAD, (int(StateKind.PERMANENT), epoch, instance.hex)).fetchone()
        if row is None:
            raise NotFoundError(
                "SNAPSHOT_MISSING",
                "there is no snapshot to go on from",
                subject=str(instance),
            )
        provider, key_id, key, state_epoch, state_version, state, snapshot, *about = row
        if table := self._refused(about):
            raise mismatch(table, str(instance))
        version, use_version, token = about[2], about[6], about[7]
        return Hibernated(
            WrappedKey(provider, key_id, key),
            SealedState(state_epoch, state_version, state),
            SealedState(epoch, version, snapshot),
            token if use_version is not None and use_version >= version else b"",
        )

    def _refused(self, about: Sequence[Any]) -> str:
        """Return the table whose row is not as it was written; empty if both are. `about` is a snapshot's, then its use's."""
        *snapshot, mac = about[:5]
        *use, use_mac = about[5:]
        if not _equal(mac, self._macs.of("snapshots", SNAPSHOT_NAMES, snapshot)):
            table = "snapshots"
        elif use[0] is not None and not _equal(use_mac, self._macs.of("snapshot_uses", SNAPSHOT_USES.names, use)):
            table = "snapshot_uses"
        else:
            return ""
        self._macs.tell(table, snapshot[0])
        return table

    def all(self) -> Mapping[tuple[uuid.UUID, int], SnapshotRow]:
        """Return every snapshot, by instance and epoch."""
        with self._lock, errors(self._url):
            rows = self._open().execute(_ALL).fetchall()
        found = {}
        for about in rows:
            instance, epoch, version, attached, _, _, use_version, _, _ = about
            refused = bool(self._refused(about))
            try:
                key = uuid.UUID(instance), int(epoch)
            except (ValueError, TypeError, AttributeError, OverflowError):
                continue
            used = refused or (use_version is not None and use_version >= version)
            found[key] = SnapshotRow(bool(attached), used, refused)
        return found


def _equal(there: Any, mac: bytes) -> bool:
    return isinstance(there, bytes) and hmac.compare_digest(there, mac)
