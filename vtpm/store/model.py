"""What the store keeps, as values."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from vtpm.seal.envelope import StateKind
from vtpm.seal.keys import WrappedKey


class InstanceState(enum.StrEnum):
    """The states of the design's section 3."""

    OFF = "OFF"
    ON = "ON"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an instance is FAILED; `time` in UTC."""

    reason: str
    message: str
    remedy: str
    time: dt.datetime


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A persistent key of the TPM; `role` is EK or AK, `algorithm` a name of vtpm.tpm.keys.KeyAlgorithm."""

    role: str
    algorithm: str
    handle: int
    tpmt_public: bytes


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """What a TPM was manufactured with; banks by hash name, such as `sha256`."""

    ek_algorithms: tuple[str, ...]
    ak_algorithm: str
    pcr_banks: tuple[str, ...]
    # A name of vtpm.tpm.layouts.NvLayout.
    nv_layout: str = "TCG"


class IdentityState(enum.StrEnum):
    """What the service can say of a TPM's keys: nothing, that it certified them, or that they are no longer those."""

    UNCERTIFIED = "UNCERTIFIED"
    CERTIFIED = "CERTIFIED"
    CHANGED = "CHANGED"


@dataclass(frozen=True, slots=True)
class PlatformRecord:
    """What an instance's platform certificate says that its VM is."""

    manufacturer: str = ""
    model: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """An instance. `boot_id` is that of the host boot that owns it, empty unless ON; `revision` rises with each visible
    change."""

    id: uuid.UUID
    name: str
    labels: Mapping[str, str]
    state: InstanceState
    failure: Failure | None
    profile: ProfileRecord
    keys: tuple[KeyRecord, ...]
    engine: str
    epoch: int
    boot_id: str
    revision: int
    created_at: dt.datetime
    updated_at: dt.datetime
    platform: PlatformRecord = PlatformRecord()
    identity: IdentityState = IdentityState.UNCERTIFIED


@dataclass(frozen=True, slots=True)
class NewInstance:
    """A manufactured instance to be stored; `sealed` is its permanent state at epoch 0, version 1."""

    id: uuid.UUID
    name: str
    labels: Mapping[str, str]
    profile: ProfileRecord
    keys: tuple[KeyRecord, ...]
    engine: str
    wrapped_key: WrappedKey
    sealed: bytes = field(repr=False)
    request_id: str = ""
    fingerprint: bytes = b""
    platform: PlatformRecord = PlatformRecord()
    identity: IdentityState = IdentityState.UNCERTIFIED
    certificates: tuple[CertificateRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class SealedState:
    """A sealed blob and the (epoch, version) at which it was made."""

    epoch: int
    version: int
    blob: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StateCommit:
    """A sealed blob that wants to become the instance's state: only under the present epoch, only as the next version."""

    instance: uuid.UUID
    epoch: int
    version: int
    blob: bytes = field(repr=False)
    kind: StateKind = StateKind.PERMANENT


@dataclass(frozen=True, slots=True)
class Filter:
    """Which instances are wanted; unset fields match all."""

    state: InstanceState | None = None
    name: str | None = None
    name_prefix: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def matches(self, record: InstanceRecord) -> bool:
        """Whether `record` is wanted."""
        return (
            self.state in (None, record.state)
            and self.name in (None, record.name)
            and record.name.startswith(self.name_prefix or "")
            and all(record.labels.get(key) == value for key, value in self.labels.items())
        )


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """A certificate that was issued. `kind` is a name of vtpm.pki.model.CertificateKind, `algorithm` that of the certified key,
    empty for PLATFORM; `current` says that it is the one in force for its key. Times are aware, in UTC."""

    serial: int
    instance: uuid.UUID
    kind: str
    algorithm: str
    der: bytes
    not_before: dt.datetime
    not_after: dt.datetime
    issuer_key_id: bytes
    revoked_at: dt.datetime | None = None
    revocation_reason: str = ""
    current: bool = True
    # SHA-256 over the certified key's SubjectPublicKeyInfo; empty for PLATFORM.
    subject_key: bytes = b""


@dataclass(frozen=True, slots=True)
class AuthorityRecord:
    """A certificate authority. `role` is ROOT or ISSUING; `state` CURRENT, RETIRED or PENDING; `chain` PEM, its own certificate
    first; `signer` SEALED (`key` is the sealed private key) or PKCS11 (`key` is the key's URI)."""

    id: uuid.UUID
    role: str
    state: str
    key_id: bytes
    chain: str
    signer: str
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PoolMember:
    """A TPM that waits for an instance to become; `key` says what it is good for."""

    id: uuid.UUID
    key: str
    created_at: dt.datetime


@dataclass(frozen=True, slots=True)
class PoolClaim:
    """What a pooled TPM becomes. An empty name is made from its id. `state` replaces the sealed state of the version before
    it, `certificates` those in force for the same keys."""

    id: uuid.UUID
    name: str
    labels: Mapping[str, str]
    platform: PlatformRecord
    request_id: str = ""
    fingerprint: bytes = b""
    state: SealedState | None = None
    certificates: tuple[CertificateRecord, ...] = ()
