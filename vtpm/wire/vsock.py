"""The vsock relay: brings a VM's gRPC calls from AF_VSOCK, which gRPC's wheels can't listen on, to its instance's guest socket.

Which VM it is, the kernel says by the peer's CID; which instance is that VM's, the operator says (`vsock_cids`). The bytes are
not looked at. Everybody inside the VM who can open a vsock connection speaks to that VM's TPM, as on its guest socket: at
locality 0, and to no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from vtpm.errors import ConfigError, VtpmError
from vtpm.store.model import InstanceRecord, InstanceState
from vtpm.wire.listening import QuietLog, accept_forever

log: Final = structlog.get_logger("vtpm.wire")

# Read at once, and so all that one direction of a connection ever holds. A silent connection holds nothing.
_CHUNK_SIZE: Final = 64 << 10
_MAX_CONNECTIONS_PER_CID: Final = 16
# How long a peer may take no bytes that are there for it, and how long an answer may flow on after its request's end.
_STALL_TIMEOUT_S: Final = 120.0
_HALF_CLOSED_TIMEOUT_S: Final = 60.0
_BACKLOG: Final = 128


class RelayedInstances(Protocol):
    """What the relay needs of vtpm.instance.manager.InstanceManager."""

    async def get(self, ref: str) -> InstanceRecord:
        """Return one instance by id or name."""

    def guest_socket(self, record: InstanceRecord) -> Path:
        """The instance's gRPC socket, while it is ON."""


class Relay:
    """Carries the connections of peers to the instances in `assigned` (CID to instance name or id)."""

    def __init__(self, instances: RelayedInstances, assigned: Mapping[int, str]) -> None:
        self._instances = instances
        self._assigned = dict(assigned)
        self._open: Counter[int] = Counter()
        self._quiet = QuietLog()

    async def carry(self, connection: socket.socket, cid: int) -> None:
        """Carry bytes both ways until both ends are done; closes `connection`, a non-blocking stream of any family."""
        with connection:
            ref = self._assigned.get(cid)
            if ref is None:
                # One line for all of them: how many CIDs there are is not ours to bound.
                self._quiet.warning("vsock.cid_unknown", "", cid=cid, remedy="assign it an instance in vsock_cids")
                return
            if self._open[cid] >= _MAX_CONNECTIONS_PER_CID:
                self._quiet.warning("vsock.too_many_connections", cid, cid=cid, name=ref)
                return
            self._open[cid] += 1
            try:
                await self._connect(connection, cid, ref)
            except VtpmError as error:
                self._quiet.warning("vsock.no_instance", cid, cid=cid, name=ref, reason=error.reason)
            except (OSError, TimeoutError) as error:
                log.debug("vsock.connection_ended", cid=cid, name=ref, error=type(error).__name__)
            finally:
                self._open[cid] -= 1
                if not self._open[cid]:
                    del self._open[cid]

    async def _connect(self, connection: socket.socket, cid: int, ref: str) -> None:
        record = await self._instances.get(ref)
        if record.state is not InstanceState.ON:
            self._quiet.warning("vsock.instance_not_on", cid, cid=cid, name=record.name, state=record.state.value)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
            guest.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(guest, str(self._instances.guest_socket(record)))
            except OSError as error:
                self._quiet.warning("vsock.guest_socket_absent", cid, cid=cid, name=record.name, error=error.strerror)
                return
            log.debug("vsock.connected", cid=cid, instance=str(record.id))
            await carry_both_ways(connection, guest)


async def carry_both_ways(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two non-blocking stream sockets until both are done."""
    loop = asyncio.get_running_loop()
    ways = {loop.create_task(_carry_one_way(one, other)), loop.create_task(_carry_one_way(other, one))}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        # What is still under way in the other direction arrives: the last answers of a server that ends, for one.
        async with asyncio.timeout(_HALF_CLOSED_TIMEOUT_S):
            await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()
        # Neither socket may be closed while the loop still waits for it.
        await asyncio.gather(*ways, return_exceptions=True)


async def _carry_one_way(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(source, _CHUNK_SIZE):
            async with asyncio.timeout(_STALL_TIMEOUT_S):
                await loop.sock_sendall(sink, data)
    except TimeoutError:
        # Not an end like others, though it is an OSError too: a sink that takes nothing has the connection cut.
        raise
    except OSError:
        # An end that has gone ends this direction; that it is gone, the other direction finds out by itself.
        pass
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class VsockServer:
    """Listens on AF_VSOCK and hands what comes to a relay."""

    def __init__(self, relay: Relay, port: int) -> None:
        self._relay = relay
        self._port = port
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: VSOCK_UNSUPPORTED, VSOCK_PORT_UNUSABLE.
        """
        self._listener = listen(self._port)
        self._accepting = asyncio.get_running_loop().create_task(accept_forever(self._listener, self._handle))
        log.info("vsock.listening", port=self._port)

    def _handle(self, connection: socket.socket, peer: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._relay.carry(connection, peer[0]))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def close(self) -> None:
        """Stop listening and cut what is open; for after the drain, when the calls on them have ended."""
        tasks = list(self._connections)
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()


def listen(port: int) -> socket.socket:
    """Return a listener on `port` for every CID of this host.

    Raises:
        ConfigError: VSOCK_UNSUPPORTED, VSOCK_PORT_UNUSABLE.
    """
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except (OSError, AttributeError) as error:
        raise _unsupported(error) from error
    try:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EOPNOTSUPP):
            raise _unsupported(error) from error
        raise ConfigError(
            "VSOCK_PORT_UNUSABLE",
            f"vsock_port: can't listen on port {port}: {error.strerror}",
            subject="vsock_port",
            remedy="choose another vsock_port; below 1024 it takes CAP_NET_BIND_SERVICE",
        ) from error
    return listener


def _unsupported(error: Exception) -> ConfigError:
    return ConfigError(
        "VSOCK_UNSUPPORTED",
        f"vsock_port is set, and this host gives no AF_VSOCK listener: {getattr(error, 'strerror', '') or 'unknown to Python'}",
        subject="vsock_port",
        remedy="modprobe vhost_vsock; under systemd allow AF_VSOCK (RestrictAddressFamilies); or set vsock_port = 0",
    )
