"""IMA measurement lists, binary and ascii (Linux: Documentation/security/IMA-templates.rst).

An entry's template hash is what the kernel extends into the SHA-1 bank. Since Linux 5.8 each other bank is extended with the
bank's own hash of the same template data; before, with the SHA-1 hash followed by zeros. Numbers are little-endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog import findings as found
from vtpm.eventlog.findings import Finding, Findings
from vtpm.eventlog.hashes import SHA1, SIZES, digest, hasher
from vtpm.eventlog.values import LogFormat
from vtpm.tpm.pcr import PCR_COUNT

MAX_LOG_SIZE: Final = 256 << 20
MAX_ENTRIES: Final = 1 << 20
MAX_TEMPLATE_NAME: Final = 255
MAX_FIELD_SIZE: Final = 1 << 20
_U32: Final = struct.Struct("<I")
_OLD_TEMPLATE: Final = "ima"
_OLD_DIGEST_SIZE: Final = 20
_OLD_NAME_SIZE: Final = 256

# The fields of each template; a template that is named by its format, such as `d-ng|n-ng|sig`, needs no row.
TEMPLATES: Final = {
    "ima": ("d", "n"),
    "ima-ng": ("d-ng", "n-ng"),
    "ima-ngv2": ("d-ngv2", "n-ng"),
    "ima-sig": ("d-ng", "n-ng", "sig"),
    "ima-sigv2": ("d-ngv2", "n-ng", "sig"),
    "ima-buf": ("d-ng", "n-ng", "buf"),
    "ima-modsig": ("d-ng", "n-ng", "sig", "d-modsig", "modsig"),
    "evm-sig": ("d-ng", "n-ng", "evmsig", "xattrnames", "xattrlengths", "xattrvalues", "iuid", "igid", "imode"),
}
_HASH_BY_SIZE: Final = {size: alg_id for alg_id, size in reversed(SIZES.items())}


@dataclass(frozen=True, slots=True)
class UnverifiedImaEntry:
    """One entry as the list has it; `data` are the fields as they are hashed, each behind its length (but template `ima`)."""

    pcr: int
    template_hash: bytes
    template: str
    data: bytes

    @property
    def is_violation(self) -> bool:
        """Whether the kernel could not measure the file; all ones are extended in place of a hash."""
        return not any(self.template_hash)

    @property
    def fields(self) -> dict[str, bytes]:
        """The fields by name; empty where the data are not as the template says."""
        names = template_fields(self.template)
        if self.template == _OLD_TEMPLATE:
            return {"d": self.data[:_OLD_DIGEST_SIZE], "n": self.data[_OLD_DIGEST_SIZE:].rstrip(b"\0")}
        values, offset = [], 0
        while offset + _U32.size <= len(self.data):
            (size,) = _U32.unpack_from(self.data, offset)
            offset += _U32.size
            values.append(self.data[offset : offset + size])
            offset += size
        if offset != len(self.data):
            return {}
        if len(names) != len(values):
            names = tuple(f"field {index}" for index in range(len(values)))
        return dict(zip(names, values, strict=True))

    @property
    def path(self) -> str:
        """The file's path, or what was measured."""
        fields = self.fields
        name = fields.get("n-ng") or fields.get("n") or b""
        return name.rstrip(b"\0").decode("utf-8", "replace")

    @property
    def file_digest(self) -> tuple[str, bytes]:
        """The hash's name and the digest of the file."""
        fields = self.fields
        if "d" in fields:
            return "sha1", fields["d"]
        prefix, _, value = (fields.get("d-ng") or fields.get("d-ngv2") or b"").partition(b":\0")
        return prefix.decode("ascii", "replace"), value


class ImaEntries:
    """The entries of a list, read from its bytes each time that they are gone through: a list of any length needs no memory."""

    __slots__ = ("_count", "_data", "_read")

    def __init__(self, data: bytes, read: Callable[[bytes, Findings], Iterator[UnverifiedImaEntry]], count: int) -> None:
        self._data, self._read, self._count = data, read, count

    def __iter__(self) -> Iterator[UnverifiedImaEntry]:
        return self._read(self._data, Findings())

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True, slots=True)
class UnverifiedImaLog:
    """What could be read of a measurement list; `hash_alg` is the TPM_ALG_ID of the template hashes."""

    format: LogFormat
    hash_alg: int
    entries: ImaEntries
    findings: tuple[Finding, ...]


def template_fields(template: str) -> tuple[str, ...]:
    """Return the names of a template's fields; empty where the template is not known."""
    known = TEMPLATES.get(template)
    if known is not None:
        return known
    return tuple(template.split("|")) if "|" in template else ()


