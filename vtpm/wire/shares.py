"""Connections of many guests under one total: nobody has more than so many, and who has least is the last to go without."""

from __future__ import annotations

import uuid
from typing import Protocol


class Held(Protocol):
    """A connection that is open."""

    @property
    def active(self) -> float:
        """When it last brought something (time.monotonic)."""

    def cut(self) -> None:
        """End it: another guest needs its place."""


class ConnectionShares:
    """Counts connections before anything is made for them. Used from the event loop only.

    `each`: at most so many for one guest; `total`: of all together. When all are taken, a newcomer with less than others gets
    the place of the connection that has been silent the longest among those of the guest that has most.
    """

    def __init__(self, each: int, total: int) -> None:
        self._each = each
        self._total = total
        self._guests: dict[uuid.UUID, set[Held]] = {}
        self._count = 0

    def enter(self, guest: uuid.UUID, connection: Held) -> bool:
        """Count a connection in and return True, or return False."""
        has = len(self._guests.get(guest, ()))
        if has >= self._each or (self._count >= self._total and not self._make_place(has)):
            return False
        self._guests.setdefault(guest, set()).add(connection)
        self._count += 1
        return True

    def leave(self, guest: uuid.UUID, connection: Held) -> None:
        """Count a connection out; one that is counted out already is let be."""
        held = self._guests.get(guest)
        if held is None or connection not in held:
            return
        held.remove(connection)
        self._count -= 1
        if not held:
            del self._guests[guest]

    def _make_place(self, has: int) -> bool:
        """End a connection of the guest that has most, if one with `has` is to have its place."""
        most = max(len(held) for held in self._guests.values())
        # A guest that has none takes even another's only one, which comes back when there is something to say.
        if has and most <= has + 1:
            return False
        candidates = [(connection, guest) for guest, held in self._guests.items() if len(held) == most for connection in held]
        victim, guest = min(candidates, key=lambda each: each[0].active)
        self.leave(guest, victim)
        victim.cut()
        return True
