"""What a store is given in these tests."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtpm.seal.keys import WrappedKey
from vtpm.store.adoption import sign_all
from vtpm.store.model import InstanceRecord, KeyRecord, NewInstance, ProfileRecord, StateCommit
from vtpm.store.store import Store

PROFILE = ProfileRecord(("RSA_2048", "ECC_P384"), "ECC_P256", ("sha256", "sha384"))
KEYS = (KeyRecord("EK", "RSA_2048", 0x81010001, b"\x00\x01ek"), KeyRecord("AK", "ECC_P256", 0x81800003, b"\x00\x23ak"))
ROW_KEY = bytes(range(32))


def a_wrapped_key() -> WrappedKey:
    return WrappedKey("file", "file-1", os.urandom(60))


def open_store(url: str) -> Store:
    """Open a store, with a row key that all of them share."""
    store = Store.open(url)
    store.macs.use(ROW_KEY)
    return store


def sign_anew(store: Store) -> None:
    """Have every row count as it is: what was changed behind the store's back was changed by who has the key."""
    with store._writing() as connection:
        sign_all(connection, store.macs)


def a_new_instance(name: str = "web-1", labels: Mapping[str, str] | None = None, **changes: Any) -> NewInstance:
    """Return an instance that was just manufactured."""
    values: dict[str, Any] = {
        "id": uuid.uuid4(),
        "name": name,
        "labels": labels or {},
        "profile": PROFILE,
        "keys": KEYS,
        "engine": "libtpms",
        "wrapped_key": a_wrapped_key(),
        "sealed": os.urandom(100),
    }
    return NewInstance(**{**values, **changes})


def a_commit(record: InstanceRecord, version: int, *, epoch: int | None = None, blob: bytes = b"") -> StateCommit:
    """Return a sealed state of `record` that wants to become `version`."""
    return StateCommit(record.id, record.epoch if epoch is None else epoch, version, blob or b"state %d" % version)


def created_on(store: Store, name: str = "web-1") -> InstanceRecord:
    """Create an instance and power it on."""
    return store.acquire(store.create(a_new_instance(name)).id, boot_id="boot-1")


@contextlib.contextmanager
def database_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database as somebody with the file in hand would."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def bytes_on_disk(path: Path) -> bytes:
    """Return all that the database has on disk: its file, its log and the log's index."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))
