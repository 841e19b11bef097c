"""Rows that carry a MAC: who can only write the database can't change what the service decides on.

Invariant 9. HMAC-SHA256 over the scheme's version, the table's name, and the name, type and value of every column but `mac`
itself, each with its length before it. A row that is changed or put in another's place is noticed where it is read. One that is
deleted, or set back to what it was before, is not: that is the anchor's matter (vtpm.instance.judgement).

Values count as SQLite keeps them: an id as its hexadecimal digits, a time as its text, a truth value as 0 or 1. So what is not
even of its column's type can be read, compared and refused, and does not end the reading of other rows.
"""

from __future__ import annotations

import datetime as dt
import functools
import hmac
import uuid
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, Final

import sqlalchemy as sa
import structlog

from vtpm.errors import ConflictError, SealedStateError, StoreError
from vtpm.store import schema

log: Final = structlog.get_logger("vtpm.store")

SCHEME: Final = 1
MAC_SIZE: Final = 32
REASON: Final = "ROW_MAC_MISMATCH"
MESSAGE: Final = "the row is not what the service wrote: something else has changed the store"
_REMEDY: Final = {
    "instances": "restore this instance: vtpm backup restore FILE --instance NAME, or delete it; its row is left as it is",
    "snapshots": "reset the instance together with its VM: vtpm instance reset NAME",
    "snapshot_uses": "reset the instance together with its VM: vtpm instance reset NAME",
    "certificates": "nothing rests on it, and the CRL names it as revoked; find out who else can write the store",
}
_RESTORE: Final = "restore the store from a backup; its row is left as it is"
_MAGIC: Final = b"vtpm row" + bytes((SCHEME,))
_TIME: Final = "%Y-%m-%d %H:%M:%S.%f"
# Which rows were told of; who can write the store may change many.
_MOST_TOLD: Final = 1000


class Covered:
    """A table whose rows carry a MAC over all their columns; `key` is the primary key's, `columns` select as it is kept."""

    def __init__(self, table: sa.Table) -> None:
        self.table = table
        *names, mac = (column.name for column in table.columns)
        assert mac == "mac", "it is the last column"
        self.names: Final = tuple(names)
        (self.key,) = table.primary_key.columns
        self.columns: Final = [sa.type_coerce(column, sa.types.NullType()).label(column.name) for column in table.columns]

    def select(self) -> Any:
        """Return a query for whole rows, as the database keeps them."""
        return sa.select(*self.columns)


INSTANCES: Final = Covered(schema.instances)
CERTIFICATES: Final = Covered(schema.certificates)
AUTHORITIES: Final = Covered(schema.authorities)
POOL: Final = Covered(schema.pool)
COUNTERS: Final = Covered(schema.counters)
REQUESTS: Final = Covered(schema.requests)
SNAPSHOT_USES: Final = Covered(schema.snapshot_uses)
ALL: Final = (INSTANCES, CERTIFICATES, AUTHORITIES, POOL, COUNTERS, REQUESTS, SNAPSHOT_USES)
# A snapshot's own envelope binds its instance, epoch, version and content; its row's MAC binds what is not in there to them.
SNAPSHOT_NAMES: Final = ("instance", "epoch", "version", "attached")


def canonical(value: Any) -> Any:
    """Return a value as SQLite keeps it."""
    if isinstance(value, uuid.UUID):
        return value.hex
    if isinstance(value, dt.datetime):
        return value.strftime(_TIME)
    # Truth values, and members of enumerations that are text or numbers.
    for kind in (str, int):
        if isinstance(value, kind) and type(value) is not kind:
            return kind(value)
    return value


