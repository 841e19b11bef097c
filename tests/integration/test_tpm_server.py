"""The engine tpm_server: the same service in front of IBM's simulator, here with a stand-in that speaks its protocol."""

from __future__ import annotations

import functools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw, vmm
from tests.support.daemon import ROOT, DaemonProcess, worker_pids
from tests.support.quote import verify
from tests.support.vmm import Vmm
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.engine import tpm_server
from vtpm.engine.worker_uids import FIRST_UID
from vtpm.errors import EngineError, ErrorKind, VtpmError
from vtpm.tpm.command import error_response

ENGINE = "tpm_server"
STAND_IN = ROOT / "tests/support/tpm_server.py"
COMMAND_PORT, PLATFORM_PORT = 2321, 2322
TPM_RC_LOCALITY = 0x907
TPM_RC_COMMAND_SIZE = 0x142


def install(path: Path, *arguments: str) -> None:
    """Put the stand-in where the daemon looks for the program; `arguments` are as if built in."""
    env = f"PYTHONDONTWRITEBYTECODE=1 PYTHONPATH='{sysconfig.get_paths()['purelib']}'"
    path.write_text(f"#!/bin/sh\n{env} exec '{python_for_all()}' '{STAND_IN}' {' '.join(arguments)} \"$@\"\n")
    path.chmod(0o755)


