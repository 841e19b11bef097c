"""TPM2_MakeCredential in software, and TPM2_ActivateCredential as commands (TPM 2.0 Library, Part 1, 24; annexes B.10 and C.6).

A credential is a secret that only the TPM with the private part of an EK can open, and only while it holds the object whose
Name the credential was made for. Whoever gives the secret back has proven that both are in one TPM.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import AlgId, CommandCode, Handle, Tag
from vtpm.tpm.command import HEADER_SIZE, build
from vtpm.tpm.keys import ObjectAttribute, parse_public, public_key

try:
    from cryptography.hazmat.decrepit.ciphers.modes import CFB
except ImportError:
    # Where it was before release 47.
    from cryptography.hazmat.primitives.ciphers.modes import CFB

_IDENTITY: Final = b"IDENTITY\0"
_STORAGE: Final = b"STORAGE\0"
_INTEGRITY: Final = b"INTEGRITY\0"
_U32: Final = struct.Struct(">I")
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    AlgId.SHA256: hashes.SHA256(),
    AlgId.SHA384: hashes.SHA384(),
    AlgId.SHA512: hashes.SHA512(),
}
# The secret is a digest's size: large enough that nobody guesses it, and what every EK can carry.
SECRET_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class Credential:
    """What TPM2_ActivateCredential takes: the contents of its TPM2B_ID_OBJECT and of its TPM2B_ENCRYPTED_SECRET."""

    blob: bytes
    encrypted_secret: bytes


def new_secret() -> bytes:
    """Return a fresh secret for a credential."""
    return os.urandom(SECRET_SIZE)


def make_credential(ek_tpmt_public: bytes, name: bytes, secret: bytes) -> Credential:
    """Return a credential with `secret` for the object called `name`, for the TPM that has this EK.

    Raises:
        InvalidArgumentError: CREDENTIAL_KEY_UNSUITABLE, the key is no storage key that can take one; CREDENTIAL_TOO_LARGE;
            PUBLIC_AREA_INVALID.
    """
    area = parse_public(ek_tpmt_public)
    algorithm = _HASHES.get(area.name_alg)
    needed = ObjectAttribute.RESTRICTED | ObjectAttribute.DECRYPT
    if algorithm is None or area.attributes & needed != needed or area.symmetric_bits not in (128, 256):
        raise InvalidArgumentError(
            "CREDENTIAL_KEY_UNSUITABLE", "a credential is for a restricted decryption key with AES and SHA-256, 384 or 512"
        )
    if len(secret) > algorithm.digest_size:
        raise InvalidArgumentError("CREDENTIAL_TOO_LARGE", f"a credential has at most {algorithm.digest_size} bytes here")
    seed, encrypted_secret = _share_seed(public_key(ek_tpmt_public), algorithm)
    key = _kdf_a(algorithm, seed, _STORAGE, name, area.symmetric_bits // 8)
    encryptor = Cipher(algorithms.AES(key), CFB(bytes(16))).encryptor()
    identity = encryptor.update(_sized(secret)) + encryptor.finalize()
    integrity_key = _kdf_a(algorithm, seed, _INTEGRITY, b"", algorithm.digest_size)
    integrity = hmac.digest(integrity_key, identity + name, algorithm.name)
    return Credential(_sized(integrity) + identity, encrypted_secret)


def _share_seed(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, algorithm: hashes.HashAlgorithm) -> tuple[bytes, bytes]:
    """Return a seed and how the EK's owner gets it: OAEP (B.10.3), or one-pass ECDH with KDFe (C.6.3)."""
    if isinstance(key, rsa.RSAPublicKey):
        seed = os.urandom(algorithm.digest_size)
        oaep = padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=_IDENTITY)
        return seed, key.encrypt(seed, oaep)
    ephemeral = ec.generate_private_key(key.curve)
    size = (key.curve.key_size + 7) // 8
    shared = ephemeral.exchange(ec.ECDH(), key)
    ours, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    x, y = ours.x.to_bytes(size, "big"), ours.y.to_bytes(size, "big")
    seed = _kdf_e(algorithm, shared, x, theirs.x.to_bytes(size, "big"))
    return seed, _sized(x) + _sized(y)


