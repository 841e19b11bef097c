"""Namespaces for a worker that starts a program: a network and mounts of its own (namespaces(7)).

The program's ports are reachable from this worker alone, its files are in a tmpfs that nobody else sees and that goes with the
last process that uses it, and what belongs to the service is hidden from it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vtpm.engine import sandbox
from vtpm.errors import EngineError, ErrorKind

# Where the private tmpfs is mounted: the one directory for shared memory that every Linux with glibc has.
PRIVATE_DIR: Final = Path("/dev/shm")  # noqa: S108  # covered by a mount of this process's own

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_SEALED_OFF: Final = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_SIZE: Final = "size=32m,mode=0700"
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
# struct ifreq: name, flags, and the rest of its union (netdevice(7)).
_IFREQ: Final = struct.Struct("16sh22x")

_libc: Final = ctypes.CDLL(None, use_errno=True)


def isolate(hidden: Sequence[str], *, owner: int | None = None) -> None:
    """Enter a network with nothing but a loopback and mounts of this process's own, with an empty tmpfs at PRIVATE_DIR.

    The tmpfs belongs to the user and group `owner`, this process's if it is None. The directories in `hidden` become empty,
    also for what this process starts, which gets no capabilities either.

    Raises:
        EngineError: ENGINE_NOT_ISOLATED; this process must not start anything then.
    """
    try:
        _enter_namespaces()
        _mount("/", None, _MS_REC | _MS_PRIVATE, "")
        for path in hidden:
            _mount(path, "tmpfs", _SEALED_OFF | _MS_RDONLY, _SIZE)
        _mount_private(owner)
        _raise_loopback()
        sandbox.drop_capability_bounds()
    except OSError as error:
        raise EngineError(
            "ENGINE_NOT_ISOLATED",
            f"the host lets no worker have a network and mounts of its own: {error}",
            remedy="allow user, net and mnt namespaces and mount to the service (docs/engines.md), or use the engine libtpms",
            kind=ErrorKind.UNIMPLEMENTED,
        ) from error


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def _enter_namespaces() -> None:
    wanted = _CLONE_NEWNET | _CLONE_NEWNS
    if _libc.unshare(wanted) == 0:
        return
    if ctypes.get_errno() != errno.EPERM:
        _check(-1, "unshare")
    # Without privileges: they come with a user namespace, and reach no further than it.
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(wanted | _CLONE_NEWUSER), "unshare")
    with sandbox.dumpable():
        # One id each, our own: what is outside of the namespace belongs to nobody in it (user_namespaces(7)).
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            try:
                Path("/proc/self", name).write_text(text)
            except OSError as error:
                raise OSError(error.errno, error.strerror, name) from error


def _mount(target: str, kind: str | None, flags: int, options: str) -> None:
    fstype = kind.encode() if kind else None
    _check(_libc.mount(b"none", os.fsencode(target), fstype, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _mount_private(owner: int | None) -> None:
    options = _SIZE if owner is None else f"{_SIZE},uid={owner},gid={owner}"
    try:
        # Kept out of swap where the kernel (6.4) and our privileges allow to say so.
        _mount(str(PRIVATE_DIR), "tmpfs", _SEALED_OFF, f"{options},noswap")
    except OSError:
        _mount(str(PRIVATE_DIR), "tmpfs", _SEALED_OFF, options)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _name, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