@functools.cache
def python_for_all() -> str:
    """A Python that a worker may run, which is a user of its own where the daemon is root."""
    if os.geteuid() != 0:
        return sys.executable
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{sysconfig.get_paths()['purelib']}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}"):
        # Twice: the first step still has root's right to pass through root's directories.
        again = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import vtpm.engine.libtpms'], check=True)"
        command = ["setpriv", f"--reuid={FIRST_UID}", f"--regid={FIRST_UID}", "--clear-groups", python, "-c", again]
        if subprocess.run(command, env=env, cwd="/", capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("no Python with these packages that another user may run")


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that every user may read."""
    with tempfile.TemporaryDirectory(prefix="vtpm-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def program(public_dir: Path) -> Path:
    """An installed tpm_server."""
    path = public_dir / "tpm_server"
    install(path)
    return path


@pytest.fixture
def simulated(program: Path) -> Iterator[DaemonProcess]:
    """A daemon of a host where tpm_server is installed."""
    with DaemonProcess(environment={"VTPM_TPM_SERVER_PATH": str(program)}) as process:
        yield process


def host(daemon: DaemonProcess) -> pb.Host:
    shown: pb.Host = daemon.client.call(daemon.client.host.GetHost, pb.GetHostRequest())
    return shown


def engine_host(daemon: DaemonProcess) -> int:
    return host(daemon).engine_host_pid


def engines(daemon: DaemonProcess) -> dict[str, pb.EngineCapabilities]:
    return {engine.name: engine for engine in host(daemon).engines}


def program_of(daemon: DaemonProcess) -> int:
    """The one tpm_server that runs."""
    (pid,) = [pid for worker in worker_pids(engine_host(daemon)) for pid in worker_pids(worker)]
    return pid


def stop(daemon: DaemonProcess, name: str) -> None:
    daemon.client.call(daemon.client.instances.StopInstance, pb.StopInstanceRequest(instance=name))


def reset(daemon: DaemonProcess, name: str) -> pb.Instance:
    request = pb.ResetInstanceRequest(instance=name, startup=pb.STARTUP_CLEAR)
    on: pb.Instance = daemon.client.call(daemon.client.instances.ResetInstance, request)
    return on


def refused(daemon: DaemonProcess, name: str) -> VtpmError:
    with pytest.raises(VtpmError) as caught:
        daemon.power_on(name)
    return caught.value


def write_nv(sock: socket.socket, data: bytes = b"kept ...") -> None:
    raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False))
    raw.succeed(sock, raw.nv_write(data))


def read_nv(instance: pb.Instance) -> bytes:
    with raw.connect(instance.tpm_socket) as sock:
        return raw.nv_value(raw.succeed(sock, raw.nv_read(raw.ORDINARY)))


def test_both_engines_are_listed_with_what_they_can(simulated: DaemonProcess) -> None:
    listed = engines(simulated)
    assert (listed["libtpms"].hibernation, listed["libtpms"].available) == (True, True)
    assert (listed[ENGINE].hibernation, listed[ENGINE].available) == (False, True)


def test_an_instance_quotes_and_keeps_its_nv_over_power_off(simulated: DaemonProcess) -> None:
    daemon = simulated
    made = daemon.create("web-1", engine=ENGINE)
    on = daemon.power_on("web-1")
    assert (on.engine, on.state) == (ENGINE, pb.ON)
    sock = raw.connect(on.tpm_socket)
    raw.succeed(sock, raw.pcr_extend(16, b"\x01" * 32))
    extended = raw.succeed(sock, raw.pcr_read(16))
    write_nv(sock)
    selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0, 16])
    request = tpm_pb2.QuoteRequest(instance="web-1", selections=[selection], nonce=b"nonce")
    quoted = daemon.client.call(daemon.client.tpm.Quote, request)
    ak = next(key.public_pem for key in made.keys if key.role == pb.AK)
    verify(quoted.attest, quoted.signature, ak, nonce=b"nonce", pcrs=[value.digest for value in quoted.values])
    stop(daemon, "web-1")
    again = daemon.power_on("web-1")
    assert read_nv(again) == b"kept ..."
    with raw.connect(again.tpm_socket) as sock:
        assert raw.succeed(sock, raw.pcr_read(16)) != extended


def test_a_reset_drops_volatile_state_and_keeps_nv(simulated: DaemonProcess) -> None:
    daemon = simulated
    on = daemon.running("web-1", engine=ENGINE)
    sock = raw.connect(on.tpm_socket)
    fresh = raw.succeed(sock, raw.pcr_read(16))
    raw.succeed(sock, raw.pcr_extend(16, b"\x01" * 32))
    write_nv(sock)
    before = program_of(daemon)
    reset(daemon, "web-1")
    assert program_of(daemon) != before
    # The VM's connection is the worker's, and stays.
    assert raw.succeed(sock, raw.pcr_read(16)) == fresh
    assert read_nv(daemon.get("web-1")) == b"kept ..."


@pytest.mark.parametrize("powered", [False, True])
def test_a_vmm_is_promised_what_there_is_and_waits_for_nothing(simulated: DaemonProcess, powered: bool) -> None:
    machine = Vmm(simulated.create("web-1", engine=ENGINE).control_socket)
    if powered:
        machine.boot()
    ours = Vmm(simulated.create("web-2").control_socket)
    left_out = int.from_bytes(ours.ask(vmm.CAPABILITY), "big") ^ int.from_bytes(machine.ask(vmm.CAPABILITY), "big")
    # Hashing, storing the volatile state, giving and taking states: QEMU does not migrate its VM then.
    assert left_out == 1 << 4 | 1 << 6 | 1 << 8 | 1 << 9
    for kind in (vmm.PERMANENT, vmm.VOLATILE, vmm.SAVESTATE):
        machine.control.sendall(vmm.request(vmm.GET_STATE, struct.pack(">III", 1, kind, 0)))
        result, _flags, _total, length = struct.unpack(">IIII", machine.exactly(16))
        assert len(machine.exactly(length)) == length
        assert (result == 0) is (kind == vmm.PERMANENT)
    # Each answer was whole: the next one is that of the next request.
    machine.control.sendall(vmm.request(vmm.ESTABLISHED))
    assert machine.exactly(8)[:4] == (bytes(4) if powered else b"\0\0\0\x0a")
    for command, payload in ((vmm.STORE_VOLATILE, b""), (vmm.HASH_START, b""), (vmm.RESET_ESTABLISHED, bytes(4))):
        assert machine.ask(command, payload) != bytes(4)
    assert len(machine.ask(vmm.CAPABILITY)) == 8
    for each in (machine, ours):
        each.close()


def test_a_killed_daemons_instances_of_both_engines_are_taken_over(simulated: DaemonProcess) -> None:
    daemon = simulated
    ours, theirs = daemon.running("ours"), daemon.running("theirs", engine=ENGINE)
    before = engine_host(daemon)
    sock = raw.connect(theirs.tpm_socket)
    write_nv(sock)
    daemon.kill()
    raw.succeed(sock, raw.pcr_read(0))
    daemon.start()
    assert engine_host(daemon) == before
    for instance in (ours, theirs):
        assert (daemon.get(instance.name).state, daemon.get(instance.name).epoch) == (pb.ON, instance.epoch)
    raw.succeed(sock, raw.nv_write(b"after it"))
    stop(daemon, "theirs")
    assert read_nv(daemon.power_on("theirs")) == b"after it"


def test_nv_is_durable_over_the_death_of_everything(simulated: DaemonProcess) -> None:
    daemon = simulated
    with raw.connect(daemon.running("web-1", engine=ENGINE).tpm_socket) as sock:
        write_nv(sock)
        os.kill(engine_host(daemon), signal.SIGKILL)
        daemon.kill()
    daemon.start()
    assert daemon.until("web-1", pb.FAILED).failure.reason in ("WORKER_LOST", "ENGINE_HOST_LOST")
    assert read_nv(reset(daemon, "web-1")) == b"kept ..."


def test_the_end_of_the_program_fails_the_instance_and_a_reset_brings_it_back(simulated: DaemonProcess) -> None:
    daemon = simulated
    with raw.connect(daemon.running("web-1", engine=ENGINE).tpm_socket) as sock:
        write_nv(sock)
        # Nobody asks the TPM anything just now.
        os.kill(program_of(daemon), signal.SIGKILL)
        failure = daemon.until("web-1", pb.FAILED).failure
        assert failure.reason == "WORKER_LOST"
        assert "reset" in failure.remedy
        assert sock.recv(1) == b""
    assert read_nv(reset(daemon, "web-1")) == b"kept ..."


def test_the_program_ends_with_its_worker(simulated: DaemonProcess) -> None:
    daemon = simulated
    daemon.running("web-1", engine=ENGINE)
    pidfd = os.pidfd_open(program_of(daemon))
    os.kill(worker_pids(engine_host(daemon))[0], signal.SIGKILL)
    daemon.until("web-1", pb.FAILED)
    assert select.select([pidfd], [], [], 5)[0]
    os.close(pidfd)


def test_a_state_that_the_program_does_not_take_is_refused_and_kept(simulated: DaemonProcess, program: Path) -> None:
    daemon = simulated
    with raw.connect(daemon.running("web-1", engine=ENGINE).tpm_socket) as sock:
        write_nv(sock)
    stop(daemon, "web-1")
    # A build with another size of NV memory makes a new TPM over such a state.
    install(program, "--nv-size", str(256 << 10))
    error = refused(daemon, "web-1")
    assert (error.reason, error.kind) == ("ENGINE_STATE_REFUSED", ErrorKind.DATA_LOSS)
    failed = daemon.get("web-1")
    assert (failed.state, failed.failure.reason) == (pb.FAILED, "ENGINE_STATE_REFUSED")
    assert "tpm_server" in failed.failure.remedy
    install(program)
    assert read_nv(reset(daemon, "web-1")) == b"kept ..."


def test_a_reset_that_the_program_refuses_ends_in_failed(simulated: DaemonProcess, program: Path) -> None:
    daemon = simulated
    with raw.connect(daemon.running("web-1", engine=ENGINE).tpm_socket) as sock:
        write_nv(sock)
    install(program, "--nv-size", str(256 << 10))
    with pytest.raises(VtpmError) as caught:
        reset(daemon, "web-1")
    assert caught.value.reason == "ENGINE_STATE_REFUSED"
    daemon.until("web-1", pb.FAILED)
    install(program)
    assert read_nv(reset(daemon, "web-1")) == b"kept ..."


def test_its_ports_are_reachable_from_nowhere_and_each_instance_has_them(simulated: DaemonProcess) -> None:
    daemon = simulated
    sockets = [raw.connect(daemon.running(name, engine=ENGINE).tpm_socket) for name in ("web-1", "web-2")]
    raw.succeed(sockets[0], raw.pcr_extend(16, b"\x01" * 32))
    assert raw.succeed(sockets[0], raw.pcr_read(16)) != raw.succeed(sockets[1], raw.pcr_read(16))
    for port in (COMMAND_PORT, PLATFORM_PORT):
        for address in ("127.0.0.1", "::1"):
            with pytest.raises(OSError, match=r"refused|Cannot assign|not available|unreachable"):
                socket.create_connection((address, port), 1)


def test_the_program_sees_nothing_of_the_service_and_can_do_little(simulated: DaemonProcess) -> None:
    daemon = simulated
    daemon.running("web-1", engine=ENGINE)
    pid = program_of(daemon)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], int(status["CapEff"], 16), int(status["CapBnd"], 16)) == ("1", 0, 0)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    # Its own files are on no file system that others see.
    assert not list(Path("/dev/shm").glob("NVChip"))
    root = Path(f"/proc/{pid}/root")
    for hidden in (daemon.state_dir, daemon.runtime_dir):
        assert list(hidden.iterdir())
        assert not list((root / hidden.relative_to("/")).iterdir())
    assert [path.name for path in (root / "dev/shm").iterdir()] == ["NVChip"]


def test_locality_and_malformed_commands_are_as_the_tpm_has_them(simulated: DaemonProcess) -> None:
    daemon = simulated
    daemon.running("web-1", engine=ENGINE)

    def execute(command: bytes, locality: int = 0) -> bytes:
        request = tpm_pb2.ExecuteRequest(instance="web-1", command=command, locality=locality)
        response: bytes = daemon.client.call(daemon.client.tpm.Execute, request).response
        return response

    extend = raw.pcr_extend(17, b"\x01" * 32)
    assert raw.rc_of(execute(extend)) == TPM_RC_LOCALITY
    assert raw.rc_of(execute(extend, 3)) == 0
    assert raw.rc_of(execute(extend)) == TPM_RC_LOCALITY
    for malformed in (b"", b"\x80\x01", raw.pcr_read(0) + b"\0", raw.pcr_read(0)[:-1]):
        assert execute(malformed) == error_response(TPM_RC_COMMAND_SIZE)
    assert raw.rc_of(execute(raw.pcr_read(0))) == 0


def test_without_the_program_the_engine_is_unavailable_and_says_what_to_do(tmp_path: Path) -> None:
    missing = str(tmp_path / "not" / "installed")
    with DaemonProcess(environment={"VTPM_TPM_SERVER_PATH": missing}) as daemon:
        assert not engines(daemon)[ENGINE].available
        with pytest.raises(VtpmError) as caught:
            daemon.create("web-1", engine=ENGINE)
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
        assert "tpm_server_path" in caught.value.remedy
        # The other engine does not mind.
        assert daemon.running("web-2").state == pb.ON


def test_an_instance_whose_program_is_gone_stays_off_until_it_is_back(simulated: DaemonProcess, program: Path) -> None:
    daemon = simulated
    daemon.create("web-1", engine=ENGINE)
    program.unlink()
    error = refused(daemon, "web-1")
    assert error.reason == "ENGINE_UNAVAILABLE"
    assert "tpm_server_path" in error.remedy
    assert daemon.get("web-1").state == pb.OFF
    install(program)
    assert daemon.power_on("web-1").state == pb.ON


def test_a_program_that_is_no_tpm_server_is_refused_by_name(public_dir: Path) -> None:
    program = public_dir / "tpm_server"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    with DaemonProcess(environment={"VTPM_TPM_SERVER_PATH": str(program)}) as daemon:
        with pytest.raises(VtpmError) as caught:
            daemon.create("web-1", engine=ENGINE)
        assert caught.value.reason == "TPM_SERVER_START_FAILED"
        # Its worker is on its way out.
        deadline = time.monotonic() + 5
        while worker_pids(engine_host(daemon)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_it_does_not_hibernate_and_says_so(simulated: DaemonProcess) -> None:
    daemon = simulated
    daemon.running("web-1", engine=ENGINE)
    with pytest.raises(VtpmError) as caught:
        daemon.hibernate("web-1")
    assert caught.value.reason == "ENGINE_CANNOT_HIBERNATE"
    drained = daemon.vtpm("host", "drain", check=False)
    assert b"ENGINE_CANNOT_HIBERNATE: web-1" in drained.stderr
    assert daemon.get("web-1").state == pb.ON


def test_without_isolation_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_hidden: object, *, owner: int | None) -> None:
        raise EngineError("ENGINE_NOT_ISOLATED", "no namespaces here")

    monkeypatch.setattr(tpm_server, "isolate", refuse)
    monkeypatch.setattr(tpm_server, "PRIVATE_DIR", tmp_path)
    started = tmp_path / "started"
    program = tmp_path / "tpm_server"
    program.write_text(f"#!/bin/sh\ntouch '{started}'\n")
    program.chmod(0o755)
    tpm = tpm_server.in_new_worker(str(program), [])
    for start in (tpm.manufacture, lambda: tpm.power_on(b"state")):
        with pytest.raises(EngineError) as caught:
            start()
        assert caught.value.reason == "ENGINE_NOT_ISOLATED"
    assert not started.exists()
    assert not (tmp_path / "NVChip").exists()
