"""The wall around a worker: what the process may do once it holds a TPM.

Default-deny system call filter, no new privileges, not dumpable (no core, no ptrace, no /proc/PID/mem by others), resource
limits, closed descriptors, and death with the engine host. Invariant 4: nothing of the worker's memory reaches a disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vtpm.engine.seccomp import pyseccomp
from vtpm.errors import EngineError

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_PR_CAPBSET_DROP: Final = 24
_SECCOMP_MODE_FILTER: Final = 2
_FIONBIO: Final = 0x5421
_PROT_EXEC: Final = 4
# The one file that a worker has is the engine host's log, for its last words.
_MAX_LOG_SIZE: Final = 16 << 20

# What CPython, libtpms and OpenSSL were seen to need after start-up, and no more. No open, no socket, no connect, no exec, no
# fork.
_ALLOWED: Final = (
    "accept4",
    "brk",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_wait",
    "exit",
    "exit_group",
    "fcntl",
    "fstat",
    "futex",
    "getpid",
    "getrandom",
    "getsockname",
    "getsockopt",
    "gettid",
    "gettimeofday",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "lseek",
    "madvise",
    "mremap",
    "munmap",
    "newfstatat",
    "poll",
    "ppoll",
    "read",
    "recvfrom",
    "recvmsg",
    "restart_syscall",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "sendmsg",
    "sendto",
    "sigaltstack",
    "time",
    "write",
)
# Asked for in passing by libraries; answered with an error instead of death.
_DENIED_SOFTLY: Final = (
    "openat",
    "open",
    "access",
    "readlink",
    "socket",
    "sysinfo",
    "prlimit64",
    "uname",
    "rt_sigaction",
    "mbind",
)

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Filter:
    """A compiled system call filter: compiled once, in the engine host, installed by each worker."""

    def __init__(self, program: bytes) -> None:
        # struct sock_filter has eight bytes; struct sock_fprog is its count and a pointer (seccomp(2)).
        self._code = ctypes.create_string_buffer(program, len(program))
        self._program = _SockFprog(len(program) // 8, ctypes.addressof(self._code))

    def install(self) -> None:
        """Put it in force for this process, for good."""
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(self._program))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def make_filter() -> Filter:
    """Compile the system call filter.

    Raises:
        EngineError: libseccomp is not installed.
    """
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.KILL_PROCESS)
    for name in _ALLOWED:
        _add(rules, pyseccomp.ALLOW, name)
    for name in _DENIED_SOFTLY:
        _add(rules, pyseccomp.ERRNO(errno.EACCES), name)
    # Memory may be mapped and changed, but never made executable.
    for name in ("mmap", "mprotect"):
        rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, _PROT_EXEC, 0))
    rules.add_rule(pyseccomp.ALLOW, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, _PR_SET_NAME))
    rules.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, _FIONBIO))
    with open(os.memfd_create("filter"), "rb+") as file:  # noqa: PTH123  # it has no path
        rules.export_bpf(file)
        file.seek(0)
        return Filter(file.read())


def _add(rules: Any, action: Any, name: str) -> None:
    try:
        rules.add_rule(action, name)
    except (OSError, ValueError):
        # A call that this architecture does not have (such as `time` on arm64) needs no rule.
        if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
            raise


def _prctl(option: int, value: int, address: int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(address), 0, 0) != 0:
        code = ctypes.get_errno()
        raise EngineError("SANDBOX_FAILED", f"prctl {option} failed: {os.strerror(code)}")


def name_process(name: str) -> None:
    """Give this process a name for `ps` and `top`, of at most 15 characters."""
    text = ctypes.create_string_buffer(name.encode())
    _libc.prctl(_PR_SET_NAME, text, 0, 0, 0)


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
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_LOG_SIZE, _MAX_LOG_SIZE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def enter(rules: Filter, *, memory_limit: int) -> None:
    """Close the door of a worker that starts nothing: `restrict`, no further process, the system call filter."""
    restrict(memory_limit=memory_limit)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    rules.install()
