"""PE images: their Authenticode hash and their sections (Microsoft: PE Format; Windows Authenticode Portable Executable)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.eventlog.hashes import hasher, name

MAX_SECTIONS: Final = 512
_DOS_SIZE: Final = 64
_PE_OFFSET: Final = 0x3C
_COFF_SIZE: Final = 24
_PE32, _PE32_PLUS = 0x10B, 0x20B
# Where the optional header has its number of data directories, by magic; the directories follow.
_DIRECTORIES: Final = {_PE32: 92, _PE32_PLUS: 108}
_CHECKSUM: Final = 64
_HEADERS_SIZE: Final = 60
_CERTIFICATES: Final = 4
_DIRECTORY: Final = struct.Struct("<II")
# IMAGE_SECTION_HEADER: Name, VirtualSize, VirtualAddress, SizeOfRawData, PointerToRawData.
_SECTION: Final = struct.Struct("<8sIIII16x")


@dataclass(frozen=True, slots=True)
class Section:
    """A section of an image; `data` are as many bytes as it has in memory, `raw_offset` and `raw_size` are of the file."""

    name: str
    raw_offset: int
    raw_size: int
    virtual_size: int


@dataclass(frozen=True, slots=True)
class PeImage:
    """An image and where its parts are, in bytes of the file. `certificates` are the offset and size of its signatures."""

    image: bytes
    checksum_offset: int
    directory_offset: int | None
    headers_size: int
    certificates: tuple[int, int]
    sections: tuple[Section, ...]

    def section(self, wanted: str) -> bytes | None:
        """Return a section as it is in memory; none where the image has not got it."""
        for section in self.sections:
            if section.name == wanted:
                size = section.virtual_size or section.raw_size
                stored = self.image[section.raw_offset : section.raw_offset + min(size, section.raw_size)]
                if size - len(stored) > len(self.image):
                    raise _invalid(f"its section {wanted} has {size} bytes in memory and {len(stored)} in the file")
                return stored + bytes(size - len(stored))
        return None

    def authenticode(self, bank: int) -> bytes:
        """Return the image's Authenticode hash, which the firmware extends into PCR 4.

        The firmware hashes an unsigned image as it is. Signing tools first fill an image with zeros to a multiple of eight
        bytes, so an image of another length has another hash once it is signed.

        Raises:
            InvalidArgumentError: PCR_BANK_UNKNOWN, this Python has not got the bank's hash.
        """
        make = hasher(bank)
        if make is None:
            raise InvalidArgumentError("PCR_BANK_UNKNOWN", f"there is no hash {name(bank)} here")
        digest = make(b"")
        for start, end in self._hashed():
            digest.update(memoryview(self.image)[start:end])
        return digest.digest()

    def _hashed(self) -> Iterator[tuple[int, int]]:
        """Yield the parts of the file that are hashed: all but the checksum, the certificates and where they are named."""
        yield 0, self.checksum_offset
        start = self.checksum_offset + 4
        if self.directory_offset is not None:
            yield start, self.directory_offset
            start = self.directory_offset + _DIRECTORY.size
        yield start, self.headers_size
        hashed = self.headers_size
        for section in sorted(self.sections, key=lambda item: item.raw_offset):
            if section.raw_size:
                yield section.raw_offset, section.raw_offset + section.raw_size
                hashed += section.raw_size
        # What stands behind the sections is hashed too, but for the certificates, which are last.
        yield hashed, max(hashed, len(self.image) - self.certificates[1])


def parse_pe(image: bytes) -> PeImage:
    """Read a PE image's headers.

    Raises:
        InvalidArgumentError: PE_INVALID.
    """
    if len(image) < _DOS_SIZE or image[:2] != b"MZ":
        raise _invalid("it does not begin as a PE image")
    (offset,) = struct.unpack_from("<I", image, _PE_OFFSET)
    if image[offset : offset + 4] != b"PE\0\0" or offset + _COFF_SIZE > len(image):
        raise _invalid("it has no PE header")
    count, optional_size = struct.unpack_from("<2xH12xH", image, offset + 4)
    optional = offset + _COFF_SIZE
    table = optional + optional_size
    if count > MAX_SECTIONS or table + count * _SECTION.size > len(image) or optional_size < _CHECKSUM + 4:
        raise _invalid(f"it names {count} sections")
    (magic,) = struct.unpack_from("<H", image, optional)
    place = _DIRECTORIES.get(magic)
    if place is None or optional_size < place + 4:
        raise _invalid(f"its optional header has magic 0x{magic:x}")
    (directories,) = struct.unpack_from("<I", image, optional + place)
    directory_offset = None
    certificates = (0, 0)
    if directories > _CERTIFICATES:
        directory_offset = optional + place + 4 + _CERTIFICATES * _DIRECTORY.size
        if directory_offset + _DIRECTORY.size > table:
            raise _invalid("its data directories do not fit its optional header")
        start, size = _DIRECTORY.unpack_from(image, directory_offset)
        certificates = (start, size)
        if size and (start + size != len(image) or start < table):
            raise _invalid("its signatures are not the last part of the file")
    (headers_size,) = struct.unpack_from("<I", image, optional + _HEADERS_SIZE)
    if not table <= headers_size <= len(image):
        raise _invalid(f"its headers have {headers_size} bytes")
    sections = tuple(_sections(image, table, count))
    return PeImage(image, optional + _CHECKSUM, directory_offset, headers_size, certificates, sections)


def _sections(image: bytes, table: int, count: int) -> Iterator[Section]:
    for index in range(count):
        raw_name, virtual_size, _, raw_size, raw_offset = _SECTION.unpack_from(image, table + index * _SECTION.size)
        if raw_size and raw_offset + raw_size > len(image):
            raise _invalid("a section reaches behind the end of the file")
        yield Section(raw_name.rstrip(b"\0").decode("ascii", "replace"), raw_offset, raw_size, virtual_size)


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError("PE_INVALID", f"the file is no PE image: {what}")
