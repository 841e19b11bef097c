"""Hibernated instances: how they come back, and what becomes of them when something is lost.

Invariant 2: the store forgets a snapshot, under a token, while a worker takes it up, which waits for that before it runs a
command. Another worker gets it under the same token only if the engine host says that none has gone on from it. Invariant 7: a
snapshot that can't be opened ends in FAILED.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from vtpm.engine.interface import Engine, Loss, Parked, RunningTpm, Thaw
from vtpm.errors import ErrorKind, FailedPreconditionError, KeyProviderError, VtpmError
from vtpm.instance.running import Running
from vtpm.instance.wakeful import WakefulTpm
from vtpm.log import SourceLog
from vtpm.store.model import InstanceRecord
from vtpm.store.snapshots import TOKEN_SIZE, Hibernated

if TYPE_CHECKING:
    from vtpm.instance.sockets import InstanceSockets
    from vtpm.seal.keys import KeyProvider
    from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.instance")
_lines: Final = SourceLog(log)

_RETRY_S: Final = 0.5
# How many workers may die over one snapshot.
_ATTEMPTS: Final = 5
_SOON_S: Final = 5.0
# What the worker's own end, or the engine host's, is told of elsewhere.
_REPORTED: Final = ("TPM_LOST", "ENGINE_HOST_LOST", "ENGINE_HOST_UNREACHABLE", "ENGINE_HOST_REFUSED")


class Power(Protocol):
    """What this needs of vtpm.instance.lifecycle.Lifecycle."""

    store: Store
    keys: KeyProvider
    sockets: InstanceSockets
    key_lock: asyncio.Lock
    engines: Mapping[str, Engine]

    def engine(self, name: str) -> Engine:
        """Return an engine."""

    def enter(self, running: Running) -> None:
        """Put into the table of what runs."""

    def leave(self, record: InstanceRecord) -> Running | None:
        """Take out of it."""

    def by_id(self, instance: uuid.UUID) -> Running | None:
        """Look up in it."""

    def later(self, action: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do something in the background, until the daemon ends."""

    async def fail(self, record: InstanceRecord, loss: Loss) -> None:
        """Write down that an instance FAILED."""


