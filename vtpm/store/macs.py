"""Rows that carry a MAC: who can only write the database can't change what the service decides on.

Invariant 9. HMAC-SHA256 over the scheme's version, the table's name, and the name, type and value of every column but `mac`
itself, each with its length before it. A row that is changed or put in another's place is noticed where it is read. One that is
deleted, or set back to what it was before, is not: that is the anchor's matter (vtpm.instance.judgement).

Values count as SQLite keeps them: an id as its hexadecimal digits, a time as its text, a truth value as 0 or 1. So what is not
even of its column's type can be read, compared and refused, and does not end the reading of other rows.
"""

from __future__ import annotations

import datetime as dt
import hmac
import uuid
from collections.abc import Iterable, Mapping, Sequence
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
        self.names: Final = tuple(column.name for column in table.columns if column.name != "mac")
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
    return int(value) if isinstance(value, bool) else value


def encode(table: str, names: Sequence[str], values: Iterable[Any]) -> bytes:
    """Return what the MAC is over; no two rows have the same."""
    parts = [_MAGIC, _sized(table.encode())]
    for name, value in zip(names, values, strict=True):
        parts.append(_sized(name.encode()))
        match canonical(value):
            case None:
                parts.append(b"n")
            case bytes() as data:
                parts.append(b"b" + _sized(data))
            case str() as text:
                parts.append(b"s" + _sized(text.encode("utf-8", "surrogatepass")))
            case int() as number:
                parts.append(b"i" + _sized(b"%d" % number))
            case other:
                # Such as a real number, which no column has.
                parts.append(b"x" + _sized(repr(other).encode()))
    return b"".join(parts)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


class RowMacs:
    """Makes and checks MACs; thread-safe. Until it has a key (`use`) nothing that carries a MAC can be read or written."""

    def __init__(self) -> None:
        self._key = b""
        self._told: set[tuple[str, str]] = set()

    def use(self, key: bytes) -> None:
        """Take the row key of the store, of 32 bytes, from now on."""
        self._key = key

    def of(self, table: str, names: Sequence[str], values: Iterable[Any]) -> bytes:
        """Return the MAC of a row.

        Raises:
            StoreError: ROW_KEY_NOT_THERE.
        """
        if not self._key:
            raise StoreError("ROW_KEY_NOT_THERE", "the store was opened without the key of its rows", subject=table)
        return hmac.digest(self._key, encode(table, names, values), "sha256")

    def signed(self, covered: Covered, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a new row with its MAC."""
        mac = self.of(covered.table.name, covered.names, [values[name] for name in covered.names])
        return {**values, "mac": mac}

    def is_right(self, covered: Covered, row: Any) -> bool:
        """Whether a row that `covered.columns` gave is as the service wrote it. The log names one that is not, once."""
        fields = row._mapping
        mac = self.of(covered.table.name, covered.names, [fields[name] for name in covered.names])
        right = isinstance(row.mac, bytes) and hmac.compare_digest(row.mac, mac)
        if not right:
            self.tell(covered.table.name, fields[covered.key.name])
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
