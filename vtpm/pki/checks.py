"""Whether certificates and a key can be a CA: what an operator brings is refused by name before anything trusts it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from vtpm.errors import InvalidArgumentError
from vtpm.pki.signer import CaPrivateKey, CaPublicKey, ca_public_key

_MAX_FILE: Final = 256 << 10
_MAX_CHAIN: Final = 8
_MIN_ANCHOR_RSA_BITS: Final = 2048
_WEAK_HASHES: Final = (hashes.MD5, hashes.SHA1, hashes.SHA224)
_PEM: Final = b"-----BEGIN"


def load_certificates(data: bytes, subject: str) -> list[x509.Certificate]:
    """Read PEM (any number) or DER (one).

    Raises:
        InvalidArgumentError: CA_CERTIFICATE_UNREADABLE, with `subject`.
    """
    try:
        if len(data) > _MAX_FILE:
            raise ValueError
        found = x509.load_pem_x509_certificates(data) if _PEM in data else [x509.load_der_x509_certificate(data)]
        if len(found) > _MAX_CHAIN:
            raise ValueError
        for certificate in found:
            # Extensions and keys are parsed when they are looked at; here is where that may fail.
            certificate.extensions  # noqa: B018
            certificate.public_key()
    except (ValueError, x509.UnsupportedGeneralNameType, x509.DuplicateExtension, TypeError):
        raise _refused(
            "CA_CERTIFICATE_UNREADABLE",
            f"this is no certificate, in PEM or DER, or more than {_MAX_CHAIN} of them",
            subject,
            "give the CA's certificate",
        ) from None
    return found


def load_private_key(data: bytes, passphrase: bytes | None, subject: str) -> CaPrivateKey:
    """Read a private key in PEM or DER: PKCS#8, encrypted or not, or the traditional forms.

    Raises:
        InvalidArgumentError: CA_KEY_ENCRYPTED, CA_KEY_PASSPHRASE_WRONG, CA_KEY_UNREADABLE, CA_KEY_WEAK or CA_KEY_UNSUPPORTED,
            with `subject`.
    """
    load = load_pem_private_key if _PEM in data else load_der_private_key
    try:
        if len(data) > _MAX_FILE:
            raise ValueError
        key = load(data, passphrase or None)
    except TypeError:
        if passphrase:
            # A passphrase for a key that needs none does not hurt.
            return load_private_key(data, None, subject)
        raise _refused(
            "CA_KEY_ENCRYPTED", "the key is encrypted, and no passphrase is given", subject, "give --passphrase-file"
        ) from None
    except Exception as error:  # noqa: BLE001  # OpenSSL's errors have many types, and their text is about the key's inside.
        wrong = passphrase and (isinstance(error, ValueError) and ("password" in str(error).lower() or b"ENCRYPTED" in data))
        if wrong:
            raise _refused(
                "CA_KEY_PASSPHRASE_WRONG", "the passphrase does not open the key", subject, "check the passphrase file"
            ) from None
        raise _refused(
            "CA_KEY_UNREADABLE", "this is no private key, in PEM or DER", subject, "give the CA's private key"
        ) from None
    ca_public_key(key.public_key(), subject)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    return key


def same_key(one: CaPublicKey, other: CaPublicKey) -> bool:
    """Whether two public keys are the same."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return one.public_bytes(*form) == other.public_bytes(*form)


def check_authority(
    certificate: x509.Certificate,
    others: Sequence[x509.Certificate],
    key: CaPublicKey,
    *,
    now: dt.datetime,
    subject: str = "",
    chain_subject: str = "",
    key_subject: str = "",
) -> tuple[x509.Certificate, ...]:
    """Return the chain of an issuing CA: its certificate first, a self-signed root last, from `others` in any order.

    `key` is the CA's key, that is what will sign. The subjects name where certificate, chain and key came from.

    Raises:
        InvalidArgumentError: CA_KEY_WEAK, CA_KEY_UNSUPPORTED, CA_KEY_MISMATCH, CA_NOT_A_CA, CA_KEY_USAGE, CA_NAME_EMPTY,
            CA_EXPIRED, CA_NOT_YET_VALID, CA_SIGNATURE_WEAK, CA_CHAIN_INCOMPLETE, CA_CHAIN_INVALID, CA_PATH_LENGTH or
            CA_OUTLIVES_ISSUER.
    """
    ca_public_key(certificate.public_key(), subject)
    if not same_key(ca_public_key(key, key_subject or subject), certificate.public_key()):  # type: ignore[arg-type]
        raise _refused(
            "CA_KEY_MISMATCH",
            "certificate and key do not belong together",
            key_subject or subject,
            "give the key that this certificate certifies",
        )
    chain = [certificate]
    _check_one(certificate, 0, now, subject)
    while chain[-1].subject != chain[-1].issuer:
        issuer = _issuer_of(chain[-1], others, chain_subject or subject)
        if issuer in chain or len(chain) >= _MAX_CHAIN:
            raise _refused("CA_CHAIN_INVALID", "the chain goes round", chain_subject or subject, "give the chain to the root")
        _check_one(issuer, len(chain), now, chain_subject or subject)
        if chain[-1].not_valid_after_utc > issuer.not_valid_after_utc:
            raise _refused(
                "CA_OUTLIVES_ISSUER",
                f"{_who(chain[-1])} ends {chain[-1].not_valid_after_utc:%Y-%m-%d}, after its issuer {_who(issuer)}, "
                f"which ends {issuer.not_valid_after_utc:%Y-%m-%d}",
                subject,
                "have the certificate issued for no longer than its issuer's",
            )
        chain.append(issuer)
    _check_signature(chain[-1], chain[-1], chain_subject or subject)
    return tuple(chain)


