"""What is done to the service meanwhile: kills, at random and at named places, restarts, key rotations."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter

from tests.support.daemon import DaemonProcess, worker_pids
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.errors import VtpmError

DAEMON_POINTS = (
    "commit.before_sync",
    "commit.after_sync",
    "create.before_commit",
    "create.after_commit",
    "delete.before_erase",
    "delete.after_erase",
    "delete.before_commit",
    "keys.before_rename",
    "rotate.after_begin",
    "rewrap.before_commit",
    "rewrap.after_commit",
    "rotate.before_finish",
    "power_on.after_acquire",
    "power_on.after_load",
)
HOST_POINTS = ("host.before_fork", "host.after_fork", "host.before_attach", "host.after_attach", "host.after_exit")
WORKER_POINTS = (
    "worker.before_seal",
    "worker.before_commit",
    "worker.after_commit",
    "worker.after_unseal",
    "worker.after_manufacture",
)
# How long a crash point has to be passed.
_PATIENCE_S = 3.0


class Chaos:
    """Hurts a daemon. `turn` does one thing; afterwards the daemon runs."""

    def __init__(self, daemon: DaemonProcess, seed: int, ended: threading.Event) -> None:
        self._daemon = daemon
        self._random = random.Random(f"{seed} chaos")
        self._ended = ended
        self.counts: Counter[str] = Counter()

    def turn(self) -> None:
        """Wait a little, then do something."""
        self._ended.wait(self._random.uniform(0.1, 1.0))
        act = self._random.choices(
            (
                self._kill_daemon,
                self._kill_worker,
                self._kill_host,
                self._restart,
                self._rotate,
                self._crash_daemon,
                self._arm_host,
            ),
            (4, 6, 1, 2, 3, 6, 2),
        )[0]
        act()

    def _host(self) -> int:
        pid: int = self._daemon.client.call(self._daemon.client.host.GetHost, pb.GetHostRequest()).engine_host_pid
        return pid

    def _kill_daemon(self) -> None:
        self._daemon.kill()
        self.counts["daemon killed"] += 1
        if self._random.random() < 0.3:
            # While nobody is there to notice.
            time.sleep(self._random.uniform(0, 0.5))
        self._daemon.start()

    def _restart(self) -> None:
        self._daemon.stop()
        self.counts["daemon restarted"] += 1
        self._daemon.start()

    def _kill_worker(self) -> None:
        with contextlib.suppress(VtpmError, OSError, IndexError):
            os.kill(self._random.choice(worker_pids(self._host())), signal.SIGKILL)
            self.counts["worker killed"] += 1

    def _kill_host(self) -> None:
        with contextlib.suppress(VtpmError, OSError):
            os.kill(self._host(), signal.SIGKILL)
            self.counts["engine host killed"] += 1

    def _rotate(self) -> None:
        with contextlib.suppress(VtpmError):
            self._daemon.client.call(self._daemon.client.host.RotateKey, pb.RotateKeyRequest())
            self.counts["keys rotated"] += 1

    def _crash_daemon(self) -> None:
        """Restart the daemon so that it dies at a named place, and have it come by there."""
        point = self._random.choice(DAEMON_POINTS)
        self._daemon.kill()
        self._daemon.environment["VTPM_CRASH_POINT"] = (
            f"{point}:{self._random.randint(1, 20 if point.startswith('commit') else 1)}"
        )
        with contextlib.suppress(RuntimeError):
            # It may come by there before it ever answers.
            self._daemon.start()
        if point.startswith(("keys", "rotate", "rewrap")):
            self._rotate()
        assert self._daemon.process is not None
        try:
            self._daemon.process.wait(_PATIENCE_S)
            self.counts["daemon died at a crash point"] += 1
        except subprocess.TimeoutExpired:
            self.counts["crash point not passed"] += 1
        self._daemon.kill()
        del self._daemon.environment["VTPM_CRASH_POINT"]
        self._daemon.start()

    def _arm_host(self) -> None:
        """Replace the engine host by one that dies, or whose workers die, at a named place."""
        point = self._random.choice(HOST_POINTS + WORKER_POINTS)
        self._daemon.environment["VTPM_CRASH_POINT"] = f"{point}:{self._random.randint(2, 8)}"
        self._kill_host()
        self._daemon.kill()
        with contextlib.suppress(RuntimeError):
            self._daemon.start()
        self._ended.wait(_PATIENCE_S)
        self.counts["engine host or workers with a crash point"] += 1
        del self._daemon.environment["VTPM_CRASH_POINT"]
        self._kill_host()
        self._daemon.kill()
        self._daemon.start()
