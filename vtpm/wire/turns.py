"""Turns at the event loop, a few at a time: what many peers ask for at once may not keep the loop from everybody else."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

_EACH_PASS: Final = 4


class Turns:
    """Lets a few go in each pass of the event loop, in the order in which they came. Used from the event loop only."""

    def __init__(self, each_pass: int = _EACH_PASS) -> None:
        self._each_pass = each_pass
        self._left = each_pass
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    async def wait(self, cost: int = 1) -> None:
        """Return when it is the caller's turn; at once if few others want one. `cost`: how many turns it takes."""
        if self._left <= 0 or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._schedule()
            await turn
        self.charge(cost)

    def charge(self, cost: int) -> None:
        """Count turns that were taken without waiting."""
        self._left -= cost
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._scheduled = False
        self._left = min(self._left + self._each_pass, self._each_pass)
        room = self._left
        while self._waiting and room > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1
        if self._waiting or self._left < self._each_pass:
            self._schedule()
