"""How the kernel's scheduler is asked to treat workers: a share for each, in short turns: none keeps others waiting.

A TPM command takes microseconds to a few milliseconds. Who asks for a short slice (sched_setattr(2), Linux 6.12) gets its
share of a core in small pieces: it is let in sooner when it wakes, before those with longer slices, and has to give way
sooner when it does not stop. So it is the greedy that wait for the modest. Older kernels take no notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from typing import Final

_SYSCALL: Final = {"x86_64": 314, "aarch64": 274}
# struct sched_attr, version 0: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
_SCHED_OTHER: Final = 0
_RESET_ON_FORK: Final = 1
# The shortest that the kernel takes is 0.1 ms.
SLICE_NS: Final = 100_000

_libc: Final = ctypes.CDLL(None, use_errno=True)


def stand_alone() -> None:
    """Make a session of this worker's own, which the kernel gives a share like any other's (sched(7), autogroup).

    In one session with all workers, a modest one would have to share with a greedy one what the session gets.
    """
    # A process that leads a group already can't; a fork never does.
    with contextlib.suppress(OSError):
        os.setsid()


def take_short_turns() -> bool:
    """Ask for short slices for this thread, not for what it forks; return whether the kernel took it."""
    number = _SYSCALL.get(os.uname().machine)
    if number is None or os.sched_getscheduler(0) != _SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, _SCHED_OTHER, _RESET_ON_FORK, nice, 0, SLICE_NS, 0, 0)
    return bool(_libc.syscall(number, 0, attributes, 0) == 0)
