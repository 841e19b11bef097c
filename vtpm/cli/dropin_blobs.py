"""State blobs of a TPM that runs alone, encrypted with the keys of `--key` and `--migration-key` as swtpm does it.

The worker knows no keys of swtpm's: it gives and takes plain state, and what leaves over the control channel is encrypted here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vtpm.errors import VtpmError
from vtpm.tpm.ptm import CODE, BlobType, Result, migration_blob, state_of
from vtpm.wire import swtpm_state

_CONFIG_FILE_KEY: Final = 1
_CONFIG_MIGRATION_KEY: Final = 2
_DECRYPTED: Final = 1
_ENCRYPTED: Final = 2
_REQUEST: Final = struct.Struct(">III")
_ANSWER: Final = struct.Struct(">IIII")
# TPM_KEYNOTFOUND, TPM_DECRYPT_ERROR, TPM_BAD_KEY_PROPERTY.
_RESULTS: Final = {"SWTPM_STATE_ENCRYPTED": 0x0D, "SWTPM_STATE_NOT_AUTHENTIC": 0x21, "SWTPM_KEY_INVALID": 0x28}

Ask = Callable[[bytes], bytes]


class Blobs:
    """Answers GET_STATEBLOB and SET_STATEBLOB; `ask` sends such a request to the worker and returns its answer."""

    def __init__(self, key: bytes | None, migration_key: bytes | None) -> None:
        self._key = key
        self._migration_key = migration_key
        # What a caller that reads in pieces is in the middle of: made anew, it would be encrypted with another IV.
        self._begun: tuple[int, int] | None = None
        self._blob = b""

    @property
    def config(self) -> int:
        """The flags of GET_CONFIG."""
        return (_CONFIG_FILE_KEY if self._key is not None else 0) | (
            _CONFIG_MIGRATION_KEY if self._migration_key is not None else 0
        )

    def get(self, payload: bytes, ask: Ask) -> bytes:
        """Answer a GET_STATEBLOB."""
        flags, kind, offset = _REQUEST.unpack(payload)
        key = None if flags & _DECRYPTED else self._key
        if key is None and self._migration_key is None:
            return ask(payload)
        if offset == 0 or self._begun != (flags, kind):
            answer = ask(_REQUEST.pack(_DECRYPTED, kind, 0))
            if not answer.startswith(CODE.pack(Result.SUCCESS)):
                return answer
            self._blob = swtpm_state.build_blob(state_of(answer[_ANSWER.size :]), key, self._migration_key)
            self._begun = (flags, kind)
        part = self._blob[offset:]
        return _ANSWER.pack(Result.SUCCESS, 0 if key is None else _ENCRYPTED, len(part), len(part)) + part

    def set(self, payload: bytes, ask: Ask) -> bytes:
        """Answer a SET_STATEBLOB."""
        flags, kind, _ = _REQUEST.unpack_from(payload)
        blob = payload[_REQUEST.size :]
        encrypted = bool(flags & _ENCRYPTED)
        if not encrypted and not swtpm_state.is_encrypted(blob):
            return ask(payload)
        if not swtpm_state.is_whole(blob):
            return CODE.pack(Result.BAD_PARAMETER)
        try:
            state = swtpm_state.open_blob(blob, self._key, self._migration_key, encrypted=encrypted)
            if kind == BlobType.PERMANENT:
                swtpm_state.check_permanent(state)
        except VtpmError as error:
            return CODE.pack(_RESULTS.get(error.reason, Result.FAIL))
        plain = migration_blob(state)
        return ask(_REQUEST.pack(0, kind, len(plain)) + plain)
