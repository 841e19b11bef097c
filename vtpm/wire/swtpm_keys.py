"""swtpm's keys: what `--key` and `--migration-key` make of a key file or a password file.

Nothing in this module puts key bytes into an error.
"""

from __future__ import annotations

import enum
import hashlib
import re
from typing import Final

from vtpm.errors import InvalidArgumentError

_PBKDF2_SALT: Final = b"swtpm"
_PBKDF2_ITERATIONS: Final = 1000
_HEX_KEY: Final = re.compile(rb"(?:0x)?([0-9A-Fa-f]+)(?:\s.*)?", re.DOTALL)


class KeyMode(enum.StrEnum):
    """`mode=` of swtpm's `--key` and `--migration-key`."""

    AES_128_CBC = "aes-128-cbc"
    AES_256_CBC = "aes-256-cbc"

    @property
    def key_size(self) -> int:
        """Size of the key in bytes."""
        return 16 if self is KeyMode.AES_128_CBC else 32


class KeyFormat(enum.StrEnum):
    """`format=` of swtpm's `--key`."""

    HEX = "hex"
    BINARY = "binary"


class Kdf(enum.StrEnum):
    """`kdf=` of swtpm's `--key`."""

    PBKDF2 = "pbkdf2"
    SHA512 = "sha512"


def key_from_file(content: bytes, mode: KeyMode, form: KeyFormat, *, subject: str = "") -> bytes:
    """Return the key that a key file holds, as swtpm reads it.

    Raises:
        InvalidArgumentError: SWTPM_KEY_INVALID.
    """
    key = content
    if form is KeyFormat.HEX:
        match = _HEX_KEY.fullmatch(content)
        key = bytes.fromhex(match[1].decode()) if match and len(match[1]) % 2 == 0 else b""
    # swtpm takes a binary key of 16 bytes for aes-256-cbc as well and encrypts with 128 bits; the file's header then says so.
    if len(key) != mode.key_size:
        raise InvalidArgumentError(
            "SWTPM_KEY_INVALID",
            f"the key file does not hold {mode.key_size} bytes in {form.value} form, as {mode.value} needs",
            subject=subject,
            remedy="name the form that swtpm was given, with --key-format hex or binary, and the mode with --mode",
        )
    return key


def key_from_password(content: bytes, mode: KeyMode, kdf: Kdf, *, subject: str = "") -> bytes:
    """Return the key that swtpm derives from a password file; all its bytes count, a line's end too.

    Raises:
        InvalidArgumentError: SWTPM_KEY_INVALID.
    """
    if not content:
        raise InvalidArgumentError(
            "SWTPM_KEY_INVALID", "the password file is empty", subject=subject, remedy="name the file that swtpm was given"
        )
    if kdf is Kdf.SHA512:
        return hashlib.sha512(content).digest()[: mode.key_size]
    return hashlib.pbkdf2_hmac("sha512", content, _PBKDF2_SALT, _PBKDF2_ITERATIONS, mode.key_size)
