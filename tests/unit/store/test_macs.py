"""Invariant 9: a row that the service did not write, or wrote elsewhere, is noticed where it is read."""

from __future__ import annotations

import datetime as dt
import hmac
import os
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.given import a_commit, a_new_instance, created_on, database_file
from vtpm.api.v1 import instance_pb2
from vtpm.errors import SealedStateError, StoreError
from vtpm.store import macs
from vtpm.store.macs import RowMacs, encode
from vtpm.store.model import AuthorityRecord, CertificateRecord, Filter, InstanceState
from vtpm.store.snapshots import SnapshotCommit, SnapshotRow, SnapshotUse
from vtpm.store.store import Store

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
values = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=20), st.binary(max_size=20), st.floats(allow_nan=False)
)
names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True).map(tuple)


# ---- the scheme ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_no_two_rows_are_written_alike(data: st.DataObject) -> None:
    columns = data.draw(names)
    row = data.draw(st.lists(values, min_size=len(columns), max_size=len(columns)))
    others = data.draw(names)
    other = data.draw(st.lists(values, min_size=len(others), max_size=len(others)))
    table, another = data.draw(st.sampled_from(["instances", "pool"])), data.draw(st.sampled_from(["instances", "pool"]))
    same = (table, columns, [(type(v), v) for v in row]) == (another, others, [(type(v), v) for v in other])
    assert (encode(table, columns, row) == encode(another, others, other)) is same


@given(st.data())
def test_one_changed_value_is_another_row(data: st.DataObject) -> None:
    columns = data.draw(names)
    row = data.draw(st.lists(values, min_size=len(columns), max_size=len(columns)))
    at = data.draw(st.integers(0, len(columns) - 1))
    changed = data.draw(values.filter(lambda value: (type(value), value) != (type(row[at]), row[at])))
    assert encode("t", columns, row) != encode("t", columns, [*row[:at], changed, *row[at + 1 :]])


def test_values_are_those_that_the_database_keeps() -> None:
    identifier, moment = uuid.uuid4(), dt.datetime(2026, 1, 2, 3, 4, 5, 6)  # noqa: DTZ001  # as the database keeps it
    kept = [identifier.hex, "2026-01-02 03:04:05.000006", 1]
    assert encode("t", ("a",), [InstanceState.ON]) == encode("t", ("a",), ["ON"])
    assert encode("t", ("a", "b", "c"), [identifier, moment, True]) == encode("t", ("a", "b", "c"), kept)


def test_another_key_makes_another_mac() -> None:
    one, other = RowMacs(), RowMacs()
    one.use(bytes(32))
    other.use(bytes(31) + b"\1")
    assert one.of("t", ("a",), [1]) != other.of("t", ("a",), [1])


def test_the_mac_is_hmac_sha256() -> None:
    key = bytes(range(32))
    row_macs = RowMacs()
    row_macs.use(key)
    assert row_macs.of("t", ("a",), ["x"]) == hmac.digest(key, encode("t", ("a",), ["x"]), "sha256")


def test_without_a_key_nothing_is_read_and_nothing_written(url: str) -> None:
    store = Store.open(url)
    with pytest.raises(StoreError) as refused:
        store.create(a_new_instance())
    assert refused.value.reason == "ROW_KEY_NOT_THERE"
    store.close()


# ---- every column of every table -----------------------------------------------------------------------------------------


def a_certificate(instance: uuid.UUID, serial: int, **changes: object) -> CertificateRecord:
    record = CertificateRecord(serial, instance, "AK", "ECC_P256", b"der", NOW, NOW + dt.timedelta(days=1), b"issuer")
    from dataclasses import replace

    return replace(record, **{"subject_key": os.urandom(32), **changes})  # type: ignore[arg-type]


@pytest.fixture
def full(store: Store) -> Store:
    """A store with two rows of each kind."""
    for number, name in enumerate(("web-1", "web-2")):
        request_id = str(uuid.UUID(int=number + 1))
        record = created_on(store, name)
        assert store.commit([SnapshotCommit(record.id, record.epoch, 1, b"sealed", True)]) == [""]
        assert store.commit([SnapshotUse(record.id, record.epoch, 1, bytes(16))]) == [""]
        store.certificates.add([a_certificate(record.id, number + 1)])
        store.create(a_new_instance(f"{name}-b", request_id=request_id))
        store.add_to_pool(a_new_instance(""), "key")
        store.authorities.install([AuthorityRecord(uuid.uuid4(), "ISSUING", "CURRENT", b"k", "PEM", "SEALED", b"sealed")])
    store.certificates.next_crl_number()
    return store


