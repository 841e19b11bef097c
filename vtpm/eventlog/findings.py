"""Everything that can be noticed in an event log, in one table: name, how grave, what it means, and a sample that shows it.

A finding is a value. No reader raises because of what a log contains.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Severity(enum.StrEnum):
    """How grave a finding is."""

    INFO = "info"
    """A known habit of some firmware or loader; the log can be used."""
    WARNING = "warning"
    """Something that a reader must know before believing what the log says in words."""
    PROBLEM = "problem"
    """The log is damaged, incomplete or contradicts itself."""


@dataclass(frozen=True, slots=True)
class FindingKind:
    """One row of the table; `sample` names a real log that shows the finding, or says that tests make one."""

    name: str
    severity: Severity
    meaning: str
    sample: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was noticed; `event` is the event's number in its log, none where the finding is about the log."""

    kind: FindingKind
    detail: str
    event: int | None = None

    def __str__(self) -> str:
        """One line: name, place, detail."""
        place = "" if self.event is None else f" (event {self.event})"
        return f"{self.kind.name}{place}: {self.detail}"


_MADE: Final = "made by the tests"
_TABLE: dict[str, FindingKind] = {}


def _kind(name: str, severity: Severity, meaning: str, sample: str = _MADE) -> FindingKind:
    return _TABLE.setdefault(name, FindingKind(name, severity, meaning, sample))


# The log as a file
FORMAT_UNKNOWN: Final = _kind(
    "FORMAT_UNKNOWN", Severity.PROBLEM, "The bytes are no event log of a known format.", "binary_bios_measurements-bogus"
)
FORMAT_GUESSED: Final = _kind(
    "FORMAT_GUESSED",
    Severity.INFO,
    "The log has one bank and names only registers 1 to 4, so it was read as a CCEL, whose registers are a trust domain's; "
    "nothing in the log says so.",
    "cos-113-intel-tdx-dupe-separator.bin",
)
LOG_TOO_LARGE: Final = _kind(
    "LOG_TOO_LARGE", Severity.PROBLEM, "The log is larger than what is read; events after the limit are unknown."
)
TOO_MANY_EVENTS: Final = _kind(
    "TOO_MANY_EVENTS", Severity.PROBLEM, "The log has more events than are read; events after the limit are unknown."
)
LOG_CUT: Final = _kind(
    "LOG_CUT", Severity.PROBLEM, "The last record ends before its data does; the events before it were read."
)
RECORD_INVALID: Final = _kind(
    "RECORD_INVALID",
    Severity.PROBLEM,
    "A record's counts or sizes can't be right, so that nothing after it can be read; the events before it were.",
)
TRAILING_BYTES: Final = _kind(
    "TRAILING_BYTES",
    Severity.INFO,
    "After the last record come bytes that are no record and no padding.",
    "specid-vendordata.bin",
)
PADDING: Final = _kind(
    "PADDING",
    Severity.INFO,
    "The log stands in a buffer of fixed size; the rest of the buffer is 0x00 or 0xff.",
    "CCEL_data_ovmf",
)
SPEC_ID_INVALID: Final = _kind(
    "SPEC_ID_INVALID",
    Severity.PROBLEM,
    "The first record says that the log is crypto-agile, but its list of hash algorithms can't be right.",
)
BANK_UNDECLARED: Final = _kind(
    "BANK_UNDECLARED", Severity.PROBLEM, "An event carries a digest of a hash that the log's first record does not name."
)
BANK_REPEATED: Final = _kind(
    "BANK_REPEATED", Severity.PROBLEM, "An event carries two digests of one hash; the first one is used."
)
FINDINGS_DROPPED: Final = _kind("FINDINGS_DROPPED", Severity.WARNING, "There were more findings of one kind than are kept.")

