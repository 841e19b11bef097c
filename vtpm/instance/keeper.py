"""What a guest does to its TPM's keys is noticed: certificates of keys that are gone for good are revoked.

TPM2_ChangeEPS ends every EK, TPM2_ChangePPS the service's AK: nobody can make them again. TPM2_Clear and TPM2_EvictControl only
remove them from their handles; the same template makes the same key again, so their certificates stay what they are.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vtpm.errors import SealedStateError, VtpmError
from vtpm.instance.certification import AK, PLATFORM
from vtpm.instance.proof import certified_eks, certified_key, prove
from vtpm.store.model import CertificateRecord, IdentityState, InstanceRecord, KeyRecord
from vtpm.tpm.codes import CommandCode
from vtpm.tpm.keys import public_key
from vtpm.tpm.layouts import NvLayout

if TYPE_CHECKING:
    from vtpm.instance.identity import Identity
    from vtpm.instance.lifecycle import Lifecycle
    from vtpm.instance.running import Running

log: Final = structlog.get_logger("vtpm.instance")

_RETRY_S: Final = 1.0
# The keys do not exist any more, and nobody else has them (RFC 5280, 5.3.1).
REASON: Final = "cessationOfOperation"


class IdentityKeeper:
    """Keeps what the store says of an instance's keys true. Used from the event loop only."""

    def __init__(self, lifecycle: Lifecycle, identity: Identity) -> None:
        self._lifecycle = lifecycle
        self._identity = identity
        self._store = lifecycle.store

    async def touched(self, running: Running) -> None:
        """The guest has run a command that may have ended keys: look at them anew. Keeps trying while the TPM is there."""
        while not running.gone.is_set():
            try:
                await self._look(running)
            except SealedStateError as error:
                # Something else has written its row, and it is refused.
                log.error("identity.unknown", instance=str(running.record.id), reason=error.reason, remedy=error.remedy)
                return
            except VtpmError as error:
                log.warning("identity.unknown", instance=str(running.record.id), reason=error.reason, remedy=error.remedy)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _look(self, running: Running) -> None:
        async with self._lifecycle.lock(running.record.id):
            touched = await running.tpm.identity()
            present, ordinals = touched.keys, touched.ordinals
            record = running.record
            ended_roles = set()
            if CommandCode.ChangeEPS in ordinals:
                ended_roles |= {"EK", "GUEST_AK"}
            if CommandCode.ChangePPS in ordinals:
                ended_roles |= {AK}
            there = {key.tpmt_public: key for key in present}
            ended = {key.tpmt_public for key in record.keys if key.role in ended_roles} - there.keys()
            # Those that are not persistent any more are made again by who wants them.
            keys = [
                there.pop(key.tpmt_public, dataclasses.replace(key, handle=0))
                for key in record.keys
                if key.tpmt_public not in ended
            ]
            keys += there.values()
            await self._write_down(record, keys, ended)
            # Only now: a daemon that ends before leaves it to the next one.
            await running.tpm.forget_identity(touched.generation)

    async def replaced(self, running: Running, record: InstanceRecord) -> None:
        """Another TPM's state was put in the place of the instance's, whose keys are now those of `record`.

        While they are not known, as before a TPM is started, nothing is revoked: it may be the same TPM's. Whether it is, the
        TPM has to prove (invariant 9).
        """
        current = await self._lifecycle.blocking(self._store.certificates.current, record.id)
        if not any(item.revoked_at is None for item in current):
            return
        gone = await self._lifecycle.blocking(_foreign, record, current) if record.keys else []
        certified = bool(record.keys) and not gone and await self._has_certified_keys(running, record, current)
        identity = IdentityState.CERTIFIED if certified else IdentityState.CHANGED
        await self._save(record, record.keys, identity, gone)

    async def _has_certified_keys(self, running: Running, record: InstanceRecord, current: Sequence[CertificateRecord]) -> bool:
        """Whether the TPM proves every EK and the AK that were certified."""
        blocking, issuer = self._lifecycle.blocking, self._identity.issuer
        aks = [item for item in current if item.kind == AK and item.revoked_at is None]
        try:
            eks = await blocking(certified_eks, record.id, current, issuer)
            layout = NvLayout(record.profile.nv_layout)
            pairs = [(await blocking(certified_key, item, layout, issuer), ek) for item in aks for _, ek in eks]
            await prove(running.tpm.prove, pairs, blocking)
        except VtpmError as error:
            log.warning("identity.not_proven", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            return False
        return bool(pairs)

    async def _write_down(self, record: InstanceRecord, keys: Sequence[KeyRecord], ended: set[bytes]) -> None:
        current = await self._lifecycle.blocking(self._store.certificates.current, record.id)
        gone = _certificates_of(record, ended, current)
        await self._save(record, keys, IdentityState.CHANGED if gone else record.identity, gone)

    async def _save(
        self, record: InstanceRecord, keys: Sequence[KeyRecord], identity: IdentityState, gone: Sequence[CertificateRecord]
    ) -> None:
        if tuple(keys) == record.keys and identity is record.identity and not gone:
            return
        serials = [item.serial for item in gone]
        await self._lifecycle.blocking(self._store.identities.change, record.id, keys, identity, serials, REASON)
        changed = await self._lifecycle.blocking(self._store.get, str(record.id))
        self._lifecycle.refresh(changed)
        if gone:
            self._identity.metrics.count_identity_change()
            log.warning("identity.changed", instance=str(record.id), name=record.name, revoked=len(gone))
        self._lifecycle.hub.publish("UPDATED", changed)


def _certificates_of(
    record: InstanceRecord, ended: set[bytes], current: Sequence[CertificateRecord]
) -> list[CertificateRecord]:
    """Return the certificates of the keys that ended; with an EK the platform certificate goes, which is held by it."""
    named = {(key.role, key.algorithm) for key in record.keys if key.tpmt_public in ended}
    gone = [item for item in current if item.revoked_at is None and (item.kind, item.algorithm) in named]
    if any(item.kind == "EK" for item in gone):
        gone += [item for item in current if item.revoked_at is None and item.kind == PLATFORM]
    return gone


def _foreign(record: InstanceRecord, current: Sequence[CertificateRecord]) -> list[CertificateRecord]:
    """Return the certificates of keys that the instance's TPM does not have. Blocking."""
    there = {_spki(public_key(key.tpmt_public)) for key in record.keys}
    valid = [item for item in current if item.revoked_at is None]
    gone = [
        item
        for item in valid
        if item.kind in ("EK", AK) and _spki(x509.load_der_x509_certificate(item.der).public_key()) not in there
    ]
    if any(item.kind == "EK" for item in gone):
        # What hangs on the same seed.
        gone += [item for item in valid if item.kind in (PLATFORM, "GUEST_AK")]
    return gone


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
