"""Changes of a store that count as the service's own: made by who has its key."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from vtpm.seal.file_provider import FileKeyProvider
from vtpm.store.adoption import sign_all
from vtpm.store.row_key import open_row_key
from vtpm.store.store import Store


@contextlib.contextmanager
def as_the_service(state_dir: Path) -> Iterator[sqlite3.Connection]:
    """Change rows; every row gets the MAC of what it is then."""
    path = state_dir / "vtpm.db"
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        yield connection
    store = Store.open(f"sqlite:///{path}")
    try:
        open_row_key(store, FileKeyProvider(state_dir=state_dir, options={}, create=False))
        with store._writing() as writing:
            sign_all(writing, store.macs)
    finally:
        store.close()
