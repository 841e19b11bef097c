"""Hibernated instances in the engine host: their descriptors, held open and watched until something comes for them."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vtpm.engine import descriptors
from vtpm.engine.v1 import link_pb2 as pb


@dataclass(slots=True)
class _Place:
    about: pb.ParkedInstance
    fds: list[int]


class Parking:
    """One poll set for all parked descriptors, so that an instance costs its descriptors and little more.

    `on_wake` is called once when something has come for an instance: a byte, a connection, or a peer's end.
    """

    def __init__(self, on_wake: Callable[[pb.ParkedInstance], None]) -> None:
        self._on_wake = on_wake
        self._places: dict[str, _Place] = {}
        self._by_fd: dict[int, _Place] = {}
        self._epoll = select.epoll()

    def fileno(self) -> int:
        """Readable when `serve` has something to do."""
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, instance: str) -> bool:
        return instance in self._places

    def add(self, about: pb.ParkedInstance, fds: list[int]) -> None:
        """Hold and watch an instance's descriptors, one for each of its roles.

        Raises:
            ValueError: it is here already, or roles and descriptors do not match. The descriptors stay the caller's.
        """
        if about.instance in self._places or len(about.roles) != len(fds):
            raise ValueError("the instance is parked already, or its descriptors are not complete")
        place = self._places[about.instance] = _Place(about, fds)
        if not about.woken:
            try:
                for fd in fds:
                    self._epoll.register(fd, select.EPOLLIN)
                    self._by_fd[fd] = place
            except OSError as error:
                self.take(about.instance)
                raise ValueError("that can't be watched") from error

    def serve(self) -> None:
        """Tell of the instances for which something has come."""
        for fd, _event in self._epoll.poll(0, 64):
            place = self._by_fd.get(fd)
            if place is not None:
                place.about.woken = True
                self._unwatch(place)
                self._on_wake(place.about)

    def _unwatch(self, place: _Place) -> None:
        for fd in place.fds:
            if self._by_fd.pop(fd, None) is not None:
                # Closing is not enough, as others hold the same open file.
                self._epoll.unregister(fd)

    def look(self, instance: str) -> tuple[pb.ParkedInstance, list[int]] | None:
        """Return an instance's descriptors, which stay here; None if it is not here."""
        place = self._places.get(instance)
        return None if place is None else (place.about, place.fds)

    def take(self, instance: str) -> tuple[pb.ParkedInstance, list[int]]:
        """Stop watching and give the descriptors away.

        Raises:
            KeyError: it is not here.
        """
        place = self._places.pop(instance)
        self._unwatch(place)
        return place.about, place.fds

    def forget(self, instance: str) -> None:
        """Close an instance's descriptors, if it is here."""
        if instance in self._places:
            descriptors.close_all(self.take(instance)[1])

    def all(self) -> Iterator[pb.ParkedInstance]:
        """What is parked."""
        for place in self._places.values():
            yield place.about

    def hand_over(self) -> Iterator[tuple[pb.ParkedInstance, list[int]]]:
        """Give everything away, one by one."""
        for instance in list(self._places):
            yield self.take(instance)
