"""The system calls that a worker may make, each with what it is for, and three that are refused. All others end the process.

Derived from what workers were seen to call (strace over the tests of a worker's life, its hibernation and thaw, the control
channel, take-over, and drop-in), with the few more that an allocator, the C library or another kernel may need. There is no
call with a path, none that makes a descriptor or a process, and none that names another process.

A call that does several things is allowed by its arguments. A condition on an argument looks at all of its 64 bits, also where
the kernel looks at 32 of them: what it would overlook is then refused. `_int` looks at 32 where a C library may leave anything
in the upper half. Rules for the same call are alternatives; conditions of one rule hold together. What is behind a pointer
can't be looked at.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from vtpm.engine.seccomp import pyseccomp
from vtpm.errors import EngineError

Rules = tuple[tuple[Any, ...], ...]

_PROT_READ: Final = 1
_PROT_WRITE: Final = 2
_MAP_PRIVATE_ANONYMOUS: Final = 0x22
_MAP_NORESERVE: Final = 0x4000
_MAP_DROPPABLE_ANONYMOUS: Final = 0x28
_MREMAP_MAYMOVE: Final = 1
_MADV_DONTNEED: Final = 4
_FUTEX_PRIVATE: Final = 128
_FUTEX_CLOCK_REALTIME: Final = 256
# FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET.
_FUTEX_OPERATIONS: Final = (0, 1, 9, 10)
_FIONBIO: Final = 0x5421
_EPOLL_CLOEXEC: Final = 0x80000
_EPOLL_CTL_ADD: Final = 1
_EPOLL_CTL_DEL: Final = 2
# CLOCK_REALTIME to CLOCK_BOOTTIME. Numbers below zero are processor time clocks of other processes.
_OWN_CLOCKS: Final = 7
_CLOCK_MONOTONIC: Final = 1
_TIMER_ABSTIME: Final = 1
# Numbers and not those of the module socket, which are flags of an enum: the complement of one has only the enum's bits.
_SOCK_CLOEXEC: Final = 0x80000
_MSG_DONTWAIT: Final = 0x40
_SOL_SOCKET: Final = 1
_SO_TYPE: Final = 3
_SO_PROTOCOL: Final = 38
_STDERR: Final = 2
_AT_EMPTY_PATH: Final = 0x1000
_GRND_NONBLOCK: Final = 1
PR_SET_NAME: Final = 15

_ALL_BITS: Final = (1 << 64) - 1
_INT_BITS: Final = (1 << 32) - 1


def _is(index: int, value: int) -> Any:
    """The argument has this value."""
    return pyseccomp.Arg(index, pyseccomp.EQ, value)


def _int(index: int, value: int, ignored: int = 0) -> Any:
    """The argument, an int, has this value but for the `ignored` bits."""
    return pyseccomp.Arg(index, pyseccomp.MASKED_EQ, _INT_BITS & ~ignored, value)


def _only(index: int, bits: int, value: int = 0) -> Any:
    """The argument has this value, with any of `bits`."""
    return pyseccomp.Arg(index, pyseccomp.MASKED_EQ, _ALL_BITS & ~bits, value)


def _allowed() -> dict[str, Rules]:
    anyhow: Rules = ((),)
    read_write = _only(2, _PROT_READ | _PROT_WRITE)
    return {
        # ---- a guest's command and its answer, in the order in which they come
        # Waiting for whoever has something to say. arm64 has no epoll_wait; with a signal mask it would change what signals do.
        "epoll_wait": anyhow,
        "epoll_pwait": ((_is(4, 0),),),
        # Commands and requests. Not from whom (what is connected is known), no MSG_PEEK, MSG_OOB or MSG_ERRQUEUE.
        "recvfrom": ((_only(3, _MSG_DONTWAIT), _is(4, 0)),),
        # Responses, commits, replies. No address: a socket must not be made to send elsewhere.
        "sendto": ((_is(3, 0), _is(4, 0)),),
        # ---- sockets that the worker has or is given
        # What the engine host and a VMM send with descriptors; what the worker leaves to the engine host when it hibernates.
        "recvmsg": ((_only(2, _MSG_DONTWAIT),),),
        "sendmsg": ((_is(2, 0),),),
        # A client of the VM's socket. Not inherited, as in Python always.
        "accept4": ((_is(3, _SOCK_CLOEXEC),),),
        # Python asks what a descriptor is before it makes a socket of it. Not SO_PEERPIDFD, SO_PEERCRED and the like.
        "getsockname": anyhow,
        "getsockopt": (
            (_int(1, _SOL_SOCKET), _int(2, _SO_TYPE)),
            (_int(1, _SOL_SOCKET), _int(2, _SO_PROTOCOL)),
        ),
        # settimeout and setblocking. No other ioctl: not FIOASYNC, FIOSETOWN, SIOCSPGRP, which have signals sent. And no fcntl
        # at all: F_SETOWN, F_SETSIG and O_ASYNC would send any signal to any process of the same user.
        "ioctl": ((_int(1, _FIONBIO),),),
        "close": anyhow,
        # The loop's set of descriptors, and those of one socket.
        "epoll_create1": ((_is(0, _EPOLL_CLOEXEC),),),
        "epoll_ctl": ((_int(1, _EPOLL_CTL_ADD),), (_int(1, _EPOLL_CTL_DEL),)),
        # Waiting for a commit's acknowledgement, or for room for an answer. arm64 has no poll.
        "poll": anyhow,
        "ppoll": ((_is(3, 0),),),
        # A commit's acknowledgement comes soon: the processor is given away, the worker does not sleep.
        "sched_yield": anyhow,
        # ---- last words
        # Of Python, libtpms and the C library (malloc), which uses writev. Standard error is a pipe to the engine host.
        "write": ((_int(0, _STDERR),),),
        "writev": ((_int(0, _STDERR),),),
        # ---- memory: private, of no file, never executable, at no address of the caller's choice (MAP_FIXED)
        "brk": anyhow,
        "mmap": (
            (read_write, _only(3, _MAP_NORESERVE, _MAP_PRIVATE_ANONYMOUS)),
            # Where the C library (glibc 2.41) keeps what getrandom needs without a system call.
            (read_write, _is(3, _MAP_DROPPABLE_ANONYMOUS)),
        ),
        "mprotect": ((read_write,),),
        "munmap": anyhow,
        "mremap": ((_only(3, _MREMAP_MAYMOVE),),),
        # malloc gives memory back.
        "madvise": ((_int(2, _MADV_DONTNEED),),),
        # ---- time: the kernel answers most of these without a system call, on most hosts
        # libtpms measures itself (CLOCK_PROCESS_CPUTIME_ID).
        "clock_gettime": ((_only(0, _OWN_CLOCKS),),),
        "gettimeofday": anyhow,
        "time": anyhow,
        # time.sleep: another try to leave descriptors to the engine host.
        "clock_nanosleep": ((_int(0, _CLOCK_MONOTONIC), _int(1, _TIMER_ABSTIME)),),
        # A wait that was interrupted by SIGSTOP and SIGCONT, or by a frozen control group, goes on.
        "restart_syscall": anyhow,
        # ---- the rest
        # Seeds of libtpms and OpenSSL. Not GRND_INSECURE.
        "getrandom": ((_only(2, _GRND_NONBLOCK),),),
        # OpenSSL notices a fork by it.
        "getpid": anyhow,
        # Locks of Python and the C library: within this process only, and none that lends its priority.
        "futex": tuple(
            (_int(1, _FUTEX_PRIVATE | operation, ignored=_FUTEX_CLOCK_REALTIME),) for operation in _FUTEX_OPERATIONS
        ),
        # Its name tells that it has an instance.
        "prctl": ((_int(0, PR_SET_NAME),),),
        "exit_group": anyhow,
    }


def _refused() -> dict[str, Rules]:
    # libtpms writes its messages with dprintf, for which the C library asks where in a file standard error is and how large a
    # buffer suits it, and goes on without an answer. The kernel does not get to see these: it would read the path of a
    # newfstatat, whatever it is.
    return {
        "lseek": ((_int(0, _STDERR),),),
        "fstat": ((_int(0, _STDERR),),),
        "newfstatat": ((_int(0, _STDERR), _is(3, _AT_EMPTY_PATH)),),
    }


def compile_filter() -> bytes:
    """Return the filter as a program for the kernel (struct sock_filter each, seccomp(2)).

    Calls of other architectures (32-bit ones, x32) end the process too.

    Raises:
        EngineError: libseccomp refuses a rule.
    """
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.KILL_PROCESS)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for urgency, (name, alternatives) in enumerate(reversed(_allowed().items())):
        _add(rules, pyseccomp.ALLOW, name, alternatives, urgency)
    for name, alternatives in _refused().items():
        _add(rules, pyseccomp.ERRNO(errno.ESPIPE), name, alternatives, 0)
    with open(os.memfd_create("filter"), "rb+") as file:  # noqa: PTH123  # it has no path
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _add(rules: Any, action: Any, name: str, alternatives: Rules, urgency: int) -> None:
    if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) < 0:
        # A call that this architecture does not have (such as `time` on arm64) needs no rule.
        return
    try:
        for conditions in alternatives:
            rules.add_rule_exactly(action, name, *conditions)
        rules.syscall_priority(name, urgency)
    except (OSError, ValueError) as error:
        raise EngineError("SANDBOX_FAILED", f"the system call filter has no rule for {name}: {error}") from error
