"""The daemon's copies of hibernated instances' descriptors, which outlive the engine host; and copies of these outside.

A copy keeps a connection open, so that its peer does not see it end: copies are let go of as soon as their instance is awake.
What costs time for that, and the second copies in the service manager's store, comes a moment later, as somebody waits now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from vtpm.engine import descriptors, sandbox
from vtpm.engine.copy_names import Group, names_of
from vtpm.engine.v1 import link_pb2 as pb

log: Final = structlog.get_logger("vtpm.engine")

_LATER_S: Final = 0.02
# So many more go, so that it is not done again at once.
_SPARE_ROOM: Final = 64
# To count what is open takes the longer the more there is: not for each that comes, and often enough for what is kept free.
_LOOK_EVERY: Final = 16
# Which part of its descriptors a process keeps free of copies, as a divisor.
_KEPT_FREE: Final = 8
Key = tuple[str, int]


class DescriptorStore(Protocol):
    """Keeps descriptors, by their names, when this process is gone. Nothing depends on it, and no method raises."""

    def put(self, named: Sequence[tuple[str, int]]) -> bool:
        """Keep copies of descriptors; False if there is no room."""

    def remove(self, names: Collection[str]) -> None:
        """Let go of what has these names."""


class Room:
    """How many descriptors may be copies: this process' limit without what is open, `to_come`, and an eighth to spare."""

    def __init__(self, to_come: int) -> None:
        # What the sockets of instances are going to take, as long as the daemon starts.
        self.to_come = to_come

    def left(self) -> int:
        """Descriptors for further copies; below 0, how many copies have to go."""
        limit = sandbox.descriptor_limit()
        return limit - limit // _KEPT_FREE - self.to_come - sandbox.open_descriptors()


@dataclass(slots=True)
class Copies:
    """An instance's descriptors. `stored`: the outer store has them."""

    about: pb.ParkedInstance
    fds: list[int]
    stored: bool = False


class Belt:
    """Used from the event loop only. Without an `outer` store the copies end with this process.

    `room` tells how many descriptors more may be copies; below 0, how many of the copies have to go.
    """

    def __init__(self, outer: DescriptorStore | None = None, *, room: Callable[[], int] = lambda: 1 << 20) -> None:
        self._outer = outer
        self._room = room
        self._full = False
        # Descriptors that came since `room` was asked.
        self._unlooked = 0
        # By instance, which hibernates under one epoch at a time; the oldest first.
        self._copies: dict[str, Copies] = {}
        self._unstored: set[str] = set()
        self._unwanted_fds: list[int] = []
        self._unwanted_names: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, key: Key) -> bool:
        return self.get(key) is not None

    def get(self, key: Key) -> Copies | None:
        """Return the copies of an instance under an epoch, which stay here; None if there are none."""
        copies = self._copies.get(key[0])
        return copies if copies is not None and copies.about.epoch == key[1] else None

    def keep(self, about: pb.ParkedInstance, fds: list[int]) -> None:
        """Take an instance's descriptors, one for each role; an engine host of an older version gives none."""
        here = self.get((about.instance, about.epoch))
        if here is not None and here.about.snapshot_version == about.snapshot_version:
            self._unwanted_fds += fds
        elif len(fds) != len(about.roles):
            # An engine host of an older version gives none; or this process has no room for more.
            log.warning("engine.copies_missing", instance=about.instance, got=len(fds), wanted=len(about.roles))
            self._unwanted_fds += fds
        else:
            self.forget(about.instance)
            self._copies[about.instance] = Copies(about, fds)
            if about.snapshot_version and self._outer is not None:
                self._unstored.add(about.instance)
            self._unlooked += len(fds)
            if self._unlooked >= _LOOK_EVERY or self._full:
                self.make_room()
        self._later()

    @property
    def full(self) -> bool:
        """Whether copies had to go when one was made last."""
        return self._full

    def make_room(self) -> None:
        """Let go of the oldest copies, if this process needs their descriptors."""
        self._unlooked = 0
        missing = -self._room() - len(self._unwanted_fds)
        if missing <= 0:
            self._full = False
            return
        if not self._full:
            log.warning("engine.copies_full", instances=len(self._copies), descriptors_missing=missing)
        self._full = True
        missing += _SPARE_ROOM
        while missing > 0 and self._copies:
            instance, copies = next(iter(self._copies.items()))
            missing -= len(copies.fds)
            self.forget(instance)
        self.tidy()

    def keep_stored(self, group: Group) -> None:
        """Take an instance's descriptors that the outer store has given back, and still has."""
        self.keep(group.about, group.fds)
        copies = self.get((group.about.instance, group.about.epoch))
        if copies is None:
            self._unwanted_names += names_of(group.about)
            return
        copies.stored = True
        self._unstored.discard(group.about.instance)

    def refuse(self, names: Collection[str], fds: Sequence[int], reason: str) -> None:
        """Close descriptors that the outer store has given back and nobody can use, and have it let go of them."""
        log.warning("engine.stored_copies_closed", names=sorted(set(names)), reason=reason)
        self._unwanted_fds += fds
        self._unwanted_names += names
        self._later()

    def drop(self, key: Key) -> None:
        """Let go of the copies of an instance under an epoch, if they are here."""
        if key in self:
            self.forget(key[0])

    def used(self, key: Key, version: int) -> None:
        """A worker has gone on from the snapshot of that version: copies of then would only keep connections open.

        The instance may have hibernated again meanwhile.
        """
        copies = self.get(key)
        if copies is not None and copies.about.snapshot_version <= version:
            self.forget(key[0])

    def forget(self, instance: str) -> None:
        """Let go of an instance's copies, whatever their epoch."""
        copies = self._copies.pop(instance, None)
        if copies is None:
            return
        self._unwanted_fds += copies.fds
        if copies.stored:
            self._unwanted_names += names_of(copies.about)
        self._unstored.discard(instance)
        self._later()

    def _later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LATER_S, self.tidy)

    def tidy(self) -> None:
        """Do now what was put off."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        fds, self._unwanted_fds = self._unwanted_fds, []
        descriptors.close_all(fds)
        names, self._unwanted_names = self._unwanted_names, []
        unstored, self._unstored = self._unstored, set()
        if self._outer is None:
            return
        # First what goes: a store that finds a descriptor to be there already leaves it its old name.
        if names:
            self._outer.remove(set(names))
        for instance in unstored:
            copies = self._copies[instance]
            copies.stored = self._outer.put(list(zip(names_of(copies.about), copies.fds, strict=True)))

    def close(self) -> None:
        """Close the copies here; the outer store keeps its own for the next daemon."""
        self.tidy()
        for copies in self._copies.values():
            descriptors.close_all(copies.fds)
        self._copies.clear()
