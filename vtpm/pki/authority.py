"""The issuing CA in hand: it signs EK, AK and platform certificates and its CRL."""

from __future__ import annotations

import datetime as dt
import secrets
import uuid
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vtpm.errors import FailedPreconditionError, InvalidArgumentError
from vtpm.pki import der, oids
from vtpm.pki.model import (
    CertificateKind,
    IssuedCertificate,
    IssuingPolicy,
    PlatformDescription,
    Revocation,
    RevocationReason,
    TpmDescription,
)
from vtpm.pki.platform import attribute_certificate_info
from vtpm.pki.profiles import ak_extensions, ak_subject, authority_key_id, ek_extensions, extension, issuer_extensions
from vtpm.pki.signer import Signer
from vtpm.tpm.keys import is_ak, public_key

_MIN_RSA_BITS: Final = 2048
_VERSION_3: Final = der.tagged(0, der.integer(2))
_VERSION_2: Final = der.integer(1)
_EMPTY_NAME: Final = der.sequence()
# Relying parties' clocks are a little wrong.
BACKDATING: Final = dt.timedelta(minutes=5)
_SERIAL_BITS: Final = 159


class Authority:
    """The issuing CA in hand: certificate chain and a signer. Thread-safe; calls block for a signature (about 1 ms).

    `chain` begins with the issuing CA's certificate and ends with the root's; `key_id` is the issuing CA's
    SubjectKeyIdentifier. That chain and signer fit is checked before (vtpm.pki.checks).
    """

    def __init__(self, chain: Sequence[x509.Certificate], signer: Signer, policy: IssuingPolicy) -> None:
        self.chain = tuple(chain)
        self.key_id = subject_key_id(self.chain[0])
        self.policy = policy
        self._signer = signer
        self._issuer = self.chain[0].subject.public_bytes()
        self._extensions = issuer_extensions(self.key_id, policy)
        self._not_before = max(certificate.not_valid_before_utc for certificate in self.chain)
        self._not_after = min(certificate.not_valid_after_utc for certificate in self.chain)

    def __repr__(self) -> str:
        return f"Authority({self.key_id.hex()})"

    @property
    def certificate(self) -> x509.Certificate:
        """The issuing CA's certificate."""
        return self.chain[0]

    def issue_ek(self, tpmt_public: bytes, tpm: TpmDescription, *, now: dt.datetime) -> IssuedCertificate:
        """Certify an EK (EK Credential Profile 2.5). The caller knows that `tpmt_public` is that of a TPM it made.

        Raises:
            InvalidArgumentError: PUBLIC_AREA_INVALID, or CERTIFIED_KEY_WEAK.
            FailedPreconditionError: CA_NOT_YET_VALID or CA_EXPIRED.
        """
        key = _certifiable(tpmt_public)
        return self._issue(
            CertificateKind.EK, key, _EMPTY_NAME, ek_extensions(key, tpm, self._extensions), now, self.policy.ek_lifetime
        )

    def issue_ak(self, tpmt_public: bytes, instance: uuid.UUID, *, now: dt.datetime) -> IssuedCertificate:
        """Certify an AK of `instance`. The caller has proof that it is in that instance's TPM.

        Raises:
            InvalidArgumentError: PUBLIC_AREA_INVALID, CERTIFIED_KEY_WEAK, or CERTIFIED_KEY_NO_AK.
            FailedPreconditionError: CA_NOT_YET_VALID or CA_EXPIRED.
        """
        key = _certifiable(tpmt_public)
        if not is_ak(tpmt_public):
            raise InvalidArgumentError(
                "CERTIFIED_KEY_NO_AK", "an AK is a restricted signing key that is fixed to its TPM", subject=str(instance)
            )
        extensions = ak_extensions(instance, self.policy.trust_domain, self._extensions)
        return self._issue(CertificateKind.AK, key, ak_subject(instance), extensions, now, self.policy.ak_lifetime)

    def issue_platform(
        self, ek: IssuedCertificate, platform: PlatformDescription, tpm: TpmDescription, *, now: dt.datetime
    ) -> IssuedCertificate:
        """Certify the platform that has the TPM of `ek` (Platform Certificate Profile 1.1); an attribute certificate.

        Raises:
            FailedPreconditionError: CA_NOT_YET_VALID or CA_EXPIRED.
        """
        not_before, not_after = self._validity(now, self.policy.ek_lifetime)
        not_after = max(min(not_after, ek.not_after), not_before)
        serial = new_serial()
        holder = x509.load_der_x509_certificate(ek.der)
        info = attribute_certificate_info(
            holder_issuer=holder.issuer.public_bytes(),
            holder_serial=holder.serial_number,
            issuer=self._issuer,
            algorithm=self._signer.algorithm,
            serial=serial,
            not_before=not_before,
            not_after=not_after,
            platform=platform,
            tpm=tpm,
            extensions=self._extensions,
        )
        return IssuedCertificate(CertificateKind.PLATFORM, serial, self._signed(info), not_before, not_after, self.key_id)

    def crl(self, revoked: Sequence[Revocation], *, number: int, now: dt.datetime) -> bytes:
        """Return the CRL of this issuer, DER (RFC 5280, 5); `number` must rise from one to the next."""
        entries = der.sequence(*(_entry(item) for item in revoked)) if revoked else b""
        tbs = der.sequence(
            _VERSION_2,
            self._signer.algorithm,
            self._issuer,
            der.time(now),
            der.time(now + self.policy.crl_lifetime),
            entries,
            der.tagged(
                0,
                der.sequence(authority_key_id(self.key_id), extension(oids.CRL_NUMBER, der.integer(number))),
            ),
        )
        return self._signed(tbs)

    def _issue(
        self,
        kind: CertificateKind,
        key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
        subject: bytes,
        extensions: bytes,
        now: dt.datetime,
        lifetime: dt.timedelta,
    ) -> IssuedCertificate:
        not_before, not_after = self._validity(now, lifetime)
        serial = new_serial()
        tbs = der.sequence(
            _VERSION_3,
            der.integer(serial),
            self._signer.algorithm,
            self._issuer,
            der.sequence(der.time(not_before), der.time(not_after)),
            subject,
            key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            der.tagged(3, extensions),
        )
        return IssuedCertificate(kind, serial, self._signed(tbs), not_before, not_after, self.key_id)

    def _signed(self, tbs: bytes) -> bytes:
        return der.sequence(tbs, self._signer.algorithm, der.bits(self._signer.sign(tbs)))

    def _validity(self, now: dt.datetime, lifetime: dt.timedelta) -> tuple[dt.datetime, dt.datetime]:
        """From a little before `now`; a certificate never outlives its chain."""
        now = now.astimezone(dt.UTC).replace(microsecond=0)
        if now < self._not_before:
            raise FailedPreconditionError(
                "CA_NOT_YET_VALID",
                f"the CA is valid from {self._not_before:%Y-%m-%d %H:%M:%S} UTC, and now is {now:%Y-%m-%d %H:%M:%S}",
                subject=self.certificate.subject.rfc4514_string(),
                remedy="set this host's clock",
            )
        if now >= self._not_after:
            raise FailedPreconditionError(
                "CA_EXPIRED",
                f"the CA's certificates ended {self._not_after:%Y-%m-%d %H:%M:%S} UTC",
                subject=self.certificate.subject.rfc4514_string(),
                remedy="vtpm ca rotate, or import the CA's new certificate",
            )
        return max(now - BACKDATING, self._not_before), min(now + lifetime, self._not_after)


def new_serial() -> int:
    """Return a random serial number, 1 to 2^159 - 1: at most 20 octets (RFC 5280, 4.1.2.2)."""
    return secrets.randbits(_SERIAL_BITS) or 1


def subject_key_id(certificate: x509.Certificate) -> bytes:
    """Return a certificate's SubjectKeyIdentifier; where it has none, the one that RFC 5280 makes from its key (4.2.1.2)."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest


def _certifiable(tpmt_public: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    key = public_key(tpmt_public)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        raise InvalidArgumentError("CERTIFIED_KEY_WEAK", f"an RSA key of {key.key_size} bits is not certified")
    return key


def _entry(item: Revocation) -> bytes:
    try:
        reason = RevocationReason[item.reason]
    except KeyError:
        raise InvalidArgumentError(
            "REVOCATION_REASON_UNKNOWN",
            f"{item.reason[:40]!r} is no reason to revoke a certificate",
            remedy=f"one of {', '.join(RevocationReason.__members__)}",
        ) from None
    # RFC 5280, 5.3.1: rather none than `unspecified`.
    extensions = der.sequence(extension(oids.CRL_REASON, der.enumerated(reason))) if reason else b""
    return der.sequence(der.integer(item.serial), der.time(item.time), extensions)
