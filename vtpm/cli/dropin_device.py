"""The form `chardev`: commands come by a character device, such as the one end of a TPM that the kernel makes a proxy for."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from vtpm.cli.dropin_fields import refused
from vtpm.cli.dropin_options import Options

VTPMX: Final = Path("/dev/vtpmx")
# <linux/vtpm_proxy.h>: flags, number of the TPM, descriptor, major, minor.
_NEW_DEVICE: Final = struct.Struct("=IIIII")
_IOC_NEW_DEVICE: Final = 0xC014A100
_TPM2: Final = 1
_WRITE_TIMEOUT_MS: Final = 5000


class Device:
    """A device in the place of a client's socket."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poller = select.poll()
        self._poller.register(fd, select.POLLOUT)

    def fileno(self) -> int:
        """See socket.socket."""
        return self._fd

    def settimeout(self, value: float | None) -> None:
        """A device is written to once it is ready, see `sendall`."""

    def recv(self, size: int) -> bytes:
        """Return what has come; nothing at its end."""
        return os.read(self._fd, size)

    def sendall(self, data: bytes) -> None:
        """Write a response, which the kernel's proxy takes in one piece only."""
        while data:
            if not self._poller.poll(_WRITE_TIMEOUT_MS):
                raise TimeoutError
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """See socket.socket."""
        os.close(self._fd)


def open_device(options: Options) -> int:
    """Return the descriptor of the device; with --vtpm-proxy that of the kernel's driver, for `make_proxy`.

    Raises:
        InvalidArgumentError: USAGE.
    """
    if isinstance(options.device, int):
        return options.device
    path = str(VTPMX if options.proxy else options.device)
    try:
        # Waiting for nobody: what is no device is told from one only when it is open.
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ENODEV, "it is no character device", path)
        os.set_blocking(fd, True)
        return fd
    except OSError as error:
        remedy = "as root: modprobe tpm_vtpm_proxy; or use the form: swtpm socket …" if options.proxy else ""
        raise refused(f"Could not open {path}: {error.strerror}", remedy) from None


def is_stream_socket(fd: int) -> bool:
    """Whether the worker can serve it by itself."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as opened:
        return opened.type == socket.SOCK_STREAM


def make_proxy(driver: int) -> tuple[int, str]:
    """Have the kernel make a TPM whose commands come here; return its descriptor, and what swtpm says of it.

    Raises:
        InvalidArgumentError: USAGE.
    """
    try:
        made = fcntl.ioctl(driver, _IOC_NEW_DEVICE, _NEW_DEVICE.pack(_TPM2, 0, 0, 0, 0))
    except OSError as error:
        raise refused(f"Ioctl to create vtpm proxy failed: {error.strerror}") from None
    finally:
        os.close(driver)
    _, number, fd, major, minor = _NEW_DEVICE.unpack(made)
    os.set_inheritable(fd, False)
    return fd, f"New TPM device: /dev/tpm{number} (major/minor = {major}/{minor})\n"