# Events and registers
BANK_MISSING: Final = _kind(
    "BANK_MISSING",
    Severity.WARNING,
    "An event has no digest for the bank that is replayed, so it extends nothing in that bank.",
)
BANK_NOT_COMPUTABLE: Final = _kind(
    "BANK_NOT_COMPUTABLE", Severity.WARNING, "This Python has not got the bank's hash, so the bank can't be replayed."
)
REGISTER_UNKNOWN: Final = _kind(
    "REGISTER_UNKNOWN", Severity.WARNING, "An event that would be extended names a register that does not exist."
)
EVENT_TYPE_UNKNOWN: Final = _kind(
    "EVENT_TYPE_UNKNOWN", Severity.INFO, "The event's type is in no specification that is known here.", "uefi_log.bin"
)
LOCALITY_REPEATED: Final = _kind(
    "LOCALITY_REPEATED", Severity.PROBLEM, "A second StartupLocality event, or one after PCR 0 was extended; it is ignored."
)
LOCALITY_INVALID: Final = _kind(
    "LOCALITY_INVALID", Severity.PROBLEM, "A StartupLocality event names a locality other than 0, 3 or 4; it is ignored."
)
SEPARATOR_MISSING: Final = _kind(
    "SEPARATOR_MISSING",
    Severity.PROBLEM,
    "A register of the firmware has events and no separator: what the firmware and what the operating system extended can't be "
    "told apart.",
    "sb_cert_eventlog",
)
SEPARATOR_REPEATED: Final = _kind(
    "SEPARATOR_REPEATED", Severity.WARNING, "A register has more than one separator; only the first one counts."
)
SEPARATOR_SHARED: Final = _kind(
    "SEPARATOR_SHARED",
    Severity.INFO,
    "Two separators in one measurement register of a TD: several PCRs share the register, and some firmware writes a separator "
    "for each of them.",
    "cos-113-intel-tdx-dupe-separator.bin",
)
SEPARATOR_ERROR: Final = _kind(
    "SEPARATOR_ERROR", Severity.WARNING, "The separator's value is 1: the firmware says that measuring failed."
)
SEPARATOR_LOOKALIKE: Final = _kind(
    "SEPARATOR_LOOKALIKE",
    Severity.INFO,
    "The event's digest is that of a separator and its type is another. Either its bytes happen to be a separator's, such as a "
    "BootOrder of 0001, 0000; or somebody rewrote the type, which is not measured. For Secure Boot it counts as a separator.",
    "confidential-gke-debug-251000_eventlog.bin",
)
SEPARATOR_VALUE: Final = _kind("SEPARATOR_VALUE", Severity.PROBLEM, "A separator with a value that no specification has.")

EXIT_BOOT_SERVICES_MISSING: Final = _kind(
    "EXIT_BOOT_SERVICES_MISSING",
    Severity.WARNING,
    "The firmware started something and the log does not say that it handed over. If PCR 5 differs from a quote, the actions "
    "of ExitBootServices were extended and not logged.",
    "ebs_event_missing_eventlog",
)

# Digests
DIGEST_NOT_OF_DATA: Final = _kind(
    "DIGEST_NOT_OF_DATA",
    Severity.WARNING,
    "The event's type says that its digest is the hash of its data, but no known way of hashing the data gives the digest: "
    "nothing that the data say is proven by a quote.",
    "gdc-host.bin",
)
DIGESTS_DISAGREE: Final = _kind(
    "DIGESTS_DISAGREE",
    Severity.PROBLEM,
    "The data of the event is hashed into one bank and not into another: the banks were not measured from the same bytes.",
)
DIGEST_EMPTY: Final = _kind(
    "DIGEST_EMPTY",
    Severity.WARNING,
    "An event that is extended has a digest of only zeros, which no hash gives.",
)
VARIABLE_VALUE_HASHED: Final = _kind(
    "VARIABLE_VALUE_HASHED",
    Severity.INFO,
    "The digest is of the variable's value alone, without its name and GUID: the name beside the value is not proven.",
    "debian-10.bin",
)
AUTHORITY_VALUE_HASHED: Final = _kind(
    "AUTHORITY_VALUE_HASHED",
    Severity.INFO,
    "shim logs a whole variable for an authority and hashes its value alone; the name is not proven.",
)
AUTHORITY_ONE_BYTE_MORE: Final = _kind(
    "AUTHORITY_ONE_BYTE_MORE",
    Severity.INFO,
    "Old versions of shim log one byte more than they hash; the last byte of the data is not proven.",
    "sb_cert_eventlog",
)
VARIABLE_EMPTY: Final = _kind(
    "VARIABLE_EMPTY",
    Severity.INFO,
    "The variable has no value: the firmware has not got it. Without a value SecureBoot is off.",
    "arch-linux-workstation.bin",
)
TEXT_WITHOUT_NUL: Final = _kind(
    "TEXT_WITHOUT_NUL",
    Severity.INFO,
    "The digest is of the text without the zero that ends it in the log.",
)
TEXT_AFTER_PREFIX: Final = _kind(
    "TEXT_AFTER_PREFIX",
    Severity.INFO,
    "GRUB logs a text with a prefix such as `grub_cmd: ` and hashes what follows the prefix.",
    "rhel8-uefi.bin",
)
TEXT_ONE_BYTE_MORE: Final = _kind(
    "TEXT_ONE_BYTE_MORE",
    Severity.INFO,
    "Some builds of GRUB log one byte of other memory behind the zero that ends a text; the byte is not hashed.",
    "CCEL_AAEL_alibabacloud",
)
TAG_CONTENT_HASHED: Final = _kind(
    "TAG_CONTENT_HASHED",
    Severity.INFO,
    "The digest is of the tagged event's content without its tag.",
)
SECTION_NAME_HASHED: Final = _kind(
    "SECTION_NAME_HASHED",
    Severity.INFO,
    "systemd-stub logs a section's name in UTF-16 and hashes the name in ASCII with its zero.",
    "CCEL_data_grub_gke",
)

