"""The commit thread outlives every worker: one commit at a time, checked, and a bad one costs its own worker's socket."""

from __future__ import annotations

import queue
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.store.given import created_on, open_store
from vtpm.engine.committer import Committer
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import MAX_STATE_SIZE, ViolationError
from vtpm.store.model import InstanceRecord


class Desk:
    """A commit thread on a real store, and workers' ends of its sockets."""

    def __init__(self, path: Path) -> None:
        self.store = open_store(f"sqlite:///{path / 'vtpm.db'}")
        self.broken: list[BaseException] = []
        self.committer = Committer(self.store.commit, on_broken=self.broken.append)
        self.violations: queue.Queue[tuple[uuid.UUID, str]] = queue.Queue()
        self._sockets: list[socket.socket] = []

    def worker(self, name: str) -> tuple[InstanceRecord, socket.socket]:
        record = created_on(self.store, name)
        return record, self.line(record.id, record.epoch)

    def line(self, instance: uuid.UUID, epoch: int) -> socket.socket:
        ours, theirs = socket.socketpair()

        def on_violation(violation: ViolationError) -> None:
            self.violations.put((instance, violation.code))

        self.committer.add(instance, epoch, ours, on_violation)
        theirs.settimeout(20)
        self._sockets.append(theirs)
        return theirs

    def close(self) -> None:
        self.committer.close()
        for sock in self._sockets:
            sock.close()
        self.store.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.close()
    assert not found.broken


def a_commit(record: InstanceRecord, version: int, sealed: bytes = b"sealed") -> bytes:
    return frame(pb.Commit(epoch=record.epoch, version=version, sealed=sealed).SerializeToString())


def answer(sock: socket.socket) -> pb.CommitAck:
    (message,) = FrameReader().feed(sock.recv(4096))
    return pb.CommitAck.FromString(message)


@pytest.mark.parametrize(
    ("nonsense", "code"),
    [
        (frame(b"\x0a\xff\xff\xff\xff\x0f\x01"), "COMMIT_MALFORMED"),
        (frame(pb.Commit(epoch=1, version=1 << 63, sealed=b"x").SerializeToString()), "COMMIT_VERSION"),
        (frame(pb.Commit(epoch=7, version=2, sealed=b"x").SerializeToString()), "COMMIT_EPOCH"),
        (b"\xff\xff\xff\xff", "COMMIT_SIZE"),
        (frame(b""), "COMMIT_EPOCH"),
    ],
)
def test_what_no_worker_sends_costs_it_its_socket_and_nobody_elses(desk: Desk, nonsense: bytes, code: str) -> None:
    hostile, hostile_line = desk.worker("hostile")
    honest, honest_line = desk.worker("honest")
    hostile_line.sendall(nonsense)
    assert desk.violations.get(timeout=20) == (hostile.id, code)
    assert hostile_line.recv(1) == b""
    honest_line.sendall(a_commit(honest, 2))
    assert not answer(honest_line).refused
    assert desk.store.load(honest.id)[1].version == 2


def test_one_that_sends_a_second_commit_before_its_answer_is_told_of(desk: Desk) -> None:
    hostile, line = desk.worker("hostile")
    line.sendall(b"".join(a_commit(hostile, version) for version in range(2, 3000)))
    assert desk.violations.get(timeout=20) == (hostile.id, "COMMIT_OUTSTANDING")


def test_after_a_refusal_a_worker_has_nothing_to_commit(desk: Desk) -> None:
    record, line = desk.worker("stale")
    desk.store.release(record.id, record.epoch)
    line.sendall(a_commit(record, 2))
    assert answer(line).refused == "EPOCH_STALE"
    line.sendall(a_commit(record, 2))
    assert desk.violations.get(timeout=20) == (record.id, "COMMIT_OVER")


def test_after_its_snapshot_a_worker_has_nothing_to_commit(desk: Desk) -> None:
    record, line = desk.worker("asleep")
    snapshot = pb.Commit(epoch=record.epoch, version=1, kind=pb.Commit.SNAPSHOT, sealed=b"sealed")
    line.sendall(frame(snapshot.SerializeToString()))
    assert not answer(line).refused
    line.sendall(a_commit(record, 2))
    assert desk.violations.get(timeout=20) == (record.id, "COMMIT_OVER")


def test_one_that_does_not_read_its_answers_is_told_of(desk: Desk) -> None:
    record, line = desk.worker("deaf")
    unread = 0
    code = ""
    for _ in range(5000):
        try:
            line.sendall(a_commit(record, 2))
        except OSError:
            break
        while code == "" and len(line.recv(1 << 20, socket.MSG_PEEK)) == unread:
            if not desk.violations.empty():
                code = desk.violations.get()[1]
        if code:
            break
        unread = len(line.recv(1 << 20, socket.MSG_PEEK))
    assert (code or desk.violations.get(timeout=20)[1]) == "COMMIT_UNREAD"


def test_a_commit_may_come_in_parts_and_as_large_as_it_may_be(desk: Desk) -> None:
    record, line = desk.worker("slow")
    message = a_commit(record, 2, bytes(MAX_STATE_SIZE))
    line.sendall(message[:3])
    line.sendall(message[3:100_000])
    line.sendall(message[100_000:])
    assert not answer(line).refused


def test_a_worker_may_bring_its_commit_again_to_the_next_daemon(desk: Desk) -> None:
    record, line = desk.worker("adopted")
    line.sendall(a_commit(record, 2))
    assert not answer(line).refused
    again = desk.line(record.id, record.epoch)
    again.sendall(a_commit(record, 2))
    assert not answer(again).refused


def test_a_socket_that_was_closed_before_it_came_here_is_no_trouble(desk: Desk) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        desk.committer.add(uuid.uuid4(), 1, ours)
        ours.close()
        record, line = desk.worker("honest")
        line.sendall(a_commit(record, 2))
        assert not answer(line).refused


def test_a_thread_that_is_broken_is_told_of_at_once() -> None:
    broken: queue.Queue[BaseException] = queue.Queue()

    def commit(_commits: object) -> list[str]:
        # What the store never does.
        raise ZeroDivisionError

    committer = Committer(commit, on_broken=broken.put)
    ours, theirs = socket.socketpair()
    committer.add(uuid.uuid4(), 1, ours)
    theirs.sendall(frame(pb.Commit(epoch=1, version=2, sealed=b"x").SerializeToString()))
    assert isinstance(broken.get(timeout=20), ZeroDivisionError)
    committer.close()
    theirs.close()
