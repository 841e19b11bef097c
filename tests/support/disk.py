"""A disk whose power can be cut, after the fact: every write and sync of the daemon is recorded, and the files are made anew
from what was synced (tests/faults/disk.c)."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.daemon import ROOT

_RECORD = struct.Struct("<cHIQ")
# Made anew by SQLite from the log, and never synced.
_VOLATILE = "-shm"


class Disk:
    """Records what a daemon does to the files under `watched`; `fault` makes them fail."""

    def __init__(self, directory: Path, watched: Path) -> None:
        self.watched = watched
        self.log = directory / "disk.log"
        self._fault = directory / "fault"
        self._library = directory / "disk.so"
        source = ROOT / "tests" / "faults" / "disk.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", self._library, source, "-ldl", "-lpthread"], check=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a daemon needs to use this disk."""
        return {
            "LD_PRELOAD": str(self._library),
            "VTPM_DISK_DIR": str(self.watched),
            "VTPM_DISK_LOG": str(self.log),
            "VTPM_DISK_FAULT": str(self._fault),
        }

    def fail(self, kind: str) -> None:
        """Fail from now on: E (EIO), N (ENOSPC), S (short writes), F (fsync)."""
        self._fault.write_text(kind)

    def heal(self) -> None:
        """Fail no more."""
        self._fault.unlink()

    def position(self) -> int:
        """How much was recorded until now."""
        return self.log.stat().st_size

    def after_power_loss(self, position: int, target: Path, chance: random.Random) -> None:
        """Make in `target` the files as a disk might have them that lost power at `position` of the record.

        What was synced is there. Of what was not, each write is there or not as `chance` has it: disks reorder.
        """
        files: dict[str, _File] = {}
        for kind, path, offset, data in _records(self.log.read_bytes()[:position]):
            file = files.setdefault(path, _File())
            match kind:
                case b"W":
                    file.unsynced.append((offset, data))
                case b"C":
                    file.unsynced.append((offset, None))
                case b"T":
                    file.unsynced.append((0, None))
                case b"S":
                    file.settle(file.unsynced)
                case b"X":
                    # The kernel forgets what a failed fsync could not write, and reports it once (fsync(2)).
                    file.unsynced.clear()
                case b"R":
                    files[data.decode()] = files.pop(path)
                case _:
                    files.pop(path)
        for path, file in files.items():
            if path.endswith(_VOLATILE) or Path(path).is_dir():
                continue
            file.settle([change for change in file.unsynced if chance.random() < 0.5])
            place = target / Path(path).relative_to(self.watched)
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.write_bytes(bytes(file.content))
            place.chmod(0o600)


@dataclass(slots=True)
class _File:
    content: bytearray = field(default_factory=bytearray)
    # Offset and data of writes; without data, the size that it was cut to.
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)

    def settle(self, changes: list[tuple[int, bytes | None]]) -> None:
        for offset, data in changes:
            if data is None:
                del self.content[offset:]
                self.content += bytes(offset - len(self.content))
            else:
                self.content += bytes(max(0, offset - len(self.content)))
                self.content[offset : offset + len(data)] = data
        self.unsynced = []


def _records(log: bytes) -> Iterator[tuple[bytes, str, int, bytes]]:
    at = 0
    while at + _RECORD.size <= len(log):
        kind, length, size, offset = _RECORD.unpack_from(log, at)
        at += _RECORD.size
        if at + length + size > len(log):
            return
        yield kind, log[at : at + length].decode(), offset, log[at + length : at + length + size]
        at += length + size
