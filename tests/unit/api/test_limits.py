"""Room for large answers: one of each guest, a few of all, and every place given back once."""

from __future__ import annotations

import asyncio

from vtpm.api.limits import AnswerRoom


async def test_a_guest_has_one_large_answer_at_a_time_and_others_have_theirs() -> None:
    everybody = asyncio.Semaphore(2)
    one, other, third = (AnswerRoom(everybody) for _ in range(3))
    await one.enter()
    waiting = asyncio.ensure_future(one.enter())
    await other.enter()
    last = asyncio.ensure_future(third.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not last.done()
    other.leave()
    await last
    assert not waiting.done()
    one.leave()
    await waiting


async def test_who_gives_up_waiting_keeps_no_place() -> None:
    everybody = asyncio.Semaphore(1)
    one, other = AnswerRoom(everybody), AnswerRoom(everybody)
    await one.enter()
    given_up = asyncio.ensure_future(other.enter())
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    one.leave()
    await asyncio.wait_for(other.enter(), 10)
