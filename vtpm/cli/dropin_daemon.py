"""The TPM of a state directory, moved into the daemon: for callers that ask for it with VTPM_SWTPM_USE_DAEMON=1.

The instance carries the directory's name in its label `swtpm-state`; the state in the directory is imported once, when the
instance is made, and is an old copy from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from vtpm import peers
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.cli.dropin_state import StateDirectory
from vtpm.cli.exchange import import_state
from vtpm.cli.instances import create_one
from vtpm.config import Settings
from vtpm.errors import ErrorKind, FailedPreconditionError, UnavailableError, VtpmError
from vtpm.tpm.command import HEADER, HEADER_SIZE
from vtpm.tpm.ptm import CODE, ControlCommand, Result

LABEL: Final = "swtpm-state"
_TIMEOUT_S: Final = 15.0


def instance_for(directory: Path, state: StateDirectory) -> pb.Instance:
    """Return the instance of `directory`, made and given the directory's state if there is none."""
    client = Client(f"unix:{quote(str(Settings.load({}).operator_socket))}")
    with contextlib.closing(client):
        name = f"swtpm-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
        try:
            found: pb.Instance = client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance=name))
        except VtpmError as error:
            if error.kind is not ErrorKind.NOT_FOUND:
                raise
        else:
            if found.labels.get(LABEL) != str(directory):
                raise FailedPreconditionError(
                    "INSTANCE_IS_ANOTHER", f"it has not the label {LABEL}={directory}", subject=name, remedy="rename it"
                )
            return found
        labels = {LABEL: str(directory)}
        if state.read_volatile() is not None:
            raise FailedPreconditionError(
                "VOLATILE_STATE_PRESENT", "the TPM was suspended; resume it without the daemon first", subject=str(directory)
            )
        permanent = state.read()
        if permanent is not None:
            return import_state(client, name, labels, permanent)
        return create_one(client, pb.CreateInstanceRequest(name=name, labels=labels))


class DaemonTpm:
    """An instance behind its control socket, in the place of a StandaloneTpm."""

    def __init__(self, control_socket: str) -> None:
        self.failure = ""
        try:
            self._control = peers.connect(control_socket, timeout_s=_TIMEOUT_S)
        except OSError as error:
            raise UnavailableError("INSTANCE_UNREACHABLE", f"{error.strerror}", subject=control_socket) from None
        # Between requests it is readable only once the instance's run has ended.
        self.pidfd = os.dup(self._control.fileno())

    def connect(self) -> socket.socket:
        """See StandaloneTpm."""
        return self._control

    def execute(self, command: bytes) -> bytes:
        """See StandaloneTpm."""
        try:
            return self._execute(command)
        except OSError as error:
            why = error.strerror or "the instance does not answer"
            raise UnavailableError("INSTANCE_UNREACHABLE", why, remedy="see the daemon's log") from None

    def _execute(self, command: bytes) -> bytes:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(_TIMEOUT_S)
            socket.send_fds(self._control, [CODE.pack(ControlCommand.SET_DATAFD)], [theirs.fileno()])
            theirs.close()
            if self._control.recv(4) != CODE.pack(Result.SUCCESS):
                raise UnavailableError("INSTANCE_IN_USE", "another client is connected to this TPM")
            ours.sendall(command)
            response = b""
            while len(response) < HEADER_SIZE or len(response) < HEADER.unpack_from(response)[1]:
                part = ours.recv(4096)
                if not part:
                    raise UnavailableError("INSTANCE_UNREACHABLE", "the TPM's process has ended")
                response += part
        return response

    def commands_since(self) -> int:
        """A volatile state is never kept in a file here: the instance holds it."""
        return 1

    def stop(self) -> None:
        """End the VM's run, as the end of its control connection does."""
        self._control.close()
        os.close(self.pidfd)

    def wait(self) -> str:
        """See StandaloneTpm."""
        return self.failure


class NoFiles(StateDirectory):
    """The directory of a TPM that lives in the daemon: nothing is read from it or written to it any more."""

    def read_volatile(self) -> bytes | None:
        """See StateDirectory."""
        return None

    def drop_volatile(self) -> None:
        """See StateDirectory."""

    def rehearse_volatile(self, volatile: Callable[[], bytes]) -> None:
        """See StateDirectory."""

    def write(self, state: bytes) -> None:
        """See StateDirectory."""
