"""Which data a digest proves, and every known way of hashing something else."""

from __future__ import annotations

import pytest

from tests.support.eventlogs import (
    BANK,
    action,
    authority,
    boot,
    driver_config,
    file_path,
    image,
    names,
    read,
    record,
    separator,
    tagged,
    variable,
)
from vtpm.eventlog.checks import DEVIATIONS, Proof, check_log, is_proven, proof_of
from vtpm.eventlog.findings import KINDS, Findings
from vtpm.eventlog.types import EventType
from vtpm.eventlog.uefi import SHIM_LOCK
from vtpm.tpm.pcr import PcrBank

BOOT0 = variable("Boot0000", b"a boot option")
ENTRY = variable("db", b"c")
WIDE = "root=/dev/vda1".encode("utf-16-le")
BOTH = (PcrBank.SHA256, PcrBank.SHA384)


@pytest.mark.parametrize(
    ("event_type", "data", "measured", "proof", "finding"),
    [
        (EventType.EV_EFI_VARIABLE_BOOT, BOOT0, None, Proof.DATA, None),
        (EventType.EV_EFI_VARIABLE_BOOT, BOOT0, b"a boot option", Proof.VALUE, "VARIABLE_VALUE_HASHED"),
        (EventType.EV_EFI_VARIABLE_BOOT, BOOT0, b"another", Proof.WRONG, "DIGEST_NOT_OF_DATA"),
        (EventType.EV_EFI_VARIABLE_AUTHORITY, variable("db", b"cert"), b"cert", Proof.VALUE, "AUTHORITY_VALUE_HASHED"),
        (EventType.EV_EFI_VARIABLE_AUTHORITY, ENTRY + b"!", ENTRY, Proof.PART, "AUTHORITY_ONE_BYTE_MORE"),
        (EventType.EV_IPL, b"grub_cmd: set x=1\0", b"set x=1", Proof.PART, "TEXT_AFTER_PREFIX"),
        (EventType.EV_IPL, b"grub_cmd set x=1\0", b"set x=1", Proof.PART, "TEXT_AFTER_PREFIX"),
        (EventType.EV_IPL, b"kernel_cmdline: /vmlinuz ro\0", b"/vmlinuz ro", Proof.PART, "TEXT_AFTER_PREFIX"),
        (EventType.EV_IPL, b"grub_cmd set x=1\0!", b"set x=1", Proof.PART, "TEXT_ONE_BYTE_MORE"),
        (EventType.EV_IPL, ".linux".encode("utf-16-le") + b"\0\0", b".linux\0", Proof.PART, "SECTION_NAME_HASHED"),
        (EventType.EV_IPL, WIDE + b"\0\0", WIDE, Proof.PART, "TEXT_WITHOUT_NUL"),
        (EventType.EV_IPL, b"/boot/vmlinuz\0", b"the kernel's bytes", Proof.ELSEWHERE, None),
        (EventType.EV_EVENT_TAG, b"\1\0\0\0\x03\0\0\0abc", b"abc", Proof.PART, "TAG_CONTENT_HASHED"),
        (EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB, bytes(16), b"firmware", Proof.ELSEWHERE, None),
        (EventType.EV_EFI_BOOT_SERVICES_APPLICATION, bytes(32), bytes(32), Proof.ELSEWHERE, None),
        (EventType.EV_SEPARATOR, b"\0\0\0\0", b"x", Proof.WRONG, "DIGEST_NOT_OF_DATA"),
        (0x77777777, b"x", None, Proof.ELSEWHERE, None),
    ],
)  # fmt: skip
def test_a_digest_proves_what_it_was_made_of(
    event_type: int, data: bytes, measured: bytes | None, proof: Proof, finding: str | None
) -> None:
    (event,) = read(record(7, event_type, data, measured)).events[1:]
    found, kind = proof_of(event, BANK)
    assert (found, kind.name if kind else None) == (proof, finding)
    assert is_proven(event, BANK) == (proof in {Proof.DATA, Proof.VALUE, Proof.PART})


def test_without_the_bank_nothing_is_proven() -> None:
    (event,) = read(separator(7)).events[1:]
    assert proof_of(event, PcrBank.SHA512.alg_id)[0] is proof_of(event, 0x99)[0] is Proof.UNKNOWN


def test_a_good_boot_has_no_finding_but_empty_variables() -> None:
    assert names(check_log(boot())) == {"VARIABLE_EMPTY"}


@pytest.mark.parametrize(
    ("events", "finding"),
    [
        ([separator(7), separator(7)], "SEPARATOR_REPEATED"),
        ([separator(7, b"\1\0\0\0")], "SEPARATOR_ERROR"),
        ([separator(7, b"what")], "SEPARATOR_VALUE"),
        ([record(7, EventType.EV_POST_CODE, b"\0\0\0\0")], "SEPARATOR_LOOKALIKE"),
        ([driver_config("SecureBoot", b"\1")], "SEPARATOR_MISSING"),
        ([image(file_path("x.efi"), b"x"), separator(4)], "EXIT_BOOT_SERVICES_MISSING"),
        ([record(7, 0x77777777, b"x")], "EVENT_TYPE_UNKNOWN"),
        ([record(7, 4, b"x", digests={PcrBank.SHA256: bytes(32)})], "DIGEST_EMPTY"),
        ([driver_config("PK", b"")], "VARIABLE_EMPTY"),
    ],
)
def test_what_is_odd_is_a_finding(events: list[bytes], finding: str) -> None:
    assert finding in names(check_log(read(*events)))


def test_banks_that_were_measured_from_different_bytes_are_a_finding() -> None:
    made = record(4, EventType.EV_EFI_ACTION, b"said", banks=BOTH)
    other = record(4, EventType.EV_EFI_ACTION, b"done", banks=BOTH)
    mixed = made[: 12 + 2 + 32] + other[12 + 2 + 32 : -4] + b"said"
    assert "DIGESTS_DISAGREE" in names(check_log(read(mixed, banks=BOTH)))
    assert "DIGESTS_DISAGREE" not in names(check_log(read(made, banks=BOTH)))


def test_of_one_kind_of_finding_a_bounded_number_is_kept_and_the_rest_is_counted() -> None:
    found = Findings()
    for number in range(1000):
        found.add(KINDS[0], "again", number)
    kept = found.all()
    assert len(kept) == 65
    assert "1000 in all" in kept[-1].detail


def test_every_deviation_is_a_finding_of_the_table_with_a_meaning() -> None:
    assert {row.kind for row in DEVIATIONS} <= set(KINDS)
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.meaning.endswith(".") and kind.sample for kind in KINDS)


def test_an_authority_of_shim_is_proven_with_its_name() -> None:
    (event,) = read(authority("SbatLevel", b"sbat,1,2021030218\n", SHIM_LOCK)).events[1:]
    assert proof_of(event, BANK) == (Proof.DATA, None)
    assert proof_of(read(action("x")).events[1], BANK) == (Proof.DATA, None)
    assert proof_of(read(tagged(9, 1, b"x", b"elsewhere")).events[1], BANK)[0] is Proof.ELSEWHERE
