"""Fresh randomness in a volatile state of libtpms, so that two loads of one state never give the same random numbers.

A volatile state holds the seed of the TPM's random number generator and the secret that TPM2_EC_Ephemeral and TPM2_Commit make
their keys of. Both are changed in the state before libtpms loads it, and not by TPM2_StirRandom after that: a command would end
an exclusive audit session of the guest (TPM 2.0 Library, Part 1, 17.7), could be in the guest's command audit digest, and needs
a TPM that was started and has not failed.

The layout is that of libtpms' VolatileState_Marshal; in it both places come before anything whose content a guest chooses
freely, or behind it by lengths that are stated. A state from before TPM2_Startup needs no mending: TPM2_Startup reseeds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Final

# A state ends with the SHA-1 of what is before it.
CHECKSUM_SIZE: Final = 20
_VOLATILE: Final = 0x45637889
_ORDERLY: Final = 0x56657887
_DRBG_STATE: Final = 0x6FE83EA1
_STATE_CLEAR: Final = 0x98897667
_PCR_SAVE: Final = 0x7372EABC
_PCR_AUTHS: Final = 0x6BE82EAF
_STATE_RESET: Final = 0x01102332
# Headers of these versions and later also say which version reads them.
_WITH_LEAST_VERSION: Final = 2
# STATE_RESET_DATA: earlier versions have the context array in bytes.
_WIDE_CONTEXTS: Final = 4
# "DRBG", CTR_DRBG's key and counter for AES-256 (NIST SP 800-90A, 10.2.1).
_DRBG: Final = 0x47425244
_SEED_SIZE: Final = 48
_ALG_NULL: Final = 0x10
_MAX_BANKS: Final = 16
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_HEADER: Final = struct.Struct(">HI")
# Whether a part is there, and its size.
_BLOCK: Final = struct.Struct(">BH")


class _UnknownLayoutError(Exception):
    """The state is laid out in another way than this module knows."""


class _Reader:
    """Walks through a state; struct.error at a length that lies behind its end, where `offset` may be until `check`."""

    def __init__(self, state: bytes) -> None:
        self._state = state
        self.offset = 0

    def check(self) -> None:
        """Raise _UnknownLayoutError if what was gone over is more than there is."""
        if self.offset > len(self._state):
            raise _UnknownLayoutError

    def skip(self, size: int) -> None:
        """Go `size` bytes further."""
        self.offset += size

    def u32(self) -> int:
        """Go over an integer of four bytes; return it."""
        (value,) = _U32.unpack_from(self._state, self.offset)
        self.offset += 4
        return int(value)

    def u16(self) -> int:
        """Go over an integer of two bytes; return it."""
        (value,) = _U16.unpack_from(self._state, self.offset)
        self.offset += 2
        return int(value)

    def header(self, magic: int) -> int:
        """Go over the header of a structure; return its version."""
        version, found = _HEADER.unpack_from(self._state, self.offset)
        if found != magic:
            raise _UnknownLayoutError
        self.offset += _HEADER.size + (2 if version >= _WITH_LEAST_VERSION else 0)
        return int(version)

    def sized(self) -> tuple[int, int]:
        """Go over a TPM2B or an array of bytes; return where its content begins, and its size."""
        (size,) = _U16.unpack_from(self._state, self.offset)
        start = self.offset + 2
        self.offset = start + size
        return start, size

    def part(self, start: int, size: int) -> bytes:
        """Return what was gone over."""
        return self._state[start : start + size]

    def block(self) -> bool:
        """Go over the head of a part that may be missing; return whether it is there."""
        there, _size = _BLOCK.unpack_from(self._state, self.offset)
        self.offset += _BLOCK.size
        return bool(there)

    def skip_block(self) -> None:
        """Go over a part that may be missing."""
        there, size = _BLOCK.unpack_from(self._state, self.offset)
        self.offset += _BLOCK.size + (size if there else 0)

    def future(self, version: int) -> None:
        """Go over what a later version has put at the end of a structure."""
        if version >= _WITH_LEAST_VERSION:
            self.skip_block()


def freshen(state: bytes, entropy: Callable[[int], bytes]) -> bytes | None:
    """Return a volatile state like `state`, with other random numbers to come from it; None for one of an unknown layout.

    Fresh `entropy` is added to the generator's seed, so that no less is in it than was. The secret of ephemeral keys is
    replaced only while the guest has none of them in use, as the TPM makes those again from it.

    A state whose checksum is wrong is returned as it is, for libtpms to refuse.
    """
    body, checksum = state[:-CHECKSUM_SIZE], state[-CHECKSUM_SIZE:]
    if _checksum(body) != checksum:
        return state
    reader = _Reader(body)
    mended = bytearray(body)
    try:
        seed = _to_seed(reader)
        start, size = _to_commit_nonce(reader)
        reader.check()
    except (_UnknownLayoutError, struct.error):
        return None
    end = seed + _SEED_SIZE
    mixed = int.from_bytes(body[seed:end], "big") ^ int.from_bytes(entropy(_SEED_SIZE), "big")
    mended[seed:end] = mixed.to_bytes(_SEED_SIZE, "big")
    if size:
        mended[start : start + size] = entropy(size)
    mended += _checksum(mended)
    return bytes(mended)


def _checksum(body: bytes | bytearray) -> bytes:
    return hashlib.sha1(body, usedforsecurity=False).digest()


def _to_seed(reader: _Reader) -> int:
    """Walk to the generator's seed and over it."""
    reader.header(_VOLATILE)
    # g_exclusiveAuditSession, g_time, g_phEnable, g_pcrReConfig, g_DRTMHandle, g_DrtmPreStartup, g_StartupLocality3.
    reader.skip(4 + 8 + 1 + 1 + 4 + 1 + 1)
    # g_daUsed.
    reader.skip_block()
    # g_powerWasLost, g_prevOrderlyState, g_nvOk, g_platformUniqueDetails.
    reader.skip(1 + 2 + 1)
    reader.sized()
    orderly = reader.header(_ORDERLY)
    # clock, clockSafe.
    reader.skip(8 + 1)
    version = reader.header(_DRBG_STATE)
    # reseedCounter.
    reader.skip(8)
    if reader.u32() != _DRBG:
        raise _UnknownLayoutError
    seed, size = reader.sized()
    if size != _SEED_SIZE:
        raise _UnknownLayoutError
    # lastValue.
    reader.skip(4 * reader.u16())
    reader.future(version)
    # selfHealTimer, lockoutTimer, time.
    reader.skip_block()
    reader.future(orderly)
    return seed


