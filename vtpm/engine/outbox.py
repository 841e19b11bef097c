"""What the engine host has to tell the daemon: sent at once, or kept until the daemon reads, so that nobody waits for it."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from vtpm.engine import descriptors

# A wake is some 60 bytes, and an instance wakes once until it is served: room for more instances than a host has.
MAX_WAITING_BYTES: Final = 16 << 20
# Copies that wait with messages; what the daemon does not read in time goes without.
_MAX_WAITING_COPIES: Final = 1024


class UnreadError(Exception):
    """The daemon has not read for so long that it must be a new one's turn."""


class Outbox:
    """Messages for one daemon, in their order. `sock` is its SOCK_SEQPACKET socket, and does not block.

    `waiting` tells whether something is left to send, and `crowded` that only time helps, as too many descriptors are on
    their way (ETOOMANYREFS); otherwise `sock` becomes writable when there is room.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._bytes = 0
        self._copies = 0
        self.crowded = False

    @property
    def waiting(self) -> bool:
        """Whether something is left to send."""
        return bool(self._waiting)

    def send(self, message: bytes, fds: Sequence[int] = (), *, optional: bool = False) -> None:
        """Send a message with copies of descriptors, which stay the caller's; without them if need be and they are `optional`.

        Raises:
            OSError: the daemon is gone.
            UnreadError: too much waits for it.
        """
        if not self._waiting:
            try:
                descriptors.send_at_once(self._sock, [message], fds)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                if optional:
                    return self.send(message)
                self.crowded = True
            else:
                return None
        return self._put_off(message, fds, optional=optional)

    def _put_off(self, message: bytes, fds: Sequence[int], *, optional: bool) -> None:
        if optional and self._copies + len(fds) > _MAX_WAITING_COPIES:
            fds = ()
        self._bytes += len(message)
        if self._bytes > MAX_WAITING_BYTES:
            raise UnreadError
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            descriptors.close_all(copies)
            if not optional:
                raise
            copies = []
        self._copies += len(copies)
        self._waiting.append((message, copies))

    def flush(self) -> None:
        """Send what waits, as much as the daemon has room for.

        Raises:
            OSError: the daemon is gone.
        """
        self.crowded = False
        while self._waiting:
            message, copies = self._waiting[0]
            try:
                descriptors.send_at_once(self._sock, [message], copies)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                self.crowded = True
                return
            self._waiting.popleft()
            self._bytes -= len(message)
            self._copies -= len(copies)
            descriptors.close_all(copies)

    def close(self) -> None:
        """Forget what waits."""
        for _, copies in self._waiting:
            descriptors.close_all(copies)
        self._waiting.clear()
