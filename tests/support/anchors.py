"""Daemons with a freshness anchor, and what somebody does who can write the store."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import durability_pb2 as pb
from vtpm.api.v1 import instance_pb2 as ipb

NEVER = "86400"


def anchored(root: Path, **environment: str) -> DaemonProcess:
    """A daemon, not started, with an anchor in a directory of its own, written at clean stops and when asked only."""
    daemon = DaemonProcess()
    (root / "anchor").mkdir(exist_ok=True)
    daemon.environment |= {
        "VTPM_ANCHOR": "file",
        "VTPM_ANCHOR_PATH": str(root / "anchor" / "anchor"),
        "VTPM_ANCHOR_INTERVAL_S": NEVER,
    } | environment
    return daemon


def anchor_of(daemon: DaemonProcess) -> pb.Anchor:
    """How rollback protection stands."""
    found: pb.Anchor = daemon.client.call(daemon.client.durability.GetAnchor, pb.GetAnchorRequest())
    return found


def wait_for_update(daemon: DaemonProcess, above: int, timeout_s: float = 10) -> pb.Anchor:
    """Wait until the anchor was written more than `above` times."""
    deadline = time.monotonic() + timeout_s
    while (found := anchor_of(daemon)).update <= above:
        assert time.monotonic() < deadline, f"the anchor is still of update {found.update}: {found.trouble}"
        time.sleep(0.02)
    return found


def copy_store(daemon: DaemonProcess, to: Path) -> Path:
    """Copy the whole store as it is, of a daemon that is stopped or not."""
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as source, sqlite3.connect(to) as target:
        source.backup(target)
    return to


def put_back(daemon: DaemonProcess, copy: Path) -> None:
    """Put a copy of the store in the place of the store of a stopped daemon."""
    for leftover in daemon.state_dir.glob("vtpm.db*"):
        leftover.unlink()
    shutil.copy(copy, daemon.state_dir / "vtpm.db")


def rows_of(path: Path, instance: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of one instance, by table."""
    key = instance.replace("-", "")
    with sqlite3.connect(path, timeout=10) as store:
        store.row_factory = sqlite3.Row
        found = {"instances": [dict(row) for row in store.execute("SELECT * FROM instances WHERE id = ?", (key,))]}
        for table in ("states", "data_keys"):
            rows = store.execute(f"SELECT * FROM {table} WHERE instance = ?", (key,))
            found[table] = [dict(row) for row in rows]
    return found


def write_rows(path: Path, rows: dict[str, list[dict[str, Any]]], *tables: str) -> None:
    """Put rows back over what is there."""
    with sqlite3.connect(path, timeout=10) as store:
        for table in tables or rows:
            for row in rows[table]:
                marks = ", ".join("?" * len(row))
                store.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


def counted(daemon: DaemonProcess, name: str, times: int) -> int:
    """Increment the NV counter of an instance that is ON, made at the first time; return its value."""
    sock = raw.connect(daemon.get(name).tpm_socket)
    try:
        if raw.rc_of(raw.ask(sock, raw.nv_read())):
            raw.ask(sock, raw.nv_define(raw.COUNTER, counter=True))
        for _ in range(times):
            raw.succeed(sock, raw.nv_increment())
        return raw.counter_of(sock)
    finally:
        sock.close()


def off(daemon: DaemonProcess, *names: str) -> None:
    """Power off."""
    for name in names:
        daemon.client.call(daemon.client.instances.StopInstance, ipb.StopInstanceRequest(instance=name))


def delete(daemon: DaemonProcess, name: str) -> None:
    """Delete an instance that is OFF."""
    daemon.client.call(daemon.client.instances.DeleteInstance, ipb.DeleteInstanceRequest(instance=name))


def log_events(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    """What the daemon logged under a name."""
    lines = (line for line in daemon.log_text().splitlines() if line.startswith("{"))
    return [entry for entry in map(json.loads, lines) if entry.get("event") == event]
