"""The wall around a worker, tried from within: every system call that is not on the list ends it, whatever its arguments."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import ROOT, DaemonProcess, spare_pids, worker_pids
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.engine.seccomp import pyseccomp
from vtpm.engine.worker_uids import FIRST_UID

# A process is forked for each of a few hundred calls.
pytestmark = pytest.mark.timeout(300)

KILLED = -signal.SIGSYS
ANY_FD = 99
NOT_A_POINTER = 1
X32 = 0x4000_0000
# Some more than Linux 6.18 has.
NUMBERS = range(512)

# uretprobe and uprobe, which the kernel shows no filter: they end a process that makes them itself (SIGILL).
UNFILTERED = {335, 336} if platform.machine() == "x86_64" else set()

# What a worker may call, and what is refused to it without its end; with arguments that get through.
ALLOWED: dict[str, list[tuple[int, ...]]] = {
    "accept4": [(ANY_FD, 0, 0, 0x80000)],
    "brk": [(0,)],
    "clock_gettime": [(clock, NOT_A_POINTER) for clock in range(8)],
    "clock_nanosleep": [(1, 1, NOT_A_POINTER)],
    "close": [(ANY_FD,)],
    "epoll_create1": [(0x80000,)],
    "epoll_ctl": [(ANY_FD, 1, ANY_FD), (ANY_FD, 2, ANY_FD)],
    "epoll_pwait": [(ANY_FD, 0, 1, 0, 0)],
    "epoll_wait": [(ANY_FD, 0, 1, 0)],
    "exit_group": [(0,)],
    "futex": [(NOT_A_POINTER, 128 | operation | clock) for operation in (0, 1, 9, 10) for clock in (0, 256)],
    "getpid": [()],
    "getrandom": [(NOT_A_POINTER, 1, 0), (NOT_A_POINTER, 1, 1)],
    "getsockname": [(ANY_FD,)],
    "getsockopt": [(ANY_FD, 1, 3), (ANY_FD, 1, 38)],
    "gettimeofday": [(NOT_A_POINTER,)],
    "ioctl": [(ANY_FD, 0x5421)],
    "madvise": [(0, 0, 4)],
    "mmap": [(0, 4096, rights, flags) for rights in range(4) for flags in (0x22, 0x4022, 0x28)],
    "mprotect": [(0, 0, rights) for rights in range(4)],
    "mremap": [(0, 0, 0, 0), (0, 0, 0, 1)],
    "munmap": [(1,)],
    "poll": [(0, 0, 0)],
    "ppoll": [(0, 0, NOT_A_POINTER, 0)],
    "prctl": [(15, NOT_A_POINTER)],
    "recvfrom": [(ANY_FD, 0, 0, 0, 0), (ANY_FD, 0, 0, 0x40, 0)],
    "recvmsg": [(ANY_FD, 0, 0), (ANY_FD, 0, 0x40)],
    "restart_syscall": [()],
    "sched_yield": [()],
    "sendmsg": [(ANY_FD, 0, 0)],
    "sendto": [(ANY_FD, 0, 0, 0, 0)],
    "time": [(0,)],
    "write": [(2, 0, 0)],
    "writev": [(2, 0, 0)],
    # Refused.
    "fstat": [(2, 0)],
    "lseek": [(2, 0, 0)],
    "newfstatat": [(2, NOT_A_POINTER, 0, 0x1000)],
}
# The same calls to other ends.
HARMFUL: dict[str, list[tuple[int, ...]]] = {
    # Nonblocking is nothing that a worker asks for; inherited is nothing that it needs.
    "accept4": [(ANY_FD, 0, 0, 0), (ANY_FD, 0, 0, 0x80800)],
    # The processor time of process 1, of a device's clock.
    "clock_gettime": [(~1 << 3 | 2, NOT_A_POINTER), (~ANY_FD << 3 | 3, NOT_A_POINTER), (8,)],
    "clock_nanosleep": [(0, 1), (1, 0), (0, 0)],
    "epoll_create1": [(0,)],
    "epoll_ctl": [(ANY_FD, 0, ANY_FD), (ANY_FD, 3, ANY_FD)],
    "epoll_pwait": [(ANY_FD, 0, 1, 0, NOT_A_POINTER)],
    # Shared with other processes; requeued; with priority inheritance.
    "futex": [
        (NOT_A_POINTER, operation)
        for operation in (*range(16), *(128 | other for other in range(16) if other not in (0, 1, 9, 10)))
    ],
    "getrandom": [(NOT_A_POINTER, 1, 2), (NOT_A_POINTER, 1, 4)],
    # SO_PEERCRED, SO_PEERSEC, SO_PEERGROUPS, SO_PEERPIDFD, SO_DOMAIN; of TCP.
    "getsockopt": [(ANY_FD, 6, 3), *((ANY_FD, 1, option) for option in (17, 31, 59, 77, 39))],
    "madvise": [(0, 0, advice) for advice in range(128) if advice != 4],
    # Executable; shared; of a file; where something is already; locked; huge; and bits that the kernel knows nothing of yet.
    "mmap": [(0, 4096, 4, 0x22), (0, 4096, 7, 0x22), (0, 4096, 3, 0x21), (0, 4096, 3, 0x01), (0, 4096, 3, 0x02)]
    + [(0, 4096, 3, 0x22 | 1 << bit) for bit in (*range(2, 5), *range(6, 14), *range(15, 64))]
    + [(0, 4096, 1 << bit, 0x22) for bit in range(2, 64)],
    "mprotect": [(0, 0, 7), *((0, 0, 1 << bit) for bit in range(2, 64))],
    "mremap": [(0, 0, 0, flags) for flags in (2, 3, 4, 5, 1 << 32)],
    "ppoll": [(0, 0, NOT_A_POINTER, NOT_A_POINTER)],
    # From an address; MSG_OOB, MSG_PEEK, MSG_ERRQUEUE.
    "recvfrom": [(ANY_FD, 0, 0, 0, 1), *((ANY_FD, 0, 0, 1 << bit, 0) for bit in range(32) if bit != 6)],
    "recvmsg": [(ANY_FD, 0, 1 << bit) for bit in range(32) if bit != 6],
    "sendmsg": [(ANY_FD, 0, 1 << bit) for bit in range(32)],
    "sendto": [(ANY_FD, 0, 0, 0, 1), *((ANY_FD, 0, 0, 1 << bit, 0) for bit in range(32))],
    "write": [(fd, 0, 0) for fd in (0, 1, 3, ANY_FD, 2 | 1 << 31)],
    "writev": [(fd, 0, 0) for fd in (0, 1, 3, ANY_FD)],
    # What a file is, by its path and by its number; where it is read.
    "fstat": [(3, 0)],
    "lseek": [(3, 0, 0)],
    "newfstatat": [(2, 0, 0, 0), (3, 0, 0, 0x1000), (-100 & 0xFFFF_FFFF, 0, 0, 0), (-100 & 0xFFFF_FFFF, 0, 0, 0x1000)],
}


def tried(probes: Iterable[tuple[object, ...]]) -> list[int]:
    """How a worker of its own ends for each probe."""
    lines = "".join(f"{json.dumps(probe)}\n" for probe in probes)
    command = [sys.executable, "-m", "tests.support.sandbox_probe"]
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def survivors(probes: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """The probes that the filter let pass."""
    return [probe for probe, end in zip(probes, tried(probes), strict=True) if end != KILLED]


def number(name: str) -> int:
    """A system call's number here, negative if there is none."""
    found: int = pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)
    return found


