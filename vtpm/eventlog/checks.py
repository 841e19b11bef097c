"""Which data of a log its digests prove: the hash of what is compared with each digest.

What firmware and loaders hash differs from what the specification says. Each known way is a row of `DEVIATIONS`, tried in
order after the specified one; a new habit is a new row.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.findings import FindingKind, Findings
from vtpm.eventlog.hashes import hasher, name
from vtpm.eventlog.types import DIGEST_IS_OF_DATA, DIGEST_MAY_BE_OF_DATA, EventType, is_known, type_name
from vtpm.eventlog.uefi import parse_tag, parse_variable, utf16, variable_value
from vtpm.eventlog.userspace import content_string
from vtpm.eventlog.values import CEL_CONTENT, IMA_TEMPLATE, SYSTEMD_CONTENT, LogFormat, UnverifiedEvent, UnverifiedLog

_FIRMWARE_REGISTERS: Final = range(8)
_TEXT_PREFIXES: Final = (
    b"grub_cmd: ",
    b"grub_cmd ",
    b"kernel_cmdline: ",
    b"kernel_cmdline ",
    b"grub_kernel_cmdline ",
    b"module_cmdline: ",
)


class Proof(enum.Enum):
    """What a digest says about the data beside it."""

    DATA = "the digest is the hash of the data"
    VALUE = "the digest is the hash of the variable's value alone"
    PART = "the digest is the hash of a part of the data"
    ELSEWHERE = "the digest is of something that the log does not hold"
    WRONG = "the digest should be the hash of the data and is not"
    UNKNOWN = "the hash can't be computed here, or the event has no digest of the bank"


@dataclass(frozen=True, slots=True)
class Deviation:
    """A way of hashing an event that the specification has not got: its finding, and what is hashed instead."""

    kind: FindingKind
    types: frozenset[int]
    proof: Proof
    hashed: Callable[[bytes], Iterator[bytes]]


def _value(data: bytes) -> Iterator[bytes]:
    value = variable_value(data)
    if value is not None:
        yield value


def _one_byte_less(data: bytes) -> Iterator[bytes]:
    if data:
        yield data[:-1]


def _without_zero(data: bytes) -> Iterator[bytes]:
    if data.endswith(b"\0\0"):
        yield data[:-2]
    if data.endswith(b"\0"):
        yield data[:-1]


def _after_prefix(data: bytes) -> Iterator[bytes]:
    for prefix in _TEXT_PREFIXES:
        if data.startswith(prefix):
            yield data[len(prefix) :].removesuffix(b"\0")
            yield data[len(prefix) :]


def _after_prefix_to_zero(data: bytes) -> Iterator[bytes]:
    text, zero, rest = data.partition(b"\0")
    if zero and len(rest) == 1:
        yield from _after_prefix(text)


def _tag_content(data: bytes) -> Iterator[bytes]:
    tag = parse_tag(data)
    if tag is not None:
        yield tag[1]
        yield tag[1].removesuffix(b"\0")


def _section_name(data: bytes) -> Iterator[bytes]:
    text = utf16(data)
    if text.startswith("."):
        yield text.encode("ascii", "replace") + b"\0"


_VARIABLES: Final = frozenset(
    {EventType.EV_EFI_VARIABLE_DRIVER_CONFIG, EventType.EV_EFI_VARIABLE_BOOT, EventType.EV_EFI_VARIABLE_BOOT2}
)
_AUTHORITY: Final = frozenset({EventType.EV_EFI_VARIABLE_AUTHORITY})
_TEXTS: Final = frozenset({EventType.EV_IPL, EventType.EV_ACTION, EventType.EV_EFI_ACTION, EventType.EV_S_CRTM_VERSION})
_IPL: Final = frozenset({EventType.EV_IPL})

DEVIATIONS: Final = (
    Deviation(found.VARIABLE_VALUE_HASHED, _VARIABLES, Proof.VALUE, _value),
    Deviation(found.AUTHORITY_VALUE_HASHED, _AUTHORITY, Proof.VALUE, _value),
    Deviation(found.AUTHORITY_ONE_BYTE_MORE, _AUTHORITY, Proof.PART, _one_byte_less),
    Deviation(found.TEXT_AFTER_PREFIX, _IPL, Proof.PART, _after_prefix),
    Deviation(found.TEXT_ONE_BYTE_MORE, _IPL, Proof.PART, _after_prefix_to_zero),
    Deviation(found.SECTION_NAME_HASHED, _IPL, Proof.PART, _section_name),
    Deviation(found.TEXT_WITHOUT_NUL, _TEXTS, Proof.PART, _without_zero),
    Deviation(
        found.TAG_CONTENT_HASHED,
        frozenset({EventType.EV_EVENT_TAG}),
        Proof.PART,
        _tag_content,
    ),
)
_BY_TYPE: Final[dict[int, tuple[Deviation, ...]]] = {
    event_type: tuple(row for row in DEVIATIONS if event_type in row.types)
    for event_type in DIGEST_IS_OF_DATA | DIGEST_MAY_BE_OF_DATA
}


def _content_string(data: bytes) -> Iterator[bytes]:
    text = content_string(data)
    if text is not None:
        yield text.encode("utf-8", "replace")


# Logs without TCG's event types: what is hashed is a part of the record by its specification and no deviation.
_CONTENT: Final[dict[int, Callable[[bytes], Iterator[bytes]]]] = {
    CEL_CONTENT: lambda data: iter((data,)),
    SYSTEMD_CONTENT: _content_string,
    IMA_TEMPLATE: lambda data: iter((data,)),
}


def proof_of(event: UnverifiedEvent, bank: int) -> tuple[Proof, FindingKind | None]:
    """Return what the event's digest in `bank` proves about its data, and the deviation where there is one."""
    digest, make = event.digests.get(bank), hasher(bank)
    if digest is None or make is None:
        return Proof.UNKNOWN, None
    content = _CONTENT.get(event.event_type)
    if content is not None:
        return (Proof.PART if any(make(part).digest() == digest for part in content(event.data)) else Proof.ELSEWHERE), None
    specified = event.event_type in DIGEST_IS_OF_DATA
    if not specified and event.event_type not in DIGEST_MAY_BE_OF_DATA:
        return Proof.ELSEWHERE, None
    if make(event.data).digest() == digest:
        return Proof.DATA, None
    for row in _BY_TYPE[event.event_type]:
        if any(make(part).digest() == digest for part in row.hashed(event.data)):
            return row.proof, row.kind
    return (Proof.WRONG, found.DIGEST_NOT_OF_DATA) if specified else (Proof.ELSEWHERE, None)


