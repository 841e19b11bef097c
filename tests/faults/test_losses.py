"""Invariants 2 and 3: a lost worker, a lost engine host, a second owner."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

from tests.support import raw
from tests.support.daemon import DaemonProcess, kill_all, spare_pids, worker_pids
from tests.support.rows import as_the_service
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb


def host_of(daemon: DaemonProcess) -> int:
    pid: int = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    return pid


def no_worker_is_left(daemon: DaemonProcess) -> None:
    """A worker's sockets close a moment before it is reaped."""
    eventually(lambda: not worker_pids(host_of(daemon)))


def test_a_killed_worker_fails_its_instance_and_no_fresh_tpm_takes_its_place(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web, neighbour = daemon.running("web-1"), daemon.running("web-2")
    sock = raw.connect(web.tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    count = raw.counter_of(sock)
    raw.succeed(sock, raw.pcr_extend(0, b"\x01" * 32))
    before = set(worker_pids(host_of(daemon)))
    daemon.client.instances.StopInstance(pb.StopInstanceRequest(instance="web-2"))
    eventually(lambda: len(worker_pids(host_of(daemon))) == 1)
    (victim,) = worker_pids(host_of(daemon))
    assert victim in before
    daemon.power_on("web-2")
    os.kill(victim, signal.SIGKILL)
    failed = daemon.until("web-1", pb.FAILED)
    assert failed.failure.reason == "WORKER_LOST"
    assert "vtpm instance reset" in failed.failure.remedy
    assert raw.receive(sock) == b""
    # Not even an operator gets PCRs under a VM that was not reset: start is refused, its sockets are gone.
    assert b"INSTANCE_FAILED" in daemon.vtpm("instance", "start", "web-1", check=False).stderr
    assert not Path(web.tpm_socket).exists()
    daemon.vtpm("instance", "reset", "web-1")
    again = raw.connect(daemon.get("web-1").tpm_socket)
    assert raw.counter_of(again) == count, "what was acknowledged is there"
    raw.succeed(raw.connect(neighbour.tpm_socket), raw.pcr_read(0))


def test_a_killed_engine_host_fails_all_that_ran_and_a_new_one_serves(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    for number in range(4):
        daemon.running(f"web-{number}")
    daemon.create("idle")
    os.kill(host_of(daemon), signal.SIGKILL)
    for number in range(4):
        assert daemon.until(f"web-{number}", pb.FAILED).failure.reason in ("ENGINE_HOST_LOST", "WORKER_LOST")
    raw.succeed(raw.connect(daemon.power_on("idle").tpm_socket), raw.pcr_read(0))
    daemon.vtpm("instance", "reset", "web-0")
    raw.succeed(raw.connect(daemon.get("web-0").tpm_socket), raw.pcr_read(0))
    daemon._hosts.add(host_of(daemon))


def test_a_worker_whose_epoch_is_not_the_stores_is_refused_and_stops(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    with sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10) as store:
        store.execute("UPDATE instances SET epoch = epoch + 1")
        (before,) = store.execute("SELECT blob FROM states").fetchone()
    assert raw.ask(sock, raw.nv_increment()) == b"", "never acknowledged"
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute("SELECT blob FROM states").fetchone() == (before,), "never stored"
    no_worker_is_left(daemon)


def test_a_worker_of_an_older_epoch_is_stopped_by_the_next_daemon(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    daemon.kill()
    with as_the_service(daemon.state_dir) as store:
        store.execute("UPDATE instances SET epoch = epoch + 1")
    daemon.start()
    assert raw.receive(sock) == b""
    no_worker_is_left(daemon)
    assert daemon.get("web-1").state == pb.FAILED


def test_a_host_that_was_restarted_leaves_its_instances_off(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web = daemon.running("web-1")
    host = host_of(daemon)
    daemon.stop()
    os.kill(host, signal.SIGKILL)
    with as_the_service(daemon.state_dir) as store:
        store.execute("UPDATE instances SET boot_id = 'an earlier boot'")
    daemon.start()
    assert daemon.get("web-1").state == pb.OFF
    daemon._hosts.add(host_of(daemon))
    assert daemon.power_on("web-1").epoch > web.epoch


def test_a_creation_whose_waiting_worker_is_killed_takes_another(own_daemon: DaemonProcess) -> None:
    host_pid = own_daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    for number in range(10):
        kill_all(spare_pids(host_pid))
        assert own_daemon.create(f"vm-{number}").state == pb.OFF
