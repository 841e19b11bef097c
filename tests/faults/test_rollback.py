"""A store, or a part of it, is put back to an older copy: the instances that it hurts are refused by name, the others go on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.anchors import (
    anchor_of,
    anchored,
    copy_store,
    counted,
    delete,
    log_events,
    off,
    put_back,
    rows_of,
    wait_for_update,
    write_rows,
)
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Give a daemon with a `file` anchor that is written at clean stops only."""
    process = anchored(tmp_path)
    try:
        yield process.start()
    finally:
        process.close()


def refusal(daemon: DaemonProcess, name: str) -> str:
    """The reason for which an instance is not powered on, after it was taken out of FAILED."""
    off(daemon, name)
    with pytest.raises(VtpmError) as caught:
        daemon.power_on(name)
    return caught.value.reason


def usable(daemon: DaemonProcess, name: str) -> int:
    """Power on and count; what a fresh instance can do."""
    daemon.power_on(name)
    return counted(daemon, name, 0)


def test_an_older_store_hurts_what_went_on_since_and_nothing_else(daemon: DaemonProcess, tmp_path: Path) -> None:
    for name in ("went-on", "same", "gone"):
        daemon.running(name)
        counted(daemon, name, 2)
        off(daemon, name)
    daemon.stop()
    copy = copy_store(daemon, tmp_path / "copy.db")
    daemon.start()
    daemon.power_on("went-on")
    newest = counted(daemon, "went-on", 3)
    off(daemon, "went-on")
    delete(daemon, "gone")
    created = daemon.create("later").id
    daemon.stop()
    newer = copy_store(daemon, tmp_path / "newer.db")
    put_back(daemon, copy)
    daemon.start()

    failed = daemon.get("went-on")
    assert (failed.state, failed.failure.reason) == (pb.FAILED, "STATE_ROLLED_BACK")
    found = {item.instance: item for item in anchor_of(daemon).findings}
    numbers = found[failed.id]
    assert numbers.anchored.version > numbers.stored.version > 1
    assert f"version {numbers.anchored.version}" in failed.failure.message, "both versions are shown"
    assert f"version {numbers.stored.version}" in failed.failure.message
    assert "accept-rollback went-on" in failed.failure.remedy
    assert refusal(daemon, "went-on") == "STATE_ROLLED_BACK"
    with pytest.raises(VtpmError) as caught:
        daemon.client.call(daemon.client.instances.ResetInstance, pb.ResetInstanceRequest(instance="went-on"))
    assert caught.value.reason in ("STATE_ROLLED_BACK", "INSTANCE_OFF")
    assert usable(daemon, "same") == counted(daemon, "same", 0)
    # Deleted, with its data key destroyed, and now there again.
    assert found[daemon.get("gone").id].reason == "STATE_NOT_ANCHORED"
    assert refusal(daemon, "gone") == "STATE_NOT_ANCHORED"
    # Created since the copy, and not in it.
    assert found[created].reason == "INSTANCE_MISSING"
    assert [entry["instance"] for entry in log_events(daemon, "freshness.instance_missing")] == [created]

    # With the right store back all is as it was: refusing has changed nothing that counts.
    off(daemon, "same")
    daemon.stop()
    put_back(daemon, newer)
    daemon.start()
    assert usable(daemon, "went-on") == newest
    assert daemon.power_on("later").state == pb.ON


def test_it_is_told_again_at_every_start_until_accepted_by_name(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.running("web-1")
    older = counted(daemon, "web-1", 2)
    off(daemon, "web-1")
    daemon.stop()
    copy = copy_store(daemon, tmp_path / "copy.db")
    daemon.start()
    daemon.power_on("web-1")
    counted(daemon, "web-1", 3)
    off(daemon, "web-1")
    lost = daemon.create("lost").id
    daemon.stop()
    newer = rows_of(daemon.state_dir / "vtpm.db", daemon_id(daemon, "web-1"))
    put_back(daemon, copy)
    for _ in range(2):
        daemon.start()
        assert daemon.get("web-1").failure.reason == "STATE_ROLLED_BACK"
        daemon.stop()
    daemon.start()
    refused = daemon.vtpm("instance", "accept-rollback", "web-1", check=False)
    assert refused.returncode == 2, "it asks, unless --yes is given"
    daemon.vtpm("instance", "accept-rollback", "web-1", "--yes")
    (entry,) = log_events(daemon, "freshness.rollback_accepted")
    assert entry["name"] == "web-1"
    assert any(call["method"].endswith("/AcceptRollback") for call in log_events(daemon, "api.call")), "it is in the audit log"
    assert usable(daemon, "web-1") == older
    off(daemon, "web-1")
    assert [item.instance for item in anchor_of(daemon).findings] == [lost]
    daemon.vtpm("instance", "accept-rollback", lost, "--yes")
    assert not anchor_of(daemon).findings
    daemon.kill()
    # The state that was given up is no way back either, though its version is the higher one.
    write_rows(daemon.state_dir / "vtpm.db", newer, "states")
    daemon.start()
    assert refusal(daemon, "web-1") in ("STATE_FORKED", "STATE_ROLLED_BACK")


def daemon_id(daemon: DaemonProcess, name: str) -> str:
    with sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10) as store:
        (found,) = store.execute("SELECT id FROM instances WHERE name = ?", (name,)).fetchone()
    return str(found)


