"""Requests of the protocol of the TPM 2.0 reference simulator (TpmTcpProtocol.h), known as mssim: pure parsing.

A request is a code of four bytes, big-endian, and for a few codes a payload. Where a client may say so, TPM commands come bare,
without any envelope: what IBM's TSS calls the server type `raw`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import Tag
from vtpm.tpm.command import HEADER_SIZE, MAX_COMMAND_SIZE

U32: Final = struct.Struct(">I")
# The reference takes a mebibyte. What is measured at a launch is sent in as many pieces as it takes.
MAX_HASH_DATA_SIZE: Final = 64 << 10


class Code(enum.IntEnum):
    """The codes that are known here."""

    POWER_ON = 1
    POWER_OFF = 2
    PHYSICAL_PRESENCE_ON = 3
    PHYSICAL_PRESENCE_OFF = 4
    HASH_START = 5
    HASH_DATA = 6
    HASH_END = 7
    SEND_COMMAND = 8
    CANCEL_ON = 9
    CANCEL_OFF = 10
    NV_ON = 11
    NV_OFF = 12
    KEY_CACHE_ON = 13
    KEY_CACHE_OFF = 14
    REMOTE_HANDSHAKE = 15
    SET_ALTERNATIVE_RESULT = 16
    RESET = 17
    SESSION_END = 20
    STOP = 21
    TEST_FAILURE_MODE = 30


class Port(enum.Enum):
    """The two ports of a simulator: commands, and above it the platform's signals."""

    COMMAND = "command"
    PLATFORM = "platform"


_ENDS: Final = frozenset((Code.SESSION_END, Code.STOP))
_HASH: Final = frozenset((Code.HASH_START, Code.HASH_DATA, Code.HASH_END))
_CODES: Final = {
    Port.COMMAND: _ENDS | _HASH | {Code.SEND_COMMAND, Code.REMOTE_HANDSHAKE, Code.SET_ALTERNATIVE_RESULT},
    Port.PLATFORM: frozenset(Code) - _HASH - {Code.SEND_COMMAND, Code.REMOTE_HANDSHAKE, Code.SET_ALTERNATIVE_RESULT},
}
_FIXED_SIZES: Final = {Code.REMOTE_HANDSHAKE: U32.size, Code.SET_ALTERNATIVE_RESULT: U32.size}
_MAX_SIZES: Final = {Code.SEND_COMMAND: MAX_COMMAND_SIZE, Code.HASH_DATA: MAX_HASH_DATA_SIZE}


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request, as somebody sent it. `raw`: a bare TPM command, which wants a bare response."""

    code: Code
    locality: int = 0
    body: bytes = field(default=b"", repr=False)
    raw: bool = False


class RequestReader:
    """Takes bytes as they come and gives whole requests. Holds no more than one request and what was fed with its end."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether there is something that is not a whole request yet; ask when `take` has given None."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add what has come."""
        self._buffer += data

    def take(self) -> Request | None:
        """Return the next request; None if it is not whole yet.

        Raises:
            InvalidArgumentError: MSSIM_CODE_UNKNOWN, MSSIM_SIZE_INVALID. What follows can't be understood any more.
        """
        buffer = self._buffer
        if len(buffer) < U32.size:
            return None
        (number,) = U32.unpack_from(buffer)
        if self._port is Port.COMMAND and number >> 16 in (Tag.NO_SESSIONS, Tag.SESSIONS):
            return self._take_raw()
        code = self._code(number)
        at, locality = U32.size, 0
        if code is Code.SEND_COMMAND:
            if len(buffer) <= at:
                return None
            locality, at = buffer[at], at + 1
        size = _FIXED_SIZES.get(code, 0)
        if code in _MAX_SIZES:
            if len(buffer) < at + U32.size:
                return None
            (size,) = U32.unpack_from(buffer, at)
            _check_size(size, 0, _MAX_SIZES[code])
            at += U32.size
        if len(buffer) < at + size:
            return None
        request = Request(code, locality, bytes(buffer[at : at + size]))
        del buffer[: at + size]
        return request

    def _take_raw(self) -> Request | None:
        # Tag, then the size of the whole.
        if len(self._buffer) < 2 + U32.size:
            return None
        (size,) = U32.unpack_from(self._buffer, 2)
        _check_size(size, HEADER_SIZE, MAX_COMMAND_SIZE)
        if len(self._buffer) < size:
            return None
        request = Request(Code.SEND_COMMAND, 0, bytes(self._buffer[:size]), raw=True)
        del self._buffer[:size]
        return request

    def _code(self, number: int) -> Code:
        try:
            code = Code(number)
        except ValueError:
            code = None
        if code is None or code not in _CODES[self._port]:
            raise InvalidArgumentError("MSSIM_CODE_UNKNOWN", f"the {self._port.value} port knows no code {number}")
        return code


def _check_size(size: int, least: int, most: int) -> None:
    if not least <= size <= most:
        raise InvalidArgumentError("MSSIM_SIZE_INVALID", f"a size of {size} bytes was announced; {least} to {most} are allowed")
