"""What a log proves about Secure Boot, and what it only says."""

from __future__ import annotations

import struct
import uuid

import pytest

from tests.support.eventlogs import BANK, authority, driver_config, names, read, record, separator, variable
from vtpm.eventlog.bootpath import boot_path
from vtpm.eventlog.findings import Findings
from vtpm.eventlog.secureboot import secure_boot
from vtpm.eventlog.types import EventType
from vtpm.eventlog.uefi import CERT_SHA256, CERT_X509, EFI_GLOBAL_VARIABLE, SHIM_LOCK, parse_signature_lists
from vtpm.eventlog.wbcl import TRUST_POINT, read_sipa, windows_boot

OWNER = uuid.UUID("77fa9abd-0359-4d32-bd60-28f4e78f784b")
ON, OFF = b"\1", b"\0"
DISGUISED = record(7, EventType.EV_POST_CODE, bytes(4))
CONFIG = EventType.EV_EFI_VARIABLE_DRIVER_CONFIG


def signature_list(kind: uuid.UUID, *bodies: bytes) -> bytes:
    size = 16 + len(bodies[0])
    body = b"".join(OWNER.bytes_le + item for item in bodies)
    return kind.bytes_le + struct.pack("<III", 28 + len(body), 0, size) + body


@pytest.mark.parametrize(("value", "enabled"), [(ON, True), (OFF, False), (b"", False)])
def test_secure_boot_is_what_the_variable_before_the_separator_says(value: bytes, enabled: bool) -> None:
    state = secure_boot(read(driver_config("SecureBoot", value), separator(7)), BANK)
    assert (state.enabled, state.separator) == (enabled, 2)
    assert not state.findings


def test_the_modes_are_read_from_pcr_1_too() -> None:
    state = secure_boot(
        read(
            driver_config("SecureBoot", ON),
            separator(7),
            driver_config("AuditMode", OFF, 1),
            driver_config("DeployedMode", ON, 1),
            driver_config("SecureBoot", OFF, 1),
        ),
        BANK,
    )
    assert (state.enabled, state.audit_mode, state.deployed_mode, state.setup_mode) == (True, False, True, None)


@pytest.mark.parametrize(
    ("events", "finding"),
    [
        ([driver_config("SecureBoot", ON)], "SEPARATOR_MISSING"),
        ([separator(7), driver_config("SecureBoot", ON)], "VARIABLE_AFTER_SEPARATOR"),
        ([driver_config("SecureBoot", OFF), driver_config("SecureBoot", ON), separator(7)], "VARIABLE_REPEATED"),
        ([driver_config("SecureBoot", ON, 5), separator(7)], "SECURE_BOOT_UNKNOWN"),
        (
            [record(7, CONFIG, variable("SecureBoot", ON), variable("SecureBoot", OFF)), separator(7)],
            "VARIABLE_UNPROVEN",
        ),
        ([record(7, CONFIG, variable("SecureBoot", ON, OWNER)), separator(7)], "SECURE_BOOT_UNKNOWN"),
        # The separator's type was rewritten, which a replay does not notice; the variable behind it was extended by software.
        ([DISGUISED, driver_config("SecureBoot", ON), separator(7)], "VARIABLE_AFTER_SEPARATOR"),
        # A value that no specification has.
        ([driver_config("SecureBoot", b"\2"), separator(7)], "SECURE_BOOT_UNKNOWN"),
        ([driver_config("SecureBoot", b"\1\0"), separator(7)], "SECURE_BOOT_UNKNOWN"),
        # Only the value was hashed: the name beside it can be any.
        ([record(7, CONFIG, variable("SecureBoot", ON), ON), separator(7)], "VARIABLE_UNPROVEN"),
    ],
)  # fmt: skip
def test_what_no_digest_before_the_separator_proves_is_unknown(events: list[bytes], finding: str) -> None:
    state = secure_boot(read(*events), BANK)
    assert state.enabled is None
    assert {finding, "SECURE_BOOT_UNKNOWN"} <= names(state.findings)


