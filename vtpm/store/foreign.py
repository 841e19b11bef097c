"""What a SQLite file may hold before this service works with it: the objects that its own schema makes, and nothing else.

A file of somebody else's may bring a trigger that undoes a revocation, a view in a table's place, a constraint that swallows
rows (ON CONFLICT IGNORE) or an index on an expression. Each object of `sqlite_master` is compared with the one that the schema
of the same revision makes: the words of its text, whatever their order (a migration appends columns), and its structure as
SQLite tells it. The reference is made by `vtpm.store.schema.metadata` or by the migrations, in memory, never from a list.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from vtpm.errors import StoreError
from vtpm.store.schema import metadata

ALEMBIC: Final = "alembic_version"
# What Alembic makes of its own table.
_ALEMBIC_TABLE: Final = (
    f"CREATE TABLE {ALEMBIC} (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
# A text in quotes, a name in quotes of either kind, a word, a comment's beginning, or any other sign.
_TOKEN: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|\w+|--|/\*|[^\s\w]""")
_AUTOMATIC: Final = "sqlite_autoindex_"
_EXPRESSION: Final = -2
_MAX_TEXT: Final = 64 << 10
# Far above any row and statement of this service's, far below what one may ask for.
_MAX_VALUE: Final = 64 << 20
_LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: _MAX_VALUE,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 256 << 10,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
}
_NO_CHANGE: Final = "nothing was changed; stop the daemon, keep the file, and restore a backup: vtpm backup restore"


class ForeignObjectError(Exception):
    """The database has, or lacks, something. The text names it."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file that somebody else may have made, to read from it only."""
    uri = f"file:{quote(str(path))}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)) as connection:
        for category, most in _LIMITS.items():
            connection.setlimit(category, most)
        # No function of the schema's runs that could do harm, and no damaged page is believed.
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "query_only=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}")
        yield connection


def check(connection: sqlite3.Connection, revision: str | None) -> None:
    """Compare with the schema of `revision`, None for the present one.

    Raises:
        ForeignObjectError: there is something else, or something is missing.
    """
    found = _objects(connection)
    if revision is None:
        with contextlib.closing(_of_metadata()) as reference:
            wanted = _objects(reference)
        if wanted == found:
            return
    # A migration may have spelled something otherwise; that is not another's.
    with contextlib.closing(migrated(revision)) as reference:
        _compare(found, _objects(reference))


def refuse_foreign(connection: sqlite3.Connection, revision: str | None, url: str) -> None:
    """Check a store that is about to be used.

    Raises:
        StoreError: STORE_SCHEMA_FOREIGN.
    """
    try:
        check(connection, revision)
    except ForeignObjectError as error:
        raise StoreError(
            "STORE_SCHEMA_FOREIGN", f"the store is not as this service makes it: {error}", subject=url, remedy=_NO_CHANGE
        ) from None


def revision_of(connection: sqlite3.Connection) -> str | None:
    """Return the revision of the schema that a file says it has; None if it says none."""
    row = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (ALEMBIC,)).fetchone()
    if row is None:
        return None
    rows = connection.execute(f"SELECT version_num FROM {ALEMBIC} LIMIT 2").fetchall()  # noqa: S608  # a constant
    return rows[0][0] if len(rows) == 1 and isinstance(rows[0][0], str) else None


def migrated(revision: str | None) -> sqlite3.Connection:
    """Return a database in memory with the schema of a revision, None for the present one."""
    from vtpm.store import database

    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
    with engine.begin() as connection:
        database.upgrade(connection, revision or database.SCHEMA_REVISION)
    driver = engine.raw_connection().driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def _of_metadata() -> sqlite3.Connection:
    dialect = sa.create_engine("sqlite://").dialect
    made = sqlite3.connect(":memory:")
    made.execute(_ALEMBIC_TABLE)
    for table in metadata.sorted_tables:
        made.execute(str(CreateTable(table).compile(dialect=dialect)))
        for index in table.indexes:
            made.execute(str(CreateIndex(index).compile(dialect=dialect)))
    return made


# ---- what there is -------------------------------------------------------------------------------------------------------

_Objects = dict[tuple[str, str], Any]


