"""What the listeners of this room share: accepting that does not end by a bad moment, and a log that peers can't fill."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Hashable
from typing import Any, Final

import structlog

log: Final = structlog.get_logger("vtpm.wire")

_ACCEPT_RETRY_S: Final = 0.5
_QUIET_S: Final = 10.0
_MAX_SUBJECTS: Final = 1024


async def accept_forever(listener: socket.socket, handle: Callable[[socket.socket, Any], None]) -> None:
    """Give each connection and its peer's address to `handle`, which owns the connection from then on."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        try:
            connection, peer = await loop.sock_accept(listener)
        except OSError as error:
            # Out of descriptors, or a peer that has gone again: others may come.
            log.warning("wire.accept_failed", error=error.strerror)
            await asyncio.sleep(_ACCEPT_RETRY_S)
            continue
        connection.setblocking(False)
        handle(connection, peer)


class QuietLog:
    """Logs the same event about the same subject once in ten seconds, with the number of those left out since."""

    def __init__(self) -> None:
        self._said: dict[Hashable, tuple[float, int]] = {}

    def warning(self, event: str, subject: Hashable, **fields: object) -> None:
        """Log, unless it was said just now. `subject` is not logged."""
        omitted = self.due(event, subject)
        if omitted is not None:
            log.warning(event, **fields, **({"omitted": omitted} if omitted else {}))

    def due(self, event: str, subject: Hashable) -> int | None:
        """Return how often it was left out since it was last said; None if it is to be left out now."""
        now = time.monotonic()
        until, omitted = self._said.get((event, subject), (0.0, 0))
        if now < until:
            self._said[event, subject] = (until, omitted + 1)
            return None
        if len(self._said) >= _MAX_SUBJECTS:
            self._said.clear()
        self._said[event, subject] = (now + _QUIET_S, 0)
        return omitted


class Seldom(logging.Filter):
    """Lets the same message of the standard library's logging through once in ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet = QuietLog()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be written."""
        return self._quiet.due(record.name, (record.pathname, record.lineno, str(record.msg)[:80])) is not None
