"""The daemon's view of hibernated instances: which there are, and how one comes to a worker that goes on with it."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from vtpm.crashpoints import crash_point
from vtpm.engine.belt import Belt
from vtpm.engine.committer import Committer
from vtpm.engine.interface import EngineEvents, Listeners, Parked, Thaw
from vtpm.engine.limits import InstanceLimits
from vtpm.engine.link import HostLink
from vtpm.engine.pairs import SocketPairs
from vtpm.engine.rescue import Judge, Rescue, to_parked
from vtpm.engine.software import LIBTPMS
from vtpm.engine.stock import Stock
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker_link import WorkerLink
from vtpm.errors import EngineError

# How often a thaw tries to have its instance given to a worker, while workers die.
_HAND_OVERS: Final = 50
_HAND_OVER_RETRY_S: Final = 0.01
_REFILL_S: Final = 0.1
# More than one host has instances: what an engine host tells of others is not kept.
_MAX_GIVEN: Final = 1 << 16


class Fleet(Protocol):
    """What this needs of vtpm.engine.workers.Workers."""

    links: dict[tuple[str, int], tuple[WorkerLink, EngineEvents]]

    async def live_host(self) -> HostLink:
        """Return the line to the engine host, which is started if there is none."""

    async def ask_host(self, request: pb.HostRequest, fds: Sequence[int] = ()) -> pb.HostReply:
        """Ask the engine host something that has one reply."""

    async def ask_host_for_descriptors(self, request: pb.HostRequest) -> tuple[pb.HostReply, list[int]]:
        """Ask it something whose one reply brings descriptors, which are the caller's then."""

    def take_on(self, link: WorkerLink, key: tuple[str, int], events: EngineEvents) -> None:
        """Hold a worker of an instance; `events` hears of it."""


