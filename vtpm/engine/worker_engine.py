"""The engines behind the engine host: libtpms and tpm_server, each with a worker process for each running instance."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from vtpm.engine.identity import Certify, ExtraKey, Recertify
from vtpm.engine.interface import (
    EngineCapabilities,
    EngineEvents,
    Listeners,
    Manufactured,
    Parked,
    PowerOn,
    Recovered,
    Thaw,
)
from vtpm.engine.software import LIBTPMS, TPM_SERVER
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker_link import WorkerLink
from vtpm.engine.workers import Workers
from vtpm.errors import EngineError, ErrorKind
from vtpm.store.model import ProfileRecord, SealedState


class WorkerEngine:
    """Implements vtpm.engine.interface.Engine: the workers of one engine.

    `program` is what the engine runs, a path or a name on PATH, and `hidden` the directories that are hidden from it; None for
    an engine that is a library.
    """

    def __init__(
        self, name: str, workers: Workers, *, hibernation: bool, program: str | None = None, hidden: Sequence[Path] = ()
    ) -> None:
        self._name = name
        self._workers = workers
        self._hibernation = hibernation
        self._program = program
        self._hidden = [str(path) for path in hidden]
        self._events: EngineEvents | None = None

    @property
    def capabilities(self) -> EngineCapabilities:
        """See Engine."""
        available = self._workers.serves(self._name) and (self._program is None or shutil.which(self._program) is not None)
        # A program does not tell its version.
        version = self._workers.libtpms_version if self._program is None else ""
        return EngineCapabilities(self._name, version, hibernation=self._hibernation, available=available)

    async def start(self, events: EngineEvents) -> Recovered:
        """See Engine."""
        self._events = events
        return await self._workers.recover(self._name, events)

    def _worker(self) -> pb.Spawn:
        order = pb.Spawn(engine=self._name, hidden=self._hidden)
        if self._program is not None:
            path = shutil.which(self._program)
            if path is None:
                raise EngineError(
                    "ENGINE_UNAVAILABLE",
                    f"the engine {self._name} is not available: there is no program {self._program!r}",
                    remedy="install ibmswtpm2 and name its program by the setting tpm_server_path",
                    # Not UNAVAILABLE: a retry won't help.
                    kind=ErrorKind.UNIMPLEMENTED,
                )
            order.program = str(Path(path).absolute())
        return order

    async def manufacture(
        self,
        instance: uuid.UUID,
        profile: ProfileRecord,
        data_key: bytes,
        *,
        certify: Certify | None = None,
        extra_keys: Sequence[ExtraKey] = (),
        nice: int = 0,
    ) -> Manufactured:
        """See Engine."""
        worker = self._worker()
        worker.nice = nice
        return await self._workers.manufacture(worker, instance, profile, data_key, certify=certify, extra_keys=extra_keys)

    async def reprovision(self, instance: uuid.UUID, state: SealedState, data_key: bytes, certify: Recertify) -> SealedState:
        """See Engine."""
        return await self._workers.reprovision(self._worker(), instance, state, data_key, certify)

    async def power_on(self, order: PowerOn) -> WorkerLink:
        """See Engine."""
        assert self._events is not None
        return await self._workers.power_on(self._worker(), order, self._events)

    async def thaw(self, order: Thaw) -> WorkerLink:
        """See Engine."""
        assert self._events is not None
        return await self._workers.sleepers.thaw(order, self._events)

    async def park(self, parked: Parked, listeners: Listeners) -> None:
        """See Engine."""
        assert self._events is not None
        await self._workers.sleepers.park(self._name, parked, listeners, self._events)

    async def forget(self, instance: uuid.UUID) -> None:
        """See Engine."""
        await self._workers.sleepers.forget(instance)

    async def hold(self) -> None:
        """See Engine."""
        await self._workers.sleepers.stock.dismiss()

    def release(self) -> None:
        """See Engine."""
        self._workers.sleepers.stock.reopen()

    async def close(self) -> None:
        """See Engine."""
        await self._workers.close()


def worker_engines(workers: Workers, *, tpm_server_path: str, hidden: Sequence[Path]) -> dict[str, WorkerEngine]:
    """Return the engines by their names; what is in `hidden` stays hidden from programs."""
    return {
        LIBTPMS: WorkerEngine(LIBTPMS, workers, hibernation=True),
        TPM_SERVER: WorkerEngine(TPM_SERVER, workers, hibernation=False, program=tpm_server_path, hidden=hidden),
    }
