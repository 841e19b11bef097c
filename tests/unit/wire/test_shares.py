"""Whose connections there are when there can't be more: everybody has one before anybody keeps many."""

from __future__ import annotations

import asyncio
import uuid

from hypothesis import given
from hypothesis import strategies as st

from vtpm.wire.shares import ConnectionShares
from vtpm.wire.turns import Turns

EACH, TOTAL = 4, 8


class Connection:
    """One that notes when it is cut."""

    def __init__(self, active: float = 0.0) -> None:
        self.active = active
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True


def test_one_guest_has_so_many_and_no_more() -> None:
    shares, guest = ConnectionShares(2, 10), uuid.uuid4()
    first = Connection()
    assert shares.enter(guest, first)
    assert shares.enter(guest, Connection())
    assert not shares.enter(guest, Connection())
    shares.leave(guest, first)
    assert shares.enter(guest, Connection())


def test_the_place_that_is_made_is_that_of_the_most_silent_of_who_has_most() -> None:
    shares, greedy, modest, newcomer = ConnectionShares(3, 4), uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    only = Connection(active=0)
    assert shares.enter(modest, only)
    many = [Connection(active=3), Connection(active=1), Connection(active=2)]
    for connection in many:
        assert shares.enter(greedy, connection)
    assert shares.enter(newcomer, Connection())
    assert [connection.is_cut for connection in (only, *many)] == [False, False, True, False]


def test_who_has_as_many_as_others_makes_nobody_go() -> None:
    shares, one, other = ConnectionShares(2, 4), uuid.uuid4(), uuid.uuid4()
    held = [Connection() for _ in range(4)]
    for guest, connection in zip((one, one, other, other), held, strict=True):
        assert shares.enter(guest, connection)
    assert not shares.enter(one, Connection())
    third = uuid.uuid4()
    assert shares.enter(third, Connection())
    assert not shares.enter(third, Connection())
    assert sum(connection.is_cut for connection in held) == 1


@given(st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=80))
def test_no_bound_is_ever_passed_and_a_guest_without_a_connection_always_gets_one(steps: list[tuple[int, bool]]) -> None:
    shares = ConnectionShares(EACH, TOTAL)
    open_now: dict[uuid.UUID, list[Connection]] = {uuid.UUID(int=number): [] for number in range(12)}
    for clock, (number, enters) in enumerate(steps):
        guest = uuid.UUID(int=number)
        held = open_now[guest]
        if enters:
            connection = Connection(active=clock)
            had = len(held)
            if shares.enter(guest, connection):
                held.append(connection)
            else:
                assert had
        elif held:
            shares.leave(guest, held.pop())
        for connections in open_now.values():
            connections[:] = [connection for connection in connections if not connection.is_cut]
            assert len(connections) <= EACH
        assert sum(len(connections) for connections in open_now.values()) <= TOTAL


async def test_turns_come_a_few_at_a_time_and_in_order() -> None:
    turns, order = Turns(each_pass=2), []

    async def take(number: int) -> None:
        await turns.wait()
        order.append(number)

    tasks = [asyncio.create_task(take(number)) for number in range(6)]
    await asyncio.sleep(0)
    assert order == [0, 1]
    await asyncio.gather(*tasks)
    assert order == list(range(6))


async def test_nobody_goes_while_too_much_is_with_grpc() -> None:
    turns = Turns(most_unseen=3)
    turns.handed_over(3)
    waiting = asyncio.create_task(turns.wait())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    turns.seen(1)
    await waiting
