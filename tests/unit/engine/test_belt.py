"""The belt: whose descriptors are kept how long, and what the outer store hears of it."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Collection, Sequence

from vtpm.engine import descriptors
from vtpm.engine.belt import Belt, Room
from vtpm.engine.copy_names import names_of
from vtpm.engine.rescue import batches
from vtpm.engine.v1 import link_pb2 as pb

INSTANCE = str(uuid.UUID(int=1))


class Store:
    """Has what it was given, by name; there is room for `most`."""

    def __init__(self, most: int = 100) -> None:
        self.names: list[str] = []
        self.most = most

    def put(self, named: Sequence[tuple[str, int]]) -> bool:
        if len(self.names) + len(named) > self.most:
            return False
        self.names += [name for name, _ in named]
        return True

    def remove(self, names: Collection[str]) -> None:
        self.names = [name for name in self.names if name not in names]


def parked(version: int, epoch: int = 1) -> tuple[pb.ParkedInstance, list[int], socket.socket]:
    """An instance with one connection, and that one's other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    about = pb.ParkedInstance(instance=INSTANCE, epoch=epoch, snapshot_version=version, roles=[pb.DATA])
    return about, [ours.detach()], theirs


def closed(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


async def test_what_was_used_is_closed_a_moment_later_and_what_came_since_is_kept() -> None:
    store = Store()
    belt = Belt(store)
    about, fds, first = parked(1)
    belt.keep(about, fds)
    await asyncio.sleep(0.05)
    assert store.names == names_of(about)
    again, fds, second = parked(2)
    # It hibernated again before the answer to its thaw was heard.
    belt.keep(again, fds)
    belt.used((INSTANCE, 1), 1)
    assert (INSTANCE, 1) in belt
    await asyncio.sleep(0.05)
    assert closed(first)
    assert not closed(second)
    assert store.names == names_of(again)
    belt.used((INSTANCE, 1), 2)
    assert (INSTANCE, 1) not in belt
    await asyncio.sleep(0.05)
    assert closed(second)
    assert store.names == []


async def test_a_short_rest_is_not_told_to_the_store() -> None:
    store = Store(0)
    belt = Belt(store)
    about, fds, peer = parked(1)
    belt.keep(about, fds)
    belt.used((INSTANCE, 1), 1)
    belt.tidy()
    assert closed(peer)
    assert store.names == []


async def test_the_same_twice_and_too_few_are_not_kept() -> None:
    belt = Belt()
    about, fds, first = parked(1)
    belt.keep(about, fds)
    _, fds, second = parked(1)
    belt.keep(about, fds)
    other, fds, third = parked(1, epoch=2)
    other.roles.append(pb.CONTROL)
    belt.keep(other, fds)
    belt.tidy()
    assert not closed(first)
    assert closed(second)
    assert closed(third)
    assert (INSTANCE, 2) not in belt
    belt.close()
    assert closed(first)


def test_a_batch_has_as_many_as_one_message_takes() -> None:
    instances = [pb.ParkedInstance(instance=str(number), roles=[pb.DATA] * (1 + number % 60)) for number in range(500)]
    found = list(batches(instances))
    assert [name for batch in found for name in batch] == [item.instance for item in instances]
    sizes = [sum(len(instances[int(name)].roles) for name in batch) for batch in found]
    assert max(sizes) <= 253
    assert min(sizes[:-1]) > 253 - 60
    assert list(batches([])) == []


async def test_the_oldest_copies_go_where_their_descriptors_are_needed() -> None:
    room = 1000
    belt = Belt(room=lambda: room)
    peers = []
    for number in range(100):
        about, fds, peer = parked(1)
        about.instance = str(uuid.UUID(int=number))
        belt.keep(about, fds)
        peers.append(peer)
    belt.make_room()
    assert not belt.full
    assert not any(closed(peer) for peer in peers)
    # Ten, and some more, so that it does not begin again with the next one.
    room = -10
    belt.make_room()
    assert belt.full
    assert [closed(peer) for peer in peers] == [True] * 74 + [False] * 26
    about, fds, peer = parked(1)
    belt.keep(about, fds)
    assert all(closed(each) for each in [*peers, peer])
    room = 1
    about, fds, peer = parked(2)
    belt.keep(about, fds)
    belt.tidy()
    assert not belt.full
    assert not closed(peer)
    belt.close()


def test_room_is_what_the_limit_leaves() -> None:
    room = Room(to_come=0)
    free = room.left()
    room.to_come = 100
    assert room.left() == free - 100
    # An older kernel does not count, and tells about as many.
    opened = [os.eventfd(0) for _ in range(200)]
    try:
        assert free - 310 <= room.left() <= free - 200
    finally:
        descriptors.close_all(opened)
    assert room.left() == free - 100
