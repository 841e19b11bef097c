"""Bytes between two sockets, both ways, unread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

# Read at once, and so all that one direction of a connection ever holds. A silent connection holds nothing.
_CHUNK_SIZE: Final = 64 << 10
# How long a peer may take no bytes that are there for it, and how long an answer may flow on after its request's end.
_STALL_TIMEOUT_S: Final = 120.0
_HALF_CLOSED_TIMEOUT_S: Final = 60.0


async def carry_both_ways(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two non-blocking stream sockets until both ends are done.

    Raises:
        TimeoutError: an end took nothing for too long.
    """
    loop = asyncio.get_running_loop()
    ways = {loop.create_task(_carry_one_way(one, other)), loop.create_task(_carry_one_way(other, one))}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        # What is still under way in the other direction arrives: the last answers of a server that ends, for one.
        async with asyncio.timeout(_HALF_CLOSED_TIMEOUT_S):
            await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()
        # Neither socket may be closed while the loop still waits for it.
        await asyncio.gather(*ways, return_exceptions=True)


async def _carry_one_way(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(source, _CHUNK_SIZE):
            async with asyncio.timeout(_STALL_TIMEOUT_S):
                await loop.sock_sendall(sink, data)
    except TimeoutError:
        # Not an end like others, though it is an OSError too: a sink that takes nothing has the connection cut.
        raise
    except OSError:
        # An end that has gone ends this direction; that it is gone, the other direction finds out by itself.
        pass
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