class Thaws:
    """Used from the event loop only. `observe` is told of each thaw, in seconds from the wish to the worker's first command."""

    def __init__(self, power: Power, idle_timeout_s: float) -> None:
        self._power = power
        self._idle_timeout_s = idle_timeout_s
        self.observe: Callable[[float], None] = lambda _seconds: None
        self.on_hibernated: list[Callable[[uuid.UUID], None]] = []
        self.on_thawed: list[Callable[[Running], None]] = []
        # Set while instances may wake.
        self._open = asyncio.Event()
        self._open.set()
        # Its own thread, as a guest waits, and not behind others who wait for the disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vtpm-thaw")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    # ---- the table -------------------------------------------------------------------------------------------------------

    def sleeper(self, record: InstanceRecord, *, attached: bool) -> Running:
        """Return an instance that is ON and hibernated."""
        running = Running(record, WakefulTpm(None, lambda: self._thaw(running), attached=attached))
        return running

    def enter(self, record: InstanceRecord, *, attached: bool, woken: bool = False, untouched: bool = False) -> Running:
        """Put a hibernated instance into the table; `woken`: something has come for it. `untouched`: see Running."""
        running = self.sleeper(record, attached=attached)
        running.untouched = untouched
        self._power.enter(running)
        log.info("instance.found_hibernated", instance=str(record.id), name=record.name, epoch=record.epoch)
        if woken:
            self._wake(running)
        return running

    def hibernated(self, parked: Parked) -> None:
        """See EngineEvents."""
        running = self._find(parked.instance, parked.epoch)
        if running is not None:
            running.untouched = True
            running.tpm.fell_asleep(attached=parked.attached)
            log.debug("instance.hibernated", instance=str(parked.instance), epoch=parked.epoch)
            for callback in self.on_hibernated:
                callback(parked.instance)
            if parked.woken:
                self._wake(running)

    def wanted(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        running = self._find(instance, epoch)
        if running is not None:
            self._wake(running)

    def _find(self, instance: uuid.UUID, epoch: int) -> Running | None:
        running = self._power.by_id(instance)
        return running if running is not None and running.record.epoch == epoch else None

    def _wake(self, running: Running) -> None:
        # Told twice while it waits, it wakes once.
        if "wake" not in running.busy_with:
            running.busy_with["wake"] = False
            self._power.later(self._wake_for_guest(running))

    async def _wake_for_guest(self, running: Running) -> None:
        instance = str(running.record.id)
        try:
            # What a guest sent waits on its socket; nothing is lost by waiting.
            await self._open.wait()
            del running.busy_with["wake"]
            await running.tpm.awake()
        except VtpmError as error:
            _lines.warning(instance, "instance.thaw_failed", instance=instance, reason=error.reason)
        except Exception as error:  # noqa: BLE001  # whoever asks for it next hears of it
            _lines.error(instance, "instance.thaw_failed", instance=instance, reason="INTERNAL", error=type(error).__name__)

    # ---- held while the host is drained ----------------------------------------------------------------------------------

    async def hold(self) -> None:
        """Let nothing wake until `release`."""
        self._open.clear()
        for engine in self._power.engines.values():
            await engine.hold()

    def release(self) -> None:
        """Let what was wanted meanwhile wake."""
        for engine in self._power.engines.values():
            engine.release()
        self._open.set()

    def pause(self) -> None:
        """Let guests wait, as long as the daemon finds out what it may go on from."""
        self._open.clear()

    def go_on(self) -> None:
        """End `pause`."""
        self._open.set()

    @property
    def held(self) -> bool:
        """Whether nothing may wake."""
        return not self._open.is_set()

    # ---- thaw ------------------------------------------------------------------------------------------------------------

    async def _thaw(self, running: Running) -> RunningTpm:
        """Bring an instance back; it is FAILED if its snapshot or its state can't be used."""
        if self.held and not running.tpm.stopping:
            raise FailedPreconditionError(
                "HOST_DRAINED", "the host is drained: no instance wakes", subject=running.record.name,
                remedy="vtpm host resume",
            )  # fmt: skip
        record = running.record
        begun = time.monotonic()
        attempts = 0
        tried = begun
        # One for all attempts: another worker may go on where one has died before it did.
        token = os.urandom(TOKEN_SIZE)
        while True:
            try:
                order = await self._order(running, token)
                tpm = await self._power.engine(record.engine).thaw(order)
            except VtpmError as error:
                if error.kind is ErrorKind.UNAVAILABLE and error.reason not in _REPORTED and not running.tpm.stopping:
                    # The store or the key provider is in trouble; the instance is as safe as before, and its guest waits.
                    log.error("instance.thaw_waits", instance=str(record.id), reason=error.reason, remedy=error.remedy)
                    await asyncio.sleep(_RETRY_S)
                    continue
                if error.reason == "TPM_LOST" and await running.tpm.asleep_again():
                    # Its worker died before it went on from the snapshot, which is as good as before.
                    # One that lived on for a while has waited for the store, which is in trouble.
                    now = time.monotonic()
                    attempts = attempts + 1 if now - tried < _SOON_S else 1
                    tried = now
                    if attempts < _ATTEMPTS:
                        continue
                    await self._give_up(running, error)
                elif error.reason not in _REPORTED:
                    await self._give_up(running, error)
                raise
            running.untouched = False
            self.observe(time.monotonic() - begun)
            log.debug("instance.thawed", instance=str(record.id), epoch=record.epoch)
            for callback in self.on_thawed:
                callback(running)
            return tpm

    async def _order(self, running: Running, token: bytes) -> Thaw:
        record = running.record
        try:
            found, data_key = await self._opened(record)
        except KeyProviderError:
            # The key-encryption key may just be replaced; then the key was wrapped anew meanwhile.
            async with self._power.key_lock:
                found, data_key = await self._opened(record)
        if found.used_by not in (b"", token):
            if not running.untouched:
                raise FailedPreconditionError(
                    "SNAPSHOT_MISSING",
                    "the snapshot is used up: the worker that went on from it has ended",
                    subject=record.name,
                )
            # Marked by a daemon that ended before its worker was there, or by this one while it had no engine host.
            token = found.used_by
        return Thaw(record.id, record.epoch, found.state, found.snapshot, token, data_key, self._idle_timeout_s)

    def _open_key(self, record: InstanceRecord) -> tuple[Hibernated, bytes]:
        found = self._power.store.snapshots.load(record.id, record.epoch)
        return found, self._power.keys.unwrap(found.wrapped_key, record.id)

    async def _opened(self, record: InstanceRecord) -> tuple[Hibernated, bytes]:
        if self._power.keys.immediate:
            # Two row look-ups in pages that are in memory: less than the way to a thread and back, and a guest waits.
            return self._open_key(record)
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(self._open_key, record))

    async def _give_up(self, running: Running, error: VtpmError) -> None:
        record = running.record
        if self._power.by_id(record.id) is not running:
            return
        self._power.leave(record)
        try:
            await self._power.engine(record.engine).forget(record.id)
        except VtpmError as trouble:
            log.warning("instance.parking_not_closed", instance=str(record.id), reason=trouble.reason)
        message = f"the hibernated TPM can't go on: {error.message}"
        remedy = error.remedy or f"reset the instance together with its VM: vtpm instance reset {record.name}"
        await self._power.fail(record, Loss(error.reason, message, remedy))

    # ---- the engine host is gone -----------------------------------------------------------------------------------------

    def parking_lost(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        running = self._find(instance, epoch)
        if running is None:
            return
        if running.tpm.attached:
            self._power.leave(running.record)
            loss = Loss(
                "ENGINE_HOST_LOST",
                "the engine host died, and with it the VM's connection to its TPM",
                f"reset the VM, which takes its TPM back: vtpm instance reset {running.record.name}",
            )
            self._power.later(self._power.fail(running.record, loss))
        else:
            self._power.later(self._park_later(running))

    async def _park_later(self, running: Running) -> None:
        try:
            await self.park_again(running)
        except VtpmError as error:
            log.error("instance.parking_failed", instance=str(running.record.id), reason=error.reason, remedy=error.remedy)

    async def park_again(self, running: Running) -> None:
        """Listen anew for a hibernated instance that lost its sockets and no connection of a VM."""
        record = running.record
        listeners = self._power.sockets.make(record.id)
        try:
            parked = Parked(record.id, record.epoch, attached=False)
            await self._power.engine(record.engine).park(parked, listeners)
        finally:
            listeners.data.close()
            listeners.control.close()
        log.info("instance.parked_again", instance=str(record.id), name=record.name)
