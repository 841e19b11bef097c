"""The worker processes of an engine host: forked ahead, each waits for the instance that it will run.

A fork and the way behind the wall take a few milliseconds. A spare has both behind it, so that an instance which thaws, or is
powered on, does not wait for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtpm import crashpoints
from vtpm.engine import descriptors, sandbox, validate_host
from vtpm.engine.exits import EXIT_STOPPED, last_words
from vtpm.engine.log_pipes import make_pipe, speak_into
from vtpm.engine.scheduling import stand_alone, take_short_turns
from vtpm.engine.software import LIBTPMS, TPM_SERVER
from vtpm.engine.tpm_server import in_new_worker
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.engine.worker import GOING_ON, MAX_ORDER_SIZE, TAKE_OVER, Worker, vm_sockets
from vtpm.engine.worker_uids import become_own, own_uid

if TYPE_CHECKING:
    from vtpm.engine.operations import Operations
    from vtpm.engine.rehearsal import ThawRehearsal
    from vtpm.engine.software import SoftwareTpm


@dataclass(slots=True)
class Child:
    """A worker process as the engine host knows it; `instance` is empty for a spare."""

    instance: str
    epoch: int
    engine: str
    pid: int
    pidfd: int
    link: socket.socket
    # What it was given of a parked instance and has not gone on from yet; kept, as it may die before.
    moving: tuple[pb.ParkedInstance, list[int]] | None = None
    # What it left with its last words.
    left: tuple[pb.ParkedInstance, list[int]] | None = None
    # What it did that no worker does; it is ended then.
    misbehaved: str = ""
    # The pipe in which it talks.
    log: int = -1

    def label(self) -> str:
        """What its lines in the log begin with; empty for a spare."""
        return f"worker {self.instance} (pid {self.pid})" if self.instance else ""

    def take_over(self, roles: Sequence[pb.Role.ValueType], fds: Sequence[int], zeros: Sequence[int] = ()) -> None:
        """Give it the instance that it was made for, with a descriptor for each role.

        Raises:
            OSError: it is gone, or does not read.
        """
        order = pb.TakeOver(instance=self.instance, epoch=self.epoch, roles=roles, zeros=zeros)
        descriptors.send_at_once(self.link, [TAKE_OVER, order.SerializeToString()], fds)

    def listen(self) -> bool:
        """Take one message of it; False if there is none.

        Raises:
            ViolationError: no worker says that.
        """
        try:
            message, fds = self._receive()
        except OSError:
            return False
        if not message:
            descriptors.close_all(fds)
            return False
        try:
            self._take(message, fds)
        except ViolationError:
            descriptors.close_all(fds)
            raise
        return True

    def _take(self, message: bytes, fds: list[int]) -> None:
        if message == GOING_ON:
            if self.moving is None or fds:
                raise ViolationError("GOING_ON", "it goes on from a snapshot that it was not given")
            self.settle()
            return
        if len(message) > MAX_ORDER_SIZE:
            raise ViolationError("PARK_SIZE", f"a message of more than {MAX_ORDER_SIZE} bytes")
        park = validate_host.park(message, fds)
        if not self.instance or self.left is not None:
            raise ViolationError("PARK_UNOWNED", "it leaves an instance that it has not got")
        about = pb.ParkedInstance(
            instance=self.instance,
            epoch=self.epoch,
            engine=self.engine,
            roles=park.roles,
            zeros=park.zeros,
            snapshot_version=park.snapshot_version,
        )
        self.left = about, fds

    def _receive(self) -> tuple[bytes, list[int]]:
        # One byte more than there may be, so that a message that is too long is seen to be.
        size = MAX_ORDER_SIZE + 1
        try:
            return descriptors.receive(self.link, size, flags=socket.MSG_DONTWAIT)
        except ConnectionResetError:
            # It has died with something unread, which is told before what it had to say.
            return descriptors.receive(self.link, size, flags=socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Tell it something. One that does not read what it is told is ended: nobody waits for it.

        Raises:
            OSError: it is gone, or is ended now.
        """
        try:
            descriptors.send_at_once(self.link, [message], fds)
        except BlockingIOError:
            self.misbehaved = self.misbehaved or "LINK_UNREAD: messages of the engine host that it does not read"
            self.kill()
            raise

    def settle(self) -> None:
        """The worker has what it was given."""
        if self.moving is not None:
            descriptors.close_all(self.moving[1])
            self.moving = None


