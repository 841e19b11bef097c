"""The store's log: a chain that only who has the anchor's secret can lengthen."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.store.given import a_commit, a_new_instance, created_on, database_file, open_store
from vtpm.seal.anchor import START, LogPoint, Mark
from vtpm.seal.envelope import StateKind
from vtpm.store.freshness import LogKind, StateRow, digest_of
from vtpm.store.store import Store

KEY = b"k" * 32
ID = uuid.UUID(int=7)


@pytest.fixture
def armed(store: Store) -> Store:
    """Give a store with rollback protection."""
    store.freshness.identify(ID, KEY)
    store.freshness.arm()
    return store


def events(store: Store, covered: LogPoint = START, head: LogPoint = START) -> list[tuple[LogKind, bytes]] | None:
    with store.freshness.snapshot() as snapshot:
        read = snapshot.log_after(covered, head)
    return None if read is None else [(row.kind, row.instance) for row in read[0]]


def test_creations_and_deletions_are_in_the_log_with_the_change_itself(armed: Store) -> None:
    first, second = armed.create(a_new_instance("a")), armed.create(a_new_instance("b"))
    armed.delete(first.id, None)
    assert events(armed) == [
        (LogKind.CREATED, first.id.bytes),
        (LogKind.CREATED, second.id.bytes),
        (LogKind.DELETED, first.id.bytes),
    ]
    with pytest.raises(Exception, match="exists"):
        armed.create(a_new_instance("b"))
    assert len(events(armed) or ()) == 3, "a change that was not made is not in it"


def test_without_an_anchor_nothing_is_written(store: Store) -> None:
    store.create(a_new_instance())
    assert store.freshness.identity() is None
    with database_file(Path(store._url.removeprefix("sqlite:///"))) as database:
        assert database.execute("SELECT count(*) FROM freshness_log").fetchone() == (0,)


def test_commits_write_nothing_into_the_log(armed: Store) -> None:
    record = created_on(armed)
    before = events(armed)
    assert armed.commit([a_commit(record, 2), a_commit(record, 3)]) == ["", ""]
    assert events(armed) == before


def test_the_log_goes_on_from_a_root(armed: Store) -> None:
    made = armed.create(a_new_instance("a"))
    root = armed.freshness.append_root(b"r" * 32, START)
    later = armed.create(a_new_instance("b"))
    assert root.sequence == 2
    assert events(armed, root, root) == [(LogKind.CREATED, later.id.bytes)]
    assert armed.freshness.last_event(later.id, root) is LogKind.CREATED
    assert armed.freshness.last_event(made.id, root) is None
    assert armed.freshness.last_event(made.id, START) is LogKind.CREATED


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM freshness_log WHERE sequence = 2",
        "DELETE FROM freshness_log WHERE sequence = 4",
        "UPDATE freshness_log SET kind = 3 WHERE sequence = 3",
        "UPDATE freshness_log SET kind = 99 WHERE sequence = 3",
        "UPDATE freshness_log SET instance = '00000000000000000000000000000007' WHERE sequence = 3",
        "UPDATE freshness_log SET root = x'00' WHERE sequence = 4",
        "UPDATE freshness_log SET mac = x'00' WHERE sequence = 1",
        "UPDATE freshness_log SET sequence = sequence + 1 WHERE sequence = 4",
        "UPDATE freshness_log SET sequence = 'x' WHERE sequence = 4",
        "UPDATE freshness_log SET sequence = 9223372036854775807 WHERE sequence = 4",
        "UPDATE freshness_log SET instance = 'none' WHERE sequence = 3",
        "UPDATE freshness_log SET kind = x'02' WHERE sequence = 3",
        "UPDATE freshness_log SET root = 7 WHERE sequence = 4",
        "UPDATE freshness_log SET mac = 7 WHERE sequence = 4",
        "UPDATE freshness_log SET mac = CAST(x'ff' AS TEXT) WHERE sequence = 4",
        "INSERT INTO freshness_log VALUES (5, 2, 'none', 'root', 7)",
        "DELETE FROM freshness_log",
    ],
)
def test_a_log_that_was_changed_is_not_the_one_that_was_anchored(armed: Store, path: Path, change: str) -> None:
    for name in ("a", "b", "c"):
        armed.create(a_new_instance(name))
    head = armed.freshness.append_root(b"r" * 32, START)
    assert events(armed, START, head) is not None
    with database_file(path) as database:
        assert database.execute(change).rowcount >= 1
    assert events(armed, START, head) is None
    # Who creates an instance now is not kept from it, and the log can begin anew.
    armed.create(a_new_instance("d"))
    armed.freshness.append_root(b"s" * 32, START)
    armed.freshness.go_on_from(head)
    armed.create(a_new_instance("e"))
    assert len(events(armed, head, head) or ()) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mac=st.binary(min_size=32, max_size=32), kind=st.sampled_from([2, 4]))
def test_a_row_is_not_made_without_the_secret(armed: Store, path: Path, mac: bytes, kind: int) -> None:
    stranger = uuid.uuid4()
    with armed.freshness.snapshot() as snapshot:
        read = snapshot.log_after(START, START)
    assert read is not None
    with database_file(path) as database:
        row = (read[1].sequence + 1, kind, stranger.hex, b"", mac)
        database.execute("INSERT INTO freshness_log VALUES (?, ?, ?, ?, ?)", row)
        assert events(armed) is None
        assert armed.freshness.last_event(stranger, START) is None
        database.execute("DELETE FROM freshness_log WHERE sequence = ?", (row[0],))


def test_rows_of_another_stores_log_do_not_fit(armed: Store, tmp_path: Path) -> None:
    other = open_store(f"sqlite:///{tmp_path / 'other.db'}")
    other.freshness.use(uuid.UUID(int=8), KEY)
    other.create(a_new_instance("a"))
    with database_file(tmp_path / "other.db") as database:
        rows = database.execute("SELECT * FROM freshness_log").fetchall()
    other.close()
    with database_file(tmp_path / "vtpm.db") as database:
        database.executemany("INSERT INTO freshness_log VALUES (?, ?, ?, ?, ?)", rows)
    assert events(armed) is None


def test_only_what_is_long_behind_the_anchor_is_forgotten(armed: Store) -> None:
    head = START
    for _ in range(1003):
        head = armed.freshness.append_root(b"r" * 32, head)
    with armed.freshness.snapshot() as snapshot:
        kept = snapshot._connection.execute("SELECT min(sequence), max(sequence) FROM freshness_log").fetchone()
    assert kept == (3, 1003)
    assert events(armed, head, head) == []


def test_a_broken_log_goes_on_from_the_anchors_head(armed: Store) -> None:
    covered, head = LogPoint(40, b"l" * 32), LogPoint(41, b"m" * 32)
    assert events(armed, covered, head) is None
    armed.freshness.go_on_from(head)
    made = armed.create(a_new_instance("a"))
    assert events(armed, head, head) == [(LogKind.CREATED, made.id.bytes)]


def test_rows_and_digests_are_those_of_the_states(armed: Store) -> None:
    record = created_on(armed)
    armed.commit([a_commit(record, 2, blob=b"two")])
    row = StateRow(record.id.hex, record.epoch, StateKind.PERMANENT, record.epoch, 2)
    with armed.freshness.snapshot() as snapshot:
        assert snapshot.rows() == {row}
        assert snapshot.digest(row) == digest_of(b"two")
    assert armed.freshness.present(record.id) == [(row, digest_of(b"two"))]


def test_changes_of_others_are_seen_once(armed: Store) -> None:
    armed.freshness.changed()
    assert not armed.freshness.changed()
    record = created_on(armed)
    assert armed.freshness.changed()
    armed.commit([a_commit(record, 2)])
    assert armed.freshness.changed()
    armed.freshness.append_root(b"r" * 32, START)
    assert not armed.freshness.changed(), "its own do not count"


@pytest.mark.parametrize("change", ["kind = 300", "kind = -1", "kind = 77", "epoch = -1", "version = 'x'", "epoch = 1e30"])
def test_a_state_of_junk_is_none_and_the_others_are_looked_at(armed: Store, path: Path, change: str) -> None:
    honest, hurt = created_on(armed, "honest"), created_on(armed, "hurt")
    with database_file(path) as database:
        database.execute(f"UPDATE states SET {change} WHERE instance = ?", (hurt.id.hex,))
    with armed.freshness.snapshot() as snapshot:
        rows = snapshot.rows()
        marks = [Mark(bytes.fromhex(row.instance), *row[2:3], *row[1:2], *row[3:], snapshot.digest(row)) for row in rows]
    assert [Mark.unpack(mark.pack()).instance for mark in marks] == [honest.id.bytes]


@pytest.mark.parametrize("blob", ["'text'", "5", "CAST(x'ff' AS TEXT)"])
def test_a_state_that_is_no_blob_has_a_digest_too(armed: Store, path: Path, blob: str) -> None:
    honest, hurt = created_on(armed, "honest"), created_on(armed, "hurt")
    with database_file(path) as database:
        database.execute(f"UPDATE states SET blob = {blob} WHERE instance = ?", (hurt.id.hex,))
    with armed.freshness.snapshot() as snapshot:
        digests = {row.instance: snapshot.digest(row) for row in snapshot.rows()}
    assert digests.keys() == {honest.id.hex, hurt.id.hex}
    ((_, digest),) = armed.freshness.present(hurt.id)
    assert digest == digests[hurt.id.hex] != digest_of(b"")


def test_a_store_that_has_no_name_is_known_to_nobody(armed: Store, path: Path) -> None:
    with database_file(path) as database:
        database.execute("UPDATE freshness SET store = 'none'")
    assert armed.freshness.identity() is None
