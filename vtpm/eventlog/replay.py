"""The register values that a log leads to, in any bank and up to any event (TPM 2.0 Library, Part 1, 17.3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.findings import Finding, Findings
from vtpm.eventlog.hashes import SIZES, hasher, name
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog
from vtpm.tpm.pcr import PCR_COUNT

EV_NO_ACTION: Final = 3
STARTUP_LOCALITY: Final = b"StartupLocality\0"
# A host-controlled start measures before _TPM_Init ends and leaves PCR 0 as if locality 4 had begun (Firmware Profile, 3.3.2).
_LOCALITIES: Final = frozenset({0, 3, 4})
_RTMRS: Final = 5


@dataclass(frozen=True, slots=True)
class Replay:
    """Register values by index, for the registers that the log extends; `findings` says what was left out and why."""

    bank: int
    values: dict[int, bytes]
    findings: tuple[Finding, ...]


def initial_value(register: int, size: int, locality: int = 0) -> bytes:
    """Return what a PCR holds after _TPM_Init (PC Client Platform TPM Profile, table 6): PCRs 17 to 22 are all ones."""
    if register == 0:
        return bytes(size - 1) + bytes([locality])
    return b"\xff" * size if 17 <= register <= 22 else bytes(size)


def replay(log: UnverifiedLog, bank: int, end: int | None = None) -> Replay:
    """Return what the log's events before number `end` (default: all) lead to in `bank`, a TPM_ALG_ID.

    EV_NO_ACTION events extend nothing. A StartupLocality event sets where PCR 0 begins.
    """
    events = log.events if end is None else log.events[: max(end, 0)]
    return replay_events(events, bank, td=log.td)


def replay_events(events: Iterable[UnverifiedEvent], bank: int, *, td: bool = False) -> Replay:
    """Return what `events` lead to in `bank`; `td` says that the registers are a trust domain's and no PCRs."""
    findings = Findings()
    make, size = hasher(bank), SIZES.get(bank)
    if make is None or size is None:
        findings.add(found.BANK_NOT_COMPUTABLE, name(bank))
        return Replay(bank, {}, findings.all())
    count = _RTMRS if td else PCR_COUNT
    values: dict[int, bytes] = {}
    locality = 0
    for event in events:
        register = event.register
        if event.event_type == EV_NO_ACTION:
            if event.data.startswith(STARTUP_LOCALITY):
                locality = _locality(event, locality, 0 in values, findings)
            continue
        digest = event.digests.get(bank)
        if digest is None:
            findings.add(found.BANK_MISSING, f"no {name(bank)} digest", event.number)
            continue
        old = values.get(register)
        if old is None:
            if not 0 <= register < count:
                findings.add(found.REGISTER_UNKNOWN, f"register {register}", event.number)
                continue
            old = bytes(size) if td else initial_value(register, size, locality)
        values[register] = make(old + digest).digest()
    return Replay(bank, values, findings.all())


def _locality(event: UnverifiedEvent, before: int, extended: bool, findings: Findings) -> int:
    value = event.data[len(STARTUP_LOCALITY) :][:1]
    if not value or value[0] not in _LOCALITIES:
        findings.add(found.LOCALITY_INVALID, f"locality {value.hex() or 'missing'}", event.number)
        return before
    if before or extended:
        findings.add(found.LOCALITY_REPEATED, f"locality {value[0]}", event.number)
        return before
    return value[0]
