"""A quote that is checked before it leaves."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from vtpm.errors import EngineError
from vtpm.tpm.codes import AlgId
from vtpm.tpm.keys import KeyAlgorithm, ak_template
from vtpm.tpm.signed_quote import check_quote

NONCE = b"a verifier's nonce"


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def attest_of(nonce: bytes = NONCE, *, magic: int = 0xFF544347, kind: int = 0x8018) -> bytes:
    return (
        struct.pack(">IH", magic, kind) + sized(b"signer") + sized(nonce) + bytes(17) + bytes(8) + bytes(4) + sized(bytes(32))
    )


class EccKey:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        numbers = self.key.public_key().public_numbers()
        point = sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))
        self.public = ak_template(KeyAlgorithm.ECC_P256)[:-4] + point

    def sign(self, attest: bytes) -> bytes:
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256())))
        head = struct.pack(">HH", AlgId.ECDSA, AlgId.SHA256)
        return head + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


class RsaKey:
    def __init__(self) -> None:
        self.key = rsa.generate_private_key(65537, 2048)
        modulus = self.key.public_key().public_numbers().n.to_bytes(256, "big")
        self.public = ak_template(KeyAlgorithm.RSA_2048)[:-2] + sized(modulus)

    def sign(self, attest: bytes) -> bytes:
        signature = self.key.sign(attest, padding.PKCS1v15(), hashes.SHA256())
        return struct.pack(">HH", AlgId.RSASSA, AlgId.SHA256) + sized(signature)


ECC, RSA = EccKey(), RsaKey()
KEYS = pytest.mark.parametrize("key", [ECC, RSA], ids=["ecc", "rsa"])


@KEYS
def test_a_quote_by_the_key_that_it_is_handed_out_with_is_taken(key: EccKey | RsaKey) -> None:
    check_quote(attest_of(), key.sign(attest_of()), key.public, NONCE)


@KEYS
@pytest.mark.parametrize("other", [EccKey(), RsaKey()], ids=["ecc", "rsa"])
def test_a_quote_by_another_key_is_refused(key: EccKey | RsaKey, other: EccKey | RsaKey) -> None:
    with pytest.raises(EngineError, match="is not handed out") as refused:
        check_quote(attest_of(), other.sign(attest_of()), key.public, NONCE)
    assert refused.value.reason == "QUOTE_NOT_SIGNED_BY_AK"


@KEYS
@pytest.mark.parametrize(
    "attest", [attest_of(b"another nonce"), attest_of(magic=0), attest_of(kind=0x8017)], ids=["nonce", "magic", "kind"]
)
def test_what_is_no_quote_over_the_nonce_is_refused(key: EccKey | RsaKey, attest: bytes) -> None:
    with pytest.raises(EngineError, match="no quote over the nonce"):
        check_quote(attest, key.sign(attest), key.public, NONCE)


@given(at=st.integers(0, 10_000), mask=st.integers(1, 255), part=st.integers(0, 2), key=st.sampled_from([ECC, RSA]))
def test_no_changed_byte_goes_unnoticed(at: int, mask: int, part: int, key: EccKey | RsaKey) -> None:
    attest = attest_of()
    parts = [bytearray(attest), bytearray(key.sign(attest)), bytearray(key.public)]
    # Of the public area what the key is made of: the rest says what it may be used for.
    first = len(key.public) - 64 if part == 2 else 0
    parts[part][first + at % (len(parts[part]) - first)] ^= mask
    with pytest.raises(EngineError):
        check_quote(bytes(parts[0]), bytes(parts[1]), bytes(parts[2]), NONCE)


@given(attest=st.binary(max_size=200), signature=st.binary(max_size=600), public=st.binary(max_size=400))
def test_noise_is_refused_by_name(attest: bytes, signature: bytes, public: bytes) -> None:
    with pytest.raises(EngineError, match="is not handed out"):
        check_quote(attest, signature, public, NONCE)


@given(cut=st.integers(0, 10_000), key=st.sampled_from([ECC, RSA]))
def test_a_cut_signature_is_refused(cut: int, key: EccKey | RsaKey) -> None:
    signature = key.sign(attest_of())
    with pytest.raises(EngineError, match="is not handed out"):
        check_quote(attest_of(), signature[: cut % len(signature)], key.public, NONCE)
