"""ActivationService: an AK that a guest made is certified once its TPM has proven to hold it beside the instance's EK.

A proof is answered once, for the instance and the key that it was begun for, in time and with the right secret; whatever else
comes is refused, recorded, and counts against the instance's allowance.

Invariant 9: the EK is that of a certificate that this CA issued for the instance, not what a list of keys says.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hmac
import secrets
import time
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

import structlog
from cryptography import x509

from vtpm.errors import EngineError, ErrorKind, FailedPreconditionError, InvalidArgumentError, TpmError, VtpmError
from vtpm.instance.certification import AK, EK, record_of
from vtpm.instance.identity import Identity
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.proof import certified_eks, certified_key, prove
from vtpm.pki.authority import Authority
from vtpm.store.model import CertificateRecord, IdentityState, InstanceRecord, KeyRecord
from vtpm.tpm.credential import Credential, make_credential, new_secret
from vtpm.tpm.keys import ObjectAttribute, key_algorithm, name_of, parse_public
from vtpm.tpm.layouts import NvLayout

audit: Final = structlog.get_logger("vtpm.audit")

GUEST_AK: Final = "GUEST_AK"
# Proofs that an instance may have begun and not ended.
_MAX_OPEN: Final = 4
# Begun and refused ones count; so many in so many seconds, for each instance.
_ALLOWANCE: Final = 10
_WINDOW_S: Final = 60.0
_MAX_PUBLIC_SIZE: Final = 1024
_NEEDED: Final = (
    ObjectAttribute.FIXED_TPM
    | ObjectAttribute.FIXED_PARENT
    | ObjectAttribute.SENSITIVE_DATA_ORIGIN
    | ObjectAttribute.RESTRICTED
    | ObjectAttribute.SIGN
)
# What a TPM answers whose guest keeps it from a proof of the service's: no room for objects and sessions, an auth of its own,
# keys that firmware took away, a hierarchy that it disabled.
_RC_FORMAT_ONE: Final = 0x80
_RC_FORMAT_ONE_MASK: Final = 0xBF
_KEPT_BUSY: Final = frozenset((0x902, 0x903, 0x904, 0x905, 0x906, 0x921, 0x8E, 0xA2, 0x8B, 0x85))


@dataclass(frozen=True, slots=True)
class Begun:
    """What the guest's TPM has to open, until `expires`."""

    activation: str
    credential: Credential
    ek: KeyRecord
    expires: dt.datetime


@dataclass(frozen=True, slots=True)
class Certified:
    """The certificate, and the CA that issued it, the root last."""

    record: CertificateRecord
    chain: tuple[x509.Certificate, ...]


@dataclass(slots=True)
class _Open:
    instance: uuid.UUID
    ak_public: bytes
    ek_public: bytes
    secret: bytes = field(repr=False)
    deadline: float


