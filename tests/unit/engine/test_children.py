"""What a worker says to the engine host is not believed: what makes no sense ends that worker, and nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtpm.engine.children import Child
from vtpm.engine.parking import Parking
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError


class Worker:
    """A process that could be a worker, and its end of the line."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"])
        ours, self.line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.child = Child(
            "11111111-1111-1111-1111-111111111111", 1, "libtpms", self.process.pid, os.pidfd_open(self.process.pid), ours
        )

    def end(self) -> int:
        self.process.kill()
        status = self.process.wait(10)
        os.close(self.child.pidfd)
        self.child.link.close()
        self.line.close()
        return status


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.end()


def descriptors_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.binary(min_size=2, max_size=64), count=st.integers(0, 3))
def test_what_makes_no_sense_ends_it_and_leaves_nothing_open(message: bytes, count: int) -> None:
    worker = Worker()
    before = descriptors_open()
    # Pipes, as no worker has them.
    reader, writer = os.pipe()
    socket.send_fds(worker.line, [message], [reader] * count)
    with pytest.raises(ViolationError):
        worker.child.listen()
    assert worker.child.left is None
    os.close(reader)
    os.close(writer)
    assert descriptors_open() == before
    worker.end()


def park_of(*roles: pb.Role.ValueType, **fields: Any) -> bytes:
    return pb.Park(roles=roles, **fields).SerializeToString()


@pytest.mark.parametrize(
    ("message", "kinds", "code"),
    [
        (b"G", "", "GOING_ON"),
        (park_of(pb.DATA, snapshot_version=1 << 63), "c", "PARK_VERSION"),
        (park_of(pb.DATA, zeros=[1, 2]), "c", "PARK_ZEROS"),
        (park_of(pb.DATA, zeros=[1 << 20]), "c", "PARK_ZEROS"),
        (park_of(pb.OPERATIONS), "c", "PARK_ROLE"),
        (park_of(pb.VM_DATA, pb.VM_DATA), "cc", "PARK_ROLE"),
        (park_of(pb.DATA, pb.DATA), "c", "PARK_DESCRIPTORS"),
        (park_of(pb.DATA), "p", "PARK_KIND"),
        (park_of(pb.DATA), "l", "PARK_KIND"),
        (park_of(pb.DATA_LISTENER), "c", "PARK_KIND"),
        (b"\x08\x05" * 3000, "", "PARK_SIZE"),
    ],
)
def test_each_kind_of_nonsense_is_named(worker: Worker, message: bytes, kinds: str, code: str) -> None:
    connection, peer = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0vtpm-test-{os.getpid()}-{id(worker)}")
    listener.listen(1)
    reader, writer = os.pipe()
    with connection, peer, listener:
        found = {"c": connection.fileno(), "l": listener.fileno(), "p": reader}
        socket.send_fds(worker.line, [message], [found[kind] for kind in kinds])
        with pytest.raises(ViolationError) as refused:
            worker.child.listen()
    os.close(reader)
    os.close(writer)
    assert refused.value.code == code


def test_a_worker_that_does_not_read_is_ended_and_nobody_waits_for_it(worker: Worker) -> None:
    def tell_more_and_more() -> None:
        for _ in range(100_000):
            worker.child.send(b"H")

    with pytest.raises(BlockingIOError):
        tell_more_and_more()
    assert worker.child.misbehaved.startswith("LINK_UNREAD")
    assert worker.process.wait(10) == -signal.SIGKILL


def test_a_worker_of_nobody_can_leave_nothing(worker: Worker) -> None:
    worker.child.instance = ""
    park = pb.Park(roles=[pb.DATA])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(worker.line, [park.SerializeToString()], [ours.fileno()])
        with pytest.raises(ViolationError) as refused:
            worker.child.listen()
    assert worker.child.left is None
    assert refused.value.code == "PARK_UNOWNED"


def test_last_words_are_heard_of_one_that_died_with_something_unread(worker: Worker) -> None:
    worker.child.link.send(b"an order")
    park = pb.Park(roles=[pb.DATA])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(worker.line, [park.SerializeToString()], [ours.fileno()])
        worker.line.close()
        assert worker.child.listen()
        assert worker.child.left is not None
        os.close(worker.child.left[1][0])


def test_what_cannot_be_watched_is_refused_whole(tmp_path: Path) -> None:
    parking = Parking(lambda _about: None)
    ours, theirs = socket.socketpair()
    with (tmp_path / "a file").open("wb") as file, ours, theirs:
        about = pb.ParkedInstance(instance="x", roles=[pb.DATA, pb.DATA])
        with pytest.raises(ValueError, match="watched"):
            parking.add(about, [ours.fileno(), file.fileno()])
        assert "x" not in parking
        # What it had begun to watch it watches no more.
        theirs.send(b"y")
        parking.serve()
        parking.add(pb.ParkedInstance(instance="x", roles=[pb.DATA]), [ours.fileno()])
