"""The commit thread: takes sealed states from all workers, makes them durable together, and answers.

Why a thread: a commit blocks in the kernel until the disk has it, and a guest waits for exactly that. The thread polls the
workers' commit sockets itself, so that a commit crosses neither the event loop nor a queue; all that arrived while the last
sync ran goes into the next one (group commit).

A worker has one commit at a time, so that none can crowd others out of a turn. What a worker must not send costs it its socket
and is told to its owner, who ends it. The thread itself ends with the daemon only, or the daemon with it.
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

from vtpm.engine import validate
from vtpm.engine.durable import SNAPSHOT_NOT_TAKEN
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.interface import CommitFunction
from vtpm.engine.scheduling import take_short_turns
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.errors import EngineError, StoreError
from vtpm.fatal import end_process
from vtpm.log import SourceLog
from vtpm.store.commits import AnyCommit
from vtpm.store.model import StateCommit
from vtpm.store.snapshots import SnapshotCommit, SnapshotUse

log: Final = structlog.get_logger("vtpm.engine")
_lines: Final = SourceLog(log)

_RETRY_S: Final = 0.2
_MAX_EVENTS: Final = 256
_READ_SIZE: Final = 256 << 10
_REPORT_EVERY_S: Final = 10.0
# When the last sync was shared by so many, the next one waits a moment for those who are about to come: a fraction of what a
# sync takes, and with a crowd at work each sync that is saved is time for their TPMs. A worker that writes alone never waits.
_CROWD: Final = 4
_GATHER_S: Final = 100e-6


@dataclass(slots=True)
class Channel:
    """A worker's commit socket; whose it is says the daemon, never the worker."""

    instance: uuid.UUID
    # 0 for a worker that has no instance yet, and nothing to commit.
    epoch: int
    sock: socket.socket
    # Told from the commit thread of what no worker sends.
    on_violation: Callable[[ViolationError], object] = lambda _violation: None
    reader: FrameReader = field(default_factory=FrameReader)
    # A commit of it was taken and is not answered yet.
    waiting: bool = False
    # What it was told is the end of it: somebody else owns its instance, or all that it is, is in the store.
    over: bool = False


@dataclass(frozen=True, slots=True)
class CommitReport:
    """One turn of the commit thread: how many states, how many refused, seconds until it was durable."""

    batch_size: int
    refused: int
    seconds: float


class Committer:
    """Owns the commit thread. `on_report` is called from it after each turn; `trouble` is the StoreError that lasts.

    `on_broken` is called if the thread can't go on: nobody would get an answer any more.
    """

    def __init__(
        self,
        commit: CommitFunction,
        on_report: Callable[[CommitReport], None] = lambda _report: None,
        *,
        on_broken: Callable[[BaseException], object] = lambda error: end_process("the commit thread", error),
    ) -> None:
        self._commit = commit
        self._on_report = on_report
        self._on_broken = on_broken
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

    def add(
        self,
        instance: uuid.UUID,
        epoch: int,
        sock: socket.socket,
        on_violation: Callable[[ViolationError], object] = lambda _violation: None,
    ) -> Channel:
        """Serve a worker's commit socket until it closes; takes ownership of `sock`.

        `on_violation` is called from the commit thread when the worker has sent what none sends; the socket is closed then.
        """
        sock.setblocking(False)
        channel = Channel(instance, epoch, sock, on_violation)
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
        try:
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
        except BaseException as error:  # noqa: BLE001  # what one worker does can't get here: this thread is broken
            self._on_broken(error)

    def _take(self, timeout: float | None) -> list[tuple[Channel, pb.Commit]]:
        arrived: list[tuple[Channel, pb.Commit]] = []
        for fd, _event in self._epoll.poll(timeout, _MAX_EVENTS):
            if fd == self._wake_fd:
                arrived += self._take_added()
            elif (channel := self._channels.get(fd)) is not None and (message := self._receive(channel)) is not None:
                arrived.append((channel, message))
        return arrived

    def _take_added(self) -> list[tuple[Channel, pb.Commit]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        with self._lock:
            added, self._added = self._added, []
            asked, self._asked = self._asked, []
        for channel in added:
            try:
                self._epoll.register(channel.sock.fileno(), select.EPOLLIN)
            except (OSError, ValueError):
                # Closed before it came here; or there is no room for more, and its worker waits for the next daemon.
                _lines.warning(str(channel.instance), "commit.channel_failed", instance=str(channel.instance))
                channel.sock.close()
            else:
                self._channels[channel.sock.fileno()] = channel
        return asked

    def _receive(self, channel: Channel) -> pb.Commit | None:
        try:
            data = channel.sock.recv(_READ_SIZE)
            if data:
                return self._read(channel, data)
        except BlockingIOError:
            return None
        except OSError:
            # Its end says the engine host.
            pass
        except ViolationError as violation:
            self._accuse(channel, violation)
            return None
        self._drop(channel)
        return None

    def _accuse(self, channel: Channel, violation: ViolationError) -> None:
        """Let go of a worker that has sent what none sends; its owner ends it."""
        self._drop(channel)
        channel.reader = FrameReader()
        # The event loop may be closed already: then nobody is there to be told.
        with contextlib.suppress(RuntimeError):
            channel.on_violation(violation)

    def _read(self, channel: Channel, data: bytes) -> pb.Commit | None:
        """Return the commit that is whole now."""
        if channel.waiting:
            raise ViolationError("COMMIT_OUTSTANDING", "a commit before the answer to the last one")
        if channel.over:
            raise ViolationError("COMMIT_OVER", "a commit after a refusal or a snapshot, which are the end of a worker")
        try:
            messages = channel.reader.feed(data, limit=validate.MAX_COMMIT_SIZE, most=1)
        except EngineError as error:
            code = "COMMIT_OUTSTANDING" if error.reason == "FRAMES_TOO_MANY" else "COMMIT_SIZE"
            raise ViolationError(code, error.message) from None
        if not messages:
            return None
        if channel.reader.partial:
            raise ViolationError("COMMIT_OUTSTANDING", "a commit before the answer to the last one")
        message = validate.commit(messages[0], channel.epoch)
        channel.waiting = True
        return message

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
        try:
            self._on_report(CommitReport(len(refusals), sum(map(bool, refusals)), seconds))
        except Exception as error:  # noqa: BLE001  # a metric; the commits are made and answered
            _lines.error("report", "commit.report_failed", error=type(error).__name__)

    def _answer(self, arrived: list[tuple[Channel, pb.Commit]], refusals: Sequence[str]) -> None:
        for (channel, message), refused in zip(arrived, refusals, strict=True):
            channel.over = refused != SNAPSHOT_NOT_TAKEN if refused else message.kind == pb.Commit.SNAPSHOT
            if refused:
                _lines.error(
                    str(channel.instance),
                    "commit.refused",
                    instance=str(channel.instance),
                    epoch=message.epoch,
                    version=message.version,
                    reason=refused,
                )
            # Before the answer: the next one may come at once.
            channel.waiting = False
            try:
                ack = pb.CommitAck(version=message.version, refused=refused, batch_size=len(arrived))
                channel.sock.send(frame(ack.SerializeToString()))
            except BlockingIOError:
                self._accuse(channel, ViolationError("COMMIT_UNREAD", "answers to commits that nobody reads"))
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
