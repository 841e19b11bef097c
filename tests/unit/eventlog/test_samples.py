"""Real logs, each against what is known of it: format, number of events, Secure Boot, boot path, and the PCRs that it leads to.

The samples are not in the repository. Where they are, all of them are read, and at least as many as are named here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.eventlogs import EVIDENCE, names, sample
from vtpm.eventlog.bootpath import boot_path
from vtpm.eventlog.checks import check_log
from vtpm.eventlog.describe import describe
from vtpm.eventlog.findings import KINDS
from vtpm.eventlog.hashes import SHA1, SHA256, SHA384, by_name
from vtpm.eventlog.ima import UnverifiedImaLog, check_ima
from vtpm.eventlog.reading import read_log
from vtpm.eventlog.replay import replay
from vtpm.eventlog.secureboot import secure_boot
from vtpm.eventlog.values import LogFormat, UnverifiedLog
from vtpm.eventlog.wbcl import windows_boot

LEAST_SAMPLES = 50
TPM_TOOLS = "google-go-tpm-tools/internal/test/eventlogs"
EVENTLOG = "google-go-eventlog/testdata/eventlogs"
ATTESTATION = "google-go-attestation/attest/testdata"
TRUSTEE = "confidential-containers-trustee/deps/eventlog/test_data"
TOOLS = "tpm2-software-tpm2-tools/test/integration/fixtures"
KEYLIME = "keylime-keylime/test/data"
LUNAL = "lunal-dev-attestation-rs/crates/attestation/test_data"
CC = "cc-api-cc-trusted-api/common/golang/cctrusted_base/test_data"
TDX_GUEST = "google-go-tdx-guest/testing/testdata/ccel"


@dataclass(frozen=True)
class Golden:
    """What is known of a log."""

    name: str
    format: LogFormat
    events: int
    secure_boot: bool | None
    loaders: tuple[str, ...]
    exit_boot_services: bool | None
    findings: tuple[str, ...]


GOLDEN = [
    Golden(
        f"{TPM_TOOLS}/arch-linux-workstation.bin",
        LogFormat.TCG,
        25,
        False,
        ("systemd-boot", "systemd-boot or systemd-stub"),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_EMPTY"),
    ),
    Golden(
        f"{TPM_TOOLS}/confidential-gke-debug-251000_eventlog.bin",
        LogFormat.TCG,
        55,
        True,
        ("shim", "GRUB"),
        True,
        ("SEPARATOR_LOOKALIKE", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TPM_TOOLS}/eventlogwithsp800155.bin",
        LogFormat.TCG,
        54,
        True,
        ("shim", "GRUB"),
        True,
        ("SEPARATOR_LOOKALIKE", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TPM_TOOLS}/gdc-host.bin",
        LogFormat.TCG,
        159,
        False,
        ("shim", "GRUB", "Linux"),
        True,
        ("DIGEST_NOT_OF_DATA", "FINDINGS_DROPPED", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TPM_TOOLS}/glinux-alex.bin",
        LogFormat.TCG,
        29,
        False,
        ("GRUB",),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "SEPARATOR_LOOKALIKE"),
    ),
    Golden(
        f"{TPM_TOOLS}/ubuntu-2404-amd-sevsnp.bin",
        LogFormat.TCG,
        117,
        False,
        ("shim", "GRUB", "Linux"),
        True,
        ("FINDINGS_DROPPED", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/arch-linux-workstation.bin",
        LogFormat.TCG,
        25,
        False,
        ("systemd-boot", "systemd-boot or systemd-stub"),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_EMPTY"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/cos-101-amd-sev.bin",
        LogFormat.TCG,
        49,
        True,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/cos-85-amd-sev.bin",
        LogFormat.TCG,
        46,
        True,
        ("GRUB",),
        True,
        ("AUTHORITY_ONE_BYTE_MORE", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/cos-93-amd-sev.bin",
        LogFormat.TCG,
        46,
        True,
        ("GRUB",),
        True,
        ("AUTHORITY_ONE_BYTE_MORE", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/debian-10.bin",
        LogFormat.TCG_SHA1,
        25,
        True,
        ("shim",),
        None,
        ("AUTHORITY_ONE_BYTE_MORE", "EXIT_BOOT_SERVICES_MISSING", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/glinux-alex.bin",
        LogFormat.TCG,
        29,
        False,
        ("GRUB",),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "SEPARATOR_LOOKALIKE"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/rhel8-uefi.bin",
        LogFormat.TCG,
        83,
        True,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/tpm/ubuntu-1804-amd-sev.bin",
        LogFormat.TCG,
        88,
        False,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(f"{EVENTLOG}/ccel/CCEL.bin", LogFormat.UNKNOWN, 0, None, (), None, ("FORMAT_UNKNOWN",)),
    Golden(
        f"{EVENTLOG}/ccel/CCEL_unpadded.data.bin",
        LogFormat.CCEL,
        20,
        False,
        ("kernel given by QEMU",),
        True,
        ("FORMAT_GUESSED", "SEPARATOR_SHARED", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/ccel/cos-113-intel-tdx-dupe-separator-unpadded.bin",
        LogFormat.CCEL,
        44,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "SEPARATOR_LOOKALIKE", "SEPARATOR_SHARED", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{EVENTLOG}/ccel/cos-113-intel-tdx-dupe-separator.bin",
        LogFormat.CCEL,
        44,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_LOOKALIKE", "SEPARATOR_SHARED", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(f"{EVENTLOG}/ccel/cos-113-intel-tdx.table.bin", LogFormat.UNKNOWN, 0, None, (), None, ("FORMAT_UNKNOWN",)),
    Golden(
        f"{EVENTLOG}/ccel/event_log.bin",
        LogFormat.CCEL,
        28,
        False,
        ("kernel given by QEMU",),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_SHARED", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{ATTESTATION}/coreos_36_shielded_vm_no_secure_boot_eventlog",
        LogFormat.TCG,
        76,
        False,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{ATTESTATION}/crypto_agile_eventlog",
        LogFormat.TCG,
        27,
        False,
        ("GRUB",),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_EMPTY"),
    ),
    Golden(
        f"{ATTESTATION}/ebs_event_missing_eventlog",
        LogFormat.TCG_SHA1,
        38,
        False,
        ("GRUB",),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{ATTESTATION}/option_rom_eventlog",
        LogFormat.TCG_SHA1,
        61,
        True,
        ("Windows boot manager", "Windows"),
        True,
        ("VARIABLE_VALUE_HASHED",),
    ),
    Golden(
        f"{ATTESTATION}/sb_cert_eventlog",
        LogFormat.TCG,
        15,
        True,
        ("shim",),
        None,
        ("AUTHORITY_ONE_BYTE_MORE", "EXIT_BOOT_SERVICES_MISSING", "SEPARATOR_MISSING"),
    ),
    Golden(f"{ATTESTATION}/short_no_action_eventlog", LogFormat.TCG_SHA1, 1, None, (), None, ()),
    Golden(
        f"{ATTESTATION}/ubuntu_2104_shielded_vm_no_secure_boot_eventlog",
        LogFormat.TCG,
        106,
        False,
        ("shim", "GRUB"),
        True,
        ("FINDINGS_DROPPED", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(f"{TRUSTEE}/CCEL_data", LogFormat.CCEL, 6, None, ("td-shim",), None, ("FORMAT_GUESSED", "PADDING")),
    Golden(
        f"{TRUSTEE}/CCEL_AAEL_alibabacloud",
        LogFormat.CCEL,
        88,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "PADDING", "TEXT_AFTER_PREFIX", "TEXT_ONE_BYTE_MORE", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TRUSTEE}/CCEL_data_csv",
        LogFormat.CCEL,
        83,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "PADDING", "TEXT_AFTER_PREFIX", "TEXT_ONE_BYTE_MORE", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TRUSTEE}/CCEL_data_gcp",
        LogFormat.CCEL,
        22,
        False,
        (),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_LOOKALIKE", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TRUSTEE}/CCEL_data_grub",
        LogFormat.CCEL,
        38,
        True,
        ("shim", "GRUB", "Linux"),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_LOOKALIKE", "SEPARATOR_SHARED", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TRUSTEE}/CCEL_data_grub_gke",
        LogFormat.CCEL,
        36,
        False,
        ("UKI",),
        True,
        ("FORMAT_GUESSED", "PADDING", "SECTION_NAME_HASHED", "SEPARATOR_LOOKALIKE", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TRUSTEE}/CCEL_data_ovmf",
        LogFormat.CCEL,
        21,
        False,
        ("kernel given by QEMU", "Linux"),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_SHARED", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TOOLS}/event-arch-linux.bin",
        LogFormat.TCG,
        25,
        False,
        ("systemd-boot", "systemd-boot or systemd-stub"),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_EMPTY"),
    ),
    Golden(
        f"{TOOLS}/event-bootorder.bin",
        LogFormat.TCG,
        104,
        False,
        ("GRUB",),
        True,
        ("FINDINGS_DROPPED", "TEXT_AFTER_PREFIX", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TOOLS}/event-gce-ubuntu-2104-log.bin",
        LogFormat.TCG,
        112,
        False,
        ("shim", "GRUB"),
        True,
        ("FINDINGS_DROPPED", "TEXT_AFTER_PREFIX", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TOOLS}/event-moklisttrusted.bin",
        LogFormat.TCG,
        97,
        True,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TOOLS}/event-postcode.bin",
        LogFormat.TCG,
        59,
        True,
        ("shim", "GRUB"),
        None,
        ("AUTHORITY_ONE_BYTE_MORE", "EXIT_BOOT_SERVICES_MISSING", "TEXT_AFTER_PREFIX"),
    ),
    Golden(
        f"{TOOLS}/event-sd-boot-fedora37.bin",
        LogFormat.TCG,
        28,
        False,
        ("systemd-boot or systemd-stub", "Linux"),
        True,
        ("VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{TOOLS}/event-uefi-sha1-log.bin",
        LogFormat.TCG_SHA1,
        17,
        False,
        ("shim",),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "VARIABLE_EMPTY"),
    ),
    Golden(f"{TOOLS}/event-uefiaction.bin", LogFormat.TCG, 2, None, (), None, ("SEPARATOR_MISSING",)),
    Golden(f"{TOOLS}/event-uefiservices.bin", LogFormat.TCG, 2, None, (), None, ()),
    Golden(f"{TOOLS}/event-uefivar.bin", LogFormat.TCG, 2, None, (), None, ("SEPARATOR_MISSING",)),
    Golden(f"{TOOLS}/event.bin", LogFormat.TCG, 2, None, (), None, ()),
    Golden(f"{TOOLS}/specid-vendordata.bin", LogFormat.TCG, 1, None, (), None, ("TRAILING_BYTES",)),
    Golden(
        f"{KEYLIME}/mb_log.b64",
        LogFormat.TCG,
        102,
        True,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{KEYLIME}/create-mb-policy/binary_bios_measurements",
        LogFormat.TCG,
        121,
        False,
        ("shim", "GRUB"),
        None,
        ("EXIT_BOOT_SERVICES_MISSING", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{KEYLIME}/create-mb-policy/binary_bios_measurements-bogus", LogFormat.UNKNOWN, 0, None, (), None, ("FORMAT_UNKNOWN",)
    ),
    Golden(
        f"{KEYLIME}/create-mb-policy/binary_bios_measurements-secureboot",
        LogFormat.TCG,
        99,
        True,
        ("shim", "GRUB"),
        True,
        ("TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        "keylime-rust-keylime/keylime/test-data/uefi_log.bin",
        LogFormat.TCG,
        124,
        False,
        ("shim", "GRUB"),
        True,
        ("EVENT_TYPE_UNKNOWN", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{CC}/ccel_data.bin",
        LogFormat.CCEL,
        99,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_SHARED", "TEXT_AFTER_PREFIX", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{LUNAL}/tdx_ccel_live.bin",
        LogFormat.CCEL,
        21,
        False,
        ("kernel given by QEMU", "Linux"),
        True,
        ("FORMAT_GUESSED", "PADDING", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden(
        f"{LUNAL}/tdx_ccel_live2.dat",
        LogFormat.CCEL,
        21,
        False,
        ("kernel given by QEMU", "Linux"),
        True,
        ("FORMAT_GUESSED", "PADDING", "VARIABLE_EMPTY", "VARIABLE_VALUE_HASHED"),
    ),
    Golden("google-go-tpm-tools/agent/testdata/cel.b64", LogFormat.CEL_TLV, 18, None, (), None, ()),
    Golden(
        f"{TDX_GUEST}/ccel_data.dat",
        LogFormat.CCEL,
        44,
        False,
        ("shim", "GRUB"),
        True,
        ("FORMAT_GUESSED", "PADDING", "SEPARATOR_LOOKALIKE", "TEXT_AFTER_PREFIX", "VARIABLE_VALUE_HASHED"),
    ),
]


def tcg(name: str) -> UnverifiedLog:
    log = read_log(sample(name))
    assert isinstance(log, UnverifiedLog)
    return log


def bank_of(log: UnverifiedLog) -> int:
    return SHA256 if SHA256 in log.banks else max(log.banks, default=SHA1)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name.rpartition("/")[2])
def test_a_log_says_what_is_known_of_it(golden: Golden) -> None:
    log = tcg(golden.name)
    path = boot_path(log, bank_of(log))
    assert (log.format, len(log.events)) == (golden.format, golden.events)
    assert secure_boot(log, bank_of(log)).enabled is golden.secure_boot
    assert (path.loaders, path.exit_boot_services) == (golden.loaders, golden.exit_boot_services)
    assert names([*log.findings, *check_log(log)]) == set(golden.findings)
    assert all(isinstance(describe(event), str) for event in log.events)


def test_at_least_as_many_samples_as_are_named_were_read() -> None:
    sample(GOLDEN[0].name)
    assert len([golden for golden in GOLDEN if (EVIDENCE / golden.name).is_file()]) >= LEAST_SAMPLES


def findings_of(name: str) -> set[str]:
    log = read_log(sample(name))
    if isinstance(log, UnverifiedImaLog):
        return names([*log.findings, *check_ima(log)])
    windows = windows_boot(log)
    more = [*secure_boot(log, bank_of(log)).findings, *(windows.findings if windows else ())]
    return names([*log.findings, *check_log(log), *more])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.sample != "made by the tests"], ids=lambda kind: kind.name)
def test_the_sample_that_a_finding_names_shows_it(kind: Any) -> None:
    sample(GOLDEN[0].name)
    (place, *_) = [path for path in EVIDENCE.rglob(kind.sample) if path.is_file()]
    assert kind.name in findings_of(str(place.relative_to(EVIDENCE)))


# ---- replay against values that others computed or a TPM signed ------------------------------------------------------------

EXPECTED_PCRS = {
    **{f"eventlogs/{name}.bin": f"{EVENTLOG}/tpm/{name}.bin" for name in (
        "rhel8-uefi", "ubuntu-1804-amd-sev", "debian-10", "cos-85-amd-sev", "cos-93-amd-sev", "cos-101-amd-sev", "glinux-alex",
    )},
    **{f"eventlogs/{name}.bin": f"{TPM_TOOLS}/{name}.bin" for name in (
        "ubuntu-2404-amd-sevsnp", "arch-linux-workstation", "gdc-host", "eventlogwithsp800155",
        "confidential-gke-debug-251000_eventlog",
    )},
    "eventlogs/ubuntu-2104-no-dbx.bin": f"{TOOLS}/event-gce-ubuntu-2104-log.bin",
    "eventlogs/ubuntu-2104-no-secure-boot.bin": f"{ATTESTATION}/ubuntu_2104_shielded_vm_no_secure_boot_eventlog",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED_PCRS)
def test_a_log_replays_to_the_pcrs_that_another_verifier_expects(name: str) -> None:
    expected = json.loads(sample("google-go-tpm-tools/internal/test/expected_pcrs.json"))
    log = tcg(EXPECTED_PCRS[name])
    assert expected[name]["banks"]
    for bank, pcrs in expected[name]["banks"].items():
        alg_id = by_name(bank)
        assert alg_id is not None
        assert {str(index): value.hex() for index, value in replay(log, alg_id).values.items()} == pcrs


@pytest.mark.parametrize("name", ["CCEL_data", "CCEL_data_ovmf", "CCEL_data_grub", "CCEL_data_gcp", "CCEL_data_grub_gke"])
def test_a_ccel_replays_to_the_rtmrs_that_another_verifier_expects(name: str) -> None:
    expected = json.loads(sample(f"{TRUSTEE}/expected_rtmrs.json"))[name]
    values = replay(tcg(f"{TRUSTEE}/{name}"), SHA384).values
    assert [values.get(index, bytes(48)).hex() for index in range(1, 5)] == expected


def rtmrs(data: bytes, offset: int) -> list[bytes]:
    return [data[offset + 48 * index : offset + 48 * (index + 1)] for index in range(4)]


# A TD quote of version 4 has the TD's report behind 48 bytes of header, and the RTMRs 328 bytes into the report. In a TDREPORT
# they are 208 bytes into TDINFO, which is at 512.
IN_QUOTE, IN_REPORT = 48 + 328, 512 + 208


@pytest.mark.parametrize(
    ("log", "signed", "offset", "not_in_the_log"),
    [
        (f"{TDX_GUEST}/ccel_data.dat", f"{TDX_GUEST}/cos-113-tdx-quote.dat", IN_QUOTE, ()),
        (f"{LUNAL}/tdx_ccel_live.bin", f"{LUNAL}/tdx_tdreport_live.bin", IN_REPORT, ()),
        (f"{LUNAL}/tdx_ccel_live2.dat", f"{LUNAL}/tdx_quote_live.dat", IN_QUOTE, ()),
        # The kernel's IMA and userspace extended RTMR 2, which no firmware log carries.
        (f"{CC}/ccel_data.bin", f"{CC}/quote.bin", IN_QUOTE, (2,)),
    ],
)
def test_a_ccel_replays_to_the_rtmrs_that_the_cpu_signed(
    log: str, signed: str, offset: int, not_in_the_log: Sequence[int]
) -> None:
    values = replay(tcg(log), SHA384).values
    expected = rtmrs(sample(signed), offset)
    equal = [values.get(index + 1, bytes(48)) == expected[index] for index in range(4)]
    assert equal == [index not in not_in_the_log for index in range(4)]


def test_the_log_of_a_windows_vm_replays_to_its_quote() -> None:
    value = json.loads(sample(f"{ATTESTATION}/windows_gcp_shielded_vm.json"))
    log = read_log(base64.b64decode(value["Log"]["Raw"]))
    assert isinstance(log, UnverifiedLog)
    pcrs = {item["Index"]: base64.b64decode(item["Digest"]) for item in value["Log"]["PCRs"]}
    quoted = hashlib.sha1(b"".join(pcrs[index] for index in sorted(pcrs))).digest()
    assert base64.b64decode(value["Quote"]["Quote"]).endswith(quoted)
    replayed = replay(log, SHA1).values
    assert replayed == {index: pcrs[index] for index in replayed}
    assert {0, 4, 7, 11, 12, 13, 14} <= set(replayed)
    windows = windows_boot(log)
    assert windows is not None
    assert (windows.flag("boot debugging"), windows.flag("code integrity")) == (False, True)
    assert len(windows.modules) > 40
    assert all(len(digest) in {20, 32} for _, digest in windows.modules)


def test_the_log_of_a_tpm_1_2_replays_but_for_what_ima_extended() -> None:
    value = json.loads(sample("google-go-eventlog/testdata/legacydata/linux_tpm12.json"))
    log = read_log(base64.b64decode(value["Log"]["Raw"]))
    assert isinstance(log, UnverifiedLog)
    pcrs = {item["Index"]: base64.b64decode(item["Digest"]) for item in value["Log"]["PCRs"]}
    replayed = replay(log, SHA1).values
    assert replayed == {index: pcrs[index] for index in range(8)}
    assert [index for index in range(16) if index not in replayed and any(pcrs[index])] == [10]


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message, numbers and bytes alone."""
    offset = 0

    def number() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while offset < len(data):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
        else:
            size = number()
            yield tag >> 3, data[offset : offset + size]
            offset += size


