"""TPM 2.0 command and response headers (TPM 2.0 Library, Part 1, 18)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import Tag

# Tag u16, size u32 of the whole, command code or response code u32.
HEADER: Final = struct.Struct(">HII")
HEADER_SIZE: Final = HEADER.size
# TPM_BUFFER_MAX of libtpms; also the largest response.
MAX_COMMAND_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """A header as somebody sent it; `size` is what they claim."""

    tag: int
    size: int
    code: int


def parse_header(data: bytes) -> Header:
    """Parse the header at the beginning of `data`.

    Raises:
        InvalidArgumentError: TPM_HEADER_TRUNCATED.
    """
    if len(data) < HEADER_SIZE:
        raise InvalidArgumentError("TPM_HEADER_TRUNCATED", f"a TPM header has {HEADER_SIZE} bytes, here are {len(data)}")
    return Header(*HEADER.unpack_from(data))


def build(code: int, body: bytes = b"", tag: int = Tag.NO_SESSIONS) -> bytes:
    """Return a whole command with its header."""
    return HEADER.pack(tag, HEADER_SIZE + len(body), code) + body


def error_response(rc: int) -> bytes:
    """Return the response that a TPM gives with a response code other than success: a header alone."""
    return HEADER.pack(Tag.NO_SESSIONS, HEADER_SIZE, rc)
