"""The loop of a TPM that runs alone: its listeners, its one control client, its one data client."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.cli.dropin_addresses import Address
from vtpm.cli.dropin_control import Control, Tpm
from vtpm.cli.dropin_data import DataChannel, RelayedData
from vtpm.cli.dropin_device import Device, is_stream_socket
from vtpm.cli.dropin_fields import refused
from vtpm.cli.dropin_options import Options
from vtpm.errors import EngineError
from vtpm.files import Directory
from vtpm.tpm.ptm import CODE, ControlCommand, ControlReader, Result

_CHECK_S: Final = 5.0
_SEND_TIMEOUT_S: Final = 5.0
_MAX_DESCRIPTORS: Final = 4


class Listener:
    """A socket that clients connect to; unlinked at the end if it was made here."""

    def __init__(self, address: Address) -> None:
        # Where it was made here: the directory, the name in it, and a descriptor of the socket's file.
        self._made: tuple[Directory, str, int] | None = None
        if address.fd >= 0:
            self.socket = socket.socket(fileno=address.fd)
        elif address.path:
            self.socket, self._made = _bind_path(address)
        else:
            self.socket = _bind_port(address)
        if not self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.socket.listen(1)
        self.socket.setblocking(False)

    def accept(self) -> socket.socket | None:
        """Return a client, if there is one."""
        try:
            connection, _ = self.socket.accept()
        except OSError:
            return None
        if connection.family != socket.AF_UNIX:
            # A command and its response are one small message each.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)
        return connection

    def close(self) -> None:
        """Listen no longer."""
        self.socket.close()
        if self._made is not None:
            directory, name, fd = self._made
            with contextlib.suppress(OSError):
                directory.remove(name, fd)


def _bind_path(address: Address) -> tuple[socket.socket, tuple[Directory, str, int]]:
    """Bind, set mode and owner and listen before the name is there: whoever waits for it can connect at once."""
    try:
        path = Path(address.path)
        directory, name = files.open_directory(path.parent), path.name
        listener, fd = _bind_in(directory, name, address)
    except OSError as error:
        raise refused(f"Could not open UnixIO socket {address.path}: {error.strerror or error}") from None
    return listener, (directory, name, fd)


def _bind_in(directory: Directory, name: str, address: Address) -> tuple[socket.socket, int]:
    old = directory.status(name)
    if old is not None and (stat.S_ISCHR(old.st_mode) or stat.S_ISBLK(old.st_mode)):
        raise OSError(errno.EEXIST, "it is a device, and is left as it is", directory.path(name))
    hidden = f".{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            # Through the descriptor, so that the directory can't be another one meanwhile.
            listener.bind(directory.reach(hidden))
        finally:
            os.umask(before)
        fd = directory.give_socket(hidden, address.mode, uid=address.uid, gid=address.gid)
        listener.listen(1)
        # Also over what is left of one that was killed.
        os.rename(hidden, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    except BaseException:
        listener.close()
        directory.unlink(hidden)
        raise
    return listener, fd


def _bind_port(address: Address) -> socket.socket:
    try:
        infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, proto, _, where = infos[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        raise refused(f"Could not open TCP socket {address.host}:{address.port}: {error.strerror or error}") from None
    return listener


class Server:
    """Serves until the VM's end, the worker's end or a signal."""

    def __init__(
        self, options: Options, tpm: Tpm, control: Control, device: int = -1, *, finish: Callable[[], bool] = lambda: True
    ) -> None:
        self._options = options
        # Ends all of the run but this process; False if something could not be kept.
        self._finish = finish
        # Of the form `chardev`.
        self._device = device
        self._tpm = tpm
        self._control = control
        self._running = True
        self._poller = select.epoll()
        self._client: socket.socket | None = None
        self._reader = ControlReader()
        self._descriptors: list[int] = []
        self._handlers: dict[int, Callable[[], None]] = {tpm.pidfd: self.end}
        self._poller.register(tpm.pidfd, select.EPOLLIN)
        disconnect = options.server is not None and options.server.disconnect
        on_end = self._on_data_end
        relayed = device >= 0 and not is_stream_socket(device)
        if options.allow_set_locality or disconnect or relayed:
            self._data: DataChannel = RelayedData(
                control, self._poller, on_end, set_locality=options.allow_set_locality, disconnect=disconnect
            )
        else:
            self._data = DataChannel(control, self._poller, on_end)
        control.data = self._data
        self._control_listener: Listener | None = None
        self._data_listener: Listener | None = None

    def listen(self) -> None:
        """Open the sockets; from now on clients may connect."""
        # The control channel last: most callers wait for it.
        if self._device >= 0:
            self._data.take(socket.socket(fileno=self._device) if is_stream_socket(self._device) else Device(self._device))
        elif self._options.server is not None:
            if self._options.server.fd >= 0 and not self._options.server.listening:
                self._data.take(socket.socket(fileno=self._options.server.fd))
            else:
                self._data_listener = Listener(self._options.server)
        if self._options.control is not None:
            if self._options.control.client_fd >= 0:
                self._open_control(socket.socket(fileno=self._options.control.client_fd))
            else:
                self._control_listener = Listener(self._options.control)

    def end(self) -> None:
        """End the loop."""
        self._running = False

    def run(self) -> None:
        """Serve."""
        wake, wake_end = socket.socketpair()
        for sock in (wake, wake_end):
            sock.setblocking(False)
        signal.set_wakeup_fd(wake_end.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: self.end())
        self._handlers[wake.fileno()] = lambda: None
        self._poller.register(wake.fileno(), select.EPOLLIN)
        try:
            while self._running and not self._control.ended:
                self._turn()
        except EngineError:
            # The worker's exit status says more.
            return

    def _turn(self) -> None:
        # Each listener is looked at only while its client's place is free: the others wait in its queue, as with swtpm.
        waiting = [
            (listener, take)
            for listener, free, take in (
                (self._control_listener, self._client is None, self._open_control),
                (self._data_listener, self._data.client_fd < 0, self._open_data),
            )
            if listener is not None and free
        ]
        for listener, _ in waiting:
            self._poller.register(listener.socket.fileno(), select.EPOLLIN)
        try:
            events = self._poller.poll(_CHECK_S if self._data.client_fd >= 0 else None)
        finally:
            for listener, _ in waiting:
                self._poller.unregister(listener.socket.fileno())
        if not events:
            self._data.check()
        ready = {fd for fd, _ in events}
        for fd in ready & set(self._handlers):
            self._handlers[fd]()
        if self._data.client_fd in ready:
            self._data.on_event()
        for listener, take in waiting:
            if self._running and listener.socket.fileno() in ready and (connection := listener.accept()) is not None:
                take(connection)

    def close(self) -> None:
        """Close the listeners."""
        for listener in (self._control_listener, self._data_listener):
            if listener is not None:
                listener.close()

    # ---- data ------------------------------------------------------------------------------------------------------------

    def _open_data(self, connection: socket.socket) -> None:
        if not self._data.take(connection):
            connection.close()

    def _on_data_end(self) -> None:
        if self._options.terminate:
            self.end()

    # ---- control ---------------------------------------------------------------------------------------------------------

    def _open_control(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_TIMEOUT_S)
        self._client, self._reader = connection, ControlReader()
        self._handlers[connection.fileno()] = self._on_control
        self._poller.register(connection.fileno(), select.EPOLLIN)

    def _on_control(self) -> None:
        assert self._client is not None
        fds = array.array("i")
        try:
            data, ancillary, _flags, _address = self._client.recvmsg(65536, socket.CMSG_SPACE(_MAX_DESCRIPTORS * fds.itemsize))
        except OSError:
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        self._descriptors.extend(fds)
        if not data or not self._serve(data):
            self._close_control()

    def _serve(self, data: bytes) -> bool:
        """Answer what is whole; False if the connection is over."""
        assert self._client is not None
        try:
            for command, payload in self._reader.feed(data):
                try:
                    self._client.sendall(self._answer(command, payload))
                finally:
                    # They belong to the request that they came with.
                    self._drop_descriptors()
            if self._reader.broken:
                self._client.sendall(CODE.pack(Result.BAD_ORDINAL))
        except OSError:
            return False
        return not self._reader.broken

    def _answer(self, command: ControlCommand, payload: bytes) -> bytes:
        try:
            answer = self._control.answer(command, payload, self._descriptors)
            if command is ControlCommand.SHUTDOWN:
                # Before the answer: who reads it may start the next one at once, on the same state and with the same files.
                self.end()
                if not self._finish():
                    return CODE.pack(Result.FAIL)
            return answer
        except EngineError:
            # The last answer there is: nobody waits for one that never comes.
            self.end()
            return CODE.pack(Result.FAIL)

    def _drop_descriptors(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()

    def _close_control(self) -> None:
        assert self._client is not None
        del self._handlers[self._client.fileno()]
        self._poller.unregister(self._client.fileno())
        self._client.close()
        self._client = None
        self._drop_descriptors()
        if self._options.control is not None and self._options.control.terminate:
            self.end()
