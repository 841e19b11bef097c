"""The freshness anchor: what the newest states were, kept where whoever can put back an older store can't reach.

An anchor holds the head of the store's log (vtpm.store.freshness) and one record for each sealed state, so that a stale one can
be named together with both versions. It is authenticated with a secret of its own, which the key provider wraps.

Layout, big-endian: magic 8 | store id 16 | provider u8+text | key id u8+text | wrapped secret u16+bytes | binding u8+bytes |
update u64 | time u64 | head u64+32 | covered u64+32 | count u32 | records of 73 bytes | HMAC-SHA-256 over all before it, 32.
A record: instance 16 | kind u8 | ownership epoch u64 | epoch u64 | version u64 | SHA-256 of the sealed state 32.
"""

from __future__ import annotations

import hmac
import os
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, NamedTuple, Protocol

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm.errors import AnchorError
from vtpm.seal.keys import KeyProvider, WrappedKey

RESET_REMEDY: Final = "find out why; then, to trust the store as it is now: vtpm host reset-anchor"
# A million states.
MAX_ANCHOR_SIZE: Final = 80 << 20
KEY_SIZE: Final = 17
DIGEST_SIZE: Final = 32
NO_DIGEST: Final = bytes(DIGEST_SIZE)

_MAGIC: Final = b"VTPMANC\x01"
_MAGIC_PREFIX: Final = _MAGIC[:7]
_RECORD: Final = struct.Struct(">16sBQQQ32s")
_FIXED: Final = struct.Struct(">QQQ32sQ32sI")
_SECRET_SIZE: Final = 32


class LogPoint(NamedTuple):
    """A place in the store's log: a row's number and its MAC; number 0 is before the first row."""

    sequence: int
    mac: bytes


START: Final = LogPoint(0, NO_DIGEST)


class Mark(NamedTuple):
    """What the anchor remembers of a sealed state.

    `owner_epoch` is the ownership epoch at the time of anchoring. The digest of a volatile state that was used up is NO_DIGEST.
    """

    instance: bytes
    kind: int
    owner_epoch: int
    epoch: int
    version: int
    digest: bytes

    @property
    def key(self) -> bytes:
        """The first bytes of its record: instance and kind."""
        return self.instance + bytes((self.kind,))

    @property
    def numbers(self) -> tuple[int, int, int]:
        """(Ownership epoch, epoch, version)."""
        return self.owner_epoch, self.epoch, self.version

    def pack(self) -> bytes:
        """Return its record."""
        return _RECORD.pack(*self)

    @classmethod
    def unpack(cls, record: bytes) -> Mark:
        """Return what a record says."""
        return cls(*_RECORD.unpack(record))


@dataclass(frozen=True, slots=True)
class AnchorContent:
    """Everything that an anchor says.

    `head` is the newest root in the store's log, `covered` the newest row of the log that the records take account of.
    `records` maps a mark's key to its record. `update` counts the writes, `time_s` is in seconds since 1970.
    """

    store: uuid.UUID
    head: LogPoint = START
    covered: LogPoint = START
    records: Mapping[bytes, bytes] = field(default_factory=dict)
    update: int = 0
    time_s: int = 0
    binding: bytes = b""

    def root(self) -> bytes:
        """Return the digest over all records, as the log keeps it."""
        return sha256(b"".join(self.records.values())).digest()


class AnchorKeys:
    """The anchor's secret, wrapped, and the keys derived from it. `wrapped` changes when the key-encryption key does."""

    def __init__(self, provider: KeyProvider, store: uuid.UUID, wrapped: WrappedKey | None = None) -> None:
        secret = os.urandom(_SECRET_SIZE) if wrapped is None else provider.unwrap(wrapped, store)
        self._provider = provider
        self.store = store
        self.wrapped = provider.wrap(secret, store) if wrapped is None else wrapped
        self._secret = secret
        self.content_key = self._derive(b"vtpm anchor content")
        self.log_key = self._derive(b"vtpm freshness log")
        self.nv_auth = self._derive(b"vtpm anchor nv auth")

    def _derive(self, purpose: bytes) -> bytes:
        return HKDF(SHA256(), 32, salt=self.store.bytes, info=purpose).derive(self._secret)

    def rewrap(self) -> None:
        """Wrap the secret with the provider's present key."""
        self.wrapped = self._provider.wrap(self._secret, self.store)


