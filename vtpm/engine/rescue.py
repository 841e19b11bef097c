"""What hibernated when its engine host died goes to the next engine host, from the copies in the belt.

Invariant 2: nothing here says that a snapshot may be used. The worker that goes on from it asks the store for that, and is
refused if another has; so it does no harm to give the descriptors of an instance to an engine host once too often.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, Protocol

import structlog

from vtpm.engine import descriptors
from vtpm.engine.belt import Belt, Copies, Key
from vtpm.engine.copy_names import grouped
from vtpm.engine.interface import Claim, EngineEvents, Loss, Parked
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, VtpmError

log: Final = structlog.get_logger("vtpm.engine")

# How many engine hosts may die over one instance before it is given up.
_TRIES: Final = 3
Judge = Callable[[Sequence[Claim]], set[Claim]]


class Fleet(Protocol):
    """What this needs of vtpm.engine.workers.Workers."""

    async def ask_host(self, request: pb.HostRequest, fds: Sequence[int] = ()) -> pb.HostReply:
        """Ask the engine host, which is started if there is none, something that has one reply."""

    async def ask_host_for_descriptors(self, request: pb.HostRequest) -> tuple[pb.HostReply, list[int]]:
        """Ask it something whose one reply brings descriptors, which are the caller's then."""


class Rescue:
    """`parked` are the instances that an engine host has, with those who hear of them; they come and go here.

    `good` says which snapshots nobody has used; it blocks. `stored` is what the outer store has given back, by name.
    """

    def __init__(
        self, fleet: Fleet, belt: Belt, parked: dict[Key, EngineEvents], good: Judge, stored: Sequence[tuple[str, int]]
    ) -> None:
        self._fleet = fleet
        self._belt = belt
        self._parked = parked
        self._good = good
        self._stored = stored
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching: asyncio.Task[None] | None = None

    async def over(self) -> None:
        """Wait until every instance has an engine host again, or was given up."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def close(self) -> None:
        """End what is under way."""
        for task in [*self._tasks, *filter(None, [self._fetching])]:
            task.cancel()

    # ---- the engine host has died ----------------------------------------------------------------------------------------

    def host_lost(self, thawing: Mapping[Key, EngineEvents]) -> None:
        """Give all that was parked to the next engine host; `thawing` are those that workers had and had not answered for."""
        homeless = dict(self._parked)
        self._parked.clear()
        for key in [key for key in homeless if key not in self._belt]:
            instance, epoch = key
            homeless.pop(key).parking_lost(uuid.UUID(instance), epoch)
        if thawing or homeless:
            task = asyncio.get_running_loop().create_task(self._rehouse(dict(thawing), homeless))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _rehouse(self, thawing: dict[Key, EngineEvents], homeless: dict[Key, EngineEvents]) -> None:
        housed = 0
        for key, events in thawing.items():
            copies = self._belt.get(key)
            if copies is None:
                continue
            if not await self._may_go_on(copies.about):
                self._belt.drop(key)
                events.ended(uuid.UUID(key[0]), key[1], host_loss(key[0]))
            elif await self._adopted(key, copies, events):
                # Whoever was waking it may try again.
                housed += 1
                events.hibernated(dataclasses.replace(to_parked(copies.about), untouched=False))
        for key, events in homeless.items():
            copies = self._belt.get(key)
            if copies is not None and await self._adopted(key, copies, events):
                housed += 1
        log.info("engine.rehoused", instances=housed, of=len(homeless) + len(thawing))

    async def _may_go_on(self, about: pb.ParkedInstance) -> bool:
        try:
            return bool(await asyncio.to_thread(self._good, [claim_of(about)]))
        except VtpmError as error:
            # The next thaw asks the store again.
            log.warning("engine.snapshot_unknown", instance=about.instance, reason=error.reason)
            return True

    async def _adopted(self, key: Key, copies: Copies, events: EngineEvents, *, tell: bool = True) -> bool:
        """Give one instance to the engine host; False if it is given up, or on its way to yet another engine host.

        With `tell`, who hears of the instance is told when it is given up.
        """
        copies.tries += 1
        # The engine host looks for itself.
        copies.about.woken = False
        # Before it is asked: it may tell of a wake before it answers.
        self._parked[key] = events
        try:
            if copies.tries > _TRIES:
                raise EngineError("ENGINE_HOST_LOST", f"{_TRIES} engine hosts ended with it")
            await self._fleet.ask_host(pb.HostRequest(adopt=pb.Adopt(parked=copies.about)), copies.fds)
        except EngineError as error:
            if self._parked.get(key) is not events:
                # That engine host died too, and `host_lost` has it.
                return False
            log.error("engine.rehousing_failed", instance=key[0], reason=error.reason, error=error.message)
            del self._parked[key]
            self._belt.drop(key)
            if tell:
                events.parking_lost(uuid.UUID(key[0]), key[1])
            return False
        copies.tries = 0
        return True

    # ---- a daemon begins -------------------------------------------------------------------------------------------------

    async def take_stored(
        self, events: EngineEvents, parked: Sequence[pb.ParkedInstance], running: Collection[str]
    ) -> list[Parked]:
        """Put into the belt what the outer store has given back; return what had no engine host, and has one now.

        `parked` is what the engine host had already, `running` are the instances that have a worker.
        """
        groups, others = grouped(self._stored, LIBTPMS)
        self._stored = ()
        for name, fd in others:
            self._belt.refuse([name], [fd], "UNKNOWN_NAME")
        # The engine host is asked before the store, which reads a state for each.
        good = {claim_of(about) for about in parked}
        unsure = [claim for group in groups if (claim := claim_of(group.about)) not in good]
        if unsure:
            good |= await asyncio.to_thread(self._good, unsure)
        homeless = []
        for group in groups:
            if not group.complete:
                self._belt.refuse(group.names, group.fds, "INCOMPLETE")
            elif claim_of(group.about) not in good:
                self._belt.refuse(group.names, group.fds, "STALE")
            elif group.about.instance in running:
                # Its connections are with a worker, and what is here would keep them open for ever.
                self._belt.refuse(group.names, group.fds, "AWAKE")
            else:
                self._belt.keep_stored(group)
                homeless.append((group.about.instance, group.about.epoch))
        adopted = []
        for key in homeless:
            copies = self._belt.get(key)
            if key in self._parked or copies is None:
                continue
            if await self._adopted(key, copies, events, tell=False):
                adopted.append(to_parked(copies.about))
        return adopted

    def fetch(self, parked: Sequence[pb.ParkedInstance]) -> None:
        """Get copies of what the engine host has and the belt has not, in the background."""
        wanted = [about for about in parked if (about.instance, about.epoch) not in self._belt]
        if wanted:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch(wanted))

    async def _fetch(self, wanted: Sequence[pb.ParkedInstance]) -> None:
        try:
            for batch in batches(wanted):
                reply, fds = await self._fleet.ask_host_for_descriptors(pb.HostRequest(copy=pb.Copy(instances=batch)))
                self._take(reply.copied.parked, fds)
        except EngineError as error:
            # It has died, or is of a version that gives no copies: those instances go without.
            log.warning("engine.copies_not_fetched", reason=error.reason, error=error.message)

    def _take(self, parked: Sequence[pb.ParkedInstance], fds: list[int]) -> None:
        for about in parked:
            mine, fds = fds[: len(about.roles)], fds[len(about.roles) :]
            key = about.instance, about.epoch
            if key in self._parked and key not in self._belt:
                self._belt.keep(about, mine)
            else:
                # It is awake again.
                descriptors.close_all(mine)
        descriptors.close_all(fds)


def batches(parked: Sequence[pb.ParkedInstance]) -> Iterator[list[str]]:
    """Yield instances, as many as have their descriptors in one message."""
    batch: list[str] = []
    count = 0
    for about in parked:
        if batch and count + len(about.roles) > descriptors.MOST_DESCRIPTORS:
            yield batch
            batch, count = [], 0
        batch.append(about.instance)
        count += len(about.roles)
    if batch:
        yield batch


def to_parked(about: pb.ParkedInstance) -> Parked:
    """Return what the instance room hears of an instance."""
    return Parked(uuid.UUID(about.instance), about.epoch, attached=pb.VM_CONTROL in about.roles, woken=about.woken)


def claim_of(about: pb.ParkedInstance) -> Claim:
    """Return which snapshot an instance would go on from."""
    return uuid.UUID(about.instance), about.epoch, about.snapshot_version


def host_loss(instance: str) -> Loss:
    """Return why an instance is FAILED whose worker died with its engine host."""
    return Loss(
        "ENGINE_HOST_LOST",
        "the engine host died; the TPM's volatile state is lost",
        f"reset the instance together with its VM: vtpm instance reset {instance}",
    )
