"""One function for each line of the table."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import swtpm
from tests.bench.blackout import blackout
from tests.bench.boot import boot
from tests.bench.certified import certified
from tests.bench.dropin import dropin
from tests.bench.eventlog import eventlog
from tests.bench.guests import guests
from tests.bench.hibernation import hibernation
from tests.bench.limits import hostile, writes
from tests.bench.measure import Row, alternate, micros, millis, placed, private_memory, round_trips
from tests.support import raw
from tests.support.daemon import ROOT, DaemonProcess, worker_pids
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

_DEFAULT_KEYS = pb.Profile()
_SMALL_KEYS = pb.Profile(ek_algorithms=[pb.ECC_P256])
_SIGNERS = 8
_SIGN_SECONDS = 4.0


def on_the_socket() -> list[Row]:
    """PCR_Read and durable NV_Increment on the VM's socket, both daemons side by side on the same file system."""
    with DaemonProcess() as ours, tempfile.TemporaryDirectory(prefix="peer-") as directory:
        path = ours.running("bench").tpm_socket
        own = raw.connect(path)
        raw.succeed(own, raw.nv_define(raw.COUNTER, counter=True))
        raw.succeed(own, raw.nv_increment())
        read, increment = raw.pcr_read(0), raw.nv_increment()
        if not swtpm.installed():
            return [
                Row.compared("PCR_Read round trip", round_trips(own, read, 20_000), None, 1.25, micros),
                Row.compared("durable NV_Increment", round_trips(own, increment, 2000), None, 1.5, micros),
            ]
        state = Path(directory) / "state"
        swtpm.setup(state)
        (worker,) = worker_pids(ours.client.host.GetHost(pb.GetHostRequest()).engine_host_pid)
        with swtpm.running(state) as (socket_path, peer):
            other = raw.connect(socket_path)
            raw.succeed(other, raw.nv_define(raw.COUNTER, counter=True))
            raw.succeed(other, raw.nv_increment())
            writes = alternate(9, lambda: round_trips(own, increment, 500), lambda: round_trips(other, increment, 500))
            # Where the scheduler puts client and TPM decides more than either program does, so both placements are given.
            with placed({0: 0, worker: 0, peer: 0}):
                near = alternate(9, lambda: round_trips(own, read, 5000), lambda: round_trips(other, read, 5000))
            with placed({0: 0, worker: 1, peer: 1}):
                far = alternate(9, lambda: round_trips(own, read, 5000), lambda: round_trips(other, read, 5000))
    return [
        Row.compared("PCR_Read round trip on the VM's socket, one core", near[0], near[1], 1.25, micros),
        Row.compared("PCR_Read round trip on the VM's socket, two cores", far[0], far[1], 1.25, micros),
        Row.compared("durable NV_Increment (swtpm's is not synced)", writes[0], writes[1], 1.5, micros),
    ]


def create() -> list[Row]:
    """Create with RSA-2048 EK, P-384 EK and AK, cold."""
    with DaemonProcess() as ours, tempfile.TemporaryDirectory(prefix="peer-") as directory:
        numbers = iter(range(1000))

        def one() -> float:
            start = time.perf_counter()
            ours.create(f"bench-{next(numbers)}", profile=_DEFAULT_KEYS)
            return time.perf_counter() - start

        what = "create: RSA-2048 EK, P-384 EK, AK, cold (swtpm_setup)"
        if not swtpm.installed():
            return [Row.compared(what, alternate(9, one)[0], None, 0.25, millis)]
        own, other = alternate(9, one, lambda: swtpm.setup(Path(directory) / str(next(numbers))))
    return [Row.compared(what, own, other, 0.25, millis)]


def restart(instances: int = 1000) -> list[Row]:
    """From the start of the process to an answer about an instance."""
    daemon = DaemonProcess()
    try:
        daemon.start()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: daemon.create(f"bench-{number}", profile=_SMALL_KEYS), range(instances)))

        def once() -> float:
            daemon.stop()
            start = time.perf_counter()
            daemon.start()
            daemon.get("bench-7")
            return time.perf_counter() - start

        once()
        (seconds,) = alternate(5, once)
    finally:
        daemon.close()
    what = f"restart: answering with {instances} instances in the store"
    return [Row(what, f"{seconds:.2f} s", "", "", "≤ 2 s", within=seconds <= 2)]


def memory() -> list[Row]:
    """Private memory of a worker that has served its VM and the service."""
    with DaemonProcess() as ours, tempfile.TemporaryDirectory(prefix="peer-") as directory:
        instances = [ours.running(f"bench-{number}", profile=_DEFAULT_KEYS) for number in range(8)]
        host_pid = ours.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
        for instance in instances:
            round_trips(raw.connect(instance.tpm_socket), raw.pcr_read(0), 100)
        served = statistics.median(private_memory(pid) for pid in worker_pids(host_pid))
        for instance in instances:
            ours.client.tpm.Quote(_quote(instance.name))
        quoted = statistics.median(private_memory(pid) for pid in worker_pids(host_pid))
        peer = ""
        if swtpm.installed():
            swtpm.setup(Path(directory) / "state")
            with swtpm.running(Path(directory) / "state") as (path, pid):
                round_trips(raw.connect(path), raw.pcr_read(0), 100)
                peer = f"{private_memory(pid) / 2**20:.1f} MB"
    return [
        Row(
            "private memory of a running worker (median of 8)",
            f"{served / 2**20:.1f} MB",
            peer,
            "",
            "≤ 3 MB",
            within=served <= 3 << 20,
        ),
        Row("the same after its first quote", f"{quoted / 2**20:.1f} MB", "", "", "≤ 3 MB", within=quoted <= 3 << 20),
    ]


def _quote(name: str) -> tpm_pb2.QuoteRequest:
    selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=range(8))
    return tpm_pb2.QuoteRequest(instance=name, selections=[selection], nonce=b"bench")


def quotes() -> list[Row]:
    """P-256 quotes a second: eight instances over gRPC, and the raw engine alone on the same cores."""
    engine = [sys.executable, "-m", "tests.bench.engine", str(_SIGN_SECONDS)]
    alone = [subprocess.Popen(engine, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    raw_rate = sum(int(process.communicate()[0]) for process in alone) / _SIGN_SECONDS
    with DaemonProcess() as ours:
        for number in range(_SIGNERS):
            ours.running(f"bench-{number}")
        client = [sys.executable, "-m", "tests.bench.quoter", f"unix:{ours.runtime_dir}/operator.sock", str(_SIGN_SECONDS)]
        answered = subprocess.run([*client, str(_SIGNERS)], cwd=ROOT, check=True, capture_output=True).stdout
    rate = int(answered) / _SIGN_SECONDS
    what = f"gRPC Quote, P-256, {_SIGNERS} instances at once (peer: the raw engine)"
    share = rate / raw_rate
    return [Row(what, f"{rate:.0f}/s", f"{raw_rate:.0f}/s", f"{share:.2f}", "≥ 0.70 × raw engine", within=share >= 0.7)]


ROWS = {
    "socket": on_the_socket,
    "create": create,
    "certified": certified,
    "restart": restart,
    "memory": memory,
    "quotes": quotes,
    "writes": writes,
    "hostile": hostile,
    "guests": guests,
    "blackout": blackout,
    "boot": boot,
    "hibernation": hibernation,
    "dropin": dropin,
    "eventlog": eventlog,
}
