"""What many instances do to each other: durable writes at once, and one hostile VM beside quiet ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.bench.flood import COMMANDS, flood, flooding
from tests.bench.measure import Row, micros
from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.engine.scheduling import take_short_turns

_WRITERS = 64
_WRITE_SECONDS = 2.0
_WRITE_ROUNDS = 5
_QUIET = 4
_READS = 2000
_WRITES = 500
_PAUSE_S = 0.0005
_QUIET_ROUNDS = 5
# How a VM can be hostile: what it asks without a pause, on how many connections. Half of what it may have: those of the round
# before may not be gone yet.
_HOSTILE = (("PCR_Read", 1), ("PCR_Read", 8), ("NV_Increment", 8), ("CreatePrimary", 8))


def writes() -> list[Row]:
    """Durable NV increments of one instance, and of 64 at once."""
    with DaemonProcess() as daemon:
        with ThreadPoolExecutor(4) as pool:
            paths = list(pool.map(lambda number: daemon.running(f"bench-{number}").tpm_socket, range(_WRITERS)))
        sockets = [raw.connect(path) for path in paths]
        for sock in sockets:
            raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
        command = raw.nv_increment()
        alone, together = [], []
        for _ in range(_WRITE_ROUNDS):
            alone.append(flood(sockets[:1], command, _WRITE_SECONDS) / _WRITE_SECONDS)
            together.append(flood(sockets, command, _WRITE_SECONDS) / _WRITE_SECONDS)
    one, many = statistics.median(alone), statistics.median(together)
    ratio = many / one
    return [
        Row(
            f"durable NV_Increment, {_WRITERS} instances at once (peer: one of ours)",
            f"{many:.0f}/s",
            f"{one:.0f}/s",
            f"{ratio:.2f}",
            "≥ 4 × one instance",
            within=ratio >= 4,
        )
    ]


def _p99(paths: Sequence[str], command: bytes, count: int) -> float:
    """The 99th percentile of round trips in seconds, of VMs that ask now and then."""
    sockets = [raw.connect(path) for path in paths]
    times = []
    for number in range(count):
        sock = sockets[number % len(sockets)]
        time.sleep(_PAUSE_S)
        start = time.perf_counter()
        sock.sendall(command)
        sock.recv(4096)
        times.append(time.perf_counter() - start)
    for sock in sockets:
        sock.close()
    return statistics.quantiles(times, n=100)[98]


def hostile() -> list[Row]:
    """PCR_Read, and NV_Increment, of quiet VMs with and without one that asks without a pause."""
    # What is measured is the wait for the TPM, not this process's wait for a core.
    take_short_turns()
    with DaemonProcess() as daemon:
        quiet = [daemon.running(f"quiet-{number}").tpm_socket for number in range(_QUIET)]
        path = daemon.running("hostile").tpm_socket
        for each in (*quiet, path):
            with raw.connect(each) as sock:
                raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
                raw.succeed(sock, raw.nv_increment())
        rows = [_beside(quiet, "PCR_Read", _READS, path, *flooded) for flooded in _HOSTILE]
        rows.append(_beside(quiet, "NV_Increment", _WRITES, path, "NV_Increment", 8))
        return rows


def _beside(quiet: Sequence[str], asked: str, count: int, path: str, flooded: str, connections: int) -> Row:
    without, beside = [], []
    for _ in range(_QUIET_ROUNDS):
        without.append(_p99(quiet, COMMANDS[asked], count))
        with flooding(path, flooded, connections):
            beside.append(_p99(quiet, COMMANDS[asked], count))
    base, value = statistics.median(without), statistics.median(beside)
    return Row(
        f"p99 of {asked} beside a VM that floods {flooded} on {connections} connections (peer: without it)",
        micros(value),
        micros(base),
        f"{value / base:.2f}",
        "≤ 3 × without",
        within=value <= 3 * base,
    )
