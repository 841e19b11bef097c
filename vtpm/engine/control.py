"""The VM's control channel, served by the worker: swtpm's control protocol for QEMU and for tpm2-tss' `swtpm` TCTI.

It is served here and not by the daemon so that nothing of it depends on a daemon: a VM that runs can be reset, migrated and
powered off while there is none. What a request makes of the TPM is the worker's affair (`Platform`).
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final, Protocol

from vtpm.engine import descriptors
from vtpm.errors import VtpmError
from vtpm.tpm import ptm
from vtpm.tpm.ptm import CODE, BlobType, ControlCommand, ControlReader, Result

_MAX_DESCRIPTORS: Final = 4
_RECEIVE_SIZE: Final = 65536


class Platform(Protocol):
    """What the control channel asks of the worker. Methods raise VtpmError when the TPM fails."""

    @property
    def capabilities(self) -> int:
        """What is served (PTM_CAP_…)."""

    @property
    def powered(self) -> bool:
        """Whether the TPM is initialised."""

    @property
    def attached(self) -> bool:
        """Whether a VM's control connection is open."""

    def init(self, flags: int) -> None:
        """_TPM_Init, with the states that were set."""

    def halt(self) -> None:
        """Take the power from the TPM; the worker stays."""

    def power_off(self) -> None:
        """End the instance's run; does not return."""

    def set_locality(self, locality: int) -> None:
        """Set the locality of the data channel."""

    def hash_sequence(self, command: ControlCommand, data: bytes) -> int:
        """HASH_START, HASH_DATA or HASH_END (the H-CRTM event); returns a TPM_RESULT."""

    def established(self) -> bool:
        """The TPM established flag."""

    def reset_established(self, locality: int) -> int:
        """Clear that flag from `locality`; returns a TPM_RESULT."""

    def keep_volatile(self) -> None:
        """Hold the volatile state for the INIT that follows, if no command comes in between."""

    def state(self, kind: BlobType) -> bytes | None:
        """The permanent or volatile state; None if there is none."""

    def set_state(self, kind: BlobType, state: bytes) -> None:
        """Take a state for the next INIT."""

    def serve_data(self, connection: socket.socket) -> bool:
        """Serve the VM's data channel; False if there is one already."""

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """Set the TPM's buffer size (0: leave it); return it with its least and greatest."""

    def info(self, flags: int) -> bytes:
        """What the TPM tells of itself, as JSON."""


