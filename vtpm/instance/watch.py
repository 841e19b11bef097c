"""Who is told when an instance changes: callbacks of the daemon's own parts, and queues of API watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from vtpm.errors import ErrorKind, VtpmError
from vtpm.instance.model import ChangeKind, InstanceChange
from vtpm.store.model import InstanceRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

_QUEUE_SIZE: Final = 4096


class ChangeHub:
    """Spreads changes; used from the event loop only."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[InstanceChange], None]] = []
        self._queues: set[asyncio.Queue[InstanceChange | None]] = set()

    def subscribe(self, callback: Callable[[InstanceChange], None]) -> None:
        """Call `callback` with every change from now on."""
        self._callbacks.append(callback)

    def publish(self, kind: ChangeKind, record: InstanceRecord) -> None:
        """Tell everybody."""
        change = InstanceChange(kind, record)
        for callback in self._callbacks:
            callback(change)
        for queue in list(self._queues):
            if queue.qsize() >= _QUEUE_SIZE:
                # A watcher that does not read must not grow the daemon; it gets an error and can begin anew.
                self._queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(change)

    @contextmanager
    def queue(self) -> Iterator[asyncio.Queue[InstanceChange | None]]:
        """Collect changes from now on in a queue; None at its end means that it overflowed."""
        queue: asyncio.Queue[InstanceChange | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)


async def read_changes(queue: asyncio.Queue[InstanceChange | None]) -> AsyncIterator[InstanceChange]:
    """Yield changes from `queue` until it overflows.

    Raises:
        VtpmError: RESOURCE_EXHAUSTED, WATCH_TOO_SLOW.
    """
    while (change := await queue.get()) is not None:
        yield change
    raise VtpmError(
        "WATCH_TOO_SLOW",
        "the watcher did not keep up with the changes",
        remedy="watch again; the watch begins with the present state",
        kind=ErrorKind.RESOURCE_EXHAUSTED,
    )
