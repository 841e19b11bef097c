"""The mssim protocol as a server: the two TCP ports of a TPM simulator, for an instance that the operator gives them to.

Spoken by IBM's TSS and by tpm2-tss' `mssim` TCTI. There is no authentication in it: who reaches the ports has the TPM at every
locality, and its power switch. What it can't do here (cancel, physical presence, NV and key cache switches, failure mode) is
acknowledged and has no effect, as clients send some of it always.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final, Protocol

import structlog

from vtpm.errors import ConfigError, VtpmError
from vtpm.store.model import InstanceRecord
from vtpm.tpm.command import error_response
from vtpm.tpm.ptm import ControlCommand
from vtpm.wire.listening import QuietLog, accept_forever
from vtpm.wire.mssim_protocol import U32, Code, Port, Request, RequestReader

log: Final = structlog.get_logger("vtpm.wire")

_DONE: Final = U32.pack(0)
_REFUSED: Final = U32.pack(1)
# Protocol version 1; tpmPlatformAvailable and tpmInRawMode (no resource manager in between), not tpmSupportsPP.
_HANDSHAKE: Final = struct.pack(">III", 1, 0x01 | 0x04, 0)
_MAX_LOCALITY: Final = 4
_TPM_RC_LOCALITY: Final = 0x907
_REQUEST_TIMEOUT_S: Final = 10.0
_SEND_TIMEOUT_S: Final = 10.0
_MAX_CONNECTIONS: Final = 16
_RECEIVE_SIZE: Final = 8192
_BACKLOG: Final = 16


_HASH_COMMANDS: Final = {
    Code.HASH_START: ControlCommand.HASH_START,
    Code.HASH_DATA: ControlCommand.HASH_DATA,
    Code.HASH_END: ControlCommand.HASH_END,
}


class MssimInstances(Protocol):
    """What the ports need of vtpm.instance.manager.InstanceManager."""

    async def get(self, ref: str) -> InstanceRecord:
        """Return one instance by id or name."""

    async def execute(self, ref: str, command: bytes, locality: int) -> bytes:
        """Run one raw command."""

    async def hash_sequence(self, ref: str, command: ControlCommand, data: bytes) -> None:
        """A part of an H-CRTM event."""

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """Power on."""

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        """Power off."""

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """_TPM_Init."""


class MssimServers:
    """Serves the port pairs of `ports`, instance name or id to command port, on one address."""

    def __init__(self, instances: MssimInstances, address: str, ports: Mapping[str, int]) -> None:
        self._instances = instances
        self._address = address
        self._ports = dict(ports)
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._quiet = QuietLog()

    def start(self) -> None:
        """Listen on every port, whether its instance exists yet or not.

        Raises:
            ConfigError: MSSIM_PORT_UNUSABLE; nothing listens then.
        """
        bound: list[tuple[socket.socket, str, Port]] = []
        try:
            for ref, number in self._ports.items():
                for port, offset in ((Port.COMMAND, 0), (Port.PLATFORM, 1)):
                    bound.append((_listen(self._address, number + offset, ref), ref, port))
        except ConfigError:
            for listener, _, _ in bound:
                listener.close()
            raise
        loop = asyncio.get_running_loop()
        for listener, ref, port in bound:
            self._listeners.append(listener)
            self._accepting.append(loop.create_task(self._accept(listener, ref, port)))
        for ref, number in self._ports.items():
            log.info("mssim.listening", address=self._address, command_port=number, platform_port=number + 1, name=ref)
        if self._ports and not ipaddress.ip_address(self._address).is_loopback:
            log.warning(
                "mssim.open_to_network", address=self._address, remedy="the protocol has no authentication: firewall it"
            )

    async def close(self, grace_s: float) -> None:
        """Stop serving; requests that run have `grace_s` to be answered."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        tasks = list(self._connections.values())
        for connection, task in list(self._connections.items()):
            connection.last = True
            if not connection.busy:
                task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket, ref: str, port: Port) -> None:
        def handle(sock: socket.socket, peer: Any) -> None:
            if sum(1 for other in self._connections if other.ref == ref and other.port is port) >= _MAX_CONNECTIONS:
                self._quiet.warning("mssim.too_many_connections", (ref, port), name=ref, port=port.value)
                sock.close()
                return
            connection = _Connection(self._instances, sock, f"{peer[0]}:{peer[1]}", ref, port, self._quiet)
            task = asyncio.get_running_loop().create_task(connection.serve())
            self._connections[connection] = task
            task.add_done_callback(lambda _: self._connections.pop(connection, None))

        await accept_forever(listener, handle)


def _listen(address: str, number: int, ref: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, number), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            "MSSIM_PORT_UNUSABLE",
            f"mssim_ports: can't listen on {address} port {number}: {os.strerror(error.errno or 0)}",
            subject=ref,
            remedy="give it another pair of free ports in mssim_ports, or correct mssim_address",
        ) from error


