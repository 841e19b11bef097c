"""Room in SQLite's write-ahead log before it is needed.

A commit that makes the log longer has the file system write down its new length as well, and waits for that. The log is begun
anew once it has some thousand pages, so that a log which is that long from the start never grows.
Zeros behind the last frame are no frames: SQLite's recovery stops at the first whose salt or checksum does not fit
(https://www.sqlite.org/fileformat2.html#walformat).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

# SQLite's default for wal_autocheckpoint, and what a commit may go beyond it.
_PAGES: Final = 1000 + 64
_HEADER_SIZE: Final = 32
_FRAME_HEADER_SIZE: Final = 24


def make_room(connection: sqlite3.Connection, path: str) -> bool:
    """Make the log of the database at `path` as long as it gets; False if the disk has no room for that, and nothing is lost.

    Raises:
        sqlite3.Error: another process holds the database.
    """
    page_size = connection.execute("PRAGMA page_size").fetchone()[0]
    wanted = _HEADER_SIZE + _PAGES * (_FRAME_HEADER_SIZE + page_size)
    # Whoever has the right to write is the only one who makes the log longer or shorter.
    connection.execute("BEGIN IMMEDIATE")
    try:
        return _extend(f"{path}-wal", wanted)
    finally:
        connection.execute("ROLLBACK")


def _extend(path: str, wanted: int) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size = os.fstat(fd).st_size
        try:
            # Written, not only allocated: the first write to a block that was allocated only changes the file's extents.
            for start in range(size, wanted, 1 << 20):
                _write(fd, bytes(min(1 << 20, wanted - start)), start)
            os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            return False
    finally:
        os.close(fd)
    return True


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
