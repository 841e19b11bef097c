"""NV indices: attributes, public areas and commands (TPM 2.0 Library, Part 2, 13; Part 3, 31)."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import AlgId, CommandCode, Handle, Tag
from vtpm.tpm.command import HEADER_SIZE, build

# What one command reads or writes: TPM_PT_NV_BUFFER_MAX of libtpms and of the reference code.
NV_BUFFER_SIZE: Final = 1024
# TPM_PT_NV_INDEX_MAX of both.
MAX_NV_INDEX_SIZE: Final = 2048
MAX_NV_AUTH_SIZE: Final = 32
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
# TPMS_NV_PUBLIC: index, nameAlg, attributes; then the policy and the data's size (Part 2, 13.5).
_NV_PUBLIC: Final = struct.Struct(">IHI")


class NvAttribute(enum.IntFlag):
    """TPMA_NV of an ordinary index (Part 2, 13.4)."""

    PP_WRITE = 1 << 0
    OWNER_WRITE = 1 << 1
    AUTH_WRITE = 1 << 2
    POLICY_WRITE = 1 << 3
    POLICY_DELETE = 1 << 10
    WRITE_LOCKED = 1 << 11
    WRITE_ALL = 1 << 12
    WRITE_DEFINE = 1 << 13
    WRITE_ST_CLEAR = 1 << 14
    GLOBAL_LOCK = 1 << 15
    PP_READ = 1 << 16
    OWNER_READ = 1 << 17
    AUTH_READ = 1 << 18
    POLICY_READ = 1 << 19
    NO_DA = 1 << 25
    ORDERLY = 1 << 26
    CLEAR_ST_CLEAR = 1 << 27
    READ_LOCKED = 1 << 28
    WRITTEN = 1 << 29
    PLATFORM_CREATE = 1 << 30
    READ_ST_CLEAR = 1 << 31


# What a definition can't ask for: the TPM sets these (Part 3, 31.3).
_STATE: Final = NvAttribute.WRITTEN | NvAttribute.WRITE_LOCKED | NvAttribute.READ_LOCKED


@dataclass(frozen=True, slots=True)
class NvEntry:
    """An index as it should be: defined anew with these attributes (its state bits say what is to be done), holding `data`.

    `size` is the index's size, `data` is followed by zeros. With `secret_auth` the index has an auth value that only the
    service can make again (vtpm.engine.provisioning), otherwise an empty one.
    """

    index: int
    attributes: NvAttribute
    data: bytes
    size: int = 0
    secret_auth: bool = False

    @property
    def contents(self) -> bytes:
        """All bytes of the index."""
        return self.data.ljust(self.size, b"\0")

    @property
    def definition(self) -> NvAttribute:
        """The attributes that TPM2_NV_DefineSpace takes."""
        return self.attributes & ~_STATE

    @property
    def locked(self) -> bool:
        """Whether it is write-locked once it is written."""
        return NvAttribute.WRITE_LOCKED in self.attributes


@dataclass(frozen=True, slots=True)
class NvPublic:
    """TPMS_NV_PUBLIC of an index that is there."""

    index: int
    name_alg: int
    attributes: NvAttribute
    policy: bytes
    size: int


def password(auth: bytes = b"") -> bytes:
    """Return an authorization area with one password session (Part 1, 19.4)."""
    return struct.pack(">IIHBH", 9 + len(auth), Handle.PASSWORD, 0, 0, len(auth)) + auth


def define_command(entry: NvEntry, auth: bytes = b"") -> bytes:
    """Return TPM2_NV_DefineSpace by platform authorization, which is empty, of an index with SHA-256 and this auth value."""
    public = _NV_PUBLIC.pack(entry.index, AlgId.SHA256, entry.definition) + _U16.pack(0) + _U16.pack(len(entry.contents))
    body = _U32.pack(Handle.PLATFORM) + password() + _sized(auth) + _sized(public)
    return build(CommandCode.NV_DefineSpace, body, Tag.SESSIONS)


def undefine_command(index: int) -> bytes:
    """Return TPM2_NV_UndefineSpace by platform authorization, which is empty."""
    return build(CommandCode.NV_UndefineSpace, struct.pack(">II", Handle.PLATFORM, index) + password(), Tag.SESSIONS)


def write_commands(index: int, data: bytes, *, by: int, auth: bytes = b"") -> Iterator[bytes]:
    """Yield the TPM2_NV_Write that write `data` from the index's beginning, authorized by `by` with `auth`."""
    for offset in range(0, len(data), NV_BUFFER_SIZE):
        part = data[offset : offset + NV_BUFFER_SIZE]
        body = struct.pack(">II", by, index) + password(auth) + _sized(part) + _U16.pack(offset)
        yield build(CommandCode.NV_Write, body, Tag.SESSIONS)


def write_lock_command(index: int) -> bytes:
    """Return TPM2_NV_WriteLock by platform authorization, which is empty."""
    return build(CommandCode.NV_WriteLock, struct.pack(">II", Handle.PLATFORM, index) + password(), Tag.SESSIONS)


def read_public_command(index: int) -> bytes:
    """Return TPM2_NV_ReadPublic."""
    return build(CommandCode.NV_ReadPublic, _U32.pack(index))


def parse_read_public(response: bytes) -> NvPublic:
    """Take a successful TPM2_NV_ReadPublic apart.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    try:
        at = HEADER_SIZE + 2
        index, name_alg, attributes = _NV_PUBLIC.unpack_from(response, at)
        at += _NV_PUBLIC.size
        (policy_size,) = _U16.unpack_from(response, at)
        policy = response[at + 2 : at + 2 + policy_size]
        (size,) = _U16.unpack_from(response, at + 2 + policy_size)
    except struct.error:
        raise _malformed() from None
    return NvPublic(index, name_alg, NvAttribute(attributes & sum(NvAttribute)), policy, size)


def read_commands(index: int, size: int, *, by: int, auth: bytes = b"") -> Iterator[bytes]:
    """Yield the TPM2_NV_Read that read `size` bytes, authorized by `by` with `auth`."""
    for offset in range(0, size, NV_BUFFER_SIZE):
        part = min(NV_BUFFER_SIZE, size - offset)
        body = struct.pack(">II", by, index) + password(auth) + struct.pack(">HH", part, offset)
        yield build(CommandCode.NV_Read, body, Tag.SESSIONS)


def parse_read(response: bytes) -> bytes:
    """Return what a successful TPM2_NV_Read read.

    Raises:
        InvalidArgumentError: RESPONSE_MALFORMED.
    """
    start = HEADER_SIZE + 4 + 2
    if len(response) < start:
        raise _malformed()
    end = start + _U16.unpack_from(response, start - 2)[0]
    if end > len(response):
        raise _malformed()
    return response[start:end]


def _sized(data: bytes) -> bytes:
    return _U16.pack(len(data)) + data


def _malformed() -> InvalidArgumentError:
    return InvalidArgumentError("RESPONSE_MALFORMED", "the TPM's response is cut or inconsistent")
