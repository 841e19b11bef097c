"""A snapshot is taken by the owner of an instance that is ON, and used once (invariant 2)."""

from __future__ import annotations

import os
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.store.given import a_new_instance, created_on
from vtpm.errors import NotFoundError
from vtpm.store.model import InstanceRecord
from vtpm.store.snapshots import SnapshotCommit, SnapshotRow, SnapshotUse
from vtpm.store.store import Store


@pytest.fixture
def owned(store: Store) -> InstanceRecord:
    """Give an instance that is ON under epoch 1, its state at version 1."""
    return created_on(store)


def taken(record: InstanceRecord, version: int = 1, *, epoch: int | None = None) -> SnapshotCommit:
    blob = b"snapshot %d" % version
    return SnapshotCommit(record.id, record.epoch if epoch is None else epoch, version, blob, attached=False)


def used(record: InstanceRecord, token: bytes, version: int = 1, *, epoch: int | None = None) -> SnapshotUse:
    return SnapshotUse(record.id, record.epoch if epoch is None else epoch, version, token)


def test_what_was_taken_is_there_until_it_is_used(store: Store, owned: InstanceRecord) -> None:
    assert store.commit([taken(owned)]) == [""]
    found = store.snapshots.load(owned.id, owned.epoch)
    assert (found.snapshot.version, found.snapshot.blob, found.state.version) == (1, b"snapshot 1", 1)
    assert found.used_by == b""
    assert store.snapshots.all() == {(owned.id, owned.epoch): SnapshotRow(attached=False, used=False)}
    assert store.commit([used(owned, b"t" * 16)]) == [""]
    assert store.snapshots.all() == {(owned.id, owned.epoch): SnapshotRow(attached=False, used=True)}
    assert store.snapshots.load(owned.id, owned.epoch).used_by == b"t" * 16


def test_who_used_it_may_ask_again_and_nobody_else(store: Store, owned: InstanceRecord) -> None:
    store.commit([taken(owned)])
    assert store.commit([used(owned, b"a" * 16), used(owned, b"a" * 16)]) == ["", ""]
    assert store.commit([used(owned, b"b" * 16)]) == ["SNAPSHOT_USED"]


def test_one_that_was_used_is_not_brought_back_by_who_took_it(store: Store, owned: InstanceRecord) -> None:
    store.commit([taken(owned)])
    # Its worker lost the answer.
    assert store.commit([taken(owned)]) == [""]
    store.commit([used(owned, b"a" * 16)])
    store.commit([taken(owned)])
    assert store.snapshots.load(owned.id, owned.epoch).used_by == b"a" * 16
    assert store.commit([taken(owned, 2)]) == [""]
    assert store.snapshots.load(owned.id, owned.epoch).used_by == b""
    assert store.commit([used(owned, b"b" * 16, 1)]) == ["SNAPSHOT_USED"]
    assert store.commit([used(owned, b"b" * 16, 2)]) == [""]


def test_only_under_the_present_epoch_and_only_while_on(store: Store, owned: InstanceRecord) -> None:
    assert store.commit([taken(owned, epoch=owned.epoch + 1)]) == ["EPOCH_STALE"]
    store.commit([taken(owned)])
    assert store.commit([used(owned, b"a" * 16, epoch=owned.epoch + 1)]) == ["SNAPSHOT_USED"]
    store.release(owned.id, owned.epoch)
    assert store.commit([taken(owned, 2)]) == ["EPOCH_STALE"]
    assert store.commit([used(owned, b"a" * 16)]) == ["SNAPSHOT_USED"]
    again = store.acquire(owned.id, boot_id="boot-1")
    with pytest.raises(NotFoundError):
        store.snapshots.load(again.id, again.epoch)


def test_a_deleted_instance_leaves_no_snapshot(store: Store, owned: InstanceRecord) -> None:
    store.commit([taken(owned)])
    store.release(owned.id, owned.epoch)
    store.delete(owned.id, None)
    assert store.snapshots.all() == {}
    assert store.commit([taken(owned)]) == ["EPOCH_STALE"]


# Each example has an instance of its own.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["take", "use", "again", "foreign"]), st.integers(1, 5)), max_size=20))
def test_each_version_has_at_most_one_user(store: Store, steps: list[tuple[str, int]]) -> None:
    record = store.acquire(store.create(a_new_instance(f"web-{uuid.uuid4().hex[:8]}")).id, boot_id="boot-1")
    users: dict[int, bytes] = {}
    newest = 0
    for action, version in steps:
        if action == "take":
            if store.commit([taken(record, version)]) == [""]:
                assert version >= newest
                newest = max(newest, version)
            continue
        token = users.get(version, os.urandom(16)) if action == "again" else os.urandom(16)
        if store.commit([used(record, token, version)]) == [""]:
            assert version == newest
            assert users.setdefault(version, token) == token, "a second user"
