"""The same work for many instances, a few at once, where one that does not answer holds up none of the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# After so long somebody waits for something other than a turn of the processor, and the next one begins.
_SLOW_S: Final = 1.0


async def spread(
    items: Iterable[_Item], work: Callable[[_Item], Awaitable[_Result]], *, at_once: int, slow_s: float = _SLOW_S
) -> AsyncIterator[_Result]:
    """Yield the results of `work`, as they come. At most `at_once` run that have begun within `slow_s` seconds.

    `work` is bounded in time itself; what it raises is raised here, and the rest is cancelled.
    """
    waiting = iter(items)
    begun: dict[asyncio.Task[_Result], float] = {}
    more = True
    try:
        while True:
            now = time.monotonic()
            young = sum(now - start < slow_s for start in begun.values())
            while more and young < at_once:
                try:
                    item = next(waiting)
                except StopIteration:
                    more = False
                    break
                begun[asyncio.ensure_future(work(item))] = time.monotonic()
                young += 1
            if not begun:
                return
            # Until one has ended, or is slow, so that another may begin.
            ages = [start + slow_s - now for start in begun.values() if now - start < slow_s]
            timeout = max(0.0, min(ages)) if more and ages else None
            done, _ = await asyncio.wait(begun, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del begun[task]
                yield task.result()
    finally:
        for task in begun:
            task.cancel()
