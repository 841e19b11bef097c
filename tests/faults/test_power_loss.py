"""The power is cut: what was not synced is gone, in part or whole, and every acknowledged write is there all the same."""

from __future__ import annotations

import random
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.disk import Disk
from tests.support.rows import as_the_service
from vtpm.api.v1 import instance_pb2 as pb

_CUTS = 40
_OPENED = 3


@pytest.fixture
def recorded() -> Iterator[tuple[DaemonProcess, Disk]]:
    """A daemon whose disk is recorded from its first write on."""
    # The list of what is preloaded knows no spaces.
    daemon = DaemonProcess(root=Path(tempfile.mkdtemp(prefix="vtpm-")))
    daemon.state_dir.mkdir(parents=True, mode=0o700)
    disk = Disk(daemon.root, daemon.state_dir)
    daemon.environment |= disk.environment
    try:
        yield daemon.start(), disk
    finally:
        daemon.close()


def counting(daemon: DaemonProcess, disk: Disk, sock: object, count: int) -> list[tuple[int, int]]:
    """Increment; return how much was on the record when each answer came, with the value that was acknowledged."""
    import socket

    assert isinstance(sock, socket.socket)
    seen = []
    for _ in range(count):
        raw.succeed(sock, raw.nv_increment())
        position = disk.position()
        seen.append((position, 0))
    last = raw.counter_of(sock)
    return [(position, last - count + 1 + number) for number, (position, _) in enumerate(seen)]


def version_in(directory: Path) -> int:
    """The version of the only instance's state."""
    with sqlite3.connect(directory / "vtpm.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ((version,),) = store.execute("SELECT version FROM states").fetchall()
    return int(version)


def counter_in(root: Path) -> int:
    """What a daemon finds that starts on these files after a restart of the host."""
    daemon = DaemonProcess(root=root)
    try:
        with as_the_service(daemon.state_dir) as store:
            store.execute("UPDATE instances SET boot_id = 'the boot before'")
        daemon.start()
        assert daemon.get("web-1").state == pb.OFF, "the VM is gone too, and nothing that it relied on was lost"
        return raw.counter_of(raw.connect(daemon.power_on("web-1").tpm_socket))
    finally:
        daemon.close()


def test_every_acknowledged_write_is_there_wherever_the_power_is_cut(recorded: tuple[DaemonProcess, Disk]) -> None:
    daemon, disk = recorded
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    # Enough for SQLite to bring its log into the database now and then.
    acknowledged = counting(daemon, disk, sock, 1200)
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        ((final_version,),) = store.execute("SELECT version FROM states").fetchall()
    seed = secrets.randbelow(1 << 32)
    chance = random.Random(seed)
    chosen = chance.sample(range(len(acknowledged)), _CUTS)
    for turn, number in enumerate(chosen):
        position, counter = acknowledged[number]
        # Between this answer and the next one's.
        after = acknowledged[number + 1][0] if number + 1 < len(acknowledged) else disk.position()
        root = Path(tempfile.mkdtemp(prefix="vtpm-"))
        try:
            disk.after_power_loss(chance.randint(position, after), root / "state", chance)
            (root / "state").chmod(0o700)
            behind = len(acknowledged) - 1 - number
            assert version_in(root / "state") >= final_version - behind, f"seed {seed}, cut after answer {number}"
            if turn < _OPENED:
                assert counter_in(root) >= counter, f"seed {seed}, cut after answer {number}"
        finally:
            shutil.rmtree(root, ignore_errors=True)


def test_a_write_whose_sync_failed_is_gone_and_was_never_acknowledged(recorded: tuple[DaemonProcess, Disk]) -> None:
    daemon, disk = recorded
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    before = disk.position()
    # The sync of this write fails for ever, so that it never counts; a store that ignored that would have acknowledged it.
    disk.fail("F")
    sock.sendall(raw.nv_increment())
    deadline = time.monotonic() + 10
    while "STORE_IO_FAILED" not in daemon.log_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert disk.position() > before, "it was written"
    root = Path(tempfile.mkdtemp(prefix="vtpm-"))
    try:
        disk.after_power_loss(disk.position(), root / "state", random.Random(1))
        assert version_in(root / "state") == version_at(disk, before), "and is gone"
    finally:
        shutil.rmtree(root, ignore_errors=True)
    disk.heal()
    raw.receive(sock)


def version_at(disk: Disk, position: int) -> int:
    root = Path(tempfile.mkdtemp(prefix="vtpm-"))
    try:
        disk.after_power_loss(position, root / "state", random.Random(1))
        return version_in(root / "state")
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("kind", ["E", "N", "S", "F"])
def test_a_disk_that_fails_for_a_while_makes_writes_wait_and_loses_nothing(
    recorded: tuple[DaemonProcess, Disk], kind: str
) -> None:
    daemon, disk = recorded
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    start, acknowledged = raw.counter_of(sock), 0
    sock.settimeout(60)
    ended = threading.Event()

    def guest() -> None:
        nonlocal acknowledged
        while not ended.is_set():
            raw.succeed(sock, raw.nv_increment())
            acknowledged += 1

    thread = threading.Thread(target=guest)
    thread.start()
    for _ in range(3):
        time.sleep(0.2)
        disk.fail(kind)
        time.sleep(0.7)
        disk.heal()
    time.sleep(0.3)
    ended.set()
    thread.join(30)
    assert not thread.is_alive()
    assert daemon.get("web-1").state == pb.ON
    assert raw.counter_of(sock) == start + acknowledged
    if kind != "S":
        assert "commit.store_failed" in daemon.log_text()
    # And a power cut right now finds it too, with what a failed sync has dropped.
    root = Path(tempfile.mkdtemp(prefix="vtpm-"))
    try:
        disk.after_power_loss(disk.position(), root / "state", random.Random(1))
        (root / "state").chmod(0o700)
        assert counter_in(root) >= start + acknowledged
    finally:
        shutil.rmtree(root, ignore_errors=True)
