"""Workers that wait for whatever instance wakes first: forked, behind their wall, and connected to this daemon already."""

from __future__ import annotations

import asyncio
import functools
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from vtpm.engine.committer import Channel, Committer
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.engine.worker_link import WorkerLink
from vtpm.errors import VtpmError
from vtpm.log import SourceLog

log: Final = structlog.get_logger("vtpm.engine")
_lines: Final = SourceLog(log)

_WANTED: Final = 4
# A fork would take the core from a guest that waits for its TPM.
_REFILL_S: Final = 0.02
_GIVEN_RETRY_S: Final = 0.005
_GIVEN_TRIES: Final = 1000
Request = Callable[[pb.HostRequest, Sequence[int]], Awaitable[pb.HostReply]]


@dataclass(slots=True)
class Ready:
    """A stocked worker, as the daemon holds it."""

    pid: int
    link: WorkerLink
    channel: Channel


class Stock:
    """Keeps some of them. `request` asks the engine host. Used from the event loop only."""

    def __init__(self, committer: Committer, request: Request, *, store_timeout_s: float) -> None:
        self._committer = committer
        self._request = request
        self._store_timeout_s = store_timeout_s
        self._ending: set[asyncio.Task[None]] = set()
        self._ready: dict[int, Ready] = {}
        self._filling: asyncio.Task[None] | None = None
        self._open = True

    def fill(self) -> None:
        """Bring the stock up to what is wanted, in the background."""
        if self._open and self._filling is None and len(self._ready) < _WANTED:
            self._filling = asyncio.get_running_loop().create_task(self._fill())
            self._filling.add_done_callback(self._filled)

    def _filled(self, task: asyncio.Task[None]) -> None:
        self._filling = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("engine.stock_failed", error=type(error).__name__)
        elif not task.cancelled():
            self.fill()

    async def _fill(self) -> None:
        operations, theirs = socket.socketpair()
        commits, also_theirs = socket.socketpair()
        try:
            with theirs, also_theirs:
                fds = [theirs.fileno(), also_theirs.fileno()]
                pid = (await self._request(pb.HostRequest(stock=pb.Stock()), fds)).pid
            nobody = uuid.UUID(int=0)
            link = await WorkerLink.open(nobody, operations, self._store_timeout_s)
        except BaseException:
            operations.close()
            commits.close()
            raise
        link.on_violation = functools.partial(self._misbehaved, pid)
        self._keep(Ready(pid, link, self._committer.add(nobody, 0, commits, link.misbehaved_elsewhere)))

    def _misbehaved(self, pid: int, violation: ViolationError) -> None:
        """One that has no instance yet has sent what no worker sends."""
        _lines.error("stock", "engine.worker_misbehaved", pid=pid, violation=violation.code, message=violation.text)
        task = asyncio.get_running_loop().create_task(self._kill(pid))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _kill(self, pid: int) -> None:
        try:
            await self._request(pb.HostRequest(kill=pb.Kill(pid=pid)), ())
        except VtpmError as error:
            _lines.warning("stock", "engine.stock_failed", error=error.reason)

    def take(self, pid: int = 0) -> Ready | None:
        """Return a stocked worker, that of a process id or any; None if there is none. Another takes its place."""
        found = self._ready.pop(pid or next(iter(self._ready), 0), None)
        asyncio.get_running_loop().call_later(_REFILL_S, self.fill)
        if found is not None:
            found.link.on_lost = lambda: None
        return found

    def put_back(self, ready: Ready) -> None:
        """A worker that was taken and is not needed, or that the engine host has given to somebody else meanwhile."""
        if not ready.link.gone.is_set():
            self._keep(ready)

    def _keep(self, ready: Ready) -> None:
        self._ready[ready.pid] = ready
        ready.link.on_lost = lambda: self._ready.pop(ready.pid, None)

    async def given(self, pid: int, is_dead: Callable[[], bool]) -> Ready | None:
        """Return the stocked worker that the engine host has given an instance; None if it has died.

        This end of it may not be open yet, or be in the hands of somebody who is just about to be refused.
        """
        for _ in range(_GIVEN_TRIES):
            if pid in self._ready:
                return self.take(pid)
            if is_dead():
                break
            await asyncio.sleep(_GIVEN_RETRY_S)
        return None

    def bind(self, ready: Ready, instance: uuid.UUID, epoch: int) -> WorkerLink:
        """Make a stocked worker that of an instance: from now on its commits are that instance's."""
        ready.channel.instance, ready.channel.epoch = instance, epoch
        ready.link.instance, ready.link.commits = instance, ready.channel
        return ready.link

    async def dismiss(self) -> None:
        """End what is stocked, and stock nothing until `reopen`."""
        self._open = False
        self.clear()
        try:
            await self._request(pb.HostRequest(dismiss=pb.Dismiss()), ())
        except VtpmError as error:
            log.warning("engine.stock_failed", error=error.reason)

    def reopen(self) -> None:
        """Stock again."""
        self._open = True
        self.fill()

    def clear(self) -> None:
        """Let go of what is stocked; the engine host ends it."""
        if self._filling is not None:
            self._filling.cancel()
        for ready in self._ready.values():
            ready.link.on_lost = lambda: None
            ready.link.close()
        self._ready.clear()
