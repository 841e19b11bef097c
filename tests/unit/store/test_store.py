"""Instances in the store: created once, owned by one, changed by who has seen the latest."""

from __future__ import annotations

import datetime as dt
import uuid
from pathlib import Path

import pytest

from tests.unit.store.given import (
    KEYS,
    PROFILE,
    a_commit,
    a_new_instance,
    a_wrapped_key,
    created_on,
    database_file,
    open_store,
    sign_anew,
)
from vtpm.errors import AlreadyExistsError, ConflictError, FailedPreconditionError, NotFoundError, StoreError
from vtpm.store.model import Failure, InstanceState, SealedState
from vtpm.store.store import Store

FAILURE = Failure(
    "WORKER_LOST", "the worker died", "vtpm instance reset web-1", dt.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=dt.UTC)
)

# ---- creating and finding ------------------------------------------------------------------------------------------------


def test_a_created_instance_is_off_and_has_all_it_was_given(store: Store) -> None:
    new = a_new_instance("web-1", {"team": "web", "empty": ""})
    record = store.create(new)
    assert (record.id, record.name, record.labels) == (new.id, "web-1", {"team": "web", "empty": ""})
    assert (record.profile, record.keys, record.engine) == (PROFILE, KEYS, "libtpms")
    assert (record.state, record.failure, record.epoch, record.boot_id) == (InstanceState.OFF, None, 0, "")
    assert record.revision == 1
    assert record.created_at == record.updated_at
    assert record.created_at.utcoffset() == dt.timedelta(0)


def test_an_instance_is_found_by_resource_name_id_and_name(store: Store) -> None:
    record = store.create(a_new_instance("web-1"))
    store.create(a_new_instance("web-2"))
    assert [store.get(ref) for ref in (f"instances/{record.id}", str(record.id), "web-1", "instances/web-1")] == [record] * 4


@pytest.mark.parametrize("ref", ["", "web-2", "instances/", "WEB-1", "web-", str(uuid.UUID(int=1)), "x" * 1000])
def test_what_is_not_there_is_named_and_not_echoed_at_length(store: Store, ref: str) -> None:
    store.create(a_new_instance("web-1"))
    with pytest.raises(NotFoundError) as refused:
        store.get(ref)
    assert refused.value.reason == "INSTANCE_NOT_FOUND"
    assert len(refused.value.subject) <= 80


def test_sealed_state_and_wrapped_key_come_back_to_the_byte(store: Store) -> None:
    new = a_new_instance()
    store.create(new)
    assert store.load(new.id) == (new.wrapped_key, SealedState(0, 1, new.sealed))


def test_state_of_an_instance_that_is_not_there_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError) as refused:
        store.load(uuid.uuid4())
    assert refused.value.reason == "INSTANCE_NOT_FOUND"


def test_sealed_bytes_are_not_shown() -> None:
    new = a_new_instance(sealed=b"sealed bytes")
    assert "sealed bytes" not in repr(new)
    assert "sealed bytes" not in repr(SealedState(1, 1, b"sealed bytes"))
    assert repr(new.wrapped_key.blob) not in repr(new)


def test_a_name_is_given_once_and_a_refused_creation_leaves_nothing(store: Store) -> None:
    first = store.create(a_new_instance("web-1"))
    second = a_new_instance("web-1", {"team": "db"}, request_id=str(uuid.uuid4()))
    with pytest.raises(AlreadyExistsError) as refused:
        store.create(second)
    assert (refused.value.reason, refused.value.subject) == ("INSTANCE_NAME_TAKEN", "web-1")
    with pytest.raises(NotFoundError):
        store.load(second.id)
    assert store.find_request(second.request_id) is None
    assert store.get("web-1") == first


def test_what_was_created_is_there_after_a_restart(store: Store, url: str) -> None:
    new = a_new_instance(labels={"team": "web"})
    record = store.create(new)
    again = open_store(url)
    assert again.get(str(new.id)) == record
    assert again.load(new.id) == store.load(new.id)
    again.close()


def test_a_store_is_empty_until_something_is_sealed_into_it(store: Store) -> None:
    assert store.is_empty()
    record = store.create(a_new_instance())
    assert not store.is_empty()
    store.delete(record.id, None)
    assert store.is_empty()


# ---- retried creations ---------------------------------------------------------------------------------------------------