def _objects(connection: sqlite3.Connection) -> _Objects:
    """Everything that the schema of a database says, by kind and name."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    found: _Objects = {("pragma", "application_id"): connection.execute("PRAGMA application_id").fetchone()[0]}
    for kind, name, table, sql in rows:
        if not all(isinstance(text, str) for text in (kind, name, table)):
            raise ForeignObjectError("an object without a name")
        if kind == "index" and sql is None and name.startswith(_AUTOMATIC):
            # It comes with its table, and is compared there.
            continue
        if not isinstance(sql, str) or len(sql) > _MAX_TEXT:
            raise ForeignObjectError(f"the {kind} {_shown(name)} has no text of a sound length")
        words = _tokens(sql)
        structure = _table(connection, name) if kind == "table" and not _is_virtual(words) else ()
        found[kind, name] = (table, sorted(words), structure)
    return found


def _is_virtual(words: list[str]) -> bool:
    """Whether asking SQLite about the table would run its module; with a comment, which no text of ours has, it may."""
    head = words[: words.index("(")] if "(" in words else words
    return "VIRTUAL" in (word.upper() for word in head) or bool({"--", "/*"} & set(words))


def _tokens(sql: str) -> list[str]:
    """The words of a text; a name is the same with and without quotes."""
    return [word.strip('"`[]') if word[0] in '"`[' else word for word in _TOKEN.findall(sql)]


def _table(connection: sqlite3.Connection, table: str) -> Any:
    columns = connection.execute('SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?)', (table,))
    foreign = connection.execute(
        'SELECT "table", "from", "to", on_update, on_delete, "match" FROM pragma_foreign_key_list(?)', (table,)
    )
    indexes = []
    for name, unique, origin, partial in connection.execute(
        'SELECT name, "unique", origin, partial FROM pragma_index_list(?)', (table,)
    ).fetchall():
        parts = connection.execute(
            'SELECT seqno, cid, name, "desc", coll, "key" FROM pragma_index_xinfo(?)', (name,)
        ).fetchall()
        if any(cid == _EXPRESSION for _, cid, *_ in parts):
            raise ForeignObjectError(f"the index {_shown(name)} is on an expression")
        # Not by the columns' numbers, which migrations may give otherwise.
        keys = [(seqno, column, descending, collation) for seqno, _, column, descending, collation, key in parts if key]
        indexes.append(("" if name.startswith(_AUTOMATIC) else name, unique, origin, partial, tuple(keys)))
    return sorted(columns.fetchall()), sorted(foreign.fetchall()), sorted(indexes)


def _compare(found: _Objects, wanted: _Objects) -> None:
    for kind, name in sorted(found.keys() - wanted.keys()):
        raise ForeignObjectError(f"the {kind} {_shown(name)} is none of its own")
    for kind, name in sorted(wanted.keys() - found.keys()):
        raise ForeignObjectError(f"the {kind} {_shown(name)} is missing")
    for (kind, name), value in sorted(found.items()):
        if value == wanted[kind, name]:
            continue
        if kind == "table" and value[2]:
            _compare_columns(name, value[2][0], wanted[kind, name][2][0])
        raise ForeignObjectError(f"the {kind} {_shown(name)} is another than its own")


def _compare_columns(table: str, found: list[Any], wanted: list[Any]) -> None:
    theirs, ours = ({column[0]: column for column in columns} for columns in (found, wanted))
    for column in sorted(theirs.keys() | ours.keys()):
        if column not in ours:
            raise ForeignObjectError(f"the column {_shown(column)} of {table} is none of its own")
        if theirs.get(column) != ours[column]:
            what = "is missing" if column not in theirs else "is of another kind"
            raise ForeignObjectError(f"the column {_shown(column)} of {table} {what}")


def _shown(name: object) -> str:
    return repr(str(name)[:80])


# ---- rows ----------------------------------------------------------------------------------------------------------------

# Beginning of a column's type → what a value may be.
_KINDS: Final = (("CHAR", str), ("VARCHAR", str), ("TEXT", str), ("DATETIME", str), ("BLOB", bytes), ("BIGINT", int))
_MORE_KINDS: Final = (("INTEGER", int), ("BOOLEAN", int))


def copy_rows(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copy every row of a database that `check` has passed into one of the same schema, value by value.

    Raises:
        ForeignObjectError: a value is of another kind than its column.
        sqlite3.Error: rows that do not go together.
    """
    tables = target.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name != ?", (ALEMBIC,)).fetchall()
    for (table,) in tables:
        columns = target.execute('SELECT name, type, "notnull" FROM pragma_table_info(?)', (table,)).fetchall()
        names = ", ".join(f'"{name}"' for name, _, _ in columns)
        rows = source.execute(f'SELECT {names} FROM "{table}" NOT INDEXED')  # noqa: S608  # names of our own schema
        marks = ", ".join("?" * len(columns))
        target.executemany(
            f'INSERT INTO "{table}" ({names}) VALUES ({marks})',  # noqa: S608  # likewise
            (_checked(row, columns, table) for row in rows),
        )


def _checked(row: tuple[Any, ...], columns: list[Any], table: str) -> tuple[Any, ...]:
    for value, (name, kind, not_null) in zip(row, columns, strict=True):
        wanted = next(python for beginning, python in (*_KINDS, *_MORE_KINDS) if kind.startswith(beginning))
        if not (isinstance(value, wanted) or (value is None and not not_null)):
            raise ForeignObjectError(f"a value of {_shown(name)} in {table} is no {kind}")
    return row
