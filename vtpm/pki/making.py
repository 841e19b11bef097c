"""Making a CA: a root and an issuing CA, ECDSA P-384 with SHA-384; and requests for the operator's own root to sign."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from vtpm.errors import InvalidArgumentError
from vtpm.pki import der
from vtpm.pki.authority import new_serial, subject_key_id
from vtpm.pki.model import check_text
from vtpm.pki.signer import CaPrivateKey, KeySigner, Signer, signature_hash

ROOT_LIFETIME: Final = dt.timedelta(days=30 * 365)
ISSUING_LIFETIME: Final = dt.timedelta(days=20 * 365)
# ub-common-name (RFC 5280, appendix A).
_MAX_COMMON_NAME: Final = 64
# The CA may be made on a host whose clock is a little ahead of those that ask it.
_BACKDATING: Final = dt.timedelta(hours=1)
_CA_USAGE: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class NewCa:
    """A CA's certificate and its private key."""

    certificate: x509.Certificate
    key: CaPrivateKey


def ca_name(common_name: str) -> x509.Name:
    """Return a CA's name.

    Raises:
        InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
    """
    if len(check_text(common_name, "a CA's name")) > _MAX_COMMON_NAME:
        raise InvalidArgumentError(
            "CERTIFICATE_TEXT_INVALID", f"a CA's name has at most {_MAX_COMMON_NAME} characters", remedy="shorten it"
        )
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def new_ca_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def make_root(common_name: str, *, now: dt.datetime) -> NewCa:
    """Make a self-signed root. Its path length is 1: issuing CAs below it, and nothing below those."""
    key, name = new_ca_key(), ca_name(common_name)
    now = now.astimezone(dt.UTC).replace(microsecond=0)
    builder = _builder(name, name, key.public_key(), now - _BACKDATING, now + ROOT_LIFETIME, path_length=1)
    return NewCa(builder.sign(key, signature_hash(key.public_key())), key)


def make_issuing(root: NewCa, common_name: str, *, now: dt.datetime) -> NewCa:
    """Make an issuing CA under `root`. It does not outlive it, and nothing but end entities is below it."""
    key, name = new_ca_key(), ca_name(common_name)
    now = now.astimezone(dt.UTC).replace(microsecond=0)
    not_before = max(now - _BACKDATING, root.certificate.not_valid_before_utc)
    not_after = min(now + ISSUING_LIFETIME, root.certificate.not_valid_after_utc)
    builder = _builder(name, root.certificate.subject, key.public_key(), not_before, not_after, path_length=0)
    identifier = x509.AuthorityKeyIdentifier(subject_key_id(root.certificate), None, None)
    builder = builder.add_extension(identifier, critical=False)
    return NewCa(builder.sign(root.key, signature_hash(KeySigner(root.key).public_key)), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    not_before: dt.datetime,
    not_after: dt.datetime,
    *,
    path_length: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(new_serial())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_CA_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def make_request(signer: Signer, common_name: str) -> bytes:
    """Return a certification request (PKCS#10, RFC 2986) for an issuing CA, DER: name and key, proven by its signature."""
    information = der.sequence(
        der.integer(0),
        ca_name(common_name).public_bytes(),
        signer.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        der.tagged(0, b""),
    )
    return der.sequence(information, signer.algorithm, der.bits(signer.sign(information)))
