"""What `vtpm eventlog` and `vtpm pcr` print: values for programs, tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vtpm.errors import InvalidArgumentError
from vtpm.eventlog import hashes
from vtpm.eventlog.bootpath import boot_path, step_line
from vtpm.eventlog.checks import check_log
from vtpm.eventlog.describe import certificate_subject, count_of, describe, printable
from vtpm.eventlog.explain import RegisterDifference
from vtpm.eventlog.findings import Finding, Severity
from vtpm.eventlog.ima import UnverifiedImaLog, check_ima, replay_ima
from vtpm.eventlog.predict import Prediction
from vtpm.eventlog.reading import AnyLog
from vtpm.eventlog.replay import replay
from vtpm.eventlog.secureboot import UnverifiedAuthority, UnverifiedSecureBoot, secure_boot
from vtpm.eventlog.types import type_name
from vtpm.eventlog.values import LogFormat, UnverifiedLog
from vtpm.eventlog.wbcl import windows_boot

Registers = frozenset[int] | None
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
_YES: Final = {True: "on", False: "off", None: "unknown"}


@dataclass(frozen=True, slots=True)
class View:
    """One answer, for programs and for people."""

    value: Any
    tables: Sequence[Table]


def bank_of(log: UnverifiedLog, text: str) -> int:
    """Return the TPM_ALG_ID of the bank to look at.

    Raises:
        InvalidArgumentError: PCR_BANK_UNKNOWN, the log has not got the bank.
    """
    if not text:
        return hashes.SHA256 if hashes.SHA256 in log.banks else max(log.banks, default=hashes.SHA256)
    bank = hashes.by_name(text)
    if bank is None or bank not in log.banks:
        names = ", ".join(map(hashes.name, log.banks)) or "none"
        raise InvalidArgumentError("PCR_BANK_UNKNOWN", f"the log has no bank {text[:40]!r}", remedy=f"it has {names}")
    return bank


def ima_bank(log: UnverifiedImaLog, text: str) -> int:
    """Return the TPM_ALG_ID of the bank to replay an IMA list in.

    Raises:
        InvalidArgumentError: PCR_BANK_UNKNOWN.
    """
    bank = hashes.by_name(text) if text else log.hash_alg
    if bank is None:
        raise InvalidArgumentError("PCR_BANK_UNKNOWN", f"there is no PCR bank {text[:40]!r}")
    return bank


def notes(log: AnyLog) -> Iterator[str]:
    """Yield what should be known beside the view: the format, and findings; of small ones only how many there are."""
    yield f"read as {log.format}; nothing in it is proven before its registers are quoted"
    if isinstance(log, UnverifiedImaLog):
        found: tuple[Finding, ...] = (*log.findings, *check_ima(log))
    else:
        found = (*log.findings, *check_log(log))
    small = Counter(item.kind.name for item in found if item.kind.severity is Severity.INFO)
    for item in found:
        if item.kind.severity is not Severity.INFO:
            yield f"{item.kind.severity}: {printable(str(item))}"
    if small:
        yield "known habits: " + ", ".join(f"{name} ({count})" for name, count in sorted(small.items()))


def _findings(found: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {"name": item.kind.name, "severity": str(item.kind.severity), "detail": printable(item.detail), "event": item.event}
        for item in found
    ]


def events(log: UnverifiedLog, bank: int, wanted: Registers) -> View:
    """Every event."""
    chosen = [event for event in log.events if wanted is None or event.register in wanted]
    value = {
        "format": str(log.format),
        "events": [
            {
                "number": event.number,
                "register": log.register_name(event.register),
                "type": type_name(event.event_type),
                "digests": {hashes.name(alg): digest.hex() for alg, digest in event.digests.items()},
                "text": describe(event),
            }
            for event in chosen
        ],
        "findings": _findings((*log.findings, *check_log(log))),
    }
    rows = [
        (
            str(event.number),
            log.register_name(event.register),
            type_name(event.event_type).removeprefix("EV_"),
            event.digests.get(bank, b"").hex()[:16],
            describe(event),
        )
        for event in chosen
    ]
    return View(value, [("", ("EVENT", "REGISTER", "TYPE", hashes.name(bank).upper(), "WHAT"), rows)])


def values(log: UnverifiedLog, bank: int, wanted: Registers) -> View:
    """The values that the log leads to, in every bank for programs, in one for people."""
    banks = {alg: replay(log, alg) for alg in log.banks}
    value = {
        "format": str(log.format),
        "registers": {
            hashes.name(alg): {
                log.register_name(index): digest.hex()
                for index, digest in sorted(made.values.items())
                if wanted is None or index in wanted
            }
            for alg, made in banks.items()
        },
        "findings": _findings([item for made in banks.values() for item in made.findings]),
    }
    made = banks[bank].values if bank in banks else {}
    rows = [
        (log.register_name(index), digest.hex()) for index, digest in sorted(made.items()) if wanted is None or index in wanted
    ]
    return View(value, [("", ("REGISTER", hashes.name(bank).upper()), rows)])


def boot(log: UnverifiedLog, bank: int, wanted: Registers) -> View:
    """How the machine was booted, and what is proven about Secure Boot."""
    path = boot_path(log, bank)
    value: dict[str, Any] = {
        "format": str(log.format),
        "firmware_version": path.firmware_version,
        "loaders": list(path.loaders),
        "command_lines": list(path.command_lines),
        "initrds": [digest.hex() for digest in path.initrds],
        "exit_boot_services": path.exit_boot_services,
    }
    rows = [
        ("firmware", path.firmware_version or "unknown"),
        ("loaders", ", ".join(path.loaders) or "none recognised"),
        *(("command line", line) for line in path.command_lines),
        *(("initrd", digest.hex()) for digest in path.initrds),
        ("firmware ended", {True: "yes", False: "with an error", None: "the log does not say"}[path.exit_boot_services]),
    ]
    if log.format in {LogFormat.TCG, LogFormat.TCG_SHA1, LogFormat.CCEL}:
        state = secure_boot(log, bank)
        value["secure_boot"] = _secure_boot(state)
        rows += _secure_boot_rows(state)
    windows = windows_boot(log)
    if windows is not None:
        value["windows"] = {
            "modules": [{"path": printable(name), "authenticode": digest.hex()} for name, digest in windows.modules],
            "trust_points": len(windows.trust_points),
            "findings": _findings(windows.findings),
        }
        rows.append(("Windows", f"{len(windows.modules)} modules measured"))
    steps = [step for step in path.steps if wanted is None or step.register in wanted]
    value["steps"] = [
        {
            "event": step.event,
            "register": log.register_name(step.register),
            "kind": step.kind,
            "text": step.text,
            "digest": step.digest.hex(),
            "proof": step.proof.name,
        }
        for step in steps
    ]
    lines = [(str(step.event), log.register_name(step.register), step_line(step)) for step in steps]
    return View(value, [("", ("WHAT", "VALUE"), rows), ("", ("EVENT", "REGISTER", "STEP"), lines)])


def _secure_boot(state: UnverifiedSecureBoot) -> dict[str, Any]:
    return {
        "enabled": state.enabled,
        "setup_mode": state.setup_mode,
        "audit_mode": state.audit_mode,
        "deployed_mode": state.deployed_mode,
        "databases": {
            name: [
                {"kind": item.kind, "owner": str(item.owner), "name": _signature_name(item.kind, item.data)} for item in found
            ]
            for name, found in state.databases.items()
        },
        "authorities_before_separator": [_authority(item) for item in state.before],
        "authorities_after_separator": [_authority(item) for item in state.after],
        "findings": _findings(state.findings),
    }


def _secure_boot_rows(state: UnverifiedSecureBoot) -> Iterator[tuple[str, str]]:
    yield "Secure Boot", _YES[state.enabled]
    for name, found in state.databases.items():
        yield name, count_of(len(found))
    for authority in state.before:
        yield "authority before the separator", _authority(authority)
    for authority in state.after:
        yield "authority after the separator", _authority(authority)
    for item in state.findings:
        yield f"{item.kind.severity}", printable(str(item))


def _authority(item: UnverifiedAuthority) -> str:
    if item.signature is not None:
        return f"{item.name}: {_signature_name(item.signature.kind, item.signature.data)}"
    return printable(f"{item.name}: {certificate_subject(item.value) or item.value[:32].decode('utf-8', 'replace')}")


def _signature_name(kind: str, data: bytes) -> str:
    return certificate_subject(data) or data[:8].hex() if kind.startswith("x509") else data.hex()[:128]


def ima_entries(log: UnverifiedImaLog, wanted: Registers) -> View:
    """Every entry of an IMA list."""
    chosen = [entry for entry in log.entries if wanted is None or entry.pcr in wanted]
    value = {
        "format": str(log.format),
        "entries": [
            {
                "pcr": entry.pcr,
                "template": entry.template,
                "template_hash": entry.template_hash.hex(),
                "hash": entry.file_digest[0],
                "digest": entry.file_digest[1].hex(),
                "path": printable(entry.path),
            }
            for entry in chosen
        ],
        "findings": _findings((*log.findings, *check_ima(log))),
    }
    rows = [
        (str(entry.pcr), entry.template, f"{entry.file_digest[0]}:{entry.file_digest[1].hex()[:16]}", printable(entry.path))
        for entry in chosen
    ]
    return View(value, [("", ("PCR", "TEMPLATE", "DIGEST", "PATH"), rows)])


def ima_values(log: UnverifiedImaLog, bank: int, wanted: Registers) -> View:
    """The values that an IMA list leads to from zero; PCR 10 also holds what was extended before the list."""
    made = {index: digest.hex() for index, digest in replay_ima(log, bank).items() if wanted is None or index in wanted}
    rows = [(f"PCR {index}", digest) for index, digest in made.items()]
    value = {
        "format": str(log.format),
        "registers": {hashes.name(bank): {f"PCR {index}": text for index, text in made.items()}},
    }
    return View(value, [("", ("REGISTER", hashes.name(bank).upper()), rows)])


def differences(found: Sequence[RegisterDifference]) -> list[dict[str, Any]]:
    """Differences for programs."""
    return [
        {
            "register": item.name,
            "value": item.value.hex() if item.value else None,
            "expected": [value.hex() for value in item.expected],
            "explained": item.explained,
            "exact": item.exact,
            "dropped": item.dropped,
            "differences": [
                {
                    "change": str(difference.change),
                    "subject": str(difference.subject),
                    "text": difference.text,
                    "event": difference.event,
                    "value_without": difference.without.hex() if difference.without else None,
                }
                for difference in item.differences
            ],
        }
        for item in found
    ]


def differences_text(found: Sequence[RegisterDifference]) -> Iterator[str]:
    """Differences for people: the register, then a line for each difference and the value without it."""
    if not found:
        yield "no difference"
    for item in found:
        yield f"{item.name} is {item.value.hex() if item.value else 'not extended'}"
        yield from (f"  expected {allowed.hex()}" for allowed in item.expected)
        for difference in item.differences:
            place = "" if difference.event is None else f" (event {difference.event})"
            yield f"  {difference.change}: {difference.text}{place}"
            as_expected = difference.without in item.expected or (difference.without is None and not item.expected)
            sole = ", as expected: this is all that differs" if as_expected else ""
            value = difference.without.hex() if difference.without else "not extended"
            yield f"    without it {item.name} would be {value}{sole}"
        if item.dropped:
            yield f"  and {item.dropped} differences more"
        if not item.exact:
            yield "  too many events differ to say in which order each one stands"
        if not item.differences:
            yield "  nothing says which event differs: the reference has values and no events of this register"
        elif not item.explained:
            yield "  the events of the reference do not lead to the expected value"


def prediction(made: Prediction) -> View:
    """The values of a boot to come, and the events that lead there."""
    value = {
        "bank": hashes.name(made.bank),
        "values": {str(index): digest.hex() for index, digest in made.values.items()},
        "events": [
            {"register": item.register, "digest": item.digest.hex(), "text": item.text, "predicted": item.predicted}
            for item in made.events
        ],
        "assumptions": list(made.assumptions),
    }
    rows = [(f"PCR {index}", digest.hex()) for index, digest in made.values.items()]
    lines = [(f"PCR {item.register}", item.digest.hex()[:16], item.text) for item in made.events if item.predicted]
    tables: list[Table] = [("", ("REGISTER", hashes.name(made.bank).upper()), rows)]
    if lines:
        tables.append(("", ("REGISTER", "PREDICTED EVENT", "WHAT"), lines))
    return View(value, tables)
