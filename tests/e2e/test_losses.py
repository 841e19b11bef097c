"""What a VM notices of a daemon or a QEMU that is killed; through tpm-tis."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.e2e.conftest import SECRET, away
from tests.support import vmguest
from tests.support.daemon import DaemonProcess
from tests.support.vm import BOOT_TIMEOUT_S, Vm
from tests.support.vmpeers import OurTpm, Peer
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError
from vtpm.tpm.eventlog import parse_event_log, replay
from vtpm.tpm.pcr import PcrBank

ROUNDS = 40


@pytest.fixture(scope="module")
def interface() -> str:
    return "tpm-tis"


def is_whole(vm: Vm, tpm: Peer, at_boot: dict[int, bytes]) -> None:
    values = vmguest.pcrs(vm)
    assert {index: values[index] for index in vmguest.BOOT_PCRS} == at_boot
    assert replay(parse_event_log(vmguest.event_log(vm)), PcrBank.SHA256) == at_boot
    opened = vmguest.unseal(vm)
    assert (opened.status, opened.out) == (0, SECRET.encode()), opened.err
    if isinstance(tpm, OurTpm):
        assert tpm.pcrs() == values


def until_measured(service: OurTpm, index: int, *, is_so: bool = True) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        measured = False
        # Refused until the firmware has sent TPM2_Startup.
        with contextlib.suppress(VtpmError):
            measured = any(service.pcrs()[index])
        if measured is is_so:
            return
        time.sleep(0.01)
    raise AssertionError(f"PCR {index} is {'never' if is_so else 'still'} extended")


def test_a_killed_qemu_leaves_its_instance_off_and_boots_again(vm: Vm, tpm: Peer, at_boot: dict[int, bytes]) -> None:
    vmguest.extend(vm, 8)
    vm.kill()
    if isinstance(tpm, OurTpm):
        tpm.until(pb.OFF)
    vm.boot()
    is_whole(vm, tpm, at_boot)
    assert vmguest.pcrs(vm)[8] == bytes(32)


def test_a_boot_during_which_the_daemon_is_killed(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    vmguest.extend(vm, 8)
    vm.qmp.execute("system_reset")
    until_measured(service, 8, is_so=False)
    # First the firmware measures itself, then its settings, then the initramfs.
    for index in (0, 7, 9):
        until_measured(service, index)
        with away(daemon):
            pass
    vm.wait_until_ready()
    is_whole(vm, service, at_boot)


def test_a_daemon_that_is_away_when_a_boot_begins(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    with away(daemon):
        vm.qmp.execute("system_reset")
        time.sleep(1)
    vm.wait_until_ready()
    is_whole(vm, service, at_boot)


def test_quotes_go_on_while_the_daemon_is_killed_and_another_stopped(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    vm.run("tpm2 createprimary -Q -C o -G ecc -c primary; tpm2 create -Q -C primary -G ecc:ecdsa -u ak.pub -r ak.priv -c ak")
    vm.begin(
        f"""
        for number in $(seq {ROUNDS}); do
            tpm2 quote -Q -c ak -l sha256:0,7 -q 00 -m attest -s signature
            tpm2 verifysignature -Q -c ak -g sha256 -m attest -s signature
            echo "$number"
        done
        """
    )
    for end in (daemon.kill, daemon.stop):
        time.sleep(0.5)
        end()
        time.sleep(0.5)
        daemon.start()
    ran = vm.result()
    assert (ran.status, ran.out.split()) == (0, [str(number).encode() for number in range(1, ROUNDS + 1)]), ran.err
    is_whole(vm, service, at_boot)


def test_a_lost_tpm_is_not_replaced_until_the_vm_starts_anew(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    """Invariants 1, 2 and 7: fresh PCRs under a running guest would let it forge its boot; what was acknowledged is there."""
    vmguest.write_nv(vm, "acknowledged")
    os.kill(daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid, signal.SIGKILL)
    failed = service.until(pb.FAILED)
    assert failed.failure.reason in ("ENGINE_HOST_LOST", "WORKER_LOST")
    assert vm.attempt("tpm2 pcrread sha256:0").status != 0
    assert vm.attempt("tpm2 pcrread sha256:0").status != 0
    vm.kill()
    vm.boot()
    is_whole(vm, service, at_boot)
    assert vmguest.read_nv(vm) == "acknowledged"
