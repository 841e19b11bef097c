"""Descriptors that travel with a message over a unix socket (SCM_RIGHTS, unix(7))."""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Final

# The most that the kernel takes with one message (SCM_MAX_FD).
MOST_DESCRIPTORS: Final = 253
_PATIENCE_S: Final = 0.001


def receive(sock: socket.socket, size: int, *, most: int = MOST_DESCRIPTORS, flags: int = 0) -> tuple[bytes, list[int]]:
    """Read at most `size` bytes and the descriptors that came along; the caller owns those.

    Raises:
        OSError: as recvmsg(2).
    """
    fds = array.array("i")
    data, ancillary, _flags, _address = sock.recvmsg(size, socket.CMSG_SPACE(most * fds.itemsize), flags)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


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
