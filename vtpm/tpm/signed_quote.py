"""A quote checked before it leaves: signed over exactly these bytes by the key that it is handed out with.

TPMS_ATTEST and TPMT_SIGNATURE: TPM 2.0 Library, Part 2, 10.12.12 and 11.3.4.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from vtpm.errors import EngineError, InvalidArgumentError
from vtpm.tpm.codes import AlgId, Tag
from vtpm.tpm.keys import public_key

_MAGIC: Final = 0xFF544347
_HEAD: Final = struct.Struct(">IH")
_ALGORITHMS: Final = struct.Struct(">HH")
_U16: Final = struct.Struct(">H")
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    AlgId.SHA256: hashes.SHA256(),
    AlgId.SHA384: hashes.SHA384(),
    AlgId.SHA512: hashes.SHA512(),
}


def check_quote(attest: bytes, signature: bytes, tpmt_public: bytes, nonce: bytes) -> None:
    """Return if `attest` is a TPM's quote over `nonce`, signed by the key of `tpmt_public`.

    Raises:
        EngineError: QUOTE_NOT_SIGNED_BY_AK; such a quote must not be handed out.
    """
    try:
        magic, kind = _HEAD.unpack_from(attest)
        _signer, at = _sized(attest, _HEAD.size)
        extra_data, _ = _sized(attest, at)
        if (magic, kind) != (_MAGIC, Tag.ATTEST_QUOTE) or extra_data != nonce:
            raise _refused("it is no quote over the nonce")
        _verify(attest, signature, tpmt_public)
    except (struct.error, ValueError, InvalidArgumentError):
        raise _refused("it is malformed") from None
    except InvalidSignature:
        raise _refused("the signature is another key's") from None


def _verify(attest: bytes, signature: bytes, tpmt_public: bytes) -> None:
    algorithm, hash_alg = _ALGORITHMS.unpack_from(signature)
    digest, key = _HASHES.get(hash_alg), public_key(tpmt_public)
    first, at = _sized(signature, _ALGORITHMS.size)
    if digest is None:
        raise _refused(f"it is signed with the hash 0x{hash_alg:04x}")
    if isinstance(key, rsa.RSAPublicKey) and algorithm == AlgId.RSASSA:
        key.verify(first, attest, padding.PKCS1v15(), digest)
    elif isinstance(key, ec.EllipticCurvePublicKey) and algorithm == AlgId.ECDSA:
        second, _ = _sized(signature, at)
        numbers = int.from_bytes(first, "big"), int.from_bytes(second, "big")
        key.verify(encode_dss_signature(*numbers), attest, ec.ECDSA(digest))
    else:
        raise _refused(f"it is signed by the scheme 0x{algorithm:04x}")


def _sized(data: bytes, offset: int) -> tuple[bytes, int]:
    (size,) = _U16.unpack_from(data, offset)
    end = offset + _U16.size + size
    if end > len(data):
        raise ValueError
    return data[offset + _U16.size : end], end


def _refused(why: str) -> EngineError:
    return EngineError(
        "QUOTE_NOT_SIGNED_BY_AK",
        f"the TPM's quote is not handed out: {why}",
        remedy="reset the instance together with its VM; if it happens again, say so to those who make this service",
    )
