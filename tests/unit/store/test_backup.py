"""A backup's file: whole or refused by name."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyrage
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.store.given import ROW_KEY, a_commit, a_new_instance, open_store
from vtpm.errors import BackupError, InvalidArgumentError, NotFoundError, StoreError
from vtpm.seal.envelope import Place, StateKind, seal
from vtpm.store import backup, backup_file
from vtpm.store.model import InstanceState
from vtpm.store.restore import EPOCH_LEAP, find
from vtpm.store.store import Store

ME = pyrage.x25519.Identity.generate()
DATA_KEY = b"k" * 32


def a_sealed(instance: uuid.UUID, epoch: int, version: int, kind: StateKind = StateKind.PERMANENT) -> bytes:
    return seal(DATA_KEY, Place(instance, kind, epoch, version), b"state of %d" % version)


def fill(store: Store, *names: str) -> None:
    """Create instances with envelopes that fit their rows."""
    for name in names:
        new = a_new_instance(name, {"team": name})
        store.create(replace(new, sealed=a_sealed(new.id, 0, 1)))


@pytest.fixture
def taken(store: Store, path: Path, tmp_path: Path) -> Path:
    """Give a backup of a store with two instances, one of them ON."""
    fill(store, "web-1", "web-2")
    on = store.acquire(store.get("web-2").id, boot_id="boot-1")
    assert store.commit([a_commit(on, 2, blob=a_sealed(on.id, on.epoch, 2))]) == [""]
    out = tmp_path / "out" / "b.age"
    out.parent.mkdir()
    backup.create(path, out, [ME.to_public()], b'{"a": "key file"}')
    return out


def reason_of(path: Path, identity: Any = ME) -> str:
    with pytest.raises(BackupError) as caught, backup.opened(path, [identity]):
        pass
    assert caught.value.subject == str(path)
    assert caught.value.remedy
    return caught.value.reason


def test_what_was_backed_up_comes_back(taken: Path) -> None:
    with backup.opened(taken, [ME]) as opened:
        assert (opened.manifest.instances, opened.manifest.states) == (2, 2)
        assert opened.keys == b'{"a": "key file"}'
        assert opened.manifest.schema
        place = opened.store
        with sqlite3.connect(opened.store) as connection:
            item = find(connection, "web-2", "b.age")
            assert (item.name, item.state.version, item.labels) == ("web-2", 2, {"team": "web-2"})
            assert find(connection, str(item.id), "b.age") == item
            with pytest.raises(NotFoundError):
                find(connection, "nobody", "b.age")
    assert not place.exists(), "the copy goes with the context"
    assert [item.name for item in taken.parent.iterdir()] == ["b.age"]


def test_other_programs_can_open_it(taken: Path) -> None:
    members = members_of(taken)
    assert list(members) == ["manifest.json", "store.db", "keys.json"]
    assert json.loads(members["manifest.json"])["instances"] == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_backup_cut_short_anywhere_is_refused(taken: Path, part: float) -> None:
    data = taken.read_bytes()
    cut = taken.with_name("cut.age")
    cut.write_bytes(data[: int(len(data) * part)])
    assert reason_of(cut) in ("BACKUP_DAMAGED", "BACKUP_FOREIGN")
    cut.unlink()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_backup_changed_anywhere_is_refused(taken: Path, part: float, bit: int) -> None:
    data = bytearray(taken.read_bytes())
    data[int(len(data) * part)] ^= 1 << bit
    changed = taken.with_name("changed.age")
    changed.write_bytes(bytes(data))
    # In its header an age file says for whom it is.
    assert reason_of(changed) in ("BACKUP_DAMAGED", "BACKUP_FOREIGN", "BACKUP_NOT_FOR_IDENTITY")
    changed.unlink()


@pytest.mark.parametrize("data", [b"", b"hello", b"SQLite format 3\x00" * 100, b"\x00" * 4096])
def test_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert reason_of(tmp_path / "x") in ("BACKUP_FOREIGN", "BACKUP_DAMAGED")


def test_a_missing_file_and_a_wrong_identity_are_named(taken: Path) -> None:
    assert reason_of(taken.with_name("none.age")) == "BACKUP_UNREADABLE"
    assert reason_of(taken, pyrage.x25519.Identity.generate()) == "BACKUP_NOT_FOR_IDENTITY"


# ---- archives that somebody else has made for this recipient -------------------------------------------------------------


def members_of(taken: Path) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(pyrage.decrypt(taken.read_bytes(), [ME]))) as archive:
        return {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]


def packed(taken: Path, members: list[tuple[str, bytes]]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path = taken.with_name("made.age")
    path.write_bytes(pyrage.encrypt(buffer.getvalue(), [ME.to_public()]))
    return path


def with_manifest(members: dict[str, bytes], **changes: object) -> bytes:
    return json.dumps({**json.loads(members["manifest.json"]), **changes}).encode()


FORGED: dict[str, Callable[[dict[str, bytes]], list[tuple[str, bytes]]]] = {
    "no manifest": lambda m: [("store.db", m["store.db"])],
    "nothing": lambda m: [],
    "no store": lambda m: [("manifest.json", m["manifest.json"])],
    "no keys": lambda m: list(m.items())[:2],
    "another order": lambda m: list(m.items())[::-1],
    "a member more": lambda m: [*m.items(), ("../../etc/passwd", b"x")],
    "another name": lambda m: [("manifest.json", m["manifest.json"]), ("../store.db", m["store.db"])],
    "another store": lambda m: [
        ("manifest.json", m["manifest.json"]),
        ("store.db", m["store.db"][:-1] + b"x"),
        *list(m.items())[2:],
    ],
    "a longer store": lambda m: [
        ("manifest.json", m["manifest.json"]),
        ("store.db", m["store.db"] + b"x"),
        *list(m.items())[2:],
    ],
    "other keys": lambda m: [*list(m.items())[:2], ("keys.json", b"{}")],
    "a large manifest": lambda m: [("manifest.json", b" " * (2 << 20) + m["manifest.json"]), *list(m.items())[1:]],
    "no json": lambda m: [("manifest.json", b"{"), *list(m.items())[1:]],
    "no number": lambda m: [("manifest.json", with_manifest(m, instances=float("inf"))), *list(m.items())[1:]],
    "a list": lambda m: [("manifest.json", b"[1]"), *list(m.items())[1:]],
    "other counts": lambda m: [("manifest.json", with_manifest(m, instances=3)), *list(m.items())[1:]],
}


@pytest.mark.parametrize("what", FORGED)
def test_an_archive_that_is_not_as_it_should_be_is_refused(taken: Path, what: str) -> None:
    assert reason_of(packed(taken, FORGED[what](members_of(taken)))) == "BACKUP_DAMAGED"


def test_a_member_of_a_negative_size_is_refused_at_its_header(taken: Path) -> None:
    info = tarfile.TarInfo("manifest.json")
    info.size = -1
    path = taken.with_name("made.age")
    path.write_bytes(pyrage.encrypt(info.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20), [ME.to_public()]))
    with pytest.raises(BackupError, match="what does not belong there"), backup.opened(path, [ME]):
        pass


def test_an_archive_that_is_as_it_should_be_is_taken_whoever_made_it(taken: Path) -> None:
    with backup.opened(packed(taken, list(members_of(taken).items())), [ME]) as opened:
        assert opened.manifest.instances == 2


def test_a_newer_format_is_named(taken: Path) -> None:
    members = members_of(taken)
    path = packed(taken, [("manifest.json", with_manifest(members, format=2)), *list(members.items())[1:]])
    assert reason_of(path) == "BACKUP_FORMAT_UNKNOWN"


@pytest.mark.parametrize("what", ["swapped", "cut", "orphan", "no database"])
def test_a_store_that_does_not_fit_together_is_refused(taken: Path, tmp_path: Path, what: str) -> None:
    members = members_of(taken)
    inner = tmp_path / "inner.db"
    inner.write_bytes(members["store.db"] if what != "no database" else b"x" * 8192)
    if what != "no database":
        connection = sqlite3.connect(inner)
        match what:
            case "swapped":
                connection.execute("UPDATE states SET blob = (SELECT blob FROM states ORDER BY instance LIMIT 1)")
            case "cut":
                connection.execute("UPDATE states SET blob = substr(blob, 1, 30)")
            case "orphan":
                connection.execute("DELETE FROM instances WHERE name = 'web-1'")
        connection.commit()
        connection.close()
    data = inner.read_bytes()
    store = {"size": len(data), "sha256": sha256(data).hexdigest()}
    manifest = with_manifest(members, store=store)
    assert reason_of(packed(taken, [("manifest.json", manifest), ("store.db", data), ("keys.json", members["keys.json"])])) == (
        "BACKUP_DAMAGED"
    )


# ---- what is left out, and what is made of it ----------------------------------------------------------------------------


def test_volatile_states_and_what_was_deleted_are_not_in_it(store: Store, path: Path, tmp_path: Path) -> None:
    fill(store, "web-1", "gone")
    instance = store.get("web-1").id
    gone = store.get("gone").id
    wrapped, _state = store.load(gone)
    store.delete(gone, None)
    snapshot = a_sealed(instance, 1, 1, StateKind.VOLATILE)
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO states VALUES (?, 2, 1, 1, ?)", (instance.hex, snapshot))
    backup.create(path, tmp_path / "b.age", [ME.to_public()], None)
    with backup.opened(tmp_path / "b.age", [ME]) as opened:
        data = opened.store.read_bytes()
        assert opened.manifest.states == 1
        assert opened.keys is None
    assert snapshot not in data
    assert wrapped.blob not in data
    assert sorted(item.name for item in tmp_path.iterdir() if "vtpm.db" not in item.name) == ["b.age"]


def test_a_store_that_was_made_of_it_has_everything_off_under_other_epochs(store: Store, taken: Path, tmp_path: Path) -> None:
    before = {name: store.get(name) for name in ("web-1", "web-2")}
    place = tmp_path / "out" / "vtpm.db"
    with backup.opened(taken, [ME], place.parent) as opened:
        backup.install(backup.make_store(opened, lambda store: store.macs.use(ROW_KEY)), place)
    made = open_store(f"sqlite:///{place}")
    try:
        for name, old in before.items():
            record = made.get(name)
            assert (record.id, record.state, record.boot_id) == (old.id, InstanceState.OFF, "")
            assert record.epoch == old.epoch + EPOCH_LEAP
            assert made.load(record.id) == store.load(record.id)
        on = before["web-2"]
        late = a_commit(on, 3, blob=a_sealed(on.id, on.epoch, 3))
        assert made.commit([late]) == ["EPOCH_STALE"]
        made.acquire(on.id, boot_id="boot-2")
        assert made.commit([late]) == ["EPOCH_STALE"], "a worker of the original commits nothing here"
        assert made.freshness.identity() is None
    finally:
        made.close()
    assert place.stat().st_mode & 0o777 == 0o600
    with backup.opened(taken, [ME], place.parent) as opened, pytest.raises(BackupError) as caught:
        backup.install(backup.make_store(opened, lambda store: store.macs.use(ROW_KEY)), place)
    assert caught.value.reason == "RESTORE_TARGET_NOT_EMPTY"


def test_a_backup_of_a_newer_version_is_not_made_a_store(taken: Path) -> None:
    with backup.opened(taken, [ME]) as opened:
        with sqlite3.connect(opened.store) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
        with pytest.raises(StoreError) as caught:
            backup.make_store(opened)
    assert caught.value.reason == "STORE_TOO_NEW"


def test_a_file_that_is_there_is_not_overwritten(store: Store, path: Path, taken: Path) -> None:
    before = taken.read_bytes()
    with pytest.raises(BackupError) as caught:
        backup.create(path, taken, [ME.to_public()], None)
    assert caught.value.reason == "BACKUP_EXISTS"
    assert taken.read_bytes() == before
    with pytest.raises(BackupError) as caught:
        backup.create(path, taken.parent / "no" / "directory.age", [ME.to_public()], None)
    assert caught.value.reason == "BACKUP_UNWRITABLE"


def test_a_directory_that_is_no_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "vtpm.db").write_bytes(b"somebody's notes" * 1000)
    with pytest.raises(StoreError) as caught:
        backup.create(tmp_path / "vtpm.db", tmp_path / "b.age", [ME.to_public()], None)
    assert caught.value.reason == "STORE_DAMAGED"
    assert not (tmp_path / "b.age").exists()


# ---- recipients and identities -------------------------------------------------------------------------------------------


def test_recipients_and_identities_are_read_as_age_writes_them() -> None:
    assert len(backup_file.recipients_of([str(ME.to_public()), str(ME.to_public())])) == 2
    text = f"# created: today\n# public key: {ME.to_public()}\n\n{ME}\n".encode()
    assert [str(found) for found in backup_file.identities_of(text, "key.txt")] == [str(ME)]


@pytest.mark.parametrize("text", ["", "age1", "AGE-SECRET-KEY-1", "ssh-ed25519 AAAA", "x" * 1000])
def test_what_is_no_recipient_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        backup_file.recipients_of([text])
    assert caught.value.reason == "RECIPIENT_INVALID"


@pytest.mark.parametrize("data", [b"", b"# nothing\n", b"age1xyz", b"\xff\xfe", b"-----BEGIN OPENSSH PRIVATE KEY-----\nx"])
def test_what_is_no_identity_is_refused_and_not_shown(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        backup_file.identities_of(data, "key.txt")
    assert caught.value.reason == "IDENTITY_INVALID"
    assert caught.value.subject == "key.txt"


def test_a_secret_key_given_as_a_recipient_is_not_repeated() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        backup_file.recipients_of([str(ME)])
    assert str(ME) not in str(caught.value)
