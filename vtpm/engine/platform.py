"""The platform around a worker's TPM, as its VM's control channel sees it: power, states that are set, the H-CRTM event.

Invariant 2: a volatile state that was set or kept is used by one INIT and forgotten before the first command runs.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vtpm.engine.software import SoftwareTpm
from vtpm.errors import EngineError
from vtpm.tpm.pcr import PcrBank
from vtpm.tpm.ptm import BlobType, ControlCommand


class Power(Protocol):
    """What the platform asks of the worker."""

    @property
    def powered(self) -> bool:
        """Whether the TPM is initialised."""

    @property
    def attached(self) -> bool:
        """Whether a VM's control connection is open."""

    def before_power_loss(self) -> None:
        """TPM2_Shutdown, if the TPM has gone on since the last one."""

    def turn_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """_TPM_Init."""

    def turn_off(self) -> None:
        """Take the power from the TPM."""

    def end(self) -> None:
        """Power off for good; does not return."""

    def settle(self) -> None:
        """Make durable what the TPM changed."""

    def state_imported(self) -> None:
        """Seal and commit the state that was set, and tell the daemon."""

    def hashed(self, digests: Sequence[bytes]) -> None:
        """Record an H-CRTM event; a digest for each bank that there may be."""

    def serve_vm(self, connection: socket.socket) -> bool:
        """Serve the VM's data channel; False if there is one already."""

    def before_next_command(self, action: Callable[[], None]) -> None:
        """Call `action` once, before the next command runs, whoever sends it."""


class VmPlatform:
    """Implements vtpm.engine.control.Platform."""

    def __init__(self, tpm: SoftwareTpm, power: Power) -> None:
        self._tpm = tpm
        self._power = power
        self._set: dict[BlobType, bytes] = {}
        self._kept: bytes | None = None
        self._hashing = False
        # What HASH_DATA brought, in each bank that there may be.
        self._hashes: list[Any] = []

    @property
    def quiescent(self) -> bool:
        """Whether nothing is held that a snapshot would not have: states that were set, half an H-CRTM event."""
        return not self._set and self._kept is None and not self._hashing

    @property
    def capabilities(self) -> int:
        """See Platform."""
        return self._tpm.control_capabilities

    @property
    def powered(self) -> bool:
        """See Platform."""
        return self._power.powered

    @property
    def attached(self) -> bool:
        """See Platform."""
        return self._power.attached

    def init(self, flags: int) -> None:
        """See Platform. The states are used up, whatever `flags` says of a volatile state's file."""
        if self._kept is None:
            self._power.before_power_loss()
        before = self._tpm.permanent
        imported = self._set.pop(BlobType.PERMANENT, None)
        permanent = imported if imported is not None else before
        volatile, self._kept = self._set.pop(BlobType.VOLATILE, self._kept), None
        if permanent is None:
            raise EngineError("STATE_MISSING", "there is no state to initialise the TPM with")
        try:
            self._power.turn_on(permanent, volatile)
        except EngineError:
            # Whatever was set, the instance keeps the state that it had.
            self._power.turn_off()
            self._tpm.permanent, self._tpm.dirty = before, False
            raise
        if imported is not None:
            self._power.state_imported()
        self._power.settle()

    def halt(self) -> None:
        """See Platform."""
        if self._kept is None:
            # Otherwise it goes on where it is now.
            self._power.before_power_loss()
        self._power.turn_off()

    def power_off(self) -> None:
        """See Platform."""
        self._power.end()

    def set_locality(self, locality: int) -> None:
        """See Platform."""
        self._tpm.locality = locality

    def hash_sequence(self, command: ControlCommand, data: bytes) -> int:
        """See Platform."""
        match command:
            case ControlCommand.HASH_START:
                result = self._tpm.hash_start()
                self._hashing = result == 0
                self._hashes = [hashlib.new(bank.hash_name) for bank in PcrBank]
            case ControlCommand.HASH_DATA:
                result = self._tpm.hash_data(data)
                if result == 0:
                    for digest in self._hashes:
                        digest.update(data)
            case _:
                result = self._tpm.hash_end()
                if self._hashing and result == 0:
                    self._power.hashed([digest.digest() for digest in self._hashes])
                self._hashing, self._hashes = False, []
        self._kept = None
        self._power.settle()
        return result

    def established(self) -> bool:
        """See Platform."""
        return self._tpm.established()

    def reset_established(self, locality: int) -> int:
        """See Platform."""
        before, self._tpm.locality = self._tpm.locality, locality
        try:
            return self._tpm.reset_established()
        finally:
            self._tpm.locality = before
            self._power.settle()

    def keep_volatile(self) -> None:
        """See Platform."""
        self._kept = self._tpm.volatile()
        self._power.before_next_command(self._forget_kept)

    def _forget_kept(self) -> None:
        self._kept = None

    def state(self, kind: BlobType) -> bytes | None:
        """See Platform."""
        return self._tpm.permanent if kind is BlobType.PERMANENT else self._tpm.volatile()

    def set_state(self, kind: BlobType, state: bytes) -> None:
        """See Platform."""
        if kind is BlobType.PERMANENT:
            self._tpm.check_permanent(state)
        else:
            permanent = self._set.get(BlobType.PERMANENT, self._tpm.permanent)
            if permanent is None:
                raise EngineError("STATE_MISSING", "there is no permanent state that a volatile one could belong to")
            self._tpm.check_volatile(state, permanent)
        self._set[kind] = state

    def serve_data(self, connection: socket.socket) -> bool:
        """See Platform."""
        return self._power.serve_vm(connection)

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """See Platform."""
        return self._tpm.buffer_size(wanted)

    def info(self, flags: int) -> bytes:
        """See Platform."""
        return self._tpm.info(flags)
