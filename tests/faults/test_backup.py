"""Backups of a store in use, and what comes of them: here, on another machine, and into a daemon that runs."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from tests.support import raw
from tests.support.anchors import anchor_of, anchored, counted, delete, log_events, off
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


@pytest.fixture
def identity(tmp_path: Path) -> tuple[str, Path]:
    """Give an age recipient and the file of its identity."""
    made = pyrage.x25519.Identity.generate()
    path = tmp_path / "identity.txt"
    path.write_text(f"# made for a test\n{made}\n")
    return str(made.to_public()), path


@pytest.fixture
def other_machine() -> Iterator[DaemonProcess]:
    """Give a daemon, not started, without a state directory."""
    process = DaemonProcess()
    yield process
    process.close()


def refused(daemon: DaemonProcess, *arguments: str) -> str:
    done = daemon.vtpm(*arguments, check=False)
    assert done.returncode not in (0, 1), done.stderr.decode()
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("vtpm: ")]
    assert len(lines) == 1
    return lines[0].split(":")[1].strip()


def test_a_backup_under_load_has_every_acknowledged_write_and_restores_elsewhere(
    own_daemon: DaemonProcess, other_machine: DaemonProcess, identity: tuple[str, Path], tmp_path: Path
) -> None:
    recipient, key = identity
    names = [f"web-{number}" for number in range(4)]
    counts = {}
    for name in names:
        own_daemon.running(name, labels={"n": name})
        counts[name] = counted(own_daemon, name, 1)
    own_daemon.create("idle")
    stop = threading.Event()

    def guest(name: str) -> None:
        sock = raw.connect(own_daemon.get(name).tpm_socket)
        while not stop.is_set():
            raw.succeed(sock, raw.nv_increment())
            counts[name] += 1

    threads = [threading.Thread(target=guest, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        while min(counts.values()) < 20:
            stop.wait(0.01)
        acknowledged = dict(counts)
        made = own_daemon.vtpm("backup", "create", str(tmp_path / "b.age"), "-r", recipient, "--include-keys", "-o", "json")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert json.loads(made.stdout)["instances"] == 5
    said = json.loads(own_daemon.vtpm("backup", "verify", str(tmp_path / "b.age"), "-i", str(key), "-o", "json").stdout)
    assert said == json.loads(made.stdout)
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"

    other_machine.vtpm("backup", "restore", str(tmp_path / "b.age"), "-i", str(key))
    other_machine.start()
    listed = other_machine.client.instances.ListInstances(pb.ListInstancesRequest()).instances
    assert {item.name: pb.State.Name(item.state) for item in listed} == dict.fromkeys([*names, "idle"], "OFF")
    for name in names:
        original = own_daemon.get(name)
        other_machine.power_on(name)
        there = other_machine.get(name)
        assert (there.id, dict(there.labels), list(there.keys)) == (original.id, dict(original.labels), list(original.keys))
        assert there.epoch > original.epoch + 1000, "no worker of the original can commit here"
        assert acknowledged[name] <= counted(other_machine, name, 0) <= counts[name]
        assert counted(other_machine, name, 1)


def test_a_backup_without_the_key_file_needs_it(
    own_daemon: DaemonProcess, other_machine: DaemonProcess, identity: tuple[str, Path], tmp_path: Path
) -> None:
    recipient, key = identity
    own_daemon.running("web-1")
    value = counted(own_daemon, "web-1", 3)
    off(own_daemon, "web-1")
    own_daemon.stop()
    backup = str(tmp_path / "b.age")
    (tmp_path / "recipients").write_text(f"# ours\n{recipient}\n")
    own_daemon.vtpm("backup", "create", backup, "-R", str(tmp_path / "recipients"))
    assert refused(own_daemon, "backup", "create", backup, "-r", recipient) == "BACKUP_EXISTS"
    assert refused(own_daemon, "backup", "create", str(tmp_path / "c.age")) == "RECIPIENT_REQUIRED"
    assert refused(own_daemon, "backup", "create", str(tmp_path / "c.age"), "-r", "age1xyz") == "RECIPIENT_INVALID"
    own_daemon.start()
    assert counted_on(own_daemon, "web-1") == value, "a backup leaves the store as it was"

    assert refused(other_machine, "backup", "restore", backup, "-i", str(key)) == "KEY_FILE_MISSING"
    assert not (other_machine.state_dir / "vtpm.db").exists(), "nothing was restored"
    keys = (own_daemon.state_dir / "keys.json").read_bytes()
    with DaemonProcess() as stranger:
        stranger.create("x")
        (other_machine.state_dir / "keys.json").write_bytes((stranger.state_dir / "keys.json").read_bytes())
        (other_machine.state_dir / "keys.json").chmod(0o600)
    assert refused(other_machine, "backup", "restore", backup, "-i", str(key)) == "KEY_UNKNOWN"
    (other_machine.state_dir / "keys.json").write_bytes(keys)
    other_machine.vtpm("backup", "restore", backup, "-i", str(key))
    other_machine.start()
    assert counted_on(other_machine, "web-1") == value
    assert refused(other_machine, "backup", "restore", backup, "-i", str(key)) == "DAEMON_RUNNING"
    other_machine.stop()
    assert refused(other_machine, "backup", "restore", backup, "-i", str(key)) == "RESTORE_TARGET_NOT_EMPTY"


def counted_on(daemon: DaemonProcess, name: str) -> int:
    daemon.power_on(name)
    return counted(daemon, name, 0)


def test_a_backup_holds_nothing_in_the_clear(own_daemon: DaemonProcess, identity: tuple[str, Path], tmp_path: Path) -> None:
    recipient, _key = identity
    own_daemon.create("a-name-that-can-be-found")
    own_daemon.vtpm("backup", "create", str(tmp_path / "b.age"), "-r", recipient, "--include-keys")
    data = (tmp_path / "b.age").read_bytes()
    keys = json.loads((own_daemon.state_dir / "keys.json").read_text())
    for secret in (b"a-name-that-can-be-found", b"SQLite", keys["keys"][keys["current"]].encode()):
        assert secret not in data
    assert (tmp_path / "b.age").stat().st_mode & 0o777 == 0o600


def test_one_instance_goes_back_into_a_running_daemon_and_is_not_taken_for_a_rollback(
    identity: tuple[str, Path], tmp_path: Path
) -> None:
    recipient, key = identity
    daemon = anchored(tmp_path)
    try:
        daemon.start()
        daemon.running("web-1", labels={"team": "web"})
        older = counted(daemon, "web-1", 2)
        daemon.running("other")
        backup = str(tmp_path / "b.age")
        daemon.vtpm("backup", "create", backup, "-r", recipient)
        newer = counted(daemon, "web-1", 3)
        assert newer > older
        # Stop and start anchor the newer state.
        daemon.stop()
        daemon.start()
        assert refused(daemon, "backup", "restore", backup, "-i", str(key), "--instance", "web-1") == "INSTANCE_ON"
        off(daemon, "web-1")
        epoch = daemon.get("web-1").epoch
        assert refused(daemon, "backup", "restore", backup, "-i", str(key), "--instance", "nobody") == "INSTANCE_NOT_FOUND"
        daemon.vtpm("backup", "restore", backup, "-i", str(key), "--instance", "web-1")
        assert daemon.get("web-1").state == pb.OFF
        assert daemon.get("web-1").epoch > epoch
        assert counted_on(daemon, "web-1") == older
        off(daemon, "web-1")
        daemon.kill()
        daemon.start()
        assert not anchor_of(daemon).findings, "it was anchored as it is"
        assert counted_on(daemon, "web-1") == older
        off(daemon, "web-1")
        # A deleted one comes back too, under another name if its own is taken.
        delete(daemon, "web-1")
        daemon.create("web-1")
        assert refused(daemon, "backup", "restore", backup, "-i", str(key), "--instance", "web-1") == "INSTANCE_NAME_TAKEN"
        daemon.vtpm("backup", "restore", backup, "-i", str(key), "--instance", "web-1", "--name", "web-1-old")
        assert counted_on(daemon, "web-1-old") == older
        assert dict(daemon.get("web-1-old").labels) == {"team": "web"}
        assert counted(daemon, "other", 1), "the others noticed nothing"
        assert {entry["name"] for entry in log_events(daemon, "instance.restored")} == {"web-1", "web-1-old"}
        daemon.kill()
        daemon.start()
        assert not anchor_of(daemon).findings
    finally:
        daemon.close()


def test_a_restored_store_gets_an_anchor_of_its_own(identity: tuple[str, Path], tmp_path: Path) -> None:
    recipient, key = identity
    daemon = anchored(tmp_path)
    try:
        daemon.start()
        daemon.running("web-1")
        older = counted(daemon, "web-1", 2)
        backup = str(tmp_path / "b.age")
        daemon.vtpm("backup", "create", backup, "-r", recipient, "--include-keys")
        counted(daemon, "web-1", 2)
        daemon.vtpm("instance", "stop", "--all")
        daemon.stop()
        daemon.state_dir.rename(tmp_path / "away")
        daemon.vtpm("backup", "restore", backup, "-i", str(key))
        daemon.start()
        # The host's anchor is that of the store that is gone.
        assert anchor_of(daemon).trouble_reason == "ANCHOR_FOREIGN"
        with pytest.raises(VtpmError) as caught:
            daemon.power_on("web-1")
        assert caught.value.reason == "ANCHOR_FOREIGN"
        assert "reset-anchor" in caught.value.remedy
        daemon.vtpm("host", "reset-anchor", "--yes")
        assert counted_on(daemon, "web-1") == older
        counted(daemon, "web-1", 1)
        off(daemon, "web-1")
        copy = tmp_path / "older.db"
        with sqlite3.connect(daemon.state_dir / "vtpm.db") as store, sqlite3.connect(copy) as target:
            store.backup(target)
        counted_on(daemon, "web-1")
        counted(daemon, "web-1", 1)
        off(daemon, "web-1")
        daemon.stop()
        for leftover in daemon.state_dir.glob("vtpm.db*"):
            leftover.unlink()
        copy.rename(daemon.state_dir / "vtpm.db")
        daemon.start()
        assert daemon.get("web-1").failure.reason == "STATE_ROLLED_BACK", "rollback protection is in force again"
    finally:
        daemon.close()
