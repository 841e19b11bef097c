"""Real boots: their logs are read and predicted, and a boot that was altered is explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeTpm
from tests.support import vmguest
from tests.support.vm import Vm
from tests.support.vmassets import COMMAND_LINE, Assets
from vtpm.eventlog.bootpath import boot_path
from vtpm.eventlog.checks import check_log
from vtpm.eventlog.differences import Change, Subject
from vtpm.eventlog.explain import RegisterDifference, explain, explain_reference
from vtpm.eventlog.findings import Severity
from vtpm.eventlog.hashes import SHA256
from vtpm.eventlog.predict import predict_kernel, predict_uki
from vtpm.eventlog.reference import parse_reference
from vtpm.eventlog.replay import replay
from vtpm.eventlog.secureboot import secure_boot
from vtpm.eventlog.tcg import read_tcg
from vtpm.eventlog.values import UnverifiedLog
from vtpm.tpm.pcr import PcrBank, extend

OTHER_LINE = f"{COMMAND_LINE} init=/init"


@dataclasses.dataclass(frozen=True)
class Booted:
    """A boot: its log, and the PCRs that the guest read after it."""

    log: UnverifiedLog
    pcrs: dict[int, bytes]


class Boots:
    """Boots VMs one after the other, each with a TPM of its own and the firmware's variables as they come."""

    def __init__(self, assets: Assets, make_tpm: MakeTpm, directory: Path) -> None:
        self.assets, self._make_tpm, self.directory = assets, make_tpm, directory
        self._count = 0

    def boot(
        self, *, initrd: Path | None = None, command_line: str = COMMAND_LINE, signed: bool = False, extended: int | None = None
    ) -> Booted:
        self._count += 1
        assets = dataclasses.replace(self.assets, initrd=initrd or self.assets.initrd)
        directory = self.directory / str(self._count)
        with Vm(assets, self._make_tpm(), directory, secure_boot=signed, command_line=command_line) as vm:
            vm.boot()
            if extended is not None:
                vmguest.extend(vm, extended)
            return Booted(read_tcg(vmguest.event_log(vm)), vmguest.pcrs(vm))


@pytest.fixture(scope="module")
def boots(assets: Assets, make_tpm: MakeTpm, tmp_path_factory: pytest.TempPathFactory) -> Boots:
    """What boots VMs."""
    return Boots(assets, make_tpm, tmp_path_factory.mktemp("boots"))


@pytest.fixture(scope="module")
def good(boots: Boots) -> Booted:
    """The boot that others are compared with."""
    return boots.boot()


@pytest.fixture(scope="module")
def signed(boots: Boots) -> Booted:
    """A boot of the signed UKI with Secure Boot."""
    return boots.boot(signed=True)


def replays(booted: Booted) -> None:
    values = replay(booted.log, SHA256).values
    assert values == {index: booted.pcrs[index] for index in values}
    found = [*booted.log.findings, *check_log(booted.log)]
    assert not [str(item) for item in found if item.kind.severity is not Severity.INFO]


def test_the_log_of_a_kernel_that_the_firmware_was_given_is_read(good: Booted) -> None:
    replays(good)
    path = boot_path(good.log, SHA256)
    assert "Linux" in path.loaders
    assert path.exit_boot_services
    assert secure_boot(good.log, SHA256).enabled is False


def test_the_pcrs_of_a_kernel_are_predicted(good: Booted, boots: Boots) -> None:
    kernel, initrd = boots.assets.kernel.read_bytes(), boots.assets.initrd.read_bytes()
    based = predict_kernel(kernel, initrd, COMMAND_LINE, SHA256, good.log).values
    assert based == {index: good.pcrs[index] for index in based}
    assert set(based) == set(vmguest.BOOT_PCRS) - {4}, "QEMU changes the kernel that it gives to the firmware"


def test_the_log_of_a_signed_uki_is_read(signed: Booted) -> None:
    replays(signed)
    path = boot_path(signed.log, SHA256)
    assert "UKI" in path.loaders
    assert path.exit_boot_services
    state = secure_boot(signed.log, SHA256)
    assert state.enabled is True
    assert state.databases["db"]
    assert state.after


def test_the_pcrs_of_a_uki_are_predicted(signed: Booted, boots: Boots) -> None:
    uki = (boots.assets.esp / "EFI" / "BOOT" / "BOOTX64.EFI").read_bytes()
    assert predict_uki(uki, SHA256).values == {11: signed.pcrs[11]}
    based = predict_uki(uki, SHA256, signed.log).values
    assert based == {index: signed.pcrs[index] for index in based}
    assert {4, 7, 11} <= set(based)


def only(found: tuple[RegisterDifference, ...], register: int) -> RegisterDifference:
    (one,) = [item for item in found if item.register == register]
    return one


def test_another_command_line_is_named_and_was_to_be_predicted(good: Booted, boots: Boots) -> None:
    other = boots.boot(command_line=OTHER_LINE)
    found = only(explain(other.log, good.log, SHA256), 9)
    (difference,) = found.differences
    assert (difference.change, difference.subject) == (Change.CHANGED, Subject.COMMAND_LINE)
    assert difference.without == good.pcrs[9]
    kernel, initrd = boots.assets.kernel.read_bytes(), boots.assets.initrd.read_bytes()
    assert predict_kernel(kernel, initrd, OTHER_LINE, SHA256, good.log).values[9] == other.pcrs[9]


def test_another_initrd_is_named_and_was_to_be_predicted(good: Booted, boots: Boots, tmp_path: Path) -> None:
    changed = tmp_path / "initrd"
    changed.write_bytes(boots.assets.initrd.read_bytes() + bytes(512))
    other = boots.boot(initrd=changed)
    found = only(explain(other.log, good.log, SHA256), 9)
    (difference,) = found.differences
    assert (difference.change, difference.subject) == (Change.CHANGED, Subject.INITRD)
    assert difference.without == good.pcrs[9]
    predicted = predict_kernel(boots.assets.kernel.read_bytes(), changed.read_bytes(), COMMAND_LINE, SHA256, good.log)
    assert predicted.values[9] == other.pcrs[9]


def test_a_register_that_the_guest_extended_later_is_not_what_its_log_leads_to(boots: Boots) -> None:
    booted = boots.boot(extended=9)
    quoted = parse_reference({"pcrs": {"sha256": {index: booted.pcrs[index].hex() for index in vmguest.BOOT_PCRS}}})
    (found,) = explain_reference(booted.log, quoted, SHA256)
    assert (found.register, found.differences, found.explained) == (9, (), False)
    assert extend(PcrBank.SHA256, found.value or b"", b"\x11" * 32) == booted.pcrs[9]


def test_another_binary_is_named(good: Booted, signed: Booted) -> None:
    found = only(explain(good.log, signed.log, SHA256), 4)
    assert Subject.BINARY in {difference.subject for difference in found.differences}
    assert any("BOOTX64.EFI" in difference.text for difference in found.differences)


def test_secure_boot_that_is_off_is_named(good: Booted, signed: Booted) -> None:
    found = only(explain(good.log, signed.log, SHA256), 7)
    said = {difference.text for difference in found.differences if difference.subject is Subject.VARIABLE}
    assert any("SecureBoot" in text for text in said)
    assert any(difference.subject is Subject.AUTHORITY for difference in found.differences)
