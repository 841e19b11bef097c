"""PE images are hashed as the firmware hashes them, and the next boot's PCRs are computed from what will be booted."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.eventlogs import (
    BANK,
    GOOD_LINE,
    LINUX_INITRD,
    LINUX_OPTIONS,
    action,
    driver_config,
    file_path,
    image,
    pe_image,
    read,
    record,
    separator,
    sha256,
    tagged,
)
from vtpm.errors import InvalidArgumentError
from vtpm.eventlog.devicepath import QEMU_KERNEL_LOADER
from vtpm.eventlog.hashes import SHA384
from vtpm.eventlog.pe import parse_pe
from vtpm.eventlog.predict import predict_kernel, predict_uki
from vtpm.eventlog.replay import replay
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import UnverifiedLog
from vtpm.tpm.pcr import PcrBank, extend

TEXT, DATA = b"code" * 200, b"data" * 50
KERNEL = pe_image({".text": b"the kernel" * 99})
UKI = pe_image(
    {".text": TEXT, ".linux": KERNEL, ".osrel": b"ID=x\n", ".cmdline": GOOD_LINE.encode(), ".initrd": b"cpio", ".pcrsig": b"{}"}
)


def authenticode_by_hand(whole: bytes) -> bytes:
    """The hash of an image of `pe_image`: all but the checksum at 88 + 64 and the certificates' directory entry."""
    optional = 64 + 24
    checksum, entry = optional + 64, optional + 112 + 4 * 8
    size = struct.unpack_from("<I", whole, entry + 4)[0]
    return sha256(whole[:checksum] + whole[checksum + 4 : entry] + whole[entry + 8 : len(whole) - size])


def chain(parts: Sequence[bytes], start: bytes = bytes(32)) -> bytes:
    for part in parts:
        start = extend(PcrBank.SHA256, start, sha256(part))
    return start


# ---- PE ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whole",
    [
        pe_image({".text": TEXT, ".data": DATA}),
        pe_image({".text": TEXT, ".data": DATA}, signature=b"PKCS#7 !" * 20),
        pe_image({".text": TEXT}, tail=b"overlay " * 4),
        pe_image({".text": TEXT}, tail=b"overlay " * 4, signature=b"PKCS#7 !" * 3),
        pe_image({}),
    ],
    ids=["plain", "signed", "with a tail", "signed with a tail", "empty"],
)
def test_an_image_is_hashed_without_its_checksum_and_signatures(whole: bytes) -> None:
    assert parse_pe(whole).authenticode(BANK) == authenticode_by_hand(whole)
    assert len(parse_pe(whole).authenticode(SHA384)) == 48


def test_signing_an_image_does_not_change_its_hash_and_anything_else_does() -> None:
    plain = pe_image({".text": TEXT})
    signed = pe_image({".text": TEXT}, signature=b"PKCS#7 !" * 20)
    assert parse_pe(plain).authenticode(BANK) == parse_pe(signed).authenticode(BANK)
    assert parse_pe(plain).authenticode(BANK) != parse_pe(pe_image({".text": TEXT[:-1] + b"!"})).authenticode(BANK)
    assert parse_pe(plain).authenticode(BANK) != parse_pe(pe_image({".text": TEXT}, tail=b"appended")).authenticode(BANK)


def test_sections_are_read_as_they_are_in_memory() -> None:
    made = parse_pe(UKI)
    assert made.section(".linux") == KERNEL
    assert made.section(".cmdline") == GOOD_LINE.encode()
    assert made.section(".none") is None


