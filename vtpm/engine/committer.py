"""The commit thread: takes sealed states from all workers, makes them durable together, and answers.

Why a thread: a commit blocks in the kernel until the disk has it, and a guest waits for exactly that. The thread polls the
workers' commit sockets itself, so that a commit crosses neither the event loop nor a queue; all that arrived while the last
sync ran goes into the next one (group commit).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from vtpm.engine.durable import SNAPSHOT_NOT_TAKEN
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.interface import CommitFunction
from vtpm.engine.scheduling import take_short_turns
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import StoreError, VtpmError
from vtpm.store.commits import AnyCommit
from vtpm.store.model import StateCommit
from vtpm.store.snapshots import SnapshotCommit, SnapshotUse

log: Final = structlog.get_logger("vtpm.engine")

_RETRY_S: Final = 0.2
_MAX_EVENTS: Final = 256
_REPORT_EVERY_S: Final = 10.0
# When the last sync was shared by so many, the next one waits a moment for those who are about to come: a fraction of what a
# sync takes, and with a crowd at work each sync that is saved is time for their TPMs. A worker that writes alone never waits.
_CROWD: Final = 4
_GATHER_S: Final = 100e-6


@dataclass(slots=True)
class Channel:
    """A worker's commit socket; whose it is says the daemon, never the worker."""

    instance: uuid.UUID
    epoch: int
    sock: socket.socket
    reader: FrameReader = field(default_factory=FrameReader)


@dataclass(frozen=True, slots=True)
class CommitReport:
    """One turn of the commit thread: how many states, how many refused, seconds until it was durable."""

    batch_size: int
    refused: int
    seconds: float