_PROVING: Final = frozenset({Proof.DATA, Proof.VALUE, Proof.PART})


def is_proven(event: UnverifiedEvent, bank: int) -> bool:
    """Return whether the data of the event stand and fall with its digest in `bank`."""
    return proof_of(event, bank)[0] in _PROVING


def check_log(log: UnverifiedLog) -> tuple[found.Finding, ...]:
    """Return what the events of a TCG log or a CCEL show beside their replay; findings of reading are not repeated."""
    findings = Findings()
    for event in log.events:
        if event.event_type == EventType.EV_NO_ACTION:
            continue
        _check_digests(event, findings)
        if not is_known(event.event_type):
            findings.add(found.EVENT_TYPE_UNKNOWN, type_name(event.event_type), event.number)
    _check_separators(log, findings)
    _check_end(log, findings)
    return findings.all()


def _check_end(log: UnverifiedLog, findings: Findings) -> None:
    started = any(event.event_type == EventType.EV_EFI_BOOT_SERVICES_APPLICATION for event in log.events)
    ended = any(
        event.event_type == EventType.EV_EFI_ACTION and event.data.startswith(b"Exit Boot Services") for event in log.events
    )
    if started and not ended and log.format in {LogFormat.TCG, LogFormat.TCG_SHA1, LogFormat.CCEL}:
        findings.add(found.EXIT_BOOT_SERVICES_MISSING, "no event of ExitBootServices")


def _check_digests(event: UnverifiedEvent, findings: Findings) -> None:
    proofs: dict[int, Proof] = {}
    said: set[str] = set()
    for bank, digest in event.digests.items():
        if not any(digest):
            findings.add(found.DIGEST_EMPTY, name(bank), event.number)
            continue
        proof, kind = proof_of(event, bank)
        proofs[bank] = proof
        if kind is not None and kind.name not in said:
            said.add(kind.name)
            findings.add(kind, f"{type_name(event.event_type)} of register {event.register}", event.number)
    known = {proof in _PROVING for proof in proofs.values() if proof is not Proof.UNKNOWN}
    if len(known) > 1:
        findings.add(found.DIGESTS_DISAGREE, ", ".join(map(name, proofs)), event.number)
    if event.event_type == EventType.EV_EFI_VARIABLE_DRIVER_CONFIG:
        variable = parse_variable(event.data)
        if variable is not None and not variable.value:
            findings.add(found.VARIABLE_EMPTY, variable.name, event.number)


def is_separator(event: UnverifiedEvent, bank: int) -> bool:
    """Return whether the event's digest in `bank` is a separator's; its type is not asked, since types are not measured."""
    return event.digests.get(bank) in _separator_digests(bank)


@functools.cache
def _separator_digests(bank: int) -> frozenset[bytes]:
    make = hasher(bank)
    return frozenset(make(value).digest() for value in _SEPARATORS) if make else frozenset()


_SEPARATORS: Final = {
    b"\0\0\0\0": None,
    b"\xff\xff\xff\xff": None,
    b"WBCL": None,
    b"\1\0\0\0": found.SEPARATOR_ERROR,
}


def _check_separators(log: UnverifiedLog, findings: Findings) -> None:
    shared = log.td
    first: dict[int, int] = {}
    for event in log.events:
        if event.event_type != EventType.EV_SEPARATOR:
            if any(is_separator(event, bank) for bank in event.digests):
                findings.add(found.SEPARATOR_LOOKALIKE, f"logged as {type_name(event.event_type)}", event.number)
            continue
        if event.register in first:
            kind = found.SEPARATOR_SHARED if shared else found.SEPARATOR_REPEATED
            findings.add(kind, f"{log.register_name(event.register)}, first in event {first[event.register]}", event.number)
        first.setdefault(event.register, event.number)
        odd = _SEPARATORS.get(event.data, found.SEPARATOR_VALUE)
        if odd is not None:
            findings.add(odd, f"{log.register_name(event.register)}: {event.data[:16].hex()}", event.number)
    if log.format not in {LogFormat.TCG, LogFormat.TCG_SHA1}:
        return
    used = {event.register for event in log.events if event.event_type != EventType.EV_NO_ACTION}
    if 7 in used or 4 in used:
        for register in sorted(used - set(first)):
            if register in _FIRMWARE_REGISTERS:
                findings.add(found.SEPARATOR_MISSING, log.register_name(register))
