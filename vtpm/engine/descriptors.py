"""Descriptors that travel with a message over a unix socket (SCM_RIGHTS, unix(7))."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Final

# The most that the kernel takes with one message (SCM_MAX_FD).
MOST_DESCRIPTORS: Final = 253
_PATIENCE_S: Final = 0.001
# struct ucred: pid, uid, gid.
_CREDENTIALS: Final = struct.Struct("3i")


def receive(sock: socket.socket, size: int, *, most: int = MOST_DESCRIPTORS, flags: int = 0) -> tuple[bytes, list[int]]:
    """Read at most `size` bytes and the descriptors that came along; the caller owns those.

    Raises:
        OSError: as recvmsg(2).
    """
    data, fds, _pid = receive_from(sock, size, most=most, flags=flags)
    return data, fds


def receive_from(
    sock: socket.socket, size: int, *, most: int = MOST_DESCRIPTORS, flags: int = 0
) -> tuple[bytes, list[int], int]:
    """The same, with the process id of the sender if the socket has SO_PASSCRED; 0 without.

    Raises:
        OSError: as recvmsg(2).
    """
    fds, pid = array.array("i"), 0
    room = socket.CMSG_SPACE(most * fds.itemsize) + socket.CMSG_SPACE(_CREDENTIALS.size)
    data, ancillary, _flags, _address = sock.recvmsg(size, room, flags)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(payload)[0]
    return data, list(fds), pid


def send_at_once(sock: socket.socket, parts: Sequence[bytes], fds: Sequence[int] = ()) -> None:
    """Send a message of `parts` with descriptors, and wait for nobody.

    Raises:
        BlockingIOError: there is no room for it.
        OSError: as sendmsg(2).
    """
    # Not socket.send_fds, which takes flags and does not pass them on.
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg(parts, rights, socket.MSG_DONTWAIT)


def send_patiently(sock: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Send a message with descriptors, and wait while too many of this user's are on their way already (ETOOMANYREFS).

    Raises:
        OSError: as sendmsg(2), for any other reason.
    """
    while True:
        try:
            socket.send_fds(sock, [message], fds)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            time.sleep(_PATIENCE_S)
        else:
            return


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
