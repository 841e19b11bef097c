"""What a guest's connection costs the guest, told by a client and a gRPC that speak by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator

import pytest

from tests.support import http2
from vtpm.errors import VtpmError
from vtpm.wire.guarded import GuardedConnection, GuestFlow, LargeMessages

BEGINNING = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)


class Flow(GuestFlow):
    """Notes how long nothing of the guest is read."""

    paused_s = 0.0

    def brake(self, seconds: float) -> None:
        self.paused_s += seconds


class Carried:
    """A client and a gRPC with the guarded connection between them."""

    def __init__(self, flow: GuestFlow, message_timeout_s: float = 60.0) -> None:
        self.client, outer = socket.socketpair()
        inner, self.grpc = socket.socketpair()
        for each in (self.client, outer, inner, self.grpc):
            each.setblocking(False)
        self._ends = (self.client, outer, inner, self.grpc)
        self.guarded = GuardedConnection(outer, flow, message_timeout_s)
        self.task = self.guarded.task = asyncio.get_running_loop().create_task(self.guarded.carry(inner))

    async def said(self, data: bytes) -> None:
        """The client says something, and gRPC hears all of it."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.client, data)
        left = len(data)
        async with asyncio.timeout(30):
            while left:
                left -= len(await loop.sock_recv(self.grpc, left))

    async def answered(self, data: bytes) -> None:
        """GRPC answers, and the client hears it."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.grpc, data)
        async with asyncio.timeout(30):
            assert await loop.sock_recv(self.client, 65536) == data

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self.task
        for each in self._ends:
            each.close()


@pytest.fixture
async def flow() -> Flow:
    return Flow()


@pytest.fixture
async def carried(flow: Flow) -> AsyncIterator[Carried]:
    made = Carried(flow)
    yield made
    await made.close()


async def test_a_call_that_grpc_itself_refuses_costs_the_guest_a_pause(flow: Flow, carried: Carried) -> None:
    await carried.said(BEGINNING + http2.call(1, http2.EXECUTE))
    await carried.answered(http2.frame(http2.RST_STREAM, 0, 1, bytes(4)))
    assert flow.paused_s >= 1


async def test_a_call_that_is_answered_costs_nothing(flow: Flow, carried: Carried) -> None:
    await carried.said(BEGINNING + http2.call(1, http2.EXECUTE))
    flow.seen()
    await carried.answered(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, b"\x88"))
    await carried.answered(http2.frame(http2.RST_STREAM, 0, 1, bytes(4)))
    assert flow.paused_s == 0


async def test_a_guest_with_one_large_message_after_another_keeps_nobody_else_waiting_for_ever() -> None:
    large = LargeMessages(1, 1 << 20)
    greedy, honest = (Flow(large=large) for _ in range(2))
    holds = asyncio.Event()
    begun, rest = http2.prefix(30_000) + bytes(15_000), bytes(15_000)

    async def begin(carried: Carried, flow: Flow, stream: int) -> None:
        await carried.said(http2.call(stream, http2.MEASURE))
        flow.seen()
        await carried.said(http2.frame(http2.DATA, 0, stream, begun))

    async def end(carried: Carried, stream: int) -> None:
        await carried.said(http2.frame(http2.DATA, http2.END_STREAM, stream, rest))
        await carried.answered(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, b"\x88"))

    async def one_after_another(carried: Carried) -> None:
        await carried.said(BEGINNING)
        for stream in (1, 3):
            await begin(carried, greedy, stream)
        for stream in itertools.count(5, 2):
            await begin(carried, greedy, stream)
            holds.set()
            await end(carried, stream - 4)

    first = Carried(greedy, message_timeout_s=0.3)
    endless = asyncio.get_running_loop().create_task(one_after_another(first))
    async with asyncio.timeout(30):
        await holds.wait()
    assert large.turns.locked()
    second = Carried(honest)
    await second.said(BEGINNING)
    for stream in (1, 3):
        await begin(second, honest, stream)
    await end(second, 1)
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)
    with pytest.raises(VtpmError) as caught:
        await first.task
    assert caught.value.reason == "MESSAGE_ROOM_BUSY"
    await first.close()
    await second.close()
