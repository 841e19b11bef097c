"""Turns at the event loop, a few at a time: what many peers ask for at once may not keep the loop from everybody else."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

_EACH_PASS: Final = 4
_MOST_UNSEEN: Final = 8


class Turns:
    """Lets a few go in each pass of the event loop, in the order in which they came. Used from the event loop only.

    Nobody goes while `most_unseen` calls or more have been handed to gRPC that it has not come back with yet: it works through
    all that it was given in one go, however much that is.
    """

    def __init__(self, each_pass: int = _EACH_PASS, most_unseen: int = _MOST_UNSEEN) -> None:
        self._each_pass = each_pass
        self._most_unseen = most_unseen
        self._left = each_pass
        self._unseen = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    async def wait(self) -> None:
        """Return when it is the caller's turn; at once if few others want one."""
        if self._left <= 0 or self._waiting or self._unseen >= self._most_unseen:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._schedule()
            await turn
        else:
            self._left -= 1
            self._schedule()

    def handed_over(self, calls: int) -> None:
        """Count calls that gRPC is given."""
        self._unseen += calls

    def seen(self, calls: int) -> None:
        """Count calls that gRPC has come back with."""
        self._unseen -= calls
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._scheduled = False
        self._left = self._each_pass
        while self._waiting and self._left > 0 and self._unseen < self._most_unseen:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        if self._waiting and self._unseen < self._most_unseen:
            self._schedule()