def binary_hash(data: bytes) -> int | None:
    """Return the TPM_ALG_ID of the template hashes of a binary list; none where the data are no such list."""
    for alg_id in (SHA1, 0x000B, 0x000C, 0x000D):
        place = 4 + SIZES[alg_id]
        if len(data) < place + 4:
            return None
        (size,) = _U32.unpack_from(data, place)
        name = data[place + 4 : place + 4 + size]
        if 0 < size <= 64 and len(name) == size and _U32.unpack_from(data)[0] < PCR_COUNT and _NAME.fullmatch(name):
            return alg_id
    return None


_NAME: Final = re.compile(rb"[a-z][a-z0-9|-]*")


def read_ima_binary(data: bytes, hash_alg: int = SHA1) -> UnverifiedImaLog:
    """Read a binary list as far as its bytes make sense; what is wrong is a finding."""
    findings = Findings()

    def iterate(raw: bytes, found_now: Findings) -> Iterator[UnverifiedImaEntry]:
        return iterate_binary(raw, hash_alg, found_now)

    count = sum(1 for _ in iterate(data, findings))
    return UnverifiedImaLog(LogFormat.IMA, hash_alg, ImaEntries(data, iterate, count), findings.all())


def iterate_binary(data: bytes, hash_alg: int, findings: Findings) -> Iterator[UnverifiedImaEntry]:
    """Yield the entries of a binary list one by one."""
    end, offset, number = min(len(data), MAX_LOG_SIZE), 0, 0
    if len(data) > MAX_LOG_SIZE:
        findings.add(found.LOG_TOO_LARGE, f"{len(data)} bytes; the first {MAX_LOG_SIZE} are read")
    digest_size = SIZES[hash_alg]
    head = struct.Struct(f"<I{digest_size}sI")
    names: dict[bytes, str] = {}
    while offset < end:
        if number >= MAX_ENTRIES:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_ENTRIES}; the rest begins at byte {offset}")
            return
        if offset + head.size > end:
            findings.add(found.LOG_CUT, f"{end - offset} bytes are no entry", number)
            return
        pcr, template_hash, name_size = head.unpack_from(data, offset)
        offset += head.size
        raw_name = data[offset : min(offset + name_size, end)] if name_size <= MAX_TEMPLATE_NAME else b""
        if len(raw_name) != name_size or not raw_name:
            findings.add(found.RECORD_INVALID, f"a template's name of {name_size} bytes", number)
            return
        template = names.get(raw_name)
        if template is None:
            template = raw_name.decode("ascii", "replace")
            if len(names) < MAX_TEMPLATE_NAME:
                names[raw_name] = template
            if not template_fields(template):
                findings.add(found.IMA_TEMPLATE_UNKNOWN, template, number)
        offset += name_size
        place = offset + (_OLD_DIGEST_SIZE if template == _OLD_TEMPLATE else 0)
        if place + _U32.size > end:
            findings.add(found.LOG_CUT, "the list ends inside an entry", number)
            return
        (size,) = _U32.unpack_from(data, place)
        start = place + _U32.size
        if size > MAX_FIELD_SIZE or size > end - start:
            findings.add(found.LOG_CUT, f"fields of {size} bytes and {end - start} are there", number)
            return
        fields = data[start : start + size]
        if template == _OLD_TEMPLATE:
            fields = data[offset:place] + fields[: _OLD_NAME_SIZE - 1].ljust(_OLD_NAME_SIZE, b"\0")
        yield UnverifiedImaEntry(pcr, template_hash, template, fields)
        offset = start + size
        number += 1


_LINE: Final = re.compile(rb" *(\d{1,2}) ([0-9a-f]{40,128}) ([^ ]{1,255})(?: (.*))?", re.DOTALL)


def is_ima_ascii(data: bytes) -> bool:
    """Return whether data begin as an ascii list does."""
    return _LINE.fullmatch(data[:4096].partition(b"\n")[0]) is not None


def read_ima_ascii(data: bytes) -> UnverifiedImaLog:
    """Read an ascii list as far as its lines make sense; what is wrong is a finding."""
    findings = Findings()
    first: UnverifiedImaEntry | None = None
    count = 0
    for entry in iterate_ascii(data, findings):
        count += 1
        if first is None or first.is_violation:
            first = entry
    hash_alg = _hash_of(first) if first is not None else SHA1
    return UnverifiedImaLog(LogFormat.IMA_ASCII, hash_alg, ImaEntries(data, iterate_ascii, count), findings.all())