def reason(data: bytes) -> str:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_pe(data)
    return refused.value.reason


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"ZM"),
        (0x3C, struct.pack("<I", 0xFFFFFFF0)),
        (64, b"PX"),
        (64 + 6, struct.pack("<H", 0xFFFF)),
        (64 + 20, struct.pack("<H", 0xFFFF)),
        (64 + 20, struct.pack("<H", 2)),
        (88, struct.pack("<H", 0x999)),
        (88 + 60, struct.pack("<I", 0xFFFFFFFF)),
        (88 + 60, struct.pack("<I", 1)),
        (88 + 112 + 4 * 8, struct.pack("<II", 0x400, 0xFFFFFFFF)),
        (88 + 112 + 4 * 8, struct.pack("<II", 0x400, 8)),
        (88 + 240 + 16, struct.pack("<II", 0xFFFFFFFF, 0x400)),
        (88 + 240 + 16, struct.pack("<II", 0x400, 0xFFFFFFF0)),
    ],
)
def test_an_image_whose_sizes_lie_is_refused_by_name(place: int, value: bytes) -> None:
    whole = bytearray(pe_image({".text": TEXT}))
    whole[place : place + len(value)] = value
    assert reason(bytes(whole)) == "PE_INVALID"


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, 0x500), value=st.binary(min_size=1, max_size=8), cut=st.integers(0, 3000))
def test_an_image_with_anything_changed_is_read_or_refused_by_name(place: int, value: bytes, cut: int) -> None:
    whole = bytearray(pe_image({".text": TEXT, ".linux": b"x"}, signature=b"8 bytes."))
    whole[place : place + len(value)] = value
    said = "PE_INVALID"
    try:
        made = parse_pe(bytes(whole)[: len(whole) - cut])
        made.authenticode(BANK)
        made.section(".linux")
    except InvalidArgumentError as error:
        said = error.reason
    assert said == "PE_INVALID"


def test_a_section_that_is_huge_in_memory_alone_is_refused() -> None:
    whole = bytearray(pe_image({".linux": b"x"}))
    struct.pack_into("<I", whole, 88 + 240 + 8, 0xFFFFFFFF)
    with pytest.raises(InvalidArgumentError, match="in memory"):
        parse_pe(bytes(whole)).section(".linux")


# ---- predictions ------------------------------------------------------------------------------------------------------------


def test_pcr_11_of_a_uki_is_the_chain_of_its_sections_names_and_contents() -> None:
    made = predict_uki(UKI, BANK)
    parts = [(".linux", KERNEL), (".osrel", b"ID=x\n"), (".cmdline", GOOD_LINE.encode()), (".initrd", b"cpio")]
    expected = chain([item for name, content in parts for item in (name.encode() + b"\0", content)])
    assert made.values == {11: expected}
    assert [event.text for event in made.events] == [name for name, _ in parts for _ in range(2)]
    assert made.assumptions


def test_a_section_counts_since_the_stub_that_measures_it() -> None:
    def of(version: bytes) -> set[str]:
        magic = b"#### LoaderInfo: systemd-stub " + version + b" ####\0"
        return {event.text for event in predict_uki(pe_image({".sdmagic": magic, ".linux": b"k", ".sbat": b"s"}), BANK).events}

    assert of(b"252.39-1~deb12u2") == {".linux"}
    assert of(b"255") == of(b"unknown") == {".linux", ".sbat"}


def test_the_kernel_that_qemu_was_given_changes_on_its_way() -> None:
    loader = uuid.UUID(QEMU_KERNEL_LOADER).bytes_le
    path = struct.pack("<BBH", 4, 3, 20) + loader + file_path("kernel")
    base = read(
        image(path, b"changed"), separator(4), tagged(9, LINUX_OPTIONS, b"L\0", b"old"), tagged(9, LINUX_INITRD, b"i\0", b"old")
    )
    made = predict_kernel(KERNEL, b"initrd", "quiet", BANK, base)
    line = "quiet initrd=initrd".encode("utf-16-le") + b"\0\0"
    assert made.values == {9: chain([line, b"initrd"])}
    assert any("QEMU" in assumption for assumption in made.assumptions)


def uki_boot(uki: bytes, *, inner: bool) -> UnverifiedLog:
    """A boot of a UKI as OVMF and systemd-stub log one."""
    whole = parse_pe(uki)
    sections = []
    for name in (".linux", ".osrel", ".cmdline", ".initrd"):
        content = whole.section(name)
        assert content is not None
        label = name.encode("utf-16-le") + b"\0\0"
        sections += [record(11, EventType.EV_IPL, label, name.encode() + b"\0"), record(11, EventType.EV_IPL, label, content)]
    kernel = whole.section(".linux")
    assert kernel is not None
    digest = {PcrBank.SHA256: parse_pe(kernel).authenticode(BANK)}
    memory = struct.pack("<QQQQ", 0, 1, 0, 0)
    return read(
        driver_config("SecureBoot", b"\1"),
        separator(7),
        action("Calling EFI Application from Boot Option"),
        separator(4),
        record(
            4,
            EventType.EV_EFI_BOOT_SERVICES_APPLICATION,
            struct.pack("<QQQQ", 0, 1, 0, len(file_path("\\u.efi"))) + file_path("\\u.efi"),
            digests={PcrBank.SHA256: whole.authenticode(BANK)},
        ),
        *sections,
        *([record(4, EventType.EV_EFI_BOOT_SERVICES_APPLICATION, memory, digests=digest)] if inner else []),
        action("Exit Boot Services Invocation", 5),
    )


