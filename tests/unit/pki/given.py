"""A CA, keys of TPMs, and descriptions, for tests of vtpm.pki."""

from __future__ import annotations

import datetime as dt
import functools
import struct
import subprocess
import uuid
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from vtpm.pki.authority import Authority
from vtpm.pki.making import NewCa, make_issuing, make_root
from vtpm.pki.model import IssuingPolicy, PlatformDescription, TpmDescription
from vtpm.pki.signer import KeySigner
from vtpm.tpm.keys import KeyAlgorithm, ak_template, ek_template

# The present, as certtool can check no other time.
NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
TPM = TpmDescription("id:49424D00", "libtpms", "id:20240125")
INSTANCE = uuid.UUID("7f0f1f63-7a2d-4a7e-9e0c-2f2f9bb3f3a1")
PLATFORM = PlatformDescription("QEMU", "Standard PC", "9.0", str(INSTANCE))
URLS = IssuingPolicy(
    base_url="http://pki.example:8080/vtpm/", policy_oid="1.3.6.1.4.1.55555.1", policy_uri="https://example.org/cps"
)
_CURVES: dict[KeyAlgorithm, tuple[ec.EllipticCurve, int]] = {
    KeyAlgorithm.ECC_P256: (ec.SECP256R1(), 32),
    KeyAlgorithm.ECC_P384: (ec.SECP384R1(), 48),
}
_BITS = {KeyAlgorithm.RSA_2048: 2048, KeyAlgorithm.RSA_3072: 3072}


def ca_pair(now: dt.datetime = NOW) -> tuple[NewCa, NewCa]:
    """Root and issuing CA, the same at each call."""
    return _ca_pair(now)


@functools.cache
def _ca_pair(now: dt.datetime) -> tuple[NewCa, NewCa]:
    root = make_root("vTPM root", now=now)
    return root, make_issuing(root, "vTPM issuing", now=now)


def an_authority(policy: IssuingPolicy | None = None, now: dt.datetime = NOW) -> Authority:
    root, issuing = ca_pair(now)
    return Authority([issuing.certificate, root.certificate], KeySigner(issuing.key), policy or IssuingPolicy())


def _unique(algorithm: KeyAlgorithm) -> bytes:
    if algorithm in _CURVES:
        curve, size = _CURVES[algorithm]
        numbers = ec.generate_private_key(curve).public_key().public_numbers()
        parts = [numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big")]
    else:
        bits = _BITS[algorithm]
        number = rsa.generate_private_key(public_exponent=65537, key_size=bits).public_key().public_numbers().n
        parts = [number.to_bytes(bits // 8, "big")]
    return b"".join(struct.pack(">H", len(part)) + part for part in parts)


# The templates' own unique fields, which the key takes the place of.
_TEMPLATE_UNIQUE = {
    KeyAlgorithm.RSA_2048: 2 + 256,
    KeyAlgorithm.ECC_P256: 2 * (2 + 32),
    KeyAlgorithm.RSA_3072: 2,
    KeyAlgorithm.ECC_P384: 4,
}


@functools.cache
def an_ek(algorithm: KeyAlgorithm) -> bytes:
    """TPMT_PUBLIC of an EK."""
    return ek_template(algorithm)[: -_TEMPLATE_UNIQUE[algorithm]] + _unique(algorithm)


@functools.cache
def an_ak(algorithm: KeyAlgorithm = KeyAlgorithm.ECC_P256) -> bytes:
    """TPMT_PUBLIC of an AK."""
    size = 4 if algorithm is KeyAlgorithm.ECC_P256 else 2
    return ak_template(algorithm)[:-size] + _unique(algorithm)


def openssl(*arguments: str, given: bytes = b"") -> str:
    """Run openssl; its output, errors included. Fails where openssl does."""
    done = subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=False)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, output
    return output


def write_chain(directory: Path, chain: tuple[x509.Certificate, ...]) -> tuple[Path, Path]:
    """Write root.pem and issuing.pem for openssl."""
    root, issuing = directory / "root.pem", directory / "issuing.pem"
    root.write_bytes(chain[-1].public_bytes(Encoding.PEM))
    issuing.write_bytes(b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain[:-1]))
    return root, issuing