def test_a_retried_creation_finds_what_the_first_one_made(store: Store, url: str) -> None:
    new = a_new_instance(request_id=str(uuid.uuid4()), fingerprint=b"what was asked for")
    store.create(new)
    assert store.find_request(new.request_id) == (new.id, b"what was asked for")
    again = open_store(url)
    assert again.find_request(new.request_id) == (new.id, b"what was asked for")
    again.close()


def test_a_request_that_nobody_made_is_not_found(store: Store) -> None:
    store.create(a_new_instance(request_id=str(uuid.uuid4())))
    assert store.find_request(str(uuid.uuid4())) is None


def test_one_request_creates_one_instance(store: Store) -> None:
    request_id = str(uuid.uuid4())
    first = store.create(a_new_instance("web-1", request_id=request_id))
    with pytest.raises(AlreadyExistsError):
        store.create(a_new_instance("web-2", request_id=request_id))
    assert [record.name for record in store.owned()] == []
    assert store.counts() == {InstanceState.OFF: 1}
    assert store.find_request(request_id) == (first.id, b"")


def test_a_request_is_forgotten_after_a_day(store: Store, path: Path) -> None:
    old, young = str(uuid.uuid4()), str(uuid.uuid4())
    store.create(a_new_instance("web-1", request_id=old))
    store.create(a_new_instance("web-2", request_id=young))
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    with database_file(path) as connection:
        for request_id, hours in ((old, 25), (young, 23)):
            moment = (now - dt.timedelta(hours=hours)).isoformat(" ")
            connection.execute("UPDATE requests SET created_at = ? WHERE id = ?", (moment, uuid.UUID(request_id).hex))
    sign_anew(store)
    store.create(a_new_instance("web-3", request_id=str(uuid.uuid4())))
    assert store.find_request(old) is None
    assert store.find_request(young) is not None


# ---- ownership -----------------------------------------------------------------------------------------------------------


def test_power_on_takes_ownership_under_the_next_epoch(store: Store) -> None:
    record = created_on(store)
    assert (record.state, record.epoch, record.boot_id, record.revision) == (InstanceState.ON, 1, "boot-1", 2)
    assert store.get("web-1") == record
    assert store.owned() == [record]


def test_an_instance_that_is_on_has_one_owner(store: Store) -> None:
    record = created_on(store)
    with pytest.raises(FailedPreconditionError) as refused:
        store.acquire(record.id, boot_id="boot-2")
    assert refused.value.reason == "INSTANCE_ALREADY_ON"
    assert store.get("web-1") == record


def test_every_power_cycle_has_an_epoch_of_its_own(store: Store) -> None:
    record = created_on(store)
    for epoch in (2, 3, 4):
        off = store.release(record.id, epoch - 1)
        assert (off.state, off.boot_id, off.epoch) == (InstanceState.OFF, "", epoch - 1)
        assert store.acquire(record.id, boot_id="boot-1").epoch == epoch


def test_power_on_by_somebody_who_saw_an_old_revision_is_refused(store: Store) -> None:
    record = store.create(a_new_instance())
    store.set_labels(record.id, {"seen": "no"}, None)
    with pytest.raises(ConflictError) as refused:
        store.acquire(record.id, boot_id="boot-1", revision=record.revision)
    assert refused.value.reason == "ETAG_MISMATCH"
    assert (store.get("web-1").state, store.get("web-1").epoch) == (InstanceState.OFF, 0)


@pytest.mark.parametrize("epoch", [0, 2, 99])
def test_an_owner_of_another_epoch_can_neither_release_nor_fail(store: Store, epoch: int) -> None:
    record = created_on(store)
    with pytest.raises(ConflictError) as not_released:
        store.release(record.id, epoch)
    with pytest.raises(ConflictError) as not_failed:
        store.fail(record.id, epoch, FAILURE)
    assert not_released.value.reason == not_failed.value.reason == "EPOCH_STALE"
    assert store.get("web-1") == record


def test_an_instance_that_is_off_can_neither_be_released_nor_fail(store: Store) -> None:
    record = store.create(a_new_instance())
    with pytest.raises(ConflictError):
        store.release(record.id, record.epoch)
    with pytest.raises(ConflictError):
        store.fail(record.id, record.epoch, FAILURE)
    assert store.get("web-1") == record


def test_a_failed_instance_says_why_until_it_is_powered_on_again(store: Store) -> None:
    on = created_on(store)
    failed = store.fail(on.id, on.epoch, FAILURE)
    assert (failed.state, failed.failure, failed.boot_id) == (InstanceState.FAILED, FAILURE, "")
    assert store.get("web-1").failure == FAILURE
    recovered = store.acquire(on.id, boot_id="boot-2")
    assert (recovered.state, recovered.failure, recovered.epoch) == (InstanceState.ON, None, 2)


