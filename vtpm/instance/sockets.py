"""The sockets of an instance: one directory each, open to the daemon's user only.

`control.sock` is there as long as the instance is: a VMM that connects to it powers the instance on. The others are there while
the instance is ON.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from vtpm.engine.interface import Listeners
from vtpm.errors import UnavailableError

_T = TypeVar("_T")
_BACKLOG: Final = 128


class InstanceSockets:
    """Makes and removes `<runtime_dir>/instances/<id>/`."""

    def __init__(self, runtime_dir: Path) -> None:
        self._root = runtime_dir / "instances"

    def directory(self, instance: uuid.UUID) -> Path:
        """Where the instance's sockets are."""
        return self._root / str(instance)

    def tpm_socket(self, instance: uuid.UUID) -> Path:
        """The data socket of the swtpm protocol; its control twin is this path + `.ctrl`."""
        return self.directory(instance) / "tpm.sock"

    def guest_socket(self, instance: uuid.UUID) -> Path:
        """The instance's gRPC socket."""
        return self.directory(instance) / "guest.sock"

    def control_socket(self, instance: uuid.UUID) -> Path:
        """The control socket of the swtpm protocol that a VMM connects to."""
        return self.directory(instance) / "control.sock"

    def listen_for_vm(self, instance: uuid.UUID) -> socket.socket:
        """Listen on the control socket.

        Raises:
            UnavailableError: SOCKETS_FAILED.
        """
        return self._making(instance, lambda: _listen(self.control_socket(instance)))

    def make(self, instance: uuid.UUID) -> Listeners:
        """Listen on the data socket and its control twin.

        Raises:
            UnavailableError: SOCKETS_FAILED.
        """
        path = self.tpm_socket(instance)
        return self._making(instance, lambda: Listeners(_listen(path), _listen(path.with_name(path.name + ".ctrl"))))

    def _making(self, instance: uuid.UUID, make: Callable[[], _T]) -> _T:
        directory = self.directory(instance)
        try:
            self._root.mkdir(mode=0o700, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            return make()
        except OSError as error:
            raise UnavailableError(
                "SOCKETS_FAILED",
                f"the instance's sockets can't be made under {directory}: {error.strerror}",
                subject=str(instance),
                remedy="check the runtime directory's file system, owner and free space",
            ) from error

    def remove(self, instance: uuid.UUID) -> None:
        """Remove what is there while the instance is ON."""
        keep = self.control_socket(instance)
        with contextlib.suppress(OSError):
            for path in self.directory(instance).iterdir():
                if path != keep:
                    path.unlink()

    def delete(self, instance: uuid.UUID) -> None:
        """Remove the directory and what is in it."""
        shutil.rmtree(self.directory(instance), ignore_errors=True)

    def remove_all_but(self, keep: set[uuid.UUID]) -> None:
        """Remove what an earlier daemon left of instances that do not run."""
        names = {str(instance) for instance in keep}
        if self._root.is_dir():
            for path in self._root.iterdir():
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(previous)
    listener.listen(_BACKLOG)
    return listener
