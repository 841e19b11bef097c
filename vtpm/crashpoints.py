"""Named places where fault tests kill the process, to see what is left.

`VTPM_CRASH_POINT=commit.before_sync:3` sends SIGKILL to this process when it passes that place for the third time. Without the
variable a crash point is a comparison with None.
"""

from __future__ import annotations

import os
import signal
from typing import Final


def _parse(text: str) -> tuple[str, int] | None:
    name, _, count = text.partition(":")
    return (name, int(count or 1)) if name else None


_TARGET: Final = _parse(os.environ.get("VTPM_CRASH_POINT", ""))
_passes = 0


def crash_point(name: str) -> None:
    """Die here if a fault test asked for it."""
    global _passes
    if _TARGET is None or _TARGET[0] != name:
        return
    _passes += 1
    if _passes == _TARGET[1]:
        os.kill(os.getpid(), signal.SIGKILL)