class Anchor(Protocol):
    """Where the content is kept. Calls block; any of them may raise AnchorError."""

    @property
    def name(self) -> str:
        """`file` or `tpm2`."""

    @property
    def subject(self) -> str:
        """What an error is about, for an operator: a path, a TPM."""

    @property
    def spacing_s(self) -> float:
        """Least time between two writes, other than at the end and when an operator asks."""

    @property
    def keys(self) -> AnchorKeys:
        """The keys of what was read or created."""

    def read(self) -> AnchorContent | None:
        """Return what is there, None for nothing."""

    def create(self, store: uuid.UUID) -> AnchorContent:
        """Begin anew under a fresh secret, in place of whatever is there; nothing counts before the first `write`."""

    def write(self, content: AnchorContent) -> AnchorContent:
        """Replace what is there as one step, durably; return it as written."""


def dump(content: AnchorContent, keys: AnchorKeys) -> bytes:
    """Return `content`, authenticated."""
    wrapped = keys.wrapped
    provider, key_id = wrapped.provider.encode(), wrapped.key_id.encode()
    parts = [
        _MAGIC,
        content.store.bytes,
        bytes((len(provider),)) + provider,
        bytes((len(key_id),)) + key_id,
        struct.pack(">H", len(wrapped.blob)) + wrapped.blob,
        bytes((len(content.binding),)) + content.binding,
        _FIXED.pack(content.update, content.time_s, *content.head, *content.covered, len(content.records)),
        *content.records.values(),
    ]
    body = b"".join(parts)
    return body + hmac.digest(keys.content_key, body, "sha256")


class _Reader:
    def __init__(self, data: bytes, subject: str) -> None:
        self._data = data
        self._at = 0
        self._subject = subject

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise damaged(self._subject, "is cut short")
        self._at += size
        return part

    def sized(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width), "big"))

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def damaged(subject: str, how: str) -> AnchorError:
    """Return the error of an anchor that can't be trusted."""
    return AnchorError("ANCHOR_DAMAGED", f"the anchor {how}", subject=subject, remedy=RESET_REMEDY)


def header_of(data: bytes, subject: str) -> tuple[uuid.UUID, WrappedKey]:
    """Return the store's id and the wrapped secret; neither is authenticated yet.

    Raises:
        AnchorError: ANCHOR_DAMAGED or ANCHOR_FORMAT_UNKNOWN.
    """
    return _read_header(_Reader(data, subject), subject)


def _read_header(reader: _Reader, subject: str) -> tuple[uuid.UUID, WrappedKey]:
    magic = reader.take(len(_MAGIC))
    if magic != _MAGIC:
        if magic.startswith(_MAGIC_PREFIX):
            raise AnchorError(
                "ANCHOR_FORMAT_UNKNOWN",
                f"the anchor has format {magic[-1]}",
                subject=subject,
                remedy="start the vTPM version that wrote it",
            )
        raise damaged(subject, "is something else")
    store = uuid.UUID(bytes=reader.take(16))
    try:
        provider, key_id = reader.sized(1).decode(), reader.sized(1).decode()
    except UnicodeDecodeError:
        raise damaged(subject, "is damaged") from None
    return store, WrappedKey(provider, key_id, reader.sized(2))


def parse(data: bytes, keys: AnchorKeys, subject: str) -> AnchorContent:
    """Return the content of an anchor, authenticated.

    Raises:
        AnchorError: ANCHOR_DAMAGED or ANCHOR_FORMAT_UNKNOWN.
    """
    if len(data) > MAX_ANCHOR_SIZE:
        raise damaged(subject, f"has more than {MAX_ANCHOR_SIZE} bytes")
    body, mac = data[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
    reader = _Reader(body, subject)
    store, _wrapped = _read_header(reader, subject)
    if not hmac.compare_digest(hmac.digest(keys.content_key, body, "sha256"), mac):
        raise damaged(subject, "was changed, or is damaged")
    binding = reader.sized(1)
    update, time_s, head, head_mac, covered, covered_mac, count = _FIXED.unpack(reader.take(_FIXED.size))
    if reader.left != count * _RECORD.size:
        raise damaged(subject, "does not have the size that it says")
    records = {}
    for _ in range(count):
        record = reader.take(_RECORD.size)
        records[record[:KEY_SIZE]] = record
    return AnchorContent(store, LogPoint(head, head_mac), LogPoint(covered, covered_mac), records, update, time_s, binding)
