"""Credentials made in software, opened by the parts of tpm2-pytss that open secrets for a private key in hand."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.internal import crypto
from tpm2_pytss.types import TPM2B_SENSITIVE, TPMT_PUBLIC

try:
    from cryptography.hazmat.decrepit.ciphers.modes import CFB
except ImportError:
    from cryptography.hazmat.primitives.ciphers.modes import CFB

from vtpm.errors import InvalidArgumentError
from vtpm.tpm import credential
from vtpm.tpm.codes import CommandCode, Tag
from vtpm.tpm.command import parse_header
from vtpm.tpm.credential import Credential, make_credential
from vtpm.tpm.keys import KeyAlgorithm, ak_template, ek_template, name_of

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
CURVES: dict[KeyAlgorithm, ec.EllipticCurve] = {KeyAlgorithm.ECC_P256: ec.SECP256R1(), KeyAlgorithm.ECC_P384: ec.SECP384R1()}
BITS = {KeyAlgorithm.RSA_2048: 2048, KeyAlgorithm.RSA_3072: 3072}
HASHES = {"SHA256": 32, "SHA384": 48}
NAME = name_of(ak_template(KeyAlgorithm.ECC_P256))


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def an_ek(algorithm: KeyAlgorithm) -> tuple[PrivateKey, bytes]:
    """A private key, and the TPMT_PUBLIC that a TPM with it would have."""
    template = ek_template(algorithm)
    if algorithm in CURVES:
        key = ec.generate_private_key(CURVES[algorithm])
        numbers, size = key.public_key().public_numbers(), (key.curve.key_size + 7) // 8
        unique = sized(numbers.x.to_bytes(size, "big")) + sized(numbers.y.to_bytes(size, "big"))
        empty = len(template) - {KeyAlgorithm.ECC_P256: 68, KeyAlgorithm.ECC_P384: 4}[algorithm]
        return key, template[:empty] + unique
    rsa_key = rsa.generate_private_key(65537, BITS[algorithm])
    modulus = rsa_key.public_key().public_numbers().n
    empty = len(template) - {KeyAlgorithm.RSA_2048: 258, KeyAlgorithm.RSA_3072: 2}[algorithm]
    return rsa_key, template[:empty] + sized(modulus.to_bytes(BITS[algorithm] // 8, "big"))


EKS = {algorithm: an_ek(algorithm) for algorithm in KeyAlgorithm}


def opened(algorithm: KeyAlgorithm, made: Credential, name: bytes) -> bytes:
    """As TPM2_ActivateCredential does (Part 1, 24.4), by another's code."""
    key, public = EKS[algorithm]
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    private = TPM2B_SENSITIVE.from_pem(pem).sensitiveArea
    area = TPMT_PUBLIC.unmarshal(public)[0]
    seed = crypto._secret_to_seed(private, area, b"IDENTITY\0", made.encrypted_secret)
    digest = crypto._get_digest(area.nameAlg)
    size = int.from_bytes(made.blob[:2], "big")
    integrity, identity = made.blob[2 : 2 + size], made.blob[2 + size :]
    integrity_key = crypto._kdfa(area.nameAlg, seed, b"INTEGRITY", b"", b"", digest.digest_size * 8)
    crypto._check_hmac(digest, integrity_key, identity, name, integrity)
    bits = int(area.parameters.asymDetail.symmetric.keyBits.aes)
    storage_key = crypto._kdfa(area.nameAlg, seed, b"STORAGE", name, b"", bits)
    secret = crypto._decrypt(algorithms.AES, CFB, storage_key, identity)
    assert int.from_bytes(secret[:2], "big") == len(secret) - 2
    return bytes(secret[2:])


@pytest.mark.parametrize("algorithm", KeyAlgorithm)
@settings(deadline=None, max_examples=5)
@given(secret=st.binary(max_size=32))
def test_whoever_has_the_ek_gets_the_secret(algorithm: KeyAlgorithm, secret: bytes) -> None:
    assert opened(algorithm, make_credential(EKS[algorithm][1], NAME, secret), NAME) == secret


@pytest.mark.parametrize("algorithm", KeyAlgorithm)
def test_for_another_name_it_is_not_opened(algorithm: KeyAlgorithm) -> None:
    from cryptography.exceptions import InvalidSignature

    made = make_credential(EKS[algorithm][1], NAME, b"secret")
    with pytest.raises(InvalidSignature):
        opened(algorithm, made, NAME[:-1] + bytes((NAME[-1] ^ 1,)))


@pytest.mark.parametrize("algorithm", [KeyAlgorithm.ECC_P256, KeyAlgorithm.ECC_P384])
def test_coordinates_keep_their_leading_zeros(algorithm: KeyAlgorithm) -> None:
    """One ephemeral key in 256 has one; a TPM wants them as long as the field."""
    size = (CURVES[algorithm].key_size + 7) // 8
    for _ in range(2000):
        made = make_credential(EKS[algorithm][1], NAME, b"secret")
        assert len(made.encrypted_secret) == 2 * (2 + size)
        if made.encrypted_secret[2] == 0:
            assert opened(algorithm, made, NAME) == b"secret"
            return
    raise AssertionError("no ephemeral key with a leading zero")


@pytest.mark.parametrize(
    ("public", "secret", "reason"),
    [
        (ak_template(KeyAlgorithm.ECC_P256), b"secret", "CREDENTIAL_KEY_UNSUITABLE"),
        (EKS[KeyAlgorithm.ECC_P256][1], bytes(33), "CREDENTIAL_TOO_LARGE"),
        (EKS[KeyAlgorithm.ECC_P256][1][:-1], b"secret", "PUBLIC_AREA_INVALID"),
        (b"", b"secret", "PUBLIC_AREA_INVALID"),
    ],
)
def test_what_can_t_take_one_is_refused(public: bytes, secret: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        make_credential(public, NAME, secret)
    assert raised.value.reason == reason


def test_the_commands_have_their_handles_and_sessions() -> None:
    by_policy = credential.activate_credential_command(0x81800003, 0x81010001, 0x03000000, Credential(b"blob", b"secret"))
    assert parse_header(by_policy).code == CommandCode.ActivateCredential
    assert parse_header(by_policy).size == len(by_policy)
    assert parse_header(by_policy).tag == Tag.SESSIONS
    assert by_policy[10:18] == bytes.fromhex("8180000381010001")
    assert by_policy.endswith(sized(b"blob") + sized(b"secret"))
    by_auth = credential.activate_credential_command(0x81800003, 0x81010016, None, Credential(b"", b""))
    assert by_auth[22:31] * 2 == by_auth[22:40]


@given(st.binary(max_size=40))
def test_cut_responses_are_refused_by_name(tail: bytes) -> None:
    response = bytes(10) + tail
    for parse in (credential.parse_activate_credential, credential.parse_session_handle):
        try:
            parse(response)
        except InvalidArgumentError as error:
            assert error.reason == "RESPONSE_MALFORMED"  # noqa: PT017  # both outcomes are right
