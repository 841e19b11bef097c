"""The format of swtpm's state files and state blobs: a header of 10 bytes and records of tag, length and data.

A state file (`tpm2-00.permall`) holds libtpms' state in a plain record, or encrypted with the key of swtpm's `--key`:
AES-CBC, then HMAC-SHA256 with the same key over ciphertext and IV. A state blob, as GET_STATEBLOB and SET_STATEBLOB carry
it, wraps such records in one of migration data, or encrypts them once more in the same way with the key of swtpm's
`--migration-key`. All that is parsed here is unverified: a plain file has no checksum.
Nothing in this module puts state or key bytes into an error.
"""

from __future__ import annotations

import enum
import hmac
import os
import struct
from collections.abc import Mapping
from typing import Final

from vtpm.errors import InvalidArgumentError, SealedStateError
from vtpm.tpm.ptm import MAX_STATE_SIZE
from vtpm.wire.swtpm_keys import KeyMode

# swtpm's names of the files in a state directory.
PERMANENT: Final = "tpm2-00.permall"
VOLATILE: Final = "tpm2-00.volatilestate"
# version, min_version, size of this header, flags, size of all.
_HEADER: Final = struct.Struct(">BBHHI")
_RECORD: Final = struct.Struct(">HI")
_VERSION: Final = 2
_MIN_VERSION: Final = 1
# How libtpms begins a TPM 2.0's permanent state: version, magic, min_version.
_PERMANENT: Final = struct.Struct(">HIH")
_PERMANENT_MAGIC: Final = 0xAB364723
# A volatile state begins with the same fields.
_VOLATILE_MAGIC: Final = 0x45637889
_AES_BLOCK_SIZE: Final = 16
_REWRITE: Final = "let swtpm write it anew: swtpm socket … --flags startup-clear --ctrl …, then swtpm_ioctl -s, and try again"
_DAMAGED: Final = "take the state from a backup; nothing was changed"


class _Tag(enum.IntEnum):
    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    MIGRATION_DATA = 4
    ENCRYPTED_MIGRATION_DATA = 5
    IV = 6
    MIGRATION_IV = 7


class _Flag(enum.IntFlag):
    ENCRYPTED = 0x01
    MIGRATION_ENCRYPTED = 0x02
    MIGRATION_DATA = 0x04
    KEY_256_BIT = 0x08
    MIGRATION_KEY_256_BIT = 0x10


_BLOB_FLAGS: Final = (
    _Flag.ENCRYPTED | _Flag.MIGRATION_ENCRYPTED | _Flag.MIGRATION_DATA | _Flag.KEY_256_BIT | _Flag.MIGRATION_KEY_256_BIT
)
# The record of ciphertext and that of its IV, in a file and in what is migrated.
_OF_FILE: Final = (_Tag.ENCRYPTED_DATA, _Tag.IV)
_OF_MIGRATION: Final = (_Tag.ENCRYPTED_MIGRATION_DATA, _Tag.MIGRATION_IV)


_FILE_MODES: Final[Mapping[int, KeyMode | None]] = {
    0: None,
    _Flag.ENCRYPTED: KeyMode.AES_128_CBC,
    _Flag.ENCRYPTED | _Flag.KEY_256_BIT: KeyMode.AES_256_CBC,
}


def load_ciphers() -> None:
    """Load the modules that encrypted states need, for who may not be able to later."""
    from cryptography.hazmat.primitives import ciphers, padding  # noqa: F401


def mode_of(data: bytes, *, subject: str = "") -> KeyMode | None:
    """Return how a state file says it is encrypted; None for a plain one.

    Raises:
        SealedStateError: as `parse`.
    """
    return _file_mode(_header(data, subject), subject)


