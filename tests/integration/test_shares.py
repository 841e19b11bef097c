"""What hostile guests can't take from the daemon, its operators and each other by way of their guest sockets."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.support import http2
from tests.support.daemon import DaemonProcess
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.errors import VtpmError

MEBIBYTE = 1 << 20
RECEIVE_TIMEOUT_S, IDLE_TIMEOUT_S = 1, 3
# Of one guest at once, by default.
GUEST_CALLS = 32


@pytest.fixture(scope="module")
def bounded() -> Iterator[DaemonProcess]:
    """A daemon with short deadlines."""
    settings = {"VTPM_RECEIVE_TIMEOUT_S": str(RECEIVE_TIMEOUT_S), "VTPM_STREAM_IDLE_TIMEOUT_S": str(IDLE_TIMEOUT_S)}
    with DaemonProcess(environment=settings) as process:
        yield process


@pytest.fixture
def many_files() -> Iterator[None]:
    """Leave to open some thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def pid_of(daemon: DaemonProcess) -> int:
    assert daemon.process is not None
    return daemon.process.pid


def resident(daemon: DaemonProcess) -> int:
    """Bytes of the daemon that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid_of(daemon)}/status").read_text())
    assert found
    return int(found[1]) << 10


def descriptors(daemon: DaemonProcess) -> int:
    return sum(1 for _ in Path(f"/proc/{pid_of(daemon)}/fd").iterdir())


def is_served(daemon: DaemonProcess, instance: pb.Instance) -> None:
    """An operator and an honest guest get their answers."""
    daemon.get(instance.name)
    guest = Client(f"unix:{instance.guest_socket}")
    guest.call(guest.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest())
    guest.close()


def is_refused(guest: Client, *reasons: str) -> bool:
    """Whether a guest's call is refused for one of `reasons` now."""
    try:
        guest.call(guest.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest())
    except VtpmError as error:
        return error.reason in reasons
    return False


def all_but_the_last_byte(path: str, calls: int, size: int) -> socket.socket:
    """A connection with `calls` calls, each of a message of `size` bytes without its last, as far as they are taken."""
    sock, windows = http2.connect(path), http2.Windows()
    sock.settimeout(1)
    with contextlib.suppress(TimeoutError, ConnectionError):
        for stream in range(1, 2 * calls, 2):
            sock.sendall(http2.call(stream, http2.MEASURE))
            left = len(http2.prefix(size)) + size - 1
            begin = http2.prefix(size)
            while left:
                if taken := windows.take(stream, left):
                    sock.sendall(http2.frame(http2.DATA, 0, stream, (begin + bytes(taken))[:taken]))
                    begin, left = b"", left - taken
                else:
                    data = sock.recv(65536)
                    if not data:
                        return sock
                    sock.sendall(windows.heard(data))
    return sock


def open_streams(path: str, count: int) -> socket.socket:
    """A connection with `count` streams on which nothing comes."""
    sock = http2.connect(path)
    sock.sendall(b"".join(http2.call(stream, http2.EXECUTE_STREAM) for stream in range(1, 2 * count, 2)))
    return sock


def hear(sock: socket.socket, word: bytes) -> None:
    """Read until the daemon says `word`."""
    heard = b""
    while word not in heard:
        data = sock.recv(65536)
        assert data, f"the connection was closed without {word!r}"
        heard += data


def test_32_large_calls_of_one_guest_cost_the_daemon_little(bounded: DaemonProcess) -> None:
    hostile, honest = bounded.running("large"), bounded.running("beside-large")
    is_served(bounded, hostile)
    before = resident(bounded)
    held = [all_but_the_last_byte(hostile.guest_socket, 32, 4 * MEBIBYTE)]
    is_served(bounded, honest)
    held += [all_but_the_last_byte(hostile.guest_socket, 4, MEBIBYTE) for _ in range(3)]
    is_served(bounded, honest)
    assert resident(bounded) - before < 24 * MEBIBYTE
    for sock in held:
        sock.close()


def test_a_request_that_no_guest_needs_is_refused_by_kind(bounded: DaemonProcess) -> None:
    guest = Client(f"unix:{bounded.running('kinds').guest_socket}")
    guest.call(guest.tpm.Measure, tpm_pb2.MeasureRequest(pcr=16, data=bytes(MEBIBYTE)))
    with pytest.raises(VtpmError, match="larger than max"):
        guest.call(guest.tpm.Measure, tpm_pb2.MeasureRequest(pcr=16, data=bytes(2 * MEBIBYTE)))
    with pytest.raises(VtpmError) as caught:
        guest.call(guest.tpm.Quote, tpm_pb2.QuoteRequest(nonce=bytes(MEBIBYTE)))
    assert caught.value.reason == "REQUEST_TOO_LARGE"
    with pytest.raises(grpc.RpcError) as refused:
        guest.tpm.Measure(tpm_pb2.MeasureRequest(pcr=16, data=bytes(MEBIBYTE)), compression=grpc.Compression.Gzip)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    guest.close()


def test_large_requests_of_one_guest_at_once_are_all_served(bounded: DaemonProcess) -> None:
    path = bounded.running("measured").guest_socket
    guests = [Client(f"unix:{path}") for _ in range(2)]
    request = tpm_pb2.MeasureRequest(pcr=16, data=bytes(MEBIBYTE))
    # On one connection and on two: their pieces come mixed.
    with guests[0].errors(), guests[1].errors():
        calls = [guest.tpm.Measure.future(request, timeout=60) for guest in guests for _ in range(6)]
        assert all(call.result().values for call in calls)
    for guest in guests:
        guest.close()