def test_a_failed_instance_can_be_powered_off(store: Store) -> None:
    on = created_on(store)
    store.fail(on.id, on.epoch, FAILURE)
    off = store.release(on.id, on.epoch)
    assert (off.state, off.failure) == (InstanceState.OFF, None)


# ---- labels and counts ---------------------------------------------------------------------------------------------------


def test_labels_are_replaced_as_a_whole(store: Store) -> None:
    record = store.create(a_new_instance(labels={"team": "web", "tier": "1"}))
    changed = store.set_labels(record.id, {"team": "db"}, record.revision)
    assert (changed.labels, changed.revision) == ({"team": "db"}, 2)
    assert store.get("web-1").labels == {"team": "db"}
    assert store.set_labels(record.id, {}, None).labels == {}


def test_labels_by_somebody_who_saw_an_old_revision_are_refused(store: Store) -> None:
    record = store.create(a_new_instance(labels={"team": "web"}))
    changed = store.set_labels(record.id, {"team": "db"}, record.revision)
    with pytest.raises(ConflictError) as refused:
        store.set_labels(record.id, {"team": "lost"}, record.revision)
    assert refused.value.reason == "ETAG_MISMATCH"
    assert store.get("web-1") == changed


def test_labels_of_nobody_are_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.set_labels(uuid.uuid4(), {"team": "web"}, None)


def test_a_commit_of_state_is_no_visible_change(store: Store) -> None:
    record = created_on(store)
    assert store.commit([a_commit(record, 2)]) == [""]
    assert store.get("web-1") == record


def test_instances_are_counted_by_state(store: Store) -> None:
    for number in range(3):
        store.create(a_new_instance(f"off-{number}"))
    created_on(store, "on-1")
    failed = created_on(store, "failed-1")
    store.fail(failed.id, failed.epoch, FAILURE)
    assert store.counts() == {InstanceState.OFF: 3, InstanceState.ON: 1, InstanceState.FAILED: 1}


# ---- key rotation --------------------------------------------------------------------------------------------------------


def test_a_rotation_replaces_the_wrapped_key_and_leaves_the_state(store: Store) -> None:
    new = a_new_instance()
    store.create(new)
    fresh = a_wrapped_key()
    assert store.rewrap([(new.id, new.wrapped_key, fresh)]) == 1
    assert store.load(new.id) == (fresh, SealedState(0, 1, new.sealed))


def test_a_rotation_leaves_a_key_that_changed_meanwhile(store: Store) -> None:
    first, second = a_new_instance("web-1"), a_new_instance("web-2")
    store.create(first)
    store.create(second)
    assert store.rewrap([(first.id, a_wrapped_key(), a_wrapped_key()), (second.id, second.wrapped_key, a_wrapped_key())]) == 1
    assert store.load(first.id)[0] == first.wrapped_key
    assert store.load(second.id)[0] != second.wrapped_key


def test_a_rotation_walks_over_every_key_once(store: Store) -> None:
    created = {new.id: new.wrapped_key for new in (a_new_instance(f"web-{number}") for number in range(7)) if store.create(new)}
    seen: list[uuid.UUID] = []
    while page := store.wrapped_keys(seen[-1] if seen else None, 3):
        assert all(created[instance] == wrapped for instance, wrapped in page)
        assert page[0][0] not in seen
        seen += [instance for instance, _ in page]
    assert seen == sorted(created)


def test_a_request_id_that_was_faster_is_told_from_a_name_that_is_taken(store: Store) -> None:
    request_id = "0198c0de-0000-7000-8000-0000000000aa"
    store.create(a_new_instance("a", request_id=request_id))
    with pytest.raises(AlreadyExistsError) as refused:
        store.create(a_new_instance("b", request_id=request_id))
    assert refused.value.reason == "REQUEST_ID_TAKEN"


def test_a_data_key_of_no_instance_is_named_and_none_is_left_out(store: Store, path: Path) -> None:
    store.create(a_new_instance())
    with database_file(path) as database:
        database.execute("INSERT INTO data_keys (instance, provider, key_id, blob) VALUES ('zz', 'file', 'k', x'00')")
    with pytest.raises(StoreError) as refused:
        store.wrapped_keys(None, 10)
    assert refused.value.reason == "DATA_KEY_ROW_INVALID"