def parse(data: bytes, key: bytes | None = None, *, subject: str = "") -> bytes:
    """Return libtpms' state out of a state file; with `key` if it is encrypted.

    Raises:
        SealedStateError: SWTPM_STATE_INVALID, SWTPM_STATE_WITHOUT_HEADER, SWTPM_STATE_VERSION_UNSUPPORTED,
            SWTPM_STATE_NOT_AUTHENTIC.
        InvalidArgumentError: SWTPM_STATE_TOO_LARGE, SWTPM_STATE_ENCRYPTED, SWTPM_STATE_NOT_ENCRYPTED, SWTPM_KEY_INVALID.
    """
    mode = _file_mode(_header(data, subject), subject)
    if mode is None:
        if key is not None:
            # Who gives a key expects a file that nobody else could have written.
            raise InvalidArgumentError(
                "SWTPM_STATE_NOT_ENCRYPTED",
                "a key was given, but the state is not encrypted",
                subject=subject,
                remedy="if this is the right file, leave the key away",
            )
        return _only(_records(data[_HEADER.size :], subject), _Tag.DATA, subject)
    if key is None:
        raise InvalidArgumentError(
            "SWTPM_STATE_ENCRYPTED",
            f"the state is encrypted with {mode.value}",
            subject=subject,
            remedy="give the key that swtpm's --key was given: --key-file FILE or --password-file FILE",
        )
    return _decrypt(_records(data[_HEADER.size :], subject), key, mode, _OF_FILE, subject)


def build(payload: bytes, key: bytes | None = None) -> bytes:
    """Return a state file with libtpms' state, encrypted if a key of 16 or 32 bytes is given."""
    if key is None:
        return _with_header(_Flag(0), _record(_Tag.DATA, payload))
    flags = _Flag.ENCRYPTED | (_Flag.KEY_256_BIT if len(key) == 32 else _Flag(0))
    return _with_header(flags, _encrypt(payload, key, _OF_FILE))


def build_blob(payload: bytes, key: bytes | None = None, migration_key: bytes | None = None) -> bytes:
    """Return a state blob with libtpms' state, as GET_STATEBLOB gives it.

    Encrypted with `key` if the state was not asked for decrypted, and with `migration_key` around it.
    """
    flags = _Flag.MIGRATION_DATA
    records = _record(_Tag.DATA, payload)
    if key is not None:
        flags |= _Flag.ENCRYPTED | (_Flag.KEY_256_BIT if len(key) == 32 else _Flag(0))
        records = _encrypt(payload, key, _OF_FILE)
    if migration_key is None:
        return _with_header(flags, _record(_Tag.MIGRATION_DATA, records))
    flags |= _Flag.MIGRATION_ENCRYPTED | (_Flag.MIGRATION_KEY_256_BIT if len(migration_key) == 32 else _Flag(0))
    return _with_header(flags, _encrypt(records, migration_key, _OF_MIGRATION))


def is_whole(blob: bytes) -> bool:
    """Whether a blob has the length that its header says."""
    return len(blob) >= _HEADER.size and _HEADER.unpack_from(blob)[4] == len(blob)


def is_encrypted(blob: bytes) -> bool:
    """Whether a blob's header says that it is encrypted; False if it is none."""
    if len(blob) < _HEADER.size:
        return False
    return bool(_HEADER.unpack_from(blob)[3] & (_Flag.ENCRYPTED | _Flag.MIGRATION_ENCRYPTED))


def open_blob(
    blob: bytes, key: bytes | None, migration_key: bytes | None, *, encrypted: bool = False, subject: str = ""
) -> bytes:
    """Return libtpms' state out of a blob of GET_STATEBLOB or SET_STATEBLOB, with the keys that it is encrypted with.

    As with swtpm, a blob that was not encrypted is taken whatever keys there are; `encrypted` is what SET_STATEBLOB says of it.

    Raises:
        SealedStateError: SWTPM_STATE_INVALID, SWTPM_STATE_WITHOUT_HEADER, SWTPM_STATE_VERSION_UNSUPPORTED,
            SWTPM_STATE_NOT_AUTHENTIC.
        InvalidArgumentError: SWTPM_STATE_TOO_LARGE, SWTPM_STATE_ENCRYPTED, SWTPM_KEY_INVALID.
    """
    flags = _header(blob, subject)
    if not flags & _Flag.MIGRATION_DATA or flags & ~_BLOB_FLAGS:
        raise _invalid(f"flags 0x{flags:x} are not those of migration data", subject)
    records = _records(blob[_HEADER.size :], subject)
    if flags & _Flag.MIGRATION_ENCRYPTED:
        mode = KeyMode.AES_256_CBC if flags & _Flag.MIGRATION_KEY_256_BIT else KeyMode.AES_128_CBC
        inner = _decrypt(records, _wanted(migration_key, "--migration-key", subject), mode, _OF_MIGRATION, subject)
    else:
        inner = _only(records, _Tag.MIGRATION_DATA, subject)
    records = _records(inner, subject)
    if encrypted or flags & _Flag.ENCRYPTED:
        mode = KeyMode.AES_256_CBC if flags & _Flag.KEY_256_BIT else KeyMode.AES_128_CBC
        return _decrypt(records, _wanted(key, "--key", subject), mode, _OF_FILE, subject)
    return _only(records, _Tag.DATA, subject)


