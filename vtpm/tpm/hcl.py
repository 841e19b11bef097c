"""The report that guests made for Azure look for in NV (OpenHCL's IgvmAttestRequestBase; little-endian).

There is no hardware report here: its place is all zeros and the type says Trusted VM, so nothing binds the claims to hardware.
The index has room for one RSA key only (TPM_PT_NV_INDEX_MAX is 2048 in libtpms), which is the AK; the EK has its certificate.
"""

from __future__ import annotations

import base64
import json
import struct
import uuid
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa

from vtpm.tpm.keys import public_key

_SIGNATURE: Final = 0x414C4348  # "HCLA"
_HEADER: Final = struct.Struct("<IIIII12x")
_HEADER_VERSION: Final = 2
_REQUEST_AK_CERTIFICATE: Final = 2
_HARDWARE_REPORT_SIZE: Final = 1184
_REQUEST: Final = struct.Struct("<IIIII")
_REQUEST_VERSION: Final = 1
_REPORT_TRUSTED_VM: Final = 3
_HASH_SHA256: Final = 1
CLAIMS_OFFSET: Final = _HEADER.size + _HARDWARE_REPORT_SIZE + _REQUEST.size
USER_DATA_SIZE: Final = 64
_USER_DATA: Final = b'"user-data":"'


def report(ak_tpmt_public: bytes, instance: uuid.UUID) -> bytes:
    """Return a report with the AK, which is RSA, and user data of zeros."""
    key = public_key(ak_tpmt_public)
    assert isinstance(key, rsa.RSAPublicKey)
    numbers = key.public_numbers()
    claims = {
        "keys": [
            {
                "kid": "HCLAkPub",
                "key_ops": ["sign"],
                "kty": "RSA",
                "e": _base64url(numbers.e),
                "n": _base64url(numbers.n),
            }
        ],
        "vm-configuration": {
            "secure-boot": False,
            "tpm-enabled": True,
            "tpm-persisted": True,
            "vmUniqueId": str(instance).upper(),
        },
        "user-data": "0" * (2 * USER_DATA_SIZE),
    }
    text = json.dumps(claims, separators=(",", ":")).encode()
    request_size = _REQUEST.size + len(text)
    size = CLAIMS_OFFSET + len(text)
    header = _HEADER.pack(_SIGNATURE, _HEADER_VERSION, size, _REQUEST_AK_CERTIFICATE, 0)
    request = _REQUEST.pack(request_size, _REQUEST_VERSION, _REPORT_TRUSTED_VM, _HASH_SHA256, len(text))
    return header + bytes(_HARDWARE_REPORT_SIZE) + request + text


def user_data_offset(contents: bytes) -> int | None:
    """Return where a report has the hexadecimal digits of the user data; None where this is no report of ours."""
    at = contents.find(_USER_DATA, CLAIMS_OFFSET)
    if at < 0 or not contents.startswith(_SIGNATURE.to_bytes(4, "little")):
        return None
    return at + len(_USER_DATA)


def user_data_digits(user_data: bytes) -> bytes:
    """Return user data as a report has it."""
    return user_data.ljust(USER_DATA_SIZE, b"\0")[:USER_DATA_SIZE].hex().upper().encode()


def _base64url(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()
