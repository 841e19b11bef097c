"""The daemon's view of the engine host and its workers: a process for each running instance, whatever its engine."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Final

import structlog

from vtpm.engine import descriptors
from vtpm.engine.belt import Belt
from vtpm.engine.committer import Committer
from vtpm.engine.exits import (
    EXIT_COMMIT_REFUSED,
    EXIT_COMMIT_TIMEOUT,
    EXIT_HIBERNATED,
    EXIT_POWERED_OFF,
    EXIT_STOPPED,
)
from vtpm.engine.host import PROTOCOL
from vtpm.engine.identity import Certify, ExtraKey, FreshTpm, HeldTpm, Recertify, key_records, nv_entries
from vtpm.engine.interface import (
    Adopted,
    EngineEvents,
    Loss,
    Manufactured,
    PowerOn,
    Recovered,
)
from vtpm.engine.limits import InstanceLimits
from vtpm.engine.link import HostLink
from vtpm.engine.pairs import SocketPairs
from vtpm.engine.replacement import FIRST_REPLACEABLE, empty
from vtpm.engine.rescue import Judge, host_loss
from vtpm.engine.sleepers import Sleepers
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.engine.worker_link import MISBEHAVED_REMEDY, WorkerLink
from vtpm.errors import EngineError, ErrorKind, VtpmError
from vtpm.log import SourceLog
from vtpm.store.model import ProfileRecord, SealedState

log: Final = structlog.get_logger("vtpm.engine")
_lines: Final = SourceLog(log)

# A worker that says that it has stopped ends at once.
_END_TIMEOUT_S: Final = 2.0
# More than workers wait ahead, each of which may be dead.
_MAKERS: Final = 4
_CONNECTS: Final = 5
_CONNECT_PAUSE_S: Final = 0.05
_RESET: Final = "reset the instance together with its VM: vtpm instance reset {}"


class Workers:
    """The engine host and its workers, of all engines. `memory_limit` in bytes bounds each worker's data segment."""

    def __init__(
        self,
        runtime_dir: Path,
        committer: Committer,
        *,
        memory_limit: int,
        commit_timeout_s: float,
        command_timeout_s: float,
        limits: InstanceLimits,
        belt: Belt,
        judge: Judge,
        stored: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._socket_path = runtime_dir / "engine.sock"
        self._log_path = runtime_dir / "engine-host.log"
        self._committer = committer
        self._memory_limit = memory_limit
        self._commit_timeout_s = commit_timeout_s
        self._command_timeout_s = command_timeout_s
        self._limits = limits
        self._host: HostLink | None = None
        self._connecting = asyncio.Lock()
        self._found: list[pb.RunningWorker] = []
        self._ended: list[pb.WorkerExited] = []
        self.links: dict[tuple[str, int], tuple[WorkerLink, EngineEvents]] = {}
        self.sleepers = Sleepers(
            self, committer, commit_timeout_s=commit_timeout_s, limits=limits, belt=belt, judge=judge, stored=stored
        )
        self._stopping: set[tuple[str, int]] = set()
        self._exits: dict[tuple[str, int], asyncio.Future[int]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._engines: Sequence[str] = ()
        self.libtpms_version = ""
        self.host_pid = 0

    def serves(self, engine: str) -> bool:
        """Whether the engine host is there and can fork workers of `engine`."""
        return self._host is not None and engine in self._engines

    # ---- the engine host -------------------------------------------------------------------------------------------------

    async def recover(self, engine: str, events: EngineEvents) -> Recovered:
        """Take over the workers of `engine` that ran on without a daemon."""
        # Before anything of the engine host is heard: what runs on does not wait with its end until it is taken over.
        self.sleepers.unclaimed = events
        await self.live_host()
        adopted = []
        for worker in list(self._found):
            if (worker.engine or LIBTPMS) != engine or self._has_left(worker):
                continue
            try:
                adopted.append(await self._adopt(worker, events))
            except VtpmError as error:
                log.error("engine.adopt_failed", instance=worker.instance, reason=error.reason)
            except Exception as error:  # noqa: BLE001  # the others are adopted all the same
                log.error("engine.adopt_failed", instance=worker.instance, reason="INTERNAL", error=type(error).__name__)
        parked = await self.sleepers.claim(engine, events, {worker.instance for worker in self._found})
        powered_off = {(uuid.UUID(item.instance), item.epoch) for item in self._ended if item.status == EXIT_POWERED_OFF}
        return Recovered(adopted, frozenset(powered_off), parked)

    def _has_left(self, worker: pb.RunningWorker) -> bool:
        """Whether a worker has ended since the engine host told of it."""
        key = worker.instance, worker.epoch
        return any((item.instance, item.epoch) == key for items in (self.sleepers.found, self._ended) for item in items)

    async def _connect(self) -> None:
        replies = await self._greet()
        hello = replies[0][0].hello
        if hello.protocol != PROTOCOL:
            await self._replace(hello)
            replies = await self._greet()
            hello = replies[0][0].hello
        self._engines = tuple(hello.engines) or (LIBTPMS,)
        self.libtpms_version, self.host_pid = hello.engine_version, hello.pid
        running = [worker for reply, _ in replies for worker in reply.hello.workers]
        self._found = [worker for worker in running if "/" not in worker.instance]
        for worker in running:
            if "/" in worker.instance:
                # It was making a TPM for a daemon that is gone: nobody has it, and nobody will ask for it.
                self._kill(worker.instance)
        self.sleepers.found = [item for reply, _ in replies for item in reply.hello.parked]
        self._ended = [exited for reply, _ in replies for exited in reply.hello.exited if "/" not in exited.instance]
        log.info("engine.host_connected", pid=hello.pid, workers=len(self._found), hibernated=len(self.sleepers.found))
        self.sleepers.stock.fill()

    async def _linked(self) -> HostLink:
        if self._host is None:
            self._host = await HostLink.connect(
                self._socket_path, self, memory_limit=self._memory_limit, log_path=self._log_path
            )
        return self._host

    async def _greet(self) -> list[tuple[pb.HostReply, list[int]]]:
        return await (await self._linked()).request(pb.HostRequest(hello=pb.Hello()))

    async def _replace(self, hello: pb.HelloReply) -> None:
        """Put an engine host of this version in the place of one of another protocol."""
        assert self._host is not None
        if hello.protocol < FIRST_REPLACEABLE:
            raise EngineError(
                "ENGINE_HOST_INCOMPATIBLE",
                f"the running engine host (version {hello.version}) speaks protocol {hello.protocol}, this daemon {PROTOCOL}",
                remedy="stop all instances with the daemon of that version, then start this one",
            )
        old = self._host
        taken = await empty(old, self._committer, hello)
        old.close()
        self._host = None
        host = await self._linked()
        for about, fds in taken:
            try:
                await host.request(pb.HostRequest(adopt=pb.Adopt(parked=about)), fds)
            finally:
                descriptors.close_all(fds)

    async def ask_host(self, request: pb.HostRequest, fds: Sequence[int] = ()) -> pb.HostReply:
        """Ask the engine host something that has one reply."""
        host = await self.live_host()
        return (await host.request(request, fds))[-1][0]

    async def ask_host_for_descriptors(self, request: pb.HostRequest) -> tuple[pb.HostReply, list[int]]:
        """Ask it something whose one reply brings descriptors, which are the caller's then."""
        host = await self.live_host()
        return (await host.request(request))[-1]

    async def live_host(self) -> HostLink:
        """Return the line to the engine host, which is started if there is none."""
        async with self._connecting:
            for attempt in range(_CONNECTS):
                try:
                    if self._host is None:
                        await self._connect()
                except EngineError as error:
                    # One that is just ending may still be there to connect to.
                    if error.reason != "ENGINE_HOST_LOST" or attempt == _CONNECTS - 1:
                        raise
                    await asyncio.sleep(_CONNECT_PAUSE_S)
                # It may have ended as soon as it had answered.
                if self._host is not None:
                    return self._host
        raise EngineError("ENGINE_HOST_LOST", "engine hosts end as soon as they begin", remedy="see engine-host.log")

    def on_lost(self) -> None:
        """See HostEvents."""
        log.error("engine.host_lost", pid=self.host_pid)
        self._host = None
        self._found.clear()
        for waiter in self._exits.values():
            if not waiter.done():
                waiter.set_result(-signal.SIGKILL)
        self._exits.clear()
        # Workers die with their host (PDEATHSIG), and their volatile state with them.
        thawing = {}
        for key, (_, events) in list(self.links.items()):
            if key in self.sleepers.belt:
                self._forget(key)
                thawing[key] = events
            else:
                self._end(*key, host_loss(key[0]))
        self.sleepers.host_lost(thawing)

    def on_wake(self, wake: pb.Wake) -> None:
        """See HostEvents."""
        self.sleepers.on_wake(wake)

    def on_exit(self, exited: pb.WorkerExited, fds: list[int]) -> None:
        """See HostEvents."""
        if exited.HasField("parked"):
            self.sleepers.belt.keep(exited.parked, fds)
        else:
            descriptors.close_all(fds)
        key = (exited.instance, exited.epoch)
        waiter = self._exits.pop(key, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(exited.status)
        if key not in self.links:
            if not self.sleepers.took(exited) and any((worker.instance, worker.epoch) == key for worker in self._found):
                # Before it was taken over.
                self._ended.append(exited)
            return
        if exited.misbehaved and self.links[key][0].violation is None:
            self.links[key][0].misbehaved(ViolationError(*_code_and_text(exited.misbehaved)))
        violation = self.links[key][0].violation
        match exited.status:
            case _ if violation is not None and key not in self._stopping:
                if exited.HasField("parked"):
                    self._later(self._ask_quietly(pb.HostRequest(forget=pb.Forget(instance=exited.instance))))
                message = f"the worker broke the protocol ({violation.code}: {violation.text}) and was ended; "
                message += "the TPM's volatile state is lost"
                self._report(*key, "WORKER_MISBEHAVED", message, MISBEHAVED_REMEDY.format(exited.instance))
            case _ if exited.HasField("parked"):
                # Hibernated, or dead before it went on from a snapshot.
                _, events = self.links[key]
                self._forget(key)
                self.sleepers.asleep(exited.parked, events)
            case _ if key in self._stopping:
                self._forget(key)
            case status if status == EXIT_POWERED_OFF:
                self._end(*key, None)
            case status if status == EXIT_COMMIT_REFUSED:
                self._report(
                    *key, "COMMIT_REFUSED", "another owner has taken the instance, or its row was changed", "see the log"
                )
            case status if status == EXIT_COMMIT_TIMEOUT:
                trouble = self._committer.trouble
                reason = trouble.reason if trouble else "COMMIT_TIMEOUT"
                remedy = f"{trouble.remedy}; then " if trouble else ""
                text = f"sealed state could not be made durable within {self._commit_timeout_s:g} s"
                self._report(*key, reason, text, remedy + _RESET.format(exited.instance))
            case status:
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                self._report(*key, "WORKER_LOST", f"the worker ended with {how}; the TPM's volatile state is lost")

    def _report(self, instance: str, epoch: int, reason: str, message: str, remedy: str = "") -> None:
        self._end(instance, epoch, Loss(reason, message, remedy or _RESET.format(instance)))

    def _end(self, instance: str, epoch: int, loss: Loss | None) -> None:
        _, events = self.links[instance, epoch]
        self._forget((instance, epoch))
        self.sleepers.belt.drop((instance, epoch))
        events.ended(uuid.UUID(instance), epoch, loss)

    def _forget(self, key: tuple[str, int]) -> None:
        self._stopping.discard(key)
        link, _ = self.links.pop(key)
        link.close()

    # ---- what no worker sends --------------------------------------------------------------------------------------------

    def _misbehaved(self, name: str, violation: ViolationError) -> None:
        """End the worker of that name, which has sent what none sends; its end says what becomes of its instance."""
        _lines.error(name, "engine.worker_misbehaved", instance=name, violation=violation.code, message=violation.text)
        self._kill(name)

    def _kill(self, name: str) -> None:
        self._later(self._ask_quietly(pb.HostRequest(kill=pb.Kill(instance=name))))

    async def _ask_quietly(self, request: pb.HostRequest) -> None:
        try:
            # Of an engine host that is gone nothing is wanted.
            if self._host is not None:
                await self._host.request(request)
        except EngineError as error:
            _lines.warning("host", "engine.host_request_failed", reason=error.reason, request=request.WhichOneof("body"))

    def _later(self, action: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(action)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # ---- workers ---------------------------------------------------------------------------------------------------------

    async def _adopt(self, worker: pb.RunningWorker, events: EngineEvents) -> Adopted:
        instance = uuid.UUID(worker.instance)
        key = worker.instance, worker.epoch
        host = await self.live_host()
        with SocketPairs() as pairs:
            link = await WorkerLink.open(instance, pairs.operations, self._commit_timeout_s)
            # Before it hears of this daemon: it may wait for one only to hibernate, and then it is gone at once.
            self.take_on(link, key, events)
            try:
                await host.request(pb.HostRequest(attach=pb.Attach(instance=worker.instance)), pairs.worker_ends)
            except VtpmError:
                if key in self.links:
                    self._forget(key)
                    raise
                # It has ended meanwhile, and `events` were told how.
            link.commits = self._committer.add(instance, worker.epoch, pairs.commits, link.misbehaved_elsewhere)
        return Adopted(instance, worker.epoch, link)

    def take_on(self, link: WorkerLink, key: tuple[str, int], events: EngineEvents) -> None:
        """Hold a worker of an instance; `events` hears of it."""
        self.links[key] = (link, events)
        link.stopper = functools.partial(self._stop_worker, link, key)
        link.attacher = functools.partial(self._attach_to, key[0])
        link.on_violation = functools.partial(self._misbehaved, key[0])
        link.on_imported = functools.partial(events.imported, uuid.UUID(key[0]), key[1])
        link.on_identity_touched = functools.partial(events.identity_touched, uuid.UUID(key[0]), key[1])

    async def _attach_to(self, instance: str, connection: socket.socket) -> None:
        host = await self.live_host()
        await host.request(pb.HostRequest(connect=pb.Connect(instance=instance)), [connection.fileno()])

    async def _spawn(self, order: pb.Spawn, instance: uuid.UUID, listeners: list[socket.socket]) -> WorkerLink:
        host = await self.live_host()
        if order.engine not in self._engines:
            raise EngineError(
                "ENGINE_UNAVAILABLE",
                f"the running engine host is of an older version, which has no engine {order.engine}",
                remedy="stop all instances, then restart the daemon",
                kind=ErrorKind.UNIMPLEMENTED,
            )
        order.listeners = bool(listeners)
        self.sleepers.belt.make_room()
        with SocketPairs() as pairs:
            fds = [*pairs.worker_ends, *(listener.fileno() for listener in listeners)]
            await host.request(pb.HostRequest(spawn=order), fds)
            link = await WorkerLink.open(instance, pairs.operations, self._commit_timeout_s)
            link.on_violation = functools.partial(self._misbehaved, order.instance)
            self._committer.add(instance, order.epoch, pairs.commits, link.misbehaved_elsewhere)
            return link

    async def _end_maker(self, link: WorkerLink, name: str) -> None:
        """End a worker that has no instance."""
        try:
            await asyncio.wait_for(link.ask_to_stop(), self._command_timeout_s)
        except TimeoutError:
            log.warning("engine.worker_killed", instance=name)
        # It says that it has stopped; whether it has is not asked.
        self._kill(name)
        link.close()

    async def manufacture(
        self,
        worker: pb.Spawn,
        instance: uuid.UUID,
        profile: ProfileRecord,
        data_key: bytes,
        *,
        certify: Certify | None,
        extra_keys: Sequence[ExtraKey],
    ) -> Manufactured:
        """See Engine; `worker` says which engine, and how nice it is."""
        order = pb.Manufacture(
            data_key=data_key,
            instance=instance.bytes,
            ek_algorithms=profile.ek_algorithms,
            ak_algorithm=profile.ak_algorithm,
            pcr_banks=profile.pcr_banks,
            hold=certify is not None,
            extra_keys=[pb.ExtraKey(algorithm=key.algorithm, handle=key.handle) for key in extra_keys],
        )
        link, made = await self._made(worker, instance, order)
        try:
            sealed = made.sealed
            if certify is not None:
                entries = nv_entries(await certify(FreshTpm(link.request, made)))
                provision = pb.Provision(data_key=data_key, instance=instance.bytes, entries=entries)
                sealed = (await link.request(pb.WorkerRequest(provision=provision))).provisioned.sealed
        finally:
            await self._end_maker(link, worker.instance)
        return Manufactured(sealed, key_records(made.keys))

    async def _made(self, worker: pb.Spawn, instance: uuid.UUID, order: pb.Manufacture) -> tuple[WorkerLink, pb.Manufactured]:
        """Have a TPM made; by another worker, if the first one dies."""
        for maker in range(_MAKERS):
            # Under a name of its own: the instance may be started while this worker is still on its way out.
            worker.instance = f"{instance}/manufacture-{maker}"
            link = await self._spawn(worker, instance, [])
            try:
                return link, (await link.request(pb.WorkerRequest(manufacture=order))).manufactured
            except BaseException as error:
                await self._end_maker(link, worker.instance)
                if not isinstance(error, EngineError) or error.reason != "TPM_LOST" or maker == _MAKERS - 1:
                    raise
                log.warning("engine.maker_lost", instance=str(instance))
        raise AssertionError("the last attempt returns or raises")

    async def reprovision(
        self, worker: pb.Spawn, instance: uuid.UUID, state: SealedState, data_key: bytes, certify: Recertify
    ) -> SealedState:
        """See Engine; `worker` says which engine."""
        worker.instance = f"{instance}/provision"
        link = await self._spawn(worker, instance, [])
        try:
            order = pb.Reprovision(
                data_key=data_key,
                place=pb.Place(instance=instance.bytes, epoch=state.epoch, version=state.version),
                sealed=state.blob,
            )
            await link.request(pb.WorkerRequest(reprovision=order))
            entries = nv_entries(await certify(HeldTpm(link.request)))
            place = pb.Place(instance=instance.bytes, epoch=state.epoch, version=state.version + 1)
            provision = pb.Provision(data_key=data_key, instance=instance.bytes, entries=entries, place=place)
            sealed = (await link.request(pb.WorkerRequest(provision=provision))).provisioned.sealed
        finally:
            await self._end_maker(link, worker.instance)
        return SealedState(state.epoch, state.version + 1, sealed)

    async def power_on(self, worker: pb.Spawn, order: PowerOn, events: EngineEvents) -> WorkerLink:
        """See Engine; `worker` says which engine."""
        key = worker.instance, worker.epoch = str(order.instance), order.epoch
        self.sleepers.belt.forget(worker.instance)
        listeners = [order.listeners.data, order.listeners.control] if order.listeners else []
        link = await self._spawn(worker, order.instance, listeners)
        self.take_on(link, key, events)
        load = pb.Load(
            data_key=order.data_key,
            place=pb.Place(instance=order.instance.bytes, epoch=order.state.epoch, version=order.state.version),
            sealed=order.state.blob,
            epoch=order.epoch,
            startup_clear=order.startup_clear,
            commit_timeout_ms=int(self._commit_timeout_s * 1000),
            without_init=order.without_init,
            ak_algorithm=order.ak_algorithm,
            idle_timeout_ms=int(order.idle_timeout_s * 1000),
        )
        self._limits.put_into(load)
        try:
            await link.request(pb.WorkerRequest(load=load))
        except BaseException:
            await link.stop()
            raise
        return link

    async def _stop_worker(self, link: WorkerLink, key: tuple[str, int]) -> None:
        """Stop a worker: ask it, then kill it; return when it is gone."""
        if key not in self.links:
            return
        self._stopping.add(key)
        exited = self._exits.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            # It may still have to wait for the store.
            await asyncio.wait_for(link.ask_to_stop(), self._command_timeout_s)
            ended, _ = await asyncio.wait((exited,), timeout=_END_TIMEOUT_S)
        except TimeoutError:
            ended = set()
        if not ended and key in self.links:
            log.warning("engine.worker_killed", instance=key[0], epoch=key[1])
            host = await self.live_host()
            await host.request(pb.HostRequest(kill=pb.Kill(instance=key[0])))
        try:
            status = await asyncio.wait_for(exited, self._command_timeout_s)
        except TimeoutError:
            # Its end was told before anybody here asked for it.
            log.warning("engine.worker_end_unknown", instance=key[0], epoch=key[1])
            return
        if status not in (EXIT_STOPPED, EXIT_POWERED_OFF, EXIT_HIBERNATED, -signal.SIGKILL):
            log.warning("engine.worker_ended", instance=key[0], epoch=key[1], status=status)

    async def close(self) -> None:
        """Let go of everything; once is enough for all engines."""
        for task in self._ending:
            task.cancel()
        for link, _ in self.links.values():
            link.close()
        self.links.clear()
        self.sleepers.close()
        if self._host is not None:
            self._host.close()
            self._host = None


def _code_and_text(misbehaved: str) -> tuple[str, str]:
    code, _, text = misbehaved.partition(": ")
    return code, text
