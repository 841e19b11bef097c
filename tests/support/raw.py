"""Raw TPM 2.0 commands on a VM's socket: what a client without any library sends."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from vtpm.tpm.codes import CommandCode, Tag
from vtpm.tpm.command import HEADER, HEADER_SIZE, build
from vtpm.tpm.pcr import PcrBank, PcrSelection, marshal_selections

# A password session with an empty password (TPM 2.0 Library, Part 1, 19.4).
EMPTY_PASSWORD_AREA = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
OWNER = 0x40000001
LOCKOUT = 0x4000000A
COUNTER = 0x01000010
ORDINARY = 0x01000011

_NV_COUNTER = 1 << 4
_NV_AUTH = 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18  # OWNERWRITE, AUTHWRITE, OWNERREAD, AUTHREAD
_NV_NO_DA = 1 << 25


def connect(path: str | Path) -> socket.socket:
    """Connect to a VM's data socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def receive(sock: socket.socket) -> bytes:
    """Read one whole response; empty when the peer closed."""
    data = b""
    while len(data) < HEADER_SIZE or len(data) < HEADER.unpack_from(data)[1]:
        part = sock.recv(8192)
        if not part:
            return data
        data += part
    return data


def ask(sock: socket.socket, command: bytes) -> bytes:
    """Send a command and return the response."""
    sock.sendall(command)
    return receive(sock)


def rc_of(response: bytes) -> int:
    """The response code."""
    return int(HEADER.unpack_from(response)[2])


def succeed(sock: socket.socket, command: bytes) -> bytes:
    """Send a command that must succeed."""
    response = ask(sock, command)
    assert rc_of(response) == 0, hex(rc_of(response))
    return response


def pcr_read(*indices: int, bank: PcrBank = PcrBank.SHA256) -> bytes:
    """TPM2_PCR_Read."""
    return build(CommandCode.PCR_Read, marshal_selections([PcrSelection(bank, indices or (0, 7))]))


def get_random(size: int) -> bytes:
    """TPM2_GetRandom."""
    return build(CommandCode.GetRandom, struct.pack(">H", size))


def startup_clear() -> bytes:
    """TPM2_Startup(CLEAR)."""
    return build(CommandCode.Startup, struct.pack(">H", 0))


def pcr_extend(index: int, digest: bytes, alg: int = PcrBank.SHA256.alg_id) -> bytes:
    """TPM2_PCR_Extend with one digest."""
    return build(
        CommandCode.PCR_Extend,
        struct.pack(">I", index) + EMPTY_PASSWORD_AREA + struct.pack(">IH", 1, alg) + digest,
        Tag.SESSIONS,
    )


def nv_define(index: int, *, counter: bool, size: int = 8) -> bytes:
    """TPM2_NV_DefineSpace by the owner, read and written with its own empty auth."""
    attributes = _NV_AUTH | _NV_NO_DA | (_NV_COUNTER if counter else 0)
    public = struct.pack(">IHIHH", index, PcrBank.SHA256.alg_id, attributes, 0, size)
    body = struct.pack(">I", OWNER) + EMPTY_PASSWORD_AREA + struct.pack(">H", 0) + struct.pack(">H", len(public)) + public
    return build(CommandCode.NV_DefineSpace, body, Tag.SESSIONS)


def nv_increment(index: int = COUNTER) -> bytes:
    """TPM2_NV_Increment."""
    return build(CommandCode.NV_Increment, struct.pack(">II", index, index) + EMPTY_PASSWORD_AREA, Tag.SESSIONS)


def nv_write(data: bytes, index: int = ORDINARY) -> bytes:
    """TPM2_NV_Write at offset 0."""
    body = struct.pack(">II", index, index) + EMPTY_PASSWORD_AREA + struct.pack(">H", len(data)) + data + struct.pack(">H", 0)
    return build(CommandCode.NV_Write, body, Tag.SESSIONS)


def nv_read(index: int = COUNTER, size: int = 8) -> bytes:
    """TPM2_NV_Read."""
    body = struct.pack(">II", index, index) + EMPTY_PASSWORD_AREA + struct.pack(">HH", size, 0)
    return build(CommandCode.NV_Read, body, Tag.SESSIONS)


def nv_value(response: bytes) -> bytes:
    """What a TPM2_NV_Read gave."""
    (size,) = struct.unpack_from(">H", response, HEADER_SIZE + 4)
    return response[HEADER_SIZE + 6 : HEADER_SIZE + 6 + size]


def tpm2_clear() -> bytes:
    """TPM2_Clear with lockout authorization."""
    return build(CommandCode.Clear, struct.pack(">I", LOCKOUT) + EMPTY_PASSWORD_AREA, Tag.SESSIONS)


def counter_of(sock: socket.socket, index: int = COUNTER) -> int:
    """The value of an NV counter."""
    return int.from_bytes(nv_value(succeed(sock, nv_read(index))), "big")
