"""AK certificates are short-lived, and renewed while their instance lives: in the store, and in the TPM's NV.

ON: the TPM proves its keys (vtpm.instance.proof), the certificate is issued, recorded, written to NV between two guest
commands, then put in force. Hibernated: the same when it wakes; nobody is woken for it. OFF: at the next power on, in a short
run of a worker, which proves the keys too. A failure is tried again at the next turn, counted and logged; the certificate
before it stays in force until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.errors import ErrorKind, FailedPreconditionError, VtpmError
from vtpm.instance.certification import AK, record_of
from vtpm.instance.proof import due_keys, prove
from vtpm.instance.spread import spread
from vtpm.log import SourceLog
from vtpm.pki.authority import Authority
from vtpm.store.model import CertificateRecord, IdentityState, InstanceRecord, KeyRecord
from vtpm.tpm.layouts import NvLayout, renewed_entries

if TYPE_CHECKING:
    from vtpm.engine.identity import HeldTpm
    from vtpm.engine.interface import RunningTpm
    from vtpm.instance.identity import Identity
    from vtpm.instance.lifecycle import Lifecycle
    from vtpm.instance.running import Running
    from vtpm.tpm.nv import NvEntry

log: Final = structlog.get_logger("vtpm.instance")
_lines: Final = SourceLog(log)

# Renewed when a third of its life is left.
_LEFT: Final = 3
_SHORTEST_TURN_S: Final = 1.0
_LONGEST_TURN_S: Final = 60.0
# Whom one turn looks at; those that are asleep are only noted.
_AT_ONCE: Final = 100_000
_RENEWALS_AT_ONCE: Final = 4
# As long as the worker itself may wait for the store, and some more.
_RENEWAL_TIMEOUT_S: Final = 120.0
RENEWED_KINDS: Final = (AK, "GUEST_AK")
# A worker that is gone, as one that has hibernated.
_LOST: Final = ("TPM_LOST", "ENGINE_HOST_LOST")


def renewal_time(record: CertificateRecord) -> dt.datetime:
    """Return when a certificate is to be renewed; for one that is not renewed, its end."""
    if record.kind not in RENEWED_KINDS:
        return record.not_after
    return record.not_after - (record.not_after - record.not_before) / _LEFT


class Renewal:
    """Renews AK certificates. Used from the event loop only."""

    def __init__(self, lifecycle: Lifecycle, identity: Identity) -> None:
        self._lifecycle = lifecycle
        self._identity = identity
        self._store = lifecycle.store
        self._task: asyncio.Task[None] | None = None
        # What was due and hibernated when it was last looked at.
        self._asleep: set[uuid.UUID] = set()

    def start(self) -> None:
        """Begin to look for what is due."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; what is due is due for the next daemon."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            turn_s = _LONGEST_TURN_S
            try:
                authority = self._identity.authority()
                if authority is not None:
                    lifetime = authority.policy.ak_lifetime
                    turn_s = max(_SHORTEST_TURN_S, min(_LONGEST_TURN_S, lifetime.total_seconds() / 20))
                    await self._turn(authority, dt.datetime.now(dt.UTC) + lifetime / _LEFT)
            except VtpmError as error:
                _lines.warning("turn", "renewal.turn_failed", reason=error.reason, remedy=error.remedy)
            except Exception as error:  # noqa: BLE001  # the next turn is for others too
                _lines.error("turn", "renewal.turn_failed", reason="INTERNAL", error=type(error).__name__)
            await asyncio.sleep(turn_s)

    async def _turn(self, authority: Authority, before: dt.datetime) -> None:
        due: list[uuid.UUID] = []
        for kind in RENEWED_KINDS:
            due += await self._lifecycle.blocking(self._store.identities.overdue, kind, before, _AT_ONCE)
        found = [self._lifecycle.by_id(instance) for instance in dict.fromkeys(due)]
        running = [item for item in found if item is not None]
        self._asleep |= {item.record.id for item in running if item.tpm.asleep}
        waiting = [item for item in running if not item.tpm.asleep]
        failures = 0
        # Whoever does not answer takes a place for a moment only, and then waits beside the others.
        async for done in spread(waiting, functools.partial(self._tried, authority), at_once=_RENEWALS_AT_ONCE):
            failures += not done
        self._identity.metrics.set_overdue(failures)

    def woke(self, running: Running) -> None:
        """Renew what became due while an instance was hibernated; its guest does not wait for it."""
        authority = self._identity.authority()
        if running.record.id in self._asleep and authority is not None:
            self._asleep.discard(running.record.id)
            self._lifecycle.later(self._renew_woken(running, authority))

    async def _renew_woken(self, running: Running, authority: Authority) -> None:
        await self._tried(authority, running)

    async def _tried(self, authority: Authority, running: Running) -> bool:
        """Renew what is due of one instance; whether that went well. A failure is this instance's own."""
        instance = str(running.record.id)
        try:
            async with asyncio.timeout(_RENEWAL_TIMEOUT_S):
                await self._renew_on(running, authority)
        except VtpmError as error:
            if error.reason in _LOST and (running.gone.is_set() or running.tpm.asleep):
                # It has hibernated meanwhile, or was stopped.
                self._asleep.add(running.record.id)
                return True
            _lines.warning(instance, "renewal.failed", instance=instance, reason=error.reason, remedy=error.remedy)
        except TimeoutError:
            _lines.warning(instance, "renewal.failed", instance=instance, reason="WORKER_TIMEOUT", remedy="see the instance")
        except Exception as error:  # noqa: BLE001  # it is one instance's
            _lines.error(instance, "renewal.failed", instance=instance, reason="INTERNAL", error=type(error).__name__)
        else:
            return True
        self._identity.metrics.count_renewal("failed")
        return False

    async def _renew_on(self, running: Running, authority: Authority) -> None:
        record = running.record
        async with self._lifecycle.lock(record.id):
            # As it is now: what wakes it is somebody else's wish.
            tpm = running.tpm.unless_asleep()
            if running.gone.is_set() or tpm is None:
                self._asleep.add(record.id)
                return
            pairs = await self._lifecycle.blocking(self._due, record)
            if not pairs:
                return
            await prove(tpm.prove, pairs, self._lifecycle.blocking)
            for ak, _ in pairs:
                issued = await self._lifecycle.blocking(_issue, authority, record, ak)
                await self._lifecycle.blocking(self._store.certificates.add, [replace(issued, current=False)])
                written = await self._write(tpm, record, ak, issued)
                await self._lifecycle.blocking(self._store.identities.put_in_force, issued)
                self._identity.metrics.count_renewal("written" if written else "unwritten")
                log.info("certificate.renewed", instance=str(record.id), name=record.name, kind=issued.kind, written=written)

    async def _write(self, tpm: RunningTpm, record: InstanceRecord, key: KeyRecord, issued: CertificateRecord) -> bool:
        """Write a certificate to NV where the layout has a place for it; False where the guest has taken that place."""
        layout = NvLayout(record.profile.nv_layout)
        try:
            for entry in renewed_entries(layout, key.role, key.algorithm, issued.der):
                await tpm.write_nv(entry.index, entry.data)
        except VtpmError as error:
            if error.kind is not ErrorKind.FAILED_PRECONDITION:
                raise
            # Removed by firmware, or of a TPM that was imported: the API has it all the same.
            log.warning("renewal.not_in_nv", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            return False
        return True

    def _due(self, record: InstanceRecord) -> list[tuple[KeyRecord, KeyRecord]]:
        """Return which AKs are due, each with the EK that proves it. Blocking.

        Raises:
            As vtpm.instance.proof.due_keys; SealedStateError: ROW_MAC_MISMATCH, IDENTITY_NOT_CERTIFIED.
        """
        now = dt.datetime.now(dt.UTC)
        current = self._store.certificates.current(record.id)
        due = [item for item in current if item.kind in RENEWED_KINDS and item.revoked_at is None and renewal_time(item) <= now]
        if not due:
            return []
        # As the store has it now, and believed only if the service wrote it.
        present = self._store.get(str(record.id))
        if present.identity is not IdentityState.CERTIFIED:
            raise FailedPreconditionError(
                "IDENTITY_NOT_CERTIFIED",
                f"the instance's keys are not those that were certified: it is {present.identity.value}",
                subject=present.name,
                remedy="create a new instance",
            )
        return due_keys(present, due, current, self._identity.issuer)

    # ---- OFF -------------------------------------------------------------------------------------------------------------

    async def before_power_on(self, record: InstanceRecord) -> None:
        """Renew what is due of an instance that is about to be powered on; never keeps it from that."""
        authority = self._identity.authority()
        if authority is None or record.identity is not IdentityState.CERTIFIED:
            return
        with contextlib.suppress(VtpmError):
            await self._renew_off(record, authority)

    async def _renew_off(self, record: InstanceRecord, authority: Authority) -> None:
        blocking = self._lifecycle.blocking
        certificates: list[CertificateRecord] = []
        try:
            pairs = await blocking(self._due, record)
            if not pairs:
                return

            async def certify(tpm: HeldTpm) -> list[NvEntry]:
                await prove(tpm.activate, pairs, blocking)
                layout = NvLayout(record.profile.nv_layout)
                entries: list[NvEntry] = []
                for ak, _ in pairs:
                    issued = await blocking(_issue, authority, record, ak)
                    certificates.append(issued)
                    entries += renewed_entries(layout, ak.role, ak.algorithm, issued.der)
                return entries

            async with self._lifecycle.key_lock:
                wrapped, before = await blocking(self._store.load, record.id)
                data_key = await blocking(self._lifecycle.keys.unwrap, wrapped, record.id)
            state = await self._lifecycle.engine(record.engine).reprovision(record.id, before, data_key, certify)
            await blocking(self._store.identities.renew_off, record.id, state, certificates)
        except VtpmError as error:
            self._identity.metrics.count_renewal("failed")
            log.warning("renewal.failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            raise
        self._identity.metrics.count_renewal("written")
        log.info("certificate.renewed", instance=str(record.id), name=record.name, written=True)


def _issue(authority: Authority, record: InstanceRecord, ak: KeyRecord) -> CertificateRecord:
    """Certify an AK that was proven. Blocking."""
    issued = authority.issue_ak(ak.tpmt_public, record.id, now=dt.datetime.now(dt.UTC))
    return record_of(issued, record.id, ak.role, ak.algorithm)
