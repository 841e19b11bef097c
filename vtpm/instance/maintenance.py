"""Before maintenance: everything that is ON goes into the store, and stays there until it is let out again."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog

from vtpm.errors import VtpmError
from vtpm.instance.model import DrainFailure, DrainProgress
from vtpm.instance.spread import spread

if TYPE_CHECKING:
    from vtpm.instance.lifecycle import Lifecycle
    from vtpm.instance.running import Running

log: Final = structlog.get_logger("vtpm.instance")

_AT_ONCE: Final = 8
_RETRY_S: Final = 0.1
_PATIENCE_S: Final = 10.0
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
        done = 0
        yield DrainProgress(total, 0)
        hibernate = functools.partial(self._hibernated, deadline=deadline)
        async for failure in spread(waiting, hibernate, at_once=_AT_ONCE):
            if failure is not None:
                failures.append(failure)
            else:
                done += 1
            yield DrainProgress(total, done)
        if self.anchor is not None:
            await self.anchor()
        log.info("host.drained", instances=total - len(failures), awake=len(failures))
        yield DrainProgress(total, total - len(failures), tuple(failures))

    async def _hibernated(self, running: Running, deadline: float) -> DrainFailure | None:
        """Hibernate one instance, again and again until `deadline` while it is busy; return why it stayed awake."""
        name = running.record.name
        while True:
            # The worker may be in the midst of a commit; one that says nothing at all is not waited for any longer.
            left = max(0.0, deadline - time.monotonic()) + _PATIENCE_S
            try:
                await asyncio.wait_for(running.tpm.hibernate(), left)
            except VtpmError as error:
                # One that ended meanwhile is not awake either.
                if running.gone.is_set():
                    return None
                if error.reason != _BUSY or time.monotonic() >= deadline:
                    return DrainFailure(name, error.reason, error.message)
            except TimeoutError:
                return DrainFailure(name, "WORKER_TIMEOUT", "its worker does not answer")
            except Exception as error:  # noqa: BLE001  # it is one instance's
                log.error("host.drain_failed", instance=str(running.record.id), error=type(error).__name__)
                return DrainFailure(name, "INTERNAL", "it could not be hibernated; see the log")
            else:
                return None
            await asyncio.sleep(_RETRY_S)

    def resume(self) -> None:
        """Let instances start and wake again."""
        self._lifecycle.thaws.release()
        log.info("host.resumed")