class Sleepers:
    """Hibernated instances, whose descriptors are with the engine host. Used from the event loop only."""

    def __init__(
        self,
        fleet: Fleet,
        committer: Committer,
        *,
        commit_timeout_s: float,
        limits: InstanceLimits,
        belt: Belt,
        judge: Judge,
        stored: Sequence[tuple[str, int]],
    ) -> None:
        self._fleet = fleet
        self._committer = committer
        self._commit_timeout_s = commit_timeout_s
        self._limits = limits
        self._parked: dict[tuple[str, int], EngineEvents] = {}
        self.belt = belt
        self._rescue = Rescue(fleet, belt, self._parked, judge, stored)
        # What the engine host had when this daemon came, and nobody has claimed yet.
        self.found: list[pb.ParkedInstance] = []
        # Who hears of instances that nobody has claimed yet.
        self.unclaimed: EngineEvents | None = None
        self.stock = Stock(committer, fleet.ask_host, store_timeout_s=commit_timeout_s)
        # Stocked workers, by process id, that the engine host has given an instance that woke.
        self._given: dict[tuple[str, int], int] = {}
        self._dead: set[int] = set()
        self._refill: asyncio.TimerHandle | None = None

    async def claim(self, engine: str, events: EngineEvents, running: Collection[str]) -> list[Parked]:
        """Return what was found of `engine`; `events` hears of it from now on. `running` are the instances with a worker."""
        mine = [item for item in self.found if (item.engine or LIBTPMS) == engine]
        for item in mine:
            self._parked[item.instance, item.epoch] = events
        found = [to_parked(item) for item in mine]
        if engine == LIBTPMS:
            found += await self._rescue.take_stored(events, mine, running)
        self._rescue.fetch(mine)
        return found

    # ---- what the engine host tells --------------------------------------------------------------------------------------

    def on_wake(self, wake: pb.Wake) -> None:
        """See HostEvents."""
        key = wake.instance, wake.epoch
        if wake.pid and len(self._given) < _MAX_GIVEN:
            self._given[key] = wake.pid
        events = self._parked.get(key, self.unclaimed)
        if events is not None:
            events.wanted(uuid.UUID(wake.instance), wake.epoch)

    def asleep(self, about: pb.ParkedInstance, events: EngineEvents) -> None:
        """A worker has hibernated, or died before it went on from a snapshot."""
        self._parked[about.instance, about.epoch] = events
        events.hibernated(to_parked(about))

    def took(self, exited: pb.WorkerExited) -> bool:
        """Note the end of a worker that nobody here holds; False if it has nothing to do with a hibernated instance."""
        key = exited.instance, exited.epoch
        if key in self._parked or self._given.get(key) == exited.pid:
            # A stocked worker that died with the instance it was given, before anybody here asked it for anything.
            if len(self._dead) < _MAX_GIVEN:
                self._dead.add(exited.pid)
        elif exited.HasField("parked") and len(self.found) < _MAX_GIVEN:
            # It ran on without a daemon, and hibernated before this one took it over.
            self.found.append(exited.parked)
        else:
            return False
        return True

    def host_lost(self, thawing: Mapping[tuple[str, int], EngineEvents]) -> None:
        """The engine host is gone, and with it the workers of `thawing`, which may have gone on from their snapshots or not."""
        self.found.clear()
        self.stock.clear()
        self._given.clear()
        self._dead.clear()
        self._rescue.host_lost(thawing)
        # The next one is there before somebody needs it.
        self._refill = asyncio.get_running_loop().call_later(_REFILL_S, self.stock.fill)

    def close(self) -> None:
        """Let go of everything."""
        if self._refill is not None:
            self._refill.cancel()
        self._rescue.close()
        self.stock.clear()
        self.belt.close()

    # ---- thaw ------------------------------------------------------------------------------------------------------------

    async def thaw(self, order: Thaw, events: EngineEvents) -> WorkerLink:
        """See Engine."""
        key = str(order.instance), order.epoch
        load = pb.Load(
            data_key=order.data_key,
            place=pb.Place(instance=order.instance.bytes, epoch=order.state.epoch, version=order.state.version),
            sealed=order.state.blob,
            epoch=order.epoch,
            commit_timeout_ms=int(self._commit_timeout_s * 1000),
            idle_timeout_ms=int(order.idle_timeout_s * 1000),
            snapshot=order.snapshot.blob,
            snapshot_version=order.snapshot.version,
            snapshot_token=order.token,
        )
        self._limits.put_into(load)
        if key in self._fleet.links:
            # A daemon before this one gave it to a worker, and ended before the worker had its state.
            link = self._fleet.links[key][0]
        else:
            crash_point("thaw.before_hand_over")
            link = await self._hand_over(order, key, events)
            self._parked.pop(key, None)
            crash_point("thaw.after_hand_over")
        try:
            await self._go_on(link, order, load)
        except BaseException:
            await link.stop()
            raise
        self.belt.used(key, order.snapshot.version)
        return link

    async def _go_on(self, link: WorkerLink, order: Thaw, load: pb.Load) -> None:
        """Have the store forget the snapshot while the worker takes it up: it waits for that before it runs a command."""
        assert link.commits is not None
        use = pb.Commit(epoch=order.epoch, version=order.snapshot.version, kind=pb.Commit.CONSUME, token=order.token)
        self._committer.commit_for(link.commits, use)
        await link.request(pb.WorkerRequest(load=load))

    async def _hand_over(self, order: Thaw, key: tuple[str, int], events: EngineEvents) -> WorkerLink:
        """Have a parked instance given to a worker, if the engine host has not done so when it woke."""
        for _ in range(_HAND_OVERS):
            await self._rescue.over()
            pid = self._given.pop(key, 0)
            try:
                if pid:
                    ready = await self.stock.given(pid, functools.partial(self._is_gone, pid, self._rescue.losses))
                    link = None if ready is None else self.stock.bind(ready, order.instance, order.epoch)
                else:
                    pid, link = await self._fetched(order)
            except EngineError as error:
                # That worker is gone, or the instance woke meanwhile and was given to another one; or the engine host died, and
                # the next one has the instance.
                await self._rescue.over()
                if error.reason not in ("ENGINE_HOST_REFUSED", "ENGINE_HOST_LOST") or key not in self._parked:
                    raise
                await asyncio.sleep(_HAND_OVER_RETRY_S)
                continue
            if link is None or pid in self._dead:
                # Its end came between the two of us; the engine host has the instance again.
                self._dead.discard(pid)
                if link is not None:
                    link.close()
                continue
            self._fleet.take_on(link, key, events)
            return link
        raise EngineError(
            "WORKERS_DIE", "workers end before they have the instance", subject=key[0], remedy="see engine-host.log"
        )

    def _is_gone(self, pid: int, losses: int) -> bool:
        return pid in self._dead or losses != self._rescue.losses

    async def _fetched(self, order: Thaw) -> tuple[int, WorkerLink]:
        """Give a parked instance to a stocked worker, or to another one; return its process id and the line to it."""
        ready = self.stock.take()
        if ready is not None:
            try:
                await self._fleet.ask_host(pb.HostRequest(thaw=pb.Thaw(instance=str(order.instance), pid=ready.pid)))
            except EngineError as error:
                if error.reason == "ENGINE_HOST_REFUSED":
                    self.stock.put_back(ready)
                else:
                    # The engine host may have given it the instance all the same.
                    ready.link.close()
                raise
            return ready.pid, self.stock.bind(ready, order.instance, order.epoch)
        with SocketPairs() as pairs:
            request = pb.HostRequest(thaw=pb.Thaw(instance=str(order.instance)))
            pid = (await self._fleet.ask_host(request, pairs.worker_ends)).pid
            link = await WorkerLink.open(order.instance, pairs.operations, self._commit_timeout_s)
            link.commits = self._committer.add(order.instance, order.epoch, pairs.commits, link.misbehaved_elsewhere)
            return pid, link

    async def park(self, engine: str, parked: Parked, listeners: Listeners, events: EngineEvents) -> None:
        """See Engine."""
        host = await self._fleet.live_host()
        roles = [pb.DATA_LISTENER, pb.CONTROL_LISTENER]
        about = pb.ParkedInstance(instance=str(parked.instance), epoch=parked.epoch, engine=engine, roles=roles)
        fds = [listeners.data.fileno(), listeners.control.fileno()]
        await host.request(pb.HostRequest(adopt=pb.Adopt(parked=about)), fds)
        self._parked[about.instance, about.epoch] = events

    async def forget(self, instance: uuid.UUID) -> None:
        """See Engine."""
        await self._rescue.over()
        self.belt.forget(str(instance))
        for table in (self._parked, self._given):
            for key in [key for key in table if key[0] == str(instance)]:
                del table[key]
        host = await self._fleet.live_host()
        await host.request(pb.HostRequest(forget=pb.Forget(instance=str(instance))))
