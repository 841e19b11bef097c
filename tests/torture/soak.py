"""`./script/soak [--seconds N] [--instances N] [--every S] [--pause S]`: steady load; memory and descriptors stay flat."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import DaemonProcess, worker_pids
from tests.torture.guest import Guest
from vtpm.api.v1 import instance_pb2 as pb

# What may come on top between the end of the first quarter and the end: allocators and caches settle late.
_MORE_MEMORY = 0.10
_MORE_MEMORY_KB = 4096
_MORE_DESCRIPTORS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory in KB and open descriptors, by what it is of."""

    at_s: float
    memory_kb: dict[str, int]
    descriptors: dict[str, int]

    def __str__(self) -> str:
        cells = [f"{self.memory_kb[name]:>9} KB {self.descriptors[name]:>5} fds" for name in self.memory_kb]
        return f"{self.at_s:>7.0f} s  " + "   ".join(cells)


def _take(begun: float, daemon: DaemonProcess) -> Sample:
    assert daemon.process is not None
    host: int = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    processes = {"daemon": [daemon.process.pid], "engine host": [host], "largest worker": worker_pids(host)}
    memory = {name: max((_memory(pid) for pid in pids), default=0) for name, pids in processes.items()}
    descriptors = {name: max((_descriptors(pid) for pid in pids), default=0) for name, pids in processes.items()}
    return Sample(time.monotonic() - begun, memory, descriptors)


def _memory(pid: int) -> int:
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        # A worker that was just stopped.
        return 0
    return int(found[1]) if found else 0


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def rising(samples: list[Sample]) -> list[str]:
    """What rose from the first quarter's highest to the last quarter's, by more than may be."""
    quarter = max(1, len(samples) // 4)
    found = []
    for name in samples[0].memory_kb:
        early, late = (max(sample.memory_kb[name] for sample in part) for part in (samples[:quarter], samples[-quarter:]))
        if late > early * (1 + _MORE_MEMORY) and late > early + _MORE_MEMORY_KB:
            found.append(f"memory of the {name}: {early} KB, then {late} KB")
        early, late = (max(sample.descriptors[name] for sample in part) for part in (samples[:quarter], samples[-quarter:]))
        if late > early + _MORE_DESCRIPTORS:
            found.append(f"descriptors of the {name}: {early}, then {late}")
    return found


# Shorter than the longest pause between two commands, so that instances hibernate and thaw all the time.
_ENVIRONMENT = {"VTPM_LOG_LEVEL": "warning", "VTPM_IDLE_TIMEOUT_S": "0.1", "VTPM_POOL_SIZE": "2"}


def soak(seconds: float, instances: int, every_s: float, pause_s: float) -> tuple[list[Sample], list[str]]:
    """Run and sample; return the samples and what is wrong."""
    ended = threading.Event()
    with DaemonProcess(environment=_ENVIRONMENT) as daemon:
        address = f"unix:{daemon.runtime_dir / 'operator.sock'}"
        guests = [Guest(address, f"vm-{number}", 1, ended) for number in range(instances)]
        for guest in guests:
            guest.pause_s = pause_s
            guest.start()
        begun, samples = time.monotonic(), []
        # What is made at the start does not count.
        ended.wait(every_s)
        while time.monotonic() - begun < seconds and not ended.wait(every_s):
            samples.append(_take(begun, daemon))
            sys.stdout.write(f"{samples[-1]}\n")
            sys.stdout.flush()
        ended.set()
        for guest in guests:
            guest.join()
        return samples, [f"{guest.failure}" for guest in guests if guest.failure is not None]


def main() -> int:
    """Print the samples, then whether they are flat."""
    parser = argparse.ArgumentParser(prog="script/soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--every", type=float, default=30, help="seconds between samples")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two actions of an instance")
    arguments = parser.parse_args()
    samples, wrong = soak(arguments.seconds, arguments.instances, arguments.every, arguments.pause)
    wrong += rising(samples) if samples else ["no samples"]
    sys.stdout.write("\n".join(["flat" if not wrong else "NOT FLAT", *wrong]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
