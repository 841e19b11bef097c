"""The envelope of sealed state: AES-256-GCM-SIV (RFC 8452) with its place as associated data.

Layout, big-endian: magic "VTPM" | format u8 | algorithm u8 | kind u8 | reserved u8 | instance 16 | epoch u64 | version u64 |
nonce 12 | ciphertext and 16-byte tag. The whole header is authenticated.

Invariant 6: a blob is bound to instance, kind, epoch and version. Swapped, truncated or replayed blobs are named and refused.
"""

from __future__ import annotations

import enum
import os
import struct
import uuid
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from vtpm.errors import SealedStateError

_HEADER: Final = struct.Struct(">4sBBBB16sQQ12s")
_MAGIC: Final = b"VTPM"
_FORMAT: Final = 1
_AES_256_GCM_SIV: Final = 1
_TAG_SIZE: Final = 16
MAX_ENVELOPE_SIZE: Final = 4 << 20
_RESTORE: Final = "restore this instance: vtpm backup restore FILE --instance NAME; its present row is left as it is"


class StateKind(enum.IntEnum):
    """What a blob holds: what lasts, or what a power cycle drops."""

    PERMANENT = 1
    VOLATILE = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob belongs: authenticated with it."""

    instance: uuid.UUID
    kind: StateKind
    epoch: int
    version: int


def seal(data_key: bytes, place: Place, plaintext: bytes) -> bytes:
    """Return the envelope of `plaintext` for `place`. `data_key` has 32 bytes.

    Raises:
        SealedStateError: ENVELOPE_TOO_LARGE, `unseal` would refuse it.
    """
    return seal_with(AESGCMSIV(data_key), place, plaintext)


def seal_with(cipher: AESGCMSIV, place: Place, plaintext: bytes) -> bytes:
    """As `seal`, with a cipher that was set up once: for who seals often, as a worker does with a guest waiting.

    Raises:
        SealedStateError: ENVELOPE_TOO_LARGE, `unseal` would refuse it.
    """
    if len(plaintext) > MAX_ENVELOPE_SIZE - _HEADER.size - _TAG_SIZE:
        raise SealedStateError(
            "ENVELOPE_TOO_LARGE", f"a state of {len(plaintext)} bytes can't be sealed", subject=str(place.instance)
        )
    header = _HEADER.pack(
        _MAGIC,
        _FORMAT,
        _AES_256_GCM_SIV,
        place.kind,
        0,
        place.instance.bytes,
        place.epoch,
        place.version,
        nonce := os.urandom(12),
    )
    return header + cipher.encrypt(nonce, plaintext, header)


def unseal(data_key: bytes, place: Place, envelope: bytes) -> bytes:
    """Return what was sealed for `place`.

    Raises:
        SealedStateError: ENVELOPE_TOO_LARGE, _TRUNCATED, _FORMAT_UNKNOWN, _INSTANCE_MISMATCH, _KIND_MISMATCH, _EPOCH_MISMATCH,
            _VERSION_MISMATCH or _AUTHENTICATION_FAILED.
    """
    found = _read_header(envelope, str(place.instance))
    for field, reason in (
        ("instance", "ENVELOPE_INSTANCE_MISMATCH"),
        ("kind", "ENVELOPE_KIND_MISMATCH"),
        ("epoch", "ENVELOPE_EPOCH_MISMATCH"),
        ("version", "ENVELOPE_VERSION_MISMATCH"),
    ):
        if getattr(found, field) != getattr(place, field):
            message = f"the sealed state has {field} {getattr(found, field)!s}, its row says {getattr(place, field)!s}"
            raise SealedStateError(reason, message, subject=str(place.instance), remedy=_RESTORE)
    header = envelope[: _HEADER.size]
    try:
        return AESGCMSIV(data_key).decrypt(header[-12:], envelope[_HEADER.size :], header)
    except InvalidTag:
        raise SealedStateError(
            "ENVELOPE_AUTHENTICATION_FAILED",
            "the sealed state is damaged, or was sealed with another data key",
            subject=str(place.instance),
            remedy=_RESTORE,
        ) from None


def place_of(envelope: bytes) -> Place:
    """Return the place that the header claims; not authenticated, for diagnosis only.

    Raises:
        SealedStateError: ENVELOPE_TOO_LARGE, ENVELOPE_TRUNCATED or ENVELOPE_FORMAT_UNKNOWN.
    """
    return _read_header(envelope, "")


def _read_header(envelope: bytes, subject: str) -> Place:
    if len(envelope) > MAX_ENVELOPE_SIZE:
        raise SealedStateError("ENVELOPE_TOO_LARGE", f"sealed state of {len(envelope)} bytes", subject=subject, remedy=_RESTORE)
    if len(envelope) < _HEADER.size + _TAG_SIZE:
        raise SealedStateError(
            "ENVELOPE_TRUNCATED", f"sealed state of only {len(envelope)} bytes", subject=subject, remedy=_RESTORE
        )
    magic, form, algorithm, kind, reserved, instance, epoch, version, _nonce = _HEADER.unpack_from(envelope)
    if magic != _MAGIC or form != _FORMAT or algorithm != _AES_256_GCM_SIV or reserved or kind not in list(StateKind):
        raise SealedStateError(
            "ENVELOPE_FORMAT_UNKNOWN",
            f"sealed state of an unknown format (format {form}, algorithm {algorithm}, kind {kind})",
            subject=subject,
            remedy="start the vTPM version that wrote it, or restore the instance from a backup",
        )
    return Place(uuid.UUID(bytes=instance), StateKind(kind), epoch, version)
