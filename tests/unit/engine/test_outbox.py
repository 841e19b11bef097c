"""A daemon that does not read holds up nobody: what it is told waits, in order, with its descriptors, and not without end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtpm.engine import descriptors
from vtpm.engine.outbox import MAX_WAITING_BYTES, Outbox, UnreadError

Pair = tuple[Outbox, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    outbox = Outbox(ours)
    yield outbox, theirs
    outbox.close()
    ours.close()
    theirs.close()


def filled(outbox: Outbox) -> list[bytes]:
    """Send until something waits; return what was sent."""
    sent: list[bytes] = []
    while not outbox.waiting:
        sent.append(b"%d" % len(sent))
        outbox.send(sent[-1])
    return sent


def test_what_has_room_goes_at_once(pair: Pair) -> None:
    outbox, daemon = pair
    outbox.send(b"wake")
    assert not outbox.waiting
    assert daemon.recv(100) == b"wake"


def test_what_has_no_room_waits_in_its_order(pair: Pair) -> None:
    outbox, daemon = pair
    sent = filled(outbox)
    for number in range(100):
        sent.append(b"later %d" % number)
        outbox.send(sent[-1])
    received: list[bytes] = []
    while len(received) < len(sent):
        received.append(daemon.recv(100))
        outbox.flush()
    assert received == sent
    assert not outbox.waiting


def test_descriptors_that_wait_stay_open_whatever_their_owner_does(pair: Pair) -> None:
    outbox, daemon = pair
    sent = filled(outbox)
    reader, writer = os.pipe()
    outbox.send(b"with one", [writer])
    os.close(writer)
    for _ in sent:
        daemon.recv(100)
        outbox.flush()
    message, fds = descriptors.receive(daemon, 100)
    assert message == b"with one"
    os.write(fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    descriptors.close_all([reader, *fds])


def test_a_daemon_that_never_reads_is_given_up(pair: Pair) -> None:
    outbox, _daemon = pair
    message = bytes(1000)

    def tell_more_and_more() -> None:
        for _ in range(MAX_WAITING_BYTES // len(message) + 1000):
            outbox.send(message)

    with pytest.raises(UnreadError):
        tell_more_and_more()


def test_copies_that_wait_are_bounded_and_the_messages_go_without_them(pair: Pair) -> None:
    outbox, _daemon = pair
    filled(outbox)
    reader, writer = os.pipe()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2000):
        outbox.send(b"exited", [writer], optional=True)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 1024
    outbox.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    descriptors.close_all([reader, writer])
