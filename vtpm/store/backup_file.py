"""The file of a backup: a tar archive encrypted to age recipients.

The archive has, in this order: `manifest.json`, `store.db` (a SQLite database) and, if asked for, `keys.json` (the key file of
the `file` key provider). So a backup can be looked into without this program too: `age -d -i KEY FILE | tar -x`.

age authenticates each chunk before it is given out, and the end of the file. It does not say who wrote the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyrage

from vtpm import files
from vtpm.errors import BackupError, ErrorKind, InvalidArgumentError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
STORE: Final = "store.db"
KEYS: Final = "keys.json"
MAX_MANIFEST_SIZE: Final = 1 << 20
MAX_KEYS_SIZE: Final = 64 << 10
_BLOCK: Final = 512
_PART: Final = 1 << 20
_ANOTHER: Final = "take another copy of this backup, or another backup"


@dataclass(frozen=True, slots=True)
class Content:
    """Size in bytes and SHA-256, in hexadecimal, of a file in the archive."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup says it has. `key_ids` are the key-encryption keys that its data keys are wrapped with."""

    format: int
    version: str
    created: str
    schema: str
    instances: int
    states: int
    key_ids: tuple[str, ...]
    store: Content
    keys: Content | None

    def dump(self) -> bytes:
        """Return it as the archive keeps it."""
        return json.dumps(asdict(self), indent=2).encode()