def check_issued(der: bytes, serial: int, usage: str, issuer: x509.Certificate, subject: str) -> x509.Certificate:
    """Return a certificate that `issuer` has signed; `usage` is the extended key usage that it has and no other.

    Raises:
        InvalidArgumentError: CERTIFICATE_NOT_OURS.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(issuer)
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        found = {item.dotted_string for item in usages}
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension):
        certificate, found = None, set()
    if certificate is None or certificate.serial_number != serial or found != {usage}:
        raise _refused(
            "CERTIFICATE_NOT_OURS",
            "the recorded certificate is not one that this CA has issued for such a key",
            subject,
            "nothing rests on it; find out who else can write the store",
        )
    return certificate


def _issuer_of(certificate: x509.Certificate, others: Sequence[x509.Certificate], subject: str) -> x509.Certificate:
    named = [other for other in others if other.subject == certificate.issuer]
    if not named:
        raise _refused(
            "CA_CHAIN_INCOMPLETE",
            f"the certificate of {certificate.issuer.rfc4514_string()!r}, which issued {_who(certificate)}, is missing",
            subject,
            "give it with --chain, up to the root",
        )
    for candidate in named:
        try:
            certificate.verify_directly_issued_by(candidate)
        except (InvalidSignature, ValueError, TypeError):
            continue
        if isinstance(certificate.signature_hash_algorithm, _WEAK_HASHES):
            raise _refused(
                "CA_SIGNATURE_WEAK",
                f"{_who(certificate)} is signed with {certificate.signature_hash_algorithm.name.upper()}",
                subject,
                "have it issued with SHA-256 or better",
            )
        return candidate
    raise _refused(
        "CA_CHAIN_INVALID",
        f"the signature of {_who(certificate)} is not that of {_who(named[0])}",
        subject,
        "give the chain that belongs to the certificate",
    )


def _check_signature(certificate: x509.Certificate, issuer: x509.Certificate, subject: str) -> None:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise _refused(
            "CA_CHAIN_INVALID", f"the root {_who(certificate)} is not signed by itself", subject, "give the right root"
        ) from None


def _check_one(certificate: x509.Certificate, below: int, now: dt.datetime, subject: str) -> None:
    """Check one certificate with `below` CAs under it in the chain."""
    check_time(certificate, now, subject)
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_ANCHOR_RSA_BITS:
        raise _refused(
            "CA_KEY_WEAK", f"{_who(certificate)} has an RSA key of {key.key_size} bits", subject, "use a CA with a stronger key"
        )
    if not list(certificate.subject):
        # RFC 5280, 4.1.2.6: who issues has a name.
        raise _refused("CA_NAME_EMPTY", "the CA's subject is empty", subject, "have the certificate issued with a name")
    extensions = certificate.extensions
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    if not constraints.ca:
        raise _refused(
            "CA_NOT_A_CA",
            f"{_who(certificate)} has no basic constraints of a CA (CA:TRUE)",
            subject,
            "give a CA's certificate, not a server's or client's",
        )
    if constraints.path_length is not None and constraints.path_length < below:
        raise _refused(
            "CA_PATH_LENGTH",
            f"{_who(certificate)} allows {constraints.path_length} CAs below it, the chain has {below}",
            subject,
            "have the issuing CA's certificate issued by a CA that may",
        )
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    if usage is None or not usage.key_cert_sign or (below == 0 and not usage.crl_sign):
        raise _refused(
            "CA_KEY_USAGE",
            f"the key usage of {_who(certificate)} must have keyCertSign" + ("" if below else " and cRLSign"),
            subject,
            "have the certificate issued for a CA",
        )


def check_time(certificate: x509.Certificate, now: dt.datetime, subject: str) -> None:
    """Check that `certificate` is valid `now`.

    Raises:
        InvalidArgumentError: CA_NOT_YET_VALID or CA_EXPIRED.
    """
    if now < certificate.not_valid_before_utc:
        raise _refused(
            "CA_NOT_YET_VALID",
            f"{_who(certificate)} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC, and now is "
            f"{now:%Y-%m-%d %H:%M:%S}",
            subject,
            "set this host's clock, or wait until then",
        )
    if now >= certificate.not_valid_after_utc:
        raise _refused(
            "CA_EXPIRED",
            f"{_who(certificate)} ended {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
            subject,
            "have its certificate renewed",
        )


def _who(certificate: x509.Certificate) -> str:
    return repr(certificate.subject.rfc4514_string()[:200])


def _refused(reason: str, message: str, subject: str, remedy: str) -> InvalidArgumentError:
    return InvalidArgumentError(reason, message, subject=subject, remedy=remedy)
