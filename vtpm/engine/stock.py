"""Workers that wait for whatever instance wakes first: forked, behind their wall, and connected to this daemon already."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from vtpm.engine.committer import Channel, Committer
from vtpm.engine.link import WorkerLink
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import VtpmError

log: Final = structlog.get_logger("vtpm.engine")

_WANTED: Final = 4
# A fork would take the core from a guest that waits for its TPM.
_REFILL_S: Final = 0.02
Request = Callable[[pb.HostRequest, Sequence[int]], Awaitable[pb.HostReply]]


@dataclass(slots=True)
class Ready:
    """A stocked worker, as the daemon holds it."""

    pid: int
    link: WorkerLink
    channel: Channel


class Stock:
    """Keeps some of them. `request` asks the engine host. Used from the event loop only."""

    def __init__(self, committer: Committer, request: Request) -> None:
        self._committer = committer
        self._request = request
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
            link = await WorkerLink.open(nobody, operations)
        except BaseException:
            operations.close()
            commits.close()
            raise
        ready = self._ready[pid] = Ready(pid, link, self._committer.add(nobody, 0, commits))
        link.on_lost = lambda: self._ready.pop(ready.pid, None)

    def take(self, pid: int = 0) -> Ready | None:
        """Return a stocked worker, that of a process id or any; None if there is none. Another takes its place."""
        found = self._ready.pop(pid or next(iter(self._ready), 0), None)
        asyncio.get_running_loop().call_later(_REFILL_S, self.fill)
        if found is not None:
            found.link.on_lost = lambda: None
        return found

    async def given(self, pid: int) -> Ready | None:
        """Return the stocked worker that the engine host has given an instance, of which this end may not be open yet."""
        while pid not in self._ready and (filling := self._filling) is not None:
            await asyncio.wait((filling,))
        return self.take(pid)

    def bind(self, ready: Ready, instance: uuid.UUID, epoch: int) -> WorkerLink:
        """Make a stocked worker that of an instance: from now on its commits are that instance's."""
        ready.channel.instance, ready.channel.epoch = instance, epoch
        ready.link.instance = instance
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
