"""Who signs: a private key in hand, or one that stays elsewhere."""

from __future__ import annotations

from typing import Final, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from vtpm.errors import InvalidArgumentError
from vtpm.pki import der

CaPrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
SignatureHash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512
CaPublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_MIN_RSA_BITS: Final = 3072
# Curve → (hash, OID of ecdsa-with-SHA…): RFC 5758, 3.2.
_ECDSA: Final[dict[str, tuple[SignatureHash, str]]] = {
    "secp256r1": (hashes.SHA256(), "1.2.840.10045.4.3.2"),
    "secp384r1": (hashes.SHA384(), "1.2.840.10045.4.3.3"),
    "secp521r1": (hashes.SHA512(), "1.2.840.10045.4.3.4"),
}
_RSA_SHA384: Final = "1.2.840.113549.1.1.12"


class Signer(Protocol):
    """Signs for a CA. Thread-safe; calls may block."""

    @property
    def public_key(self) -> CaPublicKey:
        """The key that checks the signatures."""

    @property
    def algorithm(self) -> bytes:
        """The signatures' AlgorithmIdentifier, DER."""

    def sign(self, data: bytes) -> bytes:
        """Return the signature of `data`, hashed as the algorithm says, as a certificate's BIT STRING holds it."""


def ca_public_key(key: PublicKeyTypes, subject: str = "") -> CaPublicKey:
    """Return `key` if a CA may have it: P-256, P-384, P-521, or RSA of at least 3072 bits.

    Raises:
        InvalidArgumentError: CA_KEY_WEAK or CA_KEY_UNSUPPORTED.
    """
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise InvalidArgumentError(
                "CA_KEY_WEAK",
                f"a CA's RSA key needs at least {_MIN_RSA_BITS} bits, this has {key.key_size}",
                subject=subject,
                remedy="use ECDSA P-384, or RSA of 3072 bits and more",
            )
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _ECDSA:
        return key
    kind = f"curve {key.curve.name}" if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__.strip("_")
    raise InvalidArgumentError(
        "CA_KEY_UNSUPPORTED", f"a CA's key is ECDSA (P-256, P-384, P-521) or RSA, not {kind}", subject=subject
    )


def signature_hash(key: CaPublicKey) -> SignatureHash:
    """Return the hash that signatures of `key` use."""
    return hashes.SHA384() if isinstance(key, rsa.RSAPublicKey) else _ECDSA[key.curve.name][0]


def signature_algorithm(key: CaPublicKey) -> bytes:
    """Return the AlgorithmIdentifier of signatures of `key`, DER."""
    if isinstance(key, rsa.RSAPublicKey):
        return der.sequence(der.oid(_RSA_SHA384), der.NULL)
    return der.sequence(der.oid(_ECDSA[key.curve.name][1]))


class KeySigner:
    """Implements Signer with a private key in memory.

    Raises:
        InvalidArgumentError: CA_KEY_WEAK or CA_KEY_UNSUPPORTED.
    """

    def __init__(self, key: CaPrivateKey, subject: str = "") -> None:
        self._key = key
        self._public = ca_public_key(key.public_key(), subject)
        self._algorithm = signature_algorithm(self._public)
        self._hash = signature_hash(self._public)

    def __repr__(self) -> str:
        return f"KeySigner({type(self._public).__name__})"

    @property
    def public_key(self) -> CaPublicKey:
        """See Signer."""
        return self._public

    @property
    def algorithm(self) -> bytes:
        """See Signer."""
        return self._algorithm

    def sign(self, data: bytes) -> bytes:
        """See Signer."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(data, padding.PKCS1v15(), self._hash)
        return self._key.sign(data, ec.ECDSA(self._hash))
