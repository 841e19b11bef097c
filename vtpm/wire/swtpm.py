"""The control sockets of instances: a VMM that connects to one gets its instance powered on, and speaks to its worker.

The protocol itself is spoken by the worker (vtpm.engine.control), so that a daemon may come and go while a VM runs.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final, Protocol

import structlog

from vtpm.errors import VtpmError
from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord
from vtpm.wire.doors import Doors
from vtpm.wire.listening import QuietLog

log: Final = structlog.get_logger("vtpm.wire")

_MAX_ATTACHING: Final = 8


class VmPort(Protocol):
    """What this needs of vtpm.instance.manager.InstanceManager."""

    def all(self) -> AsyncIterator[InstanceRecord]:
        """Yield every instance."""

    def listen_for_vm(self, record: InstanceRecord) -> socket.socket:
        """Listen on the instance's control socket."""

    async def attach(self, ref: str, connection: socket.socket) -> None:
        """Give a VMM's control connection to the instance."""


class ControlSockets:
    """Listens on the control socket of every instance, whatever its state."""

    def __init__(self, manager: VmPort) -> None:
        self._manager = manager
        self._listeners: dict[uuid.UUID, socket.socket] = {}
        self._doors = Doors()
        self._tasks: set[asyncio.Task[None]] = set()
        self._attaching: Counter[uuid.UUID] = Counter()
        self._quiet = QuietLog()

    async def start(self) -> None:
        """Listen for what exists; `on_change` follows from then on."""
        async for record in self._manager.all():
            self._listen(record)

    def on_change(self, change: InstanceChange) -> None:
        """Begin or end listening; for InstanceManager.subscribe."""
        if change.record is None:
            return
        if change.kind == "CREATED":
            self._listen(change.record)
        elif change.kind == "DELETED":
            self._close(change.record.id)

    def _listen(self, record: InstanceRecord) -> None:
        if record.id in self._listeners:
            return
        try:
            listener = self._manager.listen_for_vm(record)
        except VtpmError as error:
            log.error("wire.control_socket_failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            return
        self._listeners[record.id] = listener
        self._doors.add(listener, functools.partial(self._on_connection, record.id))

    def _close(self, instance: uuid.UUID) -> None:
        listener = self._listeners.pop(instance, None)
        if listener is not None:
            self._doors.remove(listener)

    def _on_connection(self, instance: uuid.UUID, connection: socket.socket) -> None:
        # Each waits for the one before it. A VMM has one, and a second one when it starts anew.
        if self._attaching[instance] >= _MAX_ATTACHING:
            self._quiet.warning("wire.too_many_attaching", instance, instance=str(instance))
            connection.close()
            return
        self._attaching[instance] += 1
        task = asyncio.get_running_loop().create_task(self._attach(instance, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach(self, instance: uuid.UUID, connection: socket.socket) -> None:
        with connection:
            try:
                await self._manager.attach(str(instance), connection)
            except VtpmError as error:
                fields = {"instance": str(instance), "reason": error.reason, "remedy": error.remedy}
                self._quiet.warning("wire.attach_refused", (instance, error.reason), **fields)
            finally:
                self._attaching[instance] -= 1
                if not self._attaching[instance]:
                    del self._attaching[instance]

    async def close(self) -> None:
        """Stop listening; VMs that are attached run on."""
        for instance in list(self._listeners):
            self._close(instance)
        self._doors.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
