"""TPMs to plug into a VM: an instance of ours, or a swtpm to compare with."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Protocol

from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2


class Peer(Protocol):
    """A TPM with a control socket."""

    def plug(self) -> Path:
        """See that it can be connected to, and return its control socket."""


class OurTpm:
    """An instance of a daemon, made for one VM; what the service says about it."""

    def __init__(self, daemon: DaemonProcess, name: str, **fields: object) -> None:
        self.daemon = daemon
        self.name = name
        daemon.create(name, **fields)

    @property
    def instance(self) -> pb.Instance:
        """The instance as it is now."""
        return self.daemon.get(self.name)

    def plug(self) -> Path:
        return Path(self.instance.control_socket)

    def pcrs(self, bank: str = "sha256") -> dict[int, bytes]:
        """PCR values by index, as the service reads them."""
        selection = tpm_pb2.PcrSelection(hash_algorithm=bank, indices=range(24))
        request = tpm_pb2.ReadPcrsRequest(instance=self.name, selections=[selection])
        return {value.index: value.digest for value in self.daemon.client.call(self.daemon.client.tpm.ReadPcrs, request).values}

    def quote(self, nonce: bytes, indices: list[int]) -> tpm_pb2.QuoteResponse:
        """A quote by the service."""
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=indices)
        request = tpm_pb2.QuoteRequest(instance=self.name, selections=[selection], nonce=nonce)
        quoted: tpm_pb2.QuoteResponse = self.daemon.client.call(self.daemon.client.tpm.Quote, request)
        return quoted

    def until(self, state: pb.State.ValueType) -> pb.Instance:
        """Wait until the instance has `state`."""
        return self.daemon.until(self.name, state)


class Swtpm:
    """swtpm as libvirt starts it: one process for each life of the VM, its TPM kept in `state`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._process: subprocess.Popen[bytes] | None = None

    def plug(self) -> Path:
        control = self.state / "ctrl"
        # It ends with its VM.
        if self._process is not None and self._process.poll() is None:
            return control
        self.state.mkdir(exist_ok=True)
        control.unlink(missing_ok=True)
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state}", "--ctrl", f"type=unixio,path={control}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not control.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("swtpm does not listen")
            time.sleep(0.01)
        return control

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
