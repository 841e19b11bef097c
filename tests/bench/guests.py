"""A hundred hostile guests on their guest sockets: what they cost the daemon, its operators and an honest guest."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.measure import Row, millis
from tests.bench.rude import KINDS, rude
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.engine.scheduling import take_short_turns

_GUESTS = 100
_PAUSE_S = 0.002
_WARM = 50
_SECONDS = 10.0
_WARM_SECONDS = 2.0
_ROUNDS = 3
_MEMORY = 64 << 20


def _resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def _take_turns(pid: int, seconds: float, *calls: Callable[[], object]) -> tuple[list[float], int]:
    """The 99th percentile of each call in seconds, made in turns for a while, and the most memory of the daemon meanwhile."""
    times: list[list[float]] = [[] for _ in calls]
    most, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            time.sleep(_PAUSE_S)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        most = max(most, _resident(pid))
    return [statistics.quantiles(taken, n=100)[98] for taken in times], most


@contextlib.contextmanager
def _hostile(paths: list[str]) -> Iterator[None]:
    """Each kind of rude guest in a process of its own, all at once."""
    with contextlib.ExitStack() as stack:
        for number, kind in enumerate(KINDS):
            stack.enter_context(rude(kind, paths[number :: len(KINDS)]))
        yield


def guests() -> list[Row]:
    """An operator's and an honest guest's calls, and the daemon's memory, with and without a hundred hostile guests."""
    # What is measured is the wait for the daemon, not this process's wait for a core.
    take_short_turns()
    with DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0"}) as daemon:
        with ThreadPoolExecutor(4) as pool:
            paths = list(pool.map(lambda number: daemon.running(f"hostile-{number}").guest_socket, range(_GUESTS)))
        guest = Client(f"unix:{daemon.running('honest').guest_socket}")

        def operator() -> None:
            daemon.client.call(daemon.client.instances.GetInstance, pb.GetInstanceRequest(instance="honest"))

        def honest() -> None:
            guest.call(guest.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest())

        for _ in range(_WARM):
            operator()
            honest()
        assert daemon.process is not None
        pid = daemon.process.pid
        before = _resident(pid)
        quiet, beside, most = [], [], 0
        for _ in range(_ROUNDS):
            quiet.append(_take_turns(pid, _SECONDS / 2, operator, honest)[0])
            with _hostile(paths):
                # Their memory counts from the first moment; times do when all are at it.
                _, at_first = _take_turns(pid, _WARM_SECONDS, operator, honest)
                times, later = _take_turns(pid, _SECONDS, operator, honest)
            beside.append(times)
            most = max(most, at_first, later)
        guest.close()
    (quiet_operator, quiet_honest), (operator_s, honest_s) = (
        [statistics.median(column) for column in zip(*rounds, strict=True)] for rounds in (quiet, beside)
    )
    more = most - before
    beside_text = f"beside {_GUESTS} hostile guests (peer: without them)"
    return [
        Row(
            f"memory of the daemon {beside_text}",
            f"{most / 2**20:.0f} MB",
            f"{before / 2**20:.0f} MB",
            f"+ {more / 2**20:.0f} MB",
            "≤ + 64 MB",
            within=more <= _MEMORY,
        ),
        Row(
            f"p99 of an operator's GetInstance {beside_text}",
            millis(operator_s),
            millis(quiet_operator),
            f"{operator_s / quiet_operator:.2f}",
            "≤ 5 × without",
            within=operator_s <= 5 * quiet_operator,
        ),
        Row(
            f"p99 of an honest guest's ReadPcrs {beside_text}",
            millis(honest_s),
            millis(quiet_honest),
            f"{honest_s / quiet_honest:.2f}",
            "answered",
            within=True,
        ),
    ]
