"""What a verifier does with a quote, with `cryptography` alone: nothing here comes from the service's own code."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

_HASHES = {0x000B: hashes.SHA256, 0x000C: hashes.SHA384}


class QuoteRefusedError(Exception):
    """The quote proves nothing; the text says why."""


@dataclass(frozen=True)
class Attested:
    """What the TPM attested (TPMS_ATTEST, TPM 2.0 Library, Part 2, 10.12.12)."""

    nonce: bytes
    clock: int
    reset_count: int
    pcr_digest: bytes


def verify(attest: bytes, signature: bytes, ak_pem: str, *, nonce: bytes, pcrs: list[bytes]) -> Attested:
    """Check signature, nonce and PCR digest; `pcrs` are the selected values in order."""
    _verify_signature(attest, signature, ak_pem)
    attested = parse(attest)
    if attested.nonce != nonce:
        raise QuoteRefusedError("nonce")
    if attested.pcr_digest != hashlib.sha256(b"".join(pcrs)).digest():
        raise QuoteRefusedError("pcr digest")
    return attested


def parse(attest: bytes) -> Attested:
    """Take a TPMS_ATTEST of type quote apart."""
    magic, kind, name_size = struct.unpack_from(">IHH", attest)
    if magic != 0xFF544347 or kind != 0x8018:
        raise QuoteRefusedError("not made by a TPM")
    at = 8 + name_size
    (nonce_size,) = struct.unpack_from(">H", attest, at)
    nonce = attest[at + 2 : at + 2 + nonce_size]
    at += 2 + nonce_size
    clock, reset_count, _restarts, _safe, _firmware = struct.unpack_from(">QIIBQ", attest, at)
    at += 25
    (count,) = struct.unpack_from(">I", attest, at)
    at += 4
    for _ in range(count):
        at += 3 + attest[at + 2]
    (digest_size,) = struct.unpack_from(">H", attest, at)
    if at + 2 + digest_size != len(attest):
        raise QuoteRefusedError("length")
    return Attested(nonce, clock, reset_count, attest[at + 2 :])


def _verify_signature(attest: bytes, signature: bytes, ak_pem: str) -> None:
    scheme, hash_alg = struct.unpack_from(">HH", signature)
    algorithm = _HASHES[hash_alg]()
    key = serialization.load_pem_public_key(ak_pem.encode())
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            assert scheme == 0x0018
            (r_size,) = struct.unpack_from(">H", signature, 4)
            r = int.from_bytes(signature[6 : 6 + r_size], "big")
            s = int.from_bytes(signature[6 + r_size + 2 :], "big")
            key.verify(encode_dss_signature(r, s), attest, ec.ECDSA(algorithm))
        else:
            assert isinstance(key, rsa.RSAPublicKey)
            assert scheme == 0x0014
            key.verify(signature[6:], attest, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        raise QuoteRefusedError("signature") from None
