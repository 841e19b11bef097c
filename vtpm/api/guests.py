"""The guest sockets: each instance that is ON has one, on which TpmService speaks for it alone, by a gRPC server of its own.

That makes the identity of the caller a matter of which server was called. The socket is ours, not gRPC's: connections are
counted when they come and carried to the instance's server, within bounds (vtpm.wire.shares, vtpm.wire.guarded). The server is
made when the first of them comes; it goes some time after the last, or when the instance hibernates.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import shutil
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc.aio
import structlog

from vtpm.api.ports import Instances
from vtpm.api.sockets import serve_within
from vtpm.engine.limits import TokenBucket
from vtpm.errors import VtpmError
from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord, InstanceState
from vtpm.wire.doors import Doors, listen_at
from vtpm.wire.guarded import GuardedConnection, GuestFlow, LargeMessages
from vtpm.wire.listening import QuietLog
from vtpm.wire.shares import ConnectionShares
from vtpm.wire.turns import Turns

log: Final = structlog.get_logger("vtpm.api")

_RETRY_S: Final = 2.0
_SETTLE_TIMEOUT_S: Final = 5.0
# Calls that run when an instance hibernates have this long to end, before the server goes.
_RETIRE_GRACE_S: Final = 5.0
# How long the last answers of a server may take to reach their clients.
_LAST_ANSWERS_S: Final = 1.0
# A server without a connection stays so long, for a client that connects for each call.
_LINGER_S: Final = 30.0
# A connection costs a millisecond until it is gone again: so many a guest may make at once, and then so many a second.
_CONNECTIONS_AT_ONCE: Final = 16
_CONNECTIONS_PER_S: Final = 10.0
# Turning one away costs little; so many a second are turned away of all, and the others stay in their sockets' backlogs.
_REFUSALS_AT_ONCE: Final = 256
_REFUSALS_PER_S: Final = 2000.0
_DOOR_PAUSE_S: Final = 0.1
# Large messages of all guests under way at once, each of a mebibyte.
_LARGE_AT_ONCE: Final = 8
# How long a message may take from its first byte on where gRPC does not tell us that it has begun, in times of the request's.
_MESSAGE_TIMES: Final = 1.5

ServerFactory = Callable[[InstanceRecord, GuestFlow], grpc.aio.Server]


@dataclass(slots=True)
class _Slot:
    """What an instance should have (`wanted`, None for nothing) and what it has: a door, and a server once somebody came."""

    flow: GuestFlow
    wanted: InstanceRecord | None = None
    door: socket.socket | None = None
    path: Path | None = None
    # Each power on makes the instance's directory anew, so what is there belongs to one epoch.
    epoch: int | None = None
    task: asyncio.Task[None] | None = None
    server: grpc.aio.Server | None = None
    # What brings up the server, for all that wait for it, and gives the path to connect to.
    opening: asyncio.Future[Path] | None = None
    connections: set[asyncio.Task[None]] = field(default_factory=set)
    lingering: asyncio.TimerHandle | None = None
    pace: TokenBucket = field(default_factory=lambda: TokenBucket(_CONNECTIONS_PER_S, _CONNECTIONS_AT_ONCE))

    @property
    def settled(self) -> bool:
        return self.epoch == (self.wanted.epoch if self.wanted is not None else None)


class GuestServers:
    """Follows the changes of instances; `make` gives a server, bound to nothing yet, that speaks for one.

    `directory` is for the sockets between our doors and the servers; it is made anew.
    """

    def __init__(
        self,
        instances: Instances,
        make: ServerFactory,
        directory: Path,
        shares: ConnectionShares,
        *,
        largest_message: int,
        message_timeout_s: float,
    ) -> None:
        self._instances = instances
        self._make = make
        self._directory = directory
        self._shares = shares
        self._message_timeout_s = message_timeout_s * _MESSAGE_TIMES
        self._numbers = itertools.count(1)
        self._slots: dict[uuid.UUID, _Slot] = {}
        self._doors = Doors()
        self._refusals = TokenBucket(_REFUSALS_PER_S, _REFUSALS_AT_ONCE)
        self._turns = Turns()
        self._large = LargeMessages(_LARGE_AT_ONCE, largest_message)
        self._quiet = QuietLog()
        self._stopping: set[asyncio.Task[None]] = set()
        self._closing = False

    def follow(self) -> None:
        """Serve what is ON, now and from now on."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700)
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
            slot = self._slots[record.id] = _Slot(GuestFlow(self._turns, self._large))
        slot.wanted = record if serves else None
        if not slot.settled and (slot.task is None or slot.task.done()):
            slot.task = asyncio.get_running_loop().create_task(self._reconcile(record.id, slot))

    def _on_hibernation(self, instance: uuid.UUID) -> None:
        slot = self._slots.get(instance)
        if slot is not None and not self._closing:
            self._retire(slot, _RETIRE_GRACE_S)

    async def settled(self, instance: uuid.UUID) -> None:
        """Wait until the instance's socket is as it should be; not for ever, as an instance can do without."""
        slot = self._slots.get(instance)
        if slot is not None and slot.task is not None:
            await asyncio.wait((slot.task,), timeout=_SETTLE_TIMEOUT_S)

    async def _reconcile(self, instance: uuid.UUID, slot: _Slot) -> None:
        # One task per instance: an old server is let go before the next one begins, however fast the changes come.
        while not slot.settled:
            if slot.wanted is None:
                await self._end(slot)
            elif not self._begin(slot, slot.wanted):
                await asyncio.sleep(_RETRY_S)
        if slot.wanted is None:
            self._slots.pop(instance, None)

    def _begin(self, slot: _Slot, record: InstanceRecord) -> bool:
        """Put a door in the place of whatever is there."""
        path = self._instances.guest_socket(record)
        try:
            door = listen_at(path)
        except VtpmError as error:
            log.warning("api.guest_socket_failed", instance=str(record.id), reason=error.reason, remedy=error.remedy)
            return False
        self._close_door(slot)
        self._retire(slot, _RETIRE_GRACE_S)
        slot.door, slot.path, slot.epoch = door, path, record.epoch
        self._doors.add(door, lambda connection: self._knock(slot, record, connection))
        return True

    def _knock(self, slot: _Slot, record: InstanceRecord, connection: socket.socket) -> None:
        """Take a connection in, or turn it away; nothing has been made for it yet but a descriptor."""
        connection.setblocking(False)
        guarded = GuardedConnection(connection, slot.flow, self._message_timeout_s)
        if not self._shares.enter(record.id, guarded):
            connection.close()
            self._turned_away(slot, record)
            return
        task = guarded.task = asyncio.get_running_loop().create_task(self._admit(slot, record, guarded))
        slot.connections.add(task)
        task.add_done_callback(lambda _: self._left(slot, record, guarded, task))
        slot.pace.take(1)
        if wait_s := slot.pace.wait_s():
            self._pause(slot, wait_s)

    def _turned_away(self, slot: _Slot, record: InstanceRecord) -> None:
        self._quiet.warning("api.guest_connection_refused", record.id, instance=str(record.id), name=record.name)
        if not self._refusals.take(1):
            self._pause(slot, _DOOR_PAUSE_S)

    def _pause(self, slot: _Slot, seconds: float) -> None:
        if slot.door is not None:
            self._doors.pause(slot.door, seconds)

    def _left(self, slot: _Slot, record: InstanceRecord, guarded: GuardedConnection, task: asyncio.Task[None]) -> None:
        guarded.close()
        self._shares.leave(record.id, guarded)
        slot.connections.discard(task)
        if not slot.connections and not self._closing:
            slot.lingering = asyncio.get_running_loop().call_later(_LINGER_S, self._retire_unused, slot)

    def _retire_unused(self, slot: _Slot) -> None:
        slot.lingering = None
        if not slot.connections:
            self._retire(slot, None)

    async def _admit(self, slot: _Slot, record: InstanceRecord, guarded: GuardedConnection) -> None:
        """Bring a connection to the instance's server, and carry it until it ends."""
        if slot.lingering is not None:
            slot.lingering.cancel()
            slot.lingering = None
        try:
            with await self._reach(slot, record) as inner:
                await guarded.carry(inner)
        except VtpmError as error:
            fields = {"instance": str(record.id), "reason": error.reason, "remedy": error.remedy}
            self._quiet.warning("api.guest_connection_cut", (record.id, error.reason), **fields)
        except (OSError, TimeoutError) as error:
            log.debug("api.guest_connection_ended", instance=str(record.id), error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  # it is one connection's; the next one tries again
            fields = {"instance": str(record.id), "reason": "INTERNAL", "error": type(error).__name__}
            self._quiet.warning("api.guest_connection_cut", (record.id, "INTERNAL"), **fields)

    async def _reach(self, slot: _Slot, record: InstanceRecord) -> socket.socket:
        """Return a connection to the instance's server; if that is retired meanwhile, to the next one."""
        while True:
            if slot.opening is None:
                slot.opening = asyncio.get_running_loop().create_task(self._open(slot, record))
            opening = slot.opening
            inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                inner.setblocking(False)
                await asyncio.get_running_loop().sock_connect(inner, str(await asyncio.shield(opening)))
            except BaseException as error:
                inner.close()
                if isinstance(error, OSError) and slot.opening is not opening and slot.epoch == record.epoch:
                    continue
                raise
            return inner

    async def _open(self, slot: _Slot, record: InstanceRecord) -> Path:
        """Have a server for the instance; return where it listens."""
        own = asyncio.current_task()
        path = self._directory / f"{next(self._numbers):x}"
        try:
            server = self._make(record, slot.flow)
            await serve_within(server, path)
        except BaseException:
            if slot.opening is own:
                slot.opening = None
            raise
        if slot.opening is not own:
            await server.stop(None)
            raise ConnectionResetError(errno.ECONNRESET, "the instance has changed meanwhile")
        slot.server = server
        return path

    def _retire(self, slot: _Slot, grace_s: float | None) -> None:
        """End the server, if there is one; who comes next gets another."""
        server, slot.server, slot.opening = slot.server, None, None
        if server is not None:
            task = asyncio.get_running_loop().create_task(server.stop(grace_s))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    def _close_door(self, slot: _Slot) -> None:
        if slot.door is not None:
            self._doors.remove(slot.door)
            slot.door = None

    async def _end(self, slot: _Slot, grace_s: float | None = None) -> None:
        server, path = slot.server, slot.path
        slot.server = slot.opening = slot.path = slot.epoch = None
        self._close_door(slot)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
        if server is not None:
            await server.stop(grace_s)
        if slot.connections:
            # They end with the server, as soon as its last answers have been carried.
            _, late = await asyncio.wait(slot.connections, timeout=_LAST_ANSWERS_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if slot.lingering is not None:
            slot.lingering.cancel()
            slot.lingering = None

    async def close(self, grace_s: float | None) -> None:
        """End every server; calls that run have `grace_s` to finish."""
        self._closing = True
        slots = list(self._slots.values())
        tasks = [slot.task for slot in slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(slot, grace_s) for slot in slots))
        await asyncio.gather(*self._stopping, return_exceptions=True)
        self._doors.close()
        self._slots.clear()
        shutil.rmtree(self._directory, ignore_errors=True)
