"""A TPM's life before and after it moves: what a VM leaves in its TPM, under swtpm and elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vtpm.errors import VtpmError
from vtpm.wire.control_client import ControlClient

PERMALL = "tpm2-00.permall"
VOLATILE = "tpm2-00.volatilestate"
SECRET = b"sealed under swtpm"
NV_INDEX, PERSISTENT = "0x01500001", "0x81000001"
KEY_256 = bytes(range(32))
RUNNING = ("--flags", "not-need-init,startup-clear")


class Swtpm:
    """One swtpm process on a state directory; `path` is its data socket, and with `.ctrl` behind it the control socket."""

    def __init__(self, state: Path, *arguments: str) -> None:
        self.sockets = Path(tempfile.mkdtemp(prefix="swtpm-"))
        self.path, self.control = self.sockets / "tpm", self.sockets / "tpm.ctrl"
        state.mkdir(exist_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", *arguments]
        command += ["--server", f"type=unixio,path={self.path}", "--ctrl", f"type=unixio,path={self.control}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 10
        while not (self.control.exists() and self.path.exists()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"swtpm: {self.end()!r}")
            time.sleep(0.01)

    def __enter__(self) -> Swtpm:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def tool(self, *command: str, cwd: Path) -> bytes:
        env = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={self.path}"}
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"
        # Nobody manages resources here: what a tool loaded stays.
        subprocess.run(["tpm2_flushcontext", "-t"], env=env, check=True, capture_output=True, timeout=60)
        return done.stdout

    def wait(self) -> None:
        """Wait until it ended by itself."""
        self.process.wait(10)

    def end(self) -> bytes:
        """Power off orderly, or whatever it takes."""
        if self.process.poll() is None:
            try:
                with ControlClient(self.control) as control:
                    control.shutdown()
                self.process.wait(10)
            except (VtpmError, subprocess.TimeoutExpired):
                self.process.kill()
        output, _ = self.process.communicate(timeout=10)
        shutil.rmtree(self.sockets, ignore_errors=True)
        return output


Run = Callable[..., bytes]


def furnish(run: Run, files: Path) -> dict[str, bytes]:
    """Put an NV index, a persistent key and a sealed secret into a TPM; return what it should still have later."""
    run("tpm2_nvdefine", NV_INDEX, "-s", "8", "-a", "ownerread|ownerwrite")
    (files / "value").write_bytes(b"8 octets")
    run("tpm2_nvwrite", NV_INDEX, "-C", "o", "-i", "value")
    run("tpm2_createprimary", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    run("tpm2_evictcontrol", "-C", "o", "-c", "primary.ctx", PERSISTENT)
    (files / "secret").write_bytes(SECRET)
    run("tpm2_create", "-C", PERSISTENT, "-i", "secret", "-u", "sealed.pub", "-r", "sealed.priv")
    return furniture(run, files)


def furniture(run: Run, files: Path) -> dict[str, bytes]:
    """Read back what `furnish` put there, and the EK."""
    run("tpm2_createek", "-G", "ecc", "-c", "ek.ctx", "-u", "ek.pub")
    run("tpm2_load", "-C", PERSISTENT, "-u", "sealed.pub", "-r", "sealed.priv", "-c", "sealed.ctx")
    return {
        "nv": run("tpm2_nvread", NV_INDEX, "-C", "o"),
        "persistent": run("tpm2_readpublic", "-c", PERSISTENT),
        "ek": (files / "ek.pub").read_bytes(),
        "secret": run("tpm2_unseal", "-c", "sealed.ctx"),
    }


def of_swtpm(state: Path, files: Path, *key: str, action: Callable[[Run, Path], dict[str, bytes]]) -> dict[str, bytes]:
    """Run `action` against a swtpm on `state`."""
    with Swtpm(state, *RUNNING, *key) as swtpm:
        return action(lambda *command: swtpm.tool(*command, cwd=files), files)
