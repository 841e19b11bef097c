"""The store's side of rollback protection: a hash-chained log, and what the anchor is compared with.

The log has a row for each root that was anchored and for each instance that came or went, in the same transaction. Each
row's MAC covers the row before it, so who can write the store and does not have the anchor's secret can't add a row. Commits
of states write nothing here.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import re
import sqlite3
import struct
import threading
import uuid
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Final, NamedTuple, Protocol

import sqlalchemy as sa

from vtpm.crashpoints import crash_point
from vtpm.seal.anchor import NO_DIGEST, START, LogPoint
from vtpm.seal.envelope import StateKind
from vtpm.store.database import errors, set_pragmas
from vtpm.store.macs import INSTANCES, RowMacs, mismatch
from vtpm.store.model import Failure
from vtpm.store.rows import dump_failure, now

# How many rows behind the anchor are kept for people to read.
_KEEP: Final = 1000
_HEX_ID: Final = re.compile("[0-9a-f]{32}")
_MAC_INPUT: Final = struct.Struct(">16sQB16s32s32s")
# A snapshot counts twice: when it is taken, and when it is used up. So one that is put back as if it were not is older.
_SNAPSHOTS: Final = """
FROM instances i JOIN snapshots n ON n.instance = i.id LEFT JOIN snapshot_uses u ON u.instance = n.instance
WHERE i.state != 'DELETING'
"""
_SNAPSHOT: Final = f"i.id, i.epoch, {int(StateKind.VOLATILE)}, n.epoch, n.version * 2 + (coalesce(u.version, 0) >= n.version)"
_ROWS: Final = f"""
SELECT i.id, i.epoch, s.kind, s.epoch, s.version FROM instances i JOIN states s ON s.instance = i.id
WHERE i.state != 'DELETING'
UNION ALL SELECT {_SNAPSHOT} {_SNAPSHOTS}
"""  # noqa: S608  # constants
_PRESENT: Final = f"""
SELECT i.id, i.epoch, s.kind, s.epoch, s.version, s.blob FROM instances i JOIN states s ON s.instance = i.id
WHERE i.id = ?1 AND i.state != 'DELETING'
UNION ALL SELECT {_SNAPSHOT}, n.blob {_SNAPSHOTS} AND i.id = ?1
"""  # noqa: S608  # constants
_INSTANCE: Final = f"SELECT {', '.join(INSTANCES.names)}, mac FROM instances WHERE id = ?"  # noqa: S608  # names of columns
_LOG: Final = "SELECT sequence, kind, instance, root, mac FROM freshness_log"
# What is no number, or higher than any that the service will count up to, does not keep it from going on.
_SEQUENCE_END: Final = 1 << 62
_END: Final = """
SELECT sequence, mac FROM freshness_log WHERE typeof(sequence) = 'integer' AND sequence < ? ORDER BY sequence DESC LIMIT 1
"""


class LogKind(enum.IntEnum):
    """What a row of the log is about."""

    ROOT = 1
    CREATED = 2
    DELETED = 3
    # An operator has said that the instance is meant to be as it is.
    ACCEPTED = 4


class StateRow(NamedTuple):
    """A sealed state as the store has it now; `instance` in hexadecimal."""

    instance: str
    owner_epoch: int
    kind: int
    epoch: int
    version: int

    @property
    def numbers(self) -> tuple[int, int, int]:
        """(Ownership epoch, epoch, version)."""
        return self.owner_epoch, self.epoch, self.version


class LogRow(NamedTuple):
    """A row of the log whose MAC is right; `instance` is empty for a root."""

    sequence: int
    kind: LogKind
    instance: bytes


class _Run(Protocol):
    """Runs a statement with positional parameters, on the driver or through SQLAlchemy."""

    def __call__(self, statement: str, parameters: tuple[Any, ...] = ..., /) -> Any:
        """Return something that rows can be fetched from."""


class Snapshot:
    """One moment of the store."""

    def __init__(self, log: FreshnessLog, connection: sqlite3.Connection) -> None:
        self._log = log
        self._connection = connection

    def rows(self) -> set[StateRow]:
        """Return every sealed state. A row that no state of the service's has is none: its instance is missing."""
        return {StateRow._make(row) for row in self._connection.execute(_ROWS) if _is_of_its_types(row)}

    def digest(self, row: StateRow) -> bytes:
        """Return the digest of a state."""
        if row.kind == StateKind.VOLATILE:
            query, values = "SELECT blob FROM snapshots WHERE instance = ?", (row.instance,)
        else:
            query, values = "SELECT blob FROM states WHERE instance = ? AND kind = 1", (row.instance,)
        found = self._connection.execute(query, values).fetchone()
        return digest_of(found[0]) if found else NO_DIGEST

    def log_after(self, covered: LogPoint, head: LogPoint) -> tuple[list[LogRow], LogPoint] | None:
        """Return the log's rows behind `covered`, and its end.

        None if they do not follow upon it one by one, up to `head` at least: this is not the log that was anchored.
        """
        rows, end = [], covered
        for sequence, kind, instance, root, mac in self._connection.execute(
            f"{_LOG} WHERE sequence > ? ORDER BY sequence",  # no part of it is from outside
            (covered.sequence,),
        ):
            owner = _owner(instance)
            if sequence != end.sequence + 1 or not self._log.is_mac(mac, sequence, kind, owner, root, end.mac):
                return None
            end = LogPoint(sequence, mac)
            if end.sequence == head.sequence and end.mac != head.mac:
                return None
            rows.append(LogRow(sequence, LogKind(kind), owner))
        return (rows, end) if end.sequence >= head.sequence else None


