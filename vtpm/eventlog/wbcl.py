"""Windows Boot Configuration Logs: SIPA events inside a TCG log (Windows WDK, wbcl.h).

A SIPA event is {u32 type, u32 size, data}; events of some types hold further events. Those of the boot are in EV_EVENT_TAG
events of PCRs 11 to 14 and are measured. Trust points (a quote that Windows made when it resumed or started) are in
EV_NO_ACTION events of PCR 0xFFFFFFFF and are not measured.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.findings import Finding, Findings
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog

TRUST_POINT_REGISTER: Final = 0xFFFFFFFF
MAX_DEPTH: Final = 4
MAX_SIPA_EVENTS: Final = 16384
_HEAD: Final = struct.Struct("<II")

TRUST_BOUNDARY: Final = 0x40010001
TRUST_POINT: Final = 0xC0010004
_CONTAINERS: Final = frozenset({TRUST_BOUNDARY, 0x40010002, 0x40010003, TRUST_POINT, 0x40010005, 0x40010006})

SIPA_NAMES: Final = {
    TRUST_BOUNDARY: "trust boundary",
    0x40010002: "early launch driver",
    0x40010003: "loaded module",
    TRUST_POINT: "trust point",
    0x40010005: "KSR",
    0x40010006: "KSR signed measurement",
    0x00020001: "information",
    0x00020002: "boot counter",
    0x00020003: "transfer of control",
    0x00020004: "return of an application",
    0x00020005: "BitLocker unlock",
    0x00020006: "event counter",
    0x00020007: "counter id",
    0x00020008: "memory overwrite can't be cancelled",
    0x00020009: "application SVN",
    0x0002000A: "SVN chain status",
    0x0002000B: "memory overwrite API status",
    0x00040001: "boot debugging",
    0x00040002: "boot revocation list",
    0x00050001: "kernel debugging",
    0x00050002: "code integrity",
    0x00050003: "test signing",
    0x00050004: "data execution prevention",
    0x00050005: "safe mode",
    0x00050006: "Windows PE",
    0x00050007: "physical address extension",
    0x00050008: "OS device",
    0x00050009: "system root",
    0x0005000A: "hypervisor launch type",
    0x0005000B: "hypervisor path",
    0x0005000C: "hypervisor IOMMU policy",
    0x0005000D: "hypervisor debugging",
    0x0005000E: "driver load policy",
    0x0005000F: "code integrity policy",
    0x00050010: "hypervisor MMIO NX policy",
    0x00050011: "hypervisor MSR filter policy",
    0x00050012: "VSM launch type",
    0x00050013: "OS revocation list",
    0x00050020: "VSM identity key",
    0x00050021: "flight signing",
    0x00050022: "page file encryption",
    0x00050023: "VSM identity signing key",
    0x00050024: "hibernation disabled",
    0x00050025: "dumps disabled",
    0x00050026: "dump encryption",
    0x00050027: "dump encryption key",
    0x00050028: "LSA isolation",
    0x00060001: "no authority",
    0x00060002: "authority's public key",
    0x00070001: "file path",
    0x00070002: "image size",
    0x00070003: "hash algorithm",
    0x00070004: "Authenticode hash",
    0x00070005: "issuer",
    0x00070006: "serial number",
    0x00070007: "image base",
    0x00070008: "publisher",
    0x00070009: "thumbprint",
    0x0007000A: "image validated",
    0x0007000B: "module SVN",
    0x80080001: "quote",
    0x80080002: "quote's signature",
    0x80080003: "AIK name",
    0x80080004: "AIK digest",
    0x00090001: "early launch key",
    0x00090002: "early launch configuration",
    0x00090003: "early launch policy",
    0x00090004: "early launch measured",
    0x000A0001: "VBS required",
    0x000A0002: "VBS requires Secure Boot",
    0x000A0003: "VBS requires an IOMMU",
    0x000A0004: "VBS requires NX",
    0x000A0005: "VBS requires MSR filtering",
    0x000A0006: "VBS mandatory",
    0x000A0007: "HVCI policy",
    0x000A0008: "VBS requires the Microsoft boot chain",
    0x000B0001: "KSR signature",
}


@dataclass(frozen=True, slots=True)
class UnverifiedSipaEvent:
    """One SIPA event; `depth` is 0 for the outermost, `event` the number of the log's event that holds it."""

    event: int
    depth: int
    sipa_type: int
    data: bytes

    @property
    def name(self) -> str:
        """The event's name, or its number where no name is known."""
        return SIPA_NAMES.get(self.sipa_type) or f"0x{self.sipa_type:08x}"

    @property
    def flag(self) -> bool | None:
        """The value of an event that holds a truth value or a number; none for others."""
        return any(self.data) if len(self.data) in {1, 8} else None


@dataclass(frozen=True, slots=True)
class UnverifiedTrustPoint:
    """A quote that Windows put into its log: TPMS_ATTEST, the signature's bytes alone, and what names the AIK."""

    event: int
    aik_name: str
    aik_digest: bytes
    attest: bytes
    signature: bytes


def is_sipa(data: bytes) -> bool:
    """Return whether data begin as a SIPA event of a known type does."""
    return len(data) >= _HEAD.size and _HEAD.unpack_from(data)[0] in SIPA_NAMES


