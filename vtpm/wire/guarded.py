"""A guest's connection, carried to gRPC within bounds: what gRPC would hold of it is counted before gRPC is given it.

Bytes that may not be taken yet stay in the kernel's socket buffer, and who sends them waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Final

from vtpm.errors import ErrorKind, VtpmError
from vtpm.wire.http2 import MessageWatch
from vtpm.wire.turns import Turns

# Read at once, and so what one direction of a connection holds here. A silent connection holds nothing.
_CHUNK_SIZE: Final = 8 << 10
# For who begins several calls at once: a turn should not take much longer than others' turns.
_SMALL_CHUNK_SIZE: Final = 512
_LARGE_CHUNK_SIZE: Final = 64 << 10
# Each guest may leave so much of its messages unfinished: a few TPM commands and all around them.
_FREE_SIZE: Final = 16 << 10
# How long a client may take no bytes that are there for it, how long an answer may flow on after its request's end, and how
# long a large message may wait for its turn.
_STALL_TIMEOUT_S: Final = 60.0
_HALF_CLOSED_TIMEOUT_S: Final = 60.0
_LARGE_TIMEOUT_S: Final = 120.0
# A guest that has had its fill waits, but no longer than this.
_LONGEST_PAUSE_S: Final = 5.0
# So much a guest may send a second that nobody takes. What is under way when a server ends a stream is that too.
_WASTED_PER_S: Final = 1 << 20
# What a call costs a guest that it gives up at once: gRPC has had the work of it.
_GIVEN_UP_PAUSE_S: Final = 0.05
# What a call costs that gRPC refuses by itself, as no client of gRPC makes one. It takes a tenth of a second to refuse a call,
# and everybody waits while it has some.
_REFUSED_PAUSE_S: Final = 2.0
# When gRPC has not come back with a call for so long it never will, as something is wrong with it; then the guest waits.
_UNSEEN_TIMEOUT_S: Final = 0.25
_UNSEEN_PAUSE_S: Final = 1.0


class LargeMessages:
    """Which guests may have a large message under way: a few at once, the others wait in order.

    `size`: how much of its messages a guest may then leave unfinished, in bytes.
    """

    def __init__(self, at_once: int, size: int) -> None:
        self.turns = asyncio.Semaphore(at_once)
        # Guests that wait for theirs.
        self.waiting = 0
        self.size = size


class GuestFlow:
    """What the connections of one guest share.

    That is its pause, what is unfinished of its messages, and its calls that gRPC has not come back with.
    """

    def __init__(self, turns: Turns | None = None, large: LargeMessages | None = None) -> None:
        # Small at first: how much a guest puts into it is not known yet.
        self.chunk_size = _SMALL_CHUNK_SIZE
        self._turns = turns or Turns()
        self._large = large or LargeMessages(1, 1 << 20)
        self._one = asyncio.Lock()
        self._one_waits = asyncio.Lock()
        self._until = 0.0
        self._unfinished = 0
        # Since when it may have a large message under way.
        self.large_since: float | None = None
        self._unseen = 0
        # Its connections that are carried.
        self.connections: set[GuardedConnection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._settled.set()
        self.less = asyncio.Event()
        self.less.set()

    def change(self, difference: int) -> None:
        """Count what more, or less, of its messages is unfinished."""
        self._unfinished += difference
        if self._unfinished <= self._large.size:
            self.less.set()
        else:
            self.less.clear()
        if self.large_since is not None and self._unfinished <= _FREE_SIZE:
            self.large_since = None
            self._large.turns.release()

    async def room(self) -> None:
        """Wait until the messages that are unfinished may go on.

        Raises:
            VtpmError: RESOURCE_EXHAUSTED, MESSAGE_ROOM_BUSY.
        """
        if self._unfinished <= _FREE_SIZE or self.large_since is not None:
            return
        try:
            async with asyncio.timeout(_LARGE_TIMEOUT_S), self._one_waits:
                if self.large_since is None:
                    self._large.waiting += 1
                    try:
                        await self._large.turns.acquire()
                    finally:
                        self._large.waiting -= 1
                    self.large_since = time.monotonic()
                    # Perhaps it is not needed any more.
                    self.change(0)
        except TimeoutError:
            raise VtpmError(
                "MESSAGE_ROOM_BUSY",
                "too many large messages are under way",
                remedy="send it again in a moment",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            ) from None

    def overstays(self, timeout_s: float) -> bool:
        """Whether it has had large messages under way for longer than one may take, one begun before another's end, and others
        wait."""
        return self.large_since is not None and self.large_since + timeout_s <= time.monotonic() and self._large.waiting > 0

    def brake(self, seconds: float) -> None:
        """Read nothing of this guest for `seconds` more: what it asks for beyond its share costs it time, not others."""
        now = time.monotonic()
        self._until = min(max(now, self._until) + seconds, now + _LONGEST_PAUSE_S)

    def cut(self) -> None:
        """End its connections."""
        for connection in self.connections:
            connection.cut()

    async def turn(self) -> None:
        """Return when something of this guest may be read: in its turn among all guests, however many connections it has."""
        async with self._one:
            await self._turn()

    async def _turn(self) -> None:
        while True:
            if (pause := self._until - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            elif self._unseen:
                await self._settled.wait()
            else:
                await self._turns.wait()
                if not self._unseen:
                    return

    def handed_over(self, calls: int) -> None:
        """Count calls that gRPC is given."""
        self.chunk_size = max(_SMALL_CHUNK_SIZE, self.chunk_size // 2) if calls > 1 else min(_CHUNK_SIZE, self.chunk_size * 2)
        if calls:
            self._unseen += calls
            self._turns.handed_over(calls)
            self._settled.clear()
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_UNSEEN_TIMEOUT_S, self._give_up)

    def seen(self, calls: int = 1) -> None:
        """Count calls that gRPC has come back with, or refused by itself."""
        calls = min(calls, self._unseen)
        if calls:
            self._unseen -= calls
            self._turns.seen(calls)
            if not self._unseen:
                self._settled.set()
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self.seen(self._unseen)
        self.brake(_UNSEEN_PAUSE_S)


class GuardedConnection:
    """Carries bytes between `client` and gRPC. `message_timeout_s`: how long a message may take from its first byte on."""

    def __init__(self, client: socket.socket, flow: GuestFlow, message_timeout_s: float) -> None:
        self._client = client
        self._flow = flow
        self._message_timeout_s = message_timeout_s
        self._watch = MessageWatch()
        self._counted = 0
        self.active = time.monotonic()
        # What carries it.
        self.task: asyncio.Task[None] | None = None

    def cut(self) -> None:
        """End it."""
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Close the client's socket, when nothing carries it any more."""
        self._client.close()

    async def carry(self, inner: socket.socket) -> None:
        """Carry both ways until both ends are done; both sockets are non-blocking.

        Raises:
            VtpmError: MESSAGE_LATE, MESSAGE_ROOM_BUSY, and what vtpm.wire.http2 refuses.
            TimeoutError: the client took nothing, or left its end open, for too long.
        """
        loop = asyncio.get_running_loop()
        requests = loop.create_task(self._requests(inner))
        answers = loop.create_task(self._answers(inner))
        self._flow.connections.add(self)
        try:
            await asyncio.wait((requests, answers), return_when=asyncio.FIRST_COMPLETED)
            if requests.done():
                requests.result()
            # What is still under way arrives: the last answers to a client that has ended. To a server that has, nothing does.
            async with asyncio.timeout(_HALF_CLOSED_TIMEOUT_S):
                await answers
        finally:
            requests.cancel()
            answers.cancel()
            # Neither socket may be closed while the loop still waits for it.
            await asyncio.gather(requests, answers, return_exceptions=True)
            self._flow.connections.discard(self)
            self._flow.change(-self._counted)

    async def _requests(self, inner: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await self._next():
                self.active = time.monotonic()
                sent = self._watch.sent(data, self.active)
                self._flow.handed_over(sent.opened)
                if sent.given_up:
                    self._flow.seen(sent.given_up)
                    self._flow.brake(sent.given_up * _GIVEN_UP_PAUSE_S)
                if sent.wasted:
                    self._flow.brake(sent.wasted / _WASTED_PER_S)
                await loop.sock_sendall(inner, data)
                self._settle()
        with contextlib.suppress(OSError):
            inner.shutdown(socket.SHUT_WR)

    async def _next(self) -> bytes:
        """Return what the client sends next, empty at its end, as soon as it may be taken."""
        await self._flow.room()
        while not self._flow.less.is_set():
            # It has room for one large message, and this is more.
            await self._in_time(self._flow.less)
        if self._watch.oldest is not None and self._flow.overstays(self._message_timeout_s):
            raise VtpmError(
                "MESSAGE_ROOM_BUSY",
                "other guests wait for the room that this one's large messages take",
                remedy="send one after another",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            )
        while True:
            await self._flow.turn()
            try:
                return self._client.recv(self._flow.chunk_size if self._flow.large_since is None else _LARGE_CHUNK_SIZE)
            except BlockingIOError:
                await self._readable()

    async def _readable(self) -> None:
        """Wait for the client's next bytes."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._client, ready.set)
        try:
            await self._in_time(ready)
        finally:
            loop.remove_reader(self._client)

    async def _in_time(self, event: asyncio.Event) -> None:
        """Wait for `event`, in the middle of a message only as long as that may take."""
        while not event.is_set():
            oldest = self._watch.oldest
            began = None if oldest is None else max(oldest, self._flow.large_since or 0.0)
            # What is waited out may be that of a message which has ended meanwhile, as the server has ended its stream.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if began is None else began + self._message_timeout_s - time.monotonic()):
                    await event.wait()
            if not event.is_set() and self._late():
                raise VtpmError(
                    "MESSAGE_LATE",
                    "a client has begun a message and not ended it",
                    remedy="send a message at once",
                    kind=ErrorKind.DEADLINE_EXCEEDED,
                )

    def _late(self) -> bool:
        oldest = self._watch.oldest
        return oldest is not None and max(oldest, self._flow.large_since or 0.0) + self._message_timeout_s <= time.monotonic()

    def _settle(self) -> None:
        """Tell what the guest's other connections must know."""
        self._flow.change(self._watch.unfinished - self._counted)
        self._counted = self._watch.unfinished

    async def _answers(self, inner: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(inner, _CHUNK_SIZE):
                if refused := self._watch.answered(data):
                    self._flow.seen(refused)
                    self._flow.brake(refused * _REFUSED_PAUSE_S)
                self._settle()
                async with asyncio.timeout(_STALL_TIMEOUT_S):
                    await loop.sock_sendall(self._client, data)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)
