"""The peer: a swtpm process as libvirt starts it, with its state in a directory."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def installed() -> bool:
    """Whether the peer is there to be compared with."""
    return shutil.which("swtpm") is not None and shutil.which("swtpm_setup") is not None


def setup(state: Path) -> float:
    """Make a TPM with RSA-2048 and P-384 EK; return the wall time in seconds."""
    state.mkdir()
    command = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--createek", "--logfile", str(state / "log")]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


@contextlib.contextmanager
def running(state: Path) -> Iterator[tuple[Path, int]]:
    """A swtpm on a unix socket, powered on and started; yields the socket and the process id."""
    data, control = state / "tpm.sock", state / "tpm.sock.ctrl"
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"]
    command += ["--server", f"type=unixio,path={data}", "--ctrl", f"type=unixio,path={control}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (data.exists() and control.exists()):
            if time.monotonic() > deadline:
                raise RuntimeError("swtpm does not listen")
            time.sleep(0.01)
        yield data, process.pid
    finally:
        process.kill()
        process.wait()
