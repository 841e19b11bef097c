"""Invariant 9, the CA believes proof: a key is certified again if the TPM that runs now shows that it has it, beside its EK.

Nothing that a worker tells and no list of keys in the store says which keys these are. The EK is what this CA certified when
the TPM was manufactured: its certificate's signature is checked here, and the EK's template is known, so the certificate is all
that a credential needs. An AK is what the certificate before it says, in the same way. The running TPM then opens a credential
that is encrypted to that EK and bound to that AK's Name (TPM2_ActivateCredential), between two guest commands.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from vtpm.engine.identity import Challenge
from vtpm.errors import FailedPreconditionError
from vtpm.instance.certification import AK, EK, Blocking, check_answers, make_challenges
from vtpm.pki import oids
from vtpm.pki.checks import check_issued
from vtpm.store.model import CertificateRecord, InstanceRecord, KeyRecord
from vtpm.tpm.keys import AK_HANDLE, KeyAlgorithm, ak_template, ek_handle, ek_template, template_with
from vtpm.tpm.layouts import NvLayout, guest_aks

# Gives an issuing CA's certificate by the id of its key (vtpm.instance.authority.HostAuthority.issuer_certificate).
Issuer = Callable[[bytes], x509.Certificate | None]
# Has a TPM open credentials (vtpm.engine.interface.RunningTpm.prove, vtpm.engine.identity.HeldTpm.activate).
Activate = Callable[[Sequence[Challenge]], Awaitable[list[bytes]]]
# The quickest first: a guest waits while its TPM opens a credential.
_ORDER: Final = (KeyAlgorithm.ECC_P256, KeyAlgorithm.ECC_P384, KeyAlgorithm.RSA_2048, KeyAlgorithm.RSA_3072)


def certified_key(record: CertificateRecord, layout: NvLayout, issuer_of: Issuer) -> KeyRecord:
    """Return the key that a certificate of this CA is about, as it stands in its TPM. Blocking.

    Raises:
        FailedPreconditionError: ISSUER_UNKNOWN.
        InvalidArgumentError: CERTIFICATE_NOT_OURS, or PUBLIC_AREA_INVALID.
    """
    subject = str(record.instance)
    issuer = issuer_of(record.issuer_key_id)
    if issuer is None:
        raise FailedPreconditionError(
            "ISSUER_UNKNOWN",
            f"the CA that issued the {record.kind} certificate is not here",
            subject=subject,
            remedy="vtpm ca show; create a new instance",
        )
    usage = oids.EK_CERTIFICATE if record.kind == EK else oids.AK_CERTIFICATE
    key = check_issued(record.der, record.serial, usage, issuer, subject).public_key()
    assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    algorithm = KeyAlgorithm(record.algorithm)
    if record.kind == EK:
        return KeyRecord(EK, algorithm.value, ek_handle(algorithm), template_with(ek_template(algorithm), key))
    handle = AK_HANDLE if record.kind == AK else guest_aks(layout).get(algorithm, 0)
    return KeyRecord(record.kind, algorithm.value, handle, template_with(ak_template(algorithm), key))


def certified_eks(
    instance: uuid.UUID, current: Sequence[CertificateRecord], issuer_of: Issuer
) -> list[tuple[CertificateRecord, KeyRecord]]:
    """Return the EKs that this CA has certified for an instance and not revoked, the quickest first. Blocking.

    `current` are rows that are as they were written (vtpm.store.macs): which instance a certificate is for is theirs to say.

    Raises:
        FailedPreconditionError: IDENTITY_NOT_CERTIFIED, there is none; ISSUER_UNKNOWN.
        InvalidArgumentError: CERTIFICATE_NOT_OURS.
    """
    eks = [item for item in current if item.kind == EK and item.instance == instance and item.revoked_at is None]
    if not eks:
        raise FailedPreconditionError(
            "IDENTITY_NOT_CERTIFIED",
            "no EK of the instance is certified, or none any more",
            subject=str(instance),
            remedy="create a new instance",
        )
    eks.sort(key=lambda item: _ORDER.index(KeyAlgorithm(item.algorithm)))
    return [(item, certified_key(item, NvLayout.TCG, issuer_of)) for item in eks]


def due_keys(
    record: InstanceRecord, due: Sequence[CertificateRecord], current: Sequence[CertificateRecord], issuer_of: Issuer
) -> list[tuple[KeyRecord, KeyRecord]]:
    """Return pairs of each AK whose certificate is due and the EK beside which it is to be shown. Blocking.

    Raises:
        As `certified_eks`.
    """
    layout = NvLayout(record.profile.nv_layout)
    ek = certified_eks(record.id, current, issuer_of)[0][1]
    return [(certified_key(item, layout, issuer_of), ek) for item in due]


async def prove(activate: Activate, pairs: Sequence[tuple[KeyRecord, KeyRecord]], blocking: Blocking) -> None:
    """Have a TPM show that it holds each AK beside its EK.

    Raises:
        TpmError: the TPM can't open a credential: a key is gone, the guest uses all of its memory, or has changed the auth of
            the endorsement hierarchy. Nothing is left in it.
        EngineError: IDENTITY_NOT_PROVEN.
    """
    challenges, secrets = await blocking(lambda: make_challenges(pairs))
    check_answers(secrets, await activate(challenges))
