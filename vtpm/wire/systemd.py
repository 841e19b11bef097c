"""What systemd gives a service, and hears from it: descriptors (sd_listen_fds(3)) and messages (sd_notify(3)).

With the operators' socket held by systemd (vtpm.socket), a call that is made while the daemon restarts waits in the socket's
backlog for the next daemon. gRPC can't listen on a descriptor, so what is accepted here is carried to the API's own socket; the
bytes are not looked at. The permissions of the socket's file are the gate, as without systemd.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from vtpm.engine.copy_names import PREFIX
from vtpm.errors import ConfigError
from vtpm.wire.fdstore import notify_address
from vtpm.wire.listening import accept_forever
from vtpm.wire.relay import carry_both_ways

log: Final = structlog.get_logger("vtpm.wire")

_FIRST_FD: Final = 3
# What the store gives back under other names than ours would be "stored".
_STORED: Final = (PREFIX, "stored")
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_MAX_CONNECTIONS: Final = 1024


@dataclass(slots=True)
class Inherited:
    """What this process was started with: the operators' socket, and named descriptors that came back from the store."""

    listener: socket.socket | None = None
    stored: list[tuple[str, int]] = field(default_factory=list)


def inherited(environment: MutableMapping[str, str]) -> Inherited:
    """Return what this process was started with; what says so is taken out of `environment`.

    Raises:
        ConfigError: ACTIVATION_UNUSABLE, what is not from the store is not one listening unix stream socket.
    """
    pid, count, names = (environment.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return Inherited()
    found = Inherited()
    activated = []
    # A service manager that gives no names has no store.
    named = itertools.chain(names.split(":"), itertools.repeat(""))
    for fd, name in zip(range(_FIRST_FD, _FIRST_FD + int(count)), named, strict=False):
        if name.startswith(_STORED):
            os.set_inheritable(fd, False)
            found.stored.append((name, fd))
        else:
            activated.append(fd)
    if activated:
        found.listener = _listener(activated)
    return found


def _listener(fds: list[int]) -> socket.socket:
    try:
        if len(fds) != 1:
            raise OSError
        listener = socket.socket(fileno=fds[0])
        if (
            listener.family != socket.AF_UNIX
            or listener.type != socket.SOCK_STREAM
            or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            listener.detach()
            raise OSError
    except OSError:
        raise ConfigError(
            "ACTIVATION_UNUSABLE",
            f"{len(fds)} sockets were given, and only one listening unix stream socket is taken",
            subject="systemd socket activation",
            remedy="one ListenStream= in vtpm.socket, the path of operator.sock",
        ) from None
    listener.setblocking(False)
    os.set_inheritable(listener.fileno(), False)
    return listener


def notify(message: str) -> None:
    """Tell the service manager, if there is one that listens; nothing depends on its being told."""
    address = notify_address(os.environ)
    if address is None:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address)


class ActivatedListener:
    """Carries what connects to `listener` to the unix socket `target`, from `start` until `close`."""

    def __init__(self, listener: socket.socket, target: Path) -> None:
        self._listener = listener
        self._target = target
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Accept what has been waiting, and what comes."""
        self._accepting = asyncio.get_running_loop().create_task(accept_forever(self._listener, self._handle))
        log.info("activation.listening", socket=str(self._listener.getsockname()))

    def _handle(self, connection: socket.socket, _peer: Any) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._carry(connection))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _carry(self, connection: socket.socket) -> None:
        with connection, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(server, str(self._target))
                await carry_both_ways(connection, server)
            except (OSError, TimeoutError) as error:
                log.debug("activation.connection_ended", error=type(error).__name__)

    async def stop_accepting(self) -> None:
        """Leave new connections to the next daemon."""
        task, self._accepting = self._accepting, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Cut what is open and let go of the listener, which systemd keeps."""
        await self.stop_accepting()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
