"""Listening sockets by the thousand, in one poll set: an instance costs the daemon a descriptor and little more."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vtpm.errors import UnavailableError
from vtpm.wire.listening import QuietLog

_BACKLOG: Final = 128
_MAX_EVENTS: Final = 64
_OUT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
_RETRY_S: Final = 1.0

OnConnection = Callable[[socket.socket], None]


class Doors:
    """Calls back with each connection that comes to one of its listeners. Used from the event loop only."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._doors: dict[int, tuple[socket.socket, OnConnection]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._quiet = QuietLog()

    def add(self, listener: socket.socket, on_connection: OnConnection) -> None:
        """Take connections of `listener`, which becomes this object's, until `remove`."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self._serve)
        listener.setblocking(False)
        self._doors[listener.fileno()] = listener, on_connection
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def remove(self, listener: socket.socket) -> None:
        """Close a listener."""
        if self._doors.pop(listener.fileno(), None) is not None:
            self._epoll.unregister(listener.fileno())
        listener.close()

    def pause(self, listener: socket.socket, seconds: float) -> None:
        """Leave what comes to `listener` in its backlog for a while."""
        fd = listener.fileno()
        if fd in self._doors:
            self._epoll.modify(fd, 0)
            asyncio.get_running_loop().call_later(seconds, self._resume, fd, listener)

    def close(self) -> None:
        """Close all of them."""
        if self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._loop = None
        for listener, _ in self._doors.values():
            listener.close()
        self._doors.clear()
        self._epoll.close()

    def _serve(self) -> None:
        for fd, _event in self._epoll.poll(0, _MAX_EVENTS):
            door = self._doors.get(fd)
            if door is None:
                continue
            listener, on_connection = door
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                self._quiet.warning("wire.accept_failed", error.errno, error=error.strerror)
                if error.errno in _OUT_OF_DESCRIPTORS:
                    # The connection would make this listener readable again at once, and for ever.
                    self.pause(listener, _RETRY_S)
                continue
            on_connection(connection)

    def _resume(self, fd: int, listener: socket.socket) -> None:
        door = self._doors.get(fd)
        if door is not None and door[0] is listener:
            self._epoll.modify(fd, select.EPOLLIN)


def listen_at(path: Path) -> socket.socket:
    """Listen on the unix socket `path`, 0600; whatever socket is there is replaced as one step.

    Raises:
        UnavailableError: SOCKET_FAILED.
    """
    bound = path.with_name(f".{path.name[:3]}d")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        bound.unlink(missing_ok=True)
        listener.bind(str(bound))
        listener.listen(_BACKLOG)
        bound.rename(path)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            "SOCKET_FAILED",
            f"the socket can't be made: {error.strerror}",
            subject=str(path),
            remedy="check the directory's owner, mode and free space, and the limit of open files",
        ) from error
    finally:
        os.umask(previous)
    return listener
