"""swtpm's states in one file (`backend-uri=file://…`): a header in little-endian with up to 15 sections, then the sections.

Section 0 is the permanent state and section 1 the volatile state, each in the format of a state file. swtpm writes in place;
here a whole new file takes the place of the old one, so that a crash leaves either.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.cli.dropin_state import StateDirectory, replace
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, SealedStateError
from vtpm.files import Directory
from vtpm.tpm.ptm import MAX_STATE_SIZE
from vtpm.wire.swtpm_state import PERMANENT, VOLATILE

_MAGIC: Final = 0x737774706D6C696E
_VERSION: Final = 1
_SECTIONS: Final = 15
# Magic, version, padding, size of the header; then offset (0: no such section), length of data, length of section, each.
_HEAD: Final = struct.Struct("<QBxH")
_SECTION: Final = struct.Struct("<III")
_HEADER_SIZE: Final = _HEAD.size + _SECTIONS * _SECTION.size
_NUMBERS: Final = {PERMANENT: 0, VOLATILE: 1}
_MAX_SIZE: Final = _HEADER_SIZE + _SECTIONS * 2 * MAX_STATE_SIZE
_LOCK_TRIES: Final = 100


class StateFile(StateDirectory):
    """The states in `path`; see StateDirectory. Their other sections, which swtpm does not use, are kept as they are."""

    def __init__(self, path: Path, mode: int = 0o640, key: bytes | None = None) -> None:
        super().__init__(path, mode, key)
        self._name = ""

    def _held(self) -> Directory:
        """The directory of the file. A name that points elsewhere stays one: the file that it points to is replaced."""
        if self._place is None:
            self._place, self._name = files.parent_of(self._directory, follow=True)
        return self._place

    def lock(self) -> None:
        """Keep every other one of ours, and every swtpm that locks, away from this file, for the life of this process.

        Raises:
            InvalidArgumentError: FILE_UNWRITABLE.
            FailedPreconditionError: SWTPM_RUNNING.
        """
        for _ in range(_LOCK_TRIES):
            try:
                file = self._held().open(self._name, os.O_RDWR | os.O_CREAT, self._mode)
            except OSError as error:
                raise InvalidArgumentError(
                    "FILE_UNWRITABLE",
                    f"can't be used: {error.strerror}",
                    subject=str(self._directory),
                    remedy="give a regular file, which can be written as one step, or a directory with dir://…",
                ) from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                raise self._locked(error) from None
            there = self._held().status(self._name)
            if there is not None and os.path.samestat(os.fstat(file), there):
                self._lock_fd = file
                return
            # It was replaced between the two, by one that has ended meanwhile.
            os.close(file)
        raise FailedPreconditionError("SWTPM_RUNNING", "another TPM is running on it", subject=str(self._directory))

    def _drop_volatile(self) -> None:
        sections = self._sections()
        if sections.pop(_NUMBERS[VOLATILE], None) is not None:
            self._replace(sections)

    def _sizes(self) -> dict[str, int]:
        sections = self._sections()
        names = {"permall": PERMANENT, "volatilestate": VOLATILE}
        return {name: len(sections[_NUMBERS[file]]) for name, file in names.items() if _NUMBERS[file] in sections}

    def _subject(self, name: str) -> str:
        return f"{self._directory} ({name})"

    def _load(self, name: str) -> bytes | None:
        return self._sections().get(_NUMBERS[name])

    def _store(self, name: str, data: bytes, *, rehearsal: bool) -> None:
        sections = self._sections()
        sections[_NUMBERS[name]] = data
        self._replace(sections, rehearsal=rehearsal)

    def _replace(self, sections: dict[int, bytes], *, rehearsal: bool = False) -> None:
        file = replace(self._held(), self._name, _build(sections), self._mode, lock=True, rehearsal=rehearsal)
        if file < 0:
            return
        # Only now: the lock on the old file kept others from beginning on it.
        os.close(self._lock_fd)
        self._lock_fd = file

    def _sections(self) -> dict[int, bytes]:
        try:
            # Not by another descriptor of the same file: the lock goes with the first that is closed (fcntl(2)).
            locked = self._lock_fd >= 0
            data = os.pread(self._lock_fd, _MAX_SIZE, 0) if locked else self._held().read(self._name, _MAX_SIZE)
        except FileNotFoundError:
            return {}
        return _parse(data, str(self._directory))


def _parse(data: bytes, subject: str) -> dict[int, bytes]:
    if not data.strip(b"\0"):
        # swtpm makes one out of it, too.
        return {}
    if len(data) < _HEADER_SIZE:
        raise _invalid("it is shorter than its header", subject)
    magic, version, header_size = _HEAD.unpack_from(data)
    if magic != _MAGIC or header_size != _HEADER_SIZE:
        # swtpm would format it.
        raise _invalid("it does not begin as one", subject)
    if version > _VERSION:
        raise _invalid(f"version {version} is not known", subject)
    found = {}
    for number in range(_SECTIONS):
        offset, length, room = _SECTION.unpack_from(data, _HEAD.size + number * _SECTION.size)
        if not offset:
            continue
        if offset < _HEADER_SIZE or length > room or offset + length > len(data):
            raise _invalid(f"section {number} is not in the file", subject)
        found[number] = data[offset : offset + length]
    return found


def _build(sections: dict[int, bytes]) -> bytes:
    header, body = bytearray(_HEAD.pack(_MAGIC, _VERSION, _HEADER_SIZE)), bytearray()
    for number in range(_SECTIONS):
        data = sections.get(number)
        if data is None:
            header += bytes(_SECTION.size)
            continue
        # As swtpm leaves room to grow in: the next power of two.
        room = 1 << max(len(data) - 1, 0).bit_length()
        header += _SECTION.pack(_HEADER_SIZE + len(body), len(data), room)
        body += data + bytes(room - len(data))
    return bytes(header + body)


def _invalid(what: str, subject: str) -> SealedStateError:
    return SealedStateError(
        "SWTPM_STATE_INVALID",
        f"this is no sound state file of swtpm's: {what}",
        subject=subject,
        remedy="take the state from a backup; nothing was changed",
    )