def _instances(store: Store) -> bool:
    """Whether one instance is shown as refused, and only that."""
    shown = store.list(Filter(), 100, None)
    refused = [record for record in shown if record.failure is not None and record.failure.reason == "ROW_MAC_MISMATCH"]
    assert all(record.state is InstanceState.FAILED for record in refused)
    for record in refused:
        with pytest.raises(SealedStateError) as caught:
            store.acquire(record.id, boot_id="boot")
        assert caught.value.reason == "ROW_MAC_MISMATCH"
    return len(refused) == 1


def _certificates(store: Store) -> bool:
    current = [item.serial for name in ("web-1", "web-2") for item in store.certificates.history(store.get(name).id)]
    return len(current) == 1 and len(store.certificates.refused()) <= 1


def _snapshots(store: Store) -> bool:
    # One that is not even of an epoch is none to go on from.
    return [row.refused for row in store.snapshots.all().values()].count(False) == 1


def _requests(store: Store) -> bool:
    found = 0
    for number in (1, 2):
        try:
            found += store.find_request(str(uuid.UUID(int=number))) is not None
        except SealedStateError:
            continue
    return found == 1


LOOKS: dict[str, Callable[[Store], bool]] = {
    "instances": _instances,
    "certificates": _certificates,
    "authorities": lambda store: [item.state for item in store.authorities.list()].count("REFUSED") == 1,
    "pool": lambda store: len(store.pool.members()) == 1,
    "counters": lambda store: store.certificates.next_crl_number() > 1_000_000_000,
    "requests": _requests,
    "snapshots": _snapshots,
    "snapshot_uses": _snapshots,
}
COLUMNS = [(covered.table.name, name) for covered in macs.ALL for name in covered.names]
COLUMNS += [("snapshots", name) for name in macs.SNAPSHOT_NAMES if name != "instance"]
# With another primary key there is nothing at the old one: that is a row that was deleted, which no MAC tells.
KEYS = {(covered.table.name, covered.key.name) for covered in macs.ALL}


@pytest.mark.parametrize(("table", "column"), [item for item in COLUMNS if item not in KEYS])
@pytest.mark.parametrize("how", ["another", "of another type"])
def test_a_column_that_was_changed_is_noticed(full: Store, path: Path, table: str, column: str, how: str) -> None:
    key = "instance" if table == "snapshots" else next(c.key.name for c in macs.ALL if c.table.name == table)
    visible = "AND state != 'POOLED' AND name NOT LIKE '%-b'" if table == "instances" else ""
    with database_file(path) as connection:
        query = f"SELECT {key}, {column} FROM {table} WHERE 1 {visible} ORDER BY 1 LIMIT 1"
        row, value = connection.execute(query).fetchone()
        hurt = changed(value) if how == "another" else (b"\xff\0" if not isinstance(value, bytes) else "text")
        if column == "state" and table == "instances":
            hurt = "OFF"
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (hurt, row))
    assert LOOKS[table](full)


def changed(value: object) -> object:
    match value:
        case bytes():
            return value + b"\0"
        case str() if value.startswith("20"):
            return "2030" + value[4:]
        case str() if len(value) == 32:
            return uuid.uuid4().hex
        case str():
            return value + "x"
        case int():
            return value + 1
        case _:
            return "2030-01-01 00:00:00.000000"


@pytest.mark.parametrize("table", LOOKS)
def test_a_mac_of_another_row_is_noticed(full: Store, path: Path, table: str) -> None:
    with database_file(path) as connection:
        rows = connection.execute(f"SELECT rowid FROM {table} ORDER BY 1").fetchall()
        if len(rows) > 1:
            query = f"UPDATE {table} SET mac = (SELECT mac FROM {table} WHERE rowid = ?) WHERE rowid = ?"
            connection.execute(query, (rows[1][0], rows[0][0]))
        else:
            connection.execute(f"UPDATE {table} SET mac = zeroblob(32)")
    assert LOOKS[table](full)


def test_a_revocation_that_was_taken_back_counts(full: Store, path: Path) -> None:
    instance = full.get("web-1").id
    (revoked,) = full.certificates.revoke(instance, "keyCompromise", NOW)
    with database_file(path) as connection:
        connection.execute("UPDATE certificates SET revoked_at = NULL, revocation_reason = '' WHERE revoked_at IS NOT NULL")
    assert full.certificates.refused() == [revoked.serial]
    assert full.certificates.current(instance) == []


def test_a_key_is_certified_for_one_instance(full: Store) -> None:
    first, second = full.get("web-1").id, full.get("web-2").id
    (held,) = full.certificates.current(first)
    with pytest.raises(Exception, match="certified for another instance") as caught:
        full.certificates.add([a_certificate(second, 77, subject_key=held.subject_key)])
    assert getattr(caught.value, "reason", "") == "KEY_CERTIFIED_ELSEWHERE"
    # Its own instance may have it again, and another once it is revoked.
    full.certificates.add([a_certificate(first, 78, subject_key=held.subject_key)])
    full.certificates.revoke(first, "superseded", NOW)
    full.certificates.add([a_certificate(second, 79, subject_key=held.subject_key)])


