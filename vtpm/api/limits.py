"""How many calls are under way, and how fast those of guests come; beyond that they are refused, with nothing done.

A call is counted when its headers are there, before gRPC is asked for its message, and until its answer has been sent.
"""

from __future__ import annotations

import asyncio
from typing import Final

from vtpm.engine.limits import TokenBucket
from vtpm.errors import ErrorKind, VtpmError
from vtpm.wire.guarded import GuestFlow

# Calls that a guest may have whatever the others have: one that waits, such as a stream, and one beside it.
OWN_CALLS: Final = 2
# What each call that is refused, or given up before its answer, costs the guest that makes it.
_PAUSE_S: Final = 0.1


class CallLimits:
    """The calls of the whole daemon.

    Half of `max_calls` is for operators, so they always get in. Of the other half each guest takes what it needs, at most
    `max_guest_calls`; its first calls, OWN_CALLS, are not taken from there, so it gets in however many the others have.
    """

    def __init__(self, max_calls: int, max_guest_calls: int, *, guest_rate: float, guest_burst: int) -> None:
        self._max_operator_calls = max_calls - max_calls // 2
        self._max_shared_calls = max_calls // 2
        self._max_guest_calls = max_guest_calls
        self._guest_rate = guest_rate
        self._guest_burst = guest_burst
        self._operator_calls = 0
        self._shared_calls = 0

    def operator(self) -> OperatorAdmission:
        """The door of the operators' server."""
        return OperatorAdmission(self)

    def guest(self, flow: GuestFlow | None = None) -> GuestAdmission:
        """The door of one guest's server; `command_rate` holds for its calls by themselves."""
        bucket = TokenBucket(self._guest_rate, self._guest_burst) if self._guest_rate > 0 else None
        return GuestAdmission(self, bucket, flow or GuestFlow())

    def enter_operator(self) -> None:
        """Count an operator's call in.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED, TOO_MANY_CALLS.
        """
        if self._operator_calls >= self._max_operator_calls:
            raise _too_many("too many calls are under way; nothing was done", "the operator may raise max_calls")
        self._operator_calls += 1

    def leave_operator(self) -> None:
        """Count an operator's call out."""
        self._operator_calls -= 1

    def enter_guest(self, calls: int) -> None:
        """Count a call of a guest in that has `calls`.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED: TOO_MANY_GUEST_CALLS, TOO_MANY_CALLS.
        """
        if calls >= self._max_guest_calls:
            raise _too_many(
                f"this instance has {calls} calls under way; nothing was done",
                "the operator may raise max_guest_calls",
                "TOO_MANY_GUEST_CALLS",
            )
        if calls >= OWN_CALLS:
            if self._shared_calls >= self._max_shared_calls:
                raise _too_many("too many calls of guests are under way; nothing was done", "the operator may raise max_calls")
            self._shared_calls += 1

    def leave_guest(self, calls: int) -> None:
        """Count a call of a guest out that has `calls` left."""
        if calls >= OWN_CALLS:
            self._shared_calls -= 1


def _too_many(message: str, remedy: str, reason: str = "TOO_MANY_CALLS") -> VtpmError:
    return VtpmError(reason, message, remedy=f"call again in a moment; {remedy}", kind=ErrorKind.RESOURCE_EXHAUSTED)


class OperatorAdmission:
    """The door of the operators' server. Used from the event loop only."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits

    def enter(self) -> None:
        """Let a call in.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED, TOO_MANY_CALLS.
        """
        self._limits.enter_operator()

    def leave(self) -> None:
        """The call has ended."""
        self._limits.leave_operator()

    def seen(self) -> None:
        """GRPC has come with a call."""

    def in_vain(self) -> None:
        """A call was refused, or given up."""

    def untaken(self) -> None:
        """An answer was not taken: an operator may take its time."""


class GuestAdmission:
    """The door of one guest's server. Used from the event loop only."""

    def __init__(self, limits: CallLimits, bucket: TokenBucket | None, flow: GuestFlow) -> None:
        self._limits = limits
        self._bucket = bucket
        self._flow = flow
        self._calls = 0

    def enter(self) -> None:
        """Let a call in.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED: TOO_MANY_GUEST_CALLS, TOO_MANY_CALLS, CALL_RATE_EXCEEDED.
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
        self._limits.enter_guest(self._calls)
        self._calls += 1

    def leave(self) -> None:
        """The call has ended."""
        self._calls -= 1
        self._limits.leave_guest(self._calls)

    def seen(self) -> None:
        """GRPC has come with a call."""
        self._flow.seen()

    def in_vain(self) -> None:
        """A call was refused, or given up before its answer: nothing of this guest is read for a while."""
        self._flow.brake(_PAUSE_S)

    def untaken(self) -> None:
        """An answer was not taken in time: gRPC would keep it as long as its connection is there."""
        self._flow.cut()


class AnswerRoom:
    """Room for one guest's large answers: for one until it has been taken, in its turn among `everybody`'s."""

    def __init__(self, everybody: asyncio.Semaphore) -> None:
        self._everybody = everybody
        self._own = asyncio.Semaphore(1)

    async def enter(self) -> None:
        """Wait for it."""
        await self._own.acquire()
        try:
            await self._everybody.acquire()
        except BaseException:
            self._own.release()
            raise

    def leave(self) -> None:
        """The answer has been taken, or the call has ended."""
        self._everybody.release()
        self._own.release()
