"""TCG event logs, crypto-agile and SHA-1-only, and the CCEL (Firmware Profile 1.06, 10.2; UEFI 2.10, 38.4.1).

All integers are little-endian. The first record always has the SHA-1 layout.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.findings import Findings
from vtpm.eventlog.hashes import SHA1, SHA256, SIZES
from vtpm.eventlog.values import LogFormat, UnverifiedEvent, UnverifiedLog

EV_NO_ACTION: Final = 3
MAX_LOG_SIZE: Final = 64 << 20
MAX_EVENTS: Final = 65536
MAX_DIGESTS: Final = 16
MAX_DIGEST_SIZE: Final = 64

SPEC_ID_SIGNATURE: Final = b"Spec ID Event03\0"
# TCG_PCClientPCREvent: pcrIndex, eventType, SHA-1 digest, eventDataSize.
_EVENT1: Final = struct.Struct("<II20sI")
# TCG_PCR_EVENT2 up to the digests: pcrIndex, eventType, count.
_EVENT2: Final = struct.Struct("<III")
# TCG_EfiSpecIdEvent: signature, platformClass, versionMinor, versionMajor, errata, uintnSize, numberOfAlgorithms.
_SPEC_ID: Final = struct.Struct("<16sIBBBBI")
_ALGORITHM: Final = struct.Struct("<HH")
_U32: Final = struct.Struct("<I")
_PADDINGS: Final = (b"\0" * _EVENT2.size, b"\xff" * _EVENT2.size)
_SHA1_BANK: Final = {SHA1: SIZES[SHA1]}
_LAST_RTMR: Final = 4


def read_tcg(log: bytes, form: LogFormat | None = None) -> UnverifiedLog:
    """Read a TCG log or a CCEL as far as its bytes make sense; what is wrong is a finding.

    Without `form` a log with a single bank other than SHA-1 and SHA-256, which names registers 1 to 4 alone, is a CCEL.
    """
    findings = Findings()
    if len(log) > MAX_LOG_SIZE:
        findings.add(found.LOG_TOO_LARGE, f"{len(log)} bytes; the first {MAX_LOG_SIZE} are read")
    size, log = len(log), log[:MAX_LOG_SIZE]
    if len(log) < _EVENT1.size:
        findings.add(found.LOG_CUT, f"{len(log)} bytes are less than one record")
        return UnverifiedLog(form or LogFormat.UNKNOWN, {}, (), findings.all(), size, 0)
    register, event_type, _, data_size = _EVENT1.unpack_from(log)
    spec = log[_EVENT1.size : _EVENT1.size + data_size]
    if event_type != EV_NO_ACTION or not spec.startswith(SPEC_ID_SIGNATURE):
        old, end = _read_sha1(log, findings)
        return UnverifiedLog(LogFormat.TCG_SHA1, _SHA1_BANK, old, findings.all(), size, end)
    if len(spec) != data_size:
        findings.add(found.LOG_CUT, f"the first record's data are {data_size} bytes and {len(spec)} are there", 0)
        return UnverifiedLog(form or LogFormat.TCG, {}, (), findings.all(), size, 0)
    first = UnverifiedEvent(0, register, event_type, {}, spec, 0)
    banks = _banks(spec, findings)
    end = _EVENT1.size + data_size
    events: tuple[UnverifiedEvent, ...] = (first,)
    if banks:
        others, end = _read_agile(log, end, banks, findings)
        events = (first, *others)
    if form is None:
        form = LogFormat.TCG
        if _looks_like_ccel(banks, events):
            form = LogFormat.CCEL
            findings.add(found.FORMAT_GUESSED, "read as a CCEL")
    return UnverifiedLog(form, banks, events, findings.all(), size, end, td=form is LogFormat.CCEL)


def _looks_like_ccel(banks: Mapping[int, int], events: tuple[UnverifiedEvent, ...]) -> bool:
    if len(banks) != 1 or SHA1 in banks or SHA256 in banks:
        return False
    extended = {event.register for event in events if event.event_type != EV_NO_ACTION}
    return bool(extended) and all(1 <= register <= _LAST_RTMR for register in extended)


def _banks(spec: bytes, findings: Findings) -> dict[int, int]:
    """Return the digest sizes that a Spec ID record declares; empty where they can't be right."""
    if len(spec) < _SPEC_ID.size:
        findings.add(found.SPEC_ID_INVALID, f"the record has {len(spec)} bytes", 0)
        return {}
    count = _SPEC_ID.unpack_from(spec)[-1]
    if not 0 < count <= MAX_DIGESTS or len(spec) < _SPEC_ID.size + count * _ALGORITHM.size:
        findings.add(found.SPEC_ID_INVALID, f"the record names {count} hash algorithms in {len(spec)} bytes", 0)
        return {}
    banks: dict[int, int] = {}
    for index in range(count):
        alg_id, size = _ALGORITHM.unpack_from(spec, _SPEC_ID.size + index * _ALGORITHM.size)
        if not 0 < size <= MAX_DIGEST_SIZE or SIZES.get(alg_id, size) != size or alg_id in banks:
            findings.add(found.SPEC_ID_INVALID, f"hash 0x{alg_id:04x} of {size} bytes", 0)
            return {}
        banks[alg_id] = size
    return banks


