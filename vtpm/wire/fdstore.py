"""The service manager's descriptor store (sd_notify(3)): what is in it comes back to the next process of this service."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from vtpm.engine import descriptors

log: Final = structlog.get_logger("vtpm.wire")

# All names come back in one environment variable, LISTEN_FDNAMES. A process whose environment has a string above 128 KiB
# (MAX_ARG_STRLEN, execve(2)) can't be started at all, and systemd does not look.
MOST_NAMES_BYTES: Final = 120_000
_RETRY_S: Final = 0.01


def notify_address(environment: Mapping[str, str]) -> str | None:
    """Return the address of the service manager's socket, if it gave one."""
    path = environment.get("NOTIFY_SOCKET", "")
    if path.startswith("@"):
        return "\0" + path[1:]
    return path if path.startswith("/") else None


@dataclass(slots=True)
class _Message:
    text: bytes
    # Copies of its own, as its sender may close them before it is sent.
    fds: list[int] = field(default_factory=list)


class ServiceManagerStore:
    """Implements vtpm.engine.belt.DescriptorStore. Used from the event loop only.

    `held` are the names of what the store gave to this process, one for each descriptor; `most` is how many it takes.
    """

    def __init__(self, address: str, most: int, held: Sequence[str] = ()) -> None:
        self._address = address
        self._most = most
        # How many descriptors a name has; how many there are in all, and the size of their names with what separates them.
        self._held: dict[str, int] = {}
        self._count = self._size = 0
        for name in held:
            self._note(name)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._waiting: deque[_Message] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._full = False

    @classmethod
    def open(cls, environment: Mapping[str, str], held: Sequence[str] = ()) -> ServiceManagerStore | None:
        """Return the store that the service manager offers to this process, if it does."""
        address, most = notify_address(environment), environment.get("FDSTORE", "")
        if address is None or not most.isdecimal() or int(most) == 0:
            return None
        return cls(address, int(most), held)

    def put(self, named: Sequence[tuple[str, int]]) -> bool:
        """See DescriptorStore."""
        size = sum(len(name) + 1 for name, _ in named)
        if self._count + len(named) > self._most or self._size + size > MOST_NAMES_BYTES:
            if not self._full:
                log.warning("fdstore.full", descriptors=self._count, most=self._most, names_bytes=self._size)
            self._full = True
            return False
        self._full = False
        # A name holds for all descriptors of a message.
        groups: dict[str, list[int]] = {}
        for name, fd in named:
            groups.setdefault(name, []).append(fd)
            self._note(name)
        for name, fds in groups.items():
            # Without FDPOLL=0 the store would drop a connection whose peer has closed it, and with it the news of that.
            self._send(_Message(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}".encode(), fds))
        return True

    def remove(self, names: Collection[str]) -> None:
        """See DescriptorStore."""
        for name in names:
            fds = self._held.pop(name, 0)
            self._count -= fds
            self._size -= fds * (len(name) + 1)
            self._send(_Message(f"FDSTOREREMOVE=1\nFDNAME={name}".encode()))

    def _note(self, name: str) -> None:
        self._held[name] = self._held.get(name, 0) + 1
        self._count += 1
        self._size += len(name) + 1

    def _send(self, message: _Message) -> None:
        if self._waiting or not self._sent(message):
            copies: list[int] = []
            try:
                for fd in message.fds:
                    copies.append(os.dup(fd))
            except OSError as error:
                descriptors.close_all(copies)
                log.warning("fdstore.refused", message=message.text.decode().replace("\n", " "), error=error.strerror)
                return
            self._waiting.append(_Message(message.text, copies))
            self._again()

    def _again(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_RETRY_S, self._send_waiting)

    def _send_waiting(self) -> None:
        self._timer = None
        while self._waiting and self._sent(self._waiting[0]):
            descriptors.close_all(self._waiting.popleft().fds)
        if self._waiting:
            self._again()

    def _sent(self, message: _Message) -> bool:
        """Send a message; False if the service manager has to read others first."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))] if message.fds else []
        try:
            self._sock.sendmsg([message.text], ancillary, 0, self._address)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                return False
            log.warning("fdstore.refused", message=message.text.decode().replace("\n", " "), error=error.strerror)
        return True

    def close(self) -> None:
        """Send what waits, as far as it goes, and let go of the line to the service manager."""
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(OSError):
            self._sock.settimeout(1)
            while self._waiting:
                message = self._waiting.popleft()
                if not self._sent(message):
                    break
                descriptors.close_all(message.fds)
        self._sock.close()
