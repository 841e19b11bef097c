"""Everything that a running VM does to its TPM: reset, reboot, sleep, pause, power off."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import SECRET
from tests.support import vmguest
from tests.support.vm import Vm
from tests.support.vmpeers import OurTpm, Peer
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError


def is_as_at_first_boot(vm: Vm, at_boot: dict[int, bytes]) -> None:
    assert vmguest.boot_pcrs(vm) == at_boot
    opened = vmguest.unseal(vm)
    assert (opened.status, opened.out) == (0, SECRET.encode()), opened.err


def test_a_sealed_object_stays_shut_once_a_pcr_is_extended_and_a_reset_brings_it_back(
    vm: Vm, at_boot: dict[int, bytes]
) -> None:
    is_as_at_first_boot(vm, at_boot)
    before = vmguest.clock(vm)
    vmguest.extend(vm, 7)
    shut = vmguest.unseal(vm)
    assert shut.status != 0
    assert SECRET.encode() not in shut.out
    vm.reset()
    is_as_at_first_boot(vm, at_boot)
    assert vmguest.clock(vm).reset_count == before.reset_count + 1


def test_a_reboot_by_the_guest(vm: Vm, at_boot: dict[int, bytes]) -> None:
    before = vmguest.clock(vm)
    vmguest.extend(vm, 8)
    vm.reboot()
    is_as_at_first_boot(vm, at_boot)
    assert vmguest.pcrs(vm)[8] == bytes(32)
    assert vmguest.clock(vm).reset_count == before.reset_count + 1


def test_pcrs_survive_sleep(vm: Vm, tpm: Peer, at_boot: dict[int, bytes]) -> None:
    vmguest.extend(vm, 8)
    values, before = vmguest.pcrs(vm), vmguest.clock(vm)
    vm.suspend()
    slept = vm.wake()
    assert slept.status == 0, slept.err
    # TPM2_Startup(STATE): what was measured is kept; PCR 16 and 23 are for debugging and applications, and are not.
    kept = set(range(24)) - {16, 23}
    after = vmguest.pcrs(vm)
    assert {index: after[index] for index in kept} == {index: values[index] for index in kept}
    assert vmguest.clock(vm) == vmguest.Clock(before.reset_count, before.restart_count + 1)
    assert vmguest.unseal(vm).out == SECRET.encode()
    if isinstance(tpm, OurTpm):
        assert tpm.pcrs() == after


def test_a_paused_vm_goes_on(vm: Vm, tpm: Peer, at_boot: dict[int, bytes]) -> None:
    values = vmguest.pcrs(vm)
    vm.begin("for i in 1 2 3 4 5 6 7 8; do tpm2 getrandom --hex 16; done")
    vm.pause()
    if isinstance(tpm, OurTpm):
        assert tpm.pcrs() == values, "the service does not need the guest's processor"
    vm.go_on()
    assert len(vm.result().out) == 8 * 32
    assert vmguest.pcrs(vm) == values


def test_the_service_quotes_while_the_vm_boots(vm: Vm, service: OurTpm, at_boot: dict[int, bytes]) -> None:
    """Between the firmware's commands, without the firmware or the kernel seeing anything of it."""
    booted = threading.Event()

    def quote_on() -> int:
        count = 0
        while not booted.wait(0.02):
            # Until the firmware has sent TPM2_Startup there is nothing to quote.
            with contextlib.suppress(VtpmError):
                service.quote(b"while it boots", [0])
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        quotes = pool.submit(quote_on)
        try:
            vm.reset()
        finally:
            booted.set()
        assert quotes.result() > 10
    is_as_at_first_boot(vm, at_boot)
    for left in ("handles-transient", "handles-loaded-session"):
        assert vm.run(f"tpm2 getcap -T device:/dev/tpm0 {left}") == b""


def test_off_and_on(vm: Vm, tpm: Peer, at_boot: dict[int, bytes]) -> None:
    vm.power_off()
    if isinstance(tpm, OurTpm):
        tpm.until(pb.OFF)
    vm.boot()
    if isinstance(tpm, OurTpm):
        assert tpm.instance.state == pb.ON
    is_as_at_first_boot(vm, at_boot)
