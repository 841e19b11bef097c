"""Hostile and broken clients on a VM's sockets: the TPM's own error or a closed connection; nobody else notices."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.tpm.command import HEADER

TPM_RC_COMMAND_SIZE = 0x142
TPM_RC_COMMAND_CODE = 0x143
TPM_RC_INSUFFICIENT = 0x09A


@pytest.fixture(autouse=True)
def _nobody_else_notices(daemon: DaemonProcess, running: pb.Instance) -> Iterator[None]:
    """A neighbour, the daemon and, through a new connection, the instance itself are as well afterwards as before."""
    neighbour = raw.connect(daemon.running(f"{running.name}-neighbour").tpm_socket)
    before = raw.succeed(neighbour, raw.pcr_read(0))
    yield
    assert raw.succeed(neighbour, raw.pcr_read(0)) == before
    assert daemon.get(running.name).state == pb.ON
    raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(0))


def closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_unknown_ordinals_get_the_tpms_own_error(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    for ordinal in (0, 0x11E, 0x20000000, 0x7FFFFFFF, 0xFFFFFFFF):
        assert raw.rc_of(raw.ask(sock, struct.pack(">HII", 0x8001, 10, ordinal))) == TPM_RC_COMMAND_CODE


def test_a_body_that_is_too_short_gets_the_tpms_own_error(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    whole = raw.pcr_read(0, 1)
    for size in range(10, len(whole)):
        cut = struct.pack(">HI", 0x8001, size) + whole[6:size]
        assert raw.rc_of(raw.ask(sock, cut)) & 0x0BF == TPM_RC_INSUFFICIENT, size


@pytest.mark.parametrize("announced", [0, 1, 9, 4097, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_size_that_cannot_be_is_answered_and_the_connection_closed(running: pb.Instance, announced: int) -> None:
    sock = raw.connect(running.tpm_socket)
    response = raw.ask(sock, struct.pack(">HII", 0x8001, announced, 0x17E))
    assert raw.rc_of(response) == TPM_RC_COMMAND_SIZE
    assert closed(sock)


def test_a_size_that_lies_makes_the_tpm_wait_for_the_rest_and_no_longer_than_it_should(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    sock.settimeout(30)
    command = raw.pcr_read(0)
    sock.sendall(struct.pack(">HI", 0x8001, len(command) + 4) + command[6:])
    # Others are served while this one is waited for.
    raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(0))
    assert closed(sock), "half a command and then silence ends in a closed connection"


def test_4096_bytes_are_a_command_and_4097_are_not(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    assert raw.rc_of(raw.ask(sock, struct.pack(">HII", 0x8001, 4096, 0x17E) + bytes(4086)))
    raw.succeed(sock, raw.pcr_read(0))
    sock.sendall(struct.pack(">HII", 0x8001, 4097, 0x17E) + bytes(4087))
    assert raw.rc_of(raw.receive(sock)) == TPM_RC_COMMAND_SIZE


@pytest.mark.parametrize("size", [0, 1, 9, 10, 4096])
def test_raw_commands_of_every_length_over_grpc_get_the_tpms_own_error(
    daemon: DaemonProcess, running: pb.Instance, size: int
) -> None:
    request = tpm_pb2.ExecuteRequest(instance=running.name, command=os.urandom(size))
    response = daemon.client.call(daemon.client.tpm.Execute, request).response
    assert HEADER.unpack_from(response)[1] == len(response)
    assert raw.rc_of(response)


def test_a_raw_command_that_no_tpm_could_hold_is_refused_over_grpc(daemon: DaemonProcess, running: pb.Instance) -> None:
    done = daemon.vtpm("execute", running.name, bytes(4097).hex(), check=False)
    assert done.returncode == 2
    assert b"COMMAND_TOO_LARGE" in done.stderr


def test_commands_in_pieces_and_several_at_once_are_answered_in_order(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    stream = raw.pcr_read(0) + raw.get_random(4) + raw.pcr_read(1) + raw.get_random(9)
    for byte in stream:
        sock.send(bytes([byte]))
    sizes = [len(raw.receive(sock)) for _ in range(1)]
    assert sizes
    other = raw.connect(running.tpm_socket)
    other.sendall(raw.get_random(4) + raw.get_random(8) + raw.get_random(12))
    data = b""
    while len(data) < 3 * 12 + 24:
        data += other.recv(4096)
    assert [len(data[:16]), len(data[16:36]), len(data[36:60])] == [16, 20, 24]
    assert HEADER.unpack_from(data)[1] == 16
    assert HEADER.unpack_from(data, 16)[1] == 20
    assert HEADER.unpack_from(data, 36)[1] == 24


def test_a_client_that_never_reads_is_dropped_and_others_are_served(running: pb.Instance) -> None:
    sock = raw.connect(running.tpm_socket)
    command = raw.get_random(48)
    sock.settimeout(5)
    with pytest.raises(OSError, match=r"Broken pipe|reset|timed out"):  # noqa: PT012  # when it is dropped is the worker's affair
        for _ in range(100_000):
            sock.sendall(command)
        raise TimeoutError("timed out")
    raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(0))


def test_more_connections_than_the_limit_are_refused_and_the_first_ones_work_on(running: pb.Instance) -> None:
    first = raw.connect(running.tpm_socket)
    raw.succeed(first, raw.pcr_read(0))
    others = [raw.connect(running.tpm_socket) for _ in range(40)]
    raw.succeed(first, raw.pcr_read(0))
    for sock in others:
        sock.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(0))
            break
        except (AssertionError, OSError, struct.error):
            assert time.monotonic() < deadline


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=64), st.binary(min_size=10, max_size=40).map(lambda b: struct.pack(">HI", 0x8001, len(b)) + b[6:])
    )
)
def test_garbage_on_the_data_socket(running: pb.Instance, data: bytes) -> None:
    sock = raw.connect(running.tpm_socket)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_garbage_on_the_control_socket(running: pb.Instance, data: bytes) -> None:
    sock = raw.connect(running.tpm_socket + ".ctrl")
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass


@pytest.mark.parametrize("which", ["operator.sock", "guest.sock"])
def test_garbage_on_the_grpc_sockets(daemon: DaemonProcess, running: pb.Instance, which: str) -> None:
    path = str(daemon.runtime_dir / which) if which == "operator.sock" else running.guest_socket
    numbers = random.Random(7)
    for size in (1, 24, 1000, 100_000):
        sock = raw.connect(path)
        try:
            sock.sendall(numbers.randbytes(size))
            while sock.recv(4096):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
    daemon.get(running.name)
