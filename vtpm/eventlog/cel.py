"""The TCG Canonical Event Log (CEL 1.0 revision 0.41) in its TLV and JSON encodings, and what is close to it.

A TLV is {u8 type, u32 length, value}, big-endian. A record is the TLVs record number, register, digests and content.
Google's Container-Optimized OS writes content of a type of its own, and registers of a trust domain.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vtpm.eventlog import findings as found
from vtpm.eventlog import strictjson
from vtpm.eventlog.findings import Findings
from vtpm.eventlog.hashes import SIZES, by_name
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import CEL_CONTENT, IMA_TEMPLATE, LogFormat, UnverifiedEvent, UnverifiedLog

MAX_LOG_SIZE: Final = 64 << 20
# An array is read as a whole, and takes some ten times its size in memory.
MAX_ARRAY_SIZE: Final = 8 << 20
MAX_RECORDS: Final = 65536
MAX_DIGESTS: Final = 16
_TLV: Final = struct.Struct(">BI")
_RECNUM, _PCR, _NV_INDEX, _DIGESTS, _PC_CLIENT, _IMA, _CCMR = 0, 1, 2, 3, 5, 7, 108
_NO_REGISTER: Final = -1
# What Container-Optimized OS puts into content of type 80 (go-tpm-tools, cel/cos_tlv.go).
COS_CONTENT: Final = 80
COS_NAMES: Final = {
    0: "image reference",
    1: "image digest",
    2: "restart policy",
    3: "image id",
    4: "argument",
    5: "environment variable",
    6: "overridden argument",
    7: "overridden environment variable",
    8: "launch separator",
    9: "memory monitor",
    10: "GPU device",
}


def is_cel_tlv(data: bytes) -> bool:
    """Return whether data begin as a record in TLV does: record number 0 of 8 bytes, then a register."""
    register = data[13:17]
    return data.startswith(b"\0\0\0\0\x08" + bytes(8)) and register[1:] == bytes(3) and register[0] in {_PCR, _NV_INDEX, _CCMR}


def parse_tlv(data: bytes, offset: int = 0) -> tuple[int, bytes, int] | None:
    """Return the TLV at `offset`: type, value, and where it ends; none where it is cut."""
    if offset + _TLV.size > len(data):
        return None
    kind, size = _TLV.unpack_from(data, offset)
    start = offset + _TLV.size
    return (kind, data[start : start + size], start + size) if size <= len(data) - start else None


def read_cel_tlv(data: bytes) -> UnverifiedLog:
    """Read a log in TLV as far as its bytes make sense; what is wrong is a finding."""
    findings = Findings()
    size, data = len(data), data[:MAX_LOG_SIZE]
    if size > MAX_LOG_SIZE:
        findings.add(found.LOG_TOO_LARGE, f"{size} bytes; the first {MAX_LOG_SIZE} are read")
    events: list[UnverifiedEvent] = []
    banks: dict[int, int] = {}
    offset, td = 0, False
    while offset < len(data):
        number = len(events)
        if number >= MAX_RECORDS:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_RECORDS}; the rest begins at byte {offset}")
            break
        read = _read_record(data, offset, number, findings)
        if read is None:
            break
        event, offset, of_td = read
        td = td or of_td
        banks |= {alg_id: len(digest) for alg_id, digest in event.digests.items()}
        events.append(event)
    return UnverifiedLog(LogFormat.CEL_TLV, banks, tuple(events), findings.all(), size, offset, td=td)


def _read_record(data: bytes, offset: int, number: int, findings: Findings) -> tuple[UnverifiedEvent, int, bool] | None:
    """Read one record; return its event, where it ends, and whether its register is a trust domain's."""
    start = offset
    parts: list[tuple[int, bytes]] = []
    for _ in range(4):
        part = parse_tlv(data, offset)
        if part is None:
            findings.add(found.LOG_CUT, f"the record from byte {start} on ends too early", number)
            return None
        parts.append(part[:2])
        offset = part[2]
    (num_type, num), (reg_type, register), (dig_type, digests), (content_type, content) = parts
    if num_type != _RECNUM or len(num) > 8 or reg_type not in {_PCR, _NV_INDEX, _CCMR} or dig_type != _DIGESTS:
        findings.add(found.RECORD_INVALID, f"fields of types {num_type}, {reg_type}, {dig_type}", number)
        return None
    if int.from_bytes(num) != number:
        findings.add(found.CEL_NUMBER_GAP, f"record number {int.from_bytes(num)} in place {number}", number)
    if reg_type == _NV_INDEX:
        findings.add(found.NOT_A_PCR, f"NV index 0x{register[:4].hex()}", number)
    index = _NO_REGISTER if reg_type == _NV_INDEX else int.from_bytes(register[:4])
    event_type, body = _content(content_type, content)
    event = UnverifiedEvent(number, index, event_type, _tlv_digests(digests, findings, number), body, start)
    return event, offset, reg_type == _CCMR


def _tlv_digests(data: bytes, findings: Findings, number: int) -> dict[int, bytes]:
    digests: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        part = parse_tlv(data, offset)
        if part is None or len(digests) >= MAX_DIGESTS:
            findings.add(found.RECORD_INVALID, "the record's digests can't be read", number)
            return digests
        alg_id, digest, offset = part
        if len(digest) != SIZES.get(alg_id):
            findings.add(found.RECORD_INVALID, f"a digest of hash 0x{alg_id:04x} of {len(digest)} bytes", number)
        else:
            digests.setdefault(alg_id, digest)
    return digests