def _wanted(key: bytes | None, option: str, subject: str) -> bytes:
    if key is None:
        raise InvalidArgumentError(
            "SWTPM_STATE_ENCRYPTED",
            f"the state blob is encrypted with the key of {option}",
            subject=subject,
            remedy=f"give {option} as where the blob comes from",
        )
    return key


def payload_of(blob: bytes, *, subject: str = "") -> bytes:
    """The same for a blob that is not encrypted."""
    return open_blob(blob, None, None, subject=subject)


def check_permanent(payload: bytes, *, subject: str = "") -> None:
    """Refuse what is plainly not a TPM 2.0's permanent state, before a TPM is asked to take it.

    Raises:
        SealedStateError: SWTPM_STATE_NOT_PERMANENT.
    """
    if len(payload) < _PERMANENT.size or _PERMANENT.unpack_from(payload)[1] != _PERMANENT_MAGIC:
        raise SealedStateError(
            "SWTPM_STATE_NOT_PERMANENT",
            "this is not the permanent state of a TPM 2.0",
            subject=subject,
            remedy="name the directory that holds tpm2-00.permall of a TPM 2.0",
        )


def _invalid(what: str, subject: str) -> SealedStateError:
    return SealedStateError("SWTPM_STATE_INVALID", f"this is no sound swtpm state: {what}", subject=subject, remedy=_DAMAGED)


def _header(data: bytes, subject: str) -> _Flag:
    """Check the header and return its flags."""
    if len(data) > MAX_STATE_SIZE:
        raise InvalidArgumentError(
            "SWTPM_STATE_TOO_LARGE",
            f"{len(data)} bytes are more than any TPM's state ({MAX_STATE_SIZE})",
            subject=subject,
            remedy="name the directory of swtpm's state",
        )
    if len(data) >= _PERMANENT.size and _PERMANENT.unpack_from(data)[1] in (_PERMANENT_MAGIC, _VOLATILE_MAGIC):
        # What libtpms wrote, with nothing around it: no file with a header can look like that, whose length is in that place.
        raise SealedStateError(
            "SWTPM_STATE_WITHOUT_HEADER",
            "the state has no header: swtpm's oldest format, in which nothing tells a whole file from one that was cut off",
            subject=subject,
            remedy=_REWRITE,
        )
    if len(data) < _HEADER.size:
        raise _invalid(f"{len(data)} bytes are less than its header", subject)
    version, min_version, header_size, flags, size = _HEADER.unpack_from(data)
    if header_size != _HEADER.size or size != len(data):
        raise _invalid("the lengths in its header do not fit", subject)
    if version != _VERSION or min_version > _VERSION:
        raise SealedStateError(
            "SWTPM_STATE_VERSION_UNSUPPORTED",
            f"the format has version {version} (readers need {min_version}); version {_VERSION} is supported",
            subject=subject,
            remedy=_REWRITE,
        )
    return _Flag(flags)


def _file_mode(flags: _Flag, subject: str) -> KeyMode | None:
    if flags not in _FILE_MODES:
        raise _invalid(f"flags 0x{flags:x} are not those of a state file", subject)
    return _FILE_MODES[flags]


