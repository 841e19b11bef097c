"""TCG crypto-agile event logs (TCG PC Client Platform Firmware Profile 1.05, 10): written, parsed, replayed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.pcr import PCR_COUNT, PcrBank, extend

EV_NO_ACTION: Final = 3
EV_EVENT_TAG: Final = 6
EV_EFI_HCRTM_EVENT: Final = 0x80000010
MAX_EVENT_SIZE: Final = 1 << 20
MAX_EVENTS: Final = 65536
MAX_LOG_SIZE: Final = 16 << 20

_SIGNATURE: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_MAX_ALGORITHMS: Final = 16
# TCG_PCClientPCREvent: pcrIndex, eventType, SHA-1 digest, eventSize; all event log integers are little-endian.
_EVENT1: Final = struct.Struct("<II20sI")
_EVENT2: Final = struct.Struct("<III")
# TCG_EfiSpecIdEvent: signature, platformClass, versionMinor, versionMajor, errata, uintnSize, numberOfAlgorithms.
_SPEC_ID: Final = struct.Struct("<16sIBBBBI")
_ALGORITHM: Final = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class Event:
    """One event as the log has it; nothing in it is proven until a replay matches quoted PCRs, `data` not even then."""

    pcr: int
    event_type: int
    digests: Mapping[int, bytes]
    data: bytes


def spec_id_header(banks: Sequence[PcrBank]) -> bytes:
    """Return the first record of a log that carries digests of `banks`."""
    spec = _SPEC_ID.pack(_SIGNATURE, 0, 0, 2, 0, 2, len(banks))
    spec += b"".join(_ALGORITHM.pack(bank.alg_id, bank.digest_size) for bank in banks) + b"\0"
    return _EVENT1.pack(0, EV_NO_ACTION, bytes(20), len(spec)) + spec


def event2(pcr: int, event_type: int, digests: Mapping[PcrBank, bytes], data: bytes) -> bytes:
    """Return one TCG_PCR_EVENT2 record."""
    out = _EVENT2.pack(pcr, event_type, len(digests))
    for bank, digest in digests.items():
        out += struct.pack("<H", bank.alg_id) + digest
    return out + struct.pack("<I", len(data)) + data


def event2_size(banks: Sequence[PcrBank], data: bytes) -> int:
    """Return the size in bytes of a TCG_PCR_EVENT2 record with digests of `banks`."""
    return _EVENT2.size + sum(2 + bank.digest_size for bank in banks) + 4 + len(data)


def startup_locality(banks: Sequence[PcrBank], locality: int) -> bytes:
    """Return the record that says where PCR 0 began: 4 after an H-CRTM event (Firmware Profile, 10.4.5.3)."""
    digests = {bank: bytes(bank.digest_size) for bank in banks}
    return event2(0, EV_NO_ACTION, digests, _STARTUP_LOCALITY + bytes((locality,)))


def parse_event_log(log: bytes) -> list[Event]:
    """Parse a crypto-agile log; the Spec ID record is not among the events returned.

    Raises:
        InvalidArgumentError: EVENT_LOG_INVALID.
    """
    if len(log) > MAX_LOG_SIZE:
        raise _invalid("larger than 16 MiB", 0)
    try:
        return _parse(log)
    except struct.error:
        raise _invalid("cut", len(log)) from None


def _parse(log: bytes) -> list[Event]:
    _pcr, event_type, _digest, size = _EVENT1.unpack_from(log)
    offset = _EVENT1.size
    spec = _take(log, offset, size)
    offset += size
    if event_type != EV_NO_ACTION or not spec.startswith(_SIGNATURE):
        raise _invalid("no crypto-agile log: it does not begin with a Spec ID Event03", 0)
    sizes = _digest_sizes(spec)
    events: list[Event] = []
    while offset < len(log):
        if len(events) >= MAX_EVENTS:
            raise _invalid("too many events", offset)
        event, offset = _parse_event2(log, offset, sizes)
        events.append(event)
    return events


def _digest_sizes(spec: bytes) -> dict[int, int]:
    count = _SPEC_ID.unpack_from(spec)[-1]
    if not 0 < count <= _MAX_ALGORITHMS:
        raise _invalid(f"{count} hash algorithms", 0)
    pairs = [_ALGORITHM.unpack_from(spec, _SPEC_ID.size + index * _ALGORITHM.size) for index in range(count)]
    known = {bank.alg_id: bank.digest_size for bank in PcrBank}
    for alg_id, size in pairs:
        if size > 64 or known.get(alg_id, size) != size:
            raise _invalid(f"hash 0x{alg_id:04x} of {size} bytes", 0)
    return dict(pairs)


def _parse_event2(log: bytes, offset: int, sizes: Mapping[int, int]) -> tuple[Event, int]:
    start = offset
    pcr, event_type, count = _EVENT2.unpack_from(log, offset)
    offset += _EVENT2.size
    if count > _MAX_ALGORITHMS:
        raise _invalid(f"an event with {count} digests", start)
    digests = {}
    for _ in range(count):
        (alg_id,) = struct.unpack_from("<H", log, offset)
        offset += 2
        if alg_id not in sizes:
            raise _invalid(f"a digest of hash 0x{alg_id:04x}, which the Spec ID record does not name", start)
        digests[alg_id] = _take(log, offset, sizes[alg_id])
        offset += sizes[alg_id]
    (size,) = struct.unpack_from("<I", log, offset)
    offset += 4
    return Event(pcr, event_type, digests, _take(log, offset, size)), offset + size


def _take(log: bytes, offset: int, size: int) -> bytes:
    if size > MAX_EVENT_SIZE:
        raise _invalid(f"an event of {size} bytes", offset)
    part = log[offset : offset + size]
    if len(part) != size:
        raise _invalid("cut", offset)
    return part


def _invalid(what: str, offset: int) -> InvalidArgumentError:
    return InvalidArgumentError("EVENT_LOG_INVALID", f"the event log is {what} (at byte {offset})")


def replay(events: Iterable[Event], bank: PcrBank) -> dict[int, bytes]:
    """Return the PCR values that `events` lead to in `bank`, for the PCRs that they touch.

    EV_NO_ACTION events are not extended; a StartupLocality event sets where PCR 0 begins (Firmware Profile, 10.4.5.3).

    Raises:
        InvalidArgumentError: EVENT_LOG_INVALID, an event has no digest of `bank` or another PCR index than 0 to 23.
    """
    values: dict[int, bytes] = {}
    first_pcr0 = bytes(bank.digest_size)
    for event in events:
        if event.event_type == EV_NO_ACTION:
            if event.data.startswith(_STARTUP_LOCALITY) and len(event.data) > len(_STARTUP_LOCALITY):
                first_pcr0 = bytes(bank.digest_size - 1) + event.data[len(_STARTUP_LOCALITY) :][:1]
            continue
        if bank.alg_id not in event.digests or not 0 <= event.pcr < PCR_COUNT:
            raise _invalid(f"without a {bank.hash_name} digest, or with a PCR index {event.pcr}", 0)
        initial = first_pcr0 if event.pcr == 0 else _initial(bank, event.pcr)
        values[event.pcr] = extend(bank, values.get(event.pcr, initial), event.digests[bank.alg_id])
    return values


def _initial(bank: PcrBank, pcr: int) -> bytes:
    # PCRs 17 to 22 start as all ones until a dynamic launch (PC Client Platform TPM Profile, table 6).
    return b"\xff" * bank.digest_size if 17 <= pcr <= 22 else bytes(bank.digest_size)
