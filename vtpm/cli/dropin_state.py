"""swtpm's state directory, owned for the time of a run: its lock, its key, and files that are written durably."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, StoreError, VtpmError
from vtpm.files import Directory
from vtpm.tpm.ptm import MAX_STATE_SIZE
from vtpm.wire import swtpm_state
from vtpm.wire.swtpm_state import PERMANENT, VOLATILE

_LOCK: Final = ".lock"
_MAX_KEY_FILE_SIZE: Final = 4096
_MODES: Final = {"aes-cbc": "aes-128-cbc", "aes-128-cbc": "aes-128-cbc", "aes-256-cbc": "aes-256-cbc"}


def read_key(fields: Mapping[str, str], option: str = "--key") -> bytes | None:
    """Return the key that the fields of `--key` or `--migration-key` name; None without any."""
    if not fields:
        return None
    from vtpm.wire import swtpm_keys
    from vtpm.wire.swtpm_keys import Kdf, KeyFormat, KeyMode

    sources = [name for name in ("file", "fd", "pwdfile", "pwdfd") if name in fields]
    if len(sources) != 1:
        raise InvalidArgumentError("USAGE", f"{option} needs one of file, fd, pwdfile and pwdfd")
    source = sources[0]
    try:
        mode = KeyMode(_MODES[fields.get("mode", "aes-128-cbc")])
        form = KeyFormat(fields.get("format", "hex"))
        # A key that is no password is not derived, and swtpm does not look at the name then.
        kdf = Kdf(fields.get("kdf", "pbkdf2")) if source.startswith("pwd") else Kdf("pbkdf2")
        place = int(fields[source]) if source.endswith("fd") else fields[source]
    except (KeyError, ValueError):
        raise InvalidArgumentError("USAGE", "Error parsing key options: unknown mode, format, kdf or descriptor") from None
    try:
        if isinstance(place, int):
            content = files.read_descriptor(place, _MAX_KEY_FILE_SIZE, str(place))
        else:
            content = files.read(Path(place), _MAX_KEY_FILE_SIZE, follow=True)
            if "remove" in fields:
                _remove(Path(place))
    except OSError as error:
        raise InvalidArgumentError("FILE_UNREADABLE", f"Unable to open file {place}: {error.strerror}") from None
    if source.startswith("pwd"):
        return swtpm_keys.key_from_password(content, mode, kdf, subject=str(place))
    return swtpm_keys.key_from_file(content, mode, form, subject=str(place))


def _remove(path: Path) -> None:
    directory, name = files.parent_of(path)
    with directory:
        directory.unlink(name)


class StateDirectory:
    """A state directory. `mode` is that of the files; `key` encrypts them."""

    def __init__(self, directory: Path, mode: int = 0o640, key: bytes | None = None) -> None:
        self._directory = directory
        self._mode = mode
        self._key = key
        self._lock_fd = -1
        self._place: Directory | None = None
        # The commit thread writes, and the loop writes a first state.
        self._writing = threading.Lock()
        self._written = False

    def lock(self) -> None:
        """Keep every swtpm away from this directory, for the life of this process.

        Raises:
            InvalidArgumentError: FILE_UNWRITABLE.
            FailedPreconditionError: SWTPM_RUNNING.
        """
        try:
            self._lock_fd = self._held().open(_LOCK, os.O_WRONLY | os.O_CREAT, self._mode)
        except OSError as error:
            raise InvalidArgumentError(
                "FILE_UNWRITABLE", f"can't be used: {error.strerror}", subject=str(self._directory)
            ) from None
        try:
            # The same kind of lock as swtpm's; the kernel takes it back however this process ends.
            fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self._locked(error) from None

    def unlock(self) -> None:
        """Let the next one in; nothing is read or written here any more."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _locked(self, error: OSError) -> VtpmError:
        """The error of a lock that was not given."""
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return InvalidArgumentError(
                "FILE_UNWRITABLE",
                f"can't be locked: {error.strerror}",
                subject=str(self._directory),
                remedy="use a file system with locks",
            )
        return FailedPreconditionError(
            "SWTPM_RUNNING",
            "Could not lock access to the state: another TPM is running on it",
            subject=str(self._directory),
            remedy="end it first",
        )

    def read(self) -> bytes | None:
        """Return the permanent state; None if there is none yet.

        Raises:
            VtpmError: there is one that can't be used; it is left as it is (invariant 7).
        """
        payload = self._read(PERMANENT)
        if payload is not None:
            swtpm_state.check_permanent(payload, subject=self._subject(PERMANENT))
        return payload

    def read_volatile(self) -> bytes | None:
        """Return the volatile state that a suspended TPM left; None if it did not."""
        return self._read(VOLATILE)

    def _read(self, name: str) -> bytes | None:
        try:
            data = self._load(name)
        except OSError as error:
            raise InvalidArgumentError(
                "FILE_UNREADABLE", f"can't be read: {error.strerror}", subject=self._subject(name)
            ) from None
        return None if data is None else swtpm_state.parse(data, self._key, subject=self._subject(name))

    def write(self, state: bytes) -> None:
        """Make the permanent state durable, as one step.

        Raises:
            StoreError: STATE_NOT_WRITTEN.
        """
        with self._writing:
            self._write(PERMANENT, state)
            self._written = True

    def write_first(self, state: bytes) -> None:
        """The same for a state that is older than any that `write` was given."""
        with self._writing:
            if not self._written:
                self._write(PERMANENT, state)

    def write_volatile(self, state: bytes) -> None:
        """The same for the volatile state of a TPM that goes to sleep."""
        with self._writing:
            self._write(VOLATILE, state)

    def rehearse_volatile(self, volatile: Callable[[], bytes]) -> None:
        """Do all that `write_volatile` does with what `volatile` returns, but for its last step, so that nothing is changed.

        Raises:
            StoreError: STATE_NOT_WRITTEN.
        """
        with self._writing:
            self._write(VOLATILE, volatile(), rehearsal=True)

    def _write(self, name: str, state: bytes, *, rehearsal: bool = False) -> None:
        with self._errors(name):
            self._store(name, swtpm_state.build(state, self._key), rehearsal=rehearsal)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                "STATE_NOT_WRITTEN",
                f"can't be written: {error.strerror}",
                subject=self._subject(name),
                remedy="make room on the disk, or make the directory one that can be written",
            ) from None

    # ---- where the states are --------------------------------------------------------------------------------------------

    def drop_volatile(self) -> None:
        """Forget the volatile state durably: it is used once (invariant 2).

        Raises:
            StoreError: STATE_NOT_WRITTEN.
        """
        with self._errors(VOLATILE):
            self._drop_volatile()

    def _drop_volatile(self) -> None:
        place = self._held()
        if place.status(VOLATILE) is not None:
            place.unlink(VOLATILE)
            place.sync()

    def sizes(self) -> dict[str, int]:
        """Return what `--print-states` tells: swtpm's names of the states that are there, with the sizes of their files.

        Raises:
            InvalidArgumentError: FILE_UNREADABLE.
        """
        try:
            return self._sizes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InvalidArgumentError(
                "FILE_UNREADABLE", f"can't be read: {error.strerror}", subject=str(self._directory)
            ) from None

    def _sizes(self) -> dict[str, int]:
        names = {"permall": PERMANENT, "volatilestate": VOLATILE}
        found = {name: self._held().status(file) for name, file in names.items()}
        return {name: status.st_size for name, status in found.items() if status is not None}

    def _held(self) -> Directory:
        """The directory, held from its first use on: all that is read and written is in it, wherever its name leads later."""
        if self._place is None:
            self._place = files.open_directory(self._directory)
        return self._place

    def _subject(self, name: str) -> str:
        return str(self._directory / name)

    def _load(self, name: str) -> bytes | None:
        try:
            return self._held().read(name, MAX_STATE_SIZE)
        except FileNotFoundError:
            return None

    def _store(self, name: str, data: bytes, *, rehearsal: bool) -> None:
        file = replace(self._held(), name, data, self._mode, rehearsal=rehearsal)
        if file >= 0:
            os.close(file)


class _RehearsalError(Exception):
    """All went well until the last step, which is not taken."""


def replace(directory: Directory, name: str, data: bytes, mode: int, *, lock: bool = False, rehearsal: bool = False) -> int:
    """Put a file in the place of another, durably and as one step; return its open descriptor.

    With `lock` it is locked before anybody else can open it. A `rehearsal` removes the new file again and returns -1.
    """

    def fill(fd: int) -> None:
        if lock:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files.write_all(fd, data)

    # One name, so that a crash leaves at most one; nobody else writes here, the lock sees to that.
    def before() -> None:
        if rehearsal:
            raise _RehearsalError

    try:
        return directory.put(name, fill, mode=mode, exact=True, temporary=f"TMP-{name}", before=before)
    except _RehearsalError:
        return -1
