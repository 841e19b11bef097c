"""What a VM may not take from others: commands wait in their sockets, calls are refused by name, nothing is lost."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.errors import VtpmError

RATE, BURST = 50, 20


@pytest.fixture(scope="module")
def limited() -> Iterator[DaemonProcess]:
    """A daemon whose instances run 50 commands a second and take 3 connections."""
    settings = {"VTPM_COMMAND_RATE": str(RATE), "VTPM_COMMAND_BURST": str(BURST), "VTPM_MAX_CONNECTIONS": "3"}
    with DaemonProcess(environment=settings) as process:
        yield process


def test_a_flood_waits_and_every_command_is_answered(limited: DaemonProcess) -> None:
    sock = raw.connect(limited.running("flood").tpm_socket)
    count = BURST + RATE
    start = time.monotonic()
    for _ in range(count):
        raw.succeed(sock, raw.pcr_read(0))
    # The bound is on the slow side alone: a slow machine only makes it longer.
    assert time.monotonic() - start >= (count - BURST) / RATE - 0.05


def test_pipelined_commands_wait_too_and_are_all_answered(limited: DaemonProcess) -> None:
    sock = raw.connect(limited.running("pipeline").tpm_socket)
    sock.sendall(raw.get_random(4) * (BURST + 30))
    data = b""
    while len(data) < (BURST + 30) * 16:
        data += sock.recv(65536)
    start = time.monotonic()
    raw.succeed(sock, raw.pcr_read(0))
    assert time.monotonic() - start >= 0.3, "what came at once is owed for"


def test_connecting_anew_gets_nobody_ahead(limited: DaemonProcess) -> None:
    path = limited.running("anew").tpm_socket
    start = time.monotonic()
    for _ in range(BURST + 25):
        with raw.connect(path) as sock:
            raw.succeed(sock, raw.pcr_read(0))
    assert time.monotonic() - start >= 25 / RATE - 0.05


def test_a_vm_that_waits_does_not_keep_its_operator_waiting(limited: DaemonProcess) -> None:
    instance = limited.running("owing")
    sock = raw.connect(instance.tpm_socket)
    # 400 commands at once: eight seconds' worth.
    sock.sendall(raw.get_random(4) * 340)
    assert select.select([sock], [], [], 10)[0]
    limited.client.call(limited.client.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance="owing"))
    limited.vtpm("instance", "stop", "owing")


def test_one_instance_too_many_connections_leaves_the_first_alone(limited: DaemonProcess) -> None:
    path = limited.running("crowd").tpm_socket
    first = [raw.connect(path) for _ in range(3)]
    for sock in first:
        raw.succeed(sock, raw.pcr_read(0))
    assert _is_closed(raw.connect(path))
    for sock in first:
        raw.succeed(sock, raw.pcr_read(0))


def _is_closed(sock: socket.socket) -> bool:
    try:
        return raw.ask(sock, raw.pcr_read(0)) == b""
    except OSError:
        return True


def test_a_guest_that_calls_too_fast_is_refused_by_name_and_its_operator_is_not(limited: DaemonProcess) -> None:
    instance = limited.running("caller")
    guest = Client(f"unix:{instance.guest_socket}")

    def call_without_a_pause() -> None:
        for _ in range(50 * BURST):
            guest.call(guest.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance="caller"))

    with pytest.raises(VtpmError) as caught:
        call_without_a_pause()
    assert caught.value.reason == "CALL_RATE_EXCEEDED"
    assert caught.value.kind.value == "RESOURCE_EXHAUSTED"
    limited.client.call(limited.client.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance="caller"))
    guest.close()