# Secure Boot
SECURE_BOOT_UNKNOWN: Final = _kind(
    "SECURE_BOOT_UNKNOWN",
    Severity.WARNING,
    "The log has no event that proves whether Secure Boot was on.",
    "CCEL_data",
)
VARIABLE_REPEATED: Final = _kind(
    "VARIABLE_REPEATED",
    Severity.PROBLEM,
    "A Secure Boot variable is measured twice before the separator with different values: the state is not known.",
)
VARIABLE_AFTER_SEPARATOR: Final = _kind(
    "VARIABLE_AFTER_SEPARATOR",
    Severity.WARNING,
    "A Secure Boot variable is measured after the separator, where no longer only the firmware can extend; it is not believed.",
)
VARIABLE_UNPROVEN: Final = _kind(
    "VARIABLE_UNPROVEN",
    Severity.PROBLEM,
    "The digest is not of the variable that stands beside it; the variable is not believed.",
)
SIGNATURE_LIST_INVALID: Final = _kind(
    "SIGNATURE_LIST_INVALID", Severity.WARNING, "A signature database's sizes can't be right; what was read before is kept."
)

# Windows
SIPA_INVALID: Final = _kind(
    "SIPA_INVALID",
    Severity.WARNING,
    "A SIPA event's size is larger than what holds it; what was read before is kept.",
    "option_rom_eventlog",
)
SEVERAL_BOOTS: Final = _kind(
    "SEVERAL_BOOTS",
    Severity.INFO,
    "The file holds the logs of several boots, one after the other; only the last one is of the current boot.",
)

# IMA
IMA_VIOLATION: Final = _kind(
    "IMA_VIOLATION",
    Severity.WARNING,
    "The entry's template hash is all zeros: the file was open for writing while it was measured. All ones are extended.",
    "ima-log-sha1",
)
IMA_HASH_WRONG: Final = _kind(
    "IMA_HASH_WRONG",
    Severity.PROBLEM,
    "The entry's template hash is not the hash of its fields; the fields are not proven.",
    "ima-log-unknown",
)
IMA_TEMPLATE_UNKNOWN: Final = _kind(
    "IMA_TEMPLATE_UNKNOWN", Severity.INFO, "The entry's template is none that is known here; its fields are data without names."
)

# CEL and systemd
CEL_NUMBER_GAP: Final = _kind(
    "CEL_NUMBER_GAP", Severity.WARNING, "Record numbers do not rise by one: records are missing, repeated or were reordered."
)
JSON_INVALID: Final = _kind(
    "JSON_INVALID", Severity.PROBLEM, "A record is no JSON object of the expected shape; it is left out of the replay."
)
NOT_A_PCR: Final = _kind(
    "NOT_A_PCR", Severity.INFO, "The record is about an NV index that is extended like a PCR; it is shown and not replayed."
)

KINDS: Final = tuple(_TABLE.values())
_KEPT_OF_A_KIND: Final = 64


class Findings:
    """Collects findings; of each kind no more than a bounded number is kept, so that a hostile log can't fill memory."""

    def __init__(self) -> None:
        self._kept: list[Finding] = []
        self._counts: dict[str, int] = {}

    def add(self, kind: FindingKind, detail: str, event: int | None = None) -> None:
        """Keep a finding, or count it only."""
        count = self._counts[kind.name] = self._counts.get(kind.name, 0) + 1
        if count <= _KEPT_OF_A_KIND:
            self._kept.append(Finding(kind, detail, event))

    def all(self) -> tuple[Finding, ...]:
        """Return what was kept, and for each kind of which some were not, how many there were."""
        dropped = (
            Finding(FINDINGS_DROPPED, f"{name}: {count} in all, the first {_KEPT_OF_A_KIND} are kept")
            for name, count in self._counts.items()
            if count > _KEPT_OF_A_KIND
        )
        return (*self._kept, *dropped)
