"""A TPM that may be asleep: each call wakes it, and one that its worker's hibernation cut off is made again.

A worker that hibernates serves no request that it has not answered, so that asking again never does a thing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from vtpm.engine.events import Origin
from vtpm.engine.identity import Challenge, TouchedKeys
from vtpm.engine.interface import MeasuredLog, PcrValue, PcrValues, Quoted, RunningTpm
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError
from vtpm.store.model import KeyRecord
from vtpm.tpm.pcr import PcrSelection
from vtpm.tpm.ptm import ControlCommand

_T = TypeVar("_T")
# The worker's end and the word of how it ended come on two ways.
_END_TIMEOUT_S: Final = 5.0
_LOST: Final = ("TPM_LOST", "ENGINE_HOST_REFUSED")


class WakefulTpm:
    """Implements vtpm.engine.interface.RunningTpm. `thaw` brings the TPM back; without a `tpm` it is asleep from the start.

    `attached` says whether a VM's control connection waits with it. Used from the event loop only.
    """

    def __init__(self, tpm: RunningTpm | None, thaw: Callable[[], Awaitable[RunningTpm]], *, attached: bool = False) -> None:
        self._tpm = tpm
        self._thaw = thaw
        self._thawing: asyncio.Task[RunningTpm] | None = None
        self._attached = attached
        self._left = asyncio.Event()
        self._ended = False
        # While it is stopped: it wakes for an orderly end, or not at all.
        self.stopping = False

    @property
    def asleep(self) -> bool:
        """Whether no worker runs it."""
        return self._tpm is None

    @property
    def attached(self) -> bool:
        """Of a TPM that is asleep: whether a VM's control connection waits with it."""
        return self._attached

    def woke(self, tpm: RunningTpm) -> None:
        """It runs; nobody had to thaw it."""
        self._tpm = tpm

    def fell_asleep(self, *, attached: bool) -> None:
        """Its worker has hibernated."""
        self._tpm, self._attached = None, attached
        self._left.set()

    def end(self) -> None:
        """It is gone for good."""
        self._ended = True
        self._left.set()

    async def awake(self) -> RunningTpm:
        """Wake it, if it is asleep; whoever wants it meanwhile waits for the same."""
        if self._tpm is not None:
            return self._tpm
        if self._thawing is None:
            self._thawing = asyncio.ensure_future(self._wake())
            self._thawing.add_done_callback(self._woken)
        return await asyncio.shield(self._thawing)

    async def _wake(self) -> RunningTpm:
        self._left = asyncio.Event()
        tpm = await self._thaw()
        if self._ended:
            raise EngineError("TPM_LOST", "the instance was powered off while its TPM woke")
        # What workers left that died on the way does not count for this one.
        self._left = asyncio.Event()
        self._tpm = tpm
        return tpm

    def _woken(self, task: asyncio.Task[RunningTpm]) -> None:
        self._thawing = None
        # Whoever waits hears of an error; if nobody does, it was logged where it happened.
        if not task.cancelled():
            task.exception()

    async def asleep_again(self) -> bool:
        """While it is being thawed and its worker was lost: whether another worker may try."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), _END_TIMEOUT_S)
        again = self._left.is_set() and not self._ended
        self._left.clear()
        return again

    async def _hibernated(self, tpm: RunningTpm) -> bool:
        """Whether `tpm`, which does not answer any more, has hibernated."""
        if self._tpm is tpm:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), _END_TIMEOUT_S)
        return self._tpm is not tpm and not self._ended

    async def _call(self, operation: Callable[[RunningTpm], Awaitable[_T]]) -> _T:
        while True:
            tpm = await self.awake()
            try:
                return await operation(tpm)
            except EngineError as error:
                if error.reason not in _LOST or not await self._hibernated(tpm):
                    raise

    async def execute(self, command: bytes, locality: int) -> bytes:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.execute(command, locality))

    async def read_pcrs(self, selections: Sequence[PcrSelection]) -> PcrValues:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.read_pcrs(selections))

    async def quote(self, selections: Sequence[PcrSelection], nonce: bytes) -> Quoted:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.quote(selections, nonce))

    async def measure(self, pcr: int, data: bytes, event_type: int, event_data: bytes, origin: Origin) -> tuple[PcrValue, ...]:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.measure(pcr, data, event_type, event_data, origin))

    async def event_log(self) -> MeasuredLog:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.event_log())

    async def reset(self, *, startup_clear: bool) -> None:
        """See RunningTpm."""
        await self._call(lambda tpm: tpm.reset(startup_clear=startup_clear))

    async def hash_sequence(self, command: ControlCommand, data: bytes) -> None:
        """See RunningTpm."""
        await self._call(lambda tpm: tpm.hash_sequence(command, data))

    async def keys(self) -> tuple[tuple[KeyRecord, ...], tuple[str, ...]]:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.keys())

    async def identity(self) -> TouchedKeys:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.identity())

    async def forget_identity(self, generation: int) -> None:
        """See RunningTpm."""
        await self._call(lambda tpm: tpm.forget_identity(generation))

    async def write_nv(self, index: int, data: bytes) -> None:
        """See RunningTpm."""
        await self._call(lambda tpm: tpm.write_nv(index, data))

    async def read_nv(self, index: int, *, secret_auth: bool = False) -> bytes:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.read_nv(index, secret_auth=secret_auth))

    async def prove(self, challenges: Sequence[Challenge]) -> list[bytes]:
        """See RunningTpm."""
        return await self._call(lambda tpm: tpm.prove(challenges))

    def unless_asleep(self) -> RunningTpm | None:
        """Return the TPM as it runs now, for who must not wake it; None if it is asleep."""
        return self._tpm

    async def status(self, *, counts: bool = False) -> pb.Status:
        """See RunningTpm; nobody is woken for it."""
        tpm = self._tpm
        if tpm is None and self._thawing is not None:
            tpm = await self.awake()
        if tpm is not None:
            try:
                return await tpm.status(counts=counts)
            except EngineError as error:
                if error.reason not in _LOST or not await self._hibernated(tpm):
                    raise
        return pb.Status(attached=self._attached, loaded=True)

    async def attach(self, connection: socket.socket) -> None:
        """See RunningTpm. `connection` must stay open until this returns."""
        while True:
            await self._call(lambda tpm: tpm.attach(connection))
            # An answer says that the worker has the connection, or finds it before it can hibernate.
            try:
                status = await self.status()
            except EngineError:
                if self._ended:
                    # It came, and went.
                    return
                raise
            if status.attached or self._tpm is not None:
                return

    async def hibernate(self) -> None:
        """See RunningTpm."""
        tpm = self._tpm
        if tpm is None and self._thawing is not None:
            tpm = await self.awake()
        if tpm is None:
            return
        try:
            await tpm.hibernate()
        except EngineError as error:
            if error.reason not in _LOST or not await self._hibernated(tpm):
                raise

    async def stop(self) -> None:
        """See RunningTpm. It is woken for an orderly end; if that fails, it is asleep still."""
        self.stopping = True
        try:
            while True:
                tpm = await self.awake()
                await tpm.stop()
                if self._tpm is tpm or self._ended:
                    return
        finally:
            self.stopping = False
