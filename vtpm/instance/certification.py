"""From a fresh TPM to certificates: proof first (TPM2_ActivateCredential), then issuance, then what goes into NV.

Certified on proof, never on trust: a certificate says that a key is in the TPM that has the EK, so the TPM has to show it,
although its worker is our own.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hmac
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeVar

from cryptography import x509

from vtpm.engine.identity import GUEST_AK, Challenge, FreshTpm, TpmProperties
from vtpm.errors import EngineError, ErrorKind
from vtpm.pki.authority import Authority
from vtpm.pki.model import CertificateKind, IssuedCertificate, PlatformDescription, TpmDescription
from vtpm.store.certificates import subject_key_of
from vtpm.store.model import CertificateRecord, KeyRecord, PlatformRecord
from vtpm.tpm.credential import make_credential, new_secret
from vtpm.tpm.keys import KeyAlgorithm, ak_template, ek_template, name_of, parse_public
from vtpm.tpm.layouts import NvLayout, entries
from vtpm.tpm.nv import NvEntry

# The certificates' kinds in the store; a guest's AK is one in the place that a cloud's agents know, or one that the guest made.
EK: Final = CertificateKind.EK.value
AK: Final = CertificateKind.AK.value
PLATFORM: Final = CertificateKind.PLATFORM.value
# tpmManufacturer, tpmModel, tpmVersion.
_TPM_NAME_OIDS: Final = ("2.23.133.2.1", "2.23.133.2.2", "2.23.133.2.3")


_Result = TypeVar("_Result")


class Blocking(Protocol):
    """Runs a blocking function outside the event loop (vtpm.instance.lifecycle.Lifecycle.blocking)."""

    def __call__(self, function: Callable[[], _Result], /) -> Awaitable[_Result]:
        """Return what `function` returns."""


class Certification:
    """Certifies one TPM that is being manufactured; an object for each, and its `certificates` when it is done."""

    def __init__(
        self, authority: Authority, instance: uuid.UUID, layout: NvLayout, platform: PlatformRecord, blocking: Blocking
    ) -> None:
        self._authority = authority
        self._instance = instance
        self._layout = layout
        self._platform = platform
        self._blocking = blocking
        self.certificates: tuple[CertificateRecord, ...] = ()

    async def __call__(self, tpm: FreshTpm) -> Sequence[NvEntry]:
        """Prove the TPM's keys, issue their certificates, return what its NV holds (vtpm.engine.identity.Certify).

        Raises:
            EngineError: IDENTITY_NOT_PROVEN.
            TpmError: the TPM can't open a credential.
            FailedPreconditionError: the CA can't issue now.
        """
        challenges, secrets = await self._blocking(lambda: _challenges(tpm.keys))
        check_answers(secrets, await tpm.activate(challenges))
        self.certificates = await self._blocking(lambda: self._issue(tpm))
        certificates = {(item.kind, item.algorithm): item.der for item in self.certificates}
        publics = {(key.role, key.algorithm): key.tpmt_public for key in tpm.keys}
        return entries(self._layout, self._instance, certificates, publics)

    def _issue(self, tpm: FreshTpm) -> tuple[CertificateRecord, ...]:
        now = dt.datetime.now(dt.UTC)
        description = describe_tpm(tpm.properties)
        issued: list[CertificateRecord] = []
        first_ek: IssuedCertificate | None = None
        for key in tpm.keys:
            if key.role == EK:
                certificate = self._authority.issue_ek(key.tpmt_public, description, now=now)
                first_ek = first_ek or certificate
            else:
                certificate = self._authority.issue_ak(key.tpmt_public, self._instance, now=now)
            issued.append(record_of(certificate, self._instance, key.role, key.algorithm))
        assert first_ek is not None
        platform = describe_platform(self._platform, self._instance)
        certificate = self._authority.issue_platform(first_ek, platform, description, now=now)
        return (*issued, record_of(certificate, self._instance, PLATFORM, ""))


def not_proven(message: str) -> EngineError:
    """Return the error of a TPM that does not prove to be what it says."""
    return EngineError(
        "IDENTITY_NOT_PROVEN", message, remedy="nothing was certified; see the log of the engine host", kind=ErrorKind.INTERNAL
    )


def _challenges(keys: Sequence[KeyRecord]) -> tuple[list[Challenge], list[bytes]]:
    """Return credentials that, all opened, prove the keys, and their secrets.

    The service's AK answers for every EK, so that all EKs are shown to be in the TPM that has it; any further key for one EK.
    """
    eks = [key for key in keys if key.role == EK]
    for key in keys:
        _check_template(key)
    pairs = [(ak, ek) for ak in keys if ak.role == AK for ek in eks]
    pairs += [(ak, eks[0]) for ak in keys if ak.role == GUEST_AK]
    if not pairs:
        raise not_proven("the TPM has no EK or no AK")
    return make_challenges(pairs)


def make_challenges(pairs: Sequence[tuple[KeyRecord, KeyRecord]]) -> tuple[list[Challenge], list[bytes]]:
    """Return a credential for each pair of an AK and an EK, and their secrets: who opens one holds both in one TPM."""
    secrets = [new_secret() for _ in pairs]
    challenges = [
        Challenge(ak, ek, make_credential(ek.tpmt_public, name_of(ak.tpmt_public), secret))
        for (ak, ek), secret in zip(pairs, secrets, strict=True)
    ]
    return challenges, secrets


def check_answers(secrets: Sequence[bytes], answers: Sequence[bytes]) -> None:
    """Compare what the TPM has opened with what the credentials hold.

    Raises:
        EngineError: IDENTITY_NOT_PROVEN.
    """
    if len(answers) != len(secrets) or not all(map(hmac.compare_digest, answers, secrets)):
        raise not_proven("the TPM has opened a credential to something else")


def _check_template(key: KeyRecord) -> None:
    """An EK's policy and attributes are what a relying party takes for granted, as they are not in its certificate."""
    algorithm = KeyAlgorithm(key.algorithm)
    template = ek_template(algorithm) if key.role == EK else ak_template(algorithm)
    wanted, made = (dataclasses.replace(parse_public(public), unique=()) for public in (template, key.tpmt_public))
    if wanted != made:
        raise not_proven(f"the {key.role} {key.algorithm} is not what its template makes")


