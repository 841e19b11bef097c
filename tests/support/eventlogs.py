"""Event logs made by hand, and where real ones are."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from vtpm.eventlog.tcg import read_tcg
from vtpm.eventlog.types import EventType
from vtpm.eventlog.uefi import EFI_GLOBAL_VARIABLE, EFI_IMAGE_SECURITY_DATABASE
from vtpm.eventlog.values import UnverifiedLog
from vtpm.tpm.eventlog import event2, spec_id_header
from vtpm.tpm.pcr import PcrBank

EVIDENCE = Path(os.environ.get("VTPM_EVIDENCE_DIR") or ROOT.parent / "shared" / "evidence")
BANK = PcrBank.SHA256.alg_id
ZEROS = b"\0\0\0\0"


def sample(name: str) -> bytes:
    """A real log; the test is skipped where the samples are not."""
    if not EVIDENCE.is_dir():
        pytest.skip(f"no samples: {EVIDENCE} is not there; VTPM_EVIDENCE_DIR names another directory")
    data = (EVIDENCE / name).read_bytes()
    return base64.b64decode(data) if name.endswith(".b64") else data


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def record(
    register: int,
    event_type: int,
    data: bytes,
    measured: bytes | None = None,
    banks: Sequence[PcrBank] = (PcrBank.SHA256,),
    digests: Mapping[PcrBank, bytes] | None = None,
) -> bytes:
    """A TCG_PCR_EVENT2 whose digests are of `measured`, default `data`."""
    body = data if measured is None else measured
    made = digests or {bank: hashlib.new(bank.hash_name, body).digest() for bank in banks}
    return event2(register, event_type, made, data)


def log_of(*records: bytes, banks: Sequence[PcrBank] = (PcrBank.SHA256,)) -> bytes:
    return spec_id_header(banks) + b"".join(records)


def read(*records: bytes, banks: Sequence[PcrBank] = (PcrBank.SHA256,)) -> UnverifiedLog:
    return read_tcg(log_of(*records, banks=banks))


def variable(name: str, value: bytes, vendor: uuid.UUID = EFI_GLOBAL_VARIABLE) -> bytes:
    """UEFI_VARIABLE_DATA."""
    text = name.encode("utf-16-le")
    return vendor.bytes_le + struct.pack("<QQ", len(name), len(value)) + text + value


def driver_config(name: str, value: bytes, register: int = 7) -> bytes:
    vendor = EFI_IMAGE_SECURITY_DATABASE if name.startswith("db") else EFI_GLOBAL_VARIABLE
    return record(register, EventType.EV_EFI_VARIABLE_DRIVER_CONFIG, variable(name, value, vendor))


def authority(name: str, value: bytes, vendor: uuid.UUID = EFI_IMAGE_SECURITY_DATABASE) -> bytes:
    return record(7, EventType.EV_EFI_VARIABLE_AUTHORITY, variable(name, value, vendor))


def separator(register: int, value: bytes = ZEROS) -> bytes:
    return record(register, EventType.EV_SEPARATOR, value)


def action(text: str, register: int = 4) -> bytes:
    return record(register, EventType.EV_EFI_ACTION, text.encode())


def file_path(name: str) -> bytes:
    """A device path of one file, and its end."""
    text = name.encode("utf-16-le") + b"\0\0"
    return struct.pack("<BBH", 4, 4, 4 + len(text)) + text + b"\x7f\xff\x04\x00"


def image(path: bytes, measured: bytes, event_type: int = EventType.EV_EFI_BOOT_SERVICES_APPLICATION) -> bytes:
    """An image that was started; `measured` stands for what is hashed of it."""
    return record(4, event_type, struct.pack("<QQQQ", 0x1000, 4096, 0, len(path)) + path, measured)


def tagged(register: int, tag: int, text: bytes, measured: bytes) -> bytes:
    return record(register, EventType.EV_EVENT_TAG, struct.pack("<II", tag, len(text)) + text, measured)


LINUX_INITRD = 0x8F3B22EC
LINUX_OPTIONS = 0x8F3B22ED
GOOD_INITRD = b"initrd 1"
GOOD_LINE = "console=ttyS0 quiet"


def boot(
    *,
    secure_boot: bytes = b"\1",
    kernel: bytes = b"kernel 1",
    initrd: bytes = GOOD_INITRD,
    command_line: str = GOOD_LINE,
    extra: Sequence[bytes] = (),
) -> UnverifiedLog:
    """A boot of a kernel that the firmware starts, as OVMF logs one; each argument changes one thing that is measured."""
    return read(
        record(0, EventType.EV_S_CRTM_VERSION, "1.2".encode("utf-16-le") + b"\0\0"),
        driver_config("SecureBoot", secure_boot),
        driver_config("PK", b""),
        separator(7),
        action("Calling EFI Application from Boot Option"),
        *(separator(register) for register in range(7)),
        image(file_path("\\EFI\\BOOT\\BOOTX64.EFI"), kernel),
        tagged(9, LINUX_OPTIONS, b"LOADED_IMAGE::LoadOptions\0", command_line.encode("utf-16-le") + b"\0\0"),
        tagged(9, LINUX_INITRD, b"Linux initrd\0", initrd),
        *extra,
        action("Exit Boot Services Invocation", 5),
        action("Exit Boot Services Returned with Success", 5),
    )


def names(found: Sequence[object]) -> set[str]:
    """The names of findings."""
    return {str(item).partition(":")[0].partition(" ")[0] for item in found}


def pe_image(sections: Mapping[str, bytes], *, signature: bytes = b"", tail: bytes = b"", headers: int = 0x400) -> bytes:
    """A PE32+ image with these sections, as small as one can be."""
    optional_size = 112 + 16 * 8
    table, bodies, place = b"", b"", headers
    for name, data in sections.items():
        stored = data + bytes(-len(data) % 512)
        table += struct.pack("<8sIIII16x", name.encode(), len(data), 0x1000 + place, len(stored), place)
        bodies += stored
        place += len(stored)
    coff = struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, optional_size, 0x22)
    optional = bytearray(optional_size)
    struct.pack_into("<H", optional, 0, 0x20B)
    struct.pack_into("<I", optional, 60, headers)
    struct.pack_into("<I", optional, 64, 0xC0FFEE)
    struct.pack_into("<I", optional, 108, 16)
    if signature:
        struct.pack_into("<II", optional, 112 + 4 * 8, place + len(tail), len(signature))
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + coff + bytes(optional) + table
    return head.ljust(headers, b"\0") + bodies + tail + signature