def iterate_ascii(data: bytes, findings: Findings) -> Iterator[UnverifiedImaEntry]:
    """Yield the entries of an ascii list one by one; a line that is no entry is left out."""
    if len(data) > MAX_LOG_SIZE:
        findings.add(found.LOG_TOO_LARGE, f"{len(data)} bytes; the first {MAX_LOG_SIZE} are read")
    for number, line in enumerate(_lines(data[:MAX_LOG_SIZE])):
        if number >= MAX_ENTRIES:
            findings.add(found.TOO_MANY_EVENTS, f"more than {MAX_ENTRIES} lines")
            return
        match = _LINE.fullmatch(line) if len(line) <= MAX_FIELD_SIZE else None
        if match is None:
            findings.add(found.RECORD_INVALID, f"line {number + 1} is no entry", number)
            continue
        template_hash = bytes.fromhex(match[2].decode()) if len(match[2]) % 2 == 0 else b""
        template = match[3].decode("ascii", "replace")
        if len(template_hash) not in _HASH_BY_SIZE:
            findings.add(found.RECORD_INVALID, f"a template hash of {len(match[2])} digits", number)
            continue
        fields = _ascii_fields(template, match[4] or b"")
        if fields is None:
            findings.add(found.RECORD_INVALID, f"the fields of line {number + 1} are not those of {template}", number)
            continue
        yield UnverifiedImaEntry(int(match[1]), template_hash, template, fields)


def _hash_of(entry: UnverifiedImaEntry) -> int:
    """Return the hash that an entry was made with: the size alone does not tell SHA-256 from SM3."""
    for alg_id, size in SIZES.items():
        if size == len(entry.template_hash) and digest(alg_id, entry.data) == entry.template_hash:
            return alg_id
    return _HASH_BY_SIZE[len(entry.template_hash)]


def _lines(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset < len(data):
        end = data.find(b"\n", offset)
        end = len(data) if end < 0 else end
        if end > offset:
            yield data[offset:end]
        offset = end + 1


def _ascii_fields(template: str, text: bytes) -> bytes | None:
    """Return the template data that an ascii entry's fields stand for; none where they don't fit the template."""
    names = template_fields(template)
    if not text or len(names) < 2 or names[1] not in {"n-ng", "n"}:
        return None
    file_digest, _, rest = text.partition(b" ")
    parts = rest.rsplit(b" ", len(names) - 2) if len(names) > 2 else [rest]
    if len(parts) != len(names) - 1:
        return None
    try:
        if template == _OLD_TEMPLATE:
            return bytes.fromhex(file_digest.decode()) + parts[0][: _OLD_NAME_SIZE - 1].ljust(_OLD_NAME_SIZE, b"\0")
        values = [_digest_field(file_digest), parts[0] + b"\0"]
        for name, part in zip(names[2:], parts[1:], strict=True):
            values.append(_digest_field(part) if name.startswith("d-") and part else bytes.fromhex(part.decode()))
    except ValueError:
        return None
    return b"".join(_U32.pack(len(value)) + value for value in values)


def _digest_field(text: bytes) -> bytes:
    prefix, colon, value = text.rpartition(b":")
    return prefix + colon + (b"\0" if colon else b"") + bytes.fromhex(value.decode())


def check_ima(log: UnverifiedImaLog) -> tuple[Finding, ...]:
    """Return which entries are violations, and of which the template hash is not the hash of the fields."""
    findings = Findings()
    make = hasher(log.hash_alg)
    for number, entry in enumerate(log.entries):
        if entry.is_violation:
            findings.add(found.IMA_VIOLATION, entry.path, number)
        elif make is not None and make(entry.data).digest() != entry.template_hash:
            findings.add(found.IMA_HASH_WRONG, entry.path, number)
    return findings.all()


def replay_ima(log: UnverifiedImaLog, bank: int, start: bytes | None = None, *, padded: bool = False) -> dict[int, bytes]:
    """Return the PCR values that the list leads to in `bank`, a TPM_ALG_ID; empty where this Python has not got its hash.

    `start` is what PCR 10 held before, default zeros. `padded` replays as kernels before 5.8 extended other banks than SHA-1.
    """
    make, size = hasher(bank), SIZES.get(bank)
    if make is None or size is None:
        return {}
    own = bank == log.hash_alg
    values: dict[int, bytes] = {10: start} if start is not None else {}
    ones, zeros = b"\xff" * size, bytes(size)
    for entry in log.entries:
        if entry.is_violation:
            extended = ones
        elif own:
            extended = entry.template_hash
        elif padded:
            extended = entry.template_hash.ljust(size, b"\0")[:size]
        else:
            extended = make(entry.data).digest()
        values[entry.pcr] = make(values.get(entry.pcr, zeros) + extended).digest()
    return values
