"""The lines between the daemon and a worker, as long as neither has its end."""

from __future__ import annotations

import contextlib
import socket


class SocketPairs:
    """Two socket pairs for one worker; what was not taken over is closed on exit."""

    def __init__(self) -> None:
        self.operations, self._operations_end = socket.socketpair()
        self.commits, self._commits_end = socket.socketpair()

    @property
    def worker_ends(self) -> list[int]:
        """The descriptors that the worker gets."""
        return [self._operations_end.fileno(), self._commits_end.fileno()]

    def __enter__(self) -> SocketPairs:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._operations_end.close()
        self._commits_end.close()
        if kind is not None:
            with contextlib.suppress(OSError):
                self.operations.close()
                self.commits.close()
