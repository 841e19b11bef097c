"""swtpm's control protocol: numbers, requests, answers and state blobs (`tpm_ioctl.h`, swtpm_ioctls(3)); all big-endian.

A request is a code of four bytes and the request struct of `tpm_ioctl.h`; an answer begins with a TPM_RESULT, but for that of
GET_CAPABILITY. Everything here came from the VMM's side of a socket and is bounded.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from vtpm.errors import InvalidArgumentError


class ControlCommand(enum.IntEnum):
    """Command codes of `tpm_ioctl.h`; LOCK_STORAGE is of newer versions."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL_TPM_CMD = 0x09
    STORE_VOLATILE = 0x0A
    RESET_TPMESTABLISHED = 0x0B
    GET_STATEBLOB = 0x0C
    SET_STATEBLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATAFD = 0x10
    SET_BUFFERSIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class BlobType(enum.IntEnum):
    """PTM_BLOB_TYPE."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3


class Result(enum.IntEnum):
    """TPM_RESULT, those that answers begin with."""

    SUCCESS = 0
    BAD_PARAMETER = 0x03
    FAIL = 0x09
    BAD_ORDINAL = 0x0A
    IOERROR = 0x1F
    BAD_LOCALITY = 0x3D
    RETRY = 0x800


# Bits 0 to 15 for the first eighteen commands (PTM_CAP_*, SEND_COMMAND_HEADER among them), bit 16 for LOCK_STORAGE.
CAPABILITIES: Final = 0x1FFFF
CAP_HASHING: Final = 1 << 4
CAP_STORE_VOLATILE: Final = 1 << 6
CAP_GET_STATEBLOB: Final = 1 << 8
CAP_SET_STATEBLOB: Final = 1 << 9
INIT_DELETE_VOLATILE: Final = 1
MAX_LOCALITY: Final = 4
MAX_STATE_SIZE: Final = 1 << 20
MAX_HASH_DATA_SIZE: Final = 4096
MAX_INFO_SIZE: Final = 3072

CODE: Final = struct.Struct(">I")
# Answers whose size is the same in failure: QEMU reads that much before it looks at the TPM_RESULT. The others are a TPM_RESULT
# alone then.
_FAILED_SIZES: Final = {ControlCommand.GET_STATEBLOB: 16, ControlCommand.GET_TPMESTABLISHED: 8}
_GET_STATE: Final = struct.Struct(">III")
_GET_INFO: Final = struct.Struct(">QII")
# Payloads of fixed size. A single byte may be followed by three bytes of padding.
_SIZES: Final = {
    ControlCommand.INIT: 4,
    ControlCommand.SET_LOCALITY: 1,
    ControlCommand.RESET_TPMESTABLISHED: 1,
    ControlCommand.GET_STATEBLOB: _GET_STATE.size,
    ControlCommand.SET_BUFFERSIZE: 4,
    ControlCommand.GET_INFO: _GET_INFO.size,
    ControlCommand.LOCK_STORAGE: 4,
}
# Payloads that end in data: size of what stands before it, offset of the data's length, most data.
_WITH_DATA: Final = {
    ControlCommand.HASH_DATA: (4, 0, MAX_HASH_DATA_SIZE),
    ControlCommand.SET_STATEBLOB: (12, 8, MAX_STATE_SIZE),
}
_PADDED: Final = (ControlCommand.SET_LOCALITY, ControlCommand.RESET_TPMESTABLISHED)
_MAX_PADDING: Final = 3

# Version, least version, header size, flags, whole length; then records of tag, length, data.
_BLOB_HEADER: Final = struct.Struct(">BBHHI")
_RECORD: Final = struct.Struct(">HI")
_BLOB_MIGRATION: Final = 0x4
_TAG_DATA: Final = 1
_TAG_MIGRATION_DATA: Final = 4


class ControlReader:
    """Takes bytes as they come and gives whole requests. `broken`: framing is lost, by an unknown code or too great a length.

    tpm2-tss sends SET_LOCALITY as code and one byte, QEMU pads that byte to four with zeros. Every code begins with three zero
    bytes and none with four, so that padding can be told from the next request however the bytes come.
    """

    def __init__(self, *, resumed: bool = False, zeros: int = 0) -> None:
        self._buffer = bytearray(zeros)
        # The padding of a request that an earlier reader of the stream has read may still be to come, or be these zeros.
        self._padding = _MAX_PADDING if resumed else 0
        self.broken = False

    def feed(self, data: bytes) -> list[tuple[ControlCommand, bytes]]:
        """Add `data`; return the requests that are now whole, as (command, payload without padding)."""
        buffer = self._buffer
        buffer += data
        requests: list[tuple[ControlCommand, bytes]] = []
        while not self.broken:
            self._skip_padding()
            if len(buffer) < CODE.size:
                break
            (code,) = CODE.unpack_from(buffer)
            size = self._size(code)
            if size is None or len(buffer) < size:
                break
            requests.append((ControlCommand(code), bytes(buffer[CODE.size : size])))
            del buffer[:size]
            self._padding = _MAX_PADDING if code in _PADDED else 0
        return requests

    @property
    def zeros(self) -> int | None:
        """How many zeros another reader must begin with to go on with what follows; None if more was read than that."""
        if self.broken or len(self._buffer) > _MAX_PADDING or any(self._buffer):
            return None
        return len(self._buffer)

    @property
    def partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return bool(self._buffer) and not (self._padding and not self._buffer.strip(b"\0"))

    def _size(self, code: int) -> int | None:
        """Size of the request that begins with `code`; None while that can't be said."""
        try:
            command = ControlCommand(code)
        except ValueError:
            self.broken = True
            return None
        if command not in _WITH_DATA:
            return CODE.size + _SIZES.get(command, 0)
        head, at, most = _WITH_DATA[command]
        if len(self._buffer) < CODE.size + head:
            return None
        (length,) = CODE.unpack_from(self._buffer, CODE.size + at)
        if length > most:
            self.broken = True
            return None
        return CODE.size + head + int(length)

    def _skip_padding(self) -> None:
        """Drop the zeros that pad a one-byte payload, and not the zeros that begin the next code."""
        buffer = self._buffer
        if not self._padding or not buffer:
            return
        zeros = len(buffer) - len(buffer.lstrip(b"\0"))
        if zeros > self._padding:
            # A code begins with three zeros and no more.
            del buffer[: self._padding]
            self._padding = 0
        elif zeros < len(buffer):
            self._padding = 0