def test_what_is_refused_can_be_deleted(full: Store, path: Path) -> None:
    record = full.get("web-1-b")
    with database_file(path) as connection:
        connection.execute("UPDATE instances SET profile = 'x' WHERE id = ?", (record.id.hex,))
    full.delete(record.id, None)
    assert record.id not in {item.id for item in full.list(Filter(), 100, None)}


@settings(max_examples=25, deadline=None)
@given(column=st.sampled_from(macs.INSTANCES.names[1:]), junk=st.one_of(st.none(), st.integers(), st.text(), st.binary()))
def test_whatever_stands_in_a_row_others_are_listed(shared_store: Store, column: str, junk: object) -> None:
    honest, hurt = (shared_store.create(a_new_instance(f"{kind}-{uuid.uuid4()}")) for kind in ("h", "x"))
    path = shared_store._url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        try:
            connection.execute(f"UPDATE instances SET {column} = ? WHERE id = ?", (junk, hurt.id.hex))
        except (sqlite3.IntegrityError, UnicodeEncodeError, OverflowError):
            return
    shared_store.owned()
    assert sum(shared_store.counts().values()) >= 2
    assert shared_store.identities.overdue("AK", NOW, 10) == []
    with shared_store.freshness.snapshot() as snapshot:
        assert honest.id.hex in {row.instance for row in snapshot.rows()}
    shown = {record.id: record for record in shared_store.list(Filter(), 10_000, None)}
    assert shown[honest.id] == honest
    assert shown.get(hurt.id, honest) in (hurt, honest) or shown[hurt.id].failure is not None


@pytest.mark.parametrize("column", macs.INSTANCES.names[1:])
def test_bytes_that_are_no_text_hurt_their_own_row_only(store: Store, path: Path, column: str) -> None:
    honest, hurt = created_on(store, "honest"), created_on(store, "hurt")
    with database_file(path) as connection:
        connection.execute(f"UPDATE instances SET {column} = CAST(x'4fff' AS TEXT) WHERE id = ?", (hurt.id.hex,))
    # In one turn of the commit thread: an error of the store would have it try again for good, and others wait for it.
    answers = store.commit([a_commit(hurt, 2), a_commit(honest, 2)])
    assert answers[1] == ""
    shown = {record.id: record for record in store.list(Filter(), 10, None)}
    assert shown[honest.id] == honest
    assert shown[hurt.id].state is InstanceState.FAILED
    assert [record.id for record in store.owned()] == [honest.id]
    assert sum(store.counts().values()) == 2
    assert store.snapshots.all() == {}


@pytest.mark.parametrize("junk", ["CAST(x'ff' AS TEXT)", "x'ff'", "7"])
@pytest.mark.parametrize("column", ["key", "value"])
def test_labels_that_are_none_are_not_shown(store: Store, path: Path, column: str, junk: str) -> None:
    honest = store.create(a_new_instance("honest", {"team": "web"}))
    hurt = store.create(a_new_instance("hurt", {"team": "web"}))
    with database_file(path) as connection:
        connection.execute(f"UPDATE labels SET {column} = {junk} WHERE instance = ?", (hurt.id.hex,))
    shown = {record.id: record for record in store.list(Filter(), 10, None)}
    assert shown[honest.id].labels == {"team": "web"}
    # As an answer of the API takes them.
    for record in shown.values():
        assert instance_pb2.Instance(labels=record.labels).labels == record.labels


@pytest.mark.parametrize("junk", ["9e999", "-1", "'x'", "x'00'", "CAST(x'ff' AS TEXT)"])
@pytest.mark.parametrize(
    "column", ["snapshots.epoch", "snapshots.version", "snapshots.mac", "snapshot_uses.version", "snapshot_uses.token"]
)
def test_whatever_stands_in_a_snapshot_s_row_the_others_are_found(store: Store, path: Path, column: str, junk: str) -> None:
    honest, hurt = created_on(store, "honest"), created_on(store, "hurt")
    for record in (honest, hurt):
        assert store.commit([SnapshotCommit(record.id, record.epoch, 1, b"x" * 50, False)]) == [""]
        assert store.commit([SnapshotUse(record.id, record.epoch, 1, bytes(16))]) == [""]
    table, name = column.split(".")
    with database_file(path) as connection:
        connection.execute(f"UPDATE {table} SET {name} = {junk} WHERE instance = ?", (hurt.id.hex,))
    found = store.snapshots.all()
    assert found[honest.id, honest.epoch] == SnapshotRow(attached=False, used=True)
    assert all(row.refused for (instance, _), row in found.items() if instance == hurt.id)
    assert store.commit([SnapshotUse(honest.id, honest.epoch, 1, bytes(16))]) == [""]
