"""What somebody does who has broken into a worker, on each of the lines that the worker has.

Every script begins as an honest worker, until its instance is loaded (`Lines.load`), or turns on the daemon before. It runs
behind the worker's sandbox, so it sends, receives and computes, and nothing else.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from mmap import mmap
from typing import Any, NoReturn

from tests.hostile.fuzz import broken_frame, filled, noise
from vtpm.engine import validate
from vtpm.engine.durable import DurableState
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker import GOING_ON

_BURST = 20


class Sent:
    """Counts messages, in memory that the tests' process sees too; only this process writes into its slot."""

    def __init__(self, counts: mmap, slot: int) -> None:
        self._counts = counts
        self._at = slot * 8
        self._number = 0

    def add(self, messages: int) -> None:
        self._number += messages
        self._counts[self._at : self._at + 8] = self._number.to_bytes(8, "little")


class Lines:
    """The worker's lines, and its honest answers: `serve` takes a request and returns the reply."""

    def __init__(
        self,
        *,
        host: socket.socket,
        operations: socket.socket,
        commits: DurableState,
        serve: Callable[[bytes], tuple[bytes, int | None]],
        sent: Sent,
    ) -> None:
        self.host = host
        self.operations = operations
        self.durable = commits
        self.commits: socket.socket = commits._commits
        self.serve = serve
        self._reader = FrameReader()
        self._sent = sent

    def send(self, sock: socket.socket, messages: Sequence[bytes]) -> None:
        """Send whole messages on a stream, some at a time."""
        for start in range(0, len(messages), _BURST):
            part = messages[start : start + _BURST]
            sock.sendall(b"".join(part))
            self._sent.add(len(part))

    def tell_host(self, message: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.host, [message], list(fds))
        self._sent.add(1)

    def requests(self, timeout_s: float) -> Iterator[bytes]:
        """Yield requests of the daemon until none comes for so long."""
        poller = select.poll()
        poller.register(self.operations, select.POLLIN)
        while poller.poll(timeout_s * 1000):
            data = self.operations.recv(65536)
            if not data:
                return
            yield from self._reader.feed(data)

    def load(self) -> None:
        """Be honest until there is an instance."""
        for message in self.requests(60):
            reply, _ = self.serve(message)
            self.operations.sendall(frame(reply))
            if pb.WorkerRequest.FromString(message).HasField("load"):
                return

    def wait_for_the_end(self) -> NoReturn:
        """Stay, and say nothing."""
        while True:
            time.sleep(60)

    def commit(self, version: int, size: int) -> pb.Commit:
        return pb.Commit(epoch=self.durable.epoch, version=version, sealed=b"\x5a" * size)


# ---- bytes -------------------------------------------------------------------------------------------------------------------


