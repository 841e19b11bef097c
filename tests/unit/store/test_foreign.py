"""A store and a backup bring rows, never a schema of their own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from tests.unit.store.given import a_new_instance
from tests.unit.store.test_backup import ME, fill, members_of, packed, with_manifest
from vtpm.errors import BackupError, ErrorKind, StoreError
from vtpm.store import backup, database, foreign
from vtpm.store.store import Store

REVISIONS = [script.revision for script in ScriptDirectory(str(Path(database.__file__).parent / "migrations")).walk_revisions()]

# What somebody may do to a database → the object that is named.
FOREIGN: dict[str, tuple[str, str]] = {
    "a trigger": (
        "CREATE TRIGGER evil AFTER UPDATE ON certificates BEGIN UPDATE certificates SET revoked_at = NULL; END",
        "trigger 'evil'",
    ),
    "a view": ("CREATE VIEW evil AS SELECT * FROM instances", "view 'evil'"),
    "a virtual table": ("CREATE VIRTUAL TABLE evil USING fts5(a)", "table 'evil"),
    "an index on an expression": ("CREATE INDEX evil ON instances (lower(name))", "index 'evil' is on an expression"),
    "a partial index": ("CREATE UNIQUE INDEX evil ON instances (state) WHERE state = 'ON'", "index 'evil'"),
    "another index": ("CREATE UNIQUE INDEX evil ON certificates (instance)", "index 'evil'"),
    "a column more": ("ALTER TABLE states ADD COLUMN evil TEXT", "column 'evil' of states"),
    "a generated column": ("ALTER TABLE states ADD COLUMN evil TEXT AS (hex(blob)) VIRTUAL", "column 'evil' of states"),
    "a table more": ("CREATE TABLE evil (a)", "table 'evil'"),
    "a table less": ("DROP TABLE requests", "'ix_requests_created_at' is missing"),
    "an index less": ("DROP INDEX ix_instances_state", "index 'ix_instances_state' is missing"),
    "a column of another name": ("ALTER TABLE states RENAME COLUMN version TO evil", "column 'evil' of states"),
    "an application's number": ("PRAGMA application_id = 7", "application_id"),
    "statistics": ("ANALYZE", "table 'sqlite_stat1'"),
}

# What can be written into the schema only, in the place of its own text. Rows that break a rule then vanish without a word.
REWRITTEN: dict[str, tuple[str, str, str]] = {
    "a constraint that swallows rows": ("instances", "UNIQUE (name)", "UNIQUE (name) ON CONFLICT IGNORE"),
    "a check": ("certificates", "PRIMARY KEY (serial)", "PRIMARY KEY (serial), CHECK (revoked_at IS NULL)"),
    "another type": ("states", "version BIGINT NOT NULL", "version TEXT NOT NULL"),
    "another order of letters": ("instances", "name VARCHAR(63) NOT NULL", "name VARCHAR(63) NOT NULL COLLATE NOCASE"),
    "types that change places": (
        "states",
        "kind INTEGER NOT NULL, \n\tepoch BIGINT",
        "kind BIGINT NOT NULL, \n\tepoch INTEGER",
    ),
    "another default": ("instances", "DEFAULT 'UNCERTIFIED'", "DEFAULT 'CERTIFIED'"),
    "a comment": ("states", "CREATE TABLE", "CREATE /**/ TABLE"),
}
EVERY = [*FOREIGN, *REWRITTEN]


def spoil(path: Path, what: str) -> str:
    """Do it, and return what must be named."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if what in FOREIGN:
            statement, named = FOREIGN[what]
            connection.execute(statement)
            return named
        table, old, new = REWRITTEN[what]
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        assert old in sql
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql.replace(old, new, 1), table))
        return table


@pytest.mark.parametrize("what", EVERY)
def test_a_store_that_brings_a_schema_of_its_own_is_refused_by_name(store: Store, url: str, path: Path, what: str) -> None:
    store.create(a_new_instance())
    store.close()
    named = spoil(path, what)
    before = path.read_bytes()
    with pytest.raises(StoreError) as refused:
        Store.open(url)
    assert refused.value.reason == "STORE_SCHEMA_FOREIGN"
    assert named in refused.value.message
    assert refused.value.remedy
    assert path.read_bytes() == before, "it is left as it is"


@pytest.mark.parametrize("what", EVERY)
def test_a_backup_that_brings_a_schema_of_its_own_is_refused_by_name(
    store: Store, path: Path, tmp_path: Path, what: str
) -> None:
    fill(store, "web-1", "web-2")
    backup.create(path, tmp_path / "b.age", [ME.to_public()], None)
    made, named = a_backup_with(tmp_path / "b.age", lambda inner: spoil(inner, what))
    with pytest.raises(BackupError) as refused, backup.opened(made, [ME]):
        pass
    assert refused.value.reason == "BACKUP_SCHEMA_FOREIGN"
    assert named in refused.value.message
    assert refused.value.subject == str(made)
    assert refused.value.remedy