def record_of(certificate: IssuedCertificate, instance: uuid.UUID, kind: str, algorithm: str) -> CertificateRecord:
    """Return what the store keeps of a certificate that was just issued."""
    return CertificateRecord(
        serial=certificate.serial,
        instance=instance,
        kind=kind,
        algorithm=algorithm,
        der=certificate.der,
        not_before=certificate.not_before,
        not_after=certificate.not_after,
        issuer_key_id=certificate.issuer_key_id,
        subject_key=subject_key_of(kind, certificate.der),
    )


def issued_of(record: CertificateRecord) -> IssuedCertificate:
    """Return a recorded EK certificate as what the authority gave out."""
    return IssuedCertificate(
        CertificateKind(record.kind), record.serial, record.der, record.not_before, record.not_after, record.issuer_key_id
    )


def describe_tpm(properties: TpmProperties) -> TpmDescription:
    """Return the TPM as certificates describe it: by what it tells of itself."""
    return TpmDescription(
        manufacturer=f"id:{properties.manufacturer:08X}",
        model=" ".join(properties.vendor.split()) or "TPM",
        version=f"id:{properties.firmware_version:08X}",
        revision=properties.revision,
    )


def description_in(ek_der: bytes) -> TpmDescription:
    """Return the TPM as an EK certificate of ours describes it in its SubjectAltName."""
    names = x509.load_der_x509_certificate(ek_der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (name,) = names.get_values_for_type(x509.DirectoryName)
    found = {item.oid.dotted_string: str(item.value) for item in name}
    manufacturer, model, version = (found[oid] for oid in _TPM_NAME_OIDS)
    return TpmDescription(manufacturer, model, version)


def describe_platform(platform: PlatformRecord, instance: uuid.UUID) -> PlatformDescription:
    """Return the platform as its certificate describes it; its serial number is the instance's id."""
    return PlatformDescription(platform.manufacturer, platform.model, platform.version, str(instance))