def _records(data: bytes, subject: str) -> dict[int, bytes]:
    """Split into records; each must fit, and none may come twice."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if len(data) - offset < _RECORD.size:
            raise _invalid("a record is cut off", subject)
        tag, size = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        if size > len(data) - offset:
            raise _invalid(f"record {tag} claims more than there is", subject)
        if tag in found:
            raise _invalid(f"record {tag} comes twice", subject)
        found[tag] = data[offset : offset + size]
        offset += size
    return found


def _only(records: Mapping[int, bytes], tag: _Tag, subject: str) -> bytes:
    """Return the data of the one record that may be there."""
    if set(records) != {tag}:
        raise _invalid(f"records {sorted(records)} instead of {tag.value}", subject)
    if not records[tag]:
        raise _invalid(f"record {tag.value} is empty", subject)
    return records[tag]


def _encrypt(payload: bytes, key: bytes, tags: tuple[_Tag, _Tag]) -> bytes:
    """Return the records of ciphertext, MAC and IV."""
    if len(key) not in (16, 32):
        raise InvalidArgumentError("SWTPM_KEY_INVALID", "a key has 16 or 32 bytes", remedy="give a key of that size")
    # swtpm pads to the size of the key and stores an IV of that size, of which AES uses the first 16 bytes.
    iv = os.urandom(len(key))
    # Most states are plain, and this takes long to load.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    padder = PKCS7(len(key) * 8).padder()
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv[:_AES_BLOCK_SIZE])).encryptor()
    ciphertext = encryptor.update(padder.update(payload) + padder.finalize()) + encryptor.finalize()
    return _record(tags[0], ciphertext) + _record(_Tag.HMAC, _mac(key, ciphertext, iv)) + _record(tags[1], iv)


def _decrypt(records: Mapping[int, bytes], key: bytes, mode: KeyMode, tags: tuple[_Tag, _Tag], subject: str) -> bytes:
    if len(key) != mode.key_size:
        raise InvalidArgumentError(
            "SWTPM_KEY_INVALID",
            f"the state is encrypted with {mode.value}, the key has {len(key) * 8} bits",
            subject=subject,
            remedy=f"give the key that swtpm was given with mode={mode.value}",
        )
    # A file without an IV, which swtpm would read, is refused: the MAC covers ciphertext and IV without a mark between them, so
    # that an IV could be passed off as the last of the ciphertext.
    if set(records) != {_Tag.HMAC, *tags}:
        raise _invalid(f"records {sorted(records)} instead of ciphertext, MAC and IV", subject)
    ciphertext, iv = records[tags[0]], records[tags[1]]
    if len(iv) != len(key) or not ciphertext or len(ciphertext) % len(key):
        raise _invalid("IV or ciphertext are of an impossible size", subject)
    if not hmac.compare_digest(_mac(key, ciphertext, iv), records[_Tag.HMAC]):
        raise SealedStateError(
            "SWTPM_STATE_NOT_AUTHENTIC",
            "the MAC does not fit: the key is another one, or the file was changed",
            subject=subject,
            remedy="give the key (and for a password the --kdf) that swtpm was given, or take the state from a backup",
        )
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv[:_AES_BLOCK_SIZE])).decryptor()
    unpadder = PKCS7(len(key) * 8).unpadder()
    try:
        payload = unpadder.update(decryptor.update(ciphertext) + decryptor.finalize()) + unpadder.finalize()
    except ValueError:
        raise _invalid("the padding is wrong", subject) from None
    if not payload:
        raise _invalid("it is empty", subject)
    return payload


def _mac(key: bytes, ciphertext: bytes, iv: bytes) -> bytes:
    return hmac.digest(key, ciphertext + iv, "sha256")


def _record(tag: _Tag, data: bytes) -> bytes:
    return _RECORD.pack(tag, len(data)) + data


def _with_header(flags: _Flag, records: bytes) -> bytes:
    return _HEADER.pack(_VERSION, _MIN_VERSION, _HEADER.size, flags, _HEADER.size + len(records)) + records
