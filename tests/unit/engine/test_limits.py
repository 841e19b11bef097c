from __future__ import annotations

import socket

import pytest

from vtpm.api.limits import OWN_CALLS, CallLimits
from vtpm.engine.limits import MAX_BLOCK, Throttle, TokenBucket
from vtpm.errors import ErrorKind, VtpmError


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_a_burst_is_had_at_once_and_then_the_rate_rules() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 5, clock)
    assert [bucket.take(1) for _ in range(5)] == [True, True, True, True, False]
    assert bucket.wait_s() == pytest.approx(0.001)
    bucket.take(1)
    assert bucket.wait_s() == pytest.approx(0.101)
    clock.time += 0.15
    assert bucket.wait_s() == 0


def test_what_is_owed_is_paid_before_anything_else() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 5, clock)
    assert not bucket.take(25)
    clock.time += 1.9
    assert bucket.wait_s() > 0
    clock.time += 0.2
    assert bucket.wait_s() == 0


def test_a_long_pause_saves_no_more_than_the_burst() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, 5, clock)
    clock.time += 3600
    assert bucket.take(4)
    assert not bucket.take(1)


@pytest.mark.parametrize(("rate", "burst", "block"), [(0.1, 100, 1), (500, 100, 5), (1e6, 100, MAX_BLOCK), (1e6, 2, 2)])
def test_a_block_is_never_more_than_a_fraction_of_a_second_nor_than_the_burst(rate: float, burst: int, block: int) -> None:
    assert TokenBucket(rate, burst).block == block


def test_a_connection_gets_back_what_it_paid_and_did_not_use() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 20, clock)
    throttle = Throttle(bucket, lambda _sock: None, {})
    one, other = socket.socketpair()
    with one, other:
        throttle.opened(7, lambda: 12)
        throttle.pay(16, one, 7)
        throttle.dropped(7)
        throttle.dropped(7)
    assert bucket.take(15)
    assert not bucket.take(1)


def test_who_owes_is_muted_until_it_is_paid_and_no_longer() -> None:
    clock = Clock()
    muted: list[socket.socket] = []
    throttle = Throttle(TokenBucket(10, 1, clock), muted.append, {})
    one, other = socket.socketpair()
    with one, other:
        throttle.pay(1, one, 7)
        throttle.pay(1, one, 7)
        assert muted == [one]
        assert throttle.due() == {}
        clock.time += 0.2
        assert throttle.due() == {7: one}
        assert throttle.due() == {}


def test_guests_together_leave_half_of_the_calls_to_operators() -> None:
    limits = CallLimits(4, 10, guest_rate=0, guest_burst=1)
    greedy, operator = limits.guest(), limits.operator()
    for _ in range(OWN_CALLS + 2):
        greedy.enter()
    with pytest.raises(VtpmError) as caught:
        greedy.enter()
    assert (caught.value.kind, caught.value.reason) == (ErrorKind.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
    operator.enter()
    operator.enter()
    with pytest.raises(VtpmError):
        operator.enter()
    operator.leave()
    operator.enter()


def test_a_guest_gets_its_own_calls_whatever_the_others_have() -> None:
    limits = CallLimits(4, 3, guest_rate=0, guest_burst=1)
    for _ in range(2):
        greedy = limits.guest()
        for _ in range(3):
            greedy.enter()
    modest = limits.guest()
    for _ in range(OWN_CALLS):
        modest.enter()
    with pytest.raises(VtpmError) as caught:
        modest.enter()
    assert caught.value.reason == "TOO_MANY_CALLS"
    greedy.leave()
    modest.enter()


def test_a_guest_with_its_fill_of_calls_is_refused_by_name() -> None:
    guest = CallLimits(100, 3, guest_rate=0, guest_burst=1).guest()
    for _ in range(3):
        guest.enter()
    with pytest.raises(VtpmError) as caught:
        guest.enter()
    assert (caught.value.kind, caught.value.reason) == (ErrorKind.RESOURCE_EXHAUSTED, "TOO_MANY_GUEST_CALLS")


def test_a_guest_that_calls_too_fast_is_told_when_to_call_again_and_others_are_not() -> None:
    limits = CallLimits(100, 10, guest_rate=0.5, guest_burst=2)
    greedy, modest = limits.guest(), limits.guest()
    for _ in range(3):
        greedy.enter()
        greedy.leave()
    with pytest.raises(VtpmError) as caught:
        greedy.enter()
    assert (caught.value.kind, caught.value.reason) == (ErrorKind.RESOURCE_EXHAUSTED, "CALL_RATE_EXCEEDED")
    assert "call again in" in caught.value.remedy
    modest.enter()
