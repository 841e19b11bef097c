"""What many instances do to each other: durable writes at once, and one hostile VM beside quiet ones."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

from tests.bench.flood import COMMANDS, flood, flooding
from tests.bench.measure import Row, micros
from tests.hostile.stage import HostileStage
from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.engine.scheduling import take_short_turns
from vtpm.errors import VtpmError

_WRITERS = 64
_WRITE_SECONDS = 2.0
_WRITE_ROUNDS = 5
_QUIET = 4
_READS = 2000
_WRITES = 500
_PAUSE_S = 0.0005
_QUIET_ROUNDS = 5
_START_S = 0.2
# What a hostile worker does (tests.hostile.scripts).
_HOSTILE_WORKERS = (
    ("endless_commits", "good commits without a pause"),
    ("endless_large_commits", "the same, each as large as it may be"),
    ("commit_storm", "thousands of commits at once, ended and started anew"),
    ("imported_flood", "2.2 MB that nobody asked for, ended and started anew"),
)
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
        rows = [_beside_flood(quiet, "PCR_Read", _READS, path, *flooded) for flooded in _HOSTILE]
        rows.append(_beside_flood(quiet, "NV_Increment", _WRITES, path, "NV_Increment", 8))
        # What the machine alone does to whoever wakes while its cores are busy.
        count = os.cpu_count() or 1
        base, value = _compared(quiet, "PCR_Read", _READS, lambda: _calculating(count))
        what = f"p99 of PCR_Read beside {count} processes that calculate and use no TPM (peer: without them)"
        rows.append(Row(what, micros(value), micros(base), f"{value / base:.2f}", "none", within=True))
    return [*rows, *_beside_hostile_workers()]


def _beside_hostile_workers() -> list[Row]:
    """NV_Increment of quiet VMs beside workers that somebody has broken into, and that do their worst to the commit thread."""
    with HostileStage() as stage:
        quiet = [stage.daemon.running(f"quiet-{number}").tpm_socket for number in range(_QUIET)]
        for each in quiet:
            with raw.connect(each) as sock:
                raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
                raw.succeed(sock, raw.nv_increment())
        return [_beside_worker(stage, quiet, script, what) for script, what in _HOSTILE_WORKERS]


def _beside_worker(stage: HostileStage, quiet: Sequence[str], script: str, what: str) -> Row:
    base, value = _compared(quiet, "NV_Increment", _WRITES, lambda: _broken_into(stage, script))
    return Row(
        f"p99 of NV_Increment beside a hostile worker: {what} (peer: without it)",
        micros(value),
        micros(base),
        f"{value / base:.2f}",
        "≤ 10 × without",
        within=value <= 10 * base,
    )


@contextlib.contextmanager
def _broken_into(stage: HostileStage, script: str) -> Iterator[None]:
    """Have one instance's worker run a script, and start another as often as it is ended."""
    name = f"hostile-{uuid.uuid4().hex[:8]}"
    instance = stage.daemon.create(name).id
    ended = threading.Event()

    def again_and_again() -> None:
        client = Client(f"unix:{stage.daemon.runtime_dir / 'operator.sock'}")
        while not ended.is_set():
            stage.turn(instance, script)
            with contextlib.suppress(VtpmError):
                client.call(client.instances.StartInstance, pb.StartInstanceRequest(instance=name, startup=pb.STARTUP_CLEAR))
            while not ended.is_set():
                found = client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance=name))
                if found.state != pb.ON:
                    break
                ended.wait(_START_S)
            client.call(client.instances.StopInstance, pb.StopInstanceRequest(instance=name))
        client.close()

    operator = threading.Thread(target=again_and_again)
    operator.start()
    try:
        time.sleep(_START_S)
        yield
    finally:
        ended.set()
        operator.join()


@contextlib.contextmanager
def _calculating(count: int) -> Iterator[None]:
    """Keep `count` cores busy with what has nothing to do with us."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        time.sleep(_START_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _compared(
    quiet: Sequence[str], asked: str, count: int, hostile: Callable[[], AbstractContextManager[None]]
) -> tuple[float, float]:
    """The p99 of quiet VMs without and with what `hostile` starts, in turns."""
    without, beside = [], []
    for _ in range(_QUIET_ROUNDS):
        without.append(_p99(quiet, COMMANDS[asked], count))
        with hostile():
            beside.append(_p99(quiet, COMMANDS[asked], count))
    return statistics.median(without), statistics.median(beside)


def _beside_flood(quiet: Sequence[str], asked: str, count: int, path: str, flooded: str, connections: int) -> Row:
    base, value = _compared(quiet, asked, count, lambda: flooding(path, flooded, connections))
    return Row(
        f"p99 of {asked} beside a VM that floods {flooded} on {connections} connections (peer: without it)",
        micros(value),
        micros(base),
        f"{value / base:.2f}",
        "≤ 3 × without",
        within=value <= 3 * base,
    )
