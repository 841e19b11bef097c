"""Daemon and engine host die while VMs' TPMs hibernate: the service manager has copies of their connections, which go on."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from collections.abc import Iterator

import pytest

from tests.faults.test_belts import answer_of, booted, host_of, kill_host
from tests.faults.test_crash_points import crash_at
from tests.faults.test_hibernation_crashes import measured
from tests.support import raw
from tests.support.manager import ManagedDaemon
from vtpm.api.v1 import instance_pb2 as pb


@pytest.fixture
def managed() -> Iterator[ManagedDaemon]:
    """A daemon whose service manager has a descriptor store."""
    daemon = ManagedDaemon()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def test_daemon_and_engine_host_die_and_the_service_manager_has_the_connections(managed: ManagedDaemon) -> None:
    vm, data, before = booted(managed, "vm")
    sock, expected = measured(managed, "web-1")
    managed.hibernate("vm")
    managed.hibernate("web-1")
    managed.eventually(lambda: len(managed.stored) == 4 + 3)
    for _ in range(2):
        host = host_of(managed)
        managed.kill()
        os.kill(host, signal.SIGKILL)
        managed.start()
        assert managed.get("vm").hibernated
        assert len(managed.stored) == 7
    assert raw.succeed(data, raw.pcr_read(16)) == before
    assert raw.succeed(sock, raw.pcr_read(16)) == expected
    managed.eventually(lambda: managed.stored == [])
    vm.control.close()
    managed.until("vm", pb.OFF)
    managed.vtpm("instance", "stop", "web-1")
    assert raw.receive(sock) == b""


def test_an_orderly_stop_leaves_the_store_as_it_should_be(managed: ManagedDaemon) -> None:
    sock, expected = measured(managed)
    managed.hibernate("web-1")
    assert managed.stop() == 0
    assert len(managed.stored) == 3
    managed.start()
    kill_host(managed)
    assert raw.succeed(sock, raw.pcr_read(16)) == expected
    assert managed.stop() == 0
    managed.eventually(lambda: managed.stored == [])


def test_a_thaw_leaves_nothing_in_the_store(managed: ManagedDaemon) -> None:
    sock, expected = measured(managed)
    for number in range(5):
        managed.hibernate("web-1")
        if number % 2:
            managed.eventually(lambda: len(managed.stored) == 3)
        assert raw.succeed(sock, raw.pcr_read(16)) == expected
    managed.eventually(lambda: managed.stored == [])
    managed.hibernate("web-1")
    managed.eventually(lambda: len(managed.stored) == 3)
    managed.vtpm("instance", "stop", "web-1")
    assert raw.receive(sock) == b""
    managed.eventually(lambda: managed.stored == [])


def test_what_is_outdated_in_the_store_is_closed_and_removed(managed: ManagedDaemon) -> None:
    sock, expected = measured(managed)
    managed.hibernate("web-1")
    managed.eventually(lambda: len(managed.stored) == 3)
    host = host_of(managed)
    managed.kill()
    os.kill(host, signal.SIGKILL)
    real = [name for name, _ in managed.stored]
    other = "AAAAAAAAAAAAAAAAAAAAAA"
    fields = real[0].split(".")
    stale = [
        ".".join([fields[0], fields[1], "77", *fields[3:4], "1", *fields[5:]]),
        ".".join([*fields[:3], "99", "1", *fields[5:]]),
        ".".join([fields[0], other, *fields[2:4], "1", *fields[5:]]),
        "vtpm1.garbage",
        "stored",
    ]
    peers = []
    for item in stale:
        ours, peer = socket.socketpair()
        peer.settimeout(10)
        managed.stored.append((item, ours.detach()))
        peers.append(peer)
    managed.start()
    managed.eventually(lambda: [name for name, _ in managed.stored] == real)
    assert set(managed.removed) == set(stale)
    for peer in peers:
        assert peer.recv(1) == b""
    assert managed.log_text().count("engine.stored_copies_closed") == 5
    # And what is right is used all the same.
    assert raw.succeed(sock, raw.pcr_read(16)) == expected


def test_a_snapshot_that_was_used_is_not_gone_on_from(managed: ManagedDaemon) -> None:
    sock, _ = measured(managed)
    managed.hibernate("web-1")
    managed.eventually(lambda: len(managed.stored) == 3)
    kept = [(name, os.dup(fd)) for name, fd in managed.stored]
    raw.succeed(sock, raw.pcr_extend(16, os.urandom(32)))
    managed.eventually(lambda: managed.stored == [])
    host = host_of(managed)
    managed.kill()
    os.kill(host, signal.SIGKILL)
    # As if nobody had told the service manager.
    managed.stored += kept
    managed.start()
    assert managed.get("web-1").state == pb.FAILED
    managed.eventually(lambda: managed.stored == [])
    assert raw.receive(sock) == b""


def test_half_a_group_is_of_no_use(managed: ManagedDaemon) -> None:
    vm, data, _ = booted(managed, "vm")
    managed.hibernate("vm")
    managed.eventually(lambda: len(managed.stored) == 4)
    host = host_of(managed)
    managed.kill()
    os.kill(host, signal.SIGKILL)
    os.close(managed.stored.pop()[1])
    managed.start()
    assert managed.get("vm").state == pb.FAILED
    assert vm.control.recv(1) == b""
    assert raw.receive(data) == b""
    managed.eventually(lambda: managed.stored == [])


@pytest.mark.parametrize("point", ["commit.before_sync", "commit.after_sync", "thaw.after_hand_over"])
def test_both_die_while_an_instance_thaws(managed: ManagedDaemon, point: str) -> None:
    sock, before = measured(managed)
    host = host_of(managed)
    managed.hibernate("web-1")
    managed.eventually(lambda: len(managed.stored) == 3)
    crash_at(managed, point)
    sock.sendall(raw.pcr_read(16))
    managed.wait_until_dead()
    os.kill(host, signal.SIGKILL)
    managed.environment.pop("VTPM_CRASH_POINT")
    managed.start()
    query = "SELECT s.version, u.version FROM snapshots s LEFT JOIN snapshot_uses u ON u.instance = s.instance"
    answer = answer_of(sock)
    with sqlite3.connect(managed.state_dir / "vtpm.db") as store:
        snapshots = store.execute(query).fetchall()
    if answer:
        assert answer == before
    else:
        # The worker that had used the snapshot is gone, and nobody uses it again.
        assert all(version == used for version, used in snapshots)
        assert managed.get("web-1").state == pb.FAILED


def test_a_full_store_or_one_that_refuses_keeps_nothing_from_hibernating() -> None:
    daemon = ManagedDaemon(most=4, abstract=True)
    try:
        daemon.start()
        guests = [measured(daemon, f"web-{number}") for number in range(3)]
        for number in range(3):
            daemon.hibernate(f"web-{number}")
        daemon.eventually(lambda: len(daemon.stored) == 3)
        daemon.eventually(lambda: "fdstore.full" in daemon.log_text())
        for sock, before in guests:
            assert raw.succeed(sock, raw.pcr_read(16)) == before
        daemon.eventually(lambda: daemon.stored == [])
        # There is room again; but nobody is there.
        daemon.leave()
        for number in range(3):
            daemon.hibernate(f"web-{number}")
        for sock, before in guests:
            assert raw.succeed(sock, raw.pcr_read(16)) == before
    finally:
        daemon.close()
