"""Rows get their MACs once; who can write the store can't have them signed again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.store.given import a_new_instance, database_file
from vtpm.errors import KeyProviderError, StoreError, VtpmError
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.store.model import InstanceState
from vtpm.store.row_key import ROW_KEY, open_row_key, rewrap_row_key
from vtpm.store.store import Store


def provider(path: Path, *, create: bool = False) -> FileKeyProvider:
    return FileKeyProvider(state_dir=path.parent, options={}, create=create)


@pytest.fixture
def filled(url: str, path: Path) -> None:
    """A store with an instance, as a daemon leaves it."""
    store = Store.open(url)
    open_row_key(store, provider(path, create=True))
    store.create(a_new_instance("web-1"))
    store.close()


def opened(url: str, path: Path) -> Store:
    store = Store.open(url)
    try:
        open_row_key(store, provider(path))
    except VtpmError:
        store.close()
        raise
    return store


def as_before_macs(path: Path) -> None:
    """Make the store one of the version before, and the key file too."""
    with database_file(path) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            if table != "freshness_log" and "mac" in columns:
                connection.execute(f"ALTER TABLE {table} DROP COLUMN mac")
        connection.execute("DROP INDEX ix_certificates_subject_key")
        connection.execute("ALTER TABLE certificates DROP COLUMN subject_key")
        connection.execute("DELETE FROM authority_keys WHERE id = ?", (ROW_KEY.hex,))
        connection.execute("UPDATE alembic_version SET version_num = '0005'")


def forget_mark(path: Path) -> None:
    file = path.parent / "keys.json"
    content = json.loads(file.read_text())
    del content["rows"]
    file.write_text(json.dumps(content))


@pytest.mark.usefixtures("filled")
def test_a_store_from_before_gets_its_macs_once(url: str, path: Path) -> None:
    as_before_macs(path)
    forget_mark(path)
    store = opened(url, path)
    assert store.get("web-1").state is InstanceState.OFF
    store.close()
    again = opened(url, path)
    assert again.get("web-1").failure is None
    again.close()
    assert json.loads((path.parent / "keys.json").read_text())["rows"]


def _no_macs(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE instances SET mac = ''")


def _no_key(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM authority_keys WHERE id = ?", (ROW_KEY.hex,))


def _neither(connection: sqlite3.Connection) -> None:
    _no_macs(connection)
    _no_key(connection)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("attack", [_no_key, _neither])
def test_without_its_key_a_store_is_refused(url: str, path: Path, attack: Callable[[sqlite3.Connection], None]) -> None:
    with database_file(path) as connection:
        attack(connection)
    with pytest.raises(KeyProviderError) as refused:
        opened(url, path)
    assert refused.value.reason == "ROW_KEY_MISSING"


@pytest.mark.usefixtures("filled")
def test_rows_without_macs_are_not_signed_again(url: str, path: Path) -> None:
    with database_file(path) as connection:
        _no_macs(connection)
    store = opened(url, path)
    failure = store.get("web-1").failure
    assert failure is not None
    assert failure.reason == "ROW_MAC_MISMATCH"
    store.close()


@pytest.mark.usefixtures("filled")
def test_setting_the_schema_back_signs_nothing(url: str, path: Path) -> None:
    with database_file(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0005'")
    with pytest.raises(StoreError):
        opened(url, path)
    as_before_macs(path)
    with pytest.raises(KeyProviderError) as refused:
        opened(url, path)
    assert refused.value.reason == "ROW_KEY_MISSING"


@pytest.mark.usefixtures("filled")
def test_rows_of_another_store_s_key_are_refused(url: str, path: Path, tmp_path: Path) -> None:
    """The wrapped key of a store under the same key provider, whose rows somebody else was allowed to have signed."""
    other = tmp_path / "other" / "vtpm.db"
    other.parent.mkdir()
    (other.parent / "keys.json").write_bytes((path.parent / "keys.json").read_bytes())
    (other.parent / "keys.json").chmod(0o600)
    forget_mark(other)
    store = Store.open(f"sqlite:///{other}")
    open_row_key(store, provider(other))
    wrapped = store.authorities.wrapped_key(ROW_KEY)
    store.close()
    assert wrapped is not None
    with database_file(path) as connection:
        connection.execute("UPDATE authority_keys SET blob = ? WHERE id = ?", (wrapped.blob, ROW_KEY.hex))
    with pytest.raises(KeyProviderError) as refused:
        opened(url, path)
    assert refused.value.reason == "ROW_KEY_FOREIGN"


@pytest.mark.usefixtures("filled")
def test_the_key_outlives_a_rotation(url: str, path: Path) -> None:
    keys = provider(path)
    store = Store.open(url)
    open_row_key(store, keys)
    key_id = keys.begin_rotation()
    assert rewrap_row_key(store, keys, key_id) == 1
    assert rewrap_row_key(store, keys, key_id) == 0
    store.close()
    with database_file(path) as connection:
        # The only data key that is wrapped by the provider here.
        connection.execute("DELETE FROM data_keys")
    keys.finish_rotation()
    again = opened(url, path)
    assert again.get("web-1").failure is None
    again.close()
    assert provider(path).remembered() == keys.remembered()


OPEN = """
import sys
from pathlib import Path
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.store.row_key import open_row_key
from vtpm.store.store import Store
store = Store.open(sys.argv[1])
open_row_key(store, FileKeyProvider(state_dir=Path(sys.argv[2]), options={}, create=False))
"""


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("point", ["rows.before_adopt", "rows.after_adopt", "keys.before_rename"])
def test_a_crash_while_rows_get_their_macs_is_made_good(url: str, path: Path, point: str) -> None:
    as_before_macs(path)
    forget_mark(path)
    environment = {**os.environ, "VTPM_TEST_BUILD": "1", "VTPM_CRASH_POINT": point}
    crashed = subprocess.run([sys.executable, "-c", OPEN, url, str(path.parent)], env=environment, check=False)
    assert crashed.returncode == -signal.SIGKILL
    store = opened(url, path)
    assert store.get("web-1").failure is None
    store.close()
    assert len(provider(path).remembered()) == 1
    with database_file(path) as connection:
        _no_key(connection)
    with pytest.raises(KeyProviderError):
        opened(url, path)
