"""Somebody can write the database, and has neither a key nor a guest: what that gets, and what its neighbours notice of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sqlite3
from collections.abc import Iterator

import pytest

from tests.faults.test_damage import start_refused
from tests.support import raw
from tests.support.certs import certificates, revoked_serials
from tests.support.daemon import DaemonProcess, kill_all, spare_pids, worker_pids
from vtpm.api.v1 import certificate_pb2 as cpb
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import ErrorKind, VtpmError
from vtpm.store.row_key import ROW_KEY

AK = ("AK", "ECC_P256")


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """A daemon whose AK certificates last an hour."""
    with DaemonProcess(environment={"VTPM_CA_AK_LIFETIME_HOURS": "1"}) as process:
        yield process


@contextlib.contextmanager
def hostile(daemon: DaemonProcess) -> Iterator[sqlite3.Connection]:
    """Write access to the store of a daemon that is stopped, which starts again afterwards."""
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10)) as store, store:
        yield store
    daemon.start()


def change(store: sqlite3.Connection, statement: str, *values: object) -> None:
    assert store.execute(statement, values).rowcount >= 1


def refused(daemon: DaemonProcess, name: str) -> None:
    """It is there to be seen, FAILED by that name, and refuses to run."""
    shown = daemon.get(name)
    assert (shown.state, shown.failure.reason) == (pb.FAILED, "ROW_MAC_MISMATCH")
    assert shown.failure.remedy
    client = daemon.client
    for call, request in (
        (client.instances.StartInstance, pb.StartInstanceRequest(instance=name)),
        (client.instances.ResetInstance, pb.ResetInstanceRequest(instance=name)),
        (client.instances.StopInstance, pb.StopInstanceRequest(instance=name)),
    ):
        with pytest.raises(VtpmError) as caught:
            client.call(call, request)
        assert (caught.value.reason, caught.value.kind) == ("ROW_MAC_MISMATCH", ErrorKind.DATA_LOSS)


def honest(daemon: DaemonProcess, name: str) -> None:
    """It runs, with the keys that were certified."""
    instance = daemon.power_on(name) if daemon.get(name).state == pb.OFF else daemon.get(name)
    with contextlib.closing(raw.connect(instance.tpm_socket)) as sock:
        raw.succeed(sock, raw.pcr_read(0))
    assert certificates(daemon, name)[AK].der


def soon(seconds: int) -> str:
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S.000000")


@pytest.mark.parametrize("running", [False, True])
def test_a_software_key_gets_no_certificate(daemon: DaemonProcess, running: bool) -> None:
    """The public area of an AK replaced, its certificate due: what the next start made a certificate of."""
    daemon.create("web-1")
    daemon.create("web-2")
    if running:
        daemon.power_on("web-1")
    before = certificates(daemon, "web-1")[AK]
    with hostile(daemon) as store:
        (keys,) = store.execute("SELECT keys FROM instances WHERE name = 'web-1'").fetchone()
        (others,) = store.execute("SELECT keys FROM instances WHERE name = 'web-2'").fetchone()
        # As good as a software key: one that is not in this TPM.
        ak, other = (next(key[3] for key in json.loads(text) if key[0] == "AK") for text in (keys, others))
        change(store, "UPDATE instances SET keys = replace(keys, ?, ?) WHERE name = 'web-1'", ak, other)
        change(store, "UPDATE certificates SET not_after = ? WHERE serial = ?", soon(300), before.serial.zfill(40))
    refused(daemon, "web-1")
    request = cpb.ListCertificatesRequest(instance="web-1", history=True)
    issued = [item for item in daemon.client.certificates.ListCertificates(request).certificates if item.kind == "AK"]
    assert all(item.serial == before.serial for item in issued), "nothing new was certified"
    honest(daemon, "web-2")


def test_a_certificate_that_is_made_due_is_in_force_no_more(daemon: DaemonProcess) -> None:
    daemon.create("web-1")
    serial = certificates(daemon, "web-1")[AK].serial
    with hostile(daemon) as store:
        change(store, "UPDATE certificates SET not_after = ? WHERE serial = ?", soon(300), serial.zfill(40))
    daemon.power_on("web-1")
    assert AK not in certificates(daemon, "web-1")
    assert int(serial, 16) in revoked_serials(daemon)
    assert "ROW_MAC_MISMATCH" in daemon.log_text()


def test_a_revocation_stays(daemon: DaemonProcess) -> None:
    daemon.create("web-1")
    daemon.create("web-2")
    daemon.client.certificates.RevokeCertificates(cpb.RevokeCertificatesRequest(instance="web-1", reason="keyCompromise"))
    before = revoked_serials(daemon)
    assert before
    with hostile(daemon) as store:
        change(store, "UPDATE certificates SET revoked_at = NULL, revocation_reason = '' WHERE revoked_at IS NOT NULL")
    assert revoked_serials(daemon) == before
    honest(daemon, "web-2")


def test_an_identity_is_not_set_back(daemon: DaemonProcess) -> None:
    daemon.create("web-1")
    daemon.create("web-2")
    with hostile(daemon) as store:
        change(store, "UPDATE instances SET identity = 'CHANGED' WHERE name = 'web-1'")
    refused(daemon, "web-1")
    honest(daemon, "web-2")


def test_keys_that_were_swapped_are_believed_for_neither(daemon: DaemonProcess) -> None:
    for name in ("web-1", "web-2", "web-3"):
        daemon.create(name)
    with hostile(daemon) as store:
        rows = store.execute("SELECT name, keys, mac FROM instances ORDER BY name LIMIT 2").fetchall()
        for (name, *_), (_, keys, mac) in zip(rows, reversed(rows), strict=True):
            change(store, "UPDATE instances SET keys = ?, mac = ? WHERE name = ?", keys, mac, name)
    refused(daemon, "web-1")
    refused(daemon, "web-2")
    honest(daemon, "web-3")


def test_a_snapshot_s_mark_is_not_set_back(daemon: DaemonProcess) -> None:
    """Invariant 2: a snapshot that somebody went on from would be gone on from again."""
    for name in ("web-1", "web-2"):
        daemon.running(name)
        daemon.hibernate(name)
    honest(daemon, "web-1")
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon.kill()
    kill_all([*worker_pids(host), *spare_pids(host), host])
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10)) as store, store:
        change(store, "UPDATE snapshot_uses SET version = version - 1")
    daemon.start()
    shown = daemon.until("web-1", pb.FAILED)
    assert shown.failure.reason == "ROW_MAC_MISMATCH"
    honest(daemon, "web-2")
    # With its VM it starts anew.
    daemon.vtpm("instance", "reset", "web-1")
    honest(daemon, "web-1")


def test_a_ca_that_was_put_there_signs_nothing(daemon: DaemonProcess) -> None:
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10)) as store, store:
        change(store, "UPDATE authorities SET state = 'RETIRED' WHERE role = 'ISSUING'")
    assert start_refused(daemon) == "ROW_MAC_MISMATCH"


def test_macs_are_not_made_again(daemon: DaemonProcess) -> None:
    daemon.create("web-1")
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10)) as store, store:
        store.execute("UPDATE instances SET mac = ''")
        change(store, "DELETE FROM authority_keys WHERE id = ?", ROW_KEY.hex)
    assert start_refused(daemon) == "ROW_KEY_MISSING"


@pytest.mark.parametrize("column", ["keys", "state", "epoch", "name"])
def test_what_is_refused_can_be_deleted_and_its_name_used_again(daemon: DaemonProcess, column: str) -> None:
    daemon.create("web-1")
    values = {"keys": "[]", "state": "FAILED", "epoch": 9, "name": "web-9"}
    with hostile(daemon) as store:
        change(store, f"UPDATE instances SET {column} = ?", values[column])
    name = "web-9" if column == "name" else "web-1"
    refused(daemon, name)
    daemon.vtpm("instance", "delete", name, "--yes")
    daemon.create(name)
    honest(daemon, name)


def test_an_ownership_epoch_is_not_set_back_by_its_row_alone(daemon: DaemonProcess) -> None:
    """Invariant 3: a snapshot, and a worker, of an epoch that is over would be good again."""
    daemon.create("web-1")
    daemon.create("web-2")
    for _ in range(2):
        daemon.power_on("web-1")
        daemon.vtpm("instance", "stop", "web-1")
        if daemon.get("web-1").epoch == 1:
            with contextlib.closing(sqlite3.connect(daemon.state_dir / "vtpm.db", timeout=10)) as store:
                earlier = store.execute("SELECT * FROM instances WHERE name = 'web-1'").fetchone()
    with hostile(daemon) as store:
        change(store, f"REPLACE INTO instances VALUES ({', '.join('?' * len(earlier))})", *earlier)
    assert daemon.get("web-1").epoch == 1, "its MAC is right"
    for _ in range(2):
        with pytest.raises(VtpmError) as caught:
            daemon.power_on("web-1")
        assert (caught.value.reason, caught.value.kind) == ("EPOCH_SET_BACK", ErrorKind.DATA_LOSS)
        assert caught.value.remedy
    honest(daemon, "web-2")
