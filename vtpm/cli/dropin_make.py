"""What swtpm_setup does to a TPM, command for command: keys, certificates in NV, PCR banks."""

from __future__ import annotations

import struct
from typing import Final

from vtpm.engine.libtpms import Libtpms
from vtpm.engine.operations import Operations
from vtpm.errors import EngineError, InvalidArgumentError, TpmError
from vtpm.tpm.codes import CommandCode, Handle, Tag, response_code_name
from vtpm.tpm.command import HEADER, HEADER_SIZE, build
from vtpm.tpm.keys import KeyAlgorithm, ek_handle, ek_template
from vtpm.tpm.pcr import PcrBank

# A password session with an empty password (TPM 2.0 Library, Part 1, 19.4).
_EMPTY_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
_NULL: Final = struct.pack(">H", 0x10)
_AES_128, _AES_256 = (struct.pack(">HHH", 6, bits, 0x43) for bits in (128, 256))
_SPK_HANDLE: Final = 0x81000001
# fixedTPM | fixedParent | sensitiveDataOrigin | userWithAuth | noDA | restricted | decrypt.
_SPK: Final = 0x30472
_RESTRICTED, _DECRYPT, _SIGN = 0x10000, 0x20000, 0x40000
# PPWRITE | WRITEDEFINE | PPREAD | OWNERREAD | AUTHREAD | NO_DA | PLATFORMCREATE.
_NV_ATTRIBUTES: Final = 0x42072001
_SHA256: Final = 0x0B
_NV_CHUNK: Final = 1024
CERTIFICATES: Final = {
    KeyAlgorithm.RSA_2048: 0x01C00002,
    KeyAlgorithm.RSA_3072: 0x01C0001C,
    KeyAlgorithm.ECC_P384: 0x01C00016,
}
_TEMPLATES: Final = {
    KeyAlgorithm.RSA_2048: 0x01C00004,
    KeyAlgorithm.RSA_3072: 0x01C0001D,
    KeyAlgorithm.ECC_P384: 0x01C00017,
}
PLATFORM_CERTIFICATE: Final = 0x01C08000


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def signing_template(algorithm: KeyAlgorithm, *, decryption: bool) -> bytes:
    """Return the template of an EK that signs, which no standard knows: not restricted, without a symmetric algorithm."""
    template = ek_template(algorithm)
    kind, name_alg, attributes = struct.unpack_from(">HHI", template)
    attributes = attributes & ~_RESTRICTED | _SIGN
    if not decryption:
        attributes &= ~_DECRYPT
    policy_end = 10 + struct.unpack_from(">H", template, 8)[0]
    # In the place of algorithm, key size and mode.
    return struct.pack(">HHI", kind, name_alg, attributes) + template[8:policy_end] + _NULL + template[policy_end + 6 :]


def _spk_template(rsa_bits: int, *, ecc: bool) -> bytes:
    if ecc:
        parameters = _AES_256 + _NULL + struct.pack(">H", 4) + _NULL
        return struct.pack(">HHI", 0x23, 0x0C, _SPK) + _sized(b"") + parameters + _sized(bytes(48)) * 2
    name_alg, aes = (0x0B, _AES_128) if rsa_bits == 2048 else (0x0C, _AES_256)
    parameters = aes + _NULL + struct.pack(">HI", rsa_bits, 0)
    return struct.pack(">HHI", 1, name_alg, _SPK) + _sized(b"") + parameters + _sized(bytes(rsa_bits // 8))


class Setup:
    """One TPM being set up, in this process; `finish` gives its state."""

    def __init__(self, state: bytes | None) -> None:
        self._tpm = Libtpms()
        if state is None:
            self._tpm.manufacture()
        else:
            self._tpm.power_on(state)
        self._operations = Operations(self._tpm)
        self._operations.startup_clear()

    def _run(self, what: str, code: int, handles: bytes, parameters: bytes) -> bytes:
        response = self._tpm.process(build(code, handles + _EMPTY_PASSWORD + parameters, Tag.SESSIONS))
        rc = HEADER.unpack_from(response)[2]
        if rc:
            raise TpmError(rc, response_code_name(rc), f"{what}: the TPM answered {response_code_name(rc)}")
        return response

    def information(self) -> bytes:
        """What the TPM tells of itself, as JSON: specification and attributes."""
        return self._tpm.info(3)

    def _make_primary(self, hierarchy: int, template: bytes, persistent: int) -> bytes:
        """Make a primary key and persist it; return its TPMT_PUBLIC."""
        parameters = _sized(bytes(4)) + _sized(template) + _sized(b"") + bytes(4)
        response = self._run("TPM2_CreatePrimary", CommandCode.CreatePrimary, struct.pack(">I", hierarchy), parameters)
        transient = response[HEADER_SIZE : HEADER_SIZE + 4]
        at = HEADER_SIZE + 8
        public = response[at + 2 : at + 2 + struct.unpack_from(">H", response, at)[0]]
        handles = struct.pack(">I", Handle.OWNER) + transient
        self._run("TPM2_EvictControl", CommandCode.EvictControl, handles, struct.pack(">I", persistent))
        flushed = self._tpm.process(build(CommandCode.FlushContext, transient))
        if HEADER.unpack_from(flushed)[2]:
            raise EngineError("SETUP_FAILED", "TPM2_FlushContext failed")
        return public

    def make_spk(self, rsa_bits: int, *, ecc: bool) -> int:
        """Make the storage primary key; return its handle."""
        self._make_primary(Handle.OWNER, _spk_template(rsa_bits, ecc=ecc), _SPK_HANDLE)
        return _SPK_HANDLE

    def make_ek(self, algorithm: KeyAlgorithm, template: bytes) -> bytes:
        """Make an EK; return its TPMT_PUBLIC."""
        return self._make_primary(Handle.ENDORSEMENT, template, ek_handle(algorithm))

    def write_template(self, algorithm: KeyAlgorithm, template: bytes, *, lock: bool) -> int:
        """Keep the template of an EK that is not the standard's; return the NV index."""
        self.write_nv(_TEMPLATES[algorithm], template, lock=lock)
        return _TEMPLATES[algorithm]

    def write_nv(self, index: int, data: bytes, *, lock: bool) -> None:
        """Define an index of the platform, write it, and lock it if asked."""
        public = struct.pack(">IHIHH", index, _SHA256, _NV_ATTRIBUTES, 0, len(data))
        platform = struct.pack(">I", Handle.PLATFORM)
        self._run("TPM2_NV_DefineSpace", CommandCode.NV_DefineSpace, platform, _sized(b"") + _sized(public))
        handles = platform + struct.pack(">I", index)
        for at in range(0, len(data), _NV_CHUNK):
            chunk = _sized(data[at : at + _NV_CHUNK]) + struct.pack(">H", at)
            self._run("TPM2_NV_Write", CommandCode.NV_Write, handles, chunk)
        if lock:
            self._run("TPM2_NV_WriteLock", CommandCode.NV_WriteLock, handles, b"")

    def allocate(self, names: list[str]) -> list[str]:
        """Allocate those of these PCR banks that the TPM has; return them."""
        banks = [bank for bank in PcrBank if bank.hash_name in names]
        if not banks:
            raise InvalidArgumentError(
                "USAGE", "No PCR banks could be allocated. None of the selected algorithms are supported."
            )
        self._operations.allocate_banks(banks)
        return [bank.hash_name for bank in banks]

    def finish(self) -> bytes:
        """Shut the TPM down; return its state."""
        self._operations.shutdown_clear()
        self._tpm.power_off()
        assert self._tpm.permanent is not None
        return self._tpm.permanent
