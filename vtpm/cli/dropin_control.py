"""The control channel of a TPM that runs alone: requests go on to the worker, but for what concerns the state directory."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable
from typing import Final, Protocol

from vtpm.cli.dropin_blobs import Blobs
from vtpm.cli.dropin_state import StateDirectory
from vtpm.errors import EngineError, VtpmError
from vtpm.tpm.ptm import CODE, BlobType, ControlCommand, Result, failed_size, migration_blob, state_of

_GET_DECRYPTED: Final = 1
# What follows the TPM_RESULT of a success, if anything does.
_TAILS: Final = {ControlCommand.SET_BUFFERSIZE: 12}


class Stream(Protocol):
    """A client's connection: a socket, or a character device."""

    def fileno(self) -> int:
        """Its descriptor."""

    def settimeout(self, value: float | None, /) -> None:
        """How long sending may take."""

    def recv(self, size: int, /) -> bytes:
        """Receive."""

    def sendall(self, data: bytes, /) -> None:
        """Send."""

    def close(self) -> None:
        """Close it."""


class Data(Protocol):
    """Who serves the data channel."""

    def take(self, connection: Stream) -> bool:
        """Serve it; False if there is one already."""


class Tpm(Protocol):
    """A worker with its state: a StandaloneTpm, or an instance of the daemon."""

    pidfd: int
    failure: str

    def connect(self) -> socket.socket:
        """Return a control connection, whose end is the end of the run."""

    def execute(self, command: bytes) -> bytes:
        """Run a TPM command."""

    def commands_since(self) -> int:
        """Count the commands since the last such question."""

    def stop(self) -> None:
        """End the run."""

    def wait(self) -> str:
        """Wait for the end; return what went wrong."""


