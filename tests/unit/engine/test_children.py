"""What a worker says to the engine host is not believed: what makes no sense ends that worker, and nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtpm.engine.children import Child
from vtpm.engine.parking import Parking
from vtpm.engine.v1 import link_pb2 as pb


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
    socket.send_fds(worker.line, [message], [0] * count)
    assert worker.child.listen()
    if worker.child.left is None:
        assert worker.process.wait(10) == -signal.SIGKILL
        assert descriptors_open() == before
    else:
        # By chance a message: then it has a descriptor for each role.
        about, fds = worker.child.left
        assert len(about.roles) == len(fds) == count > 0
        for fd in fds:
            os.close(fd)
    worker.end()


def test_a_worker_of_nobody_can_leave_nothing(worker: Worker) -> None:
    worker.child.instance = ""
    park = pb.Park(roles=[pb.DATA])
    socket.send_fds(worker.line, [park.SerializeToString()], [0])
    assert worker.child.listen()
    assert worker.child.left is None
    assert worker.process.wait(10) == -signal.SIGKILL


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
