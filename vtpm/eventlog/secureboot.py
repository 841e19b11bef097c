"""What a log proves about Secure Boot: the mode, the databases, and which authorities vouched for what was started.

Only what the firmware measured counts: the variables before the separator of PCR 7 (of RTMR 0 in a TD), and each variable
only where its digest is the hash of the variable. The log's data are never believed for their own sake.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.checks import Proof, is_separator, proof_of
from vtpm.eventlog.findings import Finding, Findings
from vtpm.eventlog.types import EventType
from vtpm.eventlog.uefi import (
    EFI_GLOBAL_VARIABLE,
    EFI_IMAGE_SECURITY_DATABASE,
    UnverifiedSignature,
    UnverifiedVariable,
    parse_authority,
    parse_signature_lists,
    parse_variable,
)
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog

_MODES: Final = ("SecureBoot", "SetupMode", "AuditMode", "DeployedMode")
DATABASES: Final[tuple[str, ...]] = ("PK", "KEK", "db", "dbx", "dbt", "dbr")
# A firmware without the variable logs it empty. Any other value is none that the specification has.
_VALUES: Final = {b"\1": True, b"\0": False, b"": False}
_VENDORS: Final[dict[str, uuid.UUID]] = {
    **dict.fromkeys(("SecureBoot", "SetupMode", "AuditMode", "DeployedMode", "PK", "KEK"), EFI_GLOBAL_VARIABLE),
    **dict.fromkeys(("db", "dbx", "dbt", "dbr"), EFI_IMAGE_SECURITY_DATABASE),
}
# AuditMode and DeployedMode may be in PCR 1 (Firmware Profile 1.06, 3.3.4.2); all else of Secure Boot is in PCR 7.
_PCR_SECURE_BOOT: Final = 7
_PCR_CONFIGURATION: Final = 1
_RTMR_0: Final = 1


@dataclass(frozen=True, slots=True)
class UnverifiedAuthority:
    """A variable, or an entry of one, that vouched for an image; `signature` where it is an entry of a signature database."""

    event: int
    vendor: uuid.UUID
    name: str
    value: bytes
    signature: UnverifiedSignature | None


@dataclass(frozen=True, slots=True)
class UnverifiedSecureBoot:
    """Secure Boot as a log tells it; as true as the replay of the log, and no truer.

    A mode is none where no event proves it. `databases` has the measured ones, in the order PK, KEK, db, dbx.
    `before` and `after` are the authorities used before and after the separator: drivers and boot loaders.
    """

    enabled: bool | None
    audit_mode: bool | None
    deployed_mode: bool | None
    setup_mode: bool | None
    databases: Mapping[str, tuple[UnverifiedSignature, ...]]
    before: tuple[UnverifiedAuthority, ...]
    after: tuple[UnverifiedAuthority, ...]
    separator: int | None
    findings: tuple[Finding, ...]


def secure_boot(log: UnverifiedLog, bank: int) -> UnverifiedSecureBoot:
    """Return what the log proves about Secure Boot, if its replay in `bank` equals quoted registers."""
    findings = Findings()
    policy = _RTMR_0 if log.td else _PCR_SECURE_BOOT
    registers = {policy, _RTMR_0 if log.td else _PCR_CONFIGURATION}
    values: dict[str, bytes] = {}
    contradicted: set[str] = set()
    before: list[UnverifiedAuthority] = []
    after: list[UnverifiedAuthority] = []
    closed: dict[int, int] = {}
    for event in log.events:
        if event.register not in registers or event.event_type == EventType.EV_NO_ACTION:
            continue
        if is_separator(event, bank):
            closed.setdefault(event.register, event.number)
        elif event.event_type == EventType.EV_EFI_VARIABLE_AUTHORITY and event.register == policy:
            authority = _authority(event, bank, findings)
            if authority is not None:
                (after if policy in closed else before).append(authority)
        elif event.event_type == EventType.EV_EFI_VARIABLE_DRIVER_CONFIG:
            variable = _variable(event, bank, findings)
            if variable is None or (event.register != policy and variable.name not in {"AuditMode", "DeployedMode"}):
                continue
            if event.register in closed:
                findings.add(found.VARIABLE_AFTER_SEPARATOR, variable.name, event.number)
            elif values.setdefault(variable.name, variable.value) != variable.value:
                contradicted.add(variable.name)
                findings.add(found.VARIABLE_REPEATED, variable.name, event.number)
    if policy not in closed:
        findings.add(found.SEPARATOR_MISSING, f"{log.register_name(policy)}: nothing about Secure Boot is proven")
        values = {}
    for name in contradicted:
        values.pop(name, None)
    modes = {name: _VALUES.get(values[name]) if name in values else None for name in _MODES}
    if modes["SecureBoot"] is None:
        findings.add(found.SECURE_BOOT_UNKNOWN, "no SecureBoot variable before the separator is proven")
    databases = {name: _database(name, values[name], findings) for name in DATABASES if name in values}
    return UnverifiedSecureBoot(
        enabled=modes["SecureBoot"],
        audit_mode=modes["AuditMode"],
        deployed_mode=modes["DeployedMode"],
        setup_mode=modes["SetupMode"],
        databases=databases,
        before=tuple(before),
        after=tuple(after),
        separator=closed.get(policy),
        findings=findings.all(),
    )


def _variable(event: UnverifiedEvent, bank: int, findings: Findings) -> UnverifiedVariable | None:
    """Return a variable of Secure Boot that its digest proves with its name; none for other variables."""
    variable = parse_variable(event.data)
    if variable is None or _VENDORS.get(variable.name) != variable.vendor:
        return None
    if proof_of(event, bank)[0] is not Proof.DATA:
        findings.add(found.VARIABLE_UNPROVEN, variable.name, event.number)
        return None
    return variable


def _authority(event: UnverifiedEvent, bank: int, findings: Findings) -> UnverifiedAuthority | None:
    variable = parse_variable(event.data)
    if variable is None:
        findings.add(found.VARIABLE_UNPROVEN, "an authority that is no variable", event.number)
        return None
    proof, _ = proof_of(event, bank)
    if proof not in {Proof.DATA, Proof.VALUE, Proof.PART}:
        findings.add(found.VARIABLE_UNPROVEN, f"authority {variable.name}", event.number)
        return None
    signature = parse_authority(variable.value) if variable.vendor == EFI_IMAGE_SECURITY_DATABASE else None
    return UnverifiedAuthority(event.number, variable.vendor, variable.name, variable.value, signature)


def _database(name: str, value: bytes, findings: Findings) -> tuple[UnverifiedSignature, ...]:
    signatures, wrong = parse_signature_lists(value)
    if wrong:
        findings.add(found.SIGNATURE_LIST_INVALID, f"{name}: {wrong}")
    return signatures
