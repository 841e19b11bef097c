"""How long a caller of swtpm waits until the TPM answers, with swtpm and with what takes its place."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import swtpm
from tests.bench.measure import Row, alternate, millis
from tests.support.daemon import ROOT

_ROUNDS = 15
_GET_CAPABILITY = bytes.fromhex("00000001")


def dropin() -> list[Row]:
    """From the start of the process to the first answer on the control socket, on a state that is there already."""
    with tempfile.TemporaryDirectory(prefix="dropin-") as name:
        directory = Path(name)
        if not swtpm.installed():
            return []
        swtpm.setup(directory / "state")
        subprocess.run([ROOT / "script" / "launcher", directory / "bin"], check=True, capture_output=True)
        script = Path(sys.executable).with_name("vtpm-swtpm")
        compiled, scripted, peer = alternate(
            _ROUNDS,
            *(lambda program=program: _ready(program, directory) for program in (directory / "bin/swtpm", script, "swtpm")),
        )
    # What it costs is said; it is no aim to be as fast as a program in C.
    return [
        Row(f"{what} ready after its start", millis(own), millis(peer), f"{own / peer:.1f}", "", within=True)
        for what, own in (("vtpm-swtpm, compiled launcher,", compiled), ("vtpm-swtpm", scripted))
    ]


def _ready(program: str | Path, directory: Path) -> float:
    control = directory / "c"
    command = [str(program), "socket", "--tpm2", "--tpmstate", f"dir={directory / 'state'}"]
    command += ["--ctrl", f"type=unixio,path={control}"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                try:
                    sock.connect(str(control))
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"{program} ended") from None
                    time.sleep(0.0002)
                    continue
                sock.sendall(_GET_CAPABILITY)
                if len(sock.recv(8)) == 8:
                    return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()
        control.unlink(missing_ok=True)
