"""The daemon's view of the engine host and its workers: a process for each running instance, whatever its engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from vtpm.engine.committer import Committer
from vtpm.engine.exits import EXIT_COMMIT_REFUSED, EXIT_COMMIT_TIMEOUT, EXIT_POWERED_OFF, EXIT_STOPPED
from vtpm.engine.host import PROTOCOL
from vtpm.engine.identity import Certify, ExtraKey, FreshTpm, key_records, nv_entries
from vtpm.engine.interface import Adopted, EngineEvents, Loss, Manufactured, PowerOn, Recovered
from vtpm.engine.link import HostLink, WorkerLink
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, ErrorKind, VtpmError
from vtpm.store.model import ProfileRecord, SealedState
from vtpm.tpm.nv import NvEntry

log: Final = structlog.get_logger("vtpm.engine")

_RESET: Final = "reset the instance together with its VM: vtpm instance reset {}"


class Workers:
    """The engine host and its workers, of all engines. `memory_limit` in bytes bounds each worker's data segment."""

    def __init__(
        self, runtime_dir: Path, committer: Committer, *, memory_limit: int, commit_timeout_s: float, command_timeout_s: float
    ) -> None:
        self._socket_path = runtime_dir / "engine.sock"
        self._log_path = runtime_dir / "engine-host.log"
        self._committer = committer
        self._memory_limit = memory_limit
        self._commit_timeout_s = commit_timeout_s
        self._command_timeout_s = command_timeout_s
        self._host: HostLink | None = None
        self._connecting = asyncio.Lock()
        self._found: list[pb.RunningWorker] = []
        self._ended: list[pb.WorkerExited] = []
        self._links: dict[tuple[str, int], tuple[WorkerLink, EngineEvents]] = {}
        self._stopping: set[tuple[str, int]] = set()
        self._exits: dict[tuple[str, int], asyncio.Future[int]] = {}
        self._engines: Sequence[str] = ()
        self.libtpms_version = ""
        self.host_pid = 0

    def serves(self, engine: str) -> bool:
        """Whether the engine host is there and can fork workers of `engine`."""
        return self._host is not None and engine in self._engines

    # ---- the engine host -------------------------------------------------------------------------------------------------

    async def recover(self, engine: str, events: EngineEvents) -> Recovered:
        """Take over the workers of `engine` that ran on without a daemon."""
        await self._live_host()
        adopted = []
        for worker in self._found:
            if (worker.engine or LIBTPMS) != engine:
                continue
            try:
                adopted.append(await self._adopt(worker, events))
            except VtpmError as error:
                log.error("engine.adopt_failed", instance=worker.instance, reason=error.reason)
        powered_off = {(uuid.UUID(item.instance), item.epoch) for item in self._ended if item.status == EXIT_POWERED_OFF}
        return Recovered(adopted, frozenset(powered_off))

    async def _connect(self) -> None:
        self._host = await HostLink.connect(
            self._socket_path,
            memory_limit=self._memory_limit,
            log_path=self._log_path,
            on_exit=self._on_exit,
            on_lost=self._on_host_lost,
        )
        replies = await self._host.request(pb.HostRequest(hello=pb.Hello()))
        hello = replies[0][0].hello
        if hello.protocol != PROTOCOL:
            raise EngineError(
                "ENGINE_HOST_INCOMPATIBLE",
                f"the running engine host (version {hello.version}) speaks protocol {hello.protocol}, this daemon {PROTOCOL}",
                remedy="stop all instances with the daemon of that version, then start this one",
            )
        self._engines = tuple(hello.engines) or (LIBTPMS,)
        self.libtpms_version, self.host_pid = hello.engine_version, hello.pid
        found = [worker for reply, _ in replies for worker in reply.hello.workers]
        self._found = [worker for worker in found if "/" not in worker.instance]
        for worker in found:
            if "/" in worker.instance:
                # It was making or provisioning a TPM for a daemon that is gone: nobody waits for that any more.
                await self._host.request(pb.HostRequest(kill=pb.Kill(instance=worker.instance)))
        self._ended = [exited for reply, _ in replies for exited in reply.hello.exited if "/" not in exited.instance]
        log.info("engine.host_connected", pid=hello.pid, workers=len(self._found))

    async def _live_host(self) -> HostLink:
        async with self._connecting:
            if self._host is None:
                await self._connect()
            assert self._host is not None
            return self._host

    def _on_host_lost(self) -> None:
        log.error("engine.host_lost", pid=self.host_pid)
        self._host = None
        for waiter in self._exits.values():
            if not waiter.done():
                waiter.set_result(-signal.SIGKILL)
        self._exits.clear()
        # Workers die with their host (PDEATHSIG), and their volatile state with them.
        for instance, epoch in list(self._links):
            self._report(instance, epoch, "ENGINE_HOST_LOST", "the engine host died; the TPM's volatile state is lost")

    def _on_exit(self, exited: pb.WorkerExited) -> None:
        key = (exited.instance, exited.epoch)
        waiter = self._exits.pop(key, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(exited.status)
        if key not in self._links:
            return
        match exited.status:
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
        _, events = self._links[instance, epoch]
        self._forget((instance, epoch))
        events.ended(uuid.UUID(instance), epoch, loss)

    def _forget(self, key: tuple[str, int]) -> None:
        self._stopping.discard(key)
        link, _ = self._links.pop(key)
        link.close()

    # ---- workers ---------------------------------------------------------------------------------------------------------

    async def _adopt(self, worker: pb.RunningWorker, events: EngineEvents) -> Adopted:
        instance = uuid.UUID(worker.instance)
        host = await self._live_host()
        with _SocketPairs() as pairs:
            await host.request(pb.HostRequest(attach=pb.Attach(instance=worker.instance)), pairs.worker_ends)
            self._committer.add(instance, worker.epoch, pairs.commits)
            link = await WorkerLink.open(instance, pairs.operations)
        self._hold(link, (worker.instance, worker.epoch), events)
        return Adopted(instance, worker.epoch, link)

    def _hold(self, link: WorkerLink, key: tuple[str, int], events: EngineEvents) -> None:
        self._links[key] = (link, events)
        link.stopper = functools.partial(self._stop_worker, link, key)
        link.attacher = functools.partial(self._attach_to, key[0])
        link.on_imported = functools.partial(events.imported, uuid.UUID(key[0]), key[1])
        link.on_identity_touched = functools.partial(events.identity_touched, uuid.UUID(key[0]), key[1])

    async def _attach_to(self, instance: str, connection: socket.socket) -> None:
        host = await self._live_host()
        await host.request(pb.HostRequest(connect=pb.Connect(instance=instance)), [connection.fileno()])

    async def _spawn(self, order: pb.Spawn, instance: uuid.UUID, listeners: list[socket.socket]) -> WorkerLink:
        host = await self._live_host()
        if order.engine not in self._engines:
            raise EngineError(
                "ENGINE_UNAVAILABLE",
                f"the running engine host is of an older version, which has no engine {order.engine}",
                remedy="stop all instances, then restart the daemon",
                kind=ErrorKind.UNIMPLEMENTED,
            )
        order.listeners = bool(listeners)
        with _SocketPairs() as pairs:
            fds = [*pairs.worker_ends, *(listener.fileno() for listener in listeners)]
            await host.request(pb.HostRequest(spawn=order), fds)
            self._committer.add(instance, order.epoch, pairs.commits)
            return await WorkerLink.open(instance, pairs.operations)

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
        # Under a name of its own: the instance may be started while this worker is still on its way out.
        worker.instance = f"{instance}/manufacture"
        link = await self._spawn(worker, instance, [])
        try:
            order = pb.Manufacture(
                data_key=data_key,
                instance=instance.bytes,
                ek_algorithms=profile.ek_algorithms,
                ak_algorithm=profile.ak_algorithm,
                pcr_banks=profile.pcr_banks,
                hold=certify is not None,
                extra_keys=[pb.ExtraKey(algorithm=key.algorithm, handle=key.handle) for key in extra_keys],
            )
            made = (await link.request(pb.WorkerRequest(manufacture=order))).manufactured
            sealed = made.sealed
            if certify is not None:
                entries = nv_entries(await certify(FreshTpm(link.request, made)))
                provision = pb.Provision(data_key=data_key, instance=instance.bytes, entries=entries)
                sealed = (await link.request(pb.WorkerRequest(provision=provision))).provisioned.sealed
        finally:
            await link.stop()
        return Manufactured(sealed, key_records(made.keys))

    async def reprovision(
        self, worker: pb.Spawn, instance: uuid.UUID, state: SealedState, data_key: bytes, entries: Sequence[NvEntry]
    ) -> SealedState:
        """See Engine; `worker` says which engine."""
        worker.instance = f"{instance}/provision"
        link = await self._spawn(worker, instance, [])
        try:
            order = pb.Reprovision(
                data_key=data_key,
                place=pb.Place(instance=instance.bytes, epoch=state.epoch, version=state.version),
                sealed=state.blob,
                entries=nv_entries(entries),
            )
            sealed = (await link.request(pb.WorkerRequest(reprovision=order))).provisioned.sealed
        finally:
            await link.stop()
        return SealedState(state.epoch, state.version + 1, sealed)

    async def power_on(self, worker: pb.Spawn, order: PowerOn, events: EngineEvents) -> WorkerLink:
        """See Engine; `worker` says which engine."""
        key = worker.instance, worker.epoch = str(order.instance), order.epoch
        listeners = [order.listeners.data, order.listeners.control] if order.listeners else []
        link = await self._spawn(worker, order.instance, listeners)
        self._hold(link, key, events)
        load = pb.Load(
            data_key=order.data_key,
            place=pb.Place(instance=order.instance.bytes, epoch=order.state.epoch, version=order.state.version),
            sealed=order.state.blob,
            epoch=order.epoch,
            startup_clear=order.startup_clear,
            commit_timeout_ms=int(self._commit_timeout_s * 1000),
            without_init=order.without_init,
            ak_algorithm=order.ak_algorithm,
        )
        try:
            await link.request(pb.WorkerRequest(load=load))
        except BaseException:
            await link.stop()
            raise
        return link

    async def _stop_worker(self, link: WorkerLink, key: tuple[str, int]) -> None:
        """Stop a worker: ask it, then kill it; return when it is gone."""
        if key not in self._links:
            return
        self._stopping.add(key)
        exited = self._exits.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            await asyncio.wait_for(link.ask_to_stop(), self._command_timeout_s)
        except TimeoutError:
            log.warning("engine.worker_killed", instance=key[0], epoch=key[1])
            host = await self._live_host()
            await host.request(pb.HostRequest(kill=pb.Kill(instance=key[0])))
        status = await exited
        if status not in (EXIT_STOPPED, EXIT_POWERED_OFF, -signal.SIGKILL):
            log.warning("engine.worker_ended", instance=key[0], epoch=key[1], status=status)

    async def close(self) -> None:
        """Let go of everything; once is enough for all engines."""
        for link, _ in self._links.values():
            link.close()
        self._links.clear()
        if self._host is not None:
            self._host.close()
            self._host = None


class _SocketPairs:
    """Two socket pairs for one worker; what was not taken over is closed on exit."""

    def __init__(self) -> None:
        self.operations, self._operations_end = socket.socketpair()
        self.commits, self._commits_end = socket.socketpair()

    @property
    def worker_ends(self) -> list[int]:
        return [self._operations_end.fileno(), self._commits_end.fileno()]

    def __enter__(self) -> _SocketPairs:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._operations_end.close()
        self._commits_end.close()
        if kind is not None:
            with contextlib.suppress(OSError):
                self.operations.close()
                self.commits.close()
