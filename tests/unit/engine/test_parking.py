"""The engine host's parking: descriptors are held, watched, and given away whole."""

from __future__ import annotations

import os
import select
import socket

import pytest

from vtpm.engine.parking import Parking
from vtpm.engine.v1 import link_pb2 as pb


def parked(parking: Parking, name: str, count: int = 2) -> list[socket.socket]:
    """Park an instance with the one ends of `count` pairs; return the other ends."""
    pairs = [socket.socketpair() for _ in range(count)]
    about = pb.ParkedInstance(instance=name, epoch=1, roles=[pb.DATA] * count)
    parking.add(about, [ours.detach() for ours, _ in pairs])
    return [theirs for _, theirs in pairs]


@pytest.fixture
def woken() -> list[str]:
    """The instances that woke."""
    return []


@pytest.fixture
def parking(woken: list[str]) -> Parking:
    """A parking that notes who wakes."""
    return Parking(lambda about: woken.append(about.instance))


def test_a_byte_or_an_end_wakes_once(parking: Parking, woken: list[str]) -> None:
    first, second = parked(parking, "a")
    (other,) = parked(parking, "b", 1)
    parking.serve()
    assert woken == []
    first.sendall(b"x")
    second.close()
    assert select.select([parking.fileno()], [], [], 1)[0]
    parking.serve()
    parking.serve()
    assert woken == ["a"]
    other.close()
    parking.serve()
    assert woken == ["a", "b"]
    assert [about.woken for about in parking.all()] == [True, True]


def test_what_is_taken_is_whole_and_watched_no_more(parking: Parking, woken: list[str]) -> None:
    peers = parked(parking, "a", 3)
    about, fds = parking.take("a")
    assert list(about.roles) == [pb.DATA] * 3
    for fd, peer in zip(fds, peers, strict=True):
        os.write(fd, b"x")
        assert peer.recv(1) == b"x"
        peer.sendall(b"y")
    parking.serve()
    assert woken == []
    assert "a" not in parking
    with pytest.raises(KeyError):
        parking.take("a")


def test_the_same_instance_twice_and_missing_descriptors_are_refused(parking: Parking) -> None:
    parked(parking, "a")
    with pytest.raises(ValueError, match="parked already"):
        parked(parking, "a")
    with pytest.raises(ValueError, match="not complete"):
        parking.add(pb.ParkedInstance(instance="b", epoch=1, roles=[pb.DATA]), [])


def test_forgotten_is_closed(parking: Parking) -> None:
    (peer,) = parked(parking, "a", 1)
    parking.forget("a")
    parking.forget("a")
    assert peer.recv(1) == b""
    assert len(parking) == 0
