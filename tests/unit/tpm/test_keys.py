"""Templates and public areas; tpm2-tss and its published EK templates give the second opinion."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.constants import TPM2_ALG, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_PUBLIC, TPMT_PUBLIC
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import AlgId
from vtpm.tpm.keys import (
    AK_HANDLE,
    KeyAlgorithm,
    ObjectAttribute,
    ak_template,
    ek_handle,
    ek_template,
    is_ak,
    name_of,
    parse_public,
    public_key,
    public_pem,
)

PUBLISHED_NAMES = {
    KeyAlgorithm.RSA_2048: "EK-RSA2048",
    KeyAlgorithm.ECC_P256: "EK-ECC256",
    KeyAlgorithm.RSA_3072: "EK-HIGH-RSA3072",
    KeyAlgorithm.ECC_P384: "EK-HIGH-ECC384",
}
CERTIFICATE_INDICES = (0x01C00002, 0x01C0000A, 0x01C00016, 0x01C0001C)
AK_ALGORITHMS = (KeyAlgorithm.ECC_P256, KeyAlgorithm.RSA_2048)
SIGNING = TPMA_OBJECT.USERWITHAUTH | TPMA_OBJECT.SIGN_ENCRYPT


def only_certificates(index: int) -> bytes:
    """Read an NV index of a TPM that keeps EK certificates there and no templates or nonces."""
    if index not in CERTIFICATE_INDICES:
        raise NoSuchIndex(index)
    return b"certificate"


def a_public_key(kind: str) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048).public_key()
    return ec.generate_private_key(ec.SECP256R1() if kind == "p256" else ec.SECP384R1()).public_key()


def pem_of(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def tpmt_public_of(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    marshalled: bytes = TPM2B_PUBLIC.from_pem(pem_of(key), objectAttributes=SIGNING).publicArea.marshal()
    return marshalled


@pytest.fixture(scope="module")
def ecc_public() -> bytes:
    return tpmt_public_of(a_public_key("p256"))


@pytest.fixture(scope="module")
def rsa_public() -> bytes:
    return tpmt_public_of(a_public_key("rsa"))


@pytest.mark.parametrize("algorithm", KeyAlgorithm)
def test_an_ek_template_is_the_published_one(algorithm: KeyAlgorithm) -> None:
    _certificate, published = create_ek_template(PUBLISHED_NAMES[algorithm], only_certificates)
    assert ek_template(algorithm) == published.publicArea.marshal()


@pytest.mark.parametrize("algorithm", KeyAlgorithm)
def test_an_ek_decrypts_for_its_tpm_only(algorithm: KeyAlgorithm) -> None:
    attributes = parse_public(ek_template(algorithm)).attributes
    wanted = ObjectAttribute.RESTRICTED | ObjectAttribute.DECRYPT | ObjectAttribute.FIXED_TPM | ObjectAttribute.FIXED_PARENT
    assert attributes & (wanted | ObjectAttribute.SIGN) == wanted


@pytest.mark.parametrize("algorithm", AK_ALGORITHMS)
def test_an_ak_signs_only_what_its_tpm_says_and_never_locks_out(algorithm: KeyAlgorithm) -> None:
    template, rest = TPMT_PUBLIC.unmarshal(ak_template(algorithm))
    assert rest == len(ak_template(algorithm))
    wanted = TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.SIGN_ENCRYPT | TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.NODA
    assert int(template.objectAttributes) & int(wanted | TPMA_OBJECT.DECRYPT) == int(wanted)
    assert template.nameAlg == TPM2_ALG.SHA256


@pytest.mark.parametrize("algorithm", [KeyAlgorithm.RSA_3072, KeyAlgorithm.ECC_P384])
def test_an_ak_of_another_kind_is_refused(algorithm: KeyAlgorithm) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        ak_template(algorithm)
    assert refused.value.reason == "AK_ALGORITHM_UNSUPPORTED"


def test_every_key_has_a_persistent_handle_of_its_own() -> None:
    handles = {ek_handle(algorithm) for algorithm in KeyAlgorithm}
    assert len(handles | {AK_HANDLE}) == len(KeyAlgorithm) + 1
    # Part 2, 7.2: 0x81xxxxxx is persistent, from 0x81800000 on the platform's.
    assert all(0x8100_0000 <= handle < 0x8180_0000 for handle in handles)
    assert 0x8180_0000 <= AK_HANDLE < 0x8200_0000


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
def test_the_key_in_a_public_area_is_the_one_that_was_put_there(kind: str) -> None:
    key = a_public_key(kind)
    found = public_key(tpmt_public_of(key))
    assert found.public_numbers() == key.public_numbers()
    assert load_pem_public_key(public_pem(tpmt_public_of(key)).encode()) == key


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
@pytest.mark.parametrize("name_alg", [TPM2_ALG.SHA1, TPM2_ALG.SHA256, TPM2_ALG.SHA384, TPM2_ALG.SHA512])
def test_a_name_is_what_tpm2_tss_says(kind: str, name_alg: int) -> None:
    public = TPM2B_PUBLIC.from_pem(pem_of(a_public_key(kind)), nameAlg=name_alg)
    assert name_of(public.publicArea.marshal()) == bytes(public.get_name())


def test_a_zero_exponent_is_the_default_one(rsa_public: bytes) -> None:
    assert parse_public(rsa_public).exponent == 65537
    assert TPMT_PUBLIC.unmarshal(rsa_public)[0].parameters.rsaDetail.exponent == 0


def test_an_ak_is_read_with_its_scheme_and_curve(ecc_public: bytes) -> None:
    template = ak_template(KeyAlgorithm.ECC_P256)
    numbers = public_key(ecc_public).public_numbers()
    assert isinstance(numbers, EllipticCurvePublicNumbers)
    public = template[:-4] + b"".join(b"\0\x20" + value.to_bytes(32, "big") for value in (numbers.x, numbers.y))
    area = parse_public(public)
    assert (area.kind, area.scheme, area.curve) == (AlgId.ECC, AlgId.ECDSA, 3)
    assert public_key(public) == public_key(ecc_public)


@pytest.mark.parametrize("name_alg", [0x0000, 0x0010, 0x0012, 0xFFFF])
def test_a_name_with_an_unknown_hash_is_refused(ecc_public: bytes, name_alg: int) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        name_of(ecc_public[:2] + name_alg.to_bytes(2, "big") + ecc_public[4:])
    assert refused.value.reason == "PUBLIC_AREA_INVALID"


def test_a_symmetric_key_has_no_public_key(ecc_public: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="neither RSA nor ECC"):
        parse_public(b"\x00\x25" + ecc_public[2:])


def test_a_point_off_the_curve_is_no_key(ecc_public: bytes) -> None:
    # The last byte is y's: no other point has this x and a y that differs from the right one in one bit.
    with pytest.raises(InvalidArgumentError, match="no public key") as refused:
        public_key(ecc_public[:-1] + bytes([ecc_public[-1] ^ 1]))
    assert refused.value.reason == "PUBLIC_AREA_INVALID"


def test_a_curve_that_is_not_supported_is_named() -> None:
    p521 = TPMT_PUBLIC.unmarshal(tpmt_public_of(a_public_key("p384")))[0]
    p521.parameters.eccDetail.curveID = 5
    with pytest.raises(InvalidArgumentError, match="0x0005"):
        public_key(p521.marshal())


@pytest.mark.parametrize("algorithm", KeyAlgorithm)
def test_a_template_is_no_key_yet(algorithm: KeyAlgorithm) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        public_key(ek_template(algorithm))
    assert refused.value.reason == "PUBLIC_AREA_INVALID"


@settings(deadline=None)
@given(data=st.data())
def test_a_public_area_cut_or_followed_by_more_is_refused(ecc_public: bytes, rsa_public: bytes, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([ecc_public, rsa_public]))
    cut = data.draw(st.integers(0, len(whole) - 1))
    tail = data.draw(st.binary(min_size=1, max_size=4))
    for damaged in (whole[:cut], whole + tail):
        with pytest.raises(InvalidArgumentError) as refused:
            parse_public(damaged)
        assert refused.value.reason == "PUBLIC_AREA_INVALID"


@settings(deadline=None)
@given(data=st.data())
def test_a_changed_byte_gives_another_name_and_no_crash(ecc_public: bytes, rsa_public: bytes, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([ecc_public, rsa_public]))
    place = data.draw(st.integers(4, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    assert name_of(bytes(changed)) != name_of(whole)
    try:
        found = public_key(bytes(changed))
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert found.key_size in (256, 384, *range(2000, 2049))
    assert reason in {"", "PUBLIC_AREA_INVALID"}


@settings(deadline=None)
@given(data=st.binary(max_size=120))
def test_any_bytes_are_a_public_area_or_are_refused(data: bytes) -> None:
    try:
        public_pem(data)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
    assert reason in {"", "PUBLIC_AREA_INVALID"}


def test_an_ak_is_told_from_other_keys(ecc_public: bytes) -> None:
    template = ak_template(KeyAlgorithm.ECC_P256)
    assert is_ak(template)
    assert is_ak(ak_template(KeyAlgorithm.RSA_2048))
    assert not is_ak(ecc_public)
    for algorithm in KeyAlgorithm:
        assert not is_ak(ek_template(algorithm))
    # fixedTPM, fixedParent, restricted, sign: without any of them a signature proves nothing.
    attributes = int.from_bytes(template[4:8], "big")
    for bit in (1 << 1, 1 << 4, 1 << 16, 1 << 18):
        assert attributes & bit
        assert not is_ak(template[:4] + (attributes & ~bit).to_bytes(4, "big") + template[8:])
