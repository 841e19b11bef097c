"""An anchor that is missing, damaged, another store's or out of reach: nothing is powered on, and what runs runs on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.anchors import anchor_of, anchored, copy_store, counted, log_events, off, put_back
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Give a daemon with a `file` anchor, an instance that is ON and one that is OFF, stopped once."""
    process = anchored(tmp_path)
    try:
        process.start()
        process.running("on")
        counted(process, "on", 1)
        process.create("off")
        process.stop()
        yield process
    finally:
        process.close()


def anchor_file(daemon: DaemonProcess) -> Path:
    return Path(daemon.environment["VTPM_ANCHOR_PATH"])


def refusal(daemon: DaemonProcess, name: str = "off") -> VtpmError:
    with pytest.raises(VtpmError) as caught:
        daemon.power_on(name)
    return caught.value


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    with DaemonProcess() as other:
        other.environment |= {"VTPM_ANCHOR": "file", "VTPM_ANCHOR_PATH": str(path)}
        path.unlink()
        other.stop()
        other.start()
        other.stop()


def of_another_store_under_the_same_key(path: Path) -> None:
    """Only the ids tell the two apart."""
    with DaemonProcess() as other:
        other.environment |= {"VTPM_ANCHOR": "file", "VTPM_ANCHOR_PATH": str(path)}
        path.unlink()
        other.stop()
        for old in other.state_dir.iterdir():
            old.unlink()
        shutil.copy(path.parent.parent / "keys.json", other.state_dir / "keys.json")
        other.start()
        other.stop()


DOUBTS: dict[str, Callable[[Path], object]] = {
    "ANCHOR_MISSING": Path.unlink,
    "ANCHOR_DAMAGED": lambda path: flip(path, -1),
    "ANCHOR_FORMAT_UNKNOWN": lambda path: flip(path, 7),
    "ANCHOR_KEY_UNUSABLE": foreign,
    "ANCHOR_FOREIGN": of_another_store_under_the_same_key,
}


@pytest.mark.parametrize("reason", DOUBTS)
def test_an_anchor_that_cannot_be_trusted_keeps_everything_off_until_an_operator_says_so(
    daemon: DaemonProcess, tmp_path: Path, reason: str
) -> None:
    shutil.copy(daemon.state_dir / "keys.json", tmp_path / "keys.json")
    DOUBTS[reason](anchor_file(daemon))
    daemon.start()
    assert refusal(daemon).reason == reason
    assert "vtpm host reset-anchor" in refusal(daemon).remedy or reason in ("ANCHOR_FORMAT_UNKNOWN", "ANCHOR_KEY_UNUSABLE")
    assert counted(daemon, "on", 1), "what runs runs on"
    shown = json.loads(daemon.vtpm("host", "anchor", "-o", "json").stdout)
    assert shown["trouble"].startswith(reason)
    assert shown["remedy"]
    with pytest.raises(VtpmError) as caught:
        daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    assert caught.value.reason == reason, "the key that its secret is wrapped with is not destroyed"
    assert daemon.vtpm("host", "reset-anchor", check=False).returncode == 2, "it asks, unless --yes is given"
    daemon.vtpm("host", "reset-anchor", "--yes")
    assert daemon.power_on("off").state == pb.ON
    daemon.stop()
    daemon.start()
    assert not anchor_of(daemon).trouble_reason
    assert anchor_of(daemon).states == 2


def test_an_anchor_that_is_older_than_the_store_is_fine(daemon: DaemonProcess, tmp_path: Path) -> None:
    """As after a crash between a commit and the anchoring; who can put back the anchor too is not kept out by a file."""
    old = anchor_file(daemon).read_bytes()
    daemon.start()
    value = counted(daemon, "on", 2)
    daemon.create("new")
    daemon.stop()
    anchor_file(daemon).write_bytes(old)
    daemon.start()
    assert not anchor_of(daemon).findings
    off(daemon, "on")
    daemon.power_on("on")
    assert counted(daemon, "on", 0) == value


def test_a_volume_that_comes_late_is_waited_for(daemon: DaemonProcess) -> None:
    daemon.environment["VTPM_ANCHOR_INTERVAL_S"] = "0.1"
    mounted = anchor_file(daemon).parent
    away = mounted.rename(mounted.with_name("not mounted"))
    daemon.start()
    assert refusal(daemon).reason == "ANCHOR_UNREADABLE"
    away.rename(mounted)
    wait_until_trusted(daemon)
    assert daemon.power_on("off").state == pb.ON


