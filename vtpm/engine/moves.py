"""Hibernated instances in the engine host: how they come to rest, and how they go to workers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from vtpm.engine import descriptors
from vtpm.engine.parking import Parking
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb

if TYPE_CHECKING:
    from vtpm.engine.children import Child

Handler = Callable[[pb.HostRequest, list[int], pb.HostReply], list[int]]


class Host(Protocol):
    """What this needs of vtpm.engine.host.EngineHost."""

    children: dict[str, Child]

    @property
    def connected(self) -> bool:
        """Whether there is a daemon."""

    def send(self, reply: pb.HostReply, fds: list[int] | None = None) -> None:
        """Tell the daemon, if there is one."""

    def employ(
        self, order: pb.Spawn, roles: Sequence[pb.Role.ValueType], fds: Sequence[int], zeros: Sequence[int] = ()
    ) -> Child:
        """Give an instance to a worker."""

    def hire(self, order: pb.Spawn, roles: Sequence[pb.Role.ValueType], fds: Sequence[int], zeros: Sequence[int] = ()) -> Child:
        """Give descriptors to a worker that waits, or to a new one."""

    def end(self) -> None:
        """End after what is being served."""


class Moves:
    """The parking, and the stock of workers that wait for what wakes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.parking = Parking(self._on_wake)
        # Workers that have the daemon's sockets already and wait for an instance, by process id.
        self._stocked: dict[int, Child] = {}
        self.requests: dict[str, Handler] = {
            "thaw": self._thaw,
            "adopt": self._adopt,
            "copy": self._copy,
            "forget": self._forget,
            "hand_over": self._hand_over,
            "stock": self._stock,
            "dismiss": self._dismiss,
        }

    def lost(self, child: Child) -> None:
        """A worker has ended; it may have been a stocked one."""
        self._stocked.pop(child.pid, None)

    def stocked(self, pid: int) -> Child | None:
        """The stocked worker of that process id, if it is one."""
        return self._stocked.get(pid)

    def _on_wake(self, about: pb.ParkedInstance) -> None:
        # Without a daemon the next one finds it in the answer to its Hello.
        if not self._host.connected:
            return
        wake = pb.Wake(instance=about.instance, epoch=about.epoch)
        if self._stocked and about.engine == LIBTPMS:
            # At once, while the daemon fetches the state.
            pid = next(iter(self._stocked))
            if self._give(about.instance, self._stocked.pop(pid)):
                wake.pid = pid
        self._host.send(pb.HostReply(wake=wake))

    def _give(self, instance: str, child: Child) -> bool:
        """Give a parked instance to a stocked worker; False if that is gone, and the instance stays."""
        about, parked = self.parking.take(instance)
        child.instance, child.epoch = about.instance, about.epoch
        try:
            child.take_over(about.roles, parked, about.zeros)
        except OSError:
            child.instance = ""
            child.kill()
            about.woken = True
            self.parking.add(about, parked)
            return False
        self._host.children[instance] = child
        child.moving = about, parked
        return True

    def _thaw(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        order = request.thaw
        if order.instance not in self.parking:
            raise ValueError("the instance is not parked")
        reply.pid = order.pid
        if order.pid:
            child = self._stocked.pop(order.pid, None)
            if child is None or not self._give(order.instance, child):
                raise ValueError("that worker is gone")
            return []
        if len(fds) != 2:
            raise ValueError("wrong number of descriptors")
        about, parked = self.parking.take(order.instance)
        try:
            spawn = pb.Spawn(instance=about.instance, epoch=about.epoch, engine=about.engine)
            roles = [pb.OPERATIONS, pb.COMMITS, *about.roles]
            zeros = [0, 0, *(about.zeros or [0] * len(parked))]
            child = self._host.employ(spawn, roles, [*fds, *parked], zeros)
        except BaseException:
            about.woken = True
            self.parking.add(about, parked)
            raise
        child.moving = about, parked
        reply.pid = child.pid
        return []

    def _stock(self, _request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        if len(fds) != 2:
            raise ValueError("wrong number of descriptors")
        child = self._host.hire(pb.Spawn(engine=LIBTPMS), [pb.OPERATIONS, pb.COMMITS], fds)
        self._stocked[child.pid] = child
        reply.pid = child.pid
        return []

    def _dismiss(self, _request: pb.HostRequest, _fds: list[int], _reply: pb.HostReply) -> list[int]:
        self.dismiss_all()
        return []

    def dismiss_all(self) -> None:
        """End the stocked workers."""
        for child in self._stocked.values():
            # The end of its line is the end of the worker.
            with contextlib.suppress(OSError):
                child.link.shutdown(socket.SHUT_WR)
        self._stocked.clear()

    def _adopt(self, request: pb.HostRequest, fds: list[int], _reply: pb.HostReply) -> list[int]:
        about = request.adopt.parked
        if about.instance in self._host.children:
            raise ValueError("a worker of this instance is running")
        self.parking.add(about, list(fds))
        # They are the parking's now.
        fds.clear()
        return []

    def _copy(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        copies: list[int] = []
        reply.copied.SetInParent()
        for instance in request.copy.instances:
            found = self.parking.look(instance)
            if found is not None:
                about, fds = found
                if len(copies) + len(fds) > descriptors.MOST_DESCRIPTORS:
                    break
                reply.copied.parked.append(about)
                copies += fds
        return copies

    def _forget(self, request: pb.HostRequest, _fds: list[int], _reply: pb.HostReply) -> list[int]:
        instance = request.forget.instance
        self.parking.forget(instance)
        child = self._host.children.get(instance)
        if child is not None and child.moving is not None:
            # It was given the instance when that woke, and will never get its state.
            child.settle()
            child.kill()
            del self._host.children[instance]
            child.instance = ""
        return []

    def _hand_over(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        if self._host.children:
            raise ValueError("workers are running")
        for about, fds in self.parking.hand_over():
            part = pb.HostReply(id=request.id, handed_over=pb.HandedOver(parked=[about], more=True))
            self._host.send(part, fds)
            descriptors.close_all(fds)
        reply.handed_over.SetInParent()
        self._host.end()
        return []
