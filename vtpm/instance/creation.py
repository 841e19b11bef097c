"""Making TPMs: manufacture, proof and certificates, for an instance that somebody waits for and for the pool."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from vtpm.engine.identity import ExtraKey
from vtpm.instance.identity import Identity
from vtpm.instance.lifecycle import Lifecycle
from vtpm.seal.keys import new_data_key
from vtpm.store.model import (
    CertificateRecord,
    IdentityState,
    InstanceRecord,
    KeyRecord,
    NewInstance,
    PlatformRecord,
    ProfileRecord,
)
from vtpm.tpm.layouts import NvLayout, guest_aks


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a new instance is to be, checked, with every default filled in."""

    name: str
    labels: Mapping[str, str]
    engine: str
    profile: ProfileRecord
    platform: PlatformRecord
    request_id: str = ""
    fingerprint: bytes = b""


@dataclass(frozen=True, slots=True)
class MadeTpm:
    """A TPM that was manufactured, and certified if there is a CA; its data key is not wrapped yet."""

    id: uuid.UUID
    data_key: bytes = field(repr=False)
    sealed: bytes = field(repr=False)
    keys: tuple[KeyRecord, ...]
    certificates: tuple[CertificateRecord, ...]


class Creation:
    """Makes TPMs and writes them down. Used from the event loop only."""

    def __init__(self, lifecycle: Lifecycle, identity: Identity) -> None:
        self._lifecycle = lifecycle
        self.identity = identity
        # Manufacture is bound by the processor: more at once only make each slower.
        self._manufacturing = asyncio.Semaphore(max(2, os.cpu_count() or 1))
        # Creations that somebody waits for.
        self.waiting = 0

    async def create(self, wanted: Wanted) -> InstanceRecord:
        """Make an instance, OFF; its certificates are recorded in the same transaction.

        Raises:
            AlreadyExistsError: INSTANCE_NAME_TAKEN or REQUEST_ID_TAKEN.
        """
        self.waiting += 1
        try:
            async with self._manufacturing:
                made = await self.make(wanted.engine, wanted.profile, wanted.platform)
        finally:
            self.waiting -= 1
        async with self._lifecycle.key_lock:
            new = await self.new_instance(made, wanted)
            return await self._lifecycle.blocking(self._lifecycle.store.create, new)

    async def make(self, engine: str, profile: ProfileRecord, platform: PlatformRecord, *, nice: int = 0) -> MadeTpm:
        """Manufacture a TPM and certify it."""
        instance, data_key = uuid.uuid4(), new_data_key()
        extra_keys = [ExtraKey(*item) for item in guest_aks(NvLayout(profile.nv_layout)).items()]
        certification = self.identity.certification(instance, profile, platform, self._lifecycle.blocking)
        made = await self._lifecycle.engine(engine).manufacture(
            instance, profile, data_key, certify=certification, extra_keys=extra_keys, nice=nice
        )
        certificates = certification.certificates if certification is not None else ()
        return MadeTpm(instance, data_key, made.sealed, made.keys, certificates)

    async def new_instance(self, made: MadeTpm, wanted: Wanted) -> NewInstance:
        """Return what the store is given; the key lock is held until it has it."""
        return NewInstance(
            id=made.id,
            name=wanted.name or f"vtpm-{made.id.hex[:12]}",
            labels=wanted.labels,
            profile=wanted.profile,
            keys=made.keys,
            engine=wanted.engine,
            wrapped_key=await self._lifecycle.blocking(self._lifecycle.keys.wrap, made.data_key, made.id),
            sealed=made.sealed,
            request_id=wanted.request_id,
            fingerprint=wanted.fingerprint,
            platform=wanted.platform,
            identity=IdentityState.CERTIFIED if made.certificates else IdentityState.UNCERTIFIED,
            certificates=made.certificates,
        )
