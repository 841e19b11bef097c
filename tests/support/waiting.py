"""To wait for what comes a moment later: a process that ends, a state that is reached."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], timeout_s: float = 20, *, told: Callable[[], str] = str) -> None:
    """Return when `condition` holds; fail with what `told` says when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.01)
