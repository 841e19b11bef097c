"""Who serves a unix socket, known before anything is sent to it.

A server is trusted if its user is root, this process's own user, or the user whom root gave the socket's directory (the
daemon's user and /run/vtpm); see `service` in vtpm.files. Every directory on the way is looked at, and then the kernel is asked
who listens (SO_PEERCRED: the user of the process that called listen(2); unix(7)).

gRPC connects by itself, in its own time and again and again, and takes no descriptor in Python. So that it can't be led to
another socket than the one that was looked at, it is given `/proc/self/fd/N`, where N holds the socket's inode (O_PATH): an
inode is bound once, so whoever connects to it reaches the server that was asked, or nobody. A server that starts anew makes
another inode; N then becomes that one, after it was asked too. A relay in this process would do as well, and carry every byte
twice.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from vtpm import files
from vtpm.errors import ErrorKind, VtpmError

# struct ucred: pid, uid, gid.
_UCRED: Final = struct.Struct("=iII")
_HOLD: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end of a connected unix socket."""
    return int(_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def connect(path: str | Path, *, timeout_s: float) -> socket.socket:
    """Return a connection to the unix socket `path`, on which nothing was sent yet.

    Raises:
        OSError: there is no such socket, or nobody answers.
        VtpmError: SERVER_NOT_TRUSTED, with the socket as subject.
    """
    fd = _hold(Path(path))
    try:
        return _ask(fd, Path(path), timeout_s)
    finally:
        os.close(fd)


class HeldSocket:
    """A name for a server's socket that stands for nobody else; `refresh` before it is used."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._held: tuple[int, int] | None = None
        # A number that is kept; nobody can connect to a directory.
        self._fd = os.open("/", os.O_PATH | os.O_CLOEXEC)

    @property
    def name(self) -> str:
        """The path to connect to, in this process."""
        return f"/proc/self/fd/{self._fd}"

    def refresh(self) -> None:
        """Look at the server that is there now, unless it is the one that was looked at.

        Raises:
            OSError, VtpmError: as `connect`.
        """
        status = self._path.stat()
        if (status.st_dev, status.st_ino) == self._held:
            return
        fd = _hold(self._path)
        try:
            _ask(fd, self._path, self._timeout_s).close()
            held = os.fstat(fd)
            os.dup2(fd, self._fd, inheritable=False)
            self._held = held.st_dev, held.st_ino
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def _hold(path: Path) -> int:
    """Return a descriptor of the socket's inode; a link to it is followed as directories' links are."""
    try:
        directory, name = files.parent_of(path, follow=True, trusted=True, service=True)
    except files.UnsafePathError as error:
        raise _refused(path, str(error.strerror), error.remedy) from None
    with directory:
        fd = os.open(name, _HOLD, dir_fd=directory.fd)
        owner = os.fstat(fd).st_uid
        if owner not in directory.owners:
            os.close(fd)
            raise _refused(path, f"the socket belongs to uid {owner}")
        return fd


def _ask(fd: int, path: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"/proc/self/fd/{fd}")
        # Whom the inode belongs to was looked at; root alone can give a socket of its own away.
        if (uid := peer_uid(connection)) not in (0, os.geteuid(), os.fstat(fd).st_uid):
            raise _refused(path, f"uid {uid} serves it")
    except BaseException:
        connection.close()
        raise
    return connection


def _refused(path: Path, why: str, remedy: str = "") -> VtpmError:
    return VtpmError(
        "SERVER_NOT_TRUSTED",
        f"somebody else may have made this socket, so nothing was sent to it: {why}",
        subject=str(path),
        remedy=remedy or "name the daemon's directory with --runtime-dir or VTPM_RUNTIME_DIR",
        kind=ErrorKind.PERMISSION_DENIED,
    )
