"""kill -9 of the daemon, a worker or the engine host while an instance hibernates or thaws: PCRs go on, or it is FAILED."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sqlite3
import time

import grpc
import pytest

from tests.faults.test_crash_points import crash_at
from tests.support import raw
from tests.support.daemon import DaemonProcess, kill_all, spare_pids, worker_pids
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


def revive(daemon: DaemonProcess) -> None:
    """Start the daemon that died, without a crash point."""
    daemon.wait_until_dead()
    daemon.environment.pop("VTPM_CRASH_POINT", None)
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    daemon.start()


def measured(daemon: DaemonProcess, name: str = "web-1") -> tuple[socket.socket, bytes]:
    """A VM's connection, and what its PCR 16 is."""
    sock = raw.connect(daemon.running(name).tpm_socket)
    sock.settimeout(30)
    raw.succeed(sock, raw.pcr_extend(16, os.urandom(32)))
    return sock, raw.succeed(sock, raw.pcr_read(16))


@pytest.mark.parametrize("point", ["commit.before_sync", "commit.after_sync"])
def test_the_daemon_dies_while_an_instance_hibernates(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    sock, before = measured(daemon)
    crash_at(daemon, point)
    with pytest.raises(VtpmError):
        daemon.hibernate("web-1")
    # Meanwhile the guest asks; it waits for the daemon, as the snapshot may be in the store or not.
    sock.sendall(raw.pcr_read(16))
    revive(daemon)
    assert raw.receive(sock) == before
    daemon.hibernate("web-1")
    assert raw.succeed(sock, raw.pcr_read(16)) == before


def test_workers_that_only_wait_for_a_daemon_to_hibernate_are_gone_when_it_takes_them_over(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    guests = [measured(daemon, f"web-{number}") for number in range(10)]
    crash_at(daemon, "commit.after_sync")
    with pytest.raises(grpc.RpcError):
        list(daemon.client.host.DrainHost(pb.DrainHostRequest(), timeout=30))
    for sock, _ in guests:
        sock.sendall(raw.pcr_read(16))
    revive(daemon)
    for sock, before in guests:
        assert raw.receive(sock) == before


@pytest.mark.parametrize("point", ["thaw.before_hand_over", "thaw.after_hand_over", "commit.before_sync", "commit.after_sync"])
def test_the_daemon_dies_while_an_instance_thaws(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    sock, before = measured(daemon)
    daemon.hibernate("web-1")
    crash_at(daemon, point)
    sock.sendall(raw.pcr_read(16))
    revive(daemon)
    assert raw.receive(sock) == before
    assert daemon.get("web-1").state == pb.ON
    daemon.hibernate("web-1")
    assert raw.succeed(sock, raw.pcr_read(16)) == before


@pytest.mark.parametrize("point", ["commit.before_sync", "commit.after_sync", "thaw.after_hand_over"])
def test_daemon_and_engine_host_die_while_an_instance_thaws(own_daemon: DaemonProcess, point: str) -> None:
    daemon = own_daemon
    sock, before = measured(daemon)
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon.hibernate("web-1")
    crash_at(daemon, point)
    sock.sendall(raw.pcr_read(16))
    daemon.wait_until_dead()
    os.kill(host, signal.SIGKILL)
    daemon.environment.pop("VTPM_CRASH_POINT")
    daemon.start()
    instance = daemon.get("web-1")
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        query = "SELECT s.version, u.version FROM snapshots s LEFT JOIN snapshot_uses u ON u.instance = s.instance"
        snapshots = store.execute(query).fetchall()
    if instance.state == pb.FAILED:
        # The worker that had used the snapshot is gone, and it is not used again.
        assert instance.failure.reason in ("WORKER_LOST", "ENGINE_HOST_LOST")
        assert all(version == used for version, used in snapshots)
    else:
        # It was not used: all that was lost is the connection.
        assert raw.succeed(raw.connect(instance.tpm_socket), raw.pcr_read(16)) == before


def test_spares_may_die(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock, before = measured(daemon)
    daemon.hibernate("web-1")
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    for _ in range(5):
        kill_all(spare_pids(host))
        assert raw.succeed(sock, raw.pcr_read(16)) == before
        daemon.hibernate("web-1")


def have_ended(host: int, pids: list[int]) -> bool:
    """Whether the engine host has none of these any more."""
    return set(pids).isdisjoint(worker_pids(host) + spare_pids(host))


def outcome(daemon: DaemonProcess, name: str, before: bytes) -> int:
    """Wait until the instance whose worker was killed is FAILED, or answers what it did before."""
    deadline = time.monotonic() + 30
    while True:
        instance = daemon.get(name)
        if instance.state == pb.FAILED:
            assert instance.failure.reason in ("WORKER_LOST", "SNAPSHOT_MISSING")
            return instance.state
        with contextlib.suppress(OSError):
            # The kill may not have been noticed yet; then the connection ends without an answer.
            answer = raw.ask(raw.connect(instance.tpm_socket), raw.pcr_read(16))
            if answer:
                assert answer == before, "PCRs never go back"
                return instance.state
        assert time.monotonic() < deadline, f"{name} is {pb.State.Name(instance.state)}, and does not answer"
        time.sleep(0.1)


def test_workers_die_while_they_hibernate_and_thaw(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    outcomes = set()
    for number in range(12):
        name = f"web-{number}"
        sock, before = measured(daemon, name)
        pids = worker_pids(host) + spare_pids(host)
        if number % 2:
            daemon.hibernate(name)
            sock.sendall(raw.pcr_read(16))
        else:
            with contextlib.suppress(VtpmError):
                daemon.client.instances.HibernateInstance.future(pb.HibernateInstanceRequest(instance=name))
        time.sleep(0.0007 * number)
        kill_all(pids)
        outcomes.add(outcome(daemon, name, before))
        # The next instance is not to be made by a spare that is about to die: that would fail its creation, as it should.
        eventually(functools.partial(have_ended, host, pids))
    assert outcomes <= {pb.ON, pb.FAILED}


def test_a_full_disk_keeps_an_idle_instance_awake_and_well(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock, before = measured(daemon)
    with sqlite3.connect(daemon.state_dir / "vtpm.db", isolation_level=None) as store:
        # Another process holds the store, as a full disk would.
        store.execute("BEGIN IMMEDIATE")
        with pytest.raises(VtpmError) as refused:
            daemon.client.call(daemon.client.instances.HibernateInstance, pb.HibernateInstanceRequest(instance="web-1"))
        assert refused.value.reason == "INSTANCE_BUSY"
        assert raw.succeed(sock, raw.pcr_read(16)) == before
        store.execute("ROLLBACK")
    daemon.hibernate("web-1")
    assert raw.succeed(sock, raw.pcr_read(16)) == before
