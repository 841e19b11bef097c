"""Power: the state machine of an instance, ownership by epoch, and what runs now.

    OFF ── start ──► ON ── stop ──► OFF        ON ── loss ──► FAILED ── reset ──► ON, FAILED ── stop ──► OFF

Invariant 3: `Store.acquire` raises the epoch before a worker exists, and commits under an older one are refused.
Invariant 7: whatever is not understood ends in FAILED with a reason and a remedy, never in a fresh TPM.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import socket
import uuid
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

import structlog

from vtpm.crashpoints import crash_point
from vtpm.engine.interface import Engine, Listeners, Loss, Parked, PowerOn, RunningTpm
from vtpm.errors import (
    ConflictError,
    EngineError,
    ErrorKind,
    FailedPreconditionError,
    NotFoundError,
    SealedStateError,
    StoreError,
    VtpmError,
)
from vtpm.instance.certification import AK
from vtpm.instance.keeper import IdentityKeeper
from vtpm.instance.renewal import Renewal
from vtpm.instance.running import Running
from vtpm.instance.sockets import InstanceSockets
from vtpm.instance.thaws import Thaws
from vtpm.instance.watch import ChangeHub
from vtpm.log import SourceLog
from vtpm.seal.keys import KeyProvider
from vtpm.store.macs import MESSAGE, REASON, mismatch, remedy
from vtpm.store.model import Failure, InstanceRecord, InstanceState
from vtpm.store.rows import is_refused
from vtpm.store.snapshots import SnapshotRow
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.instance")
_lines: Final = SourceLog(log)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_FAILURE_RETRY_S: Final = 1.0
_END_TIMEOUT_S: Final = 5.0
_STATUS_TIMEOUT_S: Final = 2.0
_GOING_S: Final = 0.05
# How long a daemon that begins waits for the workers that it takes over.
_ADOPT_TIMEOUT_S: Final = 5.0
_AGAIN_S: Final = 0.5
_MAX_EARLY: Final = 64


class Lifecycle:
    """Starts, stops and resets instances and keeps the table of what runs. Used from the event loop only."""

    def __init__(
        self,
        store: Store,
        keys: KeyProvider,
        engines: Mapping[str, Engine],
        sockets: InstanceSockets,
        hub: ChangeHub,
        *,
        boot_id: str,
        max_running: int = 0,
        idle_timeout_s: float = 0,
    ) -> None:
        self.store = store
        self.keys = keys
        self.engines = engines
        self.sockets = sockets
        self.hub = hub
        # Refuses what is older than the anchor says (vtpm.instance.freshness); None without rollback protection.
        self.check_fresh: Callable[[InstanceRecord], None] | None = None
        # What happened to instances that are not in the table yet, while what ran on is taken over.
        self._early: dict[tuple[uuid.UUID, int], list[Callable[[], None]]] | None = {}
        self._boot_id = boot_id
        self._max_running = max_running
        self.thaws = Thaws(self, idle_timeout_s)
        self._idle_timeout_s = idle_timeout_s
        self._running: dict[uuid.UUID, Running] = {}
        self._by_ref: dict[str, Running] = {}
        self._locks: dict[uuid.UUID, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: dict[uuid.UUID, asyncio.Task[None]] = {}
        # Between wrapping or reading a data key and its use the key-encryption key must not be rotated away.
        self.key_lock = asyncio.Lock()
        # What looks after the instances' certificates, if anything does; set by `look_after`.
        self._keeper: IdentityKeeper | None = None
        self.renewal: Renewal | None = None
        # Why threads: the store's calls block on the disk.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="vtpm-store")

    async def blocking(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a blocking call of the store or a key provider outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args, **kwargs))

    def look_after(self, keeper: IdentityKeeper, renewal: Renewal) -> None:
        """Have certified keys looked after from now on; before `recover`."""
        self._keeper, self.renewal = keeper, renewal
        self.thaws.on_thawed.append(renewal.woke)

    def lock(self, instance: uuid.UUID) -> asyncio.Lock:
        """The lock that every change of power takes."""
        return self._locks.setdefault(instance, asyncio.Lock())

    def running(self, ref: str) -> Running | None:
        """Return the running instance that `ref` names (id, name or `instances/…`), if it runs."""
        text = ref.removeprefix("instances/")
        found = self._by_ref.get(text)
        if found is None:
            # An id in another of a UUID's spellings.
            with contextlib.suppress(ValueError):
                found = self._running.get(uuid.UUID(text))
        return found

    def by_id(self, instance: uuid.UUID) -> Running | None:
        """Return the running instance of that id, if it runs."""
        return self._running.get(instance)

    def all_running(self) -> list[Running]:
        """What runs now."""
        return list(self._running.values())

    def enter(self, running: Running) -> None:
        """Put into the table of what runs."""
        early = self._early.pop((running.record.id, running.record.epoch), []) if self._early else []
        self._running[running.record.id] = running
        self._by_ref[str(running.record.id)] = self._by_ref[running.record.name] = running
        for event in early:
            event()

    def leave(self, record: InstanceRecord) -> Running | None:
        """Take out of the table of what runs."""
        running = self._running.pop(record.id, None)
        if running is not None:
            self._by_ref.pop(str(record.id), None)
            self._by_ref.pop(record.name, None)
            running.tpm.end()
            running.gone.set()
        self.sockets.remove(record.id)
        return running

    def refresh(self, record: InstanceRecord) -> None:
        """Take over a record that changed while the instance runs (labels)."""
        if (running := self._running.get(record.id)) is not None:
            running.record = record

    # ---- the daemon's beginning and end ----------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take over what ran on without a daemon, and put into order what did not."""
        powered_off: set[tuple[uuid.UUID, int]] = set()
        taken: set[uuid.UUID] = set()
        looks: list[asyncio.Task[None]] = []
        # An engine host that is replaced at the start of an engine hibernates what runs in it: the store is read after that.
        started = [(engine, await engine.start(self)) for engine in self.engines.values()]
        rows = await self.blocking(self.store.snapshots.all)
        # What is not as the service wrote it is not gone on from: a snapshot's row says whether somebody has (invariant 2).
        snapshots = {key: row for key, row in rows.items() if not row.refused}
        owned = {record.id: record for record in await self.blocking(self.store.owned)}
        for engine, found in started:
            powered_off |= found.powered_off
            for adopted in found.adopted:
                record = owned.get(adopted.instance)
                if record is None or record.epoch != adopted.epoch:
                    # Not the owner any more (invariant 3).
                    log.warning("instance.stale_worker_stopped", instance=str(adopted.instance), epoch=adopted.epoch)
                    self.later(self._stop_quietly(adopted.tpm))
                    continue
                # In the table first: it may just be about to hibernate.
                running = self._running_of(record, adopted.tpm)
                self.enter(running)
                snapshot = rows.get((record.id, record.epoch))
                looks.append(self.later(self._look_at(running, adopted.tpm, snapshot)))
                taken.add(record.id)
            for parked in found.parked:
                record = owned.get(parked.instance)
                if record is None or record.epoch != parked.epoch or (record.id, record.epoch) not in snapshots:
                    log.warning("instance.stale_parking_closed", instance=str(parked.instance), epoch=parked.epoch)
                    self.later(self._forget_quietly(engine, parked.instance))
                    continue
                self.thaws.enter(record, attached=parked.attached, woken=parked.woken, untouched=True)
        if looks:
            # A worker that is busy, or says nothing, is looked at later: nobody waits for it.
            await asyncio.wait(looks, timeout=_ADOPT_TIMEOUT_S)
        for record in owned.values():
            if record.id not in self._running and record.id not in taken:
                snapshot = rows.get((record.id, record.epoch))
                await self._put_in_order(record, snapshot, powered_off=(record.id, record.epoch) in powered_off)
        self._early = None
        self.sockets.remove_all_but(set(self._running))

    async def _put_in_order(self, record: InstanceRecord, snapshot: SnapshotRow | None, *, powered_off: bool) -> None:
        """Write down what became of an instance that was ON and that nobody runs; what goes wrong is that instance's alone."""
        try:
            if powered_off:
                await self.blocking(self.store.release, record.id, record.epoch)
                log.info("instance.powered_off_by_vm", instance=str(record.id), name=record.name)
            elif record.boot_id != self._boot_id:
                # The host was restarted: the VM is gone too, and nothing that it could still rely on was lost.
                await self.blocking(self.store.release, record.id, record.epoch)
                log.info("instance.off_after_host_restart", instance=str(record.id), name=record.name)
            elif snapshot == SnapshotRow(attached=False, used=False):
                # Nobody's connection was lost, and all that the TPM is was in the store.
                await self.thaws.park_again(self.thaws.enter(record, attached=False))
            elif snapshot is not None and snapshot.refused:
                await self.fail(record, _refused(record))
            else:
                loss = Loss(
                    "WORKER_LOST",
                    "the TPM's worker ended while no daemon ran; its volatile state is lost",
                    f"reset the instance together with its VM: vtpm instance reset {record.name}",
                )
                await self.fail(record, loss)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  # all others are put in order too
            reason = error.reason if isinstance(error, VtpmError) else type(error).__name__
            log.error("instance.recovery_failed", instance=str(record.id), name=record.name, reason=reason)
            self.leave(record)
            loss = Loss(
                "RECOVERY_FAILED",
                f"what became of the TPM could not be found out ({reason})",
                f"see the log; then reset the instance together with its VM: vtpm instance reset {record.name}",
            )
            self.later(self.fail(record, loss))

    async def _look_at(self, running: Running, tpm: RunningTpm, snapshot: SnapshotRow | None) -> None:
        """Find out what a worker that was taken over has; `snapshot` is its instance's."""
        record = running.record
        try:
            status = await tpm.status()
        except EngineError as error:
            # It has ended, and `ended` has said how; or it does not answer, and whoever needs it finds that.
            log.warning("instance.adopt_failed", instance=str(record.id), reason=error.reason)
            return
        if self._running.get(record.id) is not running:
            return
        if not status.loaded:
            # The daemon before this one ended when the worker had no state yet.
            if snapshot is None:
                self.leave(record)
                await self._stop_quietly(tpm)
                await self._powered_off(record)
                return
            if snapshot.refused:
                self.leave(record)
                await self._stop_quietly(tpm)
                await self.fail(record, _refused(record))
                return
            running.untouched = True
            running.tpm.fell_asleep(attached=snapshot.attached)
            self.wanted(record.id, record.epoch)
        log.info("instance.adopted", instance=str(record.id), name=record.name, epoch=record.epoch)
        if status.imported:
            self.imported(record.id, record.epoch)
        if status.identity_touched:
            self.identity_touched(record.id, record.epoch)

    async def close(self) -> None:
        """Let go: running TPMs run on with the engine host."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self.engines.values():
            await engine.close()
        self.thaws.close()
        self._threads.shutdown()

    # ---- loss ------------------------------------------------------------------------------------------------------------

    def ended(self, instance: uuid.UUID, epoch: int, loss: Loss | None) -> None:
        """See EngineEvents."""
        if self._too_early(instance, epoch, lambda: self.ended(instance, epoch, loss)):
            return
        running = self._running.get(instance)
        if running is None or running.record.epoch != epoch:
            return
        self.leave(running.record)
        if running.tpm.asleep:
            self.later(self._forget_parked(running.record))
        end = self.fail(running.record, loss) if loss is not None else self._powered_off(running.record)
        self._ends[instance] = task = self.later(end)
        task.add_done_callback(lambda _task: self._ends.pop(instance, None))

    def hibernated(self, parked: Parked) -> None:
        """See EngineEvents."""
        if not self._too_early(parked.instance, parked.epoch, lambda: self.thaws.hibernated(parked)):
            self.thaws.hibernated(parked)

    def _too_early(self, instance: uuid.UUID, epoch: int, event: Callable[[], None]) -> bool:
        """While what ran on is taken over: keep what happens to an instance until it is in the table."""
        if self._early is None or instance in self._running:
            return False
        events = self._early.setdefault((instance, epoch), [])
        if len(events) < _MAX_EARLY:
            events.append(event)
        return True

    def wanted(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        if not self._too_early(instance, epoch, lambda: self.thaws.wanted(instance, epoch)):
            self.thaws.wanted(instance, epoch)

    def parking_lost(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        if not self._too_early(instance, epoch, lambda: self.thaws.parking_lost(instance, epoch)):
            self.thaws.parking_lost(instance, epoch)

    def imported(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        running = self._running.get(instance)
        if running is not None and running.record.epoch == epoch:
            self._once(running, "keys", self._refresh_keys)

    def _running_of(self, record: InstanceRecord, tpm: RunningTpm) -> Running:
        running = self.thaws.sleeper(record, attached=False)
        running.tpm.woke(tpm)
        return running

    def identity_touched(self, instance: uuid.UUID, epoch: int) -> None:
        """See EngineEvents."""
        running = self._running.get(instance)
        if running is not None and running.record.epoch == epoch and self._keeper is not None:
            self._once(running, "identity", self._keeper.touched)

    def _once(self, running: Running, kind: str, action: Callable[[Running], Coroutine[None, None, None]]) -> None:
        """Do something for an instance in the background; asked for meanwhile, however often, it is done once more."""
        if kind in running.busy_with:
            running.busy_with[kind] = True
            return
        running.busy_with[kind] = False
        self.later(self._until_done(running, kind, action))

    async def _until_done(self, running: Running, kind: str, action: Callable[[Running], Coroutine[None, None, None]]) -> None:
        try:
            while True:
                running.busy_with[kind] = False
                await action(running)
                if not running.busy_with[kind] or running.gone.is_set():
                    return
                # Its guest makes this happen as often as it likes.
                await asyncio.sleep(_AGAIN_S)
        finally:
            del running.busy_with[kind]

    def later(self, action: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do something in the background, until the daemon ends."""
        task = asyncio.get_running_loop().create_task(action)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = error.reason if isinstance(error, VtpmError) else "INTERNAL"
            what = getattr(task.get_coro(), "__qualname__", "")
            _lines.error(what, "instance.task_failed", task=what, reason=reason, error=type(error).__name__)

    async def _refresh_keys(self, running: Running) -> None:
        """Write down the keys that the TPM has now; none, while they are not known."""
        banks: tuple[str, ...] = ()
        try:
            keys, banks = await running.tpm.keys()
        except VtpmError as error:
            # A TPM that was not started tells nothing yet; the next power on with TPM2_Startup asks again.
            log.info("instance.keys_unknown", instance=str(running.record.id), reason=error.reason)
            keys = ()
        if keys == running.record.keys and banks in ((), running.record.profile.pcr_banks):
            return
        record = await self.blocking(self.store.set_keys, running.record.id, keys, banks)
        self.refresh(record)
        if self._keeper is not None:
            await self._keeper.replaced(running, record)
            record = running.record
        log.info("instance.keys_changed", instance=str(record.id), name=record.name)
        self.hub.publish("UPDATED", record)

    async def _started_by_service(self, running: Running) -> None:
        """Write down what the start has brought: the keys of a TPM that nobody knew, the AK of one that had none."""
        record = running.record
        if not record.keys:
            await self._refresh_keys(running)
        elif not any(key.role == AK for key in record.keys):
            try:
                present, _ = await running.tpm.keys()
                if aks := [key for key in present if key.role == AK]:
                    self.refresh(await self.blocking(self.store.set_keys, record.id, (*record.keys, *aks), ()))
            except VtpmError as error:
                # The TPM runs, which is what counts; the next start looks again.
                log.warning("instance.ak_unknown", instance=str(record.id), reason=error.reason, remedy=error.remedy)

    async def _forget_parked(self, record: InstanceRecord) -> None:
        await self._forget_quietly(self.engine(record.engine), record.id)

    async def _forget_quietly(self, engine: Engine, instance: uuid.UUID) -> None:
        with contextlib.suppress(EngineError):
            await engine.forget(instance)

    async def _stop_quietly(self, tpm: RunningTpm) -> None:
        with contextlib.suppress(EngineError):
            await tpm.stop()

    async def _powered_off(self, record: InstanceRecord) -> None:
        """Write down that the VM has ended."""
        log.info("instance.powered_off_by_vm", instance=str(record.id), name=record.name)
        await self._write_down(record, functools.partial(self.store.release, record.id, record.epoch))

    async def fail(self, record: InstanceRecord, loss: Loss) -> None:
        """Write down that `record` FAILED; keeps trying while the store is in trouble."""
        log.error("instance.failed", instance=str(record.id), name=record.name, reason=loss.reason, remedy=loss.remedy)
        failure = Failure(loss.reason, loss.message, loss.remedy, dt.datetime.now(dt.UTC))
        await self._write_down(record, functools.partial(self.store.fail, record.id, record.epoch, failure))

    async def _write_down(self, record: InstanceRecord, change: Callable[[], InstanceRecord]) -> None:
        while True:
            try:
                changed = await self.blocking(change)
            except (ConflictError, NotFoundError, SealedStateError) as error:
                # Another owner has it, or it was deleted, or something else has written its row: there is nothing of ours to
                # mark.
                log.warning("instance.end_not_recorded", instance=str(record.id), reason=error.reason)
                return
            except VtpmError as error:
                if error.kind is not ErrorKind.UNAVAILABLE:
                    raise
                await asyncio.sleep(_FAILURE_RETRY_S)
                continue
            self.hub.publish("UPDATED", changed)
            return

    # ---- power -----------------------------------------------------------------------------------------------------------

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """Power on; an instance that is ON is returned as it is."""
        record = await self.blocking(self.store.get, ref)
        async with self.lock(record.id):
            await self.settled(record.id)
            record = await self._current(ref, revision)
            match record.state:
                case InstanceState.ON:
                    return record
                case InstanceState.FAILED if is_refused(record):
                    raise mismatch("instances", record.name)
                case InstanceState.FAILED:
                    raise FailedPreconditionError(
                        "INSTANCE_FAILED",
                        f"the instance is FAILED: {record.failure.message if record.failure else ''}",
                        subject=record.name,
                        remedy=f"vtpm instance reset {record.name}, or stop it first",
                    )
            return await self._power_on(record, startup_clear=startup_clear)

    async def attach(self, ref: str, connection: socket.socket) -> None:
        """Give a control connection of a VM to its instance, which is powered on for it: a VMM that connects starts a VM.

        Raises:
            FailedPreconditionError: INSTANCE_IN_USE, another VM's connection is open.
        """
        record = await self.blocking(self.store.get, ref)
        async with self.lock(record.id):
            if await self.settled(record.id):
                raise _in_use(record, "end that VM, or give this one an instance of its own")
            running = self._running.get(record.id)
            if running is None:
                record = await self._current(ref, None)
                if is_refused(record):
                    raise mismatch("instances", record.name)
                await self._power_on(record, startup_clear=False, without_init=True)
                running = self._running[record.id]
            await running.tpm.attach(connection)
            log.info("instance.attached", instance=str(record.id), name=record.name, epoch=running.record.epoch)

    async def settled(self, instance: uuid.UUID) -> bool:
        """Wait until the end of a TPM whose VM has just gone is written down; return whether a VM is attached."""
        running = self._running.get(instance)
        if running is not None:
            try:
                if not (await asyncio.wait_for(running.tpm.status(), _STATUS_TIMEOUT_S)).attached:
                    return False
                # The VM may have gone just now, and its worker not have come to that yet.
                await asyncio.wait_for(running.gone.wait(), _GOING_S)
            except TimeoutError:
                # It is there, or busy, as with a commit that the store does not take.
                return True
            except EngineError:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(running.gone.wait(), _END_TIMEOUT_S)
        if (task := self._ends.get(instance)) is not None:
            await asyncio.wait((task,), timeout=_END_TIMEOUT_S)
        return False

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        """Power off; volatile state is dropped. An instance that is OFF is returned as it is."""
        record = await self.blocking(self.store.get, ref)
        async with self.lock(record.id):
            await self.settled(record.id)
            record = await self._current(ref, revision)
            if record.state is InstanceState.OFF:
                return record
            running = self._running.get(record.id)
            if running is not None:
                try:
                    await running.tpm.stop()
                except VtpmError as error:
                    if not running.tpm.asleep:
                        raise
                    # Without the orderly end that it was to wake for: power goes all the same.
                    log.warning("instance.stopped_asleep", instance=str(record.id), name=record.name, reason=error.reason)
                    await self._forget_parked(record)
            self.leave(record)
            record = await self.blocking(self.store.release, record.id, record.epoch)
            log.info("instance.stopped", instance=str(record.id), name=record.name)
            self.hub.publish("UPDATED", record)
            return record

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """_TPM_Init; takes a FAILED instance back to ON."""
        record = await self.blocking(self.store.get, ref)
        async with self.lock(record.id):
            if await self.settled(record.id):
                # Invariant 2: fresh PCRs under a running VM would let it forge its boot.
                raise _in_use(record, "reset the VM, which resets its TPM")
            record = await self._current(ref, revision)
            if is_refused(record):
                raise mismatch("instances", record.name)
            running = self._running.get(record.id)
            match record.state:
                case InstanceState.OFF:
                    raise FailedPreconditionError(
                        "INSTANCE_OFF",
                        "an instance that is OFF can't be reset",
                        subject=record.name,
                        remedy=f"vtpm instance start {record.name}",
                    )
                case InstanceState.ON if running is not None:
                    await running.tpm.reset(startup_clear=startup_clear)
                    if startup_clear:
                        await self._started_by_service(running)
                        record = running.record
                    self.hub.publish("UPDATED", record)
                    return record
                case _:
                    return await self._power_on(record, startup_clear=startup_clear)

    async def _current(self, ref: str, revision: int | None) -> InstanceRecord:
        record = await self.blocking(self.store.get, ref)
        if revision is not None and record.revision != revision:
            raise ConflictError(
                "ETAG_MISMATCH", "the instance was changed meanwhile", subject=record.name, remedy="read it again and retry"
            )
        return record

    async def _power_on(self, record: InstanceRecord, *, startup_clear: bool, without_init: bool = False) -> InstanceRecord:
        if self.thaws.held:
            raise FailedPreconditionError(
                "HOST_DRAINED", "the host is drained: no instance starts", subject=record.name, remedy="vtpm host resume"
            )
        if self._max_running and len(self._running) >= self._max_running:
            raise VtpmError(
                "TOO_MANY_RUNNING",
                f"{self._max_running} instances are ON, the configured limit",
                subject=record.name,
                remedy="stop others or raise max_running",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            )
        if self.check_fresh is not None:
            await self.blocking(self.check_fresh, record)
        if self.renewal is not None:
            await self.renewal.before_power_on(record)
        owned = await self.blocking(self.store.acquire, record.id, boot_id=self._boot_id)
        crash_point("power_on.after_acquire")
        listeners: Listeners | None = None
        try:
            async with self.key_lock:
                wrapped, state = await self.blocking(self.store.load, record.id)
                data_key = await self.blocking(self.keys.unwrap, wrapped, record.id)
            listeners = self.sockets.make(record.id)
            order = PowerOn(
                record.id,
                owned.epoch,
                state,
                data_key,
                startup_clear,
                listeners,
                without_init=without_init,
                ak_algorithm=record.profile.ak_algorithm,
                idle_timeout_s=self._idle_timeout_s,
            )
            tpm = await self.engine(record.engine).power_on(order)
        except BaseException as error:
            await self._undo_power_on(owned, error)
            raise
        finally:
            if listeners is not None:
                listeners.data.close()
                listeners.control.close()
        crash_point("power_on.after_load")
        running = self._running_of(owned, tpm)
        self.enter(running)
        if startup_clear:
            await self._started_by_service(running)
            owned = running.record
        log.info("instance.started", instance=str(record.id), name=record.name, epoch=owned.epoch)
        self.hub.publish("UPDATED", owned)
        return owned

    async def _undo_power_on(self, owned: InstanceRecord, error: BaseException) -> None:
        self.sockets.remove(owned.id)
        closed = (ErrorKind.DATA_LOSS, ErrorKind.FAILED_PRECONDITION)
        if isinstance(error, VtpmError) and (error.kind in closed or error.reason == "WORKER_MISBEHAVED"):
            # Damage, a wrong key or a worker that is somebody else's: an operator has to look (invariants 6 and 7).
            await self.fail(owned, Loss(error.reason, error.message, error.remedy))
            return
        released = await self.blocking(self.store.release, owned.id, owned.epoch)
        self.hub.publish("UPDATED", released)

    def engine(self, name: str) -> Engine:
        """Return the engine called `name`.

        Raises:
            EngineError: ENGINE_UNKNOWN.
        """
        try:
            return self.engines[name]
        except KeyError:
            raise EngineError(
                "ENGINE_UNKNOWN",
                f"there is no engine {name[:80]!r} here; there are {', '.join(self.engines)}",
                kind=ErrorKind.INVALID_ARGUMENT,
            ) from None


def _in_use(record: InstanceRecord, remedy: str) -> FailedPreconditionError:
    return FailedPreconditionError("INSTANCE_IN_USE", "a VM is attached to the instance", subject=record.name, remedy=remedy)


def _refused(record: InstanceRecord) -> Loss:
    return Loss(REASON, MESSAGE, remedy("snapshots").replace("NAME", record.name))