def test_a_single_row_with_its_numbers_put_back_is_noticed(daemon: DaemonProcess) -> None:
    path = daemon.state_dir / "vtpm.db"
    made = daemon.running("web-1")
    daemon.running("other")
    counted(daemon, "web-1", 2)
    off(daemon, "web-1", "other")
    older = rows_of(path, made.id)
    daemon.power_on("web-1")
    counted(daemon, "web-1", 2)
    off(daemon, "web-1")
    daemon.stop()
    write_rows(path, older, "states")
    daemon.start()
    assert daemon.get("web-1").failure.reason == "STATE_ROLLED_BACK"
    assert daemon.power_on("other").state == pb.ON
    # The row of the ownership epoch alone is noticed too: under it an earlier owner could commit.
    daemon.vtpm("instance", "accept-rollback", "web-1", "--yes")
    daemon.stop()
    write_rows(path, older, "instances")
    daemon.start()
    assert refusal(daemon, "web-1") == "STATE_ROLLED_BACK"


def test_a_row_put_back_under_a_running_daemon_is_noticed_at_power_on(daemon: DaemonProcess) -> None:
    path = daemon.state_dir / "vtpm.db"
    made = daemon.running("web-1")
    counted(daemon, "web-1", 2)
    off(daemon, "web-1")
    older = rows_of(path, made.id)
    daemon.power_on("web-1")
    counted(daemon, "web-1", 2)
    off(daemon, "web-1")
    daemon.stop()
    daemon.start()
    write_rows(path, older, "states")
    assert refusal(daemon, "web-1") == "STATE_ROLLED_BACK"
    assert daemon.get("web-1").state == pb.OFF


def test_rows_of_a_deleted_instance_are_not_brought_back(daemon: DaemonProcess) -> None:
    path = daemon.state_dir / "vtpm.db"
    made = daemon.create("web-1")
    daemon.stop()
    daemon.start()
    rows = rows_of(path, made.id)
    delete(daemon, "web-1")
    # Before the deletion is anchored, and after.
    write_rows(path, rows)
    assert refusal(daemon, "web-1") == "STATE_NOT_ANCHORED"
    daemon.kill()
    daemon.start()
    assert refusal(daemon, "web-1") == "STATE_NOT_ANCHORED"
    daemon.stop()
    daemon.start()
    assert refusal(daemon, "web-1") == "STATE_NOT_ANCHORED"


@pytest.mark.parametrize("point", ["anchor.before_root", "anchor.after_root", "anchor.before_rename", "anchor.after_rename"])
def test_a_daemon_killed_while_it_anchors_refuses_nothing_afterwards(daemon: DaemonProcess, point: str) -> None:
    daemon.running("web-1")
    before = counted(daemon, "web-1", 2)
    daemon.create("idle")
    daemon.stop()
    daemon.environment |= {"VTPM_CRASH_POINT": f"{point}:1"}
    daemon.start()
    counted(daemon, "web-1", 3)
    daemon.create("new")
    delete(daemon, "idle")
    assert daemon.stop() == -9, "it died while it wrote the anchor"
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    assert not anchor_of(daemon).findings
    assert daemon.get("web-1").state == pb.ON, "the VM noticed nothing"
    assert counted(daemon, "web-1", 0) == before + 3
    off(daemon, "web-1")
    assert usable(daemon, "web-1") == before + 3
    assert daemon.power_on("new").state == pb.ON


def test_commits_and_creations_between_two_anchorings_are_newer_not_stale(daemon: DaemonProcess) -> None:
    """kill -9, the anchor is far behind: what was acknowledged counts."""
    update = anchor_of(daemon).update
    daemon.running("web-1")
    value = counted(daemon, "web-1", 5)
    daemon.create("new")
    daemon.create("gone")
    delete(daemon, "gone")
    assert anchor_of(daemon).update == update, "nothing was anchored yet"
    daemon.kill()
    daemon.start()
    assert not anchor_of(daemon).findings
    off(daemon, "web-1")
    assert usable(daemon, "web-1") == value
    assert daemon.power_on("new").state == pb.ON


def test_the_anchor_follows_within_its_interval_and_rests_when_nothing_changes(tmp_path: Path) -> None:
    daemon = anchored(tmp_path, VTPM_ANCHOR_INTERVAL_S="0.05")
    try:
        daemon.start()
        update = anchor_of(daemon).update
        daemon.running("web-1")
        counted(daemon, "web-1", 1)
        reached = wait_for_update(daemon, update)
        assert reached.states == 1
        # Everything is anchored once nothing changes any more.
        off(daemon, "web-1")
        last = -1
        while (now := anchor_of(daemon).update) != last:
            last = now
            time.sleep(0.5)
        copy = copy_store(daemon, tmp_path / "copy.db")
        daemon.power_on("web-1")
        update = anchor_of(daemon).update
        counted(daemon, "web-1", 1)
        wait_for_update(daemon, update)
        off(daemon, "web-1")
        daemon.kill()
        put_back(daemon, copy)
        daemon.start()
        assert daemon.get("web-1").failure.reason == "STATE_ROLLED_BACK"
    finally:
        daemon.close()


def test_a_running_instance_whose_store_was_rolled_back_meanwhile_ends(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.running("web-1")
    daemon.running("other")
    counted(daemon, "web-1", 1)
    counted(daemon, "other", 1)
    copy = copy_store(daemon, tmp_path / "copy.db")
    counted(daemon, "web-1", 3)
    daemon.stop()
    put_back(daemon, copy)
    daemon.start()
    assert daemon.until("web-1", pb.FAILED).failure.reason == "STATE_ROLLED_BACK"
    assert daemon.get("other").state == pb.ON
    assert counted(daemon, "other", 1)
    sock_gone = daemon.get("web-1").tpm_socket
    with pytest.raises(FileNotFoundError):
        raw.connect(sock_gone)
