"""The guest sockets: each instance that is ON has one, on which TpmService speaks for it alone, by a gRPC server of its own.

That makes the identity of the caller a matter of which server was called. A server costs some 40 KB and 0.4 ms, so it is made
when the first client comes and goes when the instance hibernates; until then a bare listener stands in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
import structlog

from vtpm.api.ports import Instances
from vtpm.api.sockets import serve_on
from vtpm.errors import VtpmError
from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord, InstanceState
from vtpm.wire.doors import Doors, listen_at
from vtpm.wire.relay import carry_both_ways

log: Final = structlog.get_logger("vtpm.api")

_RETRY_S: Final = 2.0
_SETTLE_TIMEOUT_S: Final = 5.0
# Calls that run when an instance hibernates have this long to end, before the server goes.
_RETIRE_GRACE_S: Final = 5.0
_MAX_WAITING: Final = 32

ServerFactory = Callable[[InstanceRecord], grpc.aio.Server]


@dataclass(slots=True)
class _Slot:
    """What an instance should have (`wanted`, None for nothing) and what it has: a door, and a server once somebody came."""

    wanted: InstanceRecord | None = None
    door: socket.socket | None = None
    server: grpc.aio.Server | None = None
    path: Path | None = None
    # Each power on makes the instance's directory anew, so what is there belongs to one epoch.
    epoch: int | None = None
    task: asyncio.Task[None] | None = None
    # Connections that came to the door, and what brings up the server for them.
    waiting: int = 0
    opening: asyncio.Future[Path] | None = None

    @property
    def settled(self) -> bool:
        return self.epoch == (self.wanted.epoch if self.wanted is not None else None)


class GuestServers:
    """Follows the changes of instances; `make` gives a server, bound to nothing yet, that speaks for one."""

    def __init__(self, instances: Instances, make: ServerFactory) -> None:
        self._instances = instances
        self._make = make
        self._slots: dict[uuid.UUID, _Slot] = {}
        self._doors = Doors()
        self._carrying: set[asyncio.Task[None]] = set()
        self._closing = False

    def follow(self) -> None:
        """Serve what is ON, now and from now on."""
        self._instances.subscribe(self._on_change)
        self._instances.subscribe_hibernation(self._on_hibernation)

    def _on_change(self, change: InstanceChange) -> None:
        record = change.record
        if record is None or self._closing:
            return
        serves = change.kind != "DELETED" and record.state is InstanceState.ON
        slot = self._slots.get(record.id)
        if slot is None:
            if not serves:
                return
            slot = self._slots[record.id] = _Slot()
        slot.wanted = record if serves else None
        if not slot.settled:
            self._work(record.id, slot)

    def _on_hibernation(self, instance: uuid.UUID) -> None:
        slot = self._slots.get(instance)
        if slot is not None and slot.server is not None and not self._closing:
            # As if it were for another epoch: the door comes back, and the server goes.
            slot.epoch = None
            self._work(instance, slot)

    def _work(self, instance: uuid.UUID, slot: _Slot) -> None:
        if slot.task is None or slot.task.done():
            slot.task = asyncio.get_running_loop().create_task(self._reconcile(instance, slot))

    async def settled(self, instance: uuid.UUID) -> None:
        """Wait until the instance's socket is as it should be; not for ever, as an instance can do without."""
        slot = self._slots.get(instance)
        if slot is not None and slot.task is not None:
            await asyncio.wait((slot.task,), timeout=_SETTLE_TIMEOUT_S)

    async def _reconcile(self, instance: uuid.UUID, slot: _Slot) -> None:
        # One task per instance: an old server is gone before the next one begins, however fast the changes come.
        while not slot.settled:
            old = slot.server
            if slot.wanted is None:
                await self._end(slot)
            elif await self._begin(slot, slot.wanted) and old is not None:
                await old.stop(_RETIRE_GRACE_S)
        if slot.wanted is None and slot.epoch is None:
            self._slots.pop(instance, None)

    async def _begin(self, slot: _Slot, record: InstanceRecord) -> bool:
        """Put a door in the place of whatever is there."""
        path = self._instances.guest_socket(record)
        try:
            door = listen_at(path)
        except VtpmError as error:
            log.warning("api.guest_socket_failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            await asyncio.sleep(_RETRY_S)
            return False
        self._close_door(slot)
        slot.server = slot.opening = None
        slot.door, slot.path, slot.epoch = door, path, record.epoch
        self._doors.add(door, lambda connection: self._knock(slot, record, connection))
        return True

    def _knock(self, slot: _Slot, record: InstanceRecord, connection: socket.socket) -> None:
        if slot.waiting >= _MAX_WAITING:
            connection.close()
            return
        slot.waiting += 1
        task = asyncio.get_running_loop().create_task(self._admit(slot, record, connection))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _admit(self, slot: _Slot, record: InstanceRecord, connection: socket.socket) -> None:
        """Bring a connection that came to the door to the server, which stands in its place for whoever comes next."""
        try:
            connection.setblocking(False)
            with connection, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
                if slot.opening is None:
                    slot.opening = asyncio.ensure_future(self._open(slot, record))
                path = await asyncio.shield(slot.opening)
                inner.setblocking(False)
                await asyncio.get_running_loop().sock_connect(inner, str(path))
                await carry_both_ways(connection, inner)
        except VtpmError as error:
            slot.opening = None
            log.warning("api.guest_socket_failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
        except (OSError, TimeoutError) as error:
            log.debug("api.guest_connection_ended", instance=str(record.id), error=type(error).__name__)
        finally:
            slot.waiting -= 1

    async def _open(self, slot: _Slot, record: InstanceRecord) -> Path:
        """Have a server in the place of the door; return its path."""
        path = self._instances.guest_socket(record)
        if slot.server is None and slot.epoch == record.epoch:
            server = self._make(record)
            await serve_on(server, path)
            slot.server = server
        return path

    def _close_door(self, slot: _Slot) -> None:
        if slot.door is not None:
            self._doors.remove(slot.door)
            slot.door = None

    async def _end(self, slot: _Slot, grace_s: float | None = None) -> None:
        server, path = slot.server, slot.path
        slot.server = slot.path = slot.epoch = slot.opening = None
        self._close_door(slot)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
        if server is not None:
            await server.stop(grace_s)

    async def close(self, grace_s: float | None) -> None:
        """End every server; calls that run have `grace_s` to finish."""
        self._closing = True
        slots = list(self._slots.values())
        tasks = [slot.task for slot in slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(slot, grace_s) for slot in slots))
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
        self._doors.close()
        self._slots.clear()