def test_unfinished_messages_of_many_guests_have_a_bound_together() -> None:
    with DaemonProcess(environment={"VTPM_RECEIVE_TIMEOUT_S": "600"}) as daemon:
        guests = [daemon.running(f"vm-{number}") for number in range(24)]
        honest = daemon.running("honest")
        is_served(daemon, honest)
        before = resident(daemon)
        paths = [guest.guest_socket for guest in guests for _ in range(4)]
        with ThreadPoolExecutor(24) as pool:
            held = list(pool.map(lambda path: all_but_the_last_byte(path, 4, MEBIBYTE), paths))
        is_served(daemon, honest)
        # All of it would be 384 MiB, and one large message of each guest 24 beside what the connections cost.
        assert resident(daemon) - before < 40 * MEBIBYTE
        for sock in held:
            sock.close()


def test_the_17th_guest_gets_in_beside_16_with_silent_streams() -> None:
    with DaemonProcess(environment={"VTPM_MAX_CALLS": "64"}) as daemon:
        hostile = [daemon.running(f"vm-{number}") for number in range(16)]
        honest = daemon.running("honest")
        held = [open_streams(guest.guest_socket, 32) for guest in hostile]
        another = Client(f"unix:{hostile[0].guest_socket}")
        eventually(lambda: is_refused(another, "TOO_MANY_CALLS", "TOO_MANY_GUEST_CALLS"))
        is_served(daemon, honest)
        another.close()
        for sock in held:
            sock.close()


@pytest.mark.usefixtures("many_files")
def test_5000_connections_to_one_socket_cost_as_many_descriptors_as_one_guest_may_have(bounded: DaemonProcess) -> None:
    hostile, honest = bounded.running("flood"), bounded.running("beside-flood")
    is_served(bounded, honest)
    before = descriptors(bounded)
    held = []
    for number in range(5000):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(hostile.guest_socket)
        held.append(sock)
        if number % 1000 == 0:
            is_served(bounded, honest)
            assert descriptors(bounded) - before < 64
    is_served(bounded, honest)
    assert descriptors(bounded) - before < 64
    for sock in held:
        sock.close()


def test_when_all_connections_are_taken_a_guest_without_one_gets_one() -> None:
    with DaemonProcess(environment={"VTPM_MAX_ALL_GUEST_CONNECTIONS": "16"}) as daemon:
        hostile = [daemon.running(f"vm-{number}") for number in range(5)]
        honest = daemon.running("honest")
        held = [open_streams(guest.guest_socket, 1) for guest in hostile for _ in range(4)]
        is_served(daemon, honest)
        assert any(http2.closed(sock) for sock in held)
        for sock in held:
            sock.close()


def test_a_request_that_does_not_come_is_given_up_by_name(bounded: DaemonProcess) -> None:
    sock = http2.connect(bounded.running("late").guest_socket)
    sock.sendall(http2.call(1, http2.EXECUTE) + http2.message(1, bytes(100))[:-1])
    hear(sock, b"the request was not there")
    eventually(lambda: "REQUEST_LATE" in bounded.log_text())
    sock.close()


def test_a_stream_whose_message_does_not_end_is_cut(bounded: DaemonProcess) -> None:
    sock = http2.connect(bounded.running("half").guest_socket)
    sock.sendall(http2.call(1, http2.EXECUTE_STREAM) + http2.message(1, bytes(100))[:-1])
    eventually(lambda: http2.closed(sock))
    eventually(lambda: "MESSAGE_LATE" in bounded.log_text())
    sock.close()


def test_a_stream_without_messages_ends_by_name(bounded: DaemonProcess) -> None:
    sock = open_streams(bounded.running("idle").guest_socket, 1)
    hear(sock, b"no message has come or gone")
    eventually(lambda: "STREAM_IDLE" in bounded.log_text())
    sock.close()


def test_a_guest_that_watches_its_health_without_end_uses_its_own_calls(bounded: DaemonProcess) -> None:
    instance = bounded.running("healthy")
    watch = "/grpc.health.v1.Health/Watch"
    # Some more than it may have, as a call that comes between takes the place of one; for each nothing is read for a moment.
    streams = range(1, 2 * (GUEST_CALLS + 2), 2)
    watches = b"".join(http2.call(stream, watch) + http2.message(stream, b"") for stream in streams)
    guest = Client(f"unix:{instance.guest_socket}")

    def takes_all() -> bool:
        # They end when they were silent for a while: on a slow machine before the guest's other call is there.
        with http2.connect(instance.guest_socket) as sock:
            sock.sendall(watches)
            deadline = time.monotonic() + IDLE_TIMEOUT_S
            while not (refused := is_refused(guest, "TOO_MANY_GUEST_CALLS")) and time.monotonic() < deadline:
                pass
            return refused

    eventually(takes_all, 60)
    # And they end as other streams do.
    eventually(lambda: not is_refused(guest, "TOO_MANY_GUEST_CALLS"))
    guest.close()


def test_answers_that_a_guest_does_not_take_are_not_kept(bounded: DaemonProcess) -> None:
    instance = bounded.running("takes-nothing")
    sock = http2.connect(instance.guest_socket)
    sock.sendall(http2.shut_window())
    sock.sendall(b"".join(http2.call(n, http2.GET_EVENT_LOG) + http2.message(n, b"") for n in range(1, 17, 2)))
    eventually(lambda: http2.closed(sock))
    sock.close()
    is_served(bounded, instance)


def test_what_a_guest_does_wrong_again_and_again_does_not_fill_the_log(bounded: DaemonProcess) -> None:
    guest = Client(f"unix:{bounded.running('loud').guest_socket}")
    before = len(bounded.log_text())
    for _ in range(300):
        with pytest.raises(VtpmError, match="locality 0"):
            guest.call(guest.tpm.Execute, tpm_pb2.ExecuteRequest(locality=3))
    assert len(bounded.log_text()) - before < 10_000
    guest.close()