def _to_commit_nonce(reader: _Reader) -> tuple[int, int]:
    """Walk on to commitNonce; return where it begins and its size, 0 if it must stay as it is."""
    _skip_state_clear(reader)
    version = reader.header(_STATE_RESET)
    # nullProof, nullSeed, clearCount, objectContextID.
    reader.sized()
    reader.sized()
    reader.skip(4 + 8)
    # contextArray, and since it is wide s_ContextSlotMask.
    contexts = reader.u16()
    reader.skip(2 * contexts + 2 if version >= _WIDE_CONTEXTS else contexts)
    # contextCounter, commandAuditDigest, restartCount, pcrCounter.
    reader.skip(8)
    reader.sized()
    reader.skip(4 + 4)
    if not reader.block():
        return 0, 0
    # commitCounter.
    reader.skip(8)
    start, size = reader.sized()
    in_use, count = reader.sized()
    return (start, size) if not any(reader.part(in_use, count)) else (0, 0)


def _skip_state_clear(reader: _Reader) -> None:
    version = reader.header(_STATE_CLEAR)
    # shEnable, ehEnable, phEnableNV, platformAlg, platformPolicy, platformAuth.
    reader.skip(1 + 1 + 1 + 2)
    reader.sized()
    reader.sized()
    pcrs = reader.header(_PCR_SAVE)
    reader.skip(2)
    for _ in range(_MAX_BANKS):
        if reader.u16() == _ALG_NULL:
            break
        reader.sized()
    else:
        raise _UnknownLayoutError
    reader.future(pcrs)
    auths = reader.header(_PCR_AUTHS)
    for _ in range(reader.u16()):
        reader.sized()
    reader.future(auths)
    reader.future(version)
