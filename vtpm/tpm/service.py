"""The few commands that serve a running instance, built and parsed here (TPM 2.0 Library, Part 3).

TPM2_Startup (9.3), TPM2_Shutdown (9.4), TPM2_ReadPublic (12.4), TPM2_StirRandom (16.2), TPM2_HierarchyChangeAuth (24.8),
TPM2_PCR_Extend (22.2), TPM2_PCR_Read (22.4), TPM2_Quote (18.4) and TPM2_GetCapability (30.2).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import AlgId, CommandCode, Handle, Tag
from vtpm.tpm.command import HEADER, HEADER_SIZE, build
from vtpm.tpm.pcr import PcrBank, PcrSelection, marshal_selections, unmarshal_selections

# One call reads at most this many (TPM 2.0 Library, Part 2, 10.9.7: TPML_DIGEST has eight).
MAX_READ: Final = 8
MAX_NONCE_SIZE: Final = 64
# Authorization area of one password session with the empty password (Part 1, 19.4): size, handle, nonce, attributes, password.
EMPTY_PASSWORD: Final = struct.pack(">IIHBH", 9, Handle.PASSWORD, 0, 0, 0)
# TPMA_STARTUP_CLEAR: the platform hierarchy is enabled (Part 2, 8.7).
PH_ENABLE: Final = 1
_CAP_TPM_PROPERTIES: Final = 6
_PT_STARTUP_CLEAR: Final = 0x201
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


def startup_clear_command() -> bytes:
    """Return TPM2_Startup(TPM_SU_CLEAR)."""
    return build(CommandCode.Startup, _U16.pack(0))


def shutdown_clear_command() -> bytes:
    """Return TPM2_Shutdown(TPM_SU_CLEAR)."""
    return build(CommandCode.Shutdown, _U16.pack(0))


def stir_random_command(data: bytes) -> bytes:
    """Return TPM2_StirRandom."""
    return build(CommandCode.StirRandom, _U16.pack(len(data)) + data)


def startup_clear_attributes_command() -> bytes:
    """Return TPM2_GetCapability of TPM_PT_STARTUP_CLEAR."""
    return build(CommandCode.GetCapability, struct.pack(">III", _CAP_TPM_PROPERTIES, _PT_STARTUP_CLEAR, 1))


def startup_clear_attributes(response: bytes) -> int:
    """Return TPMA_STARTUP_CLEAR of its success.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    try:
        # moreData, the capability, the count; then the tag and the value (Part 2, 10.8 and 10.9.8).
        _more, _capability, count, tag, value = struct.unpack_from(">BIIII", response, HEADER_SIZE)
    except struct.error:
        raise _malformed() from None
    if (count, tag) != (1, _PT_STARTUP_CLEAR):
        raise _malformed()
    return int(value)


def hierarchy_change_auth_command(hierarchy: int, auth: bytes) -> bytes:
    """Return TPM2_HierarchyChangeAuth of a hierarchy whose auth is empty."""
    return build(
        CommandCode.HierarchyChangeAuth, _U32.pack(hierarchy) + EMPTY_PASSWORD + _U16.pack(len(auth)) + auth, Tag.SESSIONS
    )


def pcr_extend_command(pcr: int, digests: Mapping[PcrBank, bytes]) -> bytes:
    """Return TPM2_PCR_Extend with one digest for each bank."""
    values = b"".join(_U16.pack(bank.alg_id) + digest for bank, digest in digests.items())
    return build(CommandCode.PCR_Extend, _U32.pack(pcr) + EMPTY_PASSWORD + _U32.pack(len(digests)) + values, Tag.SESSIONS)


def read_public_command(handle: int) -> bytes:
    """Return TPM2_ReadPublic."""
    return build(CommandCode.ReadPublic, _U32.pack(handle))


def parse_read_public(response: bytes) -> bytes:
    """Return the TPMT_PUBLIC of a successful TPM2_ReadPublic.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    try:
        public, _ = _sized(response, HEADER_SIZE)
    except struct.error:
        raise _malformed() from None
    return public


def pcr_read_command(selection: PcrSelection) -> bytes:
    """Return TPM2_PCR_Read of at most eight PCRs of one bank."""
    return build(CommandCode.PCR_Read, marshal_selections((selection,)))


def quote_command(key: int, selections: Sequence[PcrSelection], nonce: bytes) -> bytes:
    """Return TPM2_Quote by the persistent `key`, which has an empty auth and a signing scheme of its own."""
    body = _U32.pack(key) + EMPTY_PASSWORD + _U16.pack(len(nonce)) + nonce + _U16.pack(AlgId.NULL)
    return build(CommandCode.Quote, body + marshal_selections(selections), Tag.SESSIONS)


def response_code(response: bytes) -> int:
    """Return the TPM_RC of a response.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    if len(response) < HEADER_SIZE:
        raise _malformed()
    return int(HEADER.unpack_from(response)[2])


def parse_pcr_read(response: bytes) -> tuple[int, tuple[bytes, ...]]:
    """Return the PCR update counter and the digests of a successful TPM2_PCR_Read.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    try:
        (counter,) = _U32.unpack_from(response, HEADER_SIZE)
        _, size = unmarshal_selections(response[HEADER_SIZE + 4 :])
        offset = HEADER_SIZE + 4 + size
        (count,) = _U32.unpack_from(response, offset)
        offset += 4
        if count > MAX_READ:
            raise _malformed()
        digests = []
        for _ in range(count):
            digest, offset = _sized(response, offset)
            digests.append(digest)
    except (struct.error, InvalidArgumentError):
        raise _malformed() from None
    return counter, tuple(digests)


def parse_quote(response: bytes) -> tuple[bytes, bytes]:
    """Return TPMS_ATTEST and TPMT_SIGNATURE of a successful TPM2_Quote.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    try:
        (parameter_size,) = _U32.unpack_from(response, HEADER_SIZE)
        end = HEADER_SIZE + 4 + parameter_size
        attest, offset = _sized(response, HEADER_SIZE + 4)
    except struct.error:
        raise _malformed() from None
    if not offset < end <= len(response):
        raise _malformed()
    return attest, response[offset:end]


def _sized(data: bytes, offset: int) -> tuple[bytes, int]:
    """A TPM2B: its content, and the offset behind it."""
    (size,) = _U16.unpack_from(data, offset)
    end = offset + 2 + size
    if end > len(data):
        raise _malformed()
    return data[offset + 2 : end], end


def _malformed() -> InvalidArgumentError:
    return InvalidArgumentError("RESPONSE_MALFORMED", "the TPM's response is cut or inconsistent")
