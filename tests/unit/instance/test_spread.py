"""Work for many: a few at once, and who does not answer holds up none of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from vtpm.instance.spread import spread


async def results(work: Callable[[int], Awaitable[int]], items: range, *, at_once: int, slow_s: float = 60) -> list[int]:
    return [found async for found in spread(items, work, at_once=at_once, slow_s=slow_s)]


def test_each_is_done_once_and_no_more_at_once_than_may_be() -> None:
    running, most = 0, 0

    async def work(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return item

    assert sorted(asyncio.run(results(work, range(20), at_once=3))) == list(range(20))
    assert most == 3


def test_those_that_do_not_answer_hold_up_none_of_the_others() -> None:
    others = asyncio.Event()

    async def work(item: int) -> int:
        if item < 8:
            # As many as may run at once, and each waits for all that come after them.
            await others.wait()
        elif item == 19:
            others.set()
        return item

    assert sorted(asyncio.run(results(work, range(20), at_once=8, slow_s=0.01))) == list(range(20))


def test_what_one_raises_ends_the_rest() -> None:
    ended = []

    async def work(item: int) -> int:
        if item:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(item)
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(results(work, range(3), at_once=3))
    assert sorted(ended) == [1, 2]


def test_nothing_to_do_is_done_at_once() -> None:
    async def work(item: int) -> int:
        return item

    assert asyncio.run(results(work, range(0), at_once=3)) == []