def _read_sha1(log: bytes, findings: Findings) -> tuple[tuple[UnverifiedEvent, ...], int]:
    events: list[UnverifiedEvent] = []
    offset, end, head = 0, len(log), _EVENT1.size
    unpack = _EVENT1.unpack_from
    while offset + head <= end:
        if log[offset : offset + 12] in _PADDINGS:
            break
        register, event_type, digest, size = unpack(log, offset)
        start = offset + head
        if size > end - start:
            findings.add(found.LOG_CUT, f"the event's data are {size} bytes and {end - start} are there", len(events))
            return tuple(events), offset
        if len(events) >= MAX_EVENTS:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_EVENTS}; the rest begins at byte {offset}")
            return tuple(events), offset
        data = log[start : start + size]
        events.append(UnverifiedEvent(len(events), register, event_type, {SHA1: digest}, data, offset))
        offset = start + size
    _note_rest(log, offset, findings)
    return tuple(events), offset


def _read_agile(log: bytes, offset: int, banks: Mapping[int, int], findings: Findings) -> tuple[list[UnverifiedEvent], int]:
    """Read the TCG_PCR_EVENT2 records from `offset` on; return them and where reading ended."""
    events: list[UnverifiedEvent] = []
    end, head = len(log), _EVENT2.size
    # One layout serves all records of a usual log: each has one digest of each bank, in the order of the first record.
    order = tuple(banks.items())
    usual = struct.Struct("<III" + "".join(f"H{size}s" for _, size in order) + "I")
    alg_ids = tuple(banks)
    unpack, width, count_usual = usual.unpack_from, usual.size, len(order)
    while offset + head <= end:
        number = len(events) + 1
        if number >= MAX_EVENTS:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_EVENTS}; the rest begins at byte {offset}")
            return events, offset
        digests: dict[int, bytes] = {}
        if offset + width <= end:
            fields = unpack(log, offset)
            if fields[2] == count_usual and fields[3:-1:2] == alg_ids:
                register, event_type, start, size = fields[0], fields[1], offset + width, fields[-1]
                digests = dict(zip(alg_ids, fields[4:-1:2], strict=True))
        if not digests:
            if log[offset : offset + head] in _PADDINGS:
                break
            register, event_type, count = _EVENT2.unpack_from(log, offset)
            read = _digests(log, offset + head, count, banks, findings, number)
            if read is None:
                return events, offset
            digests, start, size = read
        if size > end - start:
            findings.add(found.LOG_CUT, f"the event's data are {size} bytes and {end - start} are there", number)
            return events, offset
        events.append(UnverifiedEvent(number, register, event_type, digests, log[start : start + size], offset))
        offset = start + size
    _note_rest(log, offset, findings)
    return events, offset


def _digests(
    log: bytes, offset: int, count: int, banks: Mapping[int, int], findings: Findings, number: int
) -> tuple[dict[int, bytes], int, int] | None:
    """Read `count` digests and the size behind them; return them, where the data begin, and the data's size in bytes."""
    if count > MAX_DIGESTS:
        findings.add(found.RECORD_INVALID, f"an event with {count} digests", number)
        return None
    digests: dict[int, bytes] = {}
    for _ in range(count):
        if offset + 2 > len(log):
            findings.add(found.LOG_CUT, "the log ends among an event's digests", number)
            return None
        alg_id = int.from_bytes(log[offset : offset + 2], "little")
        size = banks.get(alg_id)
        if size is None:
            findings.add(found.BANK_UNDECLARED, f"hash 0x{alg_id:04x}", number)
            return None
        if alg_id in digests:
            findings.add(found.BANK_REPEATED, f"hash 0x{alg_id:04x}", number)
        digest = log[offset + 2 : offset + 2 + size]
        offset += 2 + size
        if len(digest) == size:
            digests.setdefault(alg_id, digest)
    if offset + _U32.size > len(log):
        findings.add(found.LOG_CUT, "the log ends among an event's digests", number)
        return None
    return digests, offset + _U32.size, _U32.unpack_from(log, offset)[0]


def _note_rest(log: bytes, offset: int, findings: Findings) -> None:
    rest = len(log) - offset
    if not rest:
        return
    last = log[-1]
    if last in {0x00, 0xFF} and log.count(last, offset) == rest:
        findings.add(found.PADDING, f"{rest} bytes of 0x{last:02x}")
    else:
        findings.add(found.TRAILING_BYTES, f"{rest} bytes from byte {offset} on")
