"""A real daemon on an engine host whose workers may be hostile, and what is watched while they are."""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.support.daemon import ROOT, DaemonProcess
from tests.support.ports import free_pair
from tests.support.waiting import eventually

SLOTS = 1 << 16
_MEMORY_LIMIT = 256 << 20


class HostileStage:
    """The daemon, and the plan of who is hostile. Honest until `turn`."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.metrics_port = free_pair()
        own = {
            "VTPM_METRICS_ADDRESS": f"127.0.0.1:{self.metrics_port}",
            "VTPM_IDLE_TIMEOUT_S": "0",
            "VTPM_COMMAND_TIMEOUT_S": "1",
            "VTPM_COMMIT_TIMEOUT_S": "10",
        }
        self.daemon = DaemonProcess(environment={**own, **(environment or {})})
        self._plan_path = self.daemon.root / "plan"
        self._counts_path = self.daemon.root / "counts"
        self._plan: dict[str, tuple[str, int, int]] = {}
        self._lock = threading.Lock()
        self._slots = 0
        self.host: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HostileStage:
        self._write_plan()
        with self._counts_path.open("wb") as file:
            file.truncate(SLOTS * 8)
        with self._counts_path.open("r+b") as file:
            self._counts = mmap.mmap(file.fileno(), 0)
        self.host = start_host(
            self.daemon,
            "tests.hostile.host",
            str(self.daemon.root / "host.log"),
            VTPM_HOSTILE_PLAN=str(self._plan_path),
            VTPM_HOSTILE_COUNTS=str(self._counts_path),
        )
        self.daemon.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.daemon.close()
        assert self.host is not None
        self.host.kill()
        self.host.wait()
        self._counts.close()

    def turn(self, instance: str, script: str, seed: int = 0) -> None:
        """Have the next worker of an instance run a script."""
        with self._lock:
            self._slots += 1
            self._plan[instance] = script, seed, self._slots % SLOTS
            self._write_plan()

    def forgive(self, instance: str) -> None:
        """Have the next worker of an instance be an honest one."""
        with self._lock:
            self._plan.pop(instance, None)
            self._write_plan()

    def _write_plan(self) -> None:
        part = self._plan_path.with_suffix(".part")
        part.write_text(json.dumps(self._plan))
        part.rename(self._plan_path)

    @property
    def sent(self) -> int:
        """How many messages hostile workers have sent."""
        return sum(int.from_bytes(self._counts[at : at + 8], "little") for at in range(0, min(self._slots + 1, SLOTS) * 8, 8))

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def begin_to_watch_memory(self) -> int:
        """Return the daemon's resident memory in bytes, which its peak is counted from now on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")

    def peak_memory(self) -> int:
        """Return the most resident memory that the daemon has had since then, in bytes."""
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.M)
        assert found is not None
        return int(found[1]) << 10

    def scrape(self) -> str:
        """Return the metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def lines(self, event: str, instance: str = "") -> list[dict[str, object]]:
        """What the daemon logged of an event."""
        found = [json.loads(line) for line in self.daemon.log_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == event and instance in str(line.get("instance", ""))]


def start_host(daemon: DaemonProcess, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start an engine host of a test where the daemon will look for one, as the daemon starts its own."""
    daemon.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = daemon.runtime_dir / "engine.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, (daemon.root / "host.log").open("ab") as log:
        listener.bind(str(path))
        listener.listen(4)
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(listener.fileno()), str(path), str(_MEMORY_LIMIT), *arguments],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    eventually(lambda: process.poll() is None and path.exists())
    return process
