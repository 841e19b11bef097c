"""The control channel of the swtpm socket protocol, as the tpm2-tss `swtpm` TCTI uses it (swtpm_ioctls(3)).

The TCTI connects to the data socket, which the worker serves, and to its `.ctrl` twin for one request at a time. Served here:
GET_CAPABILITY, SET_LOCALITY, GET_TPMESTABLISHED, CMD_INIT (a reset). Everything else is answered TPM_BAD_ORDINAL.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
import uuid
from typing import Final, Protocol

import structlog

from vtpm.errors import VtpmError
from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord, InstanceState

log: Final = structlog.get_logger("vtpm.wire")


class ControlCommand(enum.IntEnum):
    """Command codes of `tpm_ioctl.h`."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    GET_TPMESTABLISHED = 0x04
    SET_LOCALITY = 0x05


_CODE: Final = struct.Struct(">I")
_TPM_SUCCESS: Final = 0
_TPM_BAD_ORDINAL: Final = 0x0A
_TPM_FAIL: Final = 0x09
_TPM_BAD_LOCALITY: Final = 0x3D
# PTM_CAP_INIT, GET_TPMESTABLISHED, SET_LOCALITY (bits 0, 2, 3 of tpm_ioctl.h).
_CAPABILITIES: Final = 0x1 | 0x4 | 0x8
_MAX_LOCALITY: Final = 4
_IDLE_TIMEOUT_S: Final = 30.0
_MAX_REQUEST_SIZE: Final = 64
_MAX_CONNECTIONS: Final = 16
# Request payloads; the byte of SET_LOCALITY may be followed by three bytes of padding.
_PAYLOAD_SIZES: Final = {ControlCommand.INIT: 4, ControlCommand.SET_LOCALITY: 1}


class ControlPort(Protocol):
    """What the control channel needs of vtpm.instance.manager.InstanceManager."""

    def control_listener(self, record: InstanceRecord) -> socket.socket | None:
        """The listening control socket."""

    async def set_locality(self, ref: str, locality: int) -> None:
        """Set the locality of the VM's data channel."""

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """_TPM_Init."""


class ControlServers:
    """Serves the control socket of every instance that is ON; follows the manager's changes."""

    def __init__(self, manager: ControlPort) -> None:
        self._manager = manager
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}

    def on_change(self, change: InstanceChange) -> None:
        """Begin or end serving an instance; for InstanceManager.subscribe."""
        record = change.record
        if record is None:
            return
        listener = self._manager.control_listener(record) if record.state is InstanceState.ON else None
        task = self._tasks.get(record.id)
        if listener is None:
            if task is not None:
                task.cancel()
        elif task is None or task.done():
            task = asyncio.get_running_loop().create_task(self._serve(record, listener))
            self._tasks[record.id] = task
            task.add_done_callback(lambda done: self._forget(record.id, done))

    def _forget(self, instance: uuid.UUID, task: asyncio.Task[None]) -> None:
        if self._tasks.get(instance) is task:
            del self._tasks[instance]

    async def close(self) -> None:
        """Stop serving; the listeners stay open with the engine host."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, record: InstanceRecord, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        connections: set[asyncio.Task[None]] = set()
        try:
            while True:
                connection, _ = await loop.sock_accept(listener)
                if len(connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                task = loop.create_task(self._talk(record, connection))
                connections.add(task)
                task.add_done_callback(connections.discard)
        except OSError as error:
            # The listener closes when its instance goes off; anything else deserves a line.
            log.debug("wire.control_listener_closed", instance=str(record.id), error=error.strerror)
        finally:
            for task in connections:
                task.cancel()

    async def _talk(self, record: InstanceRecord, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        reader = ControlReader()
        with connection:
            try:
                while data := await asyncio.wait_for(loop.sock_recv(connection, _MAX_REQUEST_SIZE), _IDLE_TIMEOUT_S):
                    for command, payload in reader.feed(data):
                        await loop.sock_sendall(connection, await self._answer(record, command, payload))
                    if reader.broken:
                        await loop.sock_sendall(connection, _CODE.pack(_TPM_BAD_ORDINAL))
                        return
            except (OSError, TimeoutError) as error:
                log.debug("wire.control_connection_ended", instance=str(record.id), error=type(error).__name__)

    async def _answer(self, record: InstanceRecord, command: ControlCommand, payload: bytes) -> bytes:
        try:
            match command:
                case ControlCommand.GET_CAPABILITY:
                    return struct.pack(">Q", _CAPABILITIES)
                case ControlCommand.GET_TPMESTABLISHED:
                    return _CODE.pack(_TPM_SUCCESS) + bytes(4)
                case ControlCommand.SET_LOCALITY:
                    if payload[0] > _MAX_LOCALITY:
                        return _CODE.pack(_TPM_BAD_LOCALITY)
                    await self._manager.set_locality(str(record.id), payload[0])
                case ControlCommand.INIT:
                    await self._manager.reset(str(record.id), startup_clear=False, revision=None)
        except VtpmError as error:
            log.warning("wire.control_command_failed", instance=str(record.id), command=command.name, reason=error.reason)
            return _CODE.pack(_TPM_FAIL)
        return _CODE.pack(_TPM_SUCCESS)


class ControlReader:
    """Takes bytes as they come and gives whole requests. `broken` says that a code was unknown and framing is lost.

    tpm2-tss sends SET_LOCALITY as code and one byte, QEMU pads that byte to four with zeros (`tpm_ioctl.h`). Every code begins
    with three zero bytes and none with four, so that padding can be told from the next request however the bytes come.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._padding = 0
        self.broken = False

    def feed(self, data: bytes) -> list[tuple[ControlCommand, bytes]]:
        """Add `data`; return the requests that are now whole, as (command, payload)."""
        buffer = self._buffer
        buffer += data
        requests: list[tuple[ControlCommand, bytes]] = []
        while not self.broken:
            self._skip_padding()
            if len(buffer) < _CODE.size:
                break
            (code,) = _CODE.unpack_from(buffer)
            try:
                command = ControlCommand(code)
            except ValueError:
                self.broken = True
                break
            size = _CODE.size + _PAYLOAD_SIZES.get(command, 0)
            if len(buffer) < size:
                break
            requests.append((command, bytes(buffer[_CODE.size : size])))
            del buffer[:size]
            self._padding = 3 if command is ControlCommand.SET_LOCALITY else 0
        return requests

    def _skip_padding(self) -> None:
        """Drop the zeros that pad a one-byte payload, and not the zeros that begin the next code."""
        buffer = self._buffer
        if not self._padding or not buffer:
            return
        zeros = len(buffer) - len(buffer.lstrip(b"\0"))
        if zeros > self._padding:
            # A code begins with three zeros and no more.
            del buffer[: self._padding]
            self._padding = 0
        elif zeros < len(buffer):
            self._padding = 0
