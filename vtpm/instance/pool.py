"""The pool: TPMs of the default profile, made ahead and certified, so that a creation only gives one a name.

Each member has the id of the instance that it will be, its own worker made it, and it is sealed in the store as any other
state. It becomes an instance once, in one transaction; until then nobody sees it. What no longer fits (the CA, the profile, the
platform's defaults, an AK certificate near its end) is destroyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Final

import structlog

from vtpm.engine.identity import HeldTpm
from vtpm.errors import ErrorKind, VtpmError
from vtpm.instance.certification import (
    AK,
    PLATFORM,
    describe_platform,
    description_in,
    issued_of,
    not_proven,
    record_of,
)
from vtpm.instance.creation import Creation, Wanted
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.proof import Issuer, certified_eks, certified_key, prove
from vtpm.instance.renewal import renewal_time
from vtpm.pki.authority import Authority
from vtpm.store.model import CertificateRecord, InstanceRecord, KeyRecord, PlatformRecord, PoolClaim, PoolMember
from vtpm.tpm.layouts import PLATFORM_CERTIFICATE, NvLayout, fixed_entry
from vtpm.tpm.nv import NvEntry

log: Final = structlog.get_logger("vtpm.instance")

# As low as a process can be: whatever else the host has to do comes first.
_NICE: Final = 19
_IDLE_S: Final = 0.2
_RETRY_S: Final = 10.0
_CHECK_S: Final = 60.0
# What says nothing about a member that was to be given out.
_NOT_ITS_FAULT: Final = (ErrorKind.UNAVAILABLE, ErrorKind.ALREADY_EXISTS, ErrorKind.RESOURCE_EXHAUSTED, ErrorKind.UNIMPLEMENTED)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ready:
    member: PoolMember
    # From when on it is not given out any more.
    stale: dt.datetime


class InstancePool:
    """Used from the event loop only; `wanted` is what every member is good for, but for its name and labels."""

    def __init__(self, lifecycle: Lifecycle, creation: Creation, *, size: int, wanted: Wanted) -> None:
        self._lifecycle = lifecycle
        self._creation = creation
        self._identity = creation.identity
        self._store = lifecycle.store
        self._size = size
        self._wanted = wanted
        self._ready: deque[_Ready] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # ---- life ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find what earlier daemons left, and begin to fill up."""
        for member in await self._lifecycle.blocking(self._store.pool.members):
            self._ready.append(_Ready(member, await self._stale(member.id)))
        self._report()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop filling up; what is there waits for the next daemon."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def level(self) -> int:
        """How many are ready."""
        return len(self._ready)

    def _report(self) -> None:
        self._identity.metrics.set_pool_level(len(self._ready))

    def _key(self) -> str:
        return self._identity.pool_key(self._wanted.engine, self._wanted.profile)

    async def _stale(self, instance: uuid.UUID) -> dt.datetime:
        certificates = await self._lifecycle.blocking(self._store.certificates.current, instance)
        return _stale_time(certificates)

    # ---- giving out ------------------------------------------------------------------------------------------------------

    async def claim(self, wanted: Wanted) -> InstanceRecord | None:
        """Make a member the instance that is wanted; None if the pool has none for it.

        Raises:
            AlreadyExistsError: INSTANCE_NAME_TAKEN or REQUEST_ID_TAKEN; nothing was used up.
        """
        while (ready := self._take(wanted)) is not None:
            try:
                claim = PoolClaim(
                    id=ready.member.id,
                    name=wanted.name,
                    labels=wanted.labels,
                    platform=wanted.platform,
                    request_id=wanted.request_id,
                    fingerprint=wanted.fingerprint,
                )
                rewritten = wanted.platform != self._wanted.platform
                if rewritten:
                    claim = await self._for_platform(claim)
                record = await self._lifecycle.blocking(self._store.pool.claim, claim)
            except VtpmError as error:
                if error.kind in _NOT_ITS_FAULT:
                    self._ready.appendleft(ready)
                    raise
                log.warning("pool.member_unusable", instance=str(ready.member.id), reason=error.reason)
                self._lifecycle.later(self._discard([ready.member.id]))
                continue
            except BaseException:
                self._ready.appendleft(ready)
                raise
            finally:
                self._report()
                self._wake.set()
            self._identity.metrics.count_creation("pool_rewritten" if rewritten else "pool")
            return record
        return None

    def _take(self, wanted: Wanted) -> _Ready | None:
        if (wanted.engine, wanted.profile) != (self._wanted.engine, self._wanted.profile):
            return None
        key, now = self._key(), dt.datetime.now(dt.UTC)
        for _ in range(len(self._ready)):
            ready = self._ready.popleft()
            if ready.member.key == key and now < ready.stale:
                return ready
            # The loop destroys it.
            self._ready.append(ready)
            self._wake.set()
        return None

    async def _for_platform(self, claim: PoolClaim) -> PoolClaim:
        """Certify another platform with the member's TPM, and write that to its NV in a short run of a worker."""
        authority = self._identity.authority()
        if authority is None:
            return claim
        blocking, layout = self._lifecycle.blocking, NvLayout(self._wanted.profile.nv_layout)
        current = await blocking(self._store.certificates.current, claim.id)
        eks = await blocking(_keys_by_algorithm, claim.id, current, self._identity.issuer)
        # The same that the platform certificate before it is held by.
        algorithm = self._wanted.profile.ek_algorithms[0]
        if algorithm not in eks:
            raise not_proven(f"the EK {algorithm} is not certified any more")
        holder, ek = eks[algorithm]
        aks = [await blocking(certified_key, item, layout, self._identity.issuer) for item in current if item.kind == AK]
        if not aks:
            raise not_proven("the AK is not certified any more")
        made: list[CertificateRecord] = []

        async def certify(tpm: HeldTpm) -> list[NvEntry]:
            # Invariant 9: the TPM shows the EK that the certificate will name.
            await prove(tpm.activate, [(ak, ek) for ak in aks], blocking)
            certificate = await blocking(_certify_platform, authority, claim.id, claim.platform, holder)
            made.append(certificate)
            return [fixed_entry(PLATFORM_CERTIFICATE, certificate.der)] if layout is NvLayout.TCG else []

        async with self._lifecycle.key_lock:
            wrapped, before = await blocking(self._store.load, claim.id)
            data_key = await blocking(self._lifecycle.keys.unwrap, wrapped, claim.id)
        state = await self._lifecycle.engine(self._wanted.engine).reprovision(claim.id, before, data_key, certify)
        return dataclasses.replace(claim, state=state, certificates=tuple(made))

    # ---- filling up ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._destroy_unfit()
                while len(self._ready) < self._size:
                    await self._until_idle()
                    await self._add()
            except VtpmError as error:
                log.warning("pool.refill_failed", reason=error.reason, remedy=error.remedy)
                await asyncio.sleep(_RETRY_S)
                continue
            except Exception as error:  # noqa: BLE001  # one TPM could not be made; the next one may
                log.error("pool.refill_failed", reason="INTERNAL", error=type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _CHECK_S)

    async def _until_idle(self) -> None:
        """Wait until nobody waits for a creation, and has not for a moment."""
        busy = True
        while busy:
            self._wake.clear()
            busy = bool(self._creation.waiting)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _IDLE_S)
                # A member was given out: who wants one may want more.
                busy = True
            busy = busy or bool(self._creation.waiting)

    async def _add(self) -> None:
        wanted, key = self._wanted, self._key()
        made = await self._creation.make(wanted.engine, wanted.profile, wanted.platform, nice=_NICE)
        async with self._lifecycle.key_lock:
            new = await self._creation.new_instance(made, wanted)
            member = await self._lifecycle.blocking(self._store.add_to_pool, new, key)
        self._ready.append(_Ready(member, _stale_time(made.certificates)))
        self._report()
        log.debug("pool.filled", level=len(self._ready))

    async def _destroy_unfit(self) -> None:
        key, now = self._key(), dt.datetime.now(dt.UTC)
        fit = [ready for ready in self._ready if ready.member.key == key and now < ready.stale][: self._size]
        kept = {ready.member.id for ready in fit}
        unfit = [ready.member.id for ready in self._ready if ready.member.id not in kept]
        self._ready = deque(fit)
        self._report()
        if unfit:
            await self._discard(unfit)

    async def _discard(self, members: Sequence[uuid.UUID]) -> None:
        try:
            await self._lifecycle.blocking(self._store.discard_from_pool, members)
        except VtpmError as error:
            log.warning("pool.discard_failed", reason=error.reason, remedy=error.remedy)
            return
        log.info("pool.discarded", count=len(members))


def _stale_time(certificates: Sequence[CertificateRecord]) -> dt.datetime:
    times = [renewal_time(record) for record in certificates]
    return min(times, default=dt.datetime.max.replace(tzinfo=dt.UTC))


def _keys_by_algorithm(
    instance: uuid.UUID, current: Sequence[CertificateRecord], issuer: Issuer
) -> dict[str, tuple[CertificateRecord, KeyRecord]]:
    return {item.algorithm: (item, key) for item, key in certified_eks(instance, current, issuer)}


def _certify_platform(
    authority: Authority, instance: uuid.UUID, platform: PlatformRecord, ek: CertificateRecord
) -> CertificateRecord:
    now = dt.datetime.now(dt.UTC)
    description = describe_platform(platform, instance)
    certificate = authority.issue_platform(issued_of(ek), description, description_in(ek.der), now=now)
    return record_of(certificate, instance, PLATFORM, "")
