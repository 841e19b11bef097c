"""The wall around a worker: what the process may do once it holds a TPM.

Default-deny system call filter, no new privileges, not dumpable (no core, no ptrace, no /proc/PID/mem by others), resource
limits, closed descriptors, and death with the engine host. Invariant 4: nothing of the worker's memory reaches a disk.

Code: libtpms calls back into Python, and cffi makes each callback a few instructions at run time, in a page that libffi maps
writable and executable at once (a page for all, made when Libtpms is). It has to be there before the filter, as the filter
lets nothing be mapped executable. From then on nobody writes to it any more, so `Filter` takes the right to write away first:
a worker has no memory that is writable and executable, and the filter (no PROT_EXEC in mmap and mprotect, no call that maps a
file or shared memory) lets it have none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vtpm.engine.syscalls import PR_SET_NAME, compile_filter
from vtpm.errors import EngineError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_PR_CAPBSET_DROP: Final = 24
_SECCOMP_MODE_FILTER: Final = 2
_CAPABILITY_VERSION_3: Final = 0x20080522
_PROT_READ: Final = 1
_PROT_EXEC: Final = 4
# Of what a program writes that a worker starts.
_MAX_FILE_SIZE: Final = 16 << 20

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Filter:
    """A system call filter, and the code that it is put around: made once, in the engine host, installed by each worker."""

    def __init__(self, program: bytes) -> None:
        # struct sock_filter has eight bytes; struct sock_fprog is its count and a pointer (seccomp(2)).
        self._code = ctypes.create_string_buffer(program, len(program))
        self._program = _SockFprog(len(program) // 8, ctypes.addressof(self._code))
        self._code_pages = _writable_code()

    def install(self) -> None:
        """Put it in force for this process, for good; no callback can be made or freed after this."""
        for start, end in self._code_pages:
            if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PROT_READ | _PROT_EXEC) != 0:
                raise EngineError("SANDBOX_FAILED", f"mprotect failed: {os.strerror(ctypes.get_errno())}")
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(self._program))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _writable_code() -> list[tuple[int, int]]:
    """Where this process has memory that is writable and executable."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights = line.split(maxsplit=2)[:2]
        if "w" in rights and "x" in rights:
            start, end = where.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def make_filter() -> Filter:
    """Compile the system call filter (vtpm.engine.syscalls), once Libtpms is made.

    Raises:
        EngineError: libseccomp refuses a rule.
    """
    return Filter(compile_filter())


def _prctl(option: int, value: int, address: int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(address), 0, 0) != 0:
        code = ctypes.get_errno()
        raise EngineError("SANDBOX_FAILED", f"prctl {option} failed: {os.strerror(code)}")


def name_process(name: str) -> None:
    """Give this process a name for `ps` and `top`, of at most 15 characters."""
    text = ctypes.create_string_buffer(name.encode())
    _libc.prctl(PR_SET_NAME, text, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the engine host dies, also if it died already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def forbid_dumps() -> None:
    """No core dump, no ptrace or /proc/PID/mem by processes of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def raise_descriptor_limit(wanted: int) -> None:
    """Allow this process up to `wanted` descriptors, or as many as its rights reach."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def descriptor_limit() -> int:
    """Return how many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_descriptors() -> int:
    """Return how many descriptors this process has open; before Linux 6.2 about as many."""
    if count := Path("/proc/self/fd").stat().st_size:
        return count
    # The lowest number that is free: numbers are given again, so there are few holes.
    try:
        lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return descriptor_limit()
    os.close(lowest)
    return lowest


@contextlib.contextmanager
def dumpable() -> Iterator[None]:
    """Lift the dumpable part of `forbid_dumps`: for writes to files of one's own in /proc, while nothing secret is here."""
    _prctl(_PR_SET_DUMPABLE, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_DUMPABLE, 0)


def drop_capability_bounds() -> None:
    """Leave no capability to the programs that this process starts, whoever it runs as."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if (code := ctypes.get_errno()) != errno.EINVAL:
        # EINVAL says that there is no such capability: all were dropped.
        raise OSError(code, os.strerror(code), "PR_CAPBSET_DROP")


def drop_capabilities() -> None:
    """Give up all capabilities of this process, for good once it may not run a program with more."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct, twice: effective, permitted and inheritable. What is ambient goes with them.
    present = ctypes.create_string_buffer(24)
    if _libc.capget(header, present) == 0 and not any(present.raw):
        # The usual case; then the service's unit does not even allow the call below.
        return
    if _libc.capset(header, bytes(24)) != 0:
        raise EngineError("SANDBOX_FAILED", f"capset failed: {os.strerror(ctypes.get_errno())}")


def keep_descriptors(keep: list[int]) -> list[int]:
    """Move `keep` to 3, 4, … in order and close every other descriptor above 2; return the new numbers."""
    highest = max([*keep, 2]) + len(keep) + 1
    moved = [os.dup2(fd, highest + index, inheritable=False) for index, fd in enumerate(keep)]
    placed = [os.dup2(fd, 3 + index, inheritable=False) for index, fd in enumerate(moved)]
    os.closerange(3 + len(placed), os.sysconf("SC_OPEN_MAX"))
    return placed


def restrict(*, memory_limit: int, descriptors: int = 64) -> None:
    """Limits and no new privileges, for this process and what it starts. `memory_limit` in bytes bounds the data segment."""
    forbid_dumps()
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_SIZE, _MAX_FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def enter(rules: Filter, *, memory_limit: int) -> None:
    """Close the door of a worker that starts nothing: `restrict`, no capability, process or file, the system call filter."""
    restrict(memory_limit=memory_limit)
    drop_capabilities()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    rules.install()