@functools.cache
def _heads(table: str, names: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return what stands before each value."""
    heads = [_sized(name.encode()) for name in names]
    heads[0] = _MAGIC + _sized(table.encode()) + heads[0]
    return tuple(heads)


def encode(table: str, names: tuple[str, ...], values: Iterable[Any]) -> bytes:
    """Return what the MAC is over; no two rows have the same."""
    parts: list[bytes] = []
    for head, value in zip(_heads(table, names), values, strict=True):
        # By the type itself, the usual ones first: a guest waits for some of these.
        kind = type(value)
        if kind is str:
            tag, data = b"s", value.encode("utf-8", "surrogatepass")
        elif kind is int:
            tag, data = b"i", b"%d" % value
        elif kind is bytes:
            tag, data = b"b", value
        elif value is None:
            tag, data = b"n", b""
        elif (kept := canonical(value)) is not value:
            tag, data = (b"i", b"%d" % kept) if isinstance(kept, int) else (b"s", kept.encode())
        else:
            # Such as a real number, which no column has.
            tag, data = b"x", repr(value).encode()
        parts += (head, tag, len(data).to_bytes(4, "big"), data)
    return b"".join(parts)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


class RowMacs:
    """Makes and checks MACs; thread-safe. Until it has a key (`use`) nothing that carries a MAC can be read or written."""

    def __init__(self) -> None:
        # The two hashes of HMAC after their first block, which is the key's (RFC 2104): a third of the time of starting anew.
        self._inner = self._outer = sha256()
        self._has_key = False
        self._told: set[tuple[str, str]] = set()

    def use(self, key: bytes) -> None:
        """Take the row key of the store, of 32 bytes, from now on."""
        block = key.ljust(sha256().block_size, b"\0")
        self._inner, self._outer = (sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))
        self._has_key = True

    def of(self, table: str, names: tuple[str, ...], values: Iterable[Any]) -> bytes:
        """Return the MAC of a row.

        Raises:
            StoreError: ROW_KEY_NOT_THERE.
        """
        if not self._has_key:
            raise StoreError("ROW_KEY_NOT_THERE", "the store was opened without the key of its rows", subject=table)
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(encode(table, names, values))
        outer.update(inner.digest())
        return outer.digest()

    def signed(self, covered: Covered, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a new row with its MAC."""
        mac = self.of(covered.table.name, covered.names, [values[name] for name in covered.names])
        return {**values, "mac": mac}

    def is_right(self, covered: Covered, row: Any) -> bool:
        """Whether a row that `covered.columns` gave is as the service wrote it. The log names one that is not, once."""
        *values, there = row
        right = isinstance(there, bytes) and hmac.compare_digest(there, self.of(covered.table.name, covered.names, values))
        if not right:
            self.tell(covered.table.name, row._mapping[covered.key.name])
        return right

    def tell(self, table: str, key: Any) -> None:
        """Log that a row was refused, once."""
        told = (table, str(key)[:80])
        if told not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(told)
            log.error("store.row_refused", table=table, row=told[1], reason=REASON, remedy=_REMEDY.get(table, _RESTORE))

    def check(self, covered: Covered, row: Any, subject: str = "") -> Any:
        """Return the row, if it is as the service wrote it.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        if not self.is_right(covered, row):
            raise mismatch(covered.table.name, subject or str(row._mapping[covered.key.name])[:80])
        return row

    def change(self, connection: sa.Connection, covered: Covered, row: Any, values: Mapping[str, Any]) -> None:
        """Change a row that was checked, and its MAC with it.

        Compare and swap: the statement names the MAC of what was read, so what was not checked is not signed.

        Raises:
            ConflictError: ROW_CHANGED, it is not that row any more.
        """
        fields = {name: row._mapping[name] for name in covered.names} | dict(values)
        mac = self.of(covered.table.name, covered.names, [fields[name] for name in covered.names])
        # The key as it was read; a value of the row, not of the column's type.
        same = sa.type_coerce(covered.key, sa.types.NullType()) == row._mapping[covered.key.name]
        query = sa.update(covered.table).where(same, covered.table.c.mac == row.mac)
        if connection.execute(query.values(**values, mac=mac)).rowcount != 1:
            raise ConflictError("ROW_CHANGED", "the row was changed meanwhile", subject=covered.table.name, remedy="try again")


def remedy(table: str) -> str:
    """Return what to do about a row that is refused."""
    return _REMEDY.get(table, _RESTORE)


def mismatch(table: str, subject: str) -> SealedStateError:
    """Return the error of a row that the service did not write."""
    return SealedStateError(REASON, f"{MESSAGE} (table {table})", subject=subject, remedy=remedy(table))
