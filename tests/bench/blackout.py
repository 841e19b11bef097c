"""What a running VM notices of a daemon's restart: the longest wait of a command, with and without an NV write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.bench.measure import Row, millis
from tests.support import raw
from tests.support.daemon import DaemonProcess


def _longest_wait(path: str, command: bytes, while_doing: Callable[[], None]) -> float:
    sock = raw.connect(path)
    sock.settimeout(60)
    ended = threading.Event()
    longest = 0.0

    def guest() -> None:
        nonlocal longest
        while not ended.is_set():
            start = time.perf_counter()
            raw.succeed(sock, command)
            longest = max(longest, time.perf_counter() - start)

    thread = threading.Thread(target=guest)
    thread.start()
    while_doing()
    ended.set()
    thread.join()
    return longest


def blackout() -> list[Row]:
    """Restart the daemon with kill -9 under a guest that asks without a pause."""
    with DaemonProcess() as daemon:
        path = daemon.running("bench").tpm_socket
        raw.succeed(raw.connect(path), raw.nv_define(raw.COUNTER, counter=True))
        away = 0.0

        def restart() -> None:
            nonlocal away
            start = time.perf_counter()
            daemon.kill()
            daemon.start()
            away = time.perf_counter() - start

        read = _longest_wait(path, raw.pcr_read(0), restart)
        write = _longest_wait(path, raw.nv_increment(), restart)
    return [
        Row("longest PCR_Read while the daemon restarts", millis(read), "", "", "none", within=read < 0.1),
        Row(
            f"longest NV_Increment, daemon away for {millis(away)}", millis(write), "", f"{write / away:.2f}",
            "≤ 0.5 s more than it was away", within=write <= away + 0.5,
        ),
    ]  # fmt: skip
