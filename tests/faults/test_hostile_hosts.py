"""The line between daemon and engine host, with whoever may be at its other end: neither ends by what the other one says."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from tests.hostile.fuzz import filled, noise
from tests.hostile.stage import start_host
from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2
from vtpm.engine.v1 import link_pb2 as pb

_MORE_MEMORY = 32 << 20


def peak(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


# ---- an engine host that is none ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual_memory() -> int:
    """The most memory that a daemon takes whose engine host is a good one."""
    with DaemonProcess() as daemon:
        daemon.running("honest")
        assert daemon.process is not None
        return peak(daemon.process.pid)


@pytest.mark.parametrize("script", ["noise", "any_replies", "wakes_of_nobody", "ends_of_nobody"])
def test_a_hostile_engine_host_is_killed_and_replaced(script: str, usual_memory: int) -> None:
    daemon = DaemonProcess()
    hostile = start_host(daemon, "tests.hostile.lines", script, "1")
    try:
        daemon.start()
        assert hostile.wait(30) == -9
        assert daemon.process is not None
        pid = daemon.process.pid
        instance = daemon.running("honest")
        daemon.note_host()
        with raw.connect(instance.tpm_socket) as sock:
            raw.succeed(sock, raw.pcr_read(0))
        assert daemon.process.poll() is None
        assert peak(pid) - usual_memory <= _MORE_MEMORY
        assert daemon.log_text().count('"engine.host_misbehaved"') == 1
    finally:
        hostile.kill()
        hostile.wait()
        daemon.close()


@pytest.mark.parametrize("script", ["noise_instead_of_hello", "endless_hello", "workers_that_cannot_be"])
def test_one_that_does_not_even_greet_is_killed_and_the_next_start_has_a_good_one(script: str) -> None:
    daemon = DaemonProcess()
    hostile = start_host(daemon, "tests.hostile.lines", script, "1")
    try:
        first = daemon.launch()
        assert hostile.wait(60) == -9
        # That start ends by name, or goes on with an engine host of its own.
        eventually(lambda: first.poll() is not None or (daemon.runtime_dir / "operator.sock").exists(), 30)
        if first.poll() is not None:
            assert "ENGINE_HOST_" in daemon.log_text()
            assert "Traceback" not in daemon.log_text()
            daemon.start()
        assert daemon.running("honest").state == instance_pb2.ON
        daemon.note_host()
    finally:
        hostile.kill()
        hostile.wait()
        daemon.close()


# ---- a daemon that is none ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_host() -> Iterator[tuple[DaemonProcess, subprocess.Popen[bytes]]]:
    """A real engine host, and the directories of the daemon that it waits for."""
    directories = DaemonProcess()
    process = start_host(directories, "vtpm.engine.host", str(directories.root / "host.log"))
    yield directories, process
    process.kill()
    process.wait()
    directories.close()


def connected(directories: DaemonProcess) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(str(directories.runtime_dir / "engine.sock"))
    return sock


def asked(sock: socket.socket, request: pb.HostRequest) -> pb.HostReply:
    sock.send(request.SerializeToString())
    while True:
        reply = pb.HostReply.FromString(sock.recv(1 << 18))
        if reply.id == request.id:
            return reply


def keep_alive(sock: socket.socket) -> list[socket.socket]:
    """Have something parked, so that the engine host does not end when its daemon is gone."""
    ours, theirs = socket.socketpair()
    about = pb.ParkedInstance(instance="22222222-2222-2222-2222-222222222222", epoch=1, engine="libtpms", roles=[pb.DATA])
    socket.send_fds(sock, [pb.HostRequest(id=1, adopt=pb.Adopt(parked=about)).SerializeToString()], [theirs.fileno()])
    assert not pb.HostReply.FromString(sock.recv(1 << 18)).error
    return [ours, theirs]


def asks_for_the_end(message: bytes) -> bool:
    """Whether it is a request that the engine host is to end, or to let go of what keeps it alive."""
    with contextlib.suppress(DecodeError):
        return pb.HostRequest.FromString(message).WhichOneof("body") in ("quit", "hand_over", "forget")
    return False


def test_no_request_ends_the_engine_host(engine_host: tuple[DaemonProcess, subprocess.Popen[bytes]]) -> None:
    directories, process = engine_host
    rng = random.Random(1)
    sock = connected(directories)
    kept = keep_alive(sock)
    for number in range(20_000):
        message = noise(rng) if number % 3 == 0 else filled(pb.HostRequest, rng).SerializeToString() or b"\0"
        if asks_for_the_end(message):
            continue
        try:
            socket.send_fds(sock, [message], [kept[0].fileno()] * rng.randrange(3))
            sock.setblocking(False)
            sock.recv(1 << 18)
        except BlockingIOError:
            pass
        except OSError:
            sock.close()
            sock = connected(directories)
        sock.settimeout(20)
    sock.close()
    assert process.poll() is None, (directories.root / "host.log").read_text()
    sock = connected(directories)
    hello = asked(sock, pb.HostRequest(id=77, hello=pb.Hello())).hello
    assert hello.pid == process.pid
    assert "22222222-2222-2222-2222-222222222222" in [item.instance for item in hello.parked]
    sock.close()


def test_a_daemon_that_does_not_read_holds_up_no_instance(engine_host: tuple[DaemonProcess, subprocess.Popen[bytes]]) -> None:
    directories, process = engine_host
    sock = connected(directories)
    kept = keep_alive(sock)
    # Answers that nobody reads: more than its socket has room for.
    for number in range(2000):
        sock.send(pb.HostRequest(id=number + 2, hello=pb.Hello()).SerializeToString())
    # Something comes for what is parked, and the engine host sees it all the same.
    kept[0].send(b"wake")
    found: list[pb.Wake] = []
    while not found:
        reply = pb.HostReply.FromString(sock.recv(1 << 18))
        found = [reply.wake] if reply.HasField("wake") else []
    assert found[0].instance == "22222222-2222-2222-2222-222222222222"
    assert process.poll() is None
    sock.close()
