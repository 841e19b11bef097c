"""The data channel of a TPM that runs alone: one client at a time, as with swtpm."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from vtpm.cli.dropin_control import Control, Stream
from vtpm.errors import EngineError
from vtpm.tpm.codes import TPM_RC_COMMAND_SIZE
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE, error_response
from vtpm.tpm.ptm import MAX_LOCALITY

# swtpm's own command, by which a data client sets its locality (`--locality allow-set-locality`).
_SET_LOCALITY: Final = 0x20001000
_RC_INSUFFICIENT: Final = 0x9A
_RC_LOCALITY: Final = 0x107
# TPM2_SEND_COMMAND, locality, size of the command.
_PREFIX_CODE: Final = b"\0\0\0\x08"
_PREFIX_SIZE: Final = 9
_TRIES: Final = 400
_TRY_S: Final = 0.005
_SEND_TIMEOUT_S: Final = 5.0


class DataChannel:
    """Hands each client to the worker, which serves it by itself; what is left here notices its end, and then calls `on_end`.

    The worker ends a client of its own accord when its bytes make no sense; `check`, called now and then, finds that out.
    """

    def __init__(self, control: Control, poller: select.epoll, on_end: Callable[[], None]) -> None:
        self._control = control
        self._poller = poller
        self._on_end = on_end
        self._client: Stream | None = None

    @property
    def client_fd(self) -> int:
        """The client's descriptor; -1 without one."""
        return self._client.fileno() if self._client is not None else -1

    def take(self, connection: Stream) -> bool:
        """See vtpm.cli.dropin_control.Data."""
        if self._client is not None:
            if not self._gone():
                return False
            self._drop()
            self._on_end()
        if not self._begin(connection):
            return False
        self._client = connection
        self._poller.register(connection.fileno(), self._EVENTS)
        return True

    _EVENTS = select.EPOLLRDHUP

    def _begin(self, connection: Stream) -> bool:
        return self._give(connection)

    def _gone(self) -> bool:
        assert self._client is not None
        poller = select.poll()
        poller.register(self._client, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _give(self, connection: Stream) -> bool:
        """Wait until the worker has served all of the client before, which is gone."""
        for _ in range(_TRIES):
            if self._control.give_data(connection):
                return True
            time.sleep(_TRY_S)
        return False

    def on_event(self) -> None:
        """Note the client's end."""
        self._drop()
        with _dead() as dead:
            # What it sent last is done when the next one is taken.
            self._give(dead)
        self._on_end()

    def check(self) -> None:
        """Close a client that the worker has closed."""
        if self._client is not None:
            with _dead() as dead:
                if self._control.give_data(dead):
                    assert isinstance(self._client, socket.socket)
                    self._client.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        if self._client is not None:
            self._poller.unregister(self._client.fileno())
            self._client.close()
            self._client = None


class RelayedData(DataChannel):
    """Passes each command on, for what the worker does not know: SetLocality in the stream, and one command a connection."""

    _EVENTS = select.EPOLLIN

    def __init__(
        self, control: Control, poller: select.epoll, on_end: Callable[[], None], *, set_locality: bool, disconnect: bool
    ) -> None:
        super().__init__(control, poller, on_end)
        self._set_locality = set_locality
        self._disconnect = disconnect
        self._worker, theirs = socket.socketpair()
        with theirs:
            self._give(theirs)
        self._buffer = bytearray()

    def _begin(self, connection: Stream) -> bool:
        self._buffer.clear()
        connection.settimeout(_SEND_TIMEOUT_S)
        return True

    def check(self) -> None:
        """Nothing can be closed behind this one's back."""

    def on_event(self) -> None:
        """Serve what has come."""
        assert self._client is not None
        try:
            data = self._client.recv(MAX_COMMAND_SIZE)
        except OSError:
            data = b""
        self._buffer += data
        open_ = bool(data)
        try:
            while open_ and (command := self._next()) is not None:
                self._client.sendall(self._answer(command))
                # Behind a size that can't be, there is no next command.
                open_ = bool(command) and not self._disconnect
        except OSError:
            open_ = False
        if not open_:
            self._drop()
            self._on_end()

    def _next(self) -> bytes | None:
        """Take a whole command, with its prefix if it has one; empty if it can't be one, None if there is none yet."""
        at = _PREFIX_SIZE if self._buffer.startswith(_PREFIX_CODE) else 0
        if len(self._buffer) < at + HEADER_SIZE:
            return None
        size = HEADER.unpack_from(self._buffer, at)[1]
        if not HEADER_SIZE <= size <= MAX_COMMAND_SIZE:
            return b""
        if len(self._buffer) < at + size:
            return None
        command = bytes(self._buffer[: at + size])
        del self._buffer[: at + size]
        return command

    def _answer(self, command: bytes) -> bytes:
        if not command:
            return error_response(TPM_RC_COMMAND_SIZE)
        prefixed = command.startswith(_PREFIX_CODE)
        if not prefixed and self._set_locality and HEADER.unpack_from(command)[2] == _SET_LOCALITY:
            if len(command) < HEADER_SIZE + 1:
                return error_response(_RC_INSUFFICIENT)
            locality = command[HEADER_SIZE]
            allowed = locality <= MAX_LOCALITY and self._control.set_locality(locality)
            return error_response(0 if allowed else _RC_LOCALITY)
        self._worker.sendall(command)
        head = 4 if prefixed else 0
        answer = b""
        while len(answer) < head + HEADER_SIZE or len(answer) < 2 * head + HEADER.unpack_from(answer, head)[1]:
            part = self._worker.recv(2 * MAX_COMMAND_SIZE)
            if not part:
                raise EngineError("WORKER_GONE", "the TPM's process has ended")
            answer += part
        return answer


@contextlib.contextmanager
def _dead() -> Iterator[socket.socket]:
    """A connection whose client is gone already."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        yield theirs