def wait_until_trusted(daemon: DaemonProcess) -> None:
    deadline = time.monotonic() + 10
    while anchor_of(daemon).trouble_reason:
        assert time.monotonic() < deadline, anchor_of(daemon).trouble
        time.sleep(0.02)


def test_a_volume_that_goes_away_stops_nobody_and_is_told(daemon: DaemonProcess) -> None:
    daemon.environment["VTPM_ANCHOR_INTERVAL_S"] = "0.1"
    daemon.start()
    mounted = anchor_file(daemon).parent
    away = mounted.rename(mounted.with_name("not mounted"))
    counted(daemon, "on", 1)
    deadline = time.monotonic() + 10
    while not anchor_of(daemon).trouble_reason:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert anchor_of(daemon).trouble_reason == "ANCHOR_UNWRITABLE"
    assert len(log_events(daemon, "anchor.update_failed")) == 1, "said once, not at every try"
    assert daemon.power_on("off").state == pb.ON
    away.rename(mounted)
    wait_until_trusted(daemon)
    daemon.kill()
    daemon.start()
    assert not anchor_of(daemon).findings


def test_a_rotation_takes_the_anchor_along(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.start()
    daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    daemon.kill()
    copy = copy_store(daemon, tmp_path / "copy.db")
    daemon.start()
    assert not anchor_of(daemon).trouble_reason
    counted(daemon, "on", 2)
    off(daemon, "on")
    daemon.stop()
    put_back(daemon, copy)
    daemon.start()
    assert daemon.until("on", pb.FAILED).failure.reason == "STATE_ROLLED_BACK"


@pytest.mark.parametrize("point", ["anchor.after_root", "anchor.before_rename", "anchor.after_rename", "rotate.before_finish"])
def test_a_rotation_cut_short_loses_no_anchor(daemon: DaemonProcess, point: str) -> None:
    daemon.environment["VTPM_CRASH_POINT"] = f"{point}:1"
    daemon.start()
    with pytest.raises(VtpmError):
        daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    daemon.wait_until_dead()
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    assert not anchor_of(daemon).trouble_reason
    assert not anchor_of(daemon).findings
    daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    daemon.kill()
    daemon.start()
    assert daemon.power_on("off").state == pb.ON


def test_a_first_start_that_is_killed_begins_again(tmp_path: Path) -> None:
    process = anchored(tmp_path)
    try:
        del process.environment["VTPM_ANCHOR"]
        process.start()
        process.running("web-1")
        process.stop()
        process.environment |= {"VTPM_ANCHOR": "file"}
        for point in ("anchor.before_root", "anchor.before_rename", "anchor.after_rename"):
            process.environment["VTPM_CRASH_POINT"] = point
            process.launch()
            process.wait_until_dead()
            del process.environment["VTPM_CRASH_POINT"]
        process.start()
        assert not anchor_of(process).trouble_reason
        assert anchor_of(process).states == 1
        assert counted(process, "web-1", 1)
    finally:
        process.close()


def test_without_an_anchor_nothing_is_asked_and_nothing_refused(tmp_path: Path) -> None:
    process = DaemonProcess()
    try:
        process.start()
        assert anchor_of(process).kind == "none"
        process.running("web-1")
        for command in (("host", "reset-anchor", "--yes"), ("instance", "accept-rollback", "web-1", "--yes")):
            done = process.vtpm(*command, check=False)
            assert done.returncode == 5
            assert b"ANCHOR_NOT_CONFIGURED" in done.stderr
    finally:
        process.close()


def test_there_is_nothing_to_accept_of_what_is_fresh(daemon: DaemonProcess) -> None:
    daemon.start()
    for name, code in (("off", 5), ("nobody", 3), ("00000000-0000-0000-0000-000000000007", 3)):
        assert daemon.vtpm("instance", "accept-rollback", name, "--yes", check=False).returncode == code


def test_the_file_has_the_daemons_mode_and_no_name_of_an_instance(daemon: DaemonProcess) -> None:
    data = anchor_file(daemon).read_bytes()
    assert b"off" not in data
    assert anchor_file(daemon).stat().st_mode & 0o777 == 0o600
