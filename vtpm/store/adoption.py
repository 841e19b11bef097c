"""Rows from before they carried MACs get theirs, once (vtpm.store.row_key decides whether)."""

from __future__ import annotations

import sqlalchemy as sa

from vtpm.store.certificates import subject_key_of
from vtpm.store.macs import ALL, CERTIFICATES, SNAPSHOT_NAMES, RowMacs


def sign_all(connection: sa.Connection, macs: RowMacs) -> int:
    """Write the MAC of every row as it is, inside a transaction of the caller's; return how many."""
    count = 0
    for covered in ALL:
        if covered is CERTIFICATES:
            _add_subject_keys(connection)
        count += _sign(connection, macs, covered.table.name, covered.names, covered.key.name)
    return count + _sign(connection, macs, "snapshots", SNAPSHOT_NAMES, "instance")


def _sign(connection: sa.Connection, macs: RowMacs, table: str, names: tuple[str, ...], key: str) -> int:
    # Names are of the schema, and no part of it is from outside.
    rows = connection.exec_driver_sql(f"SELECT {', '.join(names)} FROM {table}").all()  # noqa: S608
    values = [(macs.of(table, names, row), row._mapping[key]) for row in rows]
    if values:
        connection.exec_driver_sql(f"UPDATE {table} SET mac = ? WHERE {key} = ?", values)  # noqa: S608
    return len(values)


def _add_subject_keys(connection: sa.Connection) -> None:
    """Which key a certificate is for was not written down before."""
    rows = connection.exec_driver_sql("SELECT serial, kind, der FROM certificates WHERE subject_key = ''").all()
    values = [(subject_key_of(row.kind, row.der), row.serial) for row in rows]
    if values:
        connection.exec_driver_sql("UPDATE certificates SET subject_key = ? WHERE serial = ?", values)
