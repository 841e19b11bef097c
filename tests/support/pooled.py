"""The pool as somebody sees it who has the store's file; nothing else shows its members."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Set

from tests.support.daemon import DaemonProcess


def members(daemon: DaemonProcess) -> set[str]:
    """Ids of the TPMs that wait for an instance to become."""
    with sqlite3.connect(f"file:{daemon.state_dir / 'vtpm.db'}?mode=ro", uri=True) as store:
        return {str(uuid.UUID(row[0])) for row in store.execute("SELECT instance FROM pool")}


def filled(daemon: DaemonProcess, size: int, *, without: Set[str] = frozenset(), timeout_s: float = 30) -> set[str]:
    """Wait until the pool has `size` members, none of them of `without`."""
    deadline = time.monotonic() + timeout_s
    while len(found := members(daemon)) != size or found & without:
        assert time.monotonic() < deadline, f"the pool has {len(found)}:\n{daemon.log_text()[-2000:]}"
        time.sleep(0.05)
    return found
