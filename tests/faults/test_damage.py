"""Invariants 6 and 7: damage has a name, says what to do, and loses or overwrites nothing."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import ROOT, DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import ErrorKind, VtpmError


def states(daemon: DaemonProcess) -> list[tuple[object, ...]]:
    with sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10) as store:
        return store.execute("SELECT instance, kind, epoch, version, blob FROM states ORDER BY instance").fetchall()


def change(daemon: DaemonProcess, statement: str, *values: object) -> None:
    with sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10) as store:
        assert store.execute(statement, values).rowcount == 1


def flip(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "ENVELOPE_TRUNCATED": lambda blob: blob[:20],
    "ENVELOPE_AUTHENTICATION_FAILED": lambda blob: flip(blob, len(blob) // 2),
    "ENVELOPE_FORMAT_UNKNOWN": lambda blob: blob[:4] + b"\xff" + blob[5:],
}


@pytest.mark.parametrize("damage", [*DAMAGES, "cut by one", "empty", "tag", "another magic"])
def test_a_damaged_state_is_refused_by_name_and_kept(own_daemon: DaemonProcess, damage: str) -> None:
    daemon = own_daemon
    made = daemon.create("web-1")
    (row,) = states(daemon)
    blob = row[4]
    assert isinstance(blob, bytes)
    other: dict[str, Callable[[bytes], bytes]] = {
        "cut by one": lambda b: b[:-1],
        "empty": lambda b: b"",
        "tag": lambda b: flip(b, len(b) - 1),
        "another magic": lambda b: b"XXXX" + b[4:],
    }
    hurt = (DAMAGES | other)[damage](blob)
    change(daemon, "UPDATE states SET blob = ?", hurt)
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.kind is ErrorKind.DATA_LOSS
    if damage in DAMAGES:
        assert caught.value.reason == damage
    failed = daemon.get("web-1")
    assert (failed.state, failed.failure.reason) == (pb.FAILED, caught.value.reason)
    assert failed.failure.remedy
    assert states(daemon)[0][4] == hurt, "nothing was overwritten, and no fresh TPM was made"
    # With the row put back the instance is as it was.
    change(daemon, "UPDATE states SET blob = ?", blob)
    daemon.vtpm("instance", "stop", "web-1")
    raw.succeed(raw.connect(daemon.power_on("web-1").tpm_socket), raw.pcr_read(0))
    assert daemon.get("web-1").keys == made.keys


def test_a_state_of_another_instance_is_refused_by_name(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.create("web-1")
    daemon.create("web-2")
    (first, second) = states(daemon)
    change(daemon, "UPDATE states SET blob = ? WHERE instance = ?", first[4], second[0])
    change(daemon, "UPDATE states SET blob = ? WHERE instance = ?", second[4], first[0])
    for name in ("web-1", "web-2"):
        with pytest.raises(VtpmError) as caught:
            daemon.power_on(name)
        assert caught.value.reason == "ENVELOPE_INSTANCE_MISMATCH"


def test_an_older_state_under_a_newer_version_is_refused_by_name(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    (old,) = states(daemon)
    raw.succeed(sock, raw.nv_increment())
    daemon.vtpm("instance", "stop", "web-1")
    change(daemon, "UPDATE states SET blob = ?", old[4])
    with pytest.raises(VtpmError) as caught:
        daemon.power_on("web-1")
    assert caught.value.reason in ("ENVELOPE_VERSION_MISMATCH", "ENVELOPE_EPOCH_MISMATCH")


def test_a_data_key_of_another_instance_opens_nothing(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.create("web-1")
    daemon.create("web-2")
    with sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10) as store:
        rows = store.execute("SELECT instance, blob FROM data_keys").fetchall()
        store.execute("UPDATE data_keys SET blob = ? WHERE instance = ?", (rows[0][1], rows[1][0]))
        store.execute("UPDATE data_keys SET blob = ? WHERE instance = ?", (rows[1][1], rows[0][0]))
    for name in ("web-1", "web-2"):
        with pytest.raises(VtpmError) as caught:
            daemon.power_on(name)
        assert caught.value.reason == "DATA_KEY_AUTHENTICATION_FAILED"
        assert daemon.get(name).state == pb.FAILED


# ---- the daemon's start ---------------------------------------------------------------------------------------------------


def start_refused(daemon: DaemonProcess) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "server.py")], env=daemon.env, capture_output=True, check=False, timeout=30
    )
    text = done.stderr.decode()
    assert done.returncode in (1, 2), text
    assert "Traceback" not in text
    said = [line for line in text.splitlines() if line.startswith("vtpm: ")]
    assert len(said) == 1
    return said[0].split(":")[1].strip()


def key_file(daemon: DaemonProcess) -> Path:
    return daemon.state_dir / "keys.json"


def _wrong_key(daemon: DaemonProcess) -> None:
    with DaemonProcess() as other:
        other.create("x")
        shutil.copy(key_file(other), key_file(daemon))


KEY_FILE_DAMAGES: dict[str, Callable[[DaemonProcess], object]] = {
    "KEY_FILE_MISSING": lambda daemon: key_file(daemon).unlink(),
    "KEY_FILE_MODE": lambda daemon: key_file(daemon).chmod(0o644),
    "KEY_FILE_OWNER": lambda daemon: os.chown(key_file(daemon), 12345, -1),
    "KEY_FILE_DAMAGED": lambda daemon: key_file(daemon).write_text("{"),
    "KEY_FILE_FORMAT_UNKNOWN": lambda daemon: key_file(daemon).write_text(
        json.dumps({**json.loads(key_file(daemon).read_text()), "format": 99})
    ),
}


@pytest.mark.parametrize("reason", KEY_FILE_DAMAGES)
def test_a_key_file_that_cannot_be_trusted_stops_the_daemon_before_anything_changes(
    own_daemon: DaemonProcess, reason: str
) -> None:
    if reason == "KEY_FILE_OWNER" and os.geteuid() != 0:
        pytest.skip("only root can give the file to another user")
    daemon = own_daemon
    daemon.create("web-1")
    daemon.stop()
    content = key_file(daemon).read_bytes()
    KEY_FILE_DAMAGES[reason](daemon)
    assert start_refused(daemon) == reason
    key_file(daemon).unlink(missing_ok=True)
    key_file(daemon).write_bytes(content)
    key_file(daemon).chmod(0o600)
    daemon.start()
    raw.succeed(raw.connect(daemon.power_on("web-1").tpm_socket), raw.pcr_read(0))


def test_the_key_file_of_another_store_opens_nothing_and_harms_nothing(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.create("web-1")
    daemon.stop()
    content = key_file(daemon).read_bytes()
    _wrong_key(daemon)
    assert start_refused(daemon) == "KEY_UNKNOWN"
    # Nor without its certificate authority: it could not tell what of the store its service wrote.
    daemon.environment["VTPM_CA"] = "none"
    assert start_refused(daemon) == "KEY_UNKNOWN"
    key_file(daemon).write_bytes(content)
    daemon.start()
    assert daemon.power_on("web-1").state == pb.ON


def test_a_store_of_a_newer_version_is_left_alone(own_daemon: DaemonProcess) -> None:
    own_daemon.create("web-1")
    own_daemon.stop()
    change(own_daemon, "UPDATE alembic_version SET version_num = '9999'")
    assert start_refused(own_daemon) == "STORE_TOO_NEW"


def test_a_store_that_is_no_database_is_left_alone(own_daemon: DaemonProcess) -> None:
    own_daemon.stop()
    path = own_daemon.state_dir / "vtpm.db"
    for leftover in own_daemon.state_dir.glob("vtpm.db*"):
        leftover.unlink()
    path.write_bytes(b"these are somebody's notes" * 100)
    assert start_refused(own_daemon) == "STORE_DAMAGED"
    assert path.read_bytes() == b"these are somebody's notes" * 100


def test_wrong_settings_are_all_named_at_once(own_daemon: DaemonProcess) -> None:
    own_daemon.stop()
    own_daemon.environment |= {"VTPM_MAX_RUNNING": "-1", "VTPM_LOG_FORMAT": "xml"}
    done = subprocess.run([sys.executable, str(ROOT / "server.py")], env=own_daemon.env, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"VTPM_MAX_RUNNING" in done.stderr
    assert b"VTPM_LOG_FORMAT" in done.stderr
    assert b"Traceback" not in done.stderr