def load_manifest(data: bytes, subject: str) -> Manifest:
    """Return what a manifest says.

    Raises:
        BackupError: BACKUP_DAMAGED or BACKUP_FORMAT_UNKNOWN.
    """
    try:
        document: Any = json.loads(data)
        if document["format"] != FORMAT:
            raise BackupError(
                "BACKUP_FORMAT_UNKNOWN",
                f"the backup has format {document['format']!r}",
                subject=subject,
                remedy="use the vTPM version that wrote it",
            )
        manifest = Manifest(
            FORMAT,
            str(document["version"]),
            str(document["created"]),
            str(document["schema"]),
            int(document["instances"]),
            int(document["states"]),
            tuple(map(str, document["key_ids"])),
            Content(int(document["store"]["size"]), str(document["store"]["sha256"])),
            Content(int(document["keys"]["size"]), str(document["keys"]["sha256"])) if document["keys"] else None,
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise damaged(subject, "its manifest can't be read") from None
    return manifest


def damaged(subject: str, why: str) -> BackupError:
    """Return the error of a backup that is not whole."""
    return BackupError(
        "BACKUP_DAMAGED", f"the backup is damaged: {why}", subject=subject, remedy=_ANOTHER, kind=ErrorKind.DATA_LOSS
    )


# ---- who can open it -----------------------------------------------------------------------------------------------------


def recipients_of(texts: Sequence[str]) -> list[Any]:
    """Return the age recipients that are written `age1…` or as an SSH public key.

    Raises:
        InvalidArgumentError: RECIPIENT_INVALID, or RECIPIENT_REQUIRED without any.
    """
    found: list[Any] = []
    for text in texts:
        kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
        try:
            found.append(kind.from_str(text))
        except pyrage.RecipientError:
            raise InvalidArgumentError(
                "RECIPIENT_INVALID",
                "this is no age recipient",
                # Not more of it: it may be a secret key, given by mistake.
                subject=text[:10],
                remedy="write age1… or an SSH public key",
            ) from None
    if not found:
        raise InvalidArgumentError(
            "RECIPIENT_REQUIRED", "a backup is encrypted", remedy="give --recipient or --recipients-file"
        )
    return found


def identities_of(data: bytes, subject: str) -> list[Any]:
    """Return the age identities in a file: lines of AGE-SECRET-KEY-1…, or one OpenSSH private key without a password.

    Raises:
        InvalidArgumentError: IDENTITY_INVALID.
    """
    lines = [line.strip() for line in data.decode(errors="replace").splitlines()]
    try:
        if data.startswith(b"-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        found = [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise InvalidArgumentError(
            "IDENTITY_INVALID", "the file has no age identity", subject=subject, remedy="make one with age-keygen"
        )
    return found


# ---- writing -------------------------------------------------------------------------------------------------------------


class _Archive(io.RawIOBase):
    """The archive as it is read from front to back."""

    def __init__(self, members: Sequence[tuple[str, int, BinaryIO]]) -> None:
        self._parts = self._generate(members)
        self._left = b""

    @staticmethod
    def _generate(members: Sequence[tuple[str, int, BinaryIO]]) -> Iterator[bytes]:
        for name, size, file in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = size, 0o600
            # GNU's form for sizes above 8 GiB.
            yield info.tobuf(tarfile.GNU_FORMAT)
            left = size
            while left:
                part = file.read(min(left, _PART))
                if not part:
                    raise OSError(f"{name} became shorter")
                left -= len(part)
                yield part
            yield bytes(-size % _BLOCK)
        yield bytes(2 * _BLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._left = part
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def write(path: Path, manifest: Manifest, store: Path, keys: bytes | None, recipients: Sequence[Any]) -> None:
    """Write a backup to `path`, which must not exist; it appears when it is whole and durable.

    Raises:
        BackupError: BACKUP_EXISTS or BACKUP_UNWRITABLE.
    """
    text = manifest.dump()

    def fill(fd: int) -> None:
        with files.open_directory(store.parent) as directory:
            source = directory.open(store.name)
        with open(fd, "wb", closefd=False) as out, open(source, "rb") as database:  # noqa: PTH123  # by descriptor
            members: list[tuple[str, int, BinaryIO]] = [
                (MANIFEST, len(text), io.BytesIO(text)),
                (STORE, manifest.store.size, database),
            ]
            if keys is not None:
                members.append((KEYS, len(keys), io.BytesIO(keys)))
            pyrage.encrypt_io(_Archive(members), out, list(recipients))

    try:
        directory, name = files.parent_of(path)
        with directory:
            os.close(directory.put(name, fill, replaces=False))
    except FileExistsError:
        raise exists_already(path) from None
    except OSError as error:
        raise BackupError(
            "BACKUP_UNWRITABLE",
            f"the backup can't be written: {error.strerror or error}",
            subject=str(path),
            remedy="check the directory and free space",
        ) from None


def exists_already(path: Path) -> BackupError:
    """Return the error of a backup that would replace a file."""
    return BackupError("BACKUP_EXISTS", "there is a file already", subject=str(path), remedy="give another name, or remove it")


# ---- reading -------------------------------------------------------------------------------------------------------------


class _Unpacker:
    """Takes the archive as it is decrypted: the store into a file, the rest into memory."""

    def __init__(self, subject: str, store: BinaryIO) -> None:
        self._subject = subject
        self._store = store
        self._digest = sha256()
        self._stored = 0
        self._buffer = bytearray()
        self._member = ""
        self._left = 0
        self._padding = 0
        self._names: list[str] = []
        self._memory: dict[str, bytearray] = {MANIFEST: bytearray(), KEYS: bytearray()}
        self._ended = 0
        self._manifest: Manifest | None = None

    def write(self, data: bytes) -> int:
        self._buffer += data
        while self._step():
            pass
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""

    def _step(self) -> bool:
        if self._left or self._padding:
            part = bytes(self._buffer[: self._left or self._padding])
            del self._buffer[: len(part)]
            if self._left:
                self._left -= len(part)
                self._take(part)
            else:
                self._padding -= len(part)
            return bool(part)
        if len(self._buffer) < _BLOCK:
            return False
        block = bytes(self._buffer[:_BLOCK])
        del self._buffer[:_BLOCK]
        self._begin(block)
        return True

    def _take(self, part: bytes) -> None:
        if self._member != STORE:
            self._memory[self._member] += part
            return
        self._store.write(part)
        self._digest.update(part)
        self._stored += len(part)

    def _begin(self, block: bytes) -> None:
        if self._member == MANIFEST and self._manifest is None:
            self._manifest = load_manifest(bytes(self._memory[MANIFEST]), self._subject)
        if not any(block):
            self._ended += 1
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            raise damaged(self._subject, "it is no archive") from None
        wanted = (MANIFEST, STORE, KEYS)[len(self._names)] if len(self._names) < 3 else ""
        limits = {MANIFEST: MAX_MANIFEST_SIZE, KEYS: MAX_KEYS_SIZE}
        if self._manifest is not None:
            limits[STORE] = self._manifest.store.size
        if info.name != wanted or not info.isreg() or self._ended or not 0 <= info.size <= limits.get(wanted, -1):
            raise damaged(self._subject, "the archive has what does not belong there")
        self._names.append(info.name)
        self._member, self._left, self._padding = info.name, info.size, -info.size % _BLOCK

    def finish(self) -> tuple[Manifest, bytes | None]:
        """Return the manifest and the key file, once all is there and as the manifest says."""
        manifest = self._manifest
        if manifest is None or self._ended < 2 or self._left or self._padding or self._buffer:
            raise damaged(self._subject, "the archive is not whole")
        if (self._stored, self._digest.hexdigest()) != (manifest.store.size, manifest.store.sha256):
            raise damaged(self._subject, "the store is not the one of the manifest")
        keys = bytes(self._memory[KEYS]) if KEYS in self._names else None
        found = Content(len(keys), sha256(keys).hexdigest()) if keys is not None else None
        if found != manifest.keys:
            raise damaged(self._subject, "the key file is not the one of the manifest")
        return manifest, keys


def read(path: Path, identities: Sequence[Any], store: BinaryIO) -> tuple[Manifest, bytes | None]:
    """Decrypt a backup, its store into `store`; return its manifest and the key file, if there is one.

    Raises:
        BackupError: BACKUP_UNREADABLE, BACKUP_FOREIGN, BACKUP_NOT_FOR_IDENTITY, BACKUP_DAMAGED or BACKUP_FORMAT_UNKNOWN.
    """
    subject = str(path)
    unpacker = _Unpacker(subject, store)
    with _opened(path) as file:
        empty = not os.fstat(file.fileno()).st_size
        try:
            pyrage.decrypt_io(file, unpacker, list(identities))
        except pyrage.DecryptError as error:
            raise _not_opened(error, path, empty=empty) from None
        except OSError as error:
            if error.errno is not None:
                raise BackupError(
                    "BACKUP_UNREADABLE", f"{error.strerror}", subject=subject, remedy="check the disk and its free space"
                ) from None
            raise damaged(subject, "it is cut short, or was changed") from None
    return unpacker.finish()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open(files.open_file(path, follow=True), "rb")  # noqa: PTH123, SIM115  # by descriptor
    except OSError as error:
        raise BackupError(
            "BACKUP_UNREADABLE", f"the backup can't be read: {error.strerror}", subject=str(path), remedy="check its name"
        ) from None
    with file:
        yield file


def _not_opened(error: Exception, path: Path, *, empty: bool) -> BackupError:
    subject = str(path)
    if "No matching keys" in str(error):
        return BackupError(
            "BACKUP_NOT_FOR_IDENTITY",
            "the backup was not encrypted to this identity, or its header was changed",
            subject=subject,
            remedy="give the identity of one of its recipients: --identity-file",
        )
    if not empty and "invalid" in str(error):
        return BackupError("BACKUP_FOREIGN", "this is no age file", subject=subject, remedy="give a file of vtpm backup create")
    return damaged(subject, "it is cut short, or was changed")
