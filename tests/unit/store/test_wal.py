"""The write-ahead log has its room before it is needed, and what is in it stays there."""

from __future__ import annotations

import resource
import sqlite3
from pathlib import Path

import pytest

from vtpm.store.database import set_pragmas
from vtpm.store.wal import make_room


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "a store.db")


@pytest.fixture
def connection(path: str) -> sqlite3.Connection:
    found = sqlite3.connect(path, isolation_level=None)
    set_pragmas(found)
    found.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v INTEGER)")
    found.execute("INSERT INTO t VALUES (1, 0)")
    return found


def log_size(path: str) -> int:
    return Path(f"{path}-wal").stat().st_size


def test_the_log_does_not_grow_from_there_on(connection: sqlite3.Connection, path: str) -> None:
    assert make_room(connection, path)
    size = log_size(path)
    for value in range(1500):
        connection.execute("UPDATE t SET v = ?", (value,))
    assert log_size(path) == size


def test_what_was_committed_is_found_after_a_crash_by_another_process(
    connection: sqlite3.Connection, path: str, tmp_path: Path
) -> None:
    connection.execute("UPDATE t SET v = 1")
    assert make_room(connection, path)
    connection.execute("UPDATE t SET v = 2")
    # As the disk has it, without the index in shared memory.
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    with sqlite3.connect(copy) as other:
        assert other.execute("SELECT v FROM t").fetchone() == (2,)
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_log_of_zeros_alone_is_an_empty_one(connection: sqlite3.Connection, path: str) -> None:
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert log_size(path) == 0
    assert make_room(connection, path)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT v FROM t").fetchone() == (0,)
    connection.execute("UPDATE t SET v = 3")
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT v FROM t").fetchone() == (3,)


def test_who_writes_meanwhile_is_waited_for(connection: sqlite3.Connection, path: str) -> None:
    connection.execute("PRAGMA busy_timeout=10")
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        size = log_size(path)
        with pytest.raises(sqlite3.OperationalError):
            make_room(connection, path)
        assert log_size(path) == size
        other.execute("ROLLBACK")


def test_a_disk_without_room_is_left_as_it_was(connection: sqlite3.Connection, path: str) -> None:
    size = log_size(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        assert not make_room(connection, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log_size(path) == size
    connection.execute("UPDATE t SET v = 4")
    assert connection.execute("SELECT v FROM t").fetchone() == (4,)
