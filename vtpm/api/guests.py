"""The guest sockets: each instance that is ON has a gRPC server of its own, on which TpmService speaks for it alone.

A server per instance costs some 40 KB and 0.4 ms, and makes the identity of the caller a matter of which server was called.
"""

from __future__ import annotations

import asyncio
import contextlib
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

log: Final = structlog.get_logger("vtpm.api")

_RETRY_S: Final = 2.0
_SETTLE_TIMEOUT_S: Final = 5.0

ServerFactory = Callable[[InstanceRecord], grpc.aio.Server]


@dataclass(slots=True)
class _Slot:
    """What an instance should have (`wanted`, None for no server) and what it has."""

    wanted: InstanceRecord | None = None
    server: grpc.aio.Server | None = None
    path: Path | None = None
    # Each power on makes the instance's directory anew, so a server belongs to one epoch.
    epoch: int | None = None
    task: asyncio.Task[None] | None = None

    @property
    def settled(self) -> bool:
        return self.epoch == (self.wanted.epoch if self.wanted is not None else None)


class GuestServers:
    """Follows the changes of instances; `make` gives a server, bound to nothing yet, that speaks for one."""

    def __init__(self, instances: Instances, make: ServerFactory) -> None:
        self._instances = instances
        self._make = make
        self._slots: dict[uuid.UUID, _Slot] = {}
        self._closing = False

    def follow(self) -> None:
        """Serve what is ON, now and from now on."""
        self._instances.subscribe(self._on_change)

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
        if slot.task is None or slot.task.done():
            slot.task = asyncio.get_running_loop().create_task(self._reconcile(record.id, slot))

    async def settled(self, instance: uuid.UUID) -> None:
        """Wait until the instance's socket is as it should be; not for ever, as an instance can do without."""
        slot = self._slots.get(instance)
        if slot is not None and slot.task is not None:
            await asyncio.wait((slot.task,), timeout=_SETTLE_TIMEOUT_S)

    async def _reconcile(self, instance: uuid.UUID, slot: _Slot) -> None:
        # One task per instance: an old server is gone before the next one begins, however fast the changes come.
        while not slot.settled:
            await self._end(slot)
            if slot.wanted is not None:
                await self._begin(slot, slot.wanted)
        if slot.server is None:
            self._slots.pop(instance, None)

    async def _begin(self, slot: _Slot, record: InstanceRecord) -> None:
        path = self._instances.guest_socket(record)
        server = self._make(record)
        try:
            await serve_on(server, path)
        except VtpmError as error:
            await server.stop(None)
            log.warning("api.guest_socket_failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            await asyncio.sleep(_RETRY_S)
            return
        slot.server, slot.path, slot.epoch = server, path, record.epoch

    async def _end(self, slot: _Slot, grace_s: float | None = None) -> None:
        server, path = slot.server, slot.path
        slot.server = slot.path = slot.epoch = None
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
        self._slots.clear()