def a_backup_with(taken: Path, change) -> tuple[Path, str]:  # type: ignore[no-untyped-def]
    """Make a sound archive of a backup whose database was changed."""
    members = members_of(taken)
    inner = taken.with_name("inner.db")
    inner.write_bytes(members["store.db"])
    told = change(inner)
    data = inner.read_bytes()
    manifest = with_manifest(members, store={"size": len(data), "sha256": sha256(data).hexdigest()})
    return packed(taken, [("manifest.json", manifest), ("store.db", data)]), told


def test_a_trigger_that_comes_after_the_check_is_not_in_the_store_that_is_made(
    store: Store, path: Path, tmp_path: Path
) -> None:
    fill(store, "web-1")
    backup.create(path, tmp_path / "b.age", [ME.to_public()], None)
    with backup.opened(tmp_path / "b.age", [ME]) as opened:
        made = backup.make_store(opened)
        assert made != opened.store
        with closing(sqlite3.connect(made)) as connection:
            foreign.check(connection, None)
            assert connection.execute("SELECT name FROM instances").fetchall() == [("web-1",)]
        made.unlink()
        spoil(opened.store, "a trigger")
        with pytest.raises(BackupError) as refused:
            backup.make_store(opened)
    assert refused.value.reason == "BACKUP_SCHEMA_FOREIGN"


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE instances SET name = x'00'", "'name' in instances"),
        ("UPDATE instances SET epoch = 'late'", "'epoch' in instances"),
        ("UPDATE data_keys SET blob = 'text'", "'blob' in data_keys"),
        ("UPDATE instances SET epoch = 1.5", "'epoch' in instances"),
    ],
)
def test_a_value_of_another_kind_than_its_column_is_not_restored(
    store: Store, path: Path, tmp_path: Path, statement: str, named: str
) -> None:
    fill(store, "web-1")
    backup.create(path, tmp_path / "b.age", [ME.to_public()], None)

    def change(inner: Path) -> str:
        with closing(sqlite3.connect(inner, isolation_level=None)) as connection:
            connection.execute(statement)
        return ""

    made, _ = a_backup_with(tmp_path / "b.age", change)
    with backup.opened(made, [ME]) as opened, pytest.raises(BackupError) as refused:
        backup.make_store(opened)
    assert refused.value.reason == "BACKUP_SCHEMA_FOREIGN"
    assert named in refused.value.message


def test_a_store_that_brings_a_trigger_is_not_backed_up(store: Store, path: Path, tmp_path: Path) -> None:
    store.create(a_new_instance())
    spoil(path, "a trigger")
    with pytest.raises(StoreError) as refused:
        backup.create(path, tmp_path / "b.age", [ME.to_public()], None)
    assert refused.value.reason == "STORE_SCHEMA_FOREIGN"
    assert not (tmp_path / "b.age").exists()


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_store_of_every_earlier_version_is_taken_and_one_with_a_trigger_is_not(tmp_path: Path, revision: str) -> None:
    for what in ("", "CREATE TRIGGER evil AFTER INSERT ON labels BEGIN SELECT 1; END"):
        path = tmp_path / f"{revision}{len(what)}.db"
        with closing(sqlite3.connect(path)) as connection, closing(foreign.migrated(revision)) as old:
            old.backup(connection)
            connection.execute(what or "SELECT 1")
        if what:
            with pytest.raises(StoreError) as refused:
                Store.open(f"sqlite:///{path}")
            assert (refused.value.reason, refused.value.kind) == ("STORE_SCHEMA_FOREIGN", ErrorKind.UNAVAILABLE)
        else:
            Store.open(f"sqlite:///{path}").close()


def test_a_database_of_something_else_is_left_alone(url: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE addresses (name TEXT)")
    with pytest.raises(StoreError) as refused:
        Store.open(url)
    assert refused.value.reason == "STORE_SCHEMA_FOREIGN"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("addresses",)]


def test_every_connection_distrusts_the_schema(url: str, path: Path) -> None:
    read, _ = database.connect(url)
    with read.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA trusted_schema").scalar() == 0
        assert connection.exec_driver_sql("PRAGMA cell_size_check").scalar() == 1
    read.dispose()
    with foreign.reading(path) as connection:
        assert connection.execute("PRAGMA trusted_schema").fetchone() == (0,)
        with pytest.raises(sqlite3.OperationalError):
            connection.execute("CREATE TABLE a (b)")


def test_what_the_metadata_makes_needs_no_migrations_to_compare_with(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of every start: the migrations take their time to be imported."""
    Store.open(url).close()
    monkeypatch.setattr(foreign, "migrated", lambda _revision: pytest.fail("the texts of metadata and migrations differ"))
    with closing(sqlite3.connect(path)) as connection:
        foreign.check(connection, None)
