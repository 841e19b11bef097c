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
# Each connection may leave so much of its messages unfinished: a TPM command and all around it is smaller.
_FREE_SIZE: Final = 8 << 10
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
# When gRPC has not come back with a call for so long it never will, as something is wrong with it; then the guest waits.
_UNSEEN_TIMEOUT_S: Final = 0.25
_UNSEEN_PAUSE_S: Final = 1.0


class LargeMessages:
    """Who may have a large message under way: a few of all guests at once, and one of each guest. The others wait in order."""

    def __init__(self, at_once: int) -> None:
        self.turns = asyncio.Semaphore(at_once)


class GuestFlow:
    """What the connections of one guest share: its pause, its one large message, its calls that gRPC has not come back with."""

    def __init__(self, turns: Turns | None = None) -> None:
        self.large = asyncio.Lock()
        # Small at first: how much a guest puts into it is not known yet.
        self.chunk_size = _SMALL_CHUNK_SIZE
        self._turns = turns or Turns()
        self._one = asyncio.Lock()
        self._until = 0.0
        self._unseen = 0
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._settled.set()

    def brake(self, seconds: float) -> None:
        """Read nothing of this guest for `seconds` more: what it asks for beyond its share costs it time, not others."""
        now = time.monotonic()
        self._until = min(max(now, self._until) + seconds, now + _LONGEST_PAUSE_S)

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

    def __init__(self, client: socket.socket, flow: GuestFlow, large: LargeMessages, message_timeout_s: float) -> None:
        self._client = client
        self._flow = flow
        self._large = large
        self._message_timeout_s = message_timeout_s
        self._watch = MessageWatch()
        # Since when it has a large message under way.
        self._large_since: float | None = None
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
            self._settle(end=True)

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
        if self._watch.unfinished > _FREE_SIZE and self._large_since is None:
            await self._wait_for_room()
        while True:
            await self._flow.turn()
            try:
                return self._client.recv(self._flow.chunk_size if self._large_since is None else _LARGE_CHUNK_SIZE)
            except BlockingIOError:
                await self._readable()

    async def _readable(self) -> None:
        """Wait for the client's next bytes, in the middle of a message only as long as that may take."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self._client, _set, ready)
        try:
            while not ready.done():
                if (oldest := self._watch.oldest) is None:
                    timeout = None
                else:
                    timeout = max(oldest, self._large_since or 0.0) + self._message_timeout_s - time.monotonic()
                    if timeout <= 0:
                        raise VtpmError(
                            "MESSAGE_LATE",
                            "a client has begun a message and not ended it",
                            remedy="send a message at once",
                            kind=ErrorKind.DEADLINE_EXCEEDED,
                        )
                # The message that it was about may have ended meanwhile, as the server has ended its stream.
                await asyncio.wait((ready,), timeout=timeout)
        finally:
            loop.remove_reader(self._client)

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(_LARGE_TIMEOUT_S):
                await self._flow.large.acquire()
                try:
                    await self._large.turns.acquire()
                except asyncio.CancelledError:
                    self._flow.large.release()
                    raise
        except TimeoutError:
            raise VtpmError(
                "MESSAGE_ROOM_BUSY",
                "too many large messages are under way",
                remedy="send it again in a moment",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            ) from None
        self._large_since = time.monotonic()

    def _settle(self, *, end: bool = False) -> None:
        """Let others go on when there is no large message any more."""
        if self._large_since is not None and (end or self._watch.unfinished <= _FREE_SIZE):
            self._large_since = None
            self._large.turns.release()
            self._flow.large.release()

    async def _answers(self, inner: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(inner, _CHUNK_SIZE):
                if refused := self._watch.answered(data):
                    self._flow.seen(refused)
                self._settle()
                async with asyncio.timeout(_STALL_TIMEOUT_S):
                    await loop.sock_sendall(self._client, data)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
