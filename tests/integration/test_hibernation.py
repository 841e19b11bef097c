"""Hibernation: an idle instance has no process, and neither its VM nor an operator can tell."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Tool
from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess, kill_all, worker_pids
from tests.support.quote import verify
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.errors import VtpmError
from vtpm.tpm.codes import CommandCode
from vtpm.tpm.command import build

Bind = Callable[[pb.Instance], Tool]


def processes(daemon: DaemonProcess) -> int:
    """Worker processes that run an instance."""
    return len(worker_pids(daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid))


def read_clock(sock: socket.socket) -> tuple[int, int, int, int]:
    """TPM2_ReadClock: time, clock, reset count, restart count."""
    response = raw.succeed(sock, build(CommandCode.ReadClock, b""))
    return struct.unpack_from(">QQII", response, 10)


def test_an_idle_instance_has_no_process_and_its_vm_notices_nothing() -> None:
    with DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0.3"}) as daemon:
        instance = daemon.running("web-1")
        sock = raw.connect(instance.tpm_socket)
        raw.succeed(sock, raw.pcr_extend(16, b"x" * 32))
        before = raw.succeed(sock, raw.pcr_read(16))
        deadline = time.monotonic() + 20
        while not daemon.get("web-1").hibernated:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert daemon.get("web-1").state == pb.ON
        assert raw.succeed(sock, raw.pcr_read(16)) == before
        # A second connection, and a client that was there before.
        assert raw.succeed(raw.connect(instance.tpm_socket), raw.pcr_read(16)) == before


def test_to_ask_for_the_state_keeps_nothing_awake() -> None:
    with DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0.3", "VTPM_METRICS_ADDRESS": ""}) as daemon:
        daemon.running("web-1")
        deadline = time.monotonic() + 20
        while not daemon.get("web-1").hibernated:
            assert time.monotonic() < deadline
            daemon.vtpm("instance", "list")
            time.sleep(0.05)


def test_a_process_is_gone_and_its_connections_wait(daemon: DaemonProcess, running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    raw.succeed(sock, raw.pcr_extend(16, b"x" * 32))
    before = raw.succeed(sock, raw.pcr_read(16))
    count = processes(daemon)
    daemon.hibernate(running.name)
    # It was killed; that it is gone comes a moment later.
    eventually(lambda: processes(daemon) == count - 1)
    shown = daemon.vtpm("instance", "show", running.name).stdout.decode()
    assert "hibernated" in shown
    assert daemon.get(running.name).hibernated
    assert raw.succeed(sock, raw.pcr_read(16)) == before
    assert not daemon.get(running.name).hibernated
    # Again and again, each snapshot once.
    for number in range(5):
        daemon.hibernate(running.name)
        daemon.hibernate(running.name)
        raw.succeed(sock, raw.pcr_extend(16, bytes([number]) * 32))


def test_the_clock_goes_on(daemon: DaemonProcess, running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    begun = time.monotonic()
    before = read_clock(sock)
    daemon.hibernate(running.name)
    time.sleep(0.5)
    after = read_clock(sock)
    passed_ms = (time.monotonic() - begun) * 1000
    for earlier, later in zip(before[:2], after[:2], strict=True):
        assert 500 <= later - earlier <= passed_ms + 50
    assert after[2:] == before[2:], "no reset and no restart was counted"


def test_sessions_objects_and_localities_live_on(daemon: DaemonProcess, running: pb.Instance, tmp_path: Path) -> None:
    from tpm2_pytss import ESAPI, TCTILdr
    from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_SESSION
    from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPML_PCR_SELECTION, TPMT_SYM_DEF

    with TCTILdr("swtpm", f"path={running.tpm_socket}") as tcti, ESAPI(tcti) as esapi:

        def sleep() -> None:
            daemon.hibernate(running.name)

        symmetric = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        policy = esapi.start_auth_session(
            tpm_key=ESYS_TR.NONE, bind=ESYS_TR.NONE, session_type=TPM2_SE.POLICY, symmetric=symmetric, auth_hash=TPM2_ALG.SHA256
        )
        sleep()
        esapi.policy_pcr(policy, b"", TPML_PCR_SELECTION.parse("sha256:16"))
        digest = bytes(esapi.policy_get_digest(policy))
        sleep()
        assert bytes(esapi.policy_get_digest(policy)) == digest != bytes(32)
        key, *_ = esapi.create_primary(
            TPM2B_SENSITIVE_CREATE(),
            TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256", "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"),
            ESYS_TR.OWNER,
        )
        sleep()
        # Needs the transient object and a HMAC session with a rolling nonce.
        session = esapi.start_auth_session(
            tpm_key=ESYS_TR.NONE, bind=ESYS_TR.NONE, session_type=TPM2_SE.HMAC, symmetric=symmetric, auth_hash=TPM2_ALG.SHA256
        )
        # With it an audit digest that goes on.
        esapi.trsess_set_attributes(session, TPMA_SESSION.AUDIT | TPMA_SESSION.CONTINUESESSION)
        for _ in range(3):
            sleep()
            esapi.get_random(8, session1=session)
        sequence = esapi.hash_sequence_start(b"", TPM2_ALG.SHA256)
        sleep()
        esapi.sequence_update(sequence, b"first half, ")
        sleep()
        from hashlib import sha256

        hashed, _ticket = esapi.sequence_complete(sequence, b"second half")
        assert bytes(hashed) == sha256(b"first half, second half").digest()
        sleep()
        esapi.read_public(key)
        esapi.flush_context(key)
        esapi.flush_context(session)
        esapi.flush_context(policy)


def test_an_event_log_and_quotes_are_there_after_it(
    daemon: DaemonProcess, running: pb.Instance, tool: Bind, tmp_path: Path
) -> None:
    daemon.vtpm("measure", running.name, "16", "README.md")
    before = daemon.vtpm("pcrs", running.name).stdout
    (tmp_path / "before.log").touch()
    daemon.vtpm("eventlog", "get", running.name, "--out", str(tmp_path / "before.log"))
    daemon.hibernate(running.name)
    daemon.vtpm("eventlog", "get", running.name, "--out", str(tmp_path / "after.log"))
    assert (tmp_path / "after.log").read_bytes() == (tmp_path / "before.log").read_bytes() != b""
    daemon.hibernate(running.name)
    assert daemon.vtpm("pcrs", running.name).stdout == before
    daemon.hibernate(running.name)
    request = tpm_pb2.QuoteRequest(
        instance=running.name, selections=[tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[16])], nonce=b"n"
    )
    quoted = daemon.client.call(daemon.client.tpm.Quote, request)
    ak = next(key.public_pem for key in running.keys if key.role == pb.AK)
    verify(quoted.attest, quoted.signature, ak, nonce=b"n", pcrs=[value.digest for value in quoted.values])


def test_power_and_labels_of_a_hibernated_instance(daemon: DaemonProcess, running: pb.Instance) -> None:
    daemon.hibernate(running.name)
    daemon.vtpm("instance", "label", running.name, "team=web")
    assert daemon.get(running.name).hibernated
    daemon.vtpm("instance", "reset", running.name)
    assert not daemon.get(running.name).hibernated
    daemon.hibernate(running.name)
    with pytest.raises(VtpmError, match="ON can't be deleted"):
        daemon.client.call(daemon.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=running.name))
    daemon.vtpm("instance", "stop", running.name)
    assert daemon.get(running.name).state == pb.OFF
    with pytest.raises(VtpmError) as refused:
        daemon.hibernate(running.name)
    assert refused.value.reason == "INSTANCE_NOT_ON"
    raw.succeed(raw.connect(daemon.power_on(running.name).tpm_socket), raw.pcr_read(0))


def test_a_client_that_leaves_in_the_meantime_is_let_go(daemon: DaemonProcess, running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    raw.succeed(sock, raw.pcr_read(0))
    for _ in range(20):
        daemon.hibernate(running.name)
        sock.close()
        sock = raw.connect(running.tpm_socket)
        raw.succeed(sock, raw.pcr_read(0))


def test_half_a_command_keeps_it_awake(daemon: DaemonProcess, running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    sock.sendall(raw.pcr_read(0)[:7])
    time.sleep(0.2)
    with pytest.raises(VtpmError) as refused:
        daemon.client.call(daemon.client.instances.HibernateInstance, pb.HibernateInstanceRequest(instance=running.name))
    assert refused.value.reason == "INSTANCE_BUSY"
    assert raw.succeed(sock, raw.pcr_read(0)[7:])


def test_a_vm_hibernates_with_its_connections_and_ends_its_instance_at_last(daemon: DaemonProcess, name: str) -> None:
    instance = daemon.create(name)
    vm = vmm.Vmm(instance.control_socket)
    vm.boot()
    assert vm.data is not None
    raw.succeed(vm.data, raw.pcr_extend(16, b"x" * 32))
    before = raw.succeed(vm.data, raw.pcr_read(16))
    daemon.hibernate(name)
    assert raw.succeed(vm.data, raw.pcr_read(16)) == before
    daemon.hibernate(name)
    # Someone else may not take its place, hibernated or not.
    other = vmm.Vmm(instance.control_socket)
    assert other.control.recv(1) == b""
    daemon.hibernate(name)
    assert vm.ask(vmm.ESTABLISHED) == bytes(8)
    daemon.hibernate(name)
    vm.control.close()
    daemon.until(name, pb.OFF)


def test_a_vm_that_has_not_started_its_tpm_hibernates_too(daemon: DaemonProcess, name: str) -> None:
    instance = daemon.create(name)
    vm = vmm.Vmm(instance.control_socket)
    assert vm.ask(vmm.CAPABILITY)
    daemon.hibernate(name)
    vm.cold_start(vmm.TIS_BUFFER)
    daemon.hibernate(name)
    assert vm.ask(vmm.BUFFER, bytes(4))[4:8] == struct.pack(">I", vmm.TIS_BUFFER), "the size that the VM has set"
    assert vm.data is not None
    raw.succeed(vm.data, raw.startup_clear())
    vm.control.close()
    daemon.until(name, pb.OFF)


def test_a_daemon_that_dies_finds_what_hibernates_and_what_has_come(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    socks = {}
    for number in range(4):
        name = f"web-{number}"
        sock = raw.connect(daemon.running(name).tpm_socket)
        raw.succeed(sock, raw.pcr_extend(16, bytes([number]) * 32))
        socks[name] = sock, raw.succeed(sock, raw.pcr_read(16))
        if number:
            daemon.hibernate(name)
    daemon.kill()
    # The first of them is awake and answers, the others wait for the daemon.
    assert raw.succeed(socks["web-0"][0], raw.pcr_read(16)) == socks["web-0"][1]
    socks["web-1"][0].sendall(raw.pcr_read(16))
    time.sleep(0.1)
    daemon.start()
    assert raw.receive(socks["web-1"][0]) == socks["web-1"][1]
    assert daemon.get("web-2").hibernated
    for sock, before in socks.values():
        assert raw.succeed(sock, raw.pcr_read(16)) == before


def test_both_deaths_at_once_and_the_snapshot_is_still_there(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.pcr_extend(16, b"x" * 32))
    before = raw.succeed(sock, raw.pcr_read(16))
    daemon.hibernate("web-1")
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon.kill()
    os.kill(host, signal.SIGKILL)
    daemon.start()
    assert daemon.get("web-1").hibernated
    assert raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.pcr_read(16)) == before


def test_a_snapshot_is_used_once(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    daemon.hibernate("web-1")
    query = "SELECT s.version, u.version FROM snapshots s LEFT JOIN snapshot_uses u ON u.instance = s.instance"
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        assert store.execute(query).fetchall() == [(1, None)]
        raw.succeed(sock, raw.pcr_extend(16, b"x" * 32))
        assert store.execute(query).fetchall() == [(1, 1)], "used up when the first command was answered"
    # Its worker dies. What was in the TPM since is lost, and nothing older takes its place.
    host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    daemon.stop()
    kill_all(worker_pids(host))
    daemon.start()
    assert daemon.get("web-1").state == pb.FAILED
    assert daemon.get("web-1").failure.reason == "WORKER_LOST"


@pytest.mark.parametrize("kind", ["cut", "flipped", "other instance", "older permanent state"])
def test_a_damaged_or_foreign_snapshot_is_named_and_refused(own_daemon: DaemonProcess, kind: str) -> None:
    daemon = own_daemon
    socks = {name: raw.connect(daemon.running(name).tpm_socket) for name in ("web-1", "web-2")}
    for name in socks:
        daemon.hibernate(name)
    daemon.stop()
    with sqlite3.connect(daemon.state_dir / "vtpm.db") as store:
        one, two = (bytes.fromhex(daemon_id.replace("-", "")).hex() for daemon_id in _ids(store))
        (blob,) = store.execute("SELECT blob FROM snapshots WHERE instance = ?", (one,)).fetchone()
        (other,) = store.execute("SELECT blob FROM snapshots WHERE instance = ?", (two,)).fetchone()
        damaged = {"cut": blob[:-3], "flipped": blob[:-1] + bytes([blob[-1] ^ 1]), "other instance": other}.get(kind)
        if damaged is not None:
            store.execute("UPDATE snapshots SET blob = ? WHERE instance = ?", (damaged, one))
        else:
            store.execute("UPDATE states SET version = version + 1 WHERE instance = ?", (one,))
    daemon.start()
    socks["web-1"].sendall(raw.pcr_read(0))
    failed = daemon.until("web-1", pb.FAILED)
    assert failed.failure.reason.startswith("ENVELOPE_")
    assert failed.failure.remedy
    with contextlib.suppress(ConnectionResetError):
        assert raw.receive(socks["web-1"]) == b""
    raw.succeed(socks["web-2"], raw.pcr_read(0))


def _ids(store: sqlite3.Connection) -> list[str]:
    return [row[0] for row in store.execute("SELECT id FROM instances ORDER BY name")]


def test_a_drained_host_lets_nothing_start_or_wake_until_it_is_resumed(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    socks = [raw.connect(daemon.running(f"web-{number}").tpm_socket) for number in range(5)]
    daemon.create("off")
    done = daemon.vtpm("host", "drain")
    assert b"5 of 5" in done.stdout
    eventually(lambda: processes(daemon) == 0)
    status = daemon.vtpm("host", "status").stdout.decode()
    assert "5/5 hibernated" in status
    assert "drained" in status
    for arguments in (("instance", "start", "off"), ("pcrs", "web-1")):
        refused = daemon.vtpm(*arguments, check=False)
        assert refused.returncode
        assert b"HOST_DRAINED" in refused.stderr
        assert b"vtpm host resume" in refused.stderr
    socks[0].sendall(raw.pcr_read(0))
    time.sleep(0.2)
    assert processes(daemon) == 0, "its VM waits"
    daemon.vtpm("host", "resume")
    assert raw.rc_of(raw.receive(socks[0])) == 0
    assert "in service" in daemon.vtpm("host", "status").stdout.decode()
    raw.succeed(raw.connect(daemon.power_on("off").tpm_socket), raw.pcr_read(0))


def test_a_drain_names_who_stays_awake(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    daemon.running("web-1")
    sock = raw.connect(daemon.running("busy").tpm_socket)
    sock.sendall(b"\x80")
    time.sleep(0.1)
    done = daemon.vtpm("host", "drain", "--timeout", "1", check=False)
    assert done.returncode
    assert b"1 of 2" in done.stdout
    assert b"INSTANCE_BUSY: busy" in done.stderr


def test_the_padding_of_a_request_keeps_nobody_awake_and_is_not_lost(daemon: DaemonProcess, name: str) -> None:
    instance = daemon.create(name)
    vm = vmm.Vmm(instance.control_socket).boot()
    assert vm.data is not None
    # As QEMU pads it, at once; then with the padding behind the nap; then not at all, as tpm2-tss does.
    for first, second in ((b"\0\0\0\0", b""), (b"\0", b"\0\0\0"), (b"\0\0", b"\0\0"), (b"\0", b"")):
        assert vm.ask(vmm.LOCALITY, first) == bytes(4)
        daemon.hibernate(name)
        vm.control.sendall(second)
        assert vm.ask(vmm.ESTABLISHED) == bytes(8)
        raw.succeed(vm.data, raw.pcr_read(0))
    vm.control.close()
    daemon.until(name, pb.OFF)
