"""Sealed state is kept only from its owner and only as the next version (invariants 1 and 3)."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.given import a_commit, a_new_instance, created_on, database_file, open_store
from vtpm.errors import ErrorKind, StoreError
from vtpm.seal.envelope import StateKind
from vtpm.store.commits import StateCommits
from vtpm.store.model import InstanceRecord, SealedState, StateCommit
from vtpm.store.store import Store


@pytest.fixture
def owned(store: Store) -> InstanceRecord:
    """Give an instance that is ON under epoch 1, its state at version 1."""
    return created_on(store)


def kept(store: Store, record: InstanceRecord) -> SealedState:
    return store.load(record.id)[1]


def test_the_owner_commits_version_after_version(store: Store, owned: InstanceRecord) -> None:
    for version in range(2, 7):
        assert store.commit([a_commit(owned, version)]) == [""]
        assert kept(store, owned) == SealedState(1, version, b"state %d" % version)


def test_an_acknowledged_commit_is_there_after_a_restart(store: Store, owned: InstanceRecord, url: str) -> None:
    store.commit([a_commit(owned, 2)])
    again = open_store(url)
    assert kept(again, owned) == SealedState(1, 2, b"state 2")
    again.close()


@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_a_commit_under_another_epoch_is_refused(store: Store, owned: InstanceRecord, epoch: int) -> None:
    before = kept(store, owned)
    assert store.commit([a_commit(owned, 2, epoch=epoch)]) == ["EPOCH_STALE"]
    assert kept(store, owned) == before


@pytest.mark.parametrize("version", [0, 1, 3, 4, 1000])
def test_a_commit_that_is_not_the_next_version_is_refused(store: Store, owned: InstanceRecord, version: int) -> None:
    before = kept(store, owned)
    assert store.commit([a_commit(owned, version)]) == ["VERSION_CONFLICT"]
    assert kept(store, owned) == before


def test_an_old_version_is_not_taken_back(store: Store, owned: InstanceRecord) -> None:
    store.commit([a_commit(owned, 2), a_commit(owned, 3)])
    assert store.commit([a_commit(owned, 2)]) == ["VERSION_CONFLICT"]
    assert kept(store, owned).version == 3


def test_a_commit_repeated_after_a_lost_answer_is_a_success(store: Store, owned: InstanceRecord) -> None:
    store.commit([a_commit(owned, 2)])
    assert store.commit([a_commit(owned, 2)]) == [""]
    assert kept(store, owned) == SealedState(1, 2, b"state 2")


def test_another_state_under_a_version_that_is_taken_is_refused(store: Store, owned: InstanceRecord) -> None:
    store.commit([a_commit(owned, 2)])
    assert store.commit([a_commit(owned, 2, blob=b"another state")]) == ["VERSION_CONFLICT"]
    assert kept(store, owned).blob == b"state 2"


def test_a_repeated_commit_of_a_former_owner_is_still_refused(store: Store, owned: InstanceRecord) -> None:
    store.commit([a_commit(owned, 2)])
    store.release(owned.id, owned.epoch)
    store.acquire(owned.id, boot_id="boot-2")
    assert store.commit([a_commit(owned, 2)]) == ["EPOCH_STALE"]


def test_the_next_owner_goes_on_where_the_former_one_ended(store: Store, owned: InstanceRecord) -> None:
    store.commit([a_commit(owned, 2)])
    store.release(owned.id, owned.epoch)
    successor = store.acquire(owned.id, boot_id="boot-2")
    assert store.commit([a_commit(owned, 3), a_commit(successor, 3, blob=b"successor's")]) == ["EPOCH_STALE", ""]
    assert kept(store, owned) == SealedState(2, 3, b"successor's")


def test_an_instance_that_is_off_takes_no_state(store: Store) -> None:
    record = store.create(a_new_instance())
    assert store.commit([a_commit(record, 2)]) == ["EPOCH_STALE"]
    assert kept(store, record).version == 1


def test_an_instance_that_was_powered_off_takes_no_late_state(store: Store, owned: InstanceRecord) -> None:
    store.release(owned.id, owned.epoch)
    assert store.commit([a_commit(owned, 2)]) == ["EPOCH_STALE"]
    assert kept(store, owned).version == 1


def test_state_of_an_instance_that_is_not_there_is_refused(store: Store) -> None:
    assert store.commit([StateCommit(uuid.uuid4(), 1, 2, b"state")]) == ["INSTANCE_NOT_FOUND"]


def test_volatile_state_does_not_replace_permanent_state(store: Store, owned: InstanceRecord) -> None:
    before = kept(store, owned)
    answers = store.commit([StateCommit(owned.id, owned.epoch, 2, b"volatile", StateKind.VOLATILE)])
    assert answers == ["INSTANCE_NOT_FOUND"]
    assert kept(store, owned) == before


def test_no_commits_are_no_trouble(store: Store) -> None:
    assert store.commit([]) == []


def test_each_of_a_group_has_its_own_answer_and_none_spoils_another(store: Store, owned: InstanceRecord) -> None:
    other = created_on(store, "web-2")
    stranger = StateCommit(uuid.uuid4(), 1, 2, b"state")
    group = [
        a_commit(owned, 2),
        a_commit(other, 9),
        stranger,
        a_commit(other, 2, epoch=7),
        a_commit(owned, 3),
        a_commit(other, 2),
    ]
    assert store.commit(group) == ["", "VERSION_CONFLICT", "INSTANCE_NOT_FOUND", "EPOCH_STALE", "", ""]
    assert (kept(store, owned).version, kept(store, other).version) == (3, 2)


def test_a_group_that_fails_is_not_made_in_part_and_the_store_works_again_after_it(
    store: Store, owned: InstanceRecord, path: Path
) -> None:
    with database_file(path) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE UPDATE ON states WHEN NEW.version = 3 BEGIN SELECT abs(-9223372036854775807 - 1); END"
        )
    with pytest.raises(StoreError) as refused:
        store.commit([a_commit(owned, 2), a_commit(owned, 3)])
    assert refused.value.kind is ErrorKind.UNAVAILABLE
    assert kept(store, owned).version == 1

    with database_file(path) as connection:
        connection.execute("DROP TRIGGER full")
    assert store.commit([a_commit(owned, 2), a_commit(owned, 3)]) == ["", ""]
    assert kept(store, owned).version == 3


def test_a_refused_store_shows_no_state(store: Store, owned: InstanceRecord, path: Path) -> None:
    with database_file(path) as connection:
        connection.execute("ALTER TABLE states RENAME TO away")
    with pytest.raises(StoreError) as refused:
        store.commit([a_commit(owned, 2, blob=b"sealed bytes")])
    assert refused.value.reason == "STORE_FAILED"
    assert "sealed bytes" not in str(refused.value) + repr(refused.value)
    assert "sealed bytes" not in repr(a_commit(owned, 2, blob=b"sealed bytes"))


@settings(deadline=None)
@given(attempts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.binary(min_size=1, max_size=2)), max_size=12))
def test_of_any_attempts_only_the_next_version_of_the_owner_is_kept(
    shared_store: Store, attempts: list[tuple[int, int, bytes]]
) -> None:
    record = created_on(shared_store, f"i-{uuid.uuid4().hex}"[:40])
    expected = kept(shared_store, record)
    for epoch, version, blob in attempts:
        (answer,) = shared_store.commit([a_commit(record, version, epoch=epoch, blob=blob)])
        if epoch != record.epoch:
            assert answer == "EPOCH_STALE"
        elif version == expected.version + 1:
            assert answer == ""
            expected = SealedState(epoch, version, blob)
        else:
            assert answer == ("" if SealedState(epoch, version, blob) == expected else "VERSION_CONFLICT")
        assert kept(shared_store, record) == expected


@pytest.mark.parametrize("poison", ["version", "epoch", "blob", "instance"])
def test_an_item_that_the_database_cannot_take_costs_itself_alone(store: Store, owned: InstanceRecord, poison: str) -> None:
    other = created_on(store, "web-2")
    fields: dict[str, dict[str, Any]] = {
        "version": {"version": 1 << 63},
        "epoch": {"epoch": 1 << 64},
        # As a message of another shape would bring it.
        "blob": {"blob": object()},
        "instance": {"instance": "no id"},
    }
    poisoned = dataclasses.replace(a_commit(owned, 2), **fields[poison])
    assert store.commit([a_commit(other, 2), poisoned, a_commit(other, 3)]) == ["", "COMMIT_INVALID", ""]
    assert kept(store, other).version == 3
    # No transaction is left open, which would hold up everybody else.
    store.set_labels(other.id, {"a": "b"}, None)
    assert store.commit([a_commit(owned, 2)]) == [""]


def test_an_exception_of_whatever_kind_leaves_no_transaction_open(
    store: Store, owned: InstanceRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(StateCommits, "_commit_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.commit([a_commit(owned, 2)])
    monkeypatch.undo()
    store.set_labels(owned.id, {"a": "b"}, None)
    assert store.commit([a_commit(owned, 2)]) == [""]
