"""Before maintenance: everything that is ON goes into the store, and stays there until it is let out again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.errors import VtpmError
from vtpm.instance.model import DrainFailure, DrainProgress

if TYPE_CHECKING:
    from vtpm.instance.lifecycle import Lifecycle
    from vtpm.instance.running import Running

log: Final = structlog.get_logger("vtpm.instance")

_AT_ONCE: Final = 8
_RETRY_S: Final = 0.1
_BUSY: Final = "INSTANCE_BUSY"


class Maintenance:
    """Drains and resumes the host. Used from the event loop only."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        # Has the anchor of freshness know what hibernates (vtpm.instance.freshness).
        self.anchor: Callable[[], Awaitable[None]] | None = None

    async def drain(self, timeout_s: float) -> AsyncIterator[DrainProgress]:
        """Let nothing start or wake, hibernate what is awake, and say how far that is.

        Instances that are busy are tried again for `timeout_s` seconds. The last message names those that stayed awake.
        """
        await self._lifecycle.thaws.hold()
        deadline = time.monotonic() + timeout_s
        waiting = [running for running in self._lifecycle.all_running() if not running.tpm.asleep]
        total = len(waiting)
        log.info("host.draining", instances=total)
        failures: list[DrainFailure] = []
        while True:
            yield DrainProgress(total, total - len(waiting) - len(failures))
            if not waiting:
                break
            part, rest = waiting[:_AT_ONCE], waiting[_AT_ONCE:]
            errors = await asyncio.gather(*(self._hibernate(running) for running in part))
            late = time.monotonic() >= deadline
            again = []
            for running, error in zip(part, errors, strict=True):
                if error is None:
                    continue
                if error.reason == _BUSY and not late:
                    again.append(running)
                else:
                    failures.append(DrainFailure(running.record.name, error.reason, error.message))
            waiting = rest + again
            if again and len(waiting) == len(again):
                await asyncio.sleep(_RETRY_S)
        if self.anchor is not None:
            await self.anchor()
        log.info("host.drained", instances=total - len(failures), awake=len(failures))
        yield DrainProgress(total, total - len(failures), tuple(failures))

    async def _hibernate(self, running: Running) -> VtpmError | None:
        try:
            await running.tpm.hibernate()
        except VtpmError as error:
            # One that ended meanwhile is not awake either.
            return None if running.gone.is_set() else error
        return None

    def resume(self) -> None:
        """Let instances start and wake again."""
        self._lifecycle.thaws.release()
        log.info("host.resumed")
