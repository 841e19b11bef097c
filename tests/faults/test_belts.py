"""The engine host dies while VMs' TPMs hibernate: the daemon has copies of their connections, which go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from tests.faults.test_hibernation_crashes import measured
from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess, spare_pids
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


def host_of(daemon: DaemonProcess) -> int:
    pid: int = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon._hosts.add(pid)
    return pid


def booted(daemon: DaemonProcess, name: str) -> tuple[vmm.Vmm, socket.socket, bytes]:
    """A VM that is attached, its data channel, and what its PCR 16 is."""
    vm = vmm.Vmm(daemon.create(name).control_socket)
    vm.boot()
    assert vm.data is not None
    vm.data.settimeout(30)
    raw.succeed(vm.data, raw.pcr_extend(16, os.urandom(32)))
    return vm, vm.data, raw.succeed(vm.data, raw.pcr_read(16))


def answer_of(sock: socket.socket) -> bytes:
    """A response, or nothing if the connection was closed, maybe with a command in it that nobody had read."""
    try:
        return raw.receive(sock)
    except ConnectionResetError:
        return b""


def sockets_of(pid: int) -> set[str]:
    """The sockets that a process has open, by inode: a copy has that of its original."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return {name for name in found if name.startswith("socket:")}


def kill_host(daemon: DaemonProcess) -> None:
    """And wait until the next one is there."""
    gone = host_of(daemon)
    os.kill(gone, signal.SIGKILL)
    eventually(lambda: host_of(daemon) != gone)


def test_the_engine_host_dies_and_a_hibernated_vm_goes_on_with_the_same_connection(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    vm, data, before = booted(daemon, "vm")
    sock, expected = measured(daemon, "web-1")
    awake = raw.connect(daemon.running("awake").tpm_socket)
    for _ in range(2):
        daemon.hibernate("vm")
        daemon.hibernate("web-1")
        kill_host(daemon)
        assert raw.succeed(data, raw.pcr_read(16)) == before
        assert raw.succeed(sock, raw.pcr_read(16)) == expected
        assert vm.ask(vmm.ESTABLISHED) == bytes(8)
    assert daemon.until("awake", pb.FAILED).failure.reason == "ENGINE_HOST_LOST"
    assert raw.receive(awake) == b""
    # Its end is seen as ever, so nobody holds a copy any more.
    daemon.vtpm("instance", "stop", "web-1")
    assert raw.receive(sock) == b""
    vm.control.close()
    daemon.until("vm", pb.OFF)


def test_what_came_while_there_was_no_engine_host_is_answered(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    _, data, before = booted(daemon, "vm")
    daemon.hibernate("vm")
    os.kill(host_of(daemon), signal.SIGKILL)
    data.sendall(raw.pcr_read(16))
    assert raw.receive(data) == before
    host_of(daemon)


def test_without_copies_a_vm_that_is_attached_loses_its_tpm_and_others_their_connections(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    vm, data, _ = booted(daemon, "vm")
    sock, expected = measured(daemon, "web-1")
    assert daemon.process is not None
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    # No room for descriptors that come along with a message.
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (8, hard))
    daemon.hibernate("vm")
    daemon.hibernate("web-1")
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    kill_host(daemon)
    assert daemon.until("vm", pb.FAILED).failure.reason == "ENGINE_HOST_LOST"
    assert vm.control.recv(1) == data.recv(1) == sock.recv(1) == b""
    assert daemon.get("web-1").hibernated
    assert raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.pcr_read(16)) == expected
    daemon.vtpm("instance", "reset", "vm")


def test_a_daemon_without_descriptors_says_so_and_goes_on_when_it_has_some(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock, expected = measured(daemon, "web-1")
    daemon.create("web-2")
    assert daemon.process is not None
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    open_now = len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))
    reasons = set()
    # Wherever on the way to a running instance they run out.
    for more in range(8):
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (open_now + more, hard))
        try:
            daemon.power_on("web-2")
        except VtpmError as error:
            reasons.add(error.reason)
        else:
            break
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert "INTERNAL" not in reasons
    assert "DESCRIPTORS_EXHAUSTED" in reasons
    if daemon.get("web-2").state == pb.ON:
        daemon.vtpm("instance", "stop", "web-2")
    assert raw.succeed(sock, raw.pcr_read(16)) == expected
    assert daemon.power_on("web-2").state == pb.ON


def test_few_descriptors_are_for_the_sockets_of_instances_first() -> None:
    daemon = DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0"})
    daemon.prefix = ["prlimit", "--nofile=256:256"]
    names = [f"web-{number}" for number in range(70)]
    with daemon:
        before = {}
        for name in names:
            sock, before[name] = measured(daemon, name)
            sock.close()
            daemon.hibernate(name)
        assert "engine.copies_full" in daemon.log_text()
        for end in (daemon.kill, daemon.stop):
            end()
            daemon.start()
            for name in names[::7]:
                with raw.connect(daemon.get(name).tpm_socket) as sock:
                    assert raw.succeed(sock, raw.pcr_read(16)) == before[name]
                daemon.hibernate(name)
        # And with too few even for those it says so.
        daemon.stop()
        daemon.prefix = ["prlimit", "--nofile=100:100"]
        with pytest.raises(RuntimeError, match="DESCRIPTORS_EXHAUSTED"):
            daemon.start()
        daemon.prefix = []
        daemon.start()
        with raw.connect(daemon.get("web-1").tpm_socket) as sock:
            assert raw.succeed(sock, raw.pcr_read(16)) == before["web-1"]


def test_a_new_daemon_has_copies_of_what_it_finds(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    guests = [booted(daemon, f"vm-{number}") for number in range(5)]
    for number in range(5):
        daemon.hibernate(f"vm-{number}")
    daemon.kill()
    daemon.start()
    # They come when it serves already: of each two listeners and two connections.
    assert daemon.process is not None
    pid, host = daemon.process.pid, host_of(daemon)
    eventually(lambda: len(sockets_of(pid) & sockets_of(host)) >= 5 * 4)
    kill_host(daemon)
    for _, data, before in guests:
        assert raw.succeed(data, raw.pcr_read(16)) == before


def test_the_engine_host_dies_at_some_moment_of_a_thaw(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    for half_ms in range(0, 14, 2):
        name = f"vm-{half_ms}"
        _, data, before = booted(daemon, name)
        daemon.hibernate(name)
        data.sendall(raw.pcr_read(16))
        time.sleep(half_ms / 2000)
        kill_host(daemon)
        answer = answer_of(data)
        if answer:
            assert answer == before, "PCRs never go back"
        else:
            # Its worker had gone on from the snapshot.
            assert daemon.until(name, pb.FAILED).failure.reason in ("ENGINE_HOST_LOST", "SNAPSHOT_MISSING")


def test_nobody_can_say_what_a_worker_did_that_died_with_its_engine_host_in_the_middle_of_a_thaw(
    own_daemon: DaemonProcess,
) -> None:
    daemon = own_daemon
    vm, data, _ = booted(daemon, "vm")
    daemon.hibernate("vm")
    host = host_of(daemon)
    # Whoever gets the instance will not open its state; but the store has it marked, and the daemon can't know of the one.
    for pid in spare_pids(host):
        os.kill(pid, signal.SIGSTOP)
    data.sendall(raw.pcr_read(16))
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        eventually(lambda: store.execute("SELECT count(*) FROM snapshot_uses").fetchone() == (1,))
    kill_host(daemon)
    assert daemon.until("vm", pb.FAILED).failure.reason in ("ENGINE_HOST_LOST", "SNAPSHOT_MISSING")
    assert answer_of(data) == vm.control.recv(1) == b""