def _kdf_a(algorithm: hashes.HashAlgorithm, key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2): SP 800-108 in counter mode with HMAC."""
    out, counter = b"", 0
    while len(out) < size:
        counter += 1
        out += hmac.digest(key, _U32.pack(counter) + label + context + _U32.pack(size * 8), algorithm.name)
    return out[:size]


def _kdf_e(algorithm: hashes.HashAlgorithm, shared_x: bytes, party_u: bytes, party_v: bytes) -> bytes:
    """KDFe (Part 1, 11.4.10.3) of one digest, which a seed is: SP 800-56A."""
    return hashlib.new(algorithm.name, _U32.pack(1) + shared_x + _IDENTITY + party_u + party_v).digest()


# ---- TPM2_ActivateCredential ------------------------------------------------------------------------------------------------

# StartAuthSession: no key, no bound object, a nonce of 16 bytes (the least there is), no encrypted salt; then policy, no
# symmetric algorithm, SHA-256 (Part 3, 11.1).
_NONCE_SIZE: Final = 16
_POLICY_SESSION: Final = 1
# An empty nonce, attributes, empty auth. Without continueSession the TPM ends the session with the command's success.
_USE_AND_END: Final = struct.pack(">HBH", 0, 0, 0)
_PASSWORD: Final = struct.pack(">IHBH", Handle.PASSWORD, 0, 0, 0)


def start_policy_session_command() -> bytes:
    """Return TPM2_StartAuthSession of a policy session with SHA-256, neither salted nor bound."""
    body = struct.pack(">IIH", Handle.NULL, Handle.NULL, _NONCE_SIZE) + os.urandom(_NONCE_SIZE)
    body += struct.pack(">HBHH", 0, _POLICY_SESSION, AlgId.NULL, AlgId.SHA256)
    return build(CommandCode.StartAuthSession, body)


def parse_session_handle(response: bytes) -> int:
    """Return the handle of a successful TPM2_StartAuthSession.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    if len(response) < HEADER_SIZE + 4:
        raise _malformed()
    return int(_U32.unpack_from(response, HEADER_SIZE)[0])


def policy_secret_command(session: int) -> bytes:
    """Return TPM2_PolicySecret(TPM_RH_ENDORSEMENT) with an empty auth: PolicyA of the EK templates."""
    body = struct.pack(">III", Handle.ENDORSEMENT, session, len(_PASSWORD)) + _PASSWORD
    # nonceTPM, cpHashA and policyRef are empty, expiration is 0.
    return build(CommandCode.PolicySecret, body + struct.pack(">HHHi", 0, 0, 0, 0), Tag.SESSIONS)


def flush_command(handle: int) -> bytes:
    """Return TPM2_FlushContext."""
    return build(CommandCode.FlushContext, _U32.pack(handle))


def activate_credential_command(ak: int, ek: int, session: int | None, credential: Credential) -> bytes:
    """Return TPM2_ActivateCredential; `session` has satisfied the EK's policy, with None its auth is used, which is empty."""
    sessions = _PASSWORD + (_PASSWORD if session is None else _U32.pack(session) + _USE_AND_END)
    body = struct.pack(">III", ak, ek, len(sessions)) + sessions
    return build(
        CommandCode.ActivateCredential, body + _sized(credential.blob) + _sized(credential.encrypted_secret), Tag.SESSIONS
    )


def parse_activate_credential(response: bytes) -> bytes:
    """Return the secret of a successful TPM2_ActivateCredential.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    start = HEADER_SIZE + 4 + 2
    if len(response) < start:
        raise _malformed()
    end = start + int.from_bytes(response[start - 2 : start], "big")
    if end > len(response):
        raise _malformed()
    return response[start:end]


def _malformed() -> InvalidArgumentError:
    return InvalidArgumentError("RESPONSE_MALFORMED", "the TPM's response is cut or inconsistent")


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
