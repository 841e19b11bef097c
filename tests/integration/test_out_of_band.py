"""Invariant 5: what the service does with a TPM is invisible to its guest, and needs nothing of the guest's."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Tool
from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.quote import QuoteRefusedError, verify
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

Bind = Callable[[pb.Instance], Tool]
NONCE = b"a verifier's nonce"


def quote(daemon: DaemonProcess, name: str) -> tpm_pb2.QuoteResponse:
    selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0, 7, 16])
    request = tpm_pb2.QuoteRequest(instance=name, selections=[selection], nonce=NONCE)
    response: tpm_pb2.QuoteResponse = daemon.client.call(daemon.client.tpm.Quote, request)
    return response


def check(response: tpm_pb2.QuoteResponse, ak_pem: str) -> None:
    verify(response.attest, response.signature, ak_pem, nonce=NONCE, pcrs=[value.digest for value in response.values])


def ak_of(instance: pb.Instance) -> str:
    return next(key.public_pem for key in instance.keys if key.role == pb.AK)


def test_a_quote_is_what_the_ak_of_the_instance_signed(daemon: DaemonProcess, running: pb.Instance) -> None:
    response = quote(daemon, running.name)
    check(response, ak_of(running))
    flipped = bytearray(response.signature)
    flipped[-1] ^= 1
    with pytest.raises(QuoteRefusedError, match="signature"):
        verify(response.attest, bytes(flipped), ak_of(running), nonce=NONCE, pcrs=[])
    with pytest.raises(QuoteRefusedError, match="nonce"):
        verify(response.attest, response.signature, ak_of(running), nonce=NONCE[:-1] + b"E", pcrs=[])
    with pytest.raises(QuoteRefusedError, match="pcr digest"):
        verify(response.attest, response.signature, ak_of(running), nonce=NONCE, pcrs=[bytes(32)] * 2 + [b"\x01" * 32])


def test_nothing_is_left_behind(daemon: DaemonProcess, running: pb.Instance, tool: Bind) -> None:
    run = tool(running)
    kinds = ("handles-transient", "handles-persistent", "handles-loaded-session", "handles-saved-session", "handles-nv-index")

    def handles() -> list[bytes]:
        return [run("tpm2_getcap", kind).stdout for kind in kinds]

    before = handles()
    quote(daemon, running.name)
    daemon.client.call(daemon.client.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance=running.name))
    daemon.client.call(daemon.client.tpm.Measure, tpm_pb2.MeasureRequest(instance=running.name, pcr=16, data=b"x"))
    daemon.client.call(daemon.client.tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=running.name))
    assert handles() == before


def test_quotes_work_after_clear_and_changed_auths(daemon: DaemonProcess, running: pb.Instance, tool: Bind) -> None:
    run = tool(running)
    for hierarchy in ("owner", "endorsement", "lockout"):
        run("tpm2_changeauth", "-c", hierarchy, "secret")
        check(quote(daemon, running.name), ak_of(running))
    run("tpm2_clear", "-c", "l", "secret")
    check(quote(daemon, running.name), ak_of(running))
    daemon.vtpm("instance", "stop", running.name)
    daemon.vtpm("instance", "start", running.name)
    check(quote(daemon, running.name), ak_of(running))


def test_a_guests_session_and_locality_survive_a_quote_in_between(
    daemon: DaemonProcess, running: pb.Instance, tool: Bind, tmp_path: Path
) -> None:
    run = tool(running)
    run("tpm2_startauthsession", "-S", "session.ctx", "--policy-session")
    quote(daemon, running.name)
    run("tpm2_policypcr", "-S", "session.ctx", "-l", "sha256:0", "-L", "policy")
    quote(daemon, running.name)
    run("tpm2_flushcontext", "session.ctx")
    control = raw.connect(running.tpm_socket + ".ctrl")
    control.sendall(struct.pack(">IB", 5, 3))
    assert control.recv(4) == bytes(4)
    data = raw.connect(running.tpm_socket)
    # PCR 20 may be extended from locality 3 and not from 0.
    raw.succeed(data, raw.pcr_extend(20, b"\x01" * 32))
    quote(daemon, running.name)
    raw.succeed(data, raw.pcr_extend(20, b"\x02" * 32))


def test_commands_of_the_vm_and_of_the_operator_never_interleave(daemon: DaemonProcess, running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    rounds = 100
    problems: list[object] = []

    def vm() -> None:
        mine = raw.connect(running.tpm_socket)
        for _ in range(rounds):
            if code := raw.rc_of(raw.ask(mine, raw.nv_increment())):
                problems.append(code)

    def operator() -> None:
        request = tpm_pb2.ExecuteRequest(instance=running.name, command=raw.nv_increment())
        for _ in range(rounds):
            if code := raw.rc_of(daemon.client.call(daemon.client.tpm.Execute, request).response):
                problems.append(code)

    def verifier() -> None:
        for _ in range(rounds):
            check(quote(daemon, running.name), ak_of(running))

    first = threading.Thread(target=vm), threading.Thread(target=operator), threading.Thread(target=vm)
    for thread in first:
        thread.start()
    verifier()
    for thread in first:
        thread.join()
    assert not problems
    start = raw.counter_of(sock)
    raw.succeed(sock, raw.nv_increment())
    assert raw.counter_of(sock) == start + 1
    # A counter begins above zero by the standard's choice; its distance is what counts.
    other = raw.connect(daemon.running(f"{running.name}-b").tpm_socket)
    raw.succeed(other, raw.nv_define(raw.COUNTER, counter=True))
    raw.succeed(other, raw.nv_increment())
    assert start - raw.counter_of(other) == 3 * rounds - 1


def test_measurements_replay_to_the_pcrs(daemon: DaemonProcess, running: pb.Instance) -> None:
    import hashlib

    data = [b"shim", b"kernel", b"initrd"]
    for item in data:
        request = tpm_pb2.MeasureRequest(instance=running.name, pcr=9, data=item, event_data=b"event " + item)
        values = daemon.client.call(daemon.client.tpm.Measure, request).values
    for value in values:
        pcr = bytes(len(value.digest))
        for item in data:
            pcr = hashlib.new(value.hash_algorithm, pcr + hashlib.new(value.hash_algorithm, item).digest()).digest()
        assert pcr == value.digest
    log = daemon.client.call(daemon.client.tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=running.name)).event_log
    assert all(b"event " + item in log for item in data)
    daemon.vtpm("instance", "reset", running.name)
    empty = daemon.client.call(daemon.client.tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=running.name)).event_log
    assert b"event" not in empty.replace(b"Spec ID Event03", b"")
