from __future__ import annotations

import os
import threading

from vtpm.engine.scheduling import take_short_turns


def in_a_thread_of_its_own() -> tuple[int, int, int]:
    """What the scheduler was asked by hand, so that the test runner is left as it is."""
    seen: list[tuple[int, int, int]] = []

    def ask() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        take_short_turns()
        policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
        seen.append((before, os.getpriority(os.PRIO_PROCESS, 0), policy))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return seen[0]


def test_only_the_slice_changes() -> None:
    before, after, policy = in_a_thread_of_its_own()
    assert (after, policy) == (before, os.SCHED_OTHER)