class ControlChannel:
    """One control connection. `attached` is that of a VMM, whose end is the end of the VM; `resumed` one that an earlier worker
    of the instance has served, which has read `zeros` zeros more than it used.
    """

    def __init__(
        self, platform: Platform, connection: socket.socket, *, attached: bool, resumed: bool = False, zeros: int = 0
    ) -> None:
        self._platform = platform
        self._connection = connection
        self.attached = attached
        self._reader = ControlReader(resumed=resumed, zeros=zeros)
        self._descriptors: list[int] = []

    def on_readable(self) -> bool:
        """Serve what has come; False when the connection is over."""
        try:
            data, fds = descriptors.receive(self._connection, _RECEIVE_SIZE, most=_MAX_DESCRIPTORS, flags=socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._descriptors.extend(fds)
        if not data:
            return False
        try:
            for command, request in self._reader.feed(data):
                last = command is ControlCommand.SHUTDOWN and (self.attached or not self._platform.attached)
                self._connection.sendall(CODE.pack(Result.SUCCESS) if last else self._answer(command, request))
                if last:
                    self._platform.power_off()
            if self._reader.broken:
                self._connection.sendall(CODE.pack(Result.BAD_ORDINAL))
        except OSError:
            return False
        return not self._reader.broken

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has come yet but zeros."""
        return self.zeros is not None and not self._descriptors

    @property
    def zeros(self) -> int | None:
        """See ControlReader."""
        return self._reader.zeros

    def close(self) -> None:
        """Close the connection and what came with it."""
        self._drop_descriptors()
        self._connection.close()

    def _drop_descriptors(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()

    def _answer(self, command: ControlCommand, request: bytes) -> bytes:
        if command is not ControlCommand.SET_DATAFD:
            # Descriptors belong to that command alone.
            self._drop_descriptors()
        try:
            answer = self._serve(command, request)
        except VtpmError:
            return ptm.failure(command, Result.FAIL)
        return ptm.failure(command, answer) if isinstance(answer, int) else answer

    def _serve(self, command: ControlCommand, request: bytes) -> bytes | int:
        """Return the whole answer, or the TPM_RESULT that is all of it."""
        platform = self._platform
        if not self.attached and platform.attached and not _harmless(command, request):
            # Invariant 2: the power and the states of a TPM whose VM runs are that VM's alone.
            return Result.FAIL
        match command:
            case ControlCommand.GET_CAPABILITY:
                return struct.pack(">Q", platform.capabilities)
            case ControlCommand.INIT:
                platform.init(int.from_bytes(request, "big"))
                return Result.SUCCESS
            case ControlCommand.STOP:
                platform.halt()
                return Result.SUCCESS
            case ControlCommand.SET_LOCALITY:
                if request[0] > ptm.MAX_LOCALITY:
                    return Result.BAD_LOCALITY
                platform.set_locality(request[0])
                return Result.SUCCESS
            case ControlCommand.SET_DATAFD:
                return self._set_data_fd()
            case ControlCommand.SET_BUFFERSIZE:
                return self._set_buffer_size(int.from_bytes(request, "big"))
            case ControlCommand.GET_CONFIG:
                # No key file and no migration key: states are sealed by other means, and never leave sealed here.
                return struct.pack(">II", Result.SUCCESS, 0)
            case ControlCommand.GET_INFO:
                return self._get_info(*ptm.get_info_request(request))
            case ControlCommand.SET_STATEBLOB:
                return self._set_state(*ptm.set_state_request(request))
            case ControlCommand.GET_STATEBLOB:
                return self._get_state(*ptm.get_state_request(request))
            case ControlCommand.LOCK_STORAGE:
                # The store has one owner at any time; there is nothing to wait for.
                return Result.SUCCESS
            case _:
                return self._serve_powered(command, request) if platform.powered else Result.BAD_ORDINAL

    def _serve_powered(self, command: ControlCommand, request: bytes) -> bytes | int:
        """Commands that need a TPM that is initialised."""
        platform = self._platform
        match command:
            case ControlCommand.GET_TPMESTABLISHED:
                return struct.pack(">IB3x", Result.SUCCESS, platform.established())
            case ControlCommand.RESET_TPMESTABLISHED:
                if request[0] > ptm.MAX_LOCALITY:
                    return Result.BAD_LOCALITY
                return platform.reset_established(request[0])
            case ControlCommand.HASH_START | ControlCommand.HASH_DATA | ControlCommand.HASH_END:
                return platform.hash_sequence(command, request[4:])
            case ControlCommand.STORE_VOLATILE:
                platform.keep_volatile()
                return Result.SUCCESS
            case ControlCommand.CANCEL_TPM_CMD:
                # The worker runs one thing at a time, so there is no command to cancel.
                return Result.SUCCESS
            case _:
                return Result.BAD_ORDINAL

    def _set_data_fd(self) -> int:
        """Take the one stream socket that came along."""
        fds, self._descriptors = self._descriptors, []
        try:
            (fd,) = fds
            # Asks whether it is a socket; the worker has no right to ask what else it may be.
            connection = socket.socket(fileno=fd)
        except (ValueError, OSError):
            descriptors.close_all(fds)
            return Result.BAD_PARAMETER
        if connection.type != socket.SOCK_STREAM:
            connection.close()
            return Result.BAD_PARAMETER
        if not self._platform.serve_data(connection):
            connection.close()
            return Result.IOERROR
        return Result.SUCCESS

    def _set_buffer_size(self, wanted: int) -> bytes | int:
        if wanted and self._platform.powered:
            return Result.BAD_ORDINAL
        return struct.pack(">IIII", Result.SUCCESS, *self._platform.buffer_size(wanted))

    def _get_info(self, flags: int, offset: int) -> bytes | int:
        text = self._platform.info(flags) + b"\0"
        if offset >= len(text):
            return Result.BAD_PARAMETER
        part = text[offset : offset + ptm.MAX_INFO_SIZE]
        return struct.pack(">III", Result.SUCCESS, len(text), len(part)) + part

    def _get_state(self, kind: int, offset: int) -> bytes | int:
        if not self._platform.powered and kind != BlobType.PERMANENT:
            return Result.BAD_ORDINAL
        state = self._platform.state(BlobType(kind)) if kind in (BlobType.PERMANENT, BlobType.VOLATILE) else None
        if state is None:
            return struct.pack(">IIII", Result.RETRY, 0, 0, 0)
        blob = ptm.migration_blob(state)
        part = blob[offset:]
        return struct.pack(">IIII", Result.SUCCESS, 0, len(blob) if part else 0, len(part)) + part

    def _set_state(self, flags: int, kind: int, blob: bytes) -> int:
        if self._platform.powered:
            return Result.BAD_ORDINAL
        if flags or kind not in (BlobType.PERMANENT, BlobType.VOLATILE):
            return Result.BAD_PARAMETER
        try:
            self._platform.set_state(BlobType(kind), ptm.state_of(blob))
        except VtpmError:
            return Result.BAD_PARAMETER
        return Result.SUCCESS


def _harmless(command: ControlCommand, request: bytes) -> bool:
    """Whether a request may come from beside the VM: what tpm2-tss asks before it uses the data socket."""
    match command:
        case (
            ControlCommand.GET_CAPABILITY
            | ControlCommand.GET_TPMESTABLISHED
            | ControlCommand.GET_CONFIG
            | ControlCommand.GET_INFO
        ):
            return True
        case ControlCommand.SET_LOCALITY:
            # There is one locality for all data connections.
            return request[0] == 0
        case _:
            return False