def noise_on_operations(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    for _ in range(50):
        lines.send(lines.operations, [noise(rng)])


def noise_on_commits(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    for _ in range(50):
        lines.send(lines.commits, [frame(noise(rng)) if rng.random() < 0.5 else noise(rng)])


def noise_on_the_host(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    for _ in range(200):
        lines.tell_host(noise(rng))


# ---- messages ----------------------------------------------------------------------------------------------------------------


def replies_on_operations(lines: Lines, seed: int) -> None:
    """Replies to nothing, of any kind."""
    rng = random.Random(seed)
    lines.load()
    lines.send(lines.operations, [broken_frame(rng, filled(pb.WorkerReply, rng).SerializeToString()) for _ in range(500)])


def any_commits(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    found = []
    for _ in range(300):
        commit = filled(pb.Commit, rng)
        assert isinstance(commit, pb.Commit)
        if rng.random() < 0.7:
            commit.epoch = lines.durable.epoch
        if rng.random() < 0.7:
            commit.version = lines.durable.version + rng.randint(0, 2)
        found.append(broken_frame(rng, commit.SerializeToString()))
    lines.send(lines.commits, found)


def any_last_words(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    fds = [lines.operations.fileno(), lines.commits.fileno(), lines.host.fileno(), 0]
    for _ in range(200):
        park = filled(pb.Park, rng)
        assert isinstance(park, pb.Park)
        if rng.random() < 0.5:
            del park.roles[:]
            park.roles.extend(rng.choice(list(pb.Role.values())) for _ in range(rng.randint(1, 5)))
        count = rng.choice((0, len(park.roles), rng.randint(0, 9)))
        message = park.SerializeToString() if rng.random() < 0.9 else GOING_ON
        lines.tell_host(message, rng.choices(fds, k=count))


def any_answers(lines: Lines, seed: int) -> None:
    """Answers to what is asked, made of an honest one: changed, of another kind, twice, or none."""
    rng = random.Random(seed)
    lines.load()
    for message in lines.requests(3):
        honest, _ = lines.serve(message)
        reply = pb.WorkerReply.FromString(honest)
        match rng.randrange(6):
            case 0:
                lines.send(lines.operations, [frame(honest)])
            case 1:
                lines.send(lines.operations, [frame(honest)] * 2)
            case 2:
                lines.send(lines.operations, [broken_frame(rng, honest)])
            case 3:
                continue
            case _:
                other = filled(pb.WorkerReply, rng)
                assert isinstance(other, pb.WorkerReply)
                if rng.random() < 0.5:
                    reply.MergeFrom(other)
                else:
                    reply = other
                reply.id = pb.WorkerRequest.FromString(message).id
                lines.send(lines.operations, [frame(reply.SerializeToString())])


def short_histogram(lines: Lines, seed: int) -> None:
    """Counts of one bucket, as whoever adds them up does not expect them."""
    lines.load()
    for message in lines.requests(60):
        request = pb.WorkerRequest.FromString(message)
        reply = pb.WorkerReply.FromString(lines.serve(message)[0])
        if request.get_status.counts:
            reply.status.ordinals.add(ordinal=0x17E, count=9, nanos=9, buckets=[1])
        lines.send(lines.operations, [frame(reply.SerializeToString())])


def bogus_load(lines: Lines, seed: int) -> None:
    """An answer to the very first request that is none."""
    rng = random.Random(seed)
    for message in lines.requests(60):
        reply = filled(pb.WorkerReply, rng)
        assert isinstance(reply, pb.WorkerReply)
        reply.id = pb.WorkerRequest.FromString(message).id
        lines.send(lines.operations, [frame(reply.SerializeToString())])


# ---- one commit, and what is wrong with it -----------------------------------------------------------------------------------


def _one_commit(lines: Lines, **fields: Any) -> None:
    lines.load()
    commit = lines.commit(lines.durable.version + 1, 100)
    for name, value in fields.items():
        setattr(commit, name, value)
    lines.send(lines.commits, [frame(commit.SerializeToString())])


def short_commit(lines: Lines, seed: int) -> None:
    """Seven bytes that are no message."""
    lines.load()
    lines.send(lines.commits, [frame(b"\x0a\xff\xff\xff\xff\x0f\x01")])


def version_beyond_sqlite(lines: Lines, seed: int) -> None:
    _one_commit(lines, version=1 << 63)


def another_epoch(lines: Lines, seed: int) -> None:
    _one_commit(lines, epoch=99)


def unknown_kind(lines: Lines, seed: int) -> None:
    _one_commit(lines, kind=77)


def short_token(lines: Lines, seed: int) -> None:
    _one_commit(lines, kind=pb.Commit.CONSUME, sealed=b"", token=b"short")


def large_state(lines: Lines, seed: int) -> None:
    _one_commit(lines, sealed=bytes(validate.MAX_STATE_SIZE + 1))


def commit_after_snapshot(lines: Lines, seed: int) -> None:
    """A snapshot is the end of a worker; this one goes on."""
    _one_commit(lines, kind=pb.Commit.SNAPSHOT, version=1)
    lines.commits.recv(4096)
    more = lines.commit(lines.durable.version + 1, 100)
    lines.send(lines.commits, [frame(more.SerializeToString())])


# ---- too much ----------------------------------------------------------------------------------------------------------------


def _flood_unasked(lines: Lines, reply: pb.WorkerReply) -> None:
    lines.load()
    message = frame(reply.SerializeToString())
    lines.send(lines.operations, [message] * (2_200_000 // len(message)))


def imported_flood(lines: Lines, seed: int) -> None:
    _flood_unasked(lines, pb.WorkerReply(imported=pb.Imported()))


def touched_flood(lines: Lines, seed: int) -> None:
    _flood_unasked(lines, pb.WorkerReply(identity_touched=pb.IdentityTouched()))


def commit_storm(lines: Lines, seed: int) -> None:
    """Thousands of good commits at once."""
    lines.load()
    first = lines.durable.version + 1
    lines.send(lines.commits, [frame(lines.commit(first + number, 200).SerializeToString()) for number in range(4000)])


def _good_commits(lines: Lines, size: int, seconds: float) -> None:
    """One good commit after the other; there is nothing wrong with them, but that what they keep is no state."""
    lines.load()
    end = time.monotonic() + seconds
    version = lines.durable.version
    while time.monotonic() < end:
        version += 1
        lines.send(lines.commits, [frame(lines.commit(version, size).SerializeToString())])
        if not lines.commits.recv(4096):
            return


def steady_commits(lines: Lines, seed: int) -> None:
    _good_commits(lines, random.Random(seed).choice((100, 10_000, validate.MAX_STATE_SIZE)), 2)


def endless_commits(lines: Lines, seed: int) -> None:
    _good_commits(lines, 6000, 3600)


def endless_large_commits(lines: Lines, seed: int) -> None:
    _good_commits(lines, validate.MAX_STATE_SIZE, 3600)


def unread_answers(lines: Lines, seed: int) -> None:
    """Commits whose answers nobody takes."""
    lines.load()
    # The same again and again is a success: it is there to the byte.
    message = frame(lines.commit(lines.durable.version + 1, 100).SerializeToString())
    for _ in range(2000):
        lines.send(lines.commits, [message])
        # Nobody behind the sandbox can see how much has come without taking it: mostly an answer takes less.
        time.sleep(0.02)


def endless_frame(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    sock = rng.choice((lines.operations, lines.commits))
    lines.send(sock, [(validate.MAX_COMMIT_SIZE - 1).to_bytes(4, "big")])
    for _ in range(100):
        lines.send(sock, [bytes(4096)])


# ---- too little --------------------------------------------------------------------------------------------------------------


def mute(lines: Lines, seed: int) -> None:
    lines.load()


def mute_from_the_start(lines: Lines, seed: int) -> None:
    pass


def hang_up(lines: Lines, seed: int) -> None:
    rng = random.Random(seed)
    lines.load()
    for sock in rng.sample([lines.operations, lines.commits, lines.host], rng.randint(1, 3)):
        sock.close()


# Those that live until somebody ends them.
SLOW = frozenset(
    (
        "endless_commits",
        "endless_large_commits",
        "mute",
        "mute_from_the_start",
        "hang_up",
        "endless_frame",
        "short_histogram",
        "any_answers",
    )
)

SCRIPTS: dict[str, Callable[[Lines, int], None]] = {
    script.__name__: script
    for script in (
        noise_on_operations,
        noise_on_commits,
        noise_on_the_host,
        replies_on_operations,
        any_commits,
        any_last_words,
        any_answers,
        short_histogram,
        bogus_load,
        short_commit,
        version_beyond_sqlite,
        another_epoch,
        unknown_kind,
        short_token,
        large_state,
        commit_after_snapshot,
        imported_flood,
        touched_flood,
        commit_storm,
        steady_commits,
        endless_commits,
        endless_large_commits,
        unread_answers,
        endless_frame,
        mute,
        mute_from_the_start,
        hang_up,
    )
}
