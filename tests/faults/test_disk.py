"""A disk that is full or read-only: commands wait or are refused by name, and nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    root = Path(tempfile.mkdtemp(prefix="vtpm-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8M,mode=0700", "vtpm-test", str(root)], capture_output=True, check=False
    )
    if mounted.returncode:
        root.rmdir()
        pytest.skip(f"a file system can't be mounted here: {mounted.stderr.decode().strip()}")
    yield root
    subprocess.run(["umount", "-l", str(root)], check=False)
    root.rmdir()


def fill(path: Path) -> None:
    fd = os.open(path / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)


def test_a_full_disk_makes_writes_wait_and_loses_nothing(small_disk: Path) -> None:
    daemon = DaemonProcess()
    daemon.state_dir = small_disk / "state"
    try:
        daemon.start()
        sock = raw.connect(daemon.running("web-1").tpm_socket)
        raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
        raw.succeed(sock, raw.nv_increment())
        start, acknowledged = raw.counter_of(sock), 0
        fill(small_disk)
        stalled = threading.Event()

        def guest() -> None:
            nonlocal acknowledged
            sock.settimeout(60)
            for _ in range(3000):
                raw.succeed(sock, raw.nv_increment())
                acknowledged += 1
                if stalled.is_set():
                    return

        thread = threading.Thread(target=guest)
        thread.start()
        thread.join(15)
        assert thread.is_alive(), "the disk was not full enough for this test to say anything"
        assert "STORE_FULL" in daemon.log_text()
        # What needs no write is served; what does is refused by name.
        assert daemon.get("web-1").state == pb.ON
        with pytest.raises(VtpmError) as caught:
            daemon.create("web-2")
        assert caught.value.reason == "STORE_FULL"
        assert caught.value.remedy
        stalled.set()
        (small_disk / "filler").unlink()
        thread.join(30)
        assert not thread.is_alive()
        assert raw.counter_of(sock) == start + acknowledged
        daemon.vtpm("instance", "stop", "web-1")
        daemon.kill()
        daemon.start()
        assert raw.counter_of(raw.connect(daemon.power_on("web-1").tpm_socket)) == start + acknowledged
        daemon.create("web-2")
    finally:
        daemon.close()


def test_a_disk_that_turns_read_only_is_named(small_disk: Path) -> None:
    daemon = DaemonProcess()
    daemon.state_dir = small_disk / "state"
    try:
        daemon.start()
        daemon.create("web-1")
        daemon.stop()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        daemon.launch()
        assert daemon.wait_until_dead() in (1, 2)
        text = daemon.log_text()
        assert "Traceback" not in text
        assert any(reason in text for reason in ("DIRECTORY_UNUSABLE", "STORE_READ_ONLY", "STORE_UNREACHABLE"))
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        daemon.start()
        assert daemon.power_on("web-1").state == pb.ON
    finally:
        daemon.close()


def test_a_database_file_that_is_read_only_is_named_and_read(own_daemon: DaemonProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs chattr")
    made = own_daemon.create("web-1")
    path = own_daemon.state_dir / "vtpm.db"
    if subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("this file system knows no immutable files")
    try:
        own_daemon.stop()
        own_daemon.start()
        assert own_daemon.get("web-1").keys == made.keys
        with pytest.raises(VtpmError) as caught:
            own_daemon.create("web-2")
        assert caught.value.reason == "STORE_READ_ONLY"
        assert caught.value.remedy
        with pytest.raises(VtpmError) as caught:
            own_daemon.power_on("web-1")
        assert caught.value.reason == "STORE_READ_ONLY"
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=False)
    own_daemon.stop()
    own_daemon.start()
    assert own_daemon.power_on("web-1").keys == made.keys
