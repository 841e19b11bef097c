"""Opening a database: durability settings, migrations, and errors in the operator's words."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from vtpm.errors import StoreError
from vtpm.store import foreign

if TYPE_CHECKING:
    from alembic.config import Config

SCHEMA_REVISION: Final = "0006"
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_WRITE: Final = "vtpm_write"
_BUSY_TIMEOUT_MS: Final = 5000
# A text need not be one: the driver would raise at such a row, whoever's it is, and every other row of the same reading, or
# commit of the same turn, would fail with it. Bytes that are no UTF-8 are spelled out, and the row's MAC does not fit.
_AS_TEXT: Final = functools.partial(str, encoding="utf-8", errors="backslashreplace")

# (beginning of SQLite's error name) → (reason, what happened, remedy). The first that fits.
_SQLITE_ERRORS: Final = (
    ("SQLITE_FULL", "STORE_FULL", "the disk of the store is full", "free space on it; what waits is written then"),
    ("SQLITE_READONLY", "STORE_READ_ONLY", "the store is read-only", "make its file and directory writable for the daemon"),
    ("SQLITE_BUSY", "STORE_BUSY", "another process holds the store", "end the process that has the database open"),
    ("SQLITE_LOCKED", "STORE_BUSY", "another process holds the store", "end the process that has the database open"),
    ("SQLITE_CORRUPT", "STORE_DAMAGED", "the store is damaged", "stop the daemon, keep the file, vtpm backup restore"),
    ("SQLITE_NOTADB", "STORE_DAMAGED", "the store is no SQLite database", "stop the daemon, keep the file, restore a backup"),
    ("SQLITE_CANTOPEN", "STORE_UNREACHABLE", "the store can't be opened", "check that its directory exists and is writable"),
    ("SQLITE_IOERR", "STORE_IO_FAILED", "the disk of the store fails", "check the disk and its free space"),
)


def translate(error: BaseException, url: str) -> StoreError:
    """Return the StoreError that tells an operator what a database error means."""
    driver_error = error.orig if isinstance(error, DBAPIError) else error
    name = getattr(driver_error, "sqlite_errorname", "") or ""
    for prefix, reason, message, remedy in _SQLITE_ERRORS:
        if name.startswith(prefix):
            return StoreError(reason, f"{message} ({name})", subject=url, remedy=remedy)
    return StoreError(
        "STORE_FAILED", f"the store failed: {type(driver_error).__name__} {name}".rstrip(), subject=url, remedy="see the log"
    )


@contextlib.contextmanager
def errors(url: str) -> Iterator[None]:
    """Turn what the driver raises into StoreError. Integrity errors pass: they are answers, not trouble."""
    try:
        yield
    except (sa.exc.IntegrityError, sqlite3.IntegrityError):
        raise
    except (DBAPIError, sqlite3.Error) as error:
        raise translate(error, url) from error


def connect(url: str) -> tuple[sa.Engine, sa.Engine]:
    """Return engines for reading and for writing over one pool. SQLite syncs at every commit (invariant 1).

    Raises:
        StoreError: the URL names no supported database.
    """
    if not url.startswith("sqlite:///"):
        raise StoreError(
            "STORE_URL_UNSUPPORTED", "the store must be a SQLite database", subject=url, remedy="write sqlite:////absolute/path"
        )
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000, "check_same_thread": False})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine, engine.execution_options(**{_WRITE: True})


def _on_connect(connection: Any, _record: Any) -> None:
    # Transactions are begun by _on_begin, not by the driver's guesses.
    connection.isolation_level = None
    set_pragmas(connection)


def set_pragmas(connection: sqlite3.Connection) -> None:
    """Durability and safety of a SQLite connection."""
    connection.text_factory = _AS_TEXT
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        # What is deleted is overwritten: wrapped keys and sealed states do not linger in free pages.
        "secure_delete=ON",
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        # Nothing that a file's schema brings may call what could do harm.
        "trusted_schema=OFF",
        "cell_size_check=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def migrate(read: sa.Engine, write: sa.Engine, url: str) -> None:
    """Bring the schema to this version's revision, if what is there is of this service's making (vtpm.store.foreign).

    Raises:
        StoreError: STORE_TOO_NEW, a newer vTPM has written it; STORE_SCHEMA_FOREIGN; or the database fails.
    """
    with read.connect() as connection:
        driver = driver_of(connection)
        present = foreign.revision_of(driver)
        if present == SCHEMA_REVISION:
            foreign.refuse_foreign(driver, None, url)
            return
        empty = driver.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if not empty:
            refuse_unknown(present, url)
            foreign.refuse_foreign(driver, present, url)
    with write.begin() as connection:
        upgrade(connection, SCHEMA_REVISION)


def driver_of(connection: sa.Connection) -> sqlite3.Connection:
    """Return the driver's own connection."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def refuse_unknown(revision: str | None, url: str) -> None:
    """Refuse a schema that this version can't migrate.

    Raises:
        StoreError: STORE_TOO_NEW, or STORE_SCHEMA_FOREIGN without any revision.
    """
    from alembic.script import ScriptDirectory

    if revision is None:
        raise StoreError(
            "STORE_SCHEMA_FOREIGN",
            "the file holds something else than a store of this service",
            subject=url,
            remedy="name another file with store_url; nothing was changed",
        )
    if revision not in {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}:
        raise StoreError(
            "STORE_TOO_NEW",
            f"the store has schema {revision}, this version knows up to {SCHEMA_REVISION}",
            subject=url,
            remedy="start the vTPM version that wrote it; nothing was changed",
        )


def upgrade(connection: sa.Connection, revision: str) -> None:
    """Run the migrations up to `revision`."""
    from alembic import command

    config = _alembic()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _alembic() -> Config:
    # Alembic is needed now and then only, and takes its time to import.
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
