"""swtpm's state directory and its key, as swtpm lays them out; libvirt's layout too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from vtpm.tpm.ptm import MAX_STATE_SIZE
from vtpm.wire import swtpm_keys, swtpm_state
from vtpm.wire.swtpm_keys import Kdf, KeyFormat, KeyMode
from vtpm.wire.swtpm_state import PERMANENT, VOLATILE

_TPM_1_2: Final = "tpm-00.permall"
_LIBVIRT: Final = "tpm2"
_LOCK: Final = ".lock"
_MAX_KEY_FILE_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where the key comes from: a key file, a password file, or neither."""

    key_file: Path | None = None
    key_format: KeyFormat = KeyFormat.HEX
    password_file: Path | None = None
    kdf: Kdf = Kdf.PBKDF2

    def read(self, mode: KeyMode) -> bytes | None:
        """Return the key; None without encryption."""
        if self.key_file is not None and self.password_file is not None:
            raise InvalidArgumentError("USAGE", "give --key-file or --password-file, not both")
        if self.key_file is not None:
            content = _read(self.key_file, _MAX_KEY_FILE_SIZE)
            return swtpm_keys.key_from_file(content, mode, self.key_format, subject=str(self.key_file))
        if self.password_file is not None:
            content = _read(self.password_file, _MAX_KEY_FILE_SIZE)
            return swtpm_keys.key_from_password(content, mode, self.kdf, subject=str(self.password_file))
        return None


def state_directory(given: Path) -> Path:
    """Return where the state is: in `given`, or in its `tpm2` as libvirt lays it out."""
    places = [given, given / _LIBVIRT]
    found = [place for place in places if os.path.lexists(place / PERMANENT)]
    if len(found) == 1:
        return found[0]
    if found:
        what, remedy = f"it and its {_LIBVIRT} both hold a TPM's state", "name the one that is meant, moved elsewhere"
    elif given.is_file():
        what, remedy = "this is a file", f"name the directory that holds {PERMANENT}"
    elif any(os.path.lexists(place / _TPM_1_2) for place in (given, given / "tpm1.2")):
        what, remedy = "it holds the state of a TPM 1.2", "only a TPM 2.0 can be imported"
    else:
        what, remedy = f"there is no {PERMANENT}", "name the dir= of swtpm's --tpmstate, as a user who may read it"
    raise NotFoundError("SWTPM_STATE_NOT_FOUND", what, subject=str(given), remedy=remedy)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep swtpm from starting on `directory`, and refuse if one runs: it holds the lock."""
    try:
        # A shared lock needs no right to write, so that a read-only backup can be imported too.
        with files.open_directory(directory) as place:
            lock = place.open(_LOCK)
    except FileNotFoundError:
        # Never used by a swtpm that locks.
        yield
        return
    except OSError as error:
        raise _unusable("FILE_UNREADABLE", "read", directory / _LOCK, error) from None
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise FailedPreconditionError(
                "SWTPM_RUNNING",
                "a swtpm is running on this state",
                subject=str(directory),
                remedy="shut its VM down, and try again when swtpm has ended",
            ) from None
        yield
    finally:
        os.close(lock)


def read_state(path: Path, source: KeySource, mode: KeyMode | None) -> bytes:
    """Return the TPM's permanent state out of swtpm's file."""
    data = _read(path, MAX_STATE_SIZE, follow=False)
    # If it is not encrypted, the key is refused whatever its size.
    mode = mode or swtpm_state.mode_of(data, subject=str(path)) or KeyMode.AES_256_CBC
    payload = swtpm_state.parse(data, source.read(mode), subject=str(path))
    swtpm_state.check_permanent(payload, subject=str(path))
    return payload


def prepare(given: Path, *, force: bool) -> Path:
    """Return the directory to write to, made if it is missing; refuse one that holds a TPM already."""
    directory = given / _LIBVIRT if (given / _LIBVIRT).is_dir() else given
    try:
        files.open_directory(directory, make=0o700).close()
    except OSError as error:
        raise _unusable("FILE_UNWRITABLE", "made", directory, error) from None
    for name in (PERMANENT, VOLATILE):
        if os.path.lexists(directory / name) and not force:
            raise _exists(directory / name)
    return directory


def write_state(directory: Path, data: bytes, *, force: bool) -> None:
    """Write swtpm's file durably and as one step."""
    path = directory / PERMANENT
    try:
        with files.open_directory(directory) as place:
            # Volatile state of another TPM must never meet this one.
            forget = (lambda: place.unlink(VOLATILE)) if force else None
            os.close(place.put(PERMANENT, lambda fd: files.write_all(fd, data), replaces=force, before=forget))
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _unusable("FILE_UNWRITABLE", "written", path, error) from None


def _read(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """Read at most `limit` bytes; a key may also come through a pipe of this process's own."""
    try:
        return files.read(path, limit, follow=follow)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise InvalidArgumentError(
                "FILE_TOO_LARGE", f"more than {limit} bytes", subject=str(path), remedy="name another file"
            ) from None
        raise _unusable("FILE_UNREADABLE", "read", path, error) from None


def _unusable(reason: str, done: str, path: Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(
        reason, f"can't be {done}: {error.strerror}", subject=str(path), remedy="name another, or do it as its owner"
    )


def _exists(path: Path) -> AlreadyExistsError:
    return AlreadyExistsError(
        "SWTPM_STATE_EXISTS", "there is a TPM already", subject=str(path), remedy="name another directory, or give --force"
    )