def read_sipa(event: UnverifiedEvent, findings: Findings) -> Iterator[UnverifiedSipaEvent]:
    """Yield the SIPA events that an event holds, the outer ones before the inner ones."""
    yield from _read(event.data, 0, event.number, findings, [MAX_SIPA_EVENTS])


def _read(data: bytes, depth: int, number: int, findings: Findings, left: list[int]) -> Iterator[UnverifiedSipaEvent]:
    offset = 0
    while offset + _HEAD.size <= len(data):
        sipa_type, size = _HEAD.unpack_from(data, offset)
        left[0] -= 1
        if left[0] < 0:
            findings.add(found.SIPA_INVALID, f"more than {MAX_SIPA_EVENTS} events", number)
            return
        body = data[offset + _HEAD.size : offset + _HEAD.size + size]
        if len(body) != size:
            findings.add(found.SIPA_INVALID, f"{size} bytes are named and {len(body)} are there", number)
        yield UnverifiedSipaEvent(number, depth, sipa_type, body)
        if sipa_type in _CONTAINERS and depth < MAX_DEPTH:
            yield from _read(body, depth + 1, number, findings, left)
        offset += _HEAD.size + size


def describe_sipa(data: bytes) -> str:
    """Return the SIPA events in data in one line."""
    event = UnverifiedEvent(0, 0, 0, {}, data, 0)
    parts: list[str] = []
    for item in read_sipa(event, Findings()):
        if item.sipa_type in _CONTAINERS:
            parts.append(f"[{item.name}]")
        elif item.sipa_type in {0x00070001, 0x00050009, 0x80080003, 0x00070005, 0x00070008}:
            parts.append(f"{item.name} {item.data.decode('utf-16-le', 'replace').rstrip(chr(0))}")
        elif len(item.data) <= 8:
            parts.append(f"{item.name} {int.from_bytes(item.data, 'little')}")
        else:
            parts.append(f"{item.name} {item.data[:8].hex()}…")
        if len(parts) > 64:
            parts.append("…")
            break
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class UnverifiedWindowsBoot:
    """What Windows measured about itself; `modules` are (path, Authenticode hash) in the order of loading."""

    events: tuple[UnverifiedSipaEvent, ...]
    modules: tuple[tuple[str, bytes], ...]
    trust_points: tuple[UnverifiedTrustPoint, ...]
    findings: tuple[Finding, ...]

    def flag(self, name: str) -> bool | None:
        """Return whether any event of this name is true; none where there is none."""
        flags = [item.flag for item in self.events if item.name == name and item.flag is not None]
        return any(flags) if flags else None


_PATH: Final = 0x00070001
_AUTHENTICODE: Final = 0x00070004


def windows_boot(log: UnverifiedLog) -> UnverifiedWindowsBoot | None:
    """Return what Windows measured about itself; none where the log has no SIPA events."""
    findings = Findings()
    events: list[UnverifiedSipaEvent] = []
    trust_points: list[UnverifiedTrustPoint] = []
    for event in log.events:
        if not is_sipa(event.data):
            continue
        if event.register == TRUST_POINT_REGISTER and event.event_type == EventType.EV_NO_ACTION:
            trust_points.extend(_trust_points(event, findings))
        elif event.event_type == EventType.EV_EVENT_TAG and 11 <= event.register <= 14:
            events.extend(read_sipa(event, findings))
    if not events and not trust_points:
        return None
    return UnverifiedWindowsBoot(tuple(events), tuple(_modules(events)), tuple(trust_points), findings.all())


def _modules(events: list[UnverifiedSipaEvent]) -> Iterator[tuple[str, bytes]]:
    path, digest = "", b""
    for item in [*events, None]:
        if item is None or item.sipa_type == 0x40010003:
            if digest:
                yield path, digest
            path, digest = "", b""
        elif item.sipa_type == _PATH:
            path = item.data.decode("utf-16-le", "replace").rstrip("\0")
        elif item.sipa_type == _AUTHENTICODE:
            digest = item.data


def _trust_points(event: UnverifiedEvent, findings: Findings) -> Iterator[UnverifiedTrustPoint]:
    parts: dict[int, bytes] = {}
    for item in [*read_sipa(event, findings), None]:
        if item is None or item.sipa_type == TRUST_POINT:
            if parts:
                name = parts.get(0x80080003, b"").decode("utf-16-le", "replace").rstrip("\0")
                yield UnverifiedTrustPoint(
                    event.number, name, parts.get(0x80080004, b""), parts.get(0x80080001, b""), parts.get(0x80080002, b"")
                )
            parts = {}
        else:
            parts[item.sipa_type] = item.data


def split_boots(data: bytes) -> tuple[bytes, ...]:
    """Split a file that holds the logs of several boots into one log each, in order; the last one is of the current boot.

    Windows' agent returns logs one after the other. Each begins with a Spec ID record.
    """
    head = b"\0\0\0\0\3\0\0\0" + bytes(20)
    starts = [0]
    at = data.find(b"Spec ID Event03\0", 1)
    while at >= 0 and len(starts) < 64:
        start = at - 32
        if start > 0 and data[start : start + 28] == head:
            starts.append(start)
        at = data.find(b"Spec ID Event03\0", at + 1)
    return tuple(data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True))