class Committer:
    """Owns the commit thread. `on_report` is called from it after each turn; `trouble` is the StoreError that lasts."""

    def __init__(
        self,
        commit: CommitFunction,
        on_report: Callable[[CommitReport], None] = lambda _report: None,
    ) -> None:
        self._commit = commit
        self._on_report = on_report
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._channels: dict[int, Channel] = {}
        self._added: list[Channel] = []
        # What the daemon itself wants to be durable, and for whom.
        self._asked: list[tuple[Channel, pb.Commit]] = []
        self._lock = threading.Lock()
        self._closing = False
        self.trouble: StoreError | None = None
        self._reported = float("-inf")
        self._thread = threading.Thread(target=self._run, name="vtpm-commit", daemon=True)
        self._thread.start()

    def add(self, instance: uuid.UUID, epoch: int, sock: socket.socket) -> Channel:
        """Serve a worker's commit socket until it closes; takes ownership of `sock`."""
        sock.setblocking(False)
        channel = Channel(instance, epoch, sock)
        with self._lock:
            self._added.append(channel)
        os.eventfd_write(self._wake_fd, 1)
        return channel

    def commit_for(self, channel: Channel, commit: pb.Commit) -> None:
        """Make something durable for a worker, which gets the answer as if it had asked."""
        with self._lock:
            self._asked.append((channel, commit))
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Stop after the turn that runs. Commits not taken stay with their workers, which bring them to the next daemon."""
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        for channel in [*self._channels.values(), *self._added]:
            channel.sock.close()
        self._epoll.close()
        os.close(self._wake_fd)

    def _run(self) -> None:
        take_short_turns()
        together = 1
        while not self._closing:
            arrived = self._take(None)
            if together >= _CROWD:
                time.sleep(_GATHER_S)
                arrived += self._take(0)
            if arrived:
                together = len(arrived)
                self._serve(arrived)

    def _take(self, timeout: float | None) -> list[tuple[Channel, pb.Commit]]:
        arrived: list[tuple[Channel, pb.Commit]] = []
        for fd, _event in self._epoll.poll(timeout, _MAX_EVENTS):
            if fd == self._wake_fd:
                arrived += self._take_added()
            else:
                arrived += self._receive(self._channels[fd])
        return arrived

    def _take_added(self) -> list[tuple[Channel, pb.Commit]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        with self._lock:
            added, self._added = self._added, []
            asked, self._asked = self._asked, []
        for channel in added:
            self._channels[channel.sock.fileno()] = channel
            self._epoll.register(channel.sock.fileno(), select.EPOLLIN)
        return asked

    def _receive(self, channel: Channel) -> list[tuple[Channel, pb.Commit]]:
        try:
            data = channel.sock.recv(1 << 18)
            if data:
                return [(channel, pb.Commit.FromString(message)) for message in channel.reader.feed(data)]
        except BlockingIOError:
            return []
        except (OSError, VtpmError, ValueError) as error:
            log.warning("commit.channel_failed", instance=str(channel.instance), error=type(error).__name__)
        self._drop(channel)
        return []

    def _drop(self, channel: Channel) -> None:
        if self._channels.pop(channel.sock.fileno(), None) is not None:
            self._epoll.unregister(channel.sock.fileno())
        channel.sock.close()

    def _serve(self, arrived: list[tuple[Channel, pb.Commit]]) -> None:
        commits = [_to_commit(channel.instance, message) for channel, message in arrived]
        start = time.monotonic()
        try:
            refusals: Sequence[str] = self._commit(commits)
            self.trouble = None
        except StoreError as error:
            self._note_trouble(error, len(commits))
            # Whoever hibernates can go on without; for the others there is no other way than to wait.
            optional = [pair for pair in arrived if pair[1].kind == pb.Commit.SNAPSHOT]
            self._answer(optional, [SNAPSHOT_NOT_TAKEN] * len(optional))
            arrived = [pair for pair in arrived if pair[1].kind != pb.Commit.SNAPSHOT]
            waiting = self._durably([_to_commit(channel.instance, message) for channel, message in arrived])
            if waiting is None:
                return
            refusals = waiting
        seconds = time.monotonic() - start
        self._answer(arrived, refusals)
        # After the answers: nobody waits for a metric.
        self._on_report(CommitReport(len(refusals), sum(map(bool, refusals)), seconds))

    def _answer(self, arrived: list[tuple[Channel, pb.Commit]], refusals: Sequence[str]) -> None:
        for (channel, message), refused in zip(arrived, refusals, strict=True):
            if refused:
                log.error(
                    "commit.refused",
                    instance=str(channel.instance),
                    epoch=message.epoch,
                    version=message.version,
                    reason=refused,
                )
            try:
                ack = pb.CommitAck(version=message.version, refused=refused, batch_size=len(arrived))
                channel.sock.send(frame(ack.SerializeToString()))
            except OSError:
                # The worker died meanwhile; its state is durable, its answer was never given.
                self._drop(channel)

    def _durably(self, commits: list[AnyCommit]) -> Sequence[str] | None:
        """Commit; while the store is in trouble keep trying: the workers wait, up to their own time limit."""
        while commits and not self._closing:
            time.sleep(_RETRY_S)
            try:
                refusals = self._commit(commits)
            except StoreError as error:
                self._note_trouble(error, len(commits))
                continue
            self.trouble = None
            return refusals
        return None

    def _note_trouble(self, error: StoreError, waiting: int) -> None:
        self.trouble = error
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY_S:
            self._reported = now
            log.error("commit.store_failed", reason=error.reason, remedy=error.remedy, waiting=waiting)


def _to_commit(instance: uuid.UUID, message: pb.Commit) -> AnyCommit:
    """The instance is the socket's, never the message's: a worker can write its own state only."""
    match message.kind:
        case pb.Commit.SNAPSHOT:
            return SnapshotCommit(instance, message.epoch, message.version, message.sealed, message.attached)
        case pb.Commit.CONSUME:
            return SnapshotUse(instance, message.epoch, message.version, message.token)
        case _:
            return StateCommit(instance, message.epoch, message.version, message.sealed)