def _content(content_type: int, content: bytes) -> tuple[int, bytes]:
    """Return an event type and data for a record's content; content of other types is kept as the TLV that is hashed."""
    parts: dict[int, bytes] = {}
    if content_type in {_PC_CLIENT, _IMA}:
        offset = 0
        while (part := parse_tlv(content, offset)) is not None:
            parts.setdefault(part[0], part[1])
            offset = part[2]
    if content_type == _PC_CLIENT and 0 in parts and len(parts[0]) <= 4:
        return int.from_bytes(parts[0]), parts.get(1, b"")
    if content_type == _IMA and 1 in parts:
        return IMA_TEMPLATE, parts[1]
    return CEL_CONTENT, _TLV.pack(content_type, len(content)) + content


def describe_content(data: bytes) -> str | None:
    """Return content that was kept as a TLV in words; none where it is no TLV."""
    outer = parse_tlv(data)
    if outer is None:
        return None
    kind, value, _ = outer
    inner = parse_tlv(value) if kind == COS_CONTENT else None
    if inner is None:
        return f"content of type {kind}: {len(value)} bytes"
    return f"{COS_NAMES.get(inner[0], f'COS {inner[0]}')}: {inner[1].decode('utf-8', 'replace')}"


def read_cel_json(data: bytes) -> UnverifiedLog:
    """Read a log in JSON: an array of records, or one record a line."""
    findings = Findings()
    size, data = len(data), data[:MAX_LOG_SIZE]
    events: list[UnverifiedEvent] = []
    banks: dict[int, int] = {}
    for place, record in enumerate(_json_records(data, findings)):
        if len(events) >= MAX_RECORDS:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_RECORDS}")
            break
        event = json_event(record, len(events), findings, _json_content)
        if event is None:
            continue
        if isinstance(record, dict) and record.get("recnum") != place:
            findings.add(found.CEL_NUMBER_GAP, f"record number {record.get('recnum')!r:.40} in place {place}", len(events))
        banks |= {alg_id: len(digest) for alg_id, digest in event.digests.items()}
        events.append(event)
    return UnverifiedLog(LogFormat.CEL_JSON, banks, tuple(events), findings.all(), size, len(data))


def _json_records(data: bytes, findings: Findings) -> Iterator[Any]:
    if data.lstrip()[:1] == b"[" and len(data) > MAX_ARRAY_SIZE:
        findings.add(found.LOG_TOO_LARGE, f"an array of {len(data)} bytes; at most {MAX_ARRAY_SIZE} are read")
        return
    if data.lstrip()[:1] == b"[":
        # One array is one JSON text, so the bound of a record can't be kept for it; the log's own bound is.
        try:
            records = strictjson.load_log(data)
        except ValueError as error:
            findings.add(found.JSON_INVALID, str(error)[:200])
            return
        yield from records if isinstance(records, list) else ()
        return
    for number, line in enumerate(data.split(b"\n", MAX_RECORDS + 1)):
        if line.strip():
            try:
                yield strictjson.load(line)
            except ValueError as error:
                findings.add(found.JSON_INVALID, f"line {number + 1}: {str(error)[:160]}")


def json_event(record: Any, number: int, findings: Findings, content: Any) -> UnverifiedEvent | None:
    """Return the event of a record in JSON; `content` makes its type and data. None where the record can't be used."""
    if not isinstance(record, dict):
        findings.add(found.JSON_INVALID, "a record that is no object", number)
        return None
    register = record.get("pcr")
    if register is None:
        findings.add(found.NOT_A_PCR, f"{record.get('nv_index', record.get('nvIndex'))!r:.40}", number)
        register = _NO_REGISTER
    if not isinstance(register, int) or isinstance(register, bool) or not _NO_REGISTER <= register < 1 << 32:
        findings.add(found.JSON_INVALID, f"pcr {register!r:.40}", number)
        return None
    digests = _json_digests(record.get("digests"), number, findings)
    event_type, data = content(record)
    return UnverifiedEvent(number, register, event_type, digests, data, 0)


def _json_digests(value: Any, number: int, findings: Findings) -> dict[int, bytes]:
    digests: dict[int, bytes] = {}
    for item in value[:MAX_DIGESTS] if isinstance(value, list) else ():
        alg, text = (item.get("hashAlg"), item.get("digest")) if isinstance(item, Mapping) else (None, None)
        alg_id = by_name(alg) if isinstance(alg, str) else alg if isinstance(alg, int) else None
        digest = _from_text(text) if isinstance(text, str) else None
        if alg_id is None or digest is None or len(digest) != SIZES.get(alg_id):
            findings.add(found.JSON_INVALID, f"digest {item!r:.80}", number)
        else:
            digests.setdefault(alg_id, digest)
    return digests


def _from_text(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except ValueError:
        pass
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _json_content(record: Mapping[str, Any]) -> tuple[int, bytes]:
    kind, content = record.get("content_type", record.get("type")), record.get("content")
    if isinstance(content, Mapping):
        if kind == "pcclient_std":
            event_type, data = _event_type(content.get("event_type")), content.get("event_data")
            body = _from_text(data) if isinstance(data, str) else None
            if event_type is not None and body is not None:
                return event_type, body
        if kind == "ima_template":
            data = content.get("template_data")
            body = _from_text(data) if isinstance(data, str) else None
            if body is not None:
                return IMA_TEMPLATE, body
    return CEL_CONTENT, strictjson.dump(content)


def _event_type(value: Any) -> int | None:
    if isinstance(value, str):
        if value in EventType.__members__:
            return EventType[value]
        try:
            value = int(value, 0)
        except ValueError:
            return None
    return value if isinstance(value, int) and 0 <= value < 1 << 32 else None
