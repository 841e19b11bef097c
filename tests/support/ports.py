"""Free TCP ports."""

from __future__ import annotations

import contextlib
import random
import socket

_numbers = random.SystemRandom()
_given: set[int] = set()


def free_pair() -> int:
    """Return a port that is free on loopback, as is the next one; below those that the kernel gives out, and never twice."""
    while True:
        port = _numbers.randrange(10240, 32000, 2)
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            socket.create_server(("127.0.0.1", port + 1)).close()
            _given.add(port)
            return port
