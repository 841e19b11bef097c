"""Sealed secrets other than TPM states: AES-256-GCM-SIV (RFC 8452) with their purpose as associated data.

Layout: magic "VTPS" | format u8 | nonce 12 | ciphertext and 16-byte tag. Header and purpose are authenticated: a secret that is
put in the place of another is refused (invariant 6).
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from vtpm.errors import SealedStateError

_MAGIC: Final = b"VTPS\x01"
_NONCE_SIZE: Final = 12
_TAG_SIZE: Final = 16


def seal_secret(key: bytes, purpose: str, secret: bytes) -> bytes:
    """Return `secret` sealed under `key` (32 bytes) for `purpose`."""
    nonce = os.urandom(_NONCE_SIZE)
    return _MAGIC + nonce + AESGCMSIV(key).encrypt(nonce, secret, _MAGIC + purpose.encode())


def unseal_secret(key: bytes, purpose: str, sealed: bytes) -> bytes:
    """Return what was sealed for `purpose`.

    Raises:
        SealedStateError: SECRET_FORMAT_UNKNOWN or SECRET_AUTHENTICATION_FAILED.
    """
    nonce = sealed[len(_MAGIC) : len(_MAGIC) + _NONCE_SIZE]
    body = sealed[len(_MAGIC) + _NONCE_SIZE :]
    if not sealed.startswith(_MAGIC) or len(body) < _TAG_SIZE:
        raise SealedStateError("SECRET_FORMAT_UNKNOWN", "the sealed secret has an unknown format", subject=purpose)
    try:
        return AESGCMSIV(key).decrypt(nonce, body, _MAGIC + purpose.encode())
    except InvalidTag:
        raise SealedStateError(
            "SECRET_AUTHENTICATION_FAILED",
            "the sealed secret is damaged, or stands in the place of another",
            subject=purpose,
            remedy="restore the store from a backup; its present rows are left as they are",
        ) from None
