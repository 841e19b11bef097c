"""A real VM whose TPM hibernates whenever it is idle, and whose daemon dies again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import SECRET
from tests.support import vmguest
from tests.support.daemon import DaemonProcess
from tests.support.vm import Vm
from tests.support.vmassets import Assets
from tests.support.vmpeers import OurTpm
from tests.support.waiting import eventually
from vtpm.api.v1 import tpm_pb2

KILLS = 50
# Of the PCRs that nothing at boot is measured into.
SIGN = 23


@pytest.fixture(scope="module")
def daemon(assets: Assets) -> Iterator[DaemonProcess]:
    """A daemon whose instances sleep after half a second."""
    with DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0.5"}) as process:
        yield process


def until_asleep(daemon: DaemonProcess, service: OurTpm) -> None:
    deadline = time.monotonic() + 30
    while not daemon.get(service.name).hibernated:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_whole(vm: Vm, at_boot: dict[int, bytes]) -> None:
    values = vmguest.pcrs(vm)
    assert {index: values[index] for index in vmguest.BOOT_PCRS} == at_boot
    opened = vmguest.unseal(vm)
    assert (opened.status, opened.out) == (0, SECRET.encode()), opened.err


def test_an_idle_vms_tpm_sleeps_and_the_vm_does_not_notice(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    until_asleep(daemon, service)
    is_whole(vm, at_boot)
    vmguest.write_nv(vm, "written between two naps")
    until_asleep(daemon, service)
    assert vmguest.read_nv(vm) == "written between two naps"


def test_a_reboot_wakes_it(vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]) -> None:
    vmguest.extend(vm, 8)
    until_asleep(daemon, service)
    vm.reset()
    is_whole(vm, at_boot)
    assert vmguest.pcrs(vm)[8] == bytes(32)


def test_suspended_and_asleep(vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]) -> None:
    vmguest.extend(vm, 8)
    extended = vmguest.pcrs(vm)[8]
    vm.pause()
    until_asleep(daemon, service)
    vm.go_on()
    assert vmguest.pcrs(vm)[8] == extended
    is_whole(vm, at_boot)


def test_quotes_go_on_through_fifty_deaths_of_the_daemon(
    vm: Vm, service: OurTpm, daemon: DaemonProcess, at_boot: dict[int, bytes]
) -> None:
    vm.run("tpm2 createprimary -Q -C o -G ecc -c primary; tpm2 create -Q -C primary -G ecc:ecdsa -u ak.pub -r ak.priv -c ak")
    vm.begin(
        f"""
        number=0
        while tpm2 pcrread sha256:{SIGN} | grep -q '0x0*$'; do
            tpm2 quote -Q -c ak -l sha256:0,7 -q 00 -m attest -s signature
            tpm2 verifysignature -Q -c ak -g sha256 -m attest -s signature
            number=$((number + 1))
            # Long enough to fall asleep now and then.
            [ $((number % 5)) != 0 ] || sleep 1
        done
        echo "$number"
        """
    )
    for number in range(KILLS):
        daemon.kill()
        daemon.start()
        if number % 2:
            # The VM's kernel gives a command up after a while: every other daemon lives long enough for a TPM that has to wake.
            eventually(lambda: not daemon.get(service.name).hibernated, 60)
    request = tpm_pb2.MeasureRequest(instance=service.name, pcr=SIGN, data=b"that is all")
    daemon.client.call(daemon.client.tpm.Measure, request)
    ran = vm.result(120)
    assert ran.status == 0, ran.err
    assert int(ran.out) >= KILLS / 2
    is_whole(vm, at_boot)
