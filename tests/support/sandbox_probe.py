"""Real workers that make one system call behind their wall: `python -m tests.support.sandbox_probe < PROBES`.

Each probe is a JSON line: what to do, and its arguments. The answer to each is a line: how that worker ended, `-31` (SIGSYS) if
the filter ended it, else `0`. A process of its own, as it forks without end and has a page of machine code for 32-bit calls.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vtpm.engine import children
from vtpm.engine.children import Child, Nursery
from vtpm.engine.libtpms import Libtpms
from vtpm.engine.operations import Operations
from vtpm.engine.v1 import link_pb2 as pb

MEMORY_LIMIT = 64 << 20
# mov eax, 20 (getpid of i386); int 0x80; ret
GETPID_OF_I386 = bytes.fromhex("b814000000cd80c3")

libc = ctypes.CDLL(None, use_errno=True)
machine_code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
machine_code.write(GETPID_OF_I386)
call_i386 = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(machine_code)))


def call(number: int, *arguments: int) -> None:
    """The system call itself, whatever it answers."""
    libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))


def signal_by_fcntl(victim: int) -> None:
    """Have the kernel send SIGKILL to `victim` as soon as something comes on a socket (fcntl(2), F_SETSIG)."""
    ours, theirs = PAIR
    fcntl.fcntl(ours, fcntl.F_SETOWN, victim)
    fcntl.fcntl(ours, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC)
    theirs.send(b"now")


def flood(size: int) -> None:
    """Write more to standard error than anybody reads."""
    line = b"x" * 1023 + b"\n"
    for _ in range(size // len(line)):
        try:
            os.write(2, line)
        except OSError:
            continue


ACTIONS: dict[str, Callable[..., object]] = {
    "call": call,
    "i386": call_i386,
    "signal_by_fcntl": signal_by_fcntl,
    # With somebody who has the other end and does not read, and with nobody.
    "flood": flood,
    "flood_unheard": flood,
}


class Prober:
    """In the place of vtpm.engine.worker.Worker: a worker that has come to the end of its way behind the wall."""

    action = ""
    arguments: tuple[int, ...] = ()

    def __init__(self, *_: Any, operations_socket: socket.socket, commits: socket.socket, **__: Any) -> None:
        global PAIR
        PAIR = operations_socket, commits

    def run(self) -> NoReturn:
        """Do it."""
        ACTIONS[self.action](*self.arguments)
        os._exit(0)


PAIR: tuple[socket.socket, socket.socket]


def end_of(child: Child) -> int:
    """How a worker ended."""
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pidfd)
    child.link.close()
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    """Answer each probe."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    vars(children)["Worker"] = Prober
    tpm = Libtpms()
    nursery = Nursery(tpm, Operations(tpm), memory_limit=MEMORY_LIMIT, spares=0)
    ours, theirs = socket.socketpair()
    for line in sys.stdin:
        Prober.action, *arguments = json.loads(line)
        Prober.arguments = tuple(arguments)
        child, _ = nursery.take(pb.Spawn(instance="probe"))
        log = getattr(child, "log", -1)
        if log >= 0 and Prober.action == "flood_unheard":
            os.close(log)
            log = -1
        child.take_over([pb.OPERATIONS, pb.COMMITS], [ours.fileno(), theirs.fileno()])
        print(end_of(child), flush=True)  # noqa: T201
        if log >= 0:
            os.close(log)


if __name__ == "__main__":
    main()
