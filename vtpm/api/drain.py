"""An orderly end: what only waits ends at once, what is at work is finished."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

import structlog

from vtpm.errors import UnavailableError

_T = TypeVar("_T")

log: Final = structlog.get_logger("vtpm.api")


class Drain:
    """The one switch that all calls look at. Used from the event loop only."""

    def __init__(self) -> None:
        self.begun = False
        self._idle: set[asyncio.Task[Any]] = set()
        self._operations: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """End every stream that waits for something to come; from now on no stream waits."""
        self.begun = True
        for task in self._idle:
            task.cancel()

    async def items(self, source: AsyncIterator[_T]) -> AsyncGenerator[_T, None]:
        """Yield what `source` yields. While it waits for the next item the stream counts as idle; a drain then ends it.

        Raises:
            UnavailableError: DRAINING.
        """
        task = asyncio.current_task()
        assert task is not None
        while not self.begun:
            self._idle.add(task)
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                # One cancellation is the drain's own; a second one means that the client has gone too.
                if not self.begun or task.uncancel() > 0:
                    raise
                break
            finally:
                self._idle.discard(task)
            yield item
        raise UnavailableError("DRAINING", "the daemon is shutting down", remedy="call again when it is back")

    async def complete(self, operation: Coroutine[Any, Any, _T]) -> _T:
        """Run `operation` to its end even if the caller goes away.

        A change of power that is torn in half leaves an instance that must be repaired; a lost answer can be asked for again.
        """
        task = asyncio.get_running_loop().create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            # Reading it keeps asyncio from reporting an error whose caller has gone; one who is there gets it.
            task.exception()

    async def operations_finished(self, timeout_s: float) -> None:
        """Wait until no operation runs, at most `timeout_s`."""
        if self._operations:
            await asyncio.wait(self._operations, timeout=timeout_s)

    async def cut(self) -> None:
        """Cancel the operations that still run."""
        running = list(self._operations)
        for task in running:
            task.cancel()
        if running:
            log.warning("api.operations_cut", count=len(running))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*running, return_exceptions=True)
