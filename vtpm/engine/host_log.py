"""engine-host.log: what the engine host and its workers have to say. The engine host alone has it open, and bounds its size."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Final

# A log of this size becomes engine-host.log.1, in the place of the one before.
MAX_SIZE: Final = 1 << 20
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MODE: Final = 0o600
_STDOUT: Final = 1
_STDERR: Final = 2


def open_log(path: Path) -> int:
    """Open the log for appending.

    Raises:
        OSError: it can't be written, or is no file.
    """
    fd = os.open(path, _FLAGS, _MODE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a file")
    return fd


class HostLog:
    """The log at `path`, which is open as this process's standard error; a log that can't be written holds nobody up."""

    def __init__(self, path: Path, *, max_size: int = MAX_SIZE) -> None:
        self._path = path
        self._max_size = max_size
        self._lost = 0

    def say(self, text: str) -> None:
        """Write one line, with the time. `text` has no control characters."""
        lost = f"{self._lost} lines could not be written before this one; " if self._lost else ""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {lost}{text}\n".encode("ascii", "backslashreplace")
        try:
            self._make_room(len(line))
            os.write(_STDERR, line)
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def _make_room(self, size: int) -> None:
        status = os.fstat(_STDERR)
        if not stat.S_ISREG(status.st_mode) or status.st_size + size <= self._max_size:
            return
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        fd = open_log(self._path)
        for standard in (_STDOUT, _STDERR):
            os.dup2(fd, standard)
        os.close(fd)