def failed_size(command: ControlCommand) -> int:
    """Return the size of an answer to `command` that reports a failure."""
    return _FAILED_SIZES.get(command, CODE.size)


def failure(command: ControlCommand, result: int) -> bytes:
    """Return the answer to `command` with that TPM_RESULT and without data, at its full length."""
    return CODE.pack(result).ljust(failed_size(command), b"\0")


def get_state_request(payload: bytes) -> tuple[int, int]:
    """Return (type, offset) of a GET_STATEBLOB; its flags ask for what is always so: unencrypted."""
    _flags, kind, offset = _GET_STATE.unpack(payload)
    return kind, offset


def set_state_request(payload: bytes) -> tuple[int, int, bytes]:
    """Return (flags, type, data) of a SET_STATEBLOB."""
    flags, kind, _length = _GET_STATE.unpack_from(payload)
    return flags, kind, payload[_GET_STATE.size :]


def get_info_request(payload: bytes) -> tuple[int, int]:
    """Return (flags, offset) of a GET_INFO."""
    flags, offset, _pad = _GET_INFO.unpack(payload)
    return flags, offset


def migration_blob(state: bytes) -> bytes:
    """Return the blob that GET_STATEBLOB gives for a state that libtpms stored."""
    inner = _RECORD.pack(_TAG_DATA, len(state)) + state
    size = _BLOB_HEADER.size
    outer = _RECORD.pack(_TAG_MIGRATION_DATA, len(inner)) + inner
    return _BLOB_HEADER.pack(2, 1, size, _BLOB_MIGRATION, size + len(outer)) + outer


def state_of(blob: bytes) -> bytes:
    """Return the state in a blob of GET_STATEBLOB or a plain state file.

    Raises:
        InvalidArgumentError: STATE_BLOB_INVALID.
    """
    if len(blob) < _BLOB_HEADER.size:
        raise _invalid("it is cut")
    version, least, header_size, _flags, total = _BLOB_HEADER.unpack_from(blob)
    if version < 1 or least > 2 or header_size < _BLOB_HEADER.size or total != len(blob):
        raise _invalid("its header does not fit")
    records = _records(blob[header_size:])
    if _TAG_MIGRATION_DATA in records:
        records = _records(records[_TAG_MIGRATION_DATA])
    if _TAG_DATA not in records:
        raise _invalid("it holds no plain state; an encrypted one can't be taken here")
    return records[_TAG_DATA]


def _records(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if len(data) - at < _RECORD.size:
            raise _invalid("a record is cut")
        tag, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if length > len(data) - at:
            raise _invalid("a record is longer than the blob")
        found.setdefault(tag, data[at : at + length])
        at += length
    return found


def _invalid(why: str) -> InvalidArgumentError:
    return InvalidArgumentError("STATE_BLOB_INVALID", f"this is no state blob of swtpm: {why}")
