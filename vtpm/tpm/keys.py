"""Keys of manufacture: templates, handles, and public areas (TCG EK Credential Profile 2.5, annex B; Library, Part 2, 12.2)."""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import AlgId, EccCurve

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa


class KeyAlgorithm(enum.StrEnum):
    """Key kinds by the names of vtpm.v1.KeyAlgorithm."""

    RSA_2048 = "RSA_2048"
    RSA_3072 = "RSA_3072"
    ECC_P256 = "ECC_P256"
    ECC_P384 = "ECC_P384"


class ObjectAttribute(enum.IntFlag):
    """TPMA_OBJECT (Part 2, 8.3)."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


# The AK lives in the platform's range: the guest's owner can't evict it (vtpm.engine.operations).
AK_HANDLE: Final = 0x81800003
# One handle for each kind, so that a TPM can have all of them; P-384 and RSA-3072 stand where swtpm_setup puts them.
_EK_HANDLES: Final = {
    KeyAlgorithm.RSA_2048: 0x81010001,
    KeyAlgorithm.ECC_P256: 0x81010002,
    KeyAlgorithm.ECC_P384: 0x81010016,
    KeyAlgorithm.RSA_3072: 0x8101001C,
}

# PolicyA = PolicySecret(TPM_RH_ENDORSEMENT) with SHA-256, of the low range templates L-1 and L-2.
_POLICY_A_SHA256: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
# PolicyB of the high range: PolicyOR of PolicyA and PolicyAuthorizeNV, by hash.
_POLICY_B_SHA256: Final = bytes.fromhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
_POLICY_B_SHA384: Final = bytes.fromhex(
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)

_EK_LOW: Final = (
    ObjectAttribute.FIXED_TPM
    | ObjectAttribute.FIXED_PARENT
    | ObjectAttribute.SENSITIVE_DATA_ORIGIN
    | ObjectAttribute.ADMIN_WITH_POLICY
    | ObjectAttribute.RESTRICTED
    | ObjectAttribute.DECRYPT
)
_EK_HIGH: Final = _EK_LOW | ObjectAttribute.USER_WITH_AUTH
_AK: Final = (
    ObjectAttribute.FIXED_TPM
    | ObjectAttribute.FIXED_PARENT
    | ObjectAttribute.SENSITIVE_DATA_ORIGIN
    | ObjectAttribute.USER_WITH_AUTH
    | ObjectAttribute.NO_DA
    | ObjectAttribute.RESTRICTED
    | ObjectAttribute.SIGN
)

_CURVES: Final = {KeyAlgorithm.ECC_P256: (EccCurve.NIST_P256, 32), KeyAlgorithm.ECC_P384: (EccCurve.NIST_P384, 48)}
_RSA_BITS: Final = {KeyAlgorithm.RSA_2048: 2048, KeyAlgorithm.RSA_3072: 3072}


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _public(kind: int, name_alg: int, attributes: int, policy: bytes, parameters: bytes, unique: bytes) -> bytes:
    return struct.pack(">HHI", kind, name_alg, attributes) + _sized(policy) + parameters + unique


def ek_handle(algorithm: KeyAlgorithm) -> int:
    """Return the persistent handle of the EK of this kind."""
    return _EK_HANDLES[algorithm]


def ek_template(algorithm: KeyAlgorithm) -> bytes:
    """Return the EK template as TPMT_PUBLIC: L-1 (RSA-2048), L-2 (P-256), H-6 (RSA-3072), H-3 (P-384)."""
    aes128 = struct.pack(">HHH", AlgId.AES, 128, AlgId.CFB)
    aes256 = struct.pack(">HHH", AlgId.AES, 256, AlgId.CFB)
    match algorithm:
        case KeyAlgorithm.RSA_2048:
            parameters = aes128 + struct.pack(">HHI", AlgId.NULL, 2048, 0)
            return _public(AlgId.RSA, AlgId.SHA256, _EK_LOW, _POLICY_A_SHA256, parameters, _sized(bytes(256)))
        case KeyAlgorithm.ECC_P256:
            parameters = aes128 + struct.pack(">HHH", AlgId.NULL, EccCurve.NIST_P256, AlgId.NULL)
            return _public(AlgId.ECC, AlgId.SHA256, _EK_LOW, _POLICY_A_SHA256, parameters, _sized(bytes(32)) * 2)
        case KeyAlgorithm.RSA_3072:
            parameters = aes256 + struct.pack(">HHI", AlgId.NULL, 3072, 0)
            return _public(AlgId.RSA, AlgId.SHA384, _EK_HIGH, _POLICY_B_SHA384, parameters, _sized(b""))
        case KeyAlgorithm.ECC_P384:
            parameters = aes256 + struct.pack(">HHH", AlgId.NULL, EccCurve.NIST_P384, AlgId.NULL)
            return _public(AlgId.ECC, AlgId.SHA384, _EK_HIGH, _POLICY_B_SHA384, parameters, _sized(b"") * 2)


def ak_template(algorithm: KeyAlgorithm) -> bytes:
    """Return the AK template as TPMT_PUBLIC: restricted signing, ECDSA or RSASSA with SHA-256, not subject to lockout.

    Raises:
        InvalidArgumentError: AK_ALGORITHM_UNSUPPORTED.
    """
    match algorithm:
        case KeyAlgorithm.ECC_P256:
            parameters = struct.pack(">HHHHH", AlgId.NULL, AlgId.ECDSA, AlgId.SHA256, EccCurve.NIST_P256, AlgId.NULL)
            return _public(AlgId.ECC, AlgId.SHA256, _AK, b"", parameters, _sized(b"") * 2)
        case KeyAlgorithm.RSA_2048:
            parameters = struct.pack(">HHHHI", AlgId.NULL, AlgId.RSASSA, AlgId.SHA256, 2048, 0)
            return _public(AlgId.RSA, AlgId.SHA256, _AK, b"", parameters, _sized(b""))
        case _:
            raise InvalidArgumentError("AK_ALGORITHM_UNSUPPORTED", "an AK is ECC_P256 or RSA_2048")


def template_with(template: bytes, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    """Return the TPMT_PUBLIC of the key that a template has made, from the template and what a certificate has of the key.

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID, the key is of another kind than the template's.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    area = parse_public(template)
    # The unique part is the last of a TPMT_PUBLIC (Part 2, 12.2.4).
    head = template[: len(template) - sum(2 + len(part) for part in area.unique)]
    if isinstance(key, rsa.RSAPublicKey) and area.kind is AlgId.RSA and area.exponent == key.public_numbers().e:
        public = head + _sized(key.public_numbers().n.to_bytes((key.key_size + 7) // 8, "big"))
        bits = int.from_bytes(head[-6:-4], "big")
        right = bits == key.key_size
    elif isinstance(key, ec.EllipticCurvePublicKey) and area.kind is AlgId.ECC:
        size, numbers = (key.curve.key_size + 7) // 8, key.public_numbers()
        public = head + _sized(numbers.x.to_bytes(size, "big")) + _sized(numbers.y.to_bytes(size, "big"))
        right = {EccCurve.NIST_P256: "secp256r1", EccCurve.NIST_P384: "secp384r1"}.get(EccCurve(area.curve)) == key.curve.name
    else:
        right, public = False, b""
    if not right:
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", "the key is not of the template's kind")
    return public


@dataclass(frozen=True, slots=True)
class PublicArea:
    """A TPMT_PUBLIC taken apart. `exponent` is 65537 where the TPM writes 0."""

    kind: AlgId
    name_alg: int
    attributes: ObjectAttribute
    policy: bytes
    scheme: int
    curve: int
    exponent: int
    unique: tuple[bytes, ...]
    # Key size of the symmetric cipher of a storage key; 0 without one.
    symmetric_bits: int = 0


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        part = self._data[self._offset : self._offset + size]
        if len(part) != size:
            raise InvalidArgumentError("PUBLIC_AREA_INVALID", "the TPMT_PUBLIC is cut")
        self._offset += size
        return part

    def sized(self) -> bytes:
        return self.take(self.number(2))

    @property
    def rest(self) -> int:
        return len(self._data) - self._offset


def parse_public(tpmt_public: bytes) -> PublicArea:
    """Take a TPMT_PUBLIC of an RSA or ECC key apart (Part 2, 12.2.4).

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID.
    """
    reader = _Reader(tpmt_public)
    kind, name_alg = reader.number(2), reader.number(2)
    attributes, policy = ObjectAttribute(reader.number(4) & sum(ObjectAttribute)), reader.sized()
    if kind not in (AlgId.RSA, AlgId.ECC):
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", f"the key is neither RSA nor ECC but 0x{kind:04x}")
    symmetric_bits = 0
    if reader.number(2) != AlgId.NULL:
        symmetric_bits = reader.number(2)
        reader.take(2)
    scheme = reader.number(2)
    if scheme != AlgId.NULL:
        reader.take(2)
    curve = exponent = 0
    if kind == AlgId.RSA:
        reader.take(2)
        exponent = reader.number(4) or 65537
        unique: tuple[bytes, ...] = (reader.sized(),)
    else:
        curve = reader.number(2)
        if reader.number(2) != AlgId.NULL:
            reader.take(2)
        unique = (reader.sized(), reader.sized())
    if reader.rest:
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", f"{reader.rest} bytes follow the TPMT_PUBLIC")
    return PublicArea(AlgId(kind), name_alg, attributes, policy, scheme, curve, exponent, unique, symmetric_bits)


def key_algorithm(tpmt_public: bytes) -> KeyAlgorithm | None:
    """Return the kind of a key; None for one that this service does not name.

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID.
    """
    area = parse_public(tpmt_public)
    if area.kind is AlgId.RSA:
        return {256: KeyAlgorithm.RSA_2048, 384: KeyAlgorithm.RSA_3072}.get(len(area.unique[0]))
    return {int(EccCurve.NIST_P256): KeyAlgorithm.ECC_P256, int(EccCurve.NIST_P384): KeyAlgorithm.ECC_P384}.get(area.curve)


_AK_NEEDED: Final = int(
    ObjectAttribute.FIXED_TPM
    | ObjectAttribute.FIXED_PARENT
    | ObjectAttribute.SENSITIVE_DATA_ORIGIN
    | ObjectAttribute.RESTRICTED
    | ObjectAttribute.SIGN
)
_AK_FORBIDDEN: Final = int(ObjectAttribute.DECRYPT)


def is_ak(tpmt_public: bytes) -> bool:
    """Whether a key can be an AK: its TPM made it, keeps it, and signs with it only what that TPM made itself (Part 1, 31)."""
    # Kind and nameAlg, then the attributes. Plain numbers: workers do this, and enumerations touch much memory.
    attributes = int.from_bytes(tpmt_public[4:8], "big")
    return attributes & (_AK_NEEDED | _AK_FORBIDDEN) == _AK_NEEDED


def public_key(tpmt_public: bytes) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    """Return the key of a TPMT_PUBLIC.

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID; also where the numbers are no key.
    """
    # Not at the top: a worker never needs it, and its start does not wait for it.
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    area = parse_public(tpmt_public)
    try:
        if area.kind is AlgId.RSA:
            return rsa.RSAPublicNumbers(area.exponent, int.from_bytes(area.unique[0], "big")).public_key()
        curve: ec.EllipticCurve
        match area.curve:
            case EccCurve.NIST_P256:
                curve = ec.SECP256R1()
            case EccCurve.NIST_P384:
                curve = ec.SECP384R1()
            case _:
                raise InvalidArgumentError("PUBLIC_AREA_INVALID", f"the curve 0x{area.curve:04x} is not supported")
        x, y = (int.from_bytes(part, "big") for part in area.unique)
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except (ValueError, OverflowError):
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", "the numbers in the TPMT_PUBLIC are no public key") from None


def public_pem(tpmt_public: bytes) -> str:
    """Return the key of a TPMT_PUBLIC as SubjectPublicKeyInfo, PEM.

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public_key(tpmt_public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


_NAME_HASHES: Final = {AlgId.SHA1: "sha1", AlgId.SHA256: "sha256", AlgId.SHA384: "sha384", AlgId.SHA512: "sha512"}


def name_of(tpmt_public: bytes) -> bytes:
    """Return the object's Name: nameAlg || H_nameAlg(TPMT_PUBLIC) (Part 1, 16).

    Raises:
        InvalidArgumentError: PUBLIC_AREA_INVALID.
    """
    name_alg = int.from_bytes(tpmt_public[2:4], "big")
    if name_alg not in list(_NAME_HASHES):
        raise InvalidArgumentError("PUBLIC_AREA_INVALID", f"the nameAlg 0x{name_alg:04x} is not supported")
    return tpmt_public[2:4] + hashlib.new(_NAME_HASHES[AlgId(name_alg)], tpmt_public).digest()
