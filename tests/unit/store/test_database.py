"""Opening a database: the schema that migrations make, how durable it is, and what is told when it can't be used."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from tests.unit.store.given import a_new_instance, database_file
from vtpm.errors import ErrorKind, StoreError
from vtpm.store import database
from vtpm.store.schema import labels, metadata
from vtpm.store.store import Store


@pytest.fixture
def engines(url: str) -> Iterator[tuple[sa.Engine, sa.Engine]]:
    read, write = database.connect(url)
    yield read, write
    read.dispose()


def refusal(url: str) -> StoreError:
    with pytest.raises(StoreError) as refused:
        Store.open(url)
    assert (refused.value.subject, refused.value.kind) == (url, ErrorKind.UNAVAILABLE)
    assert refused.value.remedy
    return refused.value


# ---- the schema ----------------------------------------------------------------------------------------------------------


def test_migrations_make_the_schema_that_the_code_uses(engines: tuple[sa.Engine, sa.Engine], url: str) -> None:
    read, write = engines
    database.migrate(read, write, url)
    with read.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert set(sa.inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_the_revision_that_the_code_wants_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(database.__file__).parent / "migrations"))
    assert scripts.get_heads() == [database.SCHEMA_REVISION]


def test_migrating_again_changes_nothing(engines: tuple[sa.Engine, sa.Engine], url: str, path: Path) -> None:
    for _ in range(2):
        database.migrate(*engines, url)
        with database_file(path) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(database.SCHEMA_REVISION,)]


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(store: Store, url: str, path: Path) -> None:
    record = store.create(a_new_instance())
    with database_file(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    refused = refusal(url)
    assert refused.reason == "STORE_TOO_NEW"
    assert "9999" in refused.message
    with database_file(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
        assert connection.execute("SELECT id FROM instances").fetchall() == [(record.id.hex,)]


def test_a_path_with_a_percent_sign_and_spaces_is_fine(tmp_path: Path) -> None:
    directory = tmp_path / "100% of it"
    directory.mkdir()
    store = Store.open(f"sqlite:///{directory / 'vtpm.db'}")
    assert store.is_empty()
    store.close()


def test_a_label_belongs_to_an_instance(engines: tuple[sa.Engine, sa.Engine], url: str) -> None:
    database.migrate(*engines, url)
    with pytest.raises(sa.exc.IntegrityError), engines[1].begin() as connection:
        connection.execute(sa.insert(labels), {"instance": uuid.uuid4(), "key": "team", "value": "web"})


# ---- durability ----------------------------------------------------------------------------------------------------------

# synchronous 2 is FULL: the log is synced at every commit (sqlite.org/pragma.html).
DURABLE = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


def test_every_connection_of_the_pool_syncs_and_overwrites_what_it_deletes(engines: tuple[sa.Engine, sa.Engine]) -> None:
    read, write = engines
    with read.connect() as first, read.connect() as second, write.connect() as third:
        for connection in (first, second, third):
            assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in DURABLE} == DURABLE


def test_the_connection_of_the_hot_path_syncs_and_overwrites_what_it_deletes(path: Path) -> None:
    with database_file(path) as connection:
        database.set_pragmas(connection)
        assert {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in DURABLE} == DURABLE


def test_a_reader_sees_no_half_of_a_change(engines: tuple[sa.Engine, sa.Engine], url: str) -> None:
    read, write = engines
    database.migrate(read, write, url)
    with read.begin() as reader, write.begin() as writer:
        assert reader.exec_driver_sql("SELECT count(*) FROM requests").scalar() == 0
        writer.exec_driver_sql("INSERT INTO requests VALUES ('1', '1', x'00', '2026-01-01', x'00')")
        assert reader.exec_driver_sql("SELECT count(*) FROM requests").scalar() == 0
    with read.begin() as reader:
        assert reader.exec_driver_sql("SELECT count(*) FROM requests").scalar() == 1


# ---- what can't be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["mysql://host/db", "sqlite://", "vtpm.db", "", "sqlite+pysqlite:///x.db"])
def test_a_database_that_is_not_supported_is_refused_by_name(url: str) -> None:
    assert refusal(url).reason == "STORE_URL_UNSUPPORTED"


def test_a_directory_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(f"sqlite:///{tmp_path / 'no' / 'such' / 'vtpm.db'}").reason == "STORE_UNREACHABLE"
    assert not (tmp_path / "no").exists()


def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, url: str) -> None:
    path.write_bytes(b"this is a letter to grandmother, and no database " * 100)
    before = path.read_bytes()
    assert refusal(url).reason == "STORE_DAMAGED"
    assert path.read_bytes() == before


def test_a_damaged_database_is_refused_by_name(store: Store, path: Path, url: str) -> None:
    store.create(a_new_instance(labels={"team": "web"}))
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[100:] = bytes([0xA5]) * (len(damaged) - 100)
    path.write_bytes(damaged)
    assert refusal(url).reason == "STORE_DAMAGED"
    assert path.read_bytes() == damaged


def a_sqlite_error(name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("text of the driver")
    error.sqlite_errorname = name
    return error


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SQLITE_FULL", "STORE_FULL"),
        ("SQLITE_READONLY", "STORE_READ_ONLY"),
        ("SQLITE_READONLY_DBMOVED", "STORE_READ_ONLY"),
        ("SQLITE_BUSY", "STORE_BUSY"),
        ("SQLITE_BUSY_SNAPSHOT", "STORE_BUSY"),
        ("SQLITE_LOCKED", "STORE_BUSY"),
        ("SQLITE_CORRUPT", "STORE_DAMAGED"),
        ("SQLITE_CORRUPT_INDEX", "STORE_DAMAGED"),
        ("SQLITE_NOTADB", "STORE_DAMAGED"),
        ("SQLITE_CANTOPEN", "STORE_UNREACHABLE"),
        ("SQLITE_IOERR_FSYNC", "STORE_IO_FAILED"),
        ("SQLITE_ERROR", "STORE_FAILED"),
    ],
)
def test_what_the_driver_says_becomes_what_an_operator_can_act_on(name: str, reason: str) -> None:
    told = database.translate(a_sqlite_error(name), "sqlite:////x")
    assert (told.reason, told.subject) == (reason, "sqlite:////x")
    assert name in told.message
    wrapped = sa.exc.OperationalError("INSERT", {"blob": b"sealed bytes"}, a_sqlite_error(name))
    assert database.translate(wrapped, "sqlite:////x").reason == reason
    assert "sealed bytes" not in str(database.translate(wrapped, "sqlite:////x"))


def test_a_full_disk_is_told_as_such(engines: tuple[sa.Engine, sa.Engine], url: str) -> None:
    database.migrate(*engines, url)
    with engines[1].begin() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={connection.exec_driver_sql('PRAGMA page_count').scalar()}")
        with pytest.raises(StoreError) as refused, database.errors(url):
            connection.exec_driver_sql("INSERT INTO requests VALUES ('1', '1', zeroblob(100000), '2026-01-01', x'00')")
    assert refused.value.reason == "STORE_FULL"


def test_an_answer_of_the_database_is_no_trouble_of_the_store(url: str) -> None:
    with pytest.raises(sqlite3.IntegrityError), database.errors(url):
        raise sqlite3.IntegrityError("UNIQUE constraint failed")
