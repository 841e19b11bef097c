"""What hibernated when its engine host died goes to the next engine host, from the copies in the belt.

Invariant 2: what a worker had that died with its engine host may have been gone on from, and nobody can say. So the daemon has
the store mark the snapshot as its own before anybody else gets it: if that worker ever was allowed to go on, the store refuses,
and if it was not yet, it never is. Of all others the store is asked when a worker goes on from them, as always; so it does no
harm to give descriptors to an engine host once too often.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from typing import Final, Protocol

import structlog

from vtpm.engine import descriptors
from vtpm.engine.belt import Belt, Key
from vtpm.engine.copy_names import grouped
from vtpm.engine.interface import Claim, EngineEvents, Loss, Parked
from vtpm.engine.link import HostLink
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, VtpmError
from vtpm.store.snapshots import TOKEN_SIZE

log: Final = structlog.get_logger("vtpm.engine")

# How often it is tried to give an instance to an engine host that does not start, or dies.
_TRIES: Final = 5
_RETRY_S: Final = 0.5


class Judge(Protocol):
    """What the store says of snapshots; both block, and raise StoreError if it does not answer."""

    def good(self, claims: Sequence[Claim]) -> set[Claim]:
        """Return those that nobody has used."""

    def reserve(self, claim: Claim, token: bytes) -> bool:
        """Mark one as used under `token`, 16 bytes; False if somebody has used it."""


class Fleet(Protocol):
    """What this needs of vtpm.engine.workers.Workers."""

    async def live_host(self) -> HostLink:
        """Return the line to the engine host, which is started if there is none."""

    async def ask_host_for_descriptors(self, request: pb.HostRequest) -> tuple[pb.HostReply, list[int]]:
        """Ask it something whose one reply brings descriptors, which are the caller's then."""


class Rescue:
    """`parked` are the instances that an engine host has, with those who hear of them; they come and go here.

    `stored` is what the outer store has given back, by name.
    """

    def __init__(
        self, fleet: Fleet, belt: Belt, parked: dict[Key, EngineEvents], judge: Judge, stored: Sequence[tuple[str, int]]
    ) -> None:
        self._fleet = fleet
        self._belt = belt
        self._parked = parked
        self._judge = judge
        self._stored = stored
        self._tasks: set[asyncio.Task[None]] = set()
        # One after the other: what the death of a second engine host brings about waits for what the first one's did.
        self._turn = asyncio.Lock()
        # How many engine hosts have died.
        self.losses = 0
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
        self.losses += 1
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
        async with self._turn:
            # First those that do not wait for the store.
            for key, events in homeless.items():
                if key in self._belt:
                    housed += await self._survived(key, events, self._adopted(key, events))
            for key, events in thawing.items():
                housed += await self._survived(key, events, self._goes_on(key, events))
        log.info("engine.rehoused", instances=housed, of=len(homeless) + len(thawing))

    async def _goes_on(self, key: Key, events: EngineEvents) -> bool:
        """Whether an instance that was being thawed has an engine host again."""
        copies = self._belt.get(key)
        if copies is None:
            return False
        if not await self._reserved(copies.about):
            self._belt.drop(key)
            events.ended(uuid.UUID(key[0]), key[1], host_loss(key[0]))
            return False
        if not await self._adopted(key, events):
            return False
        # Whoever was waking it may try again.
        events.hibernated(to_parked(copies.about))
        return True

    async def _survived(self, key: Key, events: EngineEvents, step: Awaitable[bool]) -> bool:
        """Do something for one instance; if it fails in whatever way, that instance is given up and no other."""
        try:
            return await step
        except Exception as error:  # noqa: BLE001  # the others wait for their turn
            log.error("engine.rehousing_failed", instance=key[0], reason="INTERNAL", error=type(error).__name__)
            self._parked.pop(key, None)
            self._belt.drop(key)
            events.parking_lost(uuid.UUID(key[0]), key[1])
            return False

    async def _reserved(self, about: pb.ParkedInstance) -> bool:
        token = os.urandom(TOKEN_SIZE)
        while True:
            try:
                return await asyncio.to_thread(self._judge.reserve, claim_of(about), token)
            except VtpmError as error:
                # Its guest waits, as all do whose store is in trouble.
                log.error("engine.snapshot_unknown", instance=about.instance, reason=error.reason, remedy=error.remedy)
                await asyncio.sleep(_RETRY_S)

    async def _adopted(self, key: Key, events: EngineEvents, *, tell: bool = True) -> bool:
        """Give one instance to the engine host; False if it is given up, or on its way to yet another engine host.

        With `tell`, who hears of the instance is told when it is given up.
        """
        losses = self.losses
        # Before the engine host is asked: it may tell of a wake before it answers.
        self._parked[key] = events
        for attempt in range(_TRIES):
            try:
                host = await self._fleet.live_host()
                if attempt:
                    # The one before may have been carried out, and not been answered in time.
                    await host.request(pb.HostRequest(forget=pb.Forget(instance=key[0])))
                # Looked up last: what was forgotten meanwhile is closed, and its numbers are others'.
                copies = self._belt.get(key)
                if copies is None:
                    break
                # The engine host looks for itself.
                copies.about.woken = False
                await host.request(pb.HostRequest(adopt=pb.Adopt(parked=copies.about)), copies.fds)
            except (EngineError, OSError) as error:
                if losses != self.losses:
                    # That engine host died too, and `host_lost` has it.
                    return False
                reason = error.reason if isinstance(error, EngineError) else type(error).__name__
                log.error("engine.rehousing_failed", instance=key[0], reason=reason, error=str(error))
                if reason == "ENGINE_HOST_REFUSED":
                    break
                await asyncio.sleep(_RETRY_S)
            else:
                return True
        if losses != self.losses:
            return False
        self._parked.pop(key, None)
        self._belt.drop(key)
        if tell:
            events.parking_lost(uuid.UUID(key[0]), key[1])
        return False

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
            good |= await asyncio.to_thread(self._judge.good, unsure)
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
            if await self._adopted(key, events, tell=False):
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
                if self._belt.full:
                    return
                reply, fds = await self._fleet.ask_host_for_descriptors(pb.HostRequest(copy=pb.Copy(instances=batch)))
                self._take(reply.copied.parked, fds)
        except EngineError as error:
            # It has died, or is of a version that gives no copies: those instances go without.
            log.warning("engine.copies_not_fetched", reason=error.reason, error=error.message)
        except Exception as error:  # noqa: BLE001  # those that were not fetched go without
            log.error("engine.copies_not_fetched", reason="INTERNAL", error=type(error).__name__)

    def _take(self, parked: Sequence[pb.ParkedInstance], fds: list[int]) -> None:
        if sum(len(about.roles) for about in parked) != len(fds):
            # This process has no room for more; whose is whose nobody knows.
            log.warning("engine.copies_not_fetched", reason="DESCRIPTORS_MISSING", got=len(fds))
            descriptors.close_all(fds)
            return
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
