"""The anchor in a TPM: an instance of a second daemon stands in for the host's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.anchors import NEVER, anchor_of, copy_store, counted, off, put_back
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError

NV_INDEX = 0x01800A00


@pytest.fixture
def host_tpm() -> Iterator[DaemonProcess]:
    """Give a daemon whose instance `host` is the host's TPM."""
    with DaemonProcess() as process:
        process.running("host")
        yield process


@pytest.fixture
def daemon(host_tpm: DaemonProcess) -> Iterator[DaemonProcess]:
    """Give a daemon with its anchor there, and an instance that has counted, stopped once."""
    process = DaemonProcess(
        environment={
            "VTPM_ANCHOR": "tpm2",
            "VTPM_ANCHOR_TCTI": f"swtpm:path={host_tpm.get('host').tpm_socket}",
            "VTPM_ANCHOR_INTERVAL_S": NEVER,
        }
    )
    try:
        process.start()
        process.running("web-1")
        counted(process, "web-1", 2)
        off(process, "web-1")
        process.stop()
        yield process
    finally:
        process.close()


def files(daemon: DaemonProcess) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in daemon.state_dir.glob("anchor*")}


def test_the_whole_state_directory_put_back_is_noticed(daemon: DaemonProcess, tmp_path: Path) -> None:
    """What a file can't do: the store and the anchor's file are both older, and fit each other."""
    copy, old = copy_store(daemon, tmp_path / "copy.db"), files(daemon)
    daemon.start()
    daemon.power_on("web-1")
    newest = counted(daemon, "web-1", 2)
    off(daemon, "web-1")
    daemon.stop()
    newer, new = copy_store(daemon, tmp_path / "newer.db"), files(daemon)
    put_back(daemon, copy)
    for name, data in old.items():
        (daemon.state_dir / name).write_bytes(data)
    daemon.start()
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.reason == "ANCHOR_STALE"
    assert "update" in caught.value.message
    daemon.stop()
    # The older store alone: its instance is named with both versions.
    for name, data in new.items():
        (daemon.state_dir / name).write_bytes(data)
    daemon.start()
    assert daemon.get("web-1").failure.reason == "STATE_ROLLED_BACK"
    daemon.stop()
    put_back(daemon, newer)
    daemon.start()
    daemon.power_on("web-1")
    assert counted(daemon, "web-1", 0) == newest


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("anchor.after_root", 1),
        ("anchor.before_rename", 1),
        ("anchor.before_extend", 1),
        ("anchor.before_increment", 1),
        ("anchor.after_increment", 1),
        # The second file of a write: the new one in the place of the old one.
        ("anchor.before_rename", 2),
        ("anchor.after_rename", 2),
    ],
)
def test_a_daemon_killed_between_file_and_tpm_finds_the_one_that_fits(daemon: DaemonProcess, point: str, count: int) -> None:
    daemon.environment["VTPM_CRASH_POINT"] = f"{point}:{count}"
    daemon.start()
    daemon.power_on("web-1")
    value = counted(daemon, "web-1", 2)
    assert daemon.stop() == -9
    del daemon.environment["VTPM_CRASH_POINT"]
    daemon.start()
    assert not anchor_of(daemon).trouble_reason
    assert not anchor_of(daemon).findings
    off(daemon, "web-1")
    daemon.power_on("web-1")
    assert counted(daemon, "web-1", 0) == value
    update = anchor_of(daemon).update
    assert daemon.stop() == 0
    daemon.start()
    assert anchor_of(daemon).update > update
    assert set(files(daemon)) == {"anchor"}


def test_a_tpm_that_is_cleared_or_another_is_told_and_can_be_begun_anew(daemon: DaemonProcess, host_tpm: DaemonProcess) -> None:
    host_tpm.vtpm("instance", "stop", "host")
    host_tpm.vtpm("instance", "delete", "host", "--yes")
    daemon.start()
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.reason == "ANCHOR_TPM_FAILED", "there is no TPM at all"
    daemon.stop()
    other = host_tpm.running("host")
    daemon.environment["VTPM_ANCHOR_TCTI"] = f"swtpm:path={other.tpm_socket}"
    daemon.start()
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.reason == "ANCHOR_FOREIGN"
    daemon.vtpm("host", "reset-anchor", "--yes")
    assert daemon.power_on("web-1").state == pb.ON
    daemon.stop()
    daemon.start()
    assert not anchor_of(daemon).trouble_reason


def test_a_lost_file_is_no_fresh_start(daemon: DaemonProcess) -> None:
    for path in daemon.state_dir.glob("anchor*"):
        path.unlink()
    daemon.start()
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.reason == "ANCHOR_MISSING"
    daemon.vtpm("host", "reset-anchor", "--yes")
    assert daemon.power_on("web-1").state == pb.ON


def test_the_guests_of_that_tpm_see_two_nv_indices_that_they_cannot_write(
    daemon: DaemonProcess, host_tpm: DaemonProcess
) -> None:
    env = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={host_tpm.get('host').tpm_socket}"}

    def tool(*command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)

    # TPM_NT is in bits 4 to 7 of the attributes (Part 2, 13.2): EXTEND and COUNTER.
    for index, attributes in ((NV_INDEX, b"0x22040044"), (NV_INDEX + 1, b"0x22040014")):
        shown = tool("tpm2_nvreadpublic", hex(index))
        assert attributes in shown.stdout, shown.stdout
        assert tool("tpm2_nvread", hex(index)).returncode != 0
    assert tool("tpm2_nvincrement", hex(NV_INDEX + 1)).returncode != 0
    assert tool("tpm2_nvextend", "-i", "-", hex(NV_INDEX)).returncode != 0
    daemon.start()
    assert daemon.power_on("web-1").state == pb.ON
