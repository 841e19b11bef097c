"""The hot path: sealed states made durable together, in one transaction and one sync (group commit).

Invariant 1: `commit` returns after the sync. Invariant 3: a commit under another epoch than the instance's is refused.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Sequence
from typing import Final, TypeAlias

import structlog

from vtpm.crashpoints import crash_point
from vtpm.log import SourceLog
from vtpm.store import snapshots, wal
from vtpm.store.database import errors, set_pragmas
from vtpm.store.macs import RowMacs
from vtpm.store.model import StateCommit
from vtpm.store.snapshots import SnapshotCommit, SnapshotUse

AnyCommit: TypeAlias = StateCommit | SnapshotCommit | SnapshotUse

_lines: Final = SourceLog(structlog.get_logger("vtpm.store"))

_UPDATE: Final = """
UPDATE states SET epoch = ?, version = ?, blob = ?
WHERE instance = ? AND kind = ? AND version = ?
  AND ? = (SELECT epoch FROM instances WHERE id = ? AND state = 'ON')
"""
_PRESENT: Final = """
SELECT i.epoch, i.state, s.epoch, s.version, s.blob FROM instances i JOIN states s ON s.instance = i.id AND s.kind = ?
WHERE i.id = ?
"""

# What the driver says of the values that it was given, and not of the database.
_OF_AN_ITEM: Final = (sqlite3.InterfaceError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError)


def _is_trouble(error: Exception) -> bool:
    """Whether an error is the store's, so that no commit can be made, or that of an item."""
    return isinstance(error, sqlite3.Error) and not isinstance(error, _OF_AN_ITEM)


class StateCommits:
    """One connection of its own, kept open; plain SQL on the driver, as each microsecond here is a guest's."""

    def __init__(self, path: str, url: str, macs: RowMacs) -> None:
        self._path = path
        self._macs = macs
        self._url = url
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, cached_statements=16)
            set_pragmas(connection)
            self._connection = connection
        return self._connection

    def make_room(self) -> None:
        """Have commits wait for the disk once, not twice (vtpm.store.wal); before anybody commits."""
        # Without it they are slower, and no less durable.
        with self._lock, contextlib.suppress(sqlite3.Error):
            wal.make_room(self._open(), self._path)

    def close(self) -> None:
        """Close the connection; the next commit opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def commit(self, commits: Sequence[AnyCommit]) -> list[str]:
        """Make `commits` durable in one transaction; one answer each, empty or EPOCH_STALE, VERSION_CONFLICT, SNAPSHOT_USED,
        INSTANCE_NOT_FOUND.

        A commit that is already there to the byte is a success: its worker asked again after it lost the answer. One that the
        database can't take at all is answered with COMMIT_INVALID, and the others are made all the same.

        Raises:
            StoreError: the store is in trouble. Whatever was made is a success when it is asked for again.
        """
        with self._lock, errors(self._url):
            try:
                return self._transaction(commits)
            except Exception as error:
                if _is_trouble(error):
                    raise
                return [self._alone(item) for item in commits]

    def _alone(self, item: AnyCommit) -> str:
        try:
            return self._transaction([item])[0]
        except Exception as error:
            if _is_trouble(error):
                raise
            _lines.error(str(item.instance), "commit.invalid", instance=str(item.instance), error=type(error).__name__)
            return "COMMIT_INVALID"

    def _transaction(self, commits: Sequence[AnyCommit]) -> list[str]:
        connection = self._open()
        try:
            connection.execute("BEGIN IMMEDIATE")
            answers = [self._commit_one(connection, item) for item in commits]
            crash_point("commit.before_sync")
            connection.execute("COMMIT")
            crash_point("commit.after_sync")
        except BaseException:
            # Whatever it was: a transaction that stays open would hold up everybody who writes.
            self._recover(connection)
            raise
        return answers

    def _recover(self, connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return
        with contextlib.suppress(sqlite3.Error):
            connection.close()
        self._connection = None

    def _commit_one(self, connection: sqlite3.Connection, item: AnyCommit) -> str:
        match item:
            case SnapshotCommit():
                return snapshots.take(connection, self._macs, item)
            case SnapshotUse():
                return snapshots.use(connection, self._macs, item)
        instance = item.instance.hex
        values = (item.epoch, item.version, item.blob, instance, int(item.kind), item.version - 1, item.epoch, instance)
        if connection.execute(_UPDATE, values).rowcount == 1:
            return ""
        return self._why_not(connection, item)

    @staticmethod
    def _why_not(connection: sqlite3.Connection, item: StateCommit) -> str:
        row = connection.execute(_PRESENT, (int(item.kind), item.instance.hex)).fetchone()
        if row is None:
            return "INSTANCE_NOT_FOUND"
        owner_epoch, state, epoch, version, blob = row
        if owner_epoch != item.epoch or state != "ON":
            return "EPOCH_STALE"
        if (epoch, version, blob) == (item.epoch, item.version, item.blob):
            return ""
        return "VERSION_CONFLICT"
