"""UEFI structures in event data: variables, signature lists, image loads, partition tables (UEFI 2.10)."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_NAME: Final = 512
MAX_SIGNATURES: Final = 16384
MAX_PARTITIONS: Final = 1024

EFI_GLOBAL_VARIABLE: Final = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
EFI_IMAGE_SECURITY_DATABASE: Final = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM_LOCK: Final = uuid.UUID("605dab50-e046-4300-abb6-3dd810dd8b23")
CERT_SHA256: Final = uuid.UUID("c1c41626-504c-4092-aca9-41f936934328")
CERT_X509: Final = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
_LIST_TYPES: Final = {
    CERT_SHA256: "sha256",
    CERT_X509: "x509",
    uuid.UUID("826ca512-cf10-4ac9-b187-be01496631bd"): "sha1",
    uuid.UUID("ff3e5307-9fd0-48c9-85f1-8ad56c701e01"): "sha384",
    uuid.UUID("093e0fae-a6c4-4f50-9f1b-d41e2b89c19a"): "sha512",
    uuid.UUID("3c5766e8-269c-4e34-aa14-ed776e85b3b6"): "rsa2048",
    uuid.UUID("3bd2a492-96c0-4079-b420-fcf98ef103ed"): "x509-sha256",
    uuid.UUID("7076876e-80c2-4ee6-aad2-28b349a6865b"): "x509-sha384",
    uuid.UUID("446dbf63-2502-4cda-bcfa-2465d2b0fe9d"): "x509-sha512",
}
# UEFI_VARIABLE_DATA: VariableName, UnicodeNameLength in characters, VariableDataLength in bytes.
_VARIABLE: Final = struct.Struct("<16sQQ")
# EFI_SIGNATURE_LIST: SignatureType, SignatureListSize, SignatureHeaderSize, SignatureSize.
_LIST: Final = struct.Struct("<16sIII")
_OWNER_SIZE: Final = 16
# UEFI_IMAGE_LOAD_EVENT: ImageLocationInMemory, ImageLengthInMemory, ImageLinkTimeAddress, LengthOfDevicePath.
_IMAGE: Final = struct.Struct("<QQQQ")
# EFI_LOAD_OPTION: Attributes, FilePathListLength.
_LOAD_OPTION: Final = struct.Struct("<IH")
_GPT_HEADER_SIZE: Final = 92
# EFI_PARTITION_ENTRY: type, partition, first and last block, attributes, name.
_PARTITION: Final = struct.Struct("<16s16sQQQ72s")
TAG: Final = struct.Struct("<II")


def guid(data: bytes) -> uuid.UUID:
    """Return an EFI_GUID; 16 bytes."""
    return uuid.UUID(bytes_le=data)


def utf16(data: bytes) -> str:
    """Return UTF-16 text up to its first zero; what is no text is replaced."""
    text = data[: len(data) & ~1].decode("utf-16-le", "replace")
    return text.partition("\0")[0]


@dataclass(frozen=True, slots=True)
class UnverifiedVariable:
    """UEFI_VARIABLE_DATA; `value` is what stands behind the name, cut to the length that the structure gives."""

    vendor: uuid.UUID
    name: str
    value: bytes


def parse_variable(data: bytes) -> UnverifiedVariable | None:
    """Read UEFI_VARIABLE_DATA; none where the data are no such structure."""
    if len(data) < _VARIABLE.size:
        return None
    vendor, chars, length = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * chars
    if chars > MAX_NAME or start > len(data) or length > len(data) - start:
        return None
    name = data[_VARIABLE.size : start].decode("utf-16-le", "replace").rstrip("\0")
    return UnverifiedVariable(guid(vendor), name, data[start : start + length])


def variable_value(data: bytes) -> bytes | None:
    """Return everything behind a variable's name, whatever length the structure gives; none without a structure."""
    if len(data) < _VARIABLE.size:
        return None
    _, chars, _ = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * chars
    return data[start:] if chars <= MAX_NAME and start <= len(data) else None


@dataclass(frozen=True, slots=True)
class UnverifiedSignature:
    """One EFI_SIGNATURE_DATA: a certificate in DER, or a hash of what is allowed or forbidden; `kind` names which."""

    kind: str
    owner: uuid.UUID
    data: bytes