def calls(table: dict[str, list[tuple[int, ...]]]) -> list[tuple[object, ...]]:
    """The probes of a table, without the calls that this architecture does not have."""
    return [("call", number(name), *arguments) for name, each in table.items() for arguments in each if number(name) >= 0]


def test_every_system_call_that_is_not_on_the_list_ends_a_worker() -> None:
    listed = {number(name) for name in ALLOWED}
    probes = [("call", each, *[0] * 6) for each in NUMBERS if each not in listed | UNFILTERED]
    assert survivors([*probes, ("call", (1 << 32) - 1)]) == []


def test_what_is_on_the_list_gets_through() -> None:
    probes = calls(ALLOWED)
    assert survivors(probes) == probes


def test_a_call_on_the_list_ends_a_worker_when_its_arguments_are_to_another_end() -> None:
    assert survivors(calls(HARMFUL)) == []


@pytest.mark.parametrize("upper", [0, 1 << 32], ids=["as they are", "with bits that the kernel does not look at"])
def test_no_fcntl_gets_through(upper: int) -> None:
    commands = [*range(64), *range(1024, 1048)]
    assert fcntl.F_SETOWN in commands
    assert fcntl.F_NOTIFY in commands
    assert survivors([("call", number("fcntl"), 0, command | upper, 0) for command in commands]) == []


def test_no_ioctl_but_that_for_timeouts_gets_through() -> None:
    # Of terminals and descriptors, of sockets, of namespaces and of file systems: the ranges of ioctl_list(2).
    ranges = [range(0x5400, 0x5500), range(0x8900, 0x89FF), range(0xB700, 0xB710), range(0x6600, 0x6640), range(32)]
    commands = [command for command in itertools.chain(*ranges) if command != 0x5421]
    assert survivors([("call", number("ioctl"), 0, command, 0) for command in [*commands, 0xC0185879, 0x40086602]]) == []


