"""A daemon's death, restart and successor while VMs run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import raw, vmm
from tests.support.daemon import ROOT, DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb


def test_a_killed_daemons_vms_run_on_and_the_next_daemon_takes_them_over(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    web = daemon.running("web-1")
    pid = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    sock = raw.connect(web.tpm_socket)
    raw.succeed(sock, raw.pcr_extend(16, b"\x01" * 32))
    extended = raw.succeed(sock, raw.pcr_read(16))
    for _ in range(3):
        daemon.kill()
        assert raw.succeed(sock, raw.pcr_read(16)) == extended
        daemon.start()
        after = daemon.get("web-1")
        assert (after.state, after.epoch) == (pb.ON, web.epoch)
        assert daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid == pid
        assert raw.succeed(sock, raw.pcr_read(16)) == extended
        daemon.vtpm("quote", "web-1", "--pcrs", "sha256:16", "--nonce", "00", "--out", str(daemon.root / "q"))
    # The control socket and the guest socket are served again too.
    control = raw.connect(web.tpm_socket + ".ctrl")
    control.sendall(b"\0\0\0\x01")
    assert len(control.recv(16)) == 8
    daemon.vtpm("instance", "stop", "web-1")


def test_a_command_that_writes_nv_waits_for_the_next_daemon_and_is_durable_then(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(sock, raw.nv_increment())
    before = raw.counter_of(sock)
    daemon.kill()
    answered = threading.Event()

    def increment() -> None:
        raw.succeed(sock, raw.nv_increment())
        answered.set()

    thread = threading.Thread(target=increment)
    thread.start()
    assert not answered.wait(1), "acknowledged without a daemon that could have made it durable"
    daemon.start()
    assert answered.wait(10)
    thread.join()
    daemon.vtpm("instance", "stop", "web-1")
    daemon.vtpm("instance", "start", "web-1")
    assert raw.counter_of(raw.connect(daemon.get("web-1").tpm_socket)) == before + 1


def test_a_commit_that_waits_too_long_fails_the_instance_and_a_reset_brings_it_back() -> None:
    with DaemonProcess(environment={"VTPM_COMMIT_TIMEOUT_S": "1"}) as daemon:
        sock = raw.connect(daemon.running("web-1").tpm_socket)
        raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
        raw.succeed(sock, raw.nv_increment())
        before = raw.counter_of(sock)
        daemon.kill()
        assert raw.ask(sock, raw.nv_increment()) == b"", "no answer without durability"
        daemon.start()
        failed = daemon.until("web-1", pb.FAILED)
        assert failed.failure.reason
        assert "reset" in failed.failure.remedy
        daemon.vtpm("instance", "reset", "web-1")
        assert raw.counter_of(raw.connect(daemon.get("web-1").tpm_socket)) == before


def test_two_daemons_on_the_same_directories_are_one_too_many(own_daemon: DaemonProcess) -> None:
    own_daemon.running("web-1")
    second = subprocess.run(
        [sys.executable, str(ROOT / "server.py")], env=own_daemon.env, capture_output=True, check=False, timeout=30
    )
    assert second.returncode == 2
    assert b"DAEMON_RUNNING" in second.stderr
    assert b"Traceback" not in second.stderr
    assert own_daemon.get("web-1").state == pb.ON


def test_two_daemons_on_their_own_directories_do_not_know_of_each_other(own_daemon: DaemonProcess) -> None:
    with DaemonProcess() as other:
        mine, theirs = own_daemon.running("web-1"), other.running("web-1")
        assert {key.public_pem for key in mine.keys}.isdisjoint({key.public_pem for key in theirs.keys})
        other.kill()
        assert own_daemon.get("web-1").state == pb.ON


def test_workers_that_die_while_no_daemon_runs_are_noticed(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.running("web-1")
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon.stop()
    os.kill(host, signal.SIGKILL)
    time.sleep(0.2)
    daemon.start()
    failed = daemon.get("web-1")
    assert (failed.state, failed.failure.reason) == (pb.FAILED, "WORKER_LOST")
    daemon.vtpm("instance", "reset", "web-1")
    assert daemon.get("web-1").state == pb.ON


def test_a_stopping_daemon_finishes_what_runs(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    done: list[pb.Instance] = []
    thread = threading.Thread(
        target=lambda: done.append(daemon.create("slow", profile=pb.Profile(ek_algorithms=[pb.RSA_3072])))
    )
    thread.start()
    time.sleep(0.05)
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    thread.join()
    assert daemon.process.wait(20) == 0
    daemon.process = None
    daemon.stop()
    daemon.start()
    assert daemon.get("slow").id == done[0].id


@pytest.mark.parametrize("offset", ["+30y", "-10y"])
def test_a_clock_that_jumped_changes_nothing_that_matters(own_daemon: DaemonProcess, offset: str) -> None:
    """The state survives a daemon whose wall clock is elsewhere (libfaketime, where it is installed)."""
    library = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
    if not library.exists():
        pytest.skip("libfaketime is not installed")
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    daemon.stop()
    # Its CA is not valid then, which would stop the start of one with ca = auto.
    daemon.environment |= {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    daemon.environment["VTPM_CA"] = "manual"
    daemon.start()
    raw.succeed(sock, raw.nv_increment())
    before = raw.counter_of(sock)
    daemon.vtpm("instance", "stop", "web-1")
    daemon.vtpm("instance", "start", "web-1")
    assert raw.counter_of(raw.connect(daemon.get("web-1").tpm_socket)) == before


def test_an_engine_host_of_another_protocol_is_emptied_and_replaced(own_daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon = own_daemon
    daemon.stop()
    # A version whose engine host speaks a protocol that this one does not know.
    shutil.copytree(ROOT / "vtpm", tmp_path / "vtpm")
    shutil.copy(ROOT / "server.py", tmp_path)
    source = tmp_path / "vtpm" / "engine" / "host.py"
    changed = re.sub(r"^PROTOCOL: Final = \d+$", "PROTOCOL: Final = 99", source.read_text(), flags=re.M)
    assert changed != source.read_text()
    source.write_text(changed)
    daemon.code = tmp_path
    # For the engine host, which is a module of the same code.
    daemon.environment["PYTHONPATH"] = str(tmp_path)
    daemon.start()
    old = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    socks = {}
    for name in ("awake", "asleep"):
        sock = raw.connect(daemon.running(name).tpm_socket)
        raw.succeed(sock, raw.pcr_extend(16, name.encode().ljust(32)))
        socks[name] = sock, raw.succeed(sock, raw.pcr_read(16))
    vm = vmm.Vmm(daemon.create("vm").control_socket).boot()
    assert vm.data is not None
    daemon.hibernate("asleep")
    daemon.kill()
    daemon.code = ROOT
    del daemon.environment["PYTHONPATH"]
    daemon.start()
    assert daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid != old
    assert "engine.host_replaced" in daemon.log_text()
    for sock, before in socks.values():
        assert raw.succeed(sock, raw.pcr_read(16)) == before
    raw.succeed(vm.data, raw.pcr_read(0))
    vm.control.close()
    daemon.until("vm", pb.OFF)