class Nursery:
    """Forks workers around this process's TPM.

    `spares` says how many wait ahead, `own_users` that each becomes a user of its own.
    """

    def __init__(
        self, tpm: SoftwareTpm, operations: Operations, *, memory_limit: int, spares: int, own_users: bool = False
    ) -> None:
        self._tpm = tpm
        self._operations = operations
        self._memory_limit = memory_limit
        self._own_users = own_users
        self._filter = sandbox.make_filter()
        self._wanted = spares
        self._spares: list[Child] = []
        # What each worker rehearses before it waits for its instance.
        self.thaw: ThawRehearsal | None = None

    @property
    def short(self) -> bool:
        """Whether a spare is missing."""
        return len(self._spares) < self._wanted

    def add_spare(self) -> Child:
        """Fork one worker ahead."""
        child = self._fork(pb.Spawn(engine=LIBTPMS))
        self._spares.append(child)
        return child

    def take(self, order: pb.Spawn) -> tuple[Child, bool]:
        """Return a worker for `order`, and whether it was forked just now."""
        engine = order.engine or LIBTPMS
        fresh = engine != LIBTPMS or not self._spares
        child = self._fork(order) if fresh else self._spares.pop(0)
        child.instance, child.epoch = order.instance, order.epoch
        return child, fresh

    def lost(self, child: Child) -> None:
        """A worker has ended; it may have been a spare."""
        if child in self._spares:
            self._spares.remove(child)

    def _fork(self, order: pb.Spawn) -> Child:
        engine = order.engine or LIBTPMS
        # A message is a message here: several may come before they are read.
        link, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, log_end = make_pipe()
        parent = os.getpid()
        crashpoints.crash_point("host.before_fork")
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(parent, worker_end.fileno(), log_end, order if engine == TPM_SERVER else None)
        except OSError:
            os.close(log)
            raise
        finally:
            os.close(log_end)
        worker_end.close()
        crashpoints.crash_point("host.after_fork")
        return Child("", 0, engine, pid, os.pidfd_open(pid), link, log=log)

    def _become_worker(self, parent: int, link_fd: int, log_end: int, program: pb.Spawn | None) -> None:
        """Never returns. `program` is the order of a worker whose TPM is a program."""
        status = 1
        try:
            speak_into(log_end)
            if self._own_users and program is None:
                become_own()
            sandbox.die_with_parent(parent)
            sandbox.name_process("vtpm-spare")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            stand_alone()
            take_short_turns()
            (kept,) = sandbox.keep_descriptors([link_fd])
            host = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, kept)
            tpm, operations = self._make_tpm(parent, program) if program else (self._tpm, self._operations)
            if program is None:
                if self.thaw is not None:
                    with crashpoints.held():
                        self.thaw.run(tpm, operations)
                sandbox.enter(self._filter, memory_limit=self._memory_limit)
            message, fds = descriptors.receive(host, MAX_ORDER_SIZE)
            if not message:
                os._exit(EXIT_STOPPED)
            order = pb.TakeOver.FromString(message[len(TAKE_OVER) :])
            if order.instance:
                sandbox.name_process("vtpm-worker")
            (_, operations_socket, _), (_, commits, _), *sockets = vm_sockets(order, fds)
            worker = Worker(tpm, operations, host=host, operations_socket=operations_socket, commits=commits, sockets=sockets)
            worker.run()
        except BaseException as error:  # noqa: BLE001  # a forked child must never return into the host's loop
            last_words(f"worker start: {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def _make_tpm(self, parent: int, order: pb.Spawn) -> tuple[SoftwareTpm, Operations]:
        from vtpm.engine.operations import Operations

        sandbox.restrict(memory_limit=self._memory_limit)
        tpm = in_new_worker(order.program, order.hidden, owner=own_uid() if self._own_users else None)
        if self._own_users:
            become_own()
        sandbox.drop_capabilities()
        # Again: a change of credentials, as on entering a user namespace, may clear it.
        sandbox.die_with_parent(parent)
        return tpm, Operations(tpm)
