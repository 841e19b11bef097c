"""Whoever takes power from a TPM shuts it down first, if its guest did not: a hard reset is no attack (Part 1, 19.8)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_dropin import BOTH, COMMANDS, OURS, PERMALL, PLAIN, READY, VOLATILE, Running, running
from tests.integration.test_tpm_server import install
from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess, daemon, worker_pids
from tests.support.lockout import (
    SU_STATE,
    TPM_RC_VALUE_1,
    failed_tries,
    make_protected,
    shutdown,
    startup,
    use_protected,
)
from tests.support.mssim import DONE, Simulator
from tests.support.ports import free_pair
from tests.support.vmm import Vmm
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

PORTS = {"simulated-off": free_pair(), "simulated-reset": free_pair()}
MSSIM_POWER_ON, MSSIM_POWER_OFF, MSSIM_RESET = 1, 2, 17
# As many as failed tries lock a TPM that nobody has told otherwise.
RESETS = 3
PCR = 3


@pytest.fixture(scope="module")
def host() -> Iterator[DaemonProcess]:
    """A daemon that has both engines, and gives two instances to the ports of the TPM simulator."""
    # Where every user may run it: as root each worker is a user of its own.
    with tempfile.TemporaryDirectory(prefix="vtpm-") as directory:
        Path(directory).chmod(0o755)
        program = Path(directory) / "tpm_server"
        install(program)
        with daemon(VTPM_MSSIM_PORTS=json.dumps(PORTS), VTPM_TPM_SERVER_PATH=str(program)) as process:
            yield process


class Guest:
    """A guest on the data socket of an instance, whose firmware starts its TPM."""

    def __init__(self, host: DaemonProcess, name: str) -> None:
        self.host, self.name = host, name

    def run(self, command: bytes) -> bytes:
        with raw.connect(self.host.get(self.name).tpm_socket) as sock:
            return raw.ask(sock, command)

    def boot(self) -> None:
        assert raw.rc_of(self.run(startup())) == 0

    def start(self) -> None:
        self.host.power_on(self.name, pb.STARTUP_NONE)

    def stop(self) -> None:
        self.host.client.call(self.host.client.instances.StopInstance, pb.StopInstanceRequest(instance=self.name))

    def reset(self) -> None:
        request = pb.ResetInstanceRequest(instance=self.name, startup=pb.STARTUP_NONE)
        self.host.client.call(self.host.client.instances.ResetInstance, request)


def stop_and_start(guest: Guest) -> None:
    guest.stop()
    guest.start()


def reset(guest: Guest) -> None:
    guest.reset()


def stop_while_hibernated(guest: Guest) -> None:
    guest.host.hibernate(guest.name)
    stop_and_start(guest)


def reset_while_hibernated(guest: Guest) -> None:
    guest.host.hibernate(guest.name)
    guest.reset()


def reset_after_a_sleep(guest: Guest) -> None:
    guest.host.hibernate(guest.name)
    guest.run(raw.pcr_read(0))
    guest.reset()


def stop_on_a_drained_host(guest: Guest) -> None:
    guest.host.vtpm("host", "drain")
    guest.stop()
    guest.host.vtpm("host", "resume")
    guest.start()


def power_off_beside(guest: Guest) -> None:
    with contextlib.closing(Vmm(f"{guest.host.get(guest.name).tpm_socket}.ctrl")) as beside:
        assert beside.ask(vmm.SHUTDOWN) == bytes(4)
    guest.host.until(guest.name, pb.OFF)
    guest.start()


def nobody_is_locked_out(guest: Guest, lose_power: Callable[[Guest], None]) -> None:
    guest.start()
    guest.boot()
    make_protected(guest.run)
    for _ in range(RESETS):
        use_protected(guest.run)
        lose_power(guest)
        guest.boot()
    assert failed_tries(guest.run) == 0
    assert use_protected(guest.run) == b"a secret"
    guest.stop()


@pytest.mark.parametrize(
    "lose_power",
    [
        stop_and_start,
        reset,
        stop_while_hibernated,
        reset_while_hibernated,
        reset_after_a_sleep,
        stop_on_a_drained_host,
        power_off_beside,
    ],
)
def test_power_that_an_operator_takes(host: DaemonProcess, name: str, lose_power: Callable[[Guest], None]) -> None:
    host.create(name)
    nobody_is_locked_out(Guest(host, name), lose_power)


@pytest.mark.parametrize("lose_power", [stop_and_start, reset])
def test_power_of_a_tpm_that_is_a_program(host: DaemonProcess, name: str, lose_power: Callable[[Guest], None]) -> None:
    host.create(name, engine="tpm_server")
    nobody_is_locked_out(Guest(host, name), lose_power)


@pytest.mark.parametrize(
    ("name", "signals"), [("simulated-off", (MSSIM_POWER_OFF, MSSIM_POWER_ON)), ("simulated-reset", (MSSIM_RESET,))]
)
def test_power_that_a_client_of_the_simulators_ports_takes(
    host: DaemonProcess, tmp_path: Path, name: str, signals: tuple[int, ...]
) -> None:
    host.create(name)
    simulator = Simulator(host, name, PORTS[name], tmp_path)

    def lose_power(_guest: Guest) -> None:
        for number in signals:
            assert simulator.signal(number) == DONE

    nobody_is_locked_out(Guest(host, name), lose_power)


def reset_of_the_vm(machine: Vmm, control: str) -> Vmm:
    machine.reset()
    return machine


def init_alone(machine: Vmm, control: str) -> Vmm:
    assert machine.ask(vmm.INIT, bytes(4)) == bytes(4)
    return machine


def shut_down_and_start_again(machine: Vmm, control: str) -> Vmm:
    assert machine.ask(vmm.SHUTDOWN) == bytes(4)
    machine.close()
    return started(control)


def stopped_and_shut_down(machine: Vmm, control: str) -> Vmm:
    assert machine.ask(vmm.STOP) == bytes(4)
    return shut_down_and_start_again(machine, control)


def vanish_and_start_again(machine: Vmm, control: str) -> Vmm:
    machine.close()
    return started(control)


def started(control: str) -> Vmm:
    machine = Vmm(control)
    machine.cold_start()
    return machine


@pytest.mark.parametrize(
    "lose_power",
    [reset_of_the_vm, init_alone, shut_down_and_start_again, stopped_and_shut_down, vanish_and_start_again],
)
@pytest.mark.parametrize("asleep", [False, True])
def test_power_that_a_vm_takes(host: DaemonProcess, name: str, asleep: bool, lose_power: Callable[[Vmm, str], Vmm]) -> None:
    control = host.create(name).control_socket
    machine = Vmm(control).boot()
    make_protected(machine.tpm)
    for _ in range(RESETS):
        use_protected(machine.tpm)
        if asleep:
            host.hibernate(name)
        machine = lose_power(machine, control)
        if asleep:
            host.hibernate(name)
        assert raw.rc_of(machine.tpm(startup())) == 0
    assert failed_tries(machine.tpm) == 0
    assert use_protected(machine.tpm) == b"a secret"
    machine.close()


@pytest.mark.parametrize("vanish", [False, True])
def test_power_that_goes_while_no_daemon_runs(own_daemon: DaemonProcess, vanish: bool) -> None:
    control = own_daemon.create("web").control_socket
    machine = Vmm(control).boot()
    make_protected(machine.tpm)
    for _ in range(RESETS):
        use_protected(machine.tpm)
        own_daemon.kill()
        if vanish:
            machine.close()
        else:
            machine.reset()
        own_daemon.start()
        if vanish:
            own_daemon.until("web", pb.OFF)
            machine = started(control)
        assert raw.rc_of(machine.tpm(startup())) == 0
    assert failed_tries(machine.tpm) == 0
    machine.close()


def test_a_store_that_takes_nothing_keeps_no_power_on() -> None:
    with daemon(VTPM_COMMIT_TIMEOUT_S="1") as host:
        pid = host.client.call(host.client.host.GetHost, pb.GetHostRequest()).engine_host_pid
        machine = Vmm(host.create("web").control_socket).boot()
        with contextlib.closing(sqlite3.connect(host.state_dir / "vtpm.db", isolation_level=None)) as blocker:
            blocker.execute("BEGIN EXCLUSIVE")
            machine.close()
            eventually(lambda: not worker_pids(pid))
            blocker.execute("ROLLBACK")
        assert host.until("web", pb.OFF).failure.reason == ""


def test_a_hibernated_tpm_that_can_not_wake_is_stopped_all_the_same(own_daemon: DaemonProcess) -> None:
    instance = own_daemon.running("web")
    own_daemon.hibernate("web")
    with contextlib.closing(sqlite3.connect(own_daemon.state_dir / "vtpm.db", timeout=10)) as store, store:
        assert store.execute("UPDATE snapshots SET blob = zeroblob(length(blob))").rowcount == 1
    Guest(own_daemon, "web").stop()
    assert own_daemon.get("web").state == pb.OFF
    assert "instance.stopped_asleep" in own_daemon.log_text()
    raw.succeed(raw.connect(own_daemon.power_on("web").tpm_socket), raw.pcr_read(0))
    assert own_daemon.get("web").epoch > instance.epoch


# ---- what must not be touched --------------------------------------------------------------------------------------------


def look_at_it(host: DaemonProcess, name: str) -> None:
    """What the service reads meanwhile changes nothing."""
    selections = [tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[PCR])]
    host.client.call(host.client.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance=name, selections=selections))


@pytest.mark.parametrize("asleep", [False, True])
def test_a_vm_that_suspends_to_ram_wakes_with_its_pcrs(host: DaemonProcess, name: str, asleep: bool) -> None:
    machine = Vmm(host.create(name).control_socket).boot()
    machine.tpm(raw.pcr_extend(PCR, b"\x07" * 32))
    before = machine.tpm(raw.pcr_read(PCR))
    assert raw.rc_of(machine.tpm(shutdown(SU_STATE))) == 0
    look_at_it(host, name)
    if asleep:
        host.hibernate(name)
    machine.reset()
    assert raw.rc_of(machine.tpm(startup(SU_STATE))) == 0
    assert machine.tpm(raw.pcr_read(PCR))[-32:] == before[-32:]
    machine.close()


@pytest.mark.parametrize("went_on", [False, True])
def test_a_tpm_that_its_guest_did_not_suspend_never_resumes(host: DaemonProcess, name: str, went_on: bool) -> None:
    machine = Vmm(host.create(name).control_socket).boot()
    if went_on:
        assert raw.rc_of(machine.tpm(shutdown(SU_STATE))) == 0
    machine.tpm(raw.pcr_extend(PCR, b"\x07" * 32))
    machine.reset()
    assert raw.rc_of(machine.tpm(startup(SU_STATE))) == TPM_RC_VALUE_1
    assert raw.rc_of(machine.tpm(startup())) == 0
    assert machine.tpm(raw.pcr_read(PCR))[-32:] == bytes(32)
    machine.close()


# ---- vtpm-swtpm ----------------------------------------------------------------------------------------------------------


class Alone:
    """A guest of vtpm-swtpm, or of swtpm, whose TPM loses power again and again while something protected is used."""

    def __init__(self, program: str, state: Path, *arguments: str) -> None:
        self.program, self.state, self.arguments = program, state, arguments
        self.tpm, self.machine = self.start()

    def start(self) -> tuple[Running, Vmm]:
        self.tpm = Running(self.program, self.state, "--terminate", *self.arguments, server=False)
        self.machine = started(str(self.tpm.control))
        return self.tpm, self.machine

    def ended(self) -> None:
        assert self.tpm.process.wait(10) == 0
        self.start()

    def lose(self, lose_power: Callable[[Alone], None]) -> int:
        """Return the failed tries that the TPM has counted in the end."""
        assert raw.rc_of(self.machine.tpm(startup())) == 0
        make_protected(self.machine.tpm)
        for _ in range(RESETS):
            if failed_tries(self.machine.tpm) < RESETS:
                use_protected(self.machine.tpm)
            lose_power(self)
            assert raw.rc_of(self.machine.tpm(startup())) == 0
        return failed_tries(self.machine.tpm)


def reset_by_the_vm(alone: Alone) -> None:
    alone.machine.reset()


def init_by_the_vm(alone: Alone) -> None:
    init_alone(alone.machine, "")


def shutdown_by_the_vm(alone: Alone) -> None:
    assert alone.machine.ask(vmm.SHUTDOWN) == bytes(4)
    alone.ended()


def a_signal(alone: Alone) -> None:
    alone.tpm.process.terminate()
    alone.ended()


def the_end_of_the_data_connection(alone: Alone) -> None:
    assert alone.machine.data is not None
    alone.machine.data.close()
    alone.ended()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[..., Alone]]:
    """Give the maker of such a guest."""
    made: list[Alone] = []

    def make(program: str, *arguments: str) -> Alone:
        made.append(Alone(program, tmp_path / program, *arguments))
        return made[-1]

    yield make
    for guest in made:
        guest.tpm.process.kill()
        guest.tpm.process.wait()


LOSSES = pytest.mark.parametrize(
    "lose_power", [reset_by_the_vm, init_by_the_vm, shutdown_by_the_vm, a_signal, the_end_of_the_data_connection]
)


@LOSSES
def test_power_that_is_taken_from_vtpm_swtpm(alone: Callable[..., Alone], lose_power: Callable[[Alone], None]) -> None:
    assert alone(OURS).lose(lose_power) == 0


@LOSSES
def test_without_a_shutdown_it_is_as_with_swtpm(alone: Callable[..., Alone], lose_power: Callable[[Alone], None]) -> None:
    assert alone(PLAIN).lose(lose_power) == RESETS
    assert alone(OURS, "--flags", "disable-auto-shutdown").lose(lose_power) == RESETS


@BOTH
def test_a_guest_that_suspends_to_ram_wakes_with_its_pcrs(alone: Callable[..., Alone], program: str) -> None:
    machine = alone(program).machine
    machine.tpm(startup())
    machine.tpm(raw.pcr_extend(PCR, b"\x07" * 32))
    before = machine.tpm(raw.pcr_read(PCR))
    assert raw.rc_of(machine.tpm(shutdown(SU_STATE))) == 0
    machine.reset()
    assert raw.rc_of(machine.tpm(startup(SU_STATE))) == 0
    assert machine.tpm(raw.pcr_read(PCR))[-32:] == before[-32:]
    machine.reset()
    assert raw.rc_of(machine.tpm(startup(SU_STATE))) == TPM_RC_VALUE_1


def test_a_suspended_tpm_is_not_shut_down(tmp_path: Path) -> None:
    with running(OURS, tmp_path, *READY) as tpm, raw.connect(tpm.data) as sock:
        make_protected(lambda command: raw.ask(sock, command))
        raw.succeed(sock, raw.pcr_extend(PCR, b"\x07" * 32))
        before, state = raw.succeed(sock, raw.pcr_read(PCR)), (tmp_path / PERMALL).read_bytes()
        tpm.ioctl("-v")
        tpm.shut_down()
    assert (tmp_path / VOLATILE).exists()
    assert (tmp_path / PERMALL).read_bytes() == state
    with running(OURS, tmp_path, "--flags", "not-need-init") as tpm, raw.connect(tpm.data) as sock:
        assert raw.succeed(sock, raw.pcr_read(PCR)) == before
        assert failed_tries(lambda command: raw.ask(sock, command)) == 0


def test_a_state_that_can_not_be_written_keeps_no_process(tmp_path: Path) -> None:
    with running(OURS, tmp_path / "state", *READY) as tpm:
        shutil.rmtree(tmp_path / "state")
        tpm.process.terminate()
        assert tpm.process.wait(20) == 1
        assert tpm.process.stderr is not None
        assert b"the state can't be written" in tpm.process.stderr.read()


def test_with_the_daemon_the_shutdown_can_not_be_left_out(tmp_path: Path) -> None:
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "disable-auto-shutdown"]
    command += ["--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"]
    environment = os.environ | {"VTPM_SWTPM_USE_DAEMON": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=20)
    assert ran.returncode == 1
    assert b"disable-auto-shutdown is not possible with the daemon" in ran.stderr
