"""AK certificates are short-lived, and renewed while their instance lives: in the store, and in the TPM's NV.

ON: issued, recorded, written to NV between two guest commands, then put in force. OFF: at the next power on, in a short run of
a worker. A failure is tried again at the next turn, counted and logged; the certificate before it stays in force until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.errors import ErrorKind, FailedPreconditionError, VtpmError
from vtpm.instance.certification import AK, record_of
from vtpm.instance.spread import spread
from vtpm.log import SourceLog
from vtpm.pki.authority import Authority
from vtpm.store.model import CertificateRecord, IdentityState, InstanceRecord, KeyRecord
from vtpm.tpm.layouts import NvLayout, renewed_entries

if TYPE_CHECKING:
    from vtpm.instance.identity import Identity
    from vtpm.instance.lifecycle import Lifecycle
    from vtpm.instance.running import Running

log: Final = structlog.get_logger("vtpm.instance")
_lines: Final = SourceLog(log)

# Renewed when a third of its life is left.
_LEFT: Final = 3
_SHORTEST_TURN_S: Final = 1.0
_LONGEST_TURN_S: Final = 60.0
_AT_ONCE: Final = 500
_RENEWALS_AT_ONCE: Final = 4
# As long as the worker itself may wait for the store, and some more.
_RENEWAL_TIMEOUT_S: Final = 120.0
RENEWED_KINDS: Final = (AK, "GUEST_AK")


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
        found = [self._lifecycle.running(str(instance)) for instance in dict.fromkeys(due)]
        waiting = [running for running in found if running is not None]
        failures = 0
        # Whoever does not answer takes a place for a moment only, and then waits beside the others.
        async for done in spread(waiting, functools.partial(self._renewed, authority), at_once=_RENEWALS_AT_ONCE):
            failures += not done
        self._identity.metrics.set_overdue(failures)

    async def _renewed(self, authority: Authority, running: Running) -> bool:
        """Renew what is due of one instance; whether that went well."""
        instance = str(running.record.id)
        try:
            async with asyncio.timeout(_RENEWAL_TIMEOUT_S):
                await self._renew_on(running, authority)
        except VtpmError as error:
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
            if running.gone.is_set():
                # Stopped meanwhile: it is due at its next power on.
                return
            present = {key.tpmt_public for key in (await running.tpm.keys())[0]}
            for key, issued in await self._lifecycle.blocking(self._issue, authority, record):
                if (key.role == AK or key.handle) and key.tpmt_public not in present:
                    # A certificate speaks of a key that is there.
                    raise FailedPreconditionError(
                        "AK_MISSING",
                        "the certified AK is not in the TPM any more",
                        subject=record.name,
                        remedy="create a new instance",
                    )
                await self._lifecycle.blocking(self._store.certificates.add, [replace(issued, current=False)])
                written = await self._write(running, key, issued)
                await self._lifecycle.blocking(self._store.identities.put_in_force, issued)
                self._identity.metrics.count_renewal("written" if written else "unwritten")
                log.info("certificate.renewed", instance=str(record.id), name=record.name, kind=issued.kind, written=written)

    async def _write(self, running: Running, key: KeyRecord, issued: CertificateRecord) -> bool:
        """Write a certificate to NV where the layout has a place for it; False where the guest has taken that place."""
        layout = NvLayout(running.record.profile.nv_layout)
        try:
            for entry in renewed_entries(layout, key.role, key.algorithm, issued.der):
                await running.tpm.write_nv(entry.index, entry.data)
        except VtpmError as error:
            if error.kind is not ErrorKind.FAILED_PRECONDITION:
                raise
            # Removed by firmware, or of a TPM that was imported: the API has it all the same.
            log.warning("renewal.not_in_nv", instance=str(running.record.id), reason=error.reason, remedy=error.remedy)
            return False
        return True

    def _issue(self, authority: Authority, record: InstanceRecord) -> Sequence[tuple[KeyRecord, CertificateRecord]]:
        """Issue what is due of an instance's AK certificates. Blocking."""
        now = dt.datetime.now(dt.UTC)
        current = {(item.kind, item.algorithm): item for item in self._store.certificates.current(record.id)}
        issued = []
        for key in record.keys:
            before = current.get((key.role, key.algorithm))
            if key.role in RENEWED_KINDS and before is not None and before.revoked_at is None and renewal_time(before) <= now:
                certificate = authority.issue_ak(key.tpmt_public, record.id, now=now)
                issued.append((key, record_of(certificate, record.id, key.role, key.algorithm)))
        return issued

    # ---- OFF -------------------------------------------------------------------------------------------------------------

    async def before_power_on(self, record: InstanceRecord) -> None:
        """Renew what is due of an instance that is about to be powered on; never keeps it from that."""
        authority = self._identity.authority()
        if authority is None or record.identity is not IdentityState.CERTIFIED:
            return
        with contextlib.suppress(VtpmError):
            await self._renew_off(record, authority)

    async def _renew_off(self, record: InstanceRecord, authority: Authority) -> None:
        try:
            issued = await self._lifecycle.blocking(self._issue, authority, record)
            if not issued:
                return
            layout = NvLayout(record.profile.nv_layout)
            entries = [
                entry
                for key, certificate in issued
                for entry in renewed_entries(layout, key.role, key.algorithm, certificate.der)
            ]
            async with self._lifecycle.key_lock:
                wrapped, before = await self._lifecycle.blocking(self._store.load, record.id)
                data_key = await self._lifecycle.blocking(self._lifecycle.keys.unwrap, wrapped, record.id)
            engine = self._lifecycle.engine(record.engine)
            state = await engine.reprovision(record.id, before, data_key, entries)
            certificates = [certificate for _, certificate in issued]
            await self._lifecycle.blocking(self._store.identities.renew_off, record.id, state, certificates)
        except VtpmError as error:
            self._identity.metrics.count_renewal("failed")
            log.warning("renewal.failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            raise
        self._identity.metrics.count_renewal("written")
        log.info("certificate.renewed", instance=str(record.id), name=record.name, written=True)
