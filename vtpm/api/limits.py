"""How many calls are under way, and how fast those of guests come; beyond that they are refused, with nothing done."""

from __future__ import annotations

from vtpm.engine.limits import TokenBucket
from vtpm.errors import ErrorKind, VtpmError


class CallLimits:
    """The calls of the whole daemon. Guests have half of `max_calls` at most: operators always get in."""

    def __init__(self, max_calls: int, *, guest_rate: float, guest_burst: int) -> None:
        self._max_calls = max_calls
        self._max_guest_calls = max_calls // 2
        self._guest_rate = guest_rate
        self._guest_burst = guest_burst
        self._calls = 0
        self._guest_calls = 0

    def operator(self) -> Admission:
        """The door of the operators' server."""
        return Admission(self, guest=False, bucket=None)

    def guest(self) -> Admission:
        """The door of one guest's server; `command_rate` holds for its calls by themselves."""
        bucket = TokenBucket(self._guest_rate, self._guest_burst) if self._guest_rate > 0 else None
        return Admission(self, guest=True, bucket=bucket)

    def enter(self, *, guest: bool) -> None:
        """Count a call in.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED, TOO_MANY_CALLS.
        """
        if self._calls >= self._max_calls or (guest and self._guest_calls >= self._max_guest_calls):
            raise VtpmError(
                "TOO_MANY_CALLS",
                "too many calls are under way; nothing was done",
                remedy="call again in a moment; the operator may raise max_calls",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            )
        self._calls += 1
        self._guest_calls += guest

    def leave(self, *, guest: bool) -> None:
        """Count a call out."""
        self._calls -= 1
        self._guest_calls -= guest


class Admission:
    """The door of one server. Used from the event loop only."""

    def __init__(self, limits: CallLimits, *, guest: bool, bucket: TokenBucket | None) -> None:
        self._limits = limits
        self._guest = guest
        self._bucket = bucket

    def enter(self) -> None:
        """Let a call in.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED: TOO_MANY_CALLS, CALL_RATE_EXCEEDED.
        """
        if self._bucket is not None:
            if wait_s := self._bucket.wait_s():
                raise VtpmError(
                    "CALL_RATE_EXCEEDED",
                    "this instance's calls come faster than it may have them; nothing was done",
                    remedy=f"call again in {wait_s:.3f} s, and more slowly",
                    kind=ErrorKind.RESOURCE_EXHAUSTED,
                )
            self._bucket.take(1)
        self._limits.enter(guest=self._guest)

    def leave(self) -> None:
        """The call has ended."""
        self._limits.leave(guest=self._guest)
