"""Backups of a store: taken while the daemon runs, checked, and made ready to be a store again.

The sealed states stay sealed, and the data keys wrapped. Volatile states are left out: what a VM went on from after the
backup must not be gone on from again (invariant 2).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Final

from vtpm import __version__, files
from vtpm.errors import BackupError, SealedStateError
from vtpm.seal.envelope import StateKind, place_of
from vtpm.store import backup_file, foreign
from vtpm.store.backup_file import Content, Manifest, damaged
from vtpm.store.database import SCHEMA_REVISION, errors, refuse_unknown
from vtpm.store.store import Store

_STEP_PAGES: Final = -1
_MADE: Final = "made.db"
_LEAN: Final = (
    f"DELETE FROM states WHERE kind != {int(StateKind.PERMANENT)}",  # noqa: S608  # a constant
    # What an instance that is ON would go on from: the VM will not be there.
    "DELETE FROM snapshots",
    "DELETE FROM snapshot_uses",
    "DELETE FROM requests",
    # TPMs that are nobody's yet would become somebody's in both places.
    "DELETE FROM states WHERE instance IN (SELECT id FROM instances WHERE state = 'POOLED')",
    "DELETE FROM data_keys WHERE instance IN (SELECT id FROM instances WHERE state = 'POOLED')",
    "DELETE FROM pool",
    "DELETE FROM instances WHERE state = 'POOLED'",
)
# A restored store is another store: it gets an id and an anchor of its own.
_REBORN: Final = (
    "DELETE FROM freshness_log",
    "DELETE FROM freshness",
)


@dataclass(frozen=True, slots=True)
class OpenedBackup:
    """A backup that was found whole; `store` is its database, in a directory that goes with the context."""

    manifest: Manifest
    store: Path
    keys: bytes | None


def create(store: Path, out: Path, recipients: Sequence[Any], keys: bytes | None) -> Manifest:
    """Back up the database at `store`, in use or not, to `out`; with `keys`, the content of the key file.

    All that was committed before the call is in it.

    Raises:
        StoreError: the store can't be read.
        BackupError: BACKUP_EXISTS or BACKUP_UNWRITABLE.
    """
    if os.path.lexists(out):
        raise backup_file.exists_already(out)
    with _scratch(out.parent if _is_ours(out.parent) else Path(tempfile.gettempdir())) as directory:
        copy = directory / backup_file.STORE
        _copy(store, copy)
        manifest = _describe(copy, keys)
        backup_file.write(out, manifest, copy, keys, recipients)
    return manifest


def _is_ours(directory: Path) -> bool:
    """Whether a copy is safe there; where another user could swap it, it is made elsewhere."""
    try:
        files.open_directory(directory, trusted=True).close()
    except files.UnsafePathError:
        return False
    except OSError:
        # It says so by itself.
        return True
    return True


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory for a copy of the store; sealed states, wrapped keys."""
    try:
        with files.scratch_directory(parent, ".vtpm-backup-") as directory:
            yield directory
    except files.UnsafePathError as error:
        raise BackupError(
            "BACKUP_UNWRITABLE",
            f"somebody else could put another file in the copy's place: {error.strerror}",
            subject=str(parent),
            remedy=error.remedy,
        ) from None
    except OSError as error:
        raise BackupError(
            "BACKUP_UNWRITABLE",
            f"{error.strerror}",
            subject=str(parent),
            remedy="check the directory, its owner and free space",
        ) from None


def _copy(source: Path, target: Path) -> None:
    url = f"sqlite:///{source}"
    with errors(url):
        with foreign.reading(source) as here, contextlib.closing(sqlite3.connect(target)) as there:
            revision = foreign.revision_of(here)
            refuse_unknown(revision, url)
            foreign.refuse_foreign(here, None if revision == SCHEMA_REVISION else revision, url)
            # In one step: one moment of the store, while the daemon writes on.
            here.backup(there, pages=_STEP_PAGES)
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            # A file of its own, without what was deleted.
            copy.execute("PRAGMA journal_mode=DELETE")
            for statement in _LEAN:
                copy.execute(statement)
            copy.execute("VACUUM")


