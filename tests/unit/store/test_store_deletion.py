"""Deletion destroys the data key first, so that nothing left behind can ever be opened (crypto-erase)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.store.given import a_commit, a_new_instance, bytes_on_disk, created_on, database_file, open_store
from vtpm.errors import ConflictError, FailedPreconditionError, NotFoundError, StoreError
from vtpm.store.model import Filter
from vtpm.store.store import Store

ERASE = """
import sys, uuid
from tests.unit.store.given import open_store
open_store(sys.argv[1]).delete(uuid.UUID(sys.argv[2]), None)
"""


def rows(path: Path, table: str) -> int:
    with database_file(path) as connection:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return count


def test_a_deleted_instance_is_gone_and_its_name_is_free(store: Store) -> None:
    record = store.create(a_new_instance("web-1", {"team": "web"}))
    assert store.delete(record.id, None) == record
    for ref in ("web-1", str(record.id)):
        with pytest.raises(NotFoundError):
            store.get(ref)
    with pytest.raises(NotFoundError):
        store.load(record.id)
    assert store.list(Filter(), 10, None) == []
    assert store.create(a_new_instance("web-1")).id != record.id


def test_deletion_leaves_no_row_of_key_state_or_label(store: Store, path: Path) -> None:
    kept = store.create(a_new_instance("web-2", {"team": "web"}))
    record = store.create(a_new_instance("web-1", {"team": "web"}))
    store.delete(record.id, None)
    assert {table: rows(path, table) for table in ("instances", "data_keys", "states", "labels")} == {
        "instances": 1,
        "data_keys": 1,
        "states": 1,
        "labels": 1,
    }
    assert store.get("web-2") == kept


def test_the_wrapped_key_of_a_deleted_instance_is_nowhere_on_disk(store: Store, path: Path) -> None:
    new, kept = a_new_instance("web-1"), a_new_instance("web-2")
    store.create(new)
    store.create(kept)
    assert new.wrapped_key.blob in bytes_on_disk(path)

    store.delete(new.id, None)

    assert new.wrapped_key.blob not in bytes_on_disk(path)
    assert kept.wrapped_key.blob in bytes_on_disk(path)


def test_a_crash_right_after_the_erasure_leaves_state_that_nobody_can_open(store: Store, path: Path, url: str) -> None:
    new = a_new_instance("web-1")
    store.create(new)
    store.close()

    environment = {**os.environ, "VTPM_TEST_BUILD": "1", "VTPM_CRASH_POINT": "delete.after_erase"}
    crashed = subprocess.run([sys.executable, "-c", ERASE, url, str(new.id)], env=environment, check=False)

    assert crashed.returncode == -signal.SIGKILL
    assert new.wrapped_key.blob not in bytes_on_disk(path)
    assert (rows(path, "data_keys"), rows(path, "states")) == (0, 1)


def test_an_interrupted_deletion_is_finished_by_the_next_start(store: Store, path: Path, url: str) -> None:
    new, kept = a_new_instance("web-1", {"team": "web"}), a_new_instance("web-2")
    store.create(new)
    store.create(kept)
    with database_file(path) as connection:
        connection.execute("UPDATE instances SET state = 'DELETING' WHERE id = ?", (new.id.hex,))

    # Until then it is not to be seen, and takes nothing.
    with pytest.raises(NotFoundError):
        store.get("web-1")
    with pytest.raises(NotFoundError):
        store.acquire(new.id, boot_id="boot-1")
    with pytest.raises(NotFoundError):
        store.delete(new.id, None)
    assert [record.id for record in store.list(Filter(), 10, None)] == [kept.id]
    assert sum(store.counts().values()) == 1

    again = open_store(url)
    assert (rows(path, "instances"), rows(path, "data_keys"), rows(path, "states"), rows(path, "labels")) == (1, 1, 1, 0)
    assert again.load(kept.id)[0] == kept.wrapped_key
    again.close()


def test_an_instance_that_is_on_cannot_be_deleted(store: Store) -> None:
    record = created_on(store)
    with pytest.raises(FailedPreconditionError) as refused:
        store.delete(record.id, None)
    assert (refused.value.reason, refused.value.remedy) == ("INSTANCE_ON", "vtpm instance stop web-1")
    assert store.commit([a_commit(record, 2)]) == [""]


def test_deletion_by_somebody_who_saw_an_old_revision_is_refused_and_keeps_the_key(store: Store) -> None:
    new = a_new_instance()
    record = store.create(new)
    store.set_labels(record.id, {"precious": "yes"}, None)
    with pytest.raises(ConflictError) as refused:
        store.delete(record.id, record.revision)
    assert refused.value.reason == "ETAG_MISMATCH"
    assert store.load(record.id)[0] == new.wrapped_key


def test_a_deleted_instance_takes_no_more_state(store: Store) -> None:
    on = created_on(store)
    store.release(on.id, on.epoch)
    store.delete(on.id, None)
    assert store.commit([a_commit(on, 2)]) == ["INSTANCE_NOT_FOUND"]


def test_a_creation_is_remembered_after_its_instance_is_deleted(store: Store) -> None:
    new = a_new_instance(request_id="0198c0de-0000-7000-8000-0000000000aa", fingerprint=b"asked")
    store.create(new)
    store.delete(new.id, None)
    assert store.find_request(new.request_id) == (new.id, b"asked")


def test_a_reader_that_keeps_the_log_makes_the_erasure_pending_and_the_next_start_finishes_it(store: Store, path: Path) -> None:
    new = a_new_instance("web-1")
    store.create(new)
    with sqlite3.connect(path, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM instances").fetchone()
        with pytest.raises(StoreError) as pending:
            store.delete(new.id, None)
        assert pending.value.reason == "ERASURE_PENDING"
        # It is deleted all the same: its name is free.
        assert store.create(a_new_instance("web-1")).id != new.id
        assert pending.value.remedy
        reader.execute("ROLLBACK")
    # It is gone for everybody; the rest is erased at the next start.
    with pytest.raises(NotFoundError):
        store.get(str(new.id))
    store.close()
    again = open_store(f"sqlite:///{path}")
    assert new.wrapped_key.blob not in bytes_on_disk(path)
    again.create(a_new_instance("web-2"))
    again.close()
