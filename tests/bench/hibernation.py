"""Hibernation: how long it takes, how long its end takes, and what thousands of idle instances cost."""

from __future__ import annotations

import os
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.measure import Row, millis, private_memory
from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb

_QUIET = {"VTPM_IDLE_TIMEOUT_S": "0", "VTPM_LOG_LEVEL": "warning"}
_ROUNDS = 300
_REST_S = 0.05
# Each takes two descriptors in the daemon and two in the engine host, which need some for themselves.
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
_ROOM = 10_000 if _LIMIT == resource.RLIM_INFINITY else (_LIMIT - 400) // 2
# The bound is for ten thousand; making them takes some minutes.
_INSTANCES = int(os.environ.get("VTPM_BENCH_INSTANCES", min(10_000, _ROOM)))
_MAX_MEMORY_MB = 300
_MAX_STORE_KB = 25


def hibernation() -> list[Row]:
    """One instance, again and again; then thousands."""
    return [*_one(), *_many()]


def _one() -> list[Row]:
    with DaemonProcess(environment=_QUIET) as daemon:
        sock = raw.connect(daemon.running("bench").tpm_socket)
        command, request = raw.pcr_read(0), pb.HibernateInstanceRequest(instance="bench")
        falls, thaws = [], []
        for _ in range(_ROUNDS):
            raw.succeed(sock, command)
            begun = time.perf_counter()
            daemon.client.instances.HibernateInstance(request)
            asleep = time.perf_counter()
            # As of an instance that has slept for a while: what follows its hibernation is over.
            time.sleep(_REST_S)
            woken = time.perf_counter()
            raw.succeed(sock, command)
            falls.append(asleep - begun)
            thaws.append(time.perf_counter() - woken)
        alone = _durable_write(daemon.state_dir)
    p50, p99 = statistics.median(thaws), statistics.quantiles(thaws, n=100)[98]
    fall = statistics.median(falls)
    return [
        Row("first command of a hibernated instance, p50", millis(p50), "", "", "≤ 1 ms", within=p50 <= 1e-3),
        Row("the same, p99", millis(p99), "", "", "≤ 10 ms", within=p99 <= 10e-3),
        Row("a write of 4 KB made durable, after the same rest, p50", millis(alone), "", "", "none", within=True),
        Row("hibernate one instance, by the API, p50", millis(fall), "", "", "≤ 3 ms", within=fall <= 3e-3),
    ]


def _durable_write(directory: Path) -> float:
    """The least that a thaw has to wait for, in seconds: the disk, when nobody has used it or a core for a moment."""
    times = []
    with (directory / "durable write").open("wb", buffering=0) as file:
        file.write(bytes(4096 * 16))
        os.fsync(file.fileno())
        for number in range(_ROUNDS):
            time.sleep(_REST_S)
            begun = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(4096), 4096 * (number % 16))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _many() -> list[Row]:
    with DaemonProcess(environment=_QUIET) as daemon:
        host = daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid

        def make(number: int) -> None:
            name = f"bench-{number}"
            daemon.create(name)
            daemon.power_on(name)
            daemon.hibernate(name)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(_INSTANCES)))
        assert daemon.process is not None
        memory = (private_memory(daemon.process.pid) + private_memory(host)) / 2**20
        begun = time.perf_counter()
        daemon.kill()
        daemon.start()
        restart = time.perf_counter() - begun
        # Stopped, so that the write-ahead log is in the database.
        daemon.stop()
        store = sum(path.stat().st_size for path in daemon.state_dir.glob("vtpm.db*")) / 1024 / _INSTANCES
    what = f"{_INSTANCES:,} hibernated instances"
    return [
        Row(
            f"{what}: private memory of daemon and engine host", f"{memory:.0f} MB", "", "", f"≤ {_MAX_MEMORY_MB} MB",
            within=memory <= _MAX_MEMORY_MB,
        ),
        Row(f"{what}: store, each", f"{store:.1f} KB", "", "", f"≤ {_MAX_STORE_KB} KB", within=store <= _MAX_STORE_KB),
        Row(f"{what}: kill -9 of the daemon until the next one serves", f"{restart:.2f} s", "", "", "none", within=True),
    ]  # fmt: skip
