"""What one instance may ask of its host: settings that go with its Load, and the bucket that keeps the rate of its commands.

A guest that is too fast waits: its commands stay in its socket, where nothing of them is lost, and are served as soon as its
rate allows. An answer such as TPM_RC_RETRY would have every driver ask again at once, and none of them expects it here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vtpm.engine.v1 import link_pb2 as pb

# How many commands of a data connection are paid for at once, at most: looking at the clock for each costs as much as a
# tenth of a PCR_Read.
MAX_BLOCK: Final = 16
# And no more than this share of a second's worth, so that a low rate is kept evenly.
_BLOCK_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class InstanceLimits:
    """Bounds of one instance. `command_rate` is commands a second on its data connections, 0 for no bound."""

    command_rate: float = 0.0
    command_burst: int = 1
    max_connections: int = 16

    def put_into(self, load: pb.Load) -> None:
        """Have the worker that gets `load` keep them."""
        load.command_rate, load.command_burst = self.command_rate, self.command_burst
        load.max_connections = self.max_connections


class TokenBucket:
    """`rate` tokens a second (above 0), at most `burst` of them saved. Tokens may be owed: who owes waits before the next."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst
        self.block = max(1, min(MAX_BLOCK, burst, int(rate * _BLOCK_S)))
        self._now = now
        self._tokens = float(burst)
        self._since = now()

    def _refill(self) -> float:
        now = self._now()
        self._tokens = min(float(self.burst), self._tokens + (now - self._since) * self.rate)
        self._since = now
        return self._tokens

    def take(self, count: int) -> bool:
        """Take `count` tokens, owing them if they are not there; return whether there are still some."""
        self._tokens = self._refill() - count
        return self._tokens > 0

    def give_back(self, count: int) -> None:
        """Give back tokens that were taken and not used."""
        self._tokens += count

    def wait_s(self) -> float:
        """Seconds until there is a token."""
        tokens = self._refill()
        # A little later rather than a little too early: then there would be nothing yet.
        return 0.0 if tokens > 0 else -tokens / self.rate + 1e-3


class Throttle:
    """Which data connections wait for tokens: `muted`. `mute` takes one out of the worker's loop without closing it."""

    def __init__(self, bucket: TokenBucket, mute: Callable[[socket.socket], None], muted: dict[int, socket.socket]) -> None:
        self.bucket = bucket
        self._mute = mute
        self._muted = muted
        # What a connection has paid for and not used yet.
        self._unused: dict[int, Callable[[], int]] = {}

    def opened(self, fd: int, unused: Callable[[], int]) -> None:
        """A connection has a handler, whose prepaid commands `unused` tells."""
        self._settle(fd)
        self._unused[fd] = unused

    def _settle(self, fd: int) -> None:
        if (unused := self._unused.pop(fd, None)) is not None:
            self.bucket.give_back(unused())

    def dropped(self, fd: int) -> None:
        """A connection is gone."""
        self._settle(fd)
        self._muted.pop(fd, None)

    def pay(self, count: int, connection: socket.socket, fd: int) -> None:
        """Pay for commands of a connection, which waits from now on if that was the last token."""
        if not self.bucket.take(count) and fd not in self._muted:
            self._muted[fd] = connection
            self._mute(connection)

    def due(self) -> dict[int, socket.socket]:
        """The connections that may go on now; they are muted no more."""
        if not self._muted or self.bucket.wait_s() > 0:
            return {}
        due = dict(self._muted)
        self._muted.clear()
        return due