class Activations:
    """Proofs that have begun. Used from the event loop only; the daemon's end forgets them, and the guest begins anew."""

    def __init__(self, lifecycle: Lifecycle, identity: Identity, *, timeout_s: float) -> None:
        self._lifecycle = lifecycle
        self._identity = identity
        self._timeout_s = timeout_s
        self._open: dict[str, _Open] = {}
        self._recent: dict[uuid.UUID, deque[float]] = {}

    async def begin(self, ref: str, ak_public: bytes, ek_algorithm: str) -> Begun:
        """Return a credential for a guest's key.

        Raises:
            InvalidArgumentError: AK_UNSUITABLE, EK_UNKNOWN, PUBLIC_AREA_INVALID.
            FailedPreconditionError: CA_MISSING, IDENTITY_NOT_CERTIFIED.
            VtpmError: ACTIVATIONS_LIMITED.
        """
        record = await self._lifecycle.blocking(self._lifecycle.store.get, ref)
        self._spend(record)
        self._authority()
        public = _ak_public(ak_public)
        ek = await self._lifecycle.blocking(self._ek, record, ek_algorithm)
        secret = new_secret()
        credential = await self._lifecycle.blocking(make_credential, ek.tpmt_public, name_of(public), secret)
        activation = secrets.token_urlsafe(24)
        self._open[activation] = _Open(record.id, public, ek.tpmt_public, secret, time.monotonic() + self._timeout_s)
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self._timeout_s)
        self._identity.metrics.count_activation("begun")
        audit.info("activation.begun", instance=str(record.id), activation=activation[:8], ak=name_of(public).hex())
        # Where it is just now is for the guest's convenience; with 0 it makes the EK from its template.
        there = next((key.handle for key in record.keys if (key.role, key.algorithm) == (EK, ek.algorithm)), 0)
        return Begun(activation, credential, replace(ek, handle=there), expires)

    async def complete(self, ref: str, activation: str, secret: bytes) -> Certified:
        """Certify the key, if this is the secret that its TPM was given.

        Raises:
            FailedPreconditionError: ACTIVATION_UNKNOWN (answered already, another instance's, or never begun),
                ACTIVATION_EXPIRED, ACTIVATION_WRONG, CA_MISSING.
            VtpmError: ACTIVATIONS_LIMITED.
        """
        record = await self._lifecycle.blocking(self._lifecycle.store.get, ref)
        proof = self._open.get(activation)
        if proof is None or proof.instance != record.id:
            # Said alike, so that nobody learns of another instance's proofs; and those are not used up.
            self._refuse(record, activation, "ACTIVATION_UNKNOWN", "there is no such proof to answer, or it was answered")
        # Once, whatever comes of it.
        del self._open[activation]
        if time.monotonic() > proof.deadline:
            self._refuse(record, activation, "ACTIVATION_EXPIRED", f"the answer took more than {self._timeout_s:g} s")
        if not hmac.compare_digest(proof.secret, secret):
            self._refuse(record, activation, "ACTIVATION_WRONG", "this is not the secret; the key was not proven")
        await self._check_ek(record, activation, proof)
        authority = self._authority()
        certificate = await asyncio.shield(self._lifecycle.blocking(self._issue, authority, record.id, proof.ak_public))
        self._identity.metrics.count_activation("certified")
        audit.info(
            "activation.certified",
            instance=str(record.id),
            activation=activation[:8],
            ak=name_of(proof.ak_public).hex(),
            serial=f"{certificate.serial:x}",
        )
        return Certified(certificate, authority.chain)

    def _issue(self, authority: Authority, instance: uuid.UUID, ak_public: bytes) -> CertificateRecord:
        """Issue and record. Blocking. Not `current`: the guest asks again when it needs another, nobody renews it."""
        issued = authority.issue_ak(ak_public, instance, now=dt.datetime.now(dt.UTC))
        algorithm = key_algorithm(ak_public)
        record = replace(record_of(issued, instance, GUEST_AK, algorithm.value if algorithm else ""), current=False)
        self._lifecycle.store.certificates.add([record])
        return record

    def _authority(self) -> Authority:
        authority = self._identity.authority()
        if authority is None:
            raise FailedPreconditionError(
                "CA_MISSING", "there is no certificate authority in force", remedy="set ca = auto, or: vtpm ca init"
            )
        return authority

    def _eks(self, record: InstanceRecord) -> list[KeyRecord]:
        """Return the EKs that are certified for an instance. Blocking.

        Raises:
            FailedPreconditionError: IDENTITY_NOT_CERTIFIED; as vtpm.instance.proof.certified_eks.
        """
        if record.identity is not IdentityState.CERTIFIED:
            raise FailedPreconditionError(
                "IDENTITY_NOT_CERTIFIED",
                f"the instance's EKs are not certified: it is {record.identity.value}",
                subject=record.name,
                remedy="create a new instance",
            )
        current = self._lifecycle.store.certificates.current(record.id)
        return [key for _, key in certified_eks(record.id, current, self._identity.issuer)]

    def _ek(self, record: InstanceRecord, algorithm: str) -> KeyRecord:
        """Return the EK that is wanted, by default the profile's first. Blocking."""
        eks = {key.algorithm: key for key in self._eks(record)}
        for wanted in (algorithm,) if algorithm else record.profile.ek_algorithms:
            if wanted in eks:
                return eks[wanted]
        raise InvalidArgumentError(
            "EK_UNKNOWN", "the instance has no such EK", subject=algorithm[:80], remedy=f"one of {', '.join(eks)}"
        )

    async def _check_ek(self, record: InstanceRecord, activation: str, proof: _Open) -> None:
        """Refuse if the EK that the guest's answer was made with is not the instance's, or not that of the TPM that runs now.

        Raises:
            FailedPreconditionError: ACTIVATION_WRONG; IDENTITY_NOT_CERTIFIED.
        """
        blocking, issuer = self._lifecycle.blocking, self._identity.issuer
        eks = await blocking(self._eks, record)
        ek = next((key for key in eks if key.tpmt_public == proof.ek_public), None)
        running = self._lifecycle.by_id(record.id)
        if ek is None or running is None:
            self._refuse(record, activation, "ACTIVATION_WRONG", "the EK of this proof is not the instance's any more")
        current = await blocking(self._lifecycle.store.certificates.current, record.id)
        aks = [item for item in current if item.kind == AK and item.revoked_at is None]
        layout = NvLayout(record.profile.nv_layout)
        pairs = [(await blocking(certified_key, item, layout, issuer), ek) for item in aks]
        elsewhere = "the TPM that runs now does not have the EK of this proof"
        try:
            await prove(running.tpm.prove, pairs, blocking)
        except TpmError as error:
            if (error.rc & _RC_FORMAT_ONE_MASK if error.rc & _RC_FORMAT_ONE else error.rc) not in _KEPT_BUSY:
                self._refuse(record, activation, "ACTIVATION_WRONG", elsewhere)
            # The guest uses all of the TPM's memory, or has an endorsement auth of its own. What it has answered is the proof:
            # only the TPM with that EK could.
            audit.info("activation.ek_in_use", instance=str(record.id), activation=activation[:8], tpm_rc=f"0x{error.rc:03x}")
        except EngineError as error:
            if error.reason != "IDENTITY_NOT_PROVEN":
                raise
            self._refuse(record, activation, "ACTIVATION_WRONG", elsewhere)

    def _spend(self, record: InstanceRecord) -> None:
        """Take one from the instance's allowance.

        Raises:
            VtpmError: ACTIVATIONS_LIMITED.
        """
        now = time.monotonic()
        for activation in [key for key, proof in self._open.items() if proof.deadline < now - self._timeout_s]:
            del self._open[activation]
        recent = self._recent.setdefault(record.id, deque())
        while recent and recent[0] < now - _WINDOW_S:
            recent.popleft()
        waiting = sum(proof.instance == record.id and proof.deadline >= now for proof in self._open.values())
        if len(recent) >= _ALLOWANCE or waiting >= _MAX_OPEN:
            self._identity.metrics.count_activation("limited")
            audit.warning("activation.limited", instance=str(record.id), name=record.name)
            raise VtpmError(
                "ACTIVATIONS_LIMITED",
                f"an instance may begin or fail {_ALLOWANCE} proofs in {_WINDOW_S:g} s, with {_MAX_OPEN} unanswered",
                subject=record.name,
                remedy="answer what was begun, or wait a minute",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            )
        recent.append(now)

    def _refuse(self, record: InstanceRecord, activation: str, reason: str, message: str) -> NoReturn:
        self._spend(record)
        self._identity.metrics.count_activation("refused")
        audit.warning("activation.refused", instance=str(record.id), name=record.name, activation=activation[:8], reason=reason)
        raise FailedPreconditionError(reason, message, subject=record.name, remedy="begin again")


def _ak_public(given: bytes) -> bytes:
    """Return the TPMT_PUBLIC of a key that can be an AK; tools write it with its size before it.

    Raises:
        InvalidArgumentError: AK_UNSUITABLE or PUBLIC_AREA_INVALID.
    """
    public = given[2:] if int.from_bytes(given[:2], "big") == len(given) - 2 else given
    if len(public) > _MAX_PUBLIC_SIZE:
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", "the public area is too large")
    area = parse_public(public)
    if area.attributes & (_NEEDED | ObjectAttribute.DECRYPT) != _NEEDED:
        raise InvalidArgumentError(
            "AK_UNSUITABLE",
            "an AK is restricted, sign, fixedTPM, fixedParent, sensitiveDataOrigin, and not decrypt",
            remedy="make it with tpm2_createak, or with these attributes",
        )
    name_of(public)
    return public