class _Connection:
    """One client of one port: one request at a time, in order."""

    def __init__(
        self, instances: MssimInstances, sock: socket.socket, peer: str, ref: str, port: Port, quiet: QuietLog
    ) -> None:
        self.ref = ref
        self.port = port
        # While `busy` a request runs that should be finished; `last` ends the connection behind it.
        self.busy = False
        self.last = False
        self._instances = instances
        self._sock = sock
        self._peer = peer
        self._quiet = quiet
        self._id = ""

    async def serve(self) -> None:
        """Serve until either side has had enough; closes the socket."""
        with self._sock as sock:
            try:
                self._id = str((await self._instances.get(self.ref)).id)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                await self._talk(RequestReader(self.port))
            except VtpmError as error:
                self._refuse(error.reason)
            except (OSError, TimeoutError) as error:
                log.debug("mssim.connection_ended", name=self.ref, port=self.port.value, error=type(error).__name__)

    def _refuse(self, reason: str) -> None:
        fields = {"name": self.ref, "port": self.port.value, "peer": self._peer, "reason": reason}
        self._quiet.warning("mssim.connection_refused", (self.ref, self.port, reason), **fields)

    async def _talk(self, reader: RequestReader) -> None:
        loop = asyncio.get_running_loop()
        while not self.last:
            deadline = loop.time() + _REQUEST_TIMEOUT_S
            while (request := await self._take(reader)) is None:
                # A client may be silent for as long as it likes, but not in the middle of a request.
                async with asyncio.timeout_at(deadline if reader.partial else None):
                    data = await loop.sock_recv(self._sock, _RECEIVE_SIZE)
                if not data:
                    return
                if not reader.partial:
                    deadline = loop.time() + _REQUEST_TIMEOUT_S
                # Clients send a request in pieces and wait for the acknowledgement of each, which would be delayed.
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                reader.feed(data)
            self.busy = True
            answer = await self._answer(request)
            if answer is None:
                return
            await self._send(answer)
            self.busy = False

    async def _take(self, reader: RequestReader) -> Request | None:
        try:
            return reader.take()
        except VtpmError:
            if self.port is Port.PLATFORM:
                await self._send(_REFUSED)
            raise

    async def _send(self, data: bytes) -> None:
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def _answer(self, request: Request) -> bytes | None:
        """Do what is asked; None closes the connection."""
        match request.code:
            case Code.SEND_COMMAND:
                response = await self._run(request)
                return response if request.raw else U32.pack(len(response)) + response + _DONE
            case Code.REMOTE_HANDSHAKE:
                # A client of version 0 is turned away.
                return _HANDSHAKE if any(request.body) else None
            case Code.SESSION_END | Code.STOP:
                # The simulator would exit at STOP, without a word; here it is not the client who decides that.
                return None
            case Code.HASH_START | Code.HASH_DATA | Code.HASH_END:
                return await self._hash(request)
            case Code.POWER_ON | Code.POWER_OFF | Code.RESET:
                return await self._signal(request.code)
            case _:
                return _DONE

    async def _run(self, request: Request) -> bytes:
        # Where the reference answers nothing at all without power (INSTANCE_NOT_ON), the connection is closed: IBM's TSS
        # would wait for ever for the rest of an empty response.
        if request.locality > _MAX_LOCALITY:
            return error_response(_TPM_RC_LOCALITY)
        return await self._instances.execute(self._id, request.body, request.locality)

    async def _hash(self, request: Request) -> bytes | None:
        await self._instances.hash_sequence(self._id, _HASH_COMMANDS[request.code], request.body)
        return _DONE

    async def _signal(self, code: Code) -> bytes:
        try:
            match code:
                case Code.POWER_ON:
                    # Clients send this whenever they connect. So it is not what takes a FAILED instance back (invariant 2).
                    await self._instances.start(self._id, startup_clear=False, revision=None)
                case Code.POWER_OFF:
                    await self._instances.stop(self._id, revision=None)
                case Code.RESET:
                    await self._instances.reset(self._id, startup_clear=False, revision=None)
        except VtpmError as error:
            if error.reason == "INSTANCE_OFF":
                # As the reference does: a reset without power is nothing.
                return _DONE
            log.warning("mssim.signal_failed", name=self.ref, signal=code.name, reason=error.reason, remedy=error.remedy)
            return _REFUSED
        # Not each POWER_ON of a client that means nothing by it; a start that was one is logged where it happens.
        report = log.debug if code is Code.POWER_ON else log.info
        report("mssim.signal", name=self.ref, instance=self._id, signal=code.name, peer=self._peer)
        return _DONE
