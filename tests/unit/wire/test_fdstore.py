"""The service manager's descriptor store: how much may go in, and what is sent when."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtpm.wire.fdstore import MOST_NAMES_BYTES, ServiceManagerStore, notify_address
from vtpm.wire.systemd import inherited


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "n"))
        sock.settimeout(5)
        yield sock


def receive(manager: socket.socket) -> tuple[str, int]:
    """One message, and how many descriptors came with it."""
    text, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(253 * 4))
    fds = array.array("i")
    for _, _, payload in ancillary:
        fds.frombytes(payload)
    for fd in fds:
        os.close(fd)
    return text.decode(), len(fds)


def test_where_it_is() -> None:
    assert notify_address({"NOTIFY_SOCKET": "@abc"}) == "\0abc"
    assert notify_address({"NOTIFY_SOCKET": "/run/n"}) == "/run/n"
    assert notify_address({"NOTIFY_SOCKET": "vsock:2:1"}) is None
    assert ServiceManagerStore.open({}) is None
    assert ServiceManagerStore.open({"NOTIFY_SOCKET": "/run/n", "FDSTORE": "0"}) is None
    assert ServiceManagerStore.open({"NOTIFY_SOCKET": "/run/n"}) is None


async def test_a_message_for_each_name(manager: socket.socket) -> None:
    store = ServiceManagerStore(manager.getsockname(), 10)
    assert store.put([("a", 0), ("b", 1), ("a", 2)])
    assert receive(manager) == ("FDSTORE=1\nFDPOLL=0\nFDNAME=a", 2)
    assert receive(manager) == ("FDSTORE=1\nFDPOLL=0\nFDNAME=b", 1)
    store.remove(["a"])
    assert receive(manager) == ("FDSTOREREMOVE=1\nFDNAME=a", 0)
    store.close()


async def test_what_the_service_manager_has_no_time_for_comes_later_and_in_order(manager: socket.socket) -> None:
    store = ServiceManagerStore(manager.getsockname(), 10000)
    expected = []
    for number in range(2000):
        fd = os.dup(0)
        store.put([(f"n{number}", fd)])
        # The store has its own copy of what waits.
        os.close(fd)
        store.remove([f"n{number}"])
        expected += [(f"FDSTORE=1\nFDPOLL=0\nFDNAME=n{number}", 1), (f"FDSTOREREMOVE=1\nFDNAME=n{number}", 0)]
    found: list[tuple[str, int]] = []
    manager.setblocking(False)
    while len(found) < len(expected):
        try:
            found.append(receive(manager))
        except BlockingIOError:
            await asyncio.sleep(0.01)
    assert found == expected
    store.close()


async def test_no_more_than_it_takes_and_than_fits_into_one_environment_variable(manager: socket.socket) -> None:
    store = ServiceManagerStore(manager.getsockname(), 3, ["a", "a"])
    assert not store.put([("b", 0), ("c", 0)])
    assert store.put([("b", 0)])
    store.remove(["a"])
    assert store.put([("c", 0), ("d", 0)])
    assert not store.put([("e", 0)])
    store.close()
    store = ServiceManagerStore(manager.getsockname(), 1 << 20)
    count = 0
    while store.put([(f"{count:099}", 0)]):
        receive(manager)
        count += 1
    assert count == MOST_NAMES_BYTES // 100
    store.close()


async def test_nobody_there_is_no_error(tmp_path: Path) -> None:
    store = ServiceManagerStore(str(tmp_path / "nobody"), 10)
    assert store.put([("a", 0)])
    store.remove(["a", "b"])
    store.close()


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "vtpm1.x", "PATH": "/bin"}
    found = inherited(environment)
    assert (found.listener, found.stored) == (None, [])
    assert environment == {"PATH": "/bin"}