@pytest.mark.parametrize("inner", [False, True])
def test_a_uki_is_predicted_from_the_log_of_another_uki(inner: bool) -> None:
    other = pe_image(
        {".text": b"old", ".linux": pe_image({".text": b"older"}), ".osrel": b"", ".cmdline": b"x", ".initrd": b"y"}
    )
    made = predict_uki(UKI, BANK, uki_boot(other, inner=inner))
    real = replay(uki_boot(UKI, inner=inner), BANK).values
    assert made.values == real
    assert {event.register for event in made.events if event.predicted} == {4, 11}


def kernel_boot(kernel: bytes, initrd: bytes, line: str) -> UnverifiedLog:
    digest = {PcrBank.SHA256: parse_pe(kernel).authenticode(BANK)}
    path = file_path("\\vmlinuz.efi")
    started = struct.pack("<QQQQ", 0, 1, 0, len(path)) + path
    return read(
        driver_config("SecureBoot", b"\0"),
        separator(7),
        action("Calling EFI Application from Boot Option"),
        separator(4),
        record(4, EventType.EV_EFI_BOOT_SERVICES_APPLICATION, started, digests=digest),
        tagged(9, LINUX_OPTIONS, b"LOADED_IMAGE::LoadOptions\0", line.encode("utf-16-le") + b"\0\0"),
        tagged(9, LINUX_INITRD, b"Linux initrd\0", initrd),
        action("Exit Boot Services Invocation", 5),
    )


def test_a_kernel_is_predicted_with_and_without_a_base() -> None:
    real = replay(kernel_boot(KERNEL, b"new initrd", "root=/dev/vda1"), BANK).values
    base = kernel_boot(pe_image({".text": b"old"}), b"old initrd", "panic=1")
    assert predict_kernel(KERNEL, b"new initrd", "root=/dev/vda1", BANK, base).values == real
    alone = predict_kernel(KERNEL, b"new initrd", "root=/dev/vda1", BANK).values
    assert alone == {index: real[index] for index in (4, 9)}


def test_what_is_not_given_stays_as_in_the_base() -> None:
    base = kernel_boot(pe_image({".text": b"old"}), b"initrd", "panic=1")
    assert predict_kernel(KERNEL, None, None, BANK, base).values[9] == replay(base, BANK).values[9]


@pytest.mark.parametrize(
    "base",
    [
        read(separator(7)),
        read(record(8, EventType.EV_IPL, b"grub_cmd set x\0"), image(b"", b"k")),
        read(record(1, 6, b"x", banks=(PcrBank.SHA384,)), banks=(PcrBank.SHA384,)),
    ],
    ids=["nothing started", "GRUB", "another bank"],
)
def test_a_base_that_does_not_fit_is_refused_by_name(base: UnverifiedLog) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        predict_uki(UKI, BANK, base)
    assert refused.value.reason == "PREDICTION_BASE_UNFIT"
    with pytest.raises(InvalidArgumentError) as refused:
        predict_kernel(KERNEL, None, None, BANK, base)
    assert refused.value.reason == "PREDICTION_BASE_UNFIT"


def test_a_kernel_is_no_uki() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        predict_uki(KERNEL, BANK)
    assert refused.value.reason == "UKI_INVALID"


def test_hashes_are_those_of_the_bank() -> None:
    values = predict_kernel(KERNEL, b"i", None, SHA384).values
    assert values[9] == hashlib.sha384(bytes(48) + hashlib.sha384(b"i").digest()).digest()
