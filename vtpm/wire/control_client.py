"""A blocking client of the swtpm control protocol over a unix socket (`tpm_ioctl.h`, swtpm_ioctls(3))."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from types import TracebackType
from typing import Final

from vtpm import peers
from vtpm.errors import EngineError, UnavailableError
from vtpm.tpm.ptm import MAX_STATE_SIZE, BlobType, ControlCommand, Result

_U32: Final = struct.Struct(">I")
_CAPABILITIES: Final = struct.Struct(">Q")
# Behind the result: flags, size of what there is from the offset asked for, size of what follows.
_STATE_ANSWER: Final = struct.Struct(">III")
_FLAG_DECRYPTED: Final = 1
_TIMEOUT_S: Final = 30.0
_REFUSAL_TIMEOUT_S: Final = 0.2
_REASON: Final = "CONTROL_COMMAND_FAILED"


class ControlCommandError(EngineError):
    """A control command was answered with a TPM_RESULT other than success, which `result` is."""

    def __init__(self, command: ControlCommand, result: int, subject: str) -> None:
        super().__init__(
            _REASON,
            f"{command.name} was answered with TPM_RESULT 0x{result:x}",
            subject=subject,
            remedy="the log of the service that answers this socket says why",
            metadata={"tpm_result": f"0x{result:x}"},
        )
        self.result = result


class ControlClient:
    """One connection to a control socket; a request at a time.

    Raises:
        UnavailableError: CONTROL_SOCKET_UNREACHABLE, CONTROL_CONNECTION_LOST; by every method.
        VtpmError: SERVER_NOT_TRUSTED; nothing was sent.
        EngineError: CONTROL_ANSWER_INVALID, or ControlCommandError; by every method.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._path = str(path)
        try:
            self._socket = peers.connect(path, timeout_s=timeout_s)
        except OSError as error:
            raise UnavailableError(
                "CONTROL_SOCKET_UNREACHABLE",
                f"nobody answers there: {error.strerror or error}",
                subject=self._path,
                remedy="do this on the host of the daemon, as a user who may open the socket",
            ) from None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def get_capability(self) -> int:
        """Return the capability bits (PTM_CAP_…)."""
        self._send(ControlCommand.GET_CAPABILITY)
        return int(_CAPABILITIES.unpack(self._receive(_CAPABILITIES.size))[0])

    def stop(self) -> None:
        """Stop the TPM; it is no longer initialised."""
        self._ask(ControlCommand.STOP)

    def init(self, flags: int = 0) -> None:
        """_TPM_Init, with the state that was set; `flags`: INIT_DELETE_VOLATILE or 0."""
        self._ask(ControlCommand.INIT, _U32.pack(flags))

    def shutdown(self) -> None:
        """Power off; nothing may be asked afterwards."""
        self._ask(ControlCommand.SHUTDOWN)

    def lock_storage(self, retries: int) -> None:
        """Lock the state's storage, with so many retries of 10 ms."""
        self._ask(ControlCommand.LOCK_STORAGE, _U32.pack(retries))

    def get_state_blob(self, kind: BlobType) -> bytes | None:
        """Return a state blob, not encrypted with the key of the state files; None if it has none of this kind."""
        blob = b""
        total = 0
        while not blob or len(blob) < total:
            self._send(ControlCommand.GET_STATEBLOB, struct.pack(">III", _FLAG_DECRYPTED, kind, len(blob)))
            (result,) = _U32.unpack(self._receive(_U32.size))
            if result:
                self._drop_rest_of_refusal()
                if result == Result.RETRY and not blob:
                    return None
                raise ControlCommandError(ControlCommand.GET_STATEBLOB, result, self._path)
            _flags, remaining, size = _STATE_ANSWER.unpack(self._receive(_STATE_ANSWER.size))
            if not blob:
                total = remaining
            if not 0 < total <= MAX_STATE_SIZE or not 0 < size <= total - len(blob):
                raise EngineError(
                    "CONTROL_ANSWER_INVALID",
                    f"GET_STATEBLOB was answered with impossible sizes ({size} of {total} bytes)",
                    subject=self._path,
                    remedy="see what answers this socket",
                )
            blob += self._receive(size)
        return blob

    def set_state_blob(self, kind: BlobType, blob: bytes) -> None:
        """Give a state blob to a TPM that is not initialised; INIT then uses it."""
        # swtpm wants the length of all that follows in the first request, and the rest without further headers.
        self._ask(ControlCommand.SET_STATEBLOB, struct.pack(">III", 0, kind, len(blob)) + blob)

    def _ask(self, command: ControlCommand, payload: bytes = b"") -> None:
        self._send(command, payload)
        (result,) = _U32.unpack(self._receive(_U32.size))
        if result:
            raise ControlCommandError(command, result, self._path)

    def _send(self, command: ControlCommand, payload: bytes = b"") -> None:
        try:
            self._socket.sendall(_U32.pack(command) + payload)
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from None

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(size - len(data))
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from None
            if not part:
                raise self._lost("the other end closed the connection")
            data += part
        return bytes(data)

    def _drop_rest_of_refusal(self) -> None:
        """Read what may follow the result of a refused GET_STATEBLOB: swtpm sends the sizes of some refusals, not of others."""
        timeout_s = self._socket.gettimeout()
        self._socket.settimeout(_REFUSAL_TIMEOUT_S)
        with contextlib.suppress(UnavailableError):
            self._receive(_STATE_ANSWER.size)
        self._socket.settimeout(timeout_s)

    def _lost(self, why: str) -> UnavailableError:
        return UnavailableError(
            "CONTROL_CONNECTION_LOST", why, subject=self._path, remedy="see what the daemon's log says, then try again"
        )
