"""Named places where fault tests kill the process, to see what is left.

`VTPM_TEST_BUILD=1 VTPM_CRASH_POINT=commit.before_sync:3` sends SIGKILL to a process that passes that place for the third time:
the daemon, the engine host (`host.…`) or a worker (`worker.…`, each counting for itself). The first variable is what makes an
installation the test build: without it the second one is not looked at, and a crash point is a comparison with None.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Final

# What the engine host inherits of the daemon's environment, to have crash points of its own and in its workers.
VARIABLES: Final = ("VTPM_TEST_BUILD", "VTPM_CRASH_POINT")


def parse(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return which crash point is asked for and at which pass; None outside of the test build."""
    if environment.get("VTPM_TEST_BUILD") != "1":
        return None
    name, _, count = environment.get("VTPM_CRASH_POINT", "").partition(":")
    return (name, int(count or 1)) if name else None


_TARGET: Final = parse(os.environ)
_passes = 0
_held = False


def crash_point(name: str) -> None:
    """Die here if a fault test asked for it."""
    global _passes
    if _TARGET is None or _TARGET[0] != name or _held:
        return
    _passes += 1
    if _passes == _TARGET[1]:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Pass crash points without dying or counting: in a rehearsal."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` a process that the daemon starts needs for its crash points: nothing outside of the test build."""
    return {key: environment[key] for key in VARIABLES if key in environment} if parse(environment) else {}
