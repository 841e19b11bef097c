"""kill -9 of the daemon between any two steps of a commit, creation, deletion or rotation; the store is checked after each."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


def crash_at(daemon: DaemonProcess, point: str, count: int = 1) -> None:
    """Restart the daemon so that it dies when it passes `point` for the `count`th time."""
    daemon.stop()
    daemon.environment["VTPM_CRASH_POINT"] = f"{point}:{count}"
    daemon.start()


def heal(daemon: DaemonProcess) -> None:
    """Start the daemon that died, without a crash point; its store must be whole."""
    daemon.wait_until_dead()
    del daemon.environment["VTPM_CRASH_POINT"]
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.execute("PRAGMA foreign_key_check").fetchall() == []
    daemon.start()


@pytest.mark.parametrize("point", ["commit.before_sync", "commit.after_sync"])
@pytest.mark.parametrize("count", [1, 5])
def test_an_acknowledged_write_survives_and_one_in_flight_is_not_lost(
    own_daemon: DaemonProcess, point: str, count: int
) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    start = raw.counter_of(sock)
    crash_at(daemon, point, count)
    acknowledged = 0
    done = threading.Event()

    def guest() -> None:
        nonlocal acknowledged
        for _ in range(count + 3):
            raw.succeed(sock, raw.nv_increment())
            acknowledged += 1
        done.set()

    thread = threading.Thread(target=guest)
    thread.start()
    daemon.wait_until_dead()
    assert acknowledged == count - 1, "exactly those before the crash were acknowledged"
    # What is on the disk is at least what was acknowledged.
    heal(daemon) if daemon.process else _start_clean(daemon)
    # The worker brought its commit to the next daemon: the guest noticed a pause, nothing else.
    assert done.wait(10)
    thread.join()
    daemon.vtpm("instance", "stop", "web-1")
    daemon.kill()
    daemon.start()
    assert raw.counter_of(raw.connect(daemon.power_on("web-1").tpm_socket)) == start + count + 3


def _start_clean(daemon: DaemonProcess) -> None:
    daemon.environment.pop("VTPM_CRASH_POINT", None)
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    daemon.start()


def test_a_write_that_was_not_acknowledged_is_gone_or_done_never_half(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    start = raw.counter_of(sock)
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    crash_at(daemon, "commit.after_sync")
    sock.sendall(raw.nv_increment())
    daemon.wait_until_dead()
    import os
    import signal

    # The worker dies too, with the answer that it never got.
    os.kill(host, signal.SIGKILL)
    assert raw.receive(sock) == b""
    _start_clean(daemon)
    assert daemon.get("web-1").state == pb.FAILED
    daemon.vtpm("instance", "reset", "web-1")
    assert raw.counter_of(raw.connect(daemon.get("web-1").tpm_socket)) == start + 1


@pytest.mark.parametrize("point", ["create.before_commit", "create.after_commit"])
def test_a_creation_is_there_or_not_and_the_retry_gives_one_instance(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    daemon.create("old")
    crash_at(daemon, point)
    request_id = "7d9f3a5e-0f3b-4f6e-9d53-3a7d1f8c2b11"
    with pytest.raises(VtpmError):
        daemon.create("new", request_id=request_id)
    heal(daemon)
    made = daemon.create("new", request_id=request_id)
    listed = daemon.client.instances.ListInstances(pb.ListInstancesRequest()).instances
    assert sorted(instance.name for instance in listed) == ["new", "old"]
    raw.succeed(raw.connect(daemon.power_on("new").tpm_socket), raw.pcr_read(0))
    assert daemon.get("new").id == made.id


@pytest.mark.parametrize("point", ["delete.before_erase", "delete.after_erase", "delete.before_commit"])
def test_a_deletion_is_whole_or_can_be_finished_and_never_gives_a_usable_half(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    daemon.create("keep")
    daemon.create("gone")
    crash_at(daemon, point)
    with pytest.raises(VtpmError):
        daemon.client.call(daemon.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance="gone"))
    heal(daemon)
    names = {instance.name for instance in daemon.client.instances.ListInstances(pb.ListInstancesRequest()).instances}
    assert "keep" in names
    if point == "delete.before_erase":
        assert "gone" in names
        raw.succeed(raw.connect(daemon.power_on("gone").tpm_socket), raw.pcr_read(0))
        daemon.client.instances.StopInstance(pb.StopInstanceRequest(instance="gone"))
    elif "gone" in names:
        with pytest.raises(VtpmError):
            daemon.power_on("gone")
    request = pb.DeleteInstanceRequest(instance="gone", allow_missing=True)
    daemon.client.call(daemon.client.instances.DeleteInstance, request)
    raw.succeed(raw.connect(daemon.power_on("keep").tpm_socket), raw.pcr_read(0))


@pytest.mark.parametrize(
    "point",
    ["keys.before_rename", "rotate.after_begin", "rewrap.before_commit", "rewrap.after_commit", "rotate.before_finish"],
)
def test_a_rotation_cut_short_loses_no_key(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    for number in range(3):
        daemon.create(f"web-{number}")
    crash_at(daemon, point)
    with pytest.raises(VtpmError):
        daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    heal(daemon)
    for number in range(2):
        raw.succeed(raw.connect(daemon.power_on(f"web-{number}").tpm_socket), raw.pcr_read(0))
    daemon.client.call(daemon.client.host.RotateKey, pb.RotateKeyRequest())
    daemon.kill()
    daemon.start()
    raw.succeed(raw.connect(daemon.power_on("web-2").tpm_socket), raw.pcr_read(0))
    assert daemon.create("web-3").id