def test_no_prctl_but_that_for_names_gets_through() -> None:
    # PR_SET_VMA and PR_SET_PTRACER have numbers of their own.
    options = [option for option in (*range(96), 0x53564D41, 0x59616D61) if option != 15]
    assert survivors([("call", number("prctl"), option, 0, 0, 0, 0) for option in options]) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the architecture has no other way in")
def test_calls_of_other_architectures_end_a_worker() -> None:
    assert survivors([("call", X32 | each, *[0] * 6) for each in (*NUMBERS, *range(512, 560))]) == []
    assert survivors([("i386",)]) == []


def test_a_worker_cannot_have_a_signal_sent_to_another_process_of_its_user() -> None:
    victim = subprocess.Popen(["sleep", "300"])
    try:
        assert tried([("signal_by_fcntl", victim.pid)]) == [KILLED]
        assert victim.poll() is None
    finally:
        victim.kill()
    assert victim.wait() == -signal.SIGKILL


def test_a_pipe_that_nobody_reads_neither_blocks_nor_ends_a_worker() -> None:
    assert tried([("flood", 4 << 20), ("flood_unheard", 4 << 20)]) == [0, 0]


def test_no_memory_of_a_worker_is_writable_and_executable(own_daemon: DaemonProcess) -> None:
    own_daemon.running("web-1")
    for pid in all_workers(own_daemon):
        rights = [line.split()[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert not [each for each in rights if "w" in each and "x" in each]


def all_workers(daemon: DaemonProcess) -> list[int]:
    """The workers and spares of a daemon that are behind their wall."""
    host = daemon.client.call(daemon.client.host.GetHost, pb.GetHostRequest()).engine_host_pid
    return [pid for pid in (*worker_pids(host), *spare_pids(host)) if fields_of(pid).get("Seccomp") == "2"]


def fields_of(pid: int) -> dict[str, str]:
    """What /proc says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_each_worker_of_root_is_a_user_of_its_own(own_daemon: DaemonProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for name in ("web-1", "web-2"):
        own_daemon.running(name)
    pids = all_workers(own_daemon)
    assert len(pids) >= 2
    uids = set()
    for pid in pids:
        fields = fields_of(pid)
        (uid,) = set(fields["Uid"].split())
        assert set(fields["Gid"].split()) == {uid}
        assert fields["Groups"] == ""
        assert {int(fields[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert int(uid) >= FIRST_UID
        uids.add(uid)
    assert len(uids) == len(pids)
    # With one worker's user and without its filter: the others are out of reach.
    mine, other = pids[:2]
    become = ["setpriv", f"--reuid={FIRST_UID + mine}", f"--regid={FIRST_UID + mine}", "--clear-groups"]
    for victim in (other, os.getpid()):
        for command in (["kill", "-0", str(victim)], ["cat", f"/proc/{victim}/environ"], ["ls", f"/proc/{victim}/fd"]):
            assert subprocess.run([*become, *command], capture_output=True, check=False).returncode != 0, command
    # And the service still has its way with each.
    own_daemon.client.call(own_daemon.client.instances.StopInstance, pb.StopInstanceRequest(instance="web-2"))
    raw.succeed(raw.connect(own_daemon.get("web-1").tpm_socket), raw.get_random(8))


def test_what_a_worker_says_is_bounded_and_nobody_elses(own_daemon: DaemonProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can speak with a worker's voice")
    web = own_daemon.running("web-1")
    host = own_daemon.client.call(own_daemon.client.host.GetHost, pb.GetHostRequest()).engine_host_pid
    # The one that made it is on its way out.
    eventually(lambda: len(worker_pids(host)) == 1)
    (pid,) = worker_pids(host)
    log = own_daemon.runtime_dir / "engine-host.log"
    voice = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    os.write(voice, b"\x1b[2J\rworker of another\n")
    guest = raw.connect(web.tpm_socket)
    for _ in range(200):
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                os.write(voice, b"flooded\n")
        raw.succeed(guest, raw.get_random(8))
    os.close(voice)
    own_daemon.client.call(own_daemon.client.instances.StopInstance, pb.StopInstanceRequest(instance="web-1"))
    lines = [line for line in log.read_text().splitlines() if f"worker {web.id} (pid {pid}): " in line]
    assert lines[0].endswith("\\x1b[2J\\x0dworker of another")
    assert len(lines) <= 102
    assert re.search(r"\d+ more lines withheld", lines[-1])


def test_a_log_that_cannot_be_written_holds_no_vm_up() -> None:
    daemon = DaemonProcess()
    try:
        (daemon.runtime_dir / "engine-host.log").mkdir(parents=True)
        daemon.runtime_dir.chmod(0o700)
        web = daemon.start().running("web-1")
        raw.succeed(raw.connect(web.tpm_socket), raw.get_random(8))
        assert "engine.host_log_not_writable" in daemon.log_text()
    finally:
        daemon.close()