def _describe(store: Path, keys: bytes | None) -> Manifest:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        (schema,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        instances, states = _counts(connection)
        key_ids = tuple(row[0] for row in connection.execute("SELECT DISTINCT key_id FROM data_keys ORDER BY key_id"))
    with store.open("rb") as file:
        content = Content(store.stat().st_size, file_digest(file, "sha256").hexdigest())
    return Manifest(
        backup_file.FORMAT,
        __version__,
        dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        schema,
        instances,
        states,
        key_ids,
        content,
        Content(len(keys), sha256(keys).hexdigest()) if keys is not None else None,
    )


def _counts(connection: sqlite3.Connection) -> tuple[int, int]:
    (instances,) = connection.execute("SELECT count(*) FROM instances").fetchone()
    (states,) = connection.execute("SELECT count(*) FROM states").fetchone()
    return instances, states


@contextlib.contextmanager
def opened(path: Path, identities: Sequence[Any], scratch: Path | None = None) -> Iterator[OpenedBackup]:
    """Decrypt a backup and check all of it that can be checked without the data keys.

    Raises:
        BackupError: it is damaged, foreign, or for somebody else; its reason says which.
    """
    with _scratch(scratch or Path(tempfile.gettempdir())) as directory:
        store = directory / backup_file.STORE
        # In a directory that was made just now, for this user alone.
        with store.open("xb") as file:
            manifest, keys = backup_file.read(path, identities, file)
        _check(store, manifest, str(path))
        yield OpenedBackup(manifest, store, keys)


def _check(store: Path, manifest: Manifest, subject: str) -> None:
    try:
        with foreign.reading(store) as connection:
            revision = foreign.revision_of(connection)
            if revision is None:
                raise damaged(subject, "its database is none of this service's")
            refuse_unknown(revision, subject)
            foreign.check(connection, None if revision == SCHEMA_REVISION else revision)
            if connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                raise damaged(subject, "its database is not whole")
            if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
                raise damaged(subject, "its database does not fit together")
            if _counts(connection) != (manifest.instances, manifest.states):
                raise damaged(subject, "it has not the instances that its manifest says")
            for instance, kind, epoch, version, blob in connection.execute(
                "SELECT instance, kind, epoch, version, blob FROM states"
            ):
                place = place_of(blob)
                if (place.instance.hex, place.kind, place.epoch, place.version) != (instance, kind, epoch, version):
                    raise damaged(subject, f"the state of {place.instance} is in another's place")
    except foreign.ForeignObjectError as error:
        raise _foreign(subject, error) from None
    except (sqlite3.Error, TypeError):
        raise damaged(subject, "its database can't be read") from None
    except SealedStateError as error:
        raise damaged(subject, f"a sealed state: {error.reason}") from None


def _foreign(subject: str, error: foreign.ForeignObjectError) -> BackupError:
    return BackupError(
        "BACKUP_SCHEMA_FOREIGN",
        f"its database is not as this service makes it: {error}",
        subject=subject,
        remedy="whoever made this backup is not to be trusted; take another",
    )


def make_store(backup: OpenedBackup, open_rows: Callable[[Store], None] | None = None) -> Path:
    """Make a store that a daemon can go on with of an opened backup, and return where it is.

    Its schema is made here, and the rows are copied into it: nothing of the backup's file itself is in it.
    Every instance is OFF or FAILED, as its VM is not there; epochs have risen, so that no worker of the store that was
    backed up can commit; the store is yet to get an anchor.

    `open_rows` gives a store the key of its rows (vtpm.store.row_key), which changes are signed with; without it, rows stay as
    they are, for who only reads them. A row that is not as its service wrote it stays so, and is refused by who runs the store.

    Raises:
        StoreError: STORE_TOO_NEW, a newer vTPM has written it.
        BackupError: BACKUP_SCHEMA_FOREIGN.
    """
    made = backup.store.with_name(_MADE)
    url = f"sqlite:///{made}"
    with errors(url):
        with foreign.reading(backup.store) as source:
            _copy_into(source, made, str(backup.store))
        _open_rows(url, open_rows)
        with contextlib.closing(sqlite3.connect(made, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in (*_LEAN, *_REBORN):
                connection.execute(statement)
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode=DELETE")
    return made


def _open_rows(url: str, open_rows: Callable[[Store], None] | None) -> None:
    """Bring a store to the present schema and, with the key of its rows, to a later ownership of each instance."""
    store = Store.open(url)
    try:
        if open_rows is not None and not store.is_empty():
            open_rows(store)
            store.restores.leap()
    finally:
        store.close()


def _copy_into(source: sqlite3.Connection, made: Path, subject: str) -> None:
    revision = foreign.revision_of(source)
    refuse_unknown(revision, subject)
    try:
        foreign.check(source, revision)
        with contextlib.closing(sqlite3.connect(made, isolation_level=None)) as target:
            with contextlib.closing(foreign.migrated(revision)) as fresh:
                fresh.backup(target)
            target.execute("BEGIN")
            foreign.copy_rows(source, target)
            if target.execute("PRAGMA foreign_key_check").fetchone() is not None:
                raise damaged(subject, "its database does not fit together")
            target.execute("COMMIT")
    except foreign.ForeignObjectError as error:
        raise _foreign(subject, error) from None
    except sqlite3.IntegrityError:
        raise damaged(subject, "its database does not fit together") from None


def install(made: Path, place: Path) -> None:
    """Move a store that was made to `place`, on the same volume, durably; nothing there is replaced.

    Raises:
        BackupError: RESTORE_TARGET_NOT_EMPTY or BACKUP_UNWRITABLE.
    """
    try:
        with files.open_directory(made.parent) as source, files.open_directory(place.parent, trusted=True) as target:
            fd = source.open(made.name)
            try:
                os.fchmod(fd, 0o600)
                os.fsync(fd)
                os.link(made.name, place.name, src_dir_fd=source.fd, dst_dir_fd=target.fd, follow_symlinks=False)
            finally:
                os.close(fd)
            target.sync()
    except FileExistsError:
        raise not_empty(place) from None
    except OSError as error:
        raise BackupError(
            "BACKUP_UNWRITABLE", f"{error.strerror}", subject=str(place), remedy="check the directory and free space"
        ) from None


def not_empty(path: Path) -> BackupError:
    """Return the error of a place where something is already."""
    return BackupError(
        "RESTORE_TARGET_NOT_EMPTY",
        "there is something already, and nothing is overwritten",
        subject=str(path),
        remedy="stop the daemon and move its state directory away, or give another: vtpm --state-dir DIR backup restore",
    )
