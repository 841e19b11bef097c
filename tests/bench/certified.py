"""Creation with EK, AK and platform certificates in NV: from the pool, cold, in bulk; beside swtpm_setup with its CA."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import swtpm
from tests.bench.measure import Row, millis
from tests.support.daemon import DaemonProcess
from tests.support.pooled import filled
from vtpm.api.v1 import instance_pb2 as pb

_PROFILE = pb.Profile()
_FROM_POOL = 40
_COLD = 15
_PEER = 7
# `VTPM_BENCH_BULK=1000 ./script/bench certified` for the whole thousand.
_BULK = int(os.environ.get("VTPM_BENCH_BULK", "300"))
_AT_ONCE = 8


def _peer(directory: Path) -> list[float]:
    """What swtpm_setup takes with certificates, its CA made before."""
    ca = directory / "ca"
    ca.mkdir()
    (directory / "localca.conf").write_text(
        f"statedir = {ca}\nsigningkey = {ca}/key.pem\nissuercert = {ca}/cert.pem\ncertserial = {ca}/serial\n"
    )
    (directory / "options").write_text("--platform-manufacturer vTPM\n--platform-version 1\n--platform-model VM\n")
    (directory / "setup.conf").write_text(
        f"create_certs_tool = /usr/bin/swtpm_localca\n"
        f"create_certs_tool_config = {directory}/localca.conf\n"
        f"create_certs_tool_options = {directory}/options\n"
    )
    times = []
    # The first one makes the CA.
    for number in range(_PEER + 1):
        state = directory / str(number)
        state.mkdir()
        command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--config", f"{directory}/setup.conf", "--createek"]
        command += ["--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--logfile", str(state / "log")]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def _created(daemon: DaemonProcess, name: str) -> float:
    start = time.perf_counter()
    daemon.create(name, profile=_PROFILE)
    return time.perf_counter() - start


def certified() -> list[Row]:
    """The three of them, and the peer in the same run."""
    peer: float | None = None
    if swtpm.installed():
        with tempfile.TemporaryDirectory(prefix="peer-") as directory:
            peer = statistics.median(_peer(Path(directory)))
    with DaemonProcess(environment={"VTPM_POOL_SIZE": str(_FROM_POOL)}) as daemon:
        filled(daemon, _FROM_POOL, timeout_s=120)
        pooled = statistics.median(_created(daemon, f"pooled-{number}") for number in range(_FROM_POOL))
    with DaemonProcess() as daemon:
        _created(daemon, "first")
        cold = statistics.median(_created(daemon, f"cold-{number}") for number in range(_COLD))
        start = time.perf_counter()
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(lambda number: _created(daemon, f"bulk-{number}"), range(_BULK)))
        rate = _BULK / (time.perf_counter() - start)
    what = "create with EK, AK and platform certificates"
    bulk = f"{_BULK} of them in bulk, cold, on {os.cpu_count()} cores"
    return [
        Row(f"{what}, from the pool (p50)", millis(pooled), "", "", "≤ 10 ms", within=pooled <= 0.010),
        Row.compared("the same, beside swtpm_setup with certificates", pooled, peer, 0.02, millis),
        Row.compared(f"{what}, cold", cold, peer, 0.2, millis),
        Row(bulk, f"{rate:.1f}/s", "", "", "≥ 12/s", within=rate >= 12),
    ]
