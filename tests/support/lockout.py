"""What a guest with dictionary-attack protection loses when its TPM loses power (TPM 2.0 Library, Part 1, 19.8)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from tests.support import raw
from vtpm.tpm.codes import TPM_RC_RETRY, CommandCode, Tag
from vtpm.tpm.command import HEADER_SIZE, build
from vtpm.tpm.pcr import PcrBank

Run = Callable[[bytes], bytes]

SU_CLEAR, SU_STATE = 0, 1
TPM_RC_VALUE_1: Final = 0x1C4
_INDEX: Final = 0x01000020
# OWNERWRITE, AUTHWRITE, OWNERREAD, AUTHREAD; without NO_DA.
_PROTECTED: Final = 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18
_CAP_TPM_PROPERTIES: Final = 6
_PT_LOCKOUT_COUNTER: Final = 0x20E


def startup(kind: int = SU_CLEAR) -> bytes:
    """TPM2_Startup."""
    return build(CommandCode.Startup, struct.pack(">H", kind))


def shutdown(kind: int = SU_CLEAR) -> bytes:
    """TPM2_Shutdown."""
    return build(CommandCode.Shutdown, struct.pack(">H", kind))


def make_protected(run: Run) -> None:
    """Make something that is protected against dictionary attacks, and put a secret there."""
    public = struct.pack(">IHIHH", _INDEX, PcrBank.SHA256.alg_id, _PROTECTED, 0, 8)
    body = (
        struct.pack(">I", raw.OWNER) + raw.EMPTY_PASSWORD_AREA + struct.pack(">H", 0) + struct.pack(">H", len(public)) + public
    )
    assert raw.rc_of(run(build(CommandCode.NV_DefineSpace, body, Tag.SESSIONS))) == 0
    assert raw.rc_of(_insist(run, raw.nv_write(b"a secret", _INDEX))) == 0


def use_protected(run: Run) -> bytes:
    """Read the secret, with its auth; what it answers is what the guest gets."""
    response = _insist(run, raw.nv_read(_INDEX))
    assert raw.rc_of(response) == 0, hex(raw.rc_of(response))
    return raw.nv_value(response)


def failed_tries(run: Run) -> int:
    """How often the TPM believes to have been attacked."""
    response = run(build(CommandCode.GetCapability, struct.pack(">III", _CAP_TPM_PROPERTIES, _PT_LOCKOUT_COUNTER, 1)))
    assert raw.rc_of(response) == 0
    return int(struct.unpack_from(">I", response, HEADER_SIZE + 13)[0])


def _insist(run: Run, command: bytes) -> bytes:
    """The TPM writes down first that something protected is used, and wants the command again."""
    response = run(command)
    return run(command) if raw.rc_of(response) == TPM_RC_RETRY else response