def test_databases_and_authorities_are_read() -> None:
    db = signature_list(CERT_X509, b"\x30 a certificate") + signature_list(CERT_SHA256, bytes(32), b"\1" * 32)
    state = secure_boot(
        read(
            driver_config("SecureBoot", ON),
            driver_config("PK", signature_list(CERT_X509, b"\x30 PK")),
            driver_config("db", db),
            driver_config("dbx", b""),
            authority("db", OWNER.bytes_le + b"\x30 of a driver"),
            separator(7),
            authority("db", OWNER.bytes_le + b"\x30 of a loader"),
            authority("Shim", b"\x30 shim's own", SHIM_LOCK),
        ),
        BANK,
    )
    assert [item.kind for item in state.databases["db"]] == ["x509", "sha256", "sha256"]
    assert state.databases["db"][0].owner == OWNER
    assert (len(state.databases["PK"]), state.databases["dbx"]) == (1, ())
    assert [item.value[16:] for item in state.before] == [b"\x30 of a driver"]
    assert [(item.name, item.signature is not None) for item in state.after] == [("db", True), ("Shim", False)]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_signature_list_that_is_cut_keeps_what_was_read(cut: int) -> None:
    whole = signature_list(CERT_SHA256, bytes(32)) + signature_list(CERT_SHA256, b"\1" * 32)
    signatures, wrong = parse_signature_lists(whole[:-cut])
    assert len(signatures) == 1
    assert wrong


@pytest.mark.parametrize(
    "sizes", [(0, 0, 48), (27, 0, 48), (0xFFFFFFFF, 0, 48), (76, 0xFFFFFFFF, 48), (76, 0, 0), (76, 0, 16), (76, 0, 47)]
)
def test_sizes_of_a_signature_list_that_lie_are_named(sizes: tuple[int, int, int]) -> None:
    signatures, wrong = parse_signature_lists(CERT_SHA256.bytes_le + struct.pack("<III", *sizes) + bytes(48))
    assert not signatures
    assert wrong
    log = read(driver_config("SecureBoot", ON), driver_config("db", b"no list"), separator(7))
    assert "SIGNATURE_LIST_INVALID" in names(secure_boot(log, BANK).findings)


# ---- Windows ----------------------------------------------------------------------------------------------------------------


def sipa(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data


def test_what_windows_measured_is_read() -> None:
    module = sipa(0x40010003, sipa(0x00070001, "winload.efi".encode("utf-16-le")) + sipa(0x00070004, b"\x11" * 32))
    inner = sipa(0x40010001, sipa(0x00050002, b"\1") + sipa(0x00040001, b"\0") + module + sipa(0x12345678, b"unknown"))
    point = sipa(
        TRUST_POINT,
        sipa(0x80080003, "Windows AIK\0".encode("utf-16-le")) + sipa(0x80080001, b"attest") + sipa(0x80080002, b"sig"),
    )
    log = read(
        record(13, EventType.EV_EVENT_TAG, inner), separator(13, b"WBCL"), record(0xFFFFFFFF, EventType.EV_NO_ACTION, point)
    )
    windows = windows_boot(log)
    assert windows is not None
    assert windows.modules == (("winload.efi", b"\x11" * 32),)
    assert (windows.flag("code integrity"), windows.flag("boot debugging"), windows.flag("test signing")) == (True, False, None)
    (trust_point,) = windows.trust_points
    assert (trust_point.aik_name, trust_point.attest, trust_point.signature) == ("Windows AIK", b"attest", b"sig")
    assert "Windows" in boot_path(log, BANK).loaders
    assert not windows.findings


def test_sipa_events_whose_sizes_lie_or_that_never_end_are_bounded() -> None:
    deep = b""
    for _ in range(40):
        deep = sipa(0x40010001, deep)
    many = sipa(0x40010001, sipa(0x00020001, b"") * 30000)
    findings = Findings()
    for body in (deep, many, sipa(0x40010001, b"x")[:-1] + b"\xff\xff\xff\xff", struct.pack("<II", 0x40010001, 0xFFFFFFFF)):
        (event,) = read(record(12, EventType.EV_EVENT_TAG, body)).events[1:]
        assert len(list(read_sipa(event, findings))) <= 16384
    assert names(findings.all()) == {"SIPA_INVALID"}


def test_a_log_without_windows_says_so() -> None:
    assert windows_boot(read(record(7, CONFIG, variable("x", b"", EFI_GLOBAL_VARIABLE)))) is None