def parse_signature_lists(data: bytes) -> tuple[tuple[UnverifiedSignature, ...], str]:
    """Read EFI_SIGNATURE_LISTs; return the signatures and what is wrong, empty where nothing is."""
    signatures: list[UnverifiedSignature] = []
    offset = 0
    while offset < len(data):
        if offset + _LIST.size > len(data):
            return tuple(signatures), f"{len(data) - offset} bytes are no signature list"
        type_guid, list_size, header_size, size = _LIST.unpack_from(data, offset)
        end, start = offset + list_size, offset + _LIST.size + header_size
        if list_size < _LIST.size or end > len(data) or start > end or size <= _OWNER_SIZE or (end - start) % size:
            return tuple(signatures), f"a list of {list_size} bytes with signatures of {size} bytes"
        kind = _LIST_TYPES.get(guid(type_guid)) or str(guid(type_guid))
        for place in range(start, end, size):
            if len(signatures) >= MAX_SIGNATURES:
                return tuple(signatures), f"more than {MAX_SIGNATURES} signatures"
            body = data[place : place + size]
            signatures.append(UnverifiedSignature(kind, guid(body[:_OWNER_SIZE]), body[_OWNER_SIZE:]))
        offset = end
    return tuple(signatures), ""


def parse_authority(data: bytes) -> UnverifiedSignature | None:
    """Read the single EFI_SIGNATURE_DATA that an authority of db is measured as; its kind is `x509` or unknown."""
    if len(data) <= _OWNER_SIZE:
        return None
    body = data[_OWNER_SIZE:]
    kind = "x509" if body[:1] == b"\x30" else "hash" if len(body) in {20, 32, 48, 64} else "unknown"
    return UnverifiedSignature(kind, guid(data[:_OWNER_SIZE]), body)


@dataclass(frozen=True, slots=True)
class UnverifiedImage:
    """UEFI_IMAGE_LOAD_EVENT: how large the image was in memory, in bytes, and the device path that it came from."""

    size: int
    device_path: bytes


def parse_image(data: bytes) -> UnverifiedImage | None:
    """Read UEFI_IMAGE_LOAD_EVENT; none where the data are no such structure."""
    if len(data) < _IMAGE.size:
        return None
    _, size, _, length = _IMAGE.unpack_from(data)
    if length > len(data) - _IMAGE.size:
        return None
    return UnverifiedImage(size, data[_IMAGE.size : _IMAGE.size + length])


@dataclass(frozen=True, slots=True)
class UnverifiedLoadOption:
    """EFI_LOAD_OPTION, the value of a Boot#### variable."""

    active: bool
    description: str
    device_path: bytes
    optional_data: bytes


def parse_load_option(data: bytes) -> UnverifiedLoadOption | None:
    """Read EFI_LOAD_OPTION; none where the data are no such structure."""
    if len(data) < _LOAD_OPTION.size:
        return None
    attributes, path_size = _LOAD_OPTION.unpack_from(data)
    offset = _LOAD_OPTION.size
    end = data.find(b"\0\0", offset)
    while end >= 0 and (end - offset) % 2:
        end = data.find(b"\0\0", end + 1)
    if end < 0 or end + 2 + path_size > len(data):
        return None
    path = data[end + 2 : end + 2 + path_size]
    return UnverifiedLoadOption(bool(attributes & 1), utf16(data[offset:end]), path, data[end + 2 + path_size :])


@dataclass(frozen=True, slots=True)
class UnverifiedPartition:
    """EFI_PARTITION_ENTRY."""

    type_guid: uuid.UUID
    partition_guid: uuid.UUID
    name: str


def parse_gpt(data: bytes) -> tuple[uuid.UUID, tuple[UnverifiedPartition, ...]] | None:
    """Read UEFI_GPT_DATA: the disk's GUID and its partitions; none where the data are no such structure."""
    if len(data) < _GPT_HEADER_SIZE + 8 or not data.startswith(b"EFI PART"):
        return None
    disk = guid(data[56:72])
    (count,) = struct.unpack_from("<Q", data, _GPT_HEADER_SIZE)
    (entry_size,) = struct.unpack_from("<I", data, 84)
    return disk, tuple(_partitions(data[_GPT_HEADER_SIZE + 8 :], count, entry_size))


def _partitions(data: bytes, count: int, size: int) -> Iterator[UnverifiedPartition]:
    if size < _PARTITION.size:
        return
    for index in range(min(count, MAX_PARTITIONS, len(data) // size)):
        type_guid, partition_guid, _, _, _, name = _PARTITION.unpack_from(data, index * size)
        yield UnverifiedPartition(guid(type_guid), guid(partition_guid), utf16(name))


def parse_tag(data: bytes) -> tuple[int, bytes] | None:
    """Read TCG_PCClientTaggedEvent: its id and its content; none where the data are no such structure."""
    if len(data) < TAG.size:
        return None
    tag, size = TAG.unpack_from(data)
    return (tag, data[TAG.size : TAG.size + size]) if size <= len(data) - TAG.size else None
