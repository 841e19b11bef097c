"""Which format a log has, by its first bytes, and the reader for it."""

from __future__ import annotations

from vtpm.eventlog import findings as found
from vtpm.eventlog.cel import is_cel_tlv, read_cel_json, read_cel_tlv
from vtpm.eventlog.findings import Findings
from vtpm.eventlog.ima import UnverifiedImaLog, binary_hash, is_ima_ascii, read_ima_ascii, read_ima_binary
from vtpm.eventlog.tcg import read_tcg
from vtpm.eventlog.types import is_known
from vtpm.eventlog.userspace import is_systemd, read_systemd
from vtpm.eventlog.values import LogFormat, UnverifiedLog
from vtpm.eventlog.wbcl import split_boots

AnyLog = UnverifiedLog | UnverifiedImaLog


def read_log(data: bytes, form: LogFormat | None = None) -> AnyLog:
    """Read a log of any format, or of format `form`; what is wrong with the log is a finding of the log.

    Of a file with the TCG logs of several boots the last one is read, which is of the current boot.
    """
    if form is None:
        form = detect(data)
    match form:
        case LogFormat.IMA:
            return read_ima_binary(data, binary_hash(data) or 4)
        case LogFormat.IMA_ASCII:
            return read_ima_ascii(data)
        case LogFormat.CEL_TLV:
            return read_cel_tlv(data)
        case LogFormat.CEL_JSON:
            return read_cel_json(data)
        case LogFormat.SYSTEMD:
            return read_systemd(data)
        case LogFormat.CCEL:
            return read_tcg(data, form)
        case LogFormat.TCG | LogFormat.TCG_SHA1:
            return _last_boot(data)
        case LogFormat.UNKNOWN:
            findings = Findings()
            findings.add(found.FORMAT_UNKNOWN, f"{len(data)} bytes beginning with {data[:16].hex() or 'nothing'}")
            return UnverifiedLog(LogFormat.UNKNOWN, {}, (), findings.all(), len(data), 0)


def detect(data: bytes) -> LogFormat:
    """Return the format that a log's first bytes show; a CCEL begins as a TCG log does and is told apart when it is read."""
    if is_systemd(data):
        return LogFormat.SYSTEMD
    if data[:64].lstrip()[:1] in {b"[", b"{"}:
        return LogFormat.CEL_JSON
    if is_ima_ascii(data):
        return LogFormat.IMA_ASCII
    if is_cel_tlv(data):
        return LogFormat.CEL_TLV
    if binary_hash(data) is not None:
        return LogFormat.IMA
    register, event_type, size = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 28))
    if len(data) >= 32 and is_known(event_type) and (register < 24 or register == 0xFFFFFFFF) and size <= len(data):
        return LogFormat.TCG if event_type == 3 else LogFormat.TCG_SHA1
    return LogFormat.UNKNOWN


def _last_boot(data: bytes) -> UnverifiedLog:
    boots = split_boots(data)
    log = read_tcg(boots[-1])
    if len(boots) == 1:
        return log
    findings = Findings()
    findings.add(found.SEVERAL_BOOTS, f"{len(boots)} logs; the last one is read")
    return UnverifiedLog(
        log.format, log.banks, log.events, (*findings.all(), *log.findings), len(data), log.read_bytes, td=log.td
    )