def test_the_log_of_a_gce_vm_replays_to_its_three_quotes() -> None:
    attestation = list(fields(sample("google-go-tpm-tools/internal/test/attestations/gce-cos-85-no-nonce.pb")))
    (raw,) = [value for number, value in attestation if number == 3]
    log = read_log(raw)
    assert isinstance(log, UnverifiedLog)
    banks = set()
    for quote in (dict(fields(value)) for number, value in attestation if number == 2):
        pcrs = list(fields(quote[3]))
        (bank,) = [value for number, value in pcrs if number == 1]
        values = {entry.get(1, 0): entry[2] for entry in (dict(fields(value)) for number, value in pcrs if number == 2)}
        replayed = replay(log, bank).values
        assert replayed == {index: values[index] for index in replayed}
        assert len(replayed) == 10
        banks.add(bank)
    assert banks == {SHA1, SHA256, SHA384}


# ---- IMA and CEL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entries", "hash_name", "findings"),
    [
        ("keylime-rust-keylime/keylime-agent/test-data/ima/ascii_runtime_measurements", 826, "sha1", set()),
        (f"{CC}/ima_log.bin", 1, "sha384", set()),
        (f"{KEYLIME}/create-runtime-policy/ima-log-sha1", 2, "sha1", {"IMA_VIOLATION"}),
        (f"{KEYLIME}/create-runtime-policy/ima-log-sha256", 2, "sha1", set()),
        (f"{KEYLIME}/create-runtime-policy/ima-log-sha384", 2, "sha1", {"IMA_VIOLATION"}),
        (f"{KEYLIME}/create-runtime-policy/ima-log-sha512", 2, "sha1", {"IMA_VIOLATION"}),
        (f"{KEYLIME}/create-runtime-policy/ima-log-unknown", 2, "sha256", {"IMA_VIOLATION", "IMA_HASH_WRONG"}),
    ],
)
def test_an_ima_list_is_read_and_its_hashes_recompute(name: str, entries: int, hash_name: str, findings: set[str]) -> None:
    log = read_log(sample(name))
    assert isinstance(log, UnverifiedImaLog)
    assert (log.format, len(log.entries), by_name(hash_name)) == (LogFormat.IMA_ASCII, entries, log.hash_alg)
    assert names([*log.findings, *check_ima(log)]) == findings
    assert next(iter(log.entries)).path == "boot_aggregate"


def test_the_canonical_log_of_confidential_space_is_read() -> None:
    log = tcg("google-go-tpm-tools/agent/testdata/cel.b64")
    texts = [describe(event) for event in log.events]
    assert texts[0].startswith("image reference: us-west1-docker.pkg.dev/")
    assert "restart policy: Never" in texts
    assert log.td
    assert {event.register for event in log.events} == {4}
    assert all(hashlib.sha384(event.data).digest() == event.digests[SHA384] for event in log.events)