class Control:
    """Answers control requests. Power, and what of it concerns the files, goes through here."""

    def __init__(
        self,
        tpm: Tpm,
        state: StateDirectory,
        *,
        fresh: bytes | None,
        blobs: Blobs,
        reject_locality_4: bool,
        say: Callable[[str], None],
    ) -> None:
        self._tpm = tpm
        self._state = state
        # A state that is in no file yet.
        self._fresh = fresh
        self._blobs = blobs
        self._reject_locality_4 = reject_locality_4
        self._say = say
        self._worker = tpm.connect()
        self._suspended = False
        # Whether the last INIT has resumed a TPM that was suspended; whether it was the start's own, with nothing said since.
        self._resumed = self._going_on = False
        self.ended = False
        # Why the end was none in order.
        self.failure = ""
        self.data: Data | None = None

    # ---- the worker ------------------------------------------------------------------------------------------------------

    def _forward(self, command: ControlCommand, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        try:
            message = CODE.pack(command) + payload
            if fds:
                socket.send_fds(self._worker, [message], fds)
            else:
                self._worker.sendall(message)
            answer = self._exactly(8 if command is ControlCommand.GET_CAPABILITY else failed_size(command))
            result = CODE.unpack_from(answer)[0]
            if result == Result.SUCCESS and command in _TAILS:
                answer += self._exactly(_TAILS[command])
            elif result == Result.SUCCESS and command is ControlCommand.GET_INFO:
                answer += self._exactly(8)
                answer += self._exactly(CODE.unpack_from(answer, 8)[0])
            elif result == Result.SUCCESS and command is ControlCommand.GET_STATEBLOB:
                answer += self._exactly(CODE.unpack_from(answer, 12)[0])
        except OSError:
            raise EngineError("WORKER_GONE", self._tpm.failure or "the TPM's process has ended") from None
        return answer

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._worker.recv(size - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def give_data(self, connection: Stream) -> bool:
        """Have the worker serve a data channel; False while it serves another."""
        return self._forward(ControlCommand.SET_DATAFD, fds=(connection.fileno(),)) == CODE.pack(Result.SUCCESS)

    def set_locality(self, locality: int) -> bool:
        """Set the locality of the data channel; False if it is refused."""
        if locality == 4 and self._reject_locality_4:
            return False
        return self._forward(ControlCommand.SET_LOCALITY, bytes((locality,))) == CODE.pack(Result.SUCCESS)

    def _volatile(self) -> bytes:
        answer = self._forward(ControlCommand.GET_STATEBLOB, struct.pack(">III", _GET_DECRYPTED, BlobType.VOLATILE, 0))
        if not answer.startswith(CODE.pack(Result.SUCCESS)):
            raise EngineError("VOLATILE_NOT_GIVEN", "the TPM does not give its volatile state", remedy="power it on again")
        return state_of(answer[16:])

    # ---- requests --------------------------------------------------------------------------------------------------------

    def answer(self, command: ControlCommand, payload: bytes, fds: list[int]) -> bytes:
        """Return the answer to a request. What could not be done is answered with TPM_FAIL, and the log says why.

        Raises:
            EngineError: WORKER_GONE.
        """
        try:
            return self._answer(command, payload, fds)
        except (OSError, VtpmError) as error:
            if isinstance(error, VtpmError) and error.reason == "WORKER_GONE":
                raise
            self._say(f"{command.name}: {error}")
            return CODE.pack(Result.FAIL)

    def _answer(self, command: ControlCommand, payload: bytes, fds: list[int]) -> bytes:
        match command:
            case ControlCommand.GET_CONFIG:
                return struct.pack(">II", Result.SUCCESS, self._blobs.config)
            case ControlCommand.SET_LOCALITY if payload[0] == 4 and self._reject_locality_4:
                return CODE.pack(Result.BAD_LOCALITY)
            case ControlCommand.SET_DATAFD:
                return CODE.pack(self._set_data(fds))
            case ControlCommand.INIT:
                return self._initialise(payload)
            case ControlCommand.STORE_VOLATILE:
                return self._store_volatile()
            case ControlCommand.GET_STATEBLOB:
                return self._blobs.get(payload, lambda request: self._forward(command, request))
            case ControlCommand.SET_STATEBLOB:
                return self._blobs.set(payload, lambda request: self._forward(command, request))
            case ControlCommand.SHUTDOWN:
                self.end()
                answer = self._forward(command)
                return CODE.pack(Result.FAIL) if self.failure else answer
            case _:
                return self._forward(command, payload)

    def _set_data(self, fds: list[int]) -> int:
        if len(fds) != 1 or not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            return Result.BAD_PARAMETER
        connection = socket.socket(fileno=os.dup(fds[0]))
        if connection.type != socket.SOCK_STREAM:
            connection.close()
            return Result.BAD_PARAMETER
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            connection.close()
            return Result.BAD_PARAMETER
        assert self.data is not None
        if self.data.take(connection):
            return Result.SUCCESS
        connection.close()
        return Result.IOERROR

    def initialise(self) -> bool:
        """_TPM_Init without anybody asking for it."""
        done = self._initialise(bytes(4)) == CODE.pack(Result.SUCCESS)
        self._going_on = done and self._resumed
        return done

    def start_up(self, command: bytes) -> bytes:
        """Run the start's own TPM2_Startup; return the response."""
        response = self._tpm.execute(command)
        # None of a guest's.
        self._tpm.commands_since()
        return response

    def _initialise(self, payload: bytes) -> bytes:
        self._suspended = False
        if self._going_on and not self._tpm.commands_since():
            # The start has resumed it and nobody has used it: the INIT of a caller, who does not know that, resets nothing.
            self._forward(ControlCommand.STORE_VOLATILE)
        self._going_on = False
        try:
            # Whatever the request's flags say: they are about the file, which is gone in any case. A TPM that was suspended
            # goes on, as with swtpm, whose `swtpm_ioctl -i` sets the flag always.
            volatile = self._state.read_volatile()
        except VtpmError as error:
            # Closed on doubt (invariant 7): a damaged volatile state must not become a fresh start.
            self._say(f"INIT: {error}")
            return CODE.pack(Result.FAIL)
        self._resumed = volatile is not None
        if volatile is not None:
            self._forward(ControlCommand.STOP)
            blob = migration_blob(volatile)
            answer = self._forward(ControlCommand.SET_STATEBLOB, struct.pack(">III", 0, BlobType.VOLATILE, len(blob)) + blob)
            if answer != CODE.pack(Result.SUCCESS):
                return answer
        self._state.drop_volatile()
        answer = self._forward(ControlCommand.INIT, payload)
        if volatile is not None and answer != CODE.pack(Result.SUCCESS):
            # No command has run on it.
            self._state.write_volatile(volatile)
        if answer == CODE.pack(Result.SUCCESS) and self._fresh is not None:
            self._keep_first(self._fresh)
            self._fresh = None
        return answer

    def _keep_first(self, state: bytes) -> None:
        try:
            self._state.write_first(state)
        except VtpmError:
            # A TPM that is in no file must not be used: it would be another one at the next start.
            self._forward(ControlCommand.STOP)
            raise

    def _store_volatile(self) -> bytes:
        answer = self._forward(ControlCommand.STORE_VOLATILE)
        if answer == CODE.pack(Result.SUCCESS):
            # Who asks for it learns now that it can't be written, and not when nobody can do anything any more.
            self._state.rehearse_volatile(self._volatile)
            self._suspended = True
            self._tpm.commands_since()
        return answer

    def end(self) -> None:
        """End the run in order; `failure` says what could not be kept."""
        if self.ended:
            return
        self.ended = True
        try:
            self._suspend()
        except VtpmError as error:
            self.failure = f"the suspended TPM could not be kept: {error}"

    def _suspend(self) -> None:
        """Before an orderly end: keep the volatile state if STORE_VOLATILE was said and no command came after it.

        Not at STORE_VOLATILE itself: were this process killed later, an old state would come back (invariant 2).
        """
        if self._suspended and not self._tpm.commands_since():
            self._state.write_volatile(self._volatile())
            # It goes on from there: without power now, it is not shut down at the end, which the file would not know.
            self._forward(ControlCommand.STOP)