class _Line:
    """One connection, and whose turn it is."""

    def __init__(self, path: str, url: str) -> None:
        self._path = path
        self._url = url
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            set_pragmas(self._connection)
        return self._connection

    @contextlib.contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, errors(self._url):
            connection = self._open()
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def data_version(self) -> int:
        """A number that changes when another connection has written."""
        with self._lock, errors(self._url):
            return int(self._open().execute("PRAGMA data_version").fetchone()[0])


class FreshnessLog:
    """Thread-safe. Without a key (`use`) nothing is recorded: there is no anchor, or it can't be trusted."""

    def __init__(self, path: str, url: str, macs: RowMacs) -> None:
        self._macs = macs
        # A power on need not wait for the survey of all states that runs beside it.
        self._survey = _Line(path, url)
        self._quick = _Line(path, url)
        self._store = b""
        self._key = b""
        self._seen = -1

    def use(self, store: uuid.UUID, key: bytes) -> None:
        """Record under the key of the anchor from now on."""
        self._store, self._key = store.bytes, key

    def close(self) -> None:
        """Close the connections; the next call opens others."""
        self._survey.close()
        self._quick.close()

    # ---- the chain -------------------------------------------------------------------------------------------------------

    def _mac(self, sequence: int, kind: int, instance: bytes, root: bytes, before: bytes) -> bytes:
        owner = instance or bytes(16)
        packed = _MAC_INPUT.pack(self._store, sequence, kind, owner, root or NO_DIGEST, before)
        return hmac.digest(self._key, packed, "sha256")

    def is_mac(self, mac: Any, sequence: Any, kind: Any, instance: bytes, root: Any, before: Any) -> bool:
        """Whether `mac` is that of such a row behind one whose MAC is `before`; a row may hold anything."""
        if type(sequence) is not int or type(kind) is not int or not all(isinstance(i, bytes) for i in (mac, root, before)):
            return False
        sizes = len(instance) in (0, 16) and len(root) in (0, 32) and len(before) == 32
        return sizes and kind in list(LogKind) and hmac.compare_digest(mac, self._mac(sequence, kind, instance, root, before))

    def _append(self, run: _Run, kind: LogKind, instance: bytes, root: bytes) -> LogPoint:
        row = run(_END, (_SEQUENCE_END,)).fetchone()
        # Behind a row that is none of ours the chain is broken already, which the next survey finds.
        end = LogPoint(row[0], row[1] if _is_digest(row[1]) else NO_DIGEST) if row else START
        sequence = end.sequence + 1
        mac = self._mac(sequence, kind, instance, root, end.mac)
        run("INSERT INTO freshness_log VALUES (?, ?, ?, ?, ?)", (sequence, int(kind), instance.hex() or None, root, mac))
        return LogPoint(sequence, mac)

    def record(self, connection: sa.Connection, kind: LogKind, instance: uuid.UUID) -> None:
        """Write down that an instance comes or goes, within the transaction in which it does."""
        if self._key:
            self._append(connection.exec_driver_sql, kind, instance.bytes, b"")

    def append(self, kind: LogKind, instance: uuid.UUID) -> None:
        """Write down an operator's decision."""
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            self._append(connection.execute, kind, instance.bytes, b"")

    def append_root(self, root: bytes, behind: LogPoint) -> LogPoint:
        """Write down a root that is about to be anchored; return its place. What is long `behind` is forgotten."""
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            connection.execute("DELETE FROM freshness_log WHERE sequence <= ?", (behind.sequence - _KEEP,))
            point = self._append(connection.execute, LogKind.ROOT, b"", root)
            crash_point("anchor.before_root")
        crash_point("anchor.after_root")
        return point

    def go_on_from(self, head: LogPoint) -> None:
        """Begin the log anew behind `head`, after this store's own has proven not to lead there."""
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            connection.execute("DELETE FROM freshness_log")
            if head.sequence:
                row = (head.sequence, int(LogKind.ROOT), None, b"", head.mac)
                connection.execute("INSERT INTO freshness_log VALUES (?, ?, ?, ?, ?)", row)

    def last_event(self, instance: uuid.UUID, covered: LogPoint) -> LogKind | None:
        """Return what the log says last of the instance behind `covered`; None for nothing that can be believed."""
        with self._quick.transaction("BEGIN") as connection:
            query = f"{_LOG} WHERE sequence > ? AND instance = ? ORDER BY sequence DESC LIMIT 1"
            row = connection.execute(query, (covered.sequence, instance.hex)).fetchone()
            if row is None:
                return None
            query = "SELECT mac FROM freshness_log WHERE sequence = ?"
            before = connection.execute(query, (row[0] - 1,)).fetchone() if row[0] > 1 else (NO_DIGEST,)
            right = before is not None and self.is_mac(row[4], row[0], row[1], bytes.fromhex(row[2]), row[3], before[0])
            return LogKind(row[1]) if right else None

    # ---- what is there ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Look at one moment of the store; writers are not kept waiting."""
        with self._survey.transaction("BEGIN") as connection:
            yield Snapshot(self, connection)

    def changed(self) -> bool:
        """Whether anything was written since the last time that this was asked, other than by this object."""
        version = self._survey.data_version()
        seen, self._seen = self._seen, version
        return bool(version != seen)

    def present(self, instance: uuid.UUID) -> list[tuple[StateRow, bytes]]:
        """Return the states of one instance, each with its digest."""
        with self._quick.transaction("BEGIN") as connection:
            rows = connection.execute(_PRESENT, (instance.hex,)).fetchall()
        return [(StateRow._make(row[:5]), digest_of(row[5])) for row in rows]

    # ---- which store -----------------------------------------------------------------------------------------------------

    def identity(self) -> tuple[uuid.UUID, bool] | None:
        """Return the store's id and whether its anchor was ever written; None without rollback protection."""
        with self._quick.transaction("BEGIN") as connection:
            row = connection.execute("SELECT store, armed FROM freshness").fetchone()
        # A row that names no store is as good as none.
        return (uuid.UUID(row[0]), bool(row[1])) if row and _is_id(row[0]) else None

    def identify(self, store: uuid.UUID, key: bytes) -> None:
        """Be `store` from now on, with an empty log under `key`; its anchor is yet to be written."""
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            connection.execute("DELETE FROM freshness_log")
            connection.execute("DELETE FROM freshness")
            connection.execute("INSERT INTO freshness VALUES (1, ?, 0)", (store.hex,))
            # Within the transaction: who records next does so under the new key.
            self.use(store, key)

    def arm(self) -> None:
        """Write down that the anchor is there: from now on it must be."""
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            connection.execute("UPDATE freshness SET armed = 1")

    # ---- instances -------------------------------------------------------------------------------------------------------

    def refuse(self, instance: uuid.UUID, failure: Failure) -> bool:
        """Take an instance that is not ON to FAILED, as its state is not fresh; return whether it was.

        One whose row is not as it was written is left as it is: it is refused already.
        """
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            row = self._row(connection, instance)
            if row is None or row["state"] not in ("OFF", "FAILED"):
                return False
            if not self._is_right(row):
                return False
            self._change(connection, row, {"state": "FAILED", "failure": dump_failure(failure)})
            return True

    def accept(self, instance: uuid.UUID, above_epoch: int) -> None:
        """Take an instance that is not ON to OFF as it is; its epoch rises above `above_epoch`, and nothing older commits.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        with self._survey.transaction("BEGIN IMMEDIATE") as connection:
            row = self._row(connection, instance)
            if row is None or row["state"] not in ("OFF", "FAILED"):
                return
            if not self._is_right(row):
                raise mismatch("instances", str(instance))
            epoch = max(row["epoch"], above_epoch) + 1
            self._change(connection, row, {"state": "OFF", "failure": "", "boot_id": "", "epoch": epoch})
            if self._key:
                self._append(connection.execute, LogKind.ACCEPTED, instance.bytes, b"")

    def _row(self, connection: sqlite3.Connection, instance: uuid.UUID) -> dict[str, Any] | None:
        row = connection.execute(_INSTANCE, (instance.hex,)).fetchone()
        return None if row is None else dict(zip((*INSTANCES.names, "mac"), row, strict=True))

    def _is_right(self, row: dict[str, Any]) -> bool:
        mac = self._macs.of("instances", INSTANCES.names, [row[name] for name in INSTANCES.names])
        right = isinstance(row["mac"], bytes) and hmac.compare_digest(row["mac"], mac)
        if not right:
            self._macs.tell("instances", row["id"])
        return right

    def _change(self, connection: sqlite3.Connection, row: dict[str, Any], values: dict[str, Any]) -> None:
        """Change a row that was checked, and its MAC with it."""
        moment = now().isoformat(" ", "microseconds")
        values = {**values, "revision": row["revision"] + 1, "updated_at": moment}
        values["mac"] = self._macs.of("instances", INSTANCES.names, [(row | values)[name] for name in INSTANCES.names])
        columns = ", ".join(f"{name} = ?" for name in values)
        statement = f"UPDATE instances SET {columns} WHERE id = ? AND mac = ?"  # noqa: S608  # names of columns
        connection.execute(statement, (*values.values(), row["id"], row["mac"]))


def _is_of_its_types(row: tuple[Any, ...]) -> bool:
    instance, *numbers = row
    counted = all(type(number) is int and number >= 0 for number in numbers)
    return _is_id(instance) and counted and row[2] in list(StateKind)


def _is_id(text: Any) -> bool:
    return isinstance(text, str) and bool(_HEX_ID.fullmatch(text))


def _is_digest(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == len(NO_DIGEST)


def _owner(text: Any) -> bytes:
    """Return the id in a row of the log; empty if there is none."""
    return bytes.fromhex(text) if _is_id(text) else b""


def digest_of(blob: Any) -> bytes:
    """Return the digest of a sealed state; NO_DIGEST for one that was used up and emptied.

    What is no sealed state at all has a digest of its own, too: it is one instance's, and others are looked at with it.
    """
    if not blob:
        return NO_DIGEST
    return sha256(blob if isinstance(blob, bytes) else repr(blob).encode(errors="backslashreplace")).digest()
