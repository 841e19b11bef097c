"""systemd's log of what userspace measured: /run/log/systemd/tpm2-measure.log (systemd: TPM2_PCR_MEASUREMENTS).

The file is a JSON text sequence (RFC 7464): each record is 0x1e, a JSON object close to CEL-JSON, a line feed. systemd
measures boot phases into PCR 11, file systems, the machine id and volume keys into PCR 15, and NvPCRs' names into PCR 9.
The digest is the hash of `content.string`, but for volume keys and credentials, where it is an HMAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vtpm.eventlog import findings as found
from vtpm.eventlog import strictjson
from vtpm.eventlog.cel import MAX_LOG_SIZE, MAX_RECORDS, json_event
from vtpm.eventlog.findings import Findings
from vtpm.eventlog.values import SYSTEMD_CONTENT, LogFormat, UnverifiedEvent, UnverifiedLog

_RECORD: Final = b"\x1e"


def is_systemd(data: bytes) -> bool:
    """Return whether data begin as a JSON text sequence does."""
    return data.startswith(_RECORD)


def read_systemd(data: bytes) -> UnverifiedLog:
    """Read systemd's log as far as its records make sense; what is wrong is a finding."""
    findings = Findings()
    size, data = len(data), data[:MAX_LOG_SIZE]
    events: list[UnverifiedEvent] = []
    banks: dict[int, int] = {}
    for number, text in enumerate(data.split(_RECORD, MAX_RECORDS + 1)):
        if not text.strip():
            continue
        if len(events) >= MAX_RECORDS:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_RECORDS}")
            break
        try:
            record = strictjson.load(text)
        except ValueError as error:
            findings.add(found.JSON_INVALID, f"record {number}: {str(error)[:160]}")
            continue
        event = json_event(record, len(events), findings, _content)
        if event is not None:
            banks |= {alg_id: len(digest) for alg_id, digest in event.digests.items()}
            events.append(event)
    return UnverifiedLog(LogFormat.SYSTEMD, banks, tuple(events), findings.all(), size, len(data))


def _content(record: Mapping[str, Any]) -> tuple[int, bytes]:
    return SYSTEMD_CONTENT, strictjson.dump(record.get("content"))


def content_string(data: bytes) -> str | None:
    """Return the string that a record says was measured; none where it has none."""
    try:
        value = strictjson.load(data)
    except ValueError:
        return None
    text = value.get("string") if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
