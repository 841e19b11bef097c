"""Secure Boot: a signed UKI, verified by the firmware and measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.support import vmguest
from tests.support.vm import Vm
from tests.support.vmassets import COMMAND_LINE, RELEASE, Assets
from tests.support.vmpeers import OurTpm, Peer
from vtpm.tpm.eventlog import parse_event_log, replay
from vtpm.tpm.pcr import PcrBank, extend


@pytest.fixture(scope="module")
def vm(assets: Assets, tpm: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """A VM whose firmware boots only what is signed."""
    with Vm(assets, tpm, tmp_path_factory.mktemp("vm"), secure_boot=True) as machine:
        yield machine.boot()


def test_the_firmware_verified_what_it_booted(vm: Vm) -> None:
    assert vm.run("tail -c1 /sys/firmware/efi/efivars/SecureBoot-*") == b"\x01"
    assert b"[integrity]" in vm.run("cat /sys/kernel/security/lockdown")


def test_the_log_says_so_and_replays(vm: Vm, tpm: Peer) -> None:
    events = parse_event_log(vmguest.event_log(vm))
    values = vmguest.pcrs(vm)
    replayed = replay(events, PcrBank.SHA256)
    assert replayed == {index: values[index] for index in replayed}
    secure_boot = [event.data for event in events if event.pcr == 7 and "SecureBoot".encode("utf-16-le") in event.data]
    assert [data[-1] for data in secure_boot] == [1]
    if isinstance(tpm, OurTpm):
        assert tpm.pcrs() == values


def test_pcr_11_is_what_the_uki_says(vm: Vm, assets: Assets) -> None:
    sections = {
        ".linux": assets.kernel.read_bytes(),
        ".osrel": RELEASE.encode(),
        ".cmdline": COMMAND_LINE.encode(),
        ".initrd": assets.initrd.read_bytes(),
    }
    value = bytes(32)
    for name, data in sections.items():
        for part in (name.encode() + b"\0", data):
            value = extend(PcrBank.SHA256, value, hashlib.sha256(part).digest())
    assert vmguest.pcrs(vm)[11] == value
