"""How things are measured: rounds that alternate between the two, medians, ratios."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `ratio` is what the bound is about; `within` says whether it is kept."""

    what: str
    ours: str
    peer: str
    ratio: str
    reach: str
    within: bool

    @classmethod
    def compared(cls, what: str, ours: float, peer: float | None, bound: float, unit: Callable[[float], str]) -> Row:
        """A row whose bound is a multiple of the peer's value."""
        if peer is None:
            return cls(what, unit(ours), "not installed", "", f"≤ {bound:g} × swtpm", within=True)
        return cls(what, unit(ours), unit(peer), f"{ours / peer:.2f}", f"≤ {bound:g} × swtpm", within=ours <= bound * peer)


def micros(seconds: float) -> str:
    """Seconds as text, in µs."""
    return f"{seconds * 1e6:.1f} µs"


def millis(seconds: float) -> str:
    """Seconds as text, in ms."""
    return f"{seconds * 1e3:.1f} ms"


def round_trips(sock: socket.socket, command: bytes, count: int) -> float:
    """Median round trip in seconds of `count` commands, one after the other."""
    send, receive, now = sock.sendall, sock.recv, time.perf_counter
    times = []
    for _ in range(count):
        start = now()
        send(command)
        receive(4096)
        times.append(now() - start)
    return statistics.median(times)


def alternate(rounds: int, *measures: Callable[[], float]) -> Sequence[float]:
    """Run the measures in turn, `rounds` times; the median of each."""
    results = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*results, strict=True)]


@contextlib.contextmanager
def placed(cores: Mapping[int, int]) -> Iterator[None]:
    """Keep processes (0: this one) on a core each."""
    before = {pid: os.sched_getaffinity(pid) for pid in cores}
    available = sorted(os.sched_getaffinity(0))
    for pid, core in cores.items():
        os.sched_setaffinity(pid, {available[core % len(available)]})
    try:
        yield
    finally:
        for pid, allowed in before.items():
            os.sched_setaffinity(pid, allowed)


def private_memory(pid: int) -> int:
    """Private memory of a process in bytes (smaps_rollup)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", text, re.M)) << 10


def machine() -> str:
    """The machine by cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores, {round(memory / 2**30)} GiB of memory"
