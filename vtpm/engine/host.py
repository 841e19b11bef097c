"""The engine host: a small process that outlives the daemon, forks workers and owns them.

It has imported everything once and then only forks. It never parses guest bytes and never sees a data key: those go from the
daemon to the worker over sockets that it only passes on.

It waits for nobody: what a worker does not read ends that worker, and what the daemon does not read waits until it does. What
one of them does wrong costs that one its own; the loop goes on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm import __version__, crashpoints
from vtpm.engine import descriptors, sandbox, worker_uids
from vtpm.engine.children import Child, Nursery
from vtpm.engine.exits import EXIT_HIBERNATED
from vtpm.engine.host_log import HostLog
from vtpm.engine.libtpms import Libtpms
from vtpm.engine.log_pipes import WorkerLogs, printable
from vtpm.engine.moves import Moves
from vtpm.engine.operations import Operations
from vtpm.engine.outbox import Outbox, UnreadError
from vtpm.engine.rehearsal import rehearse
from vtpm.engine.software import ENGINES, LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.engine.worker import ATTACH, CONNECT, HIBERNATE
from vtpm.log import SourceLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Rises when the messages between daemon, engine host and worker change in a way that an older peer can't follow.
PROTOCOL: Final = 5
MAX_MESSAGE_SIZE: Final = 64 << 10
_WORKERS_A_MESSAGE: Final = 500
_SPARES: Final = 2
_MAX_NICE: Final = 19
# What is still heard of a worker that has ended: it may have given its line to somebody.
_LAST_WORDS: Final = 4
_CROWDED_POLL_S: Final = 0.01
_ACCEPT_PAUSE_S: Final = 0.001
# Before the next spare is forked, where that has failed.
_FORK_PAUSE_S: Final = 1.0
# An instance that is parked has its listeners and connections here.
_DESCRIPTORS: Final = 1 << 20


class _Complaints:
    """Lines of the engine host's own in its log."""

    def __init__(self, log: HostLog) -> None:
        self._log = log

    def error(self, text: str, **fields: object) -> None:
        """Write one line."""
        more = "".join(f" {name}={value}" for name, value in fields.items())
        self._log.say(printable(f"engine host: {text}{more}".encode()))

    warning = error


class EngineHost:
    """The loop of the engine host; one daemon at a time is connected to `listener`, a SOCK_SEQPACKET socket."""

    def __init__(self, listener: socket.socket, log: HostLog, *, memory_limit: int) -> None:
        self._listener = listener
        self._tpm = Libtpms()
        self._operations = Operations(self._tpm)
        lacking = worker_uids.why_not()
        if lacking:
            log.say(f"workers run as the same user as the engine host, not each as one of its own: {lacking}")
        self._nursery = Nursery(self._tpm, self._operations, memory_limit=memory_limit, spares=_SPARES, own_users=not lacking)
        self.children: dict[str, Child] = {}
        self._moves = Moves(self)
        # Ends that no daemon has been told of.
        self._untold: list[pb.WorkerExited] = []
        self._daemon: socket.socket | None = None
        self._outbox: Outbox | None = None
        self._spares_from = 0.0
        self._complaints = SourceLog(_Complaints(log))
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._logs = WorkerLogs(log.say, self._watch, self._unwatch)
        self._requests: dict[str, Callable[[pb.HostRequest, list[int], pb.HostReply], list[int]]] = {
            "hello": self._hello,
            "spawn": self._spawn,
            "attach": self._attach,
            "connect": self._connect,
            "kill": self._kill,
            "quit": self._quit,
            "hibernate_all": self._hibernate_all,
            **self._moves.requests,
        }
        self._running = True
        self._watch(listener.fileno(), self._accept)
        self._watch(self._moves.parking.fileno(), self._moves.parking.serve)

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(self) -> None:
        """Serve until a daemon says Quit."""
        with crashpoints.held():
            self._nursery.thaw = rehearse(self._tpm, self._operations)
        # What is here now is shared by all workers: keep the collector from touching, and so copying, those pages.
        gc.collect()
        gc.freeze()
        while self._running or (self._outbox is not None and self._outbox.waiting):
            ready = self._epoll.poll(self._patience_s(), 64)
            self._logs.resume()
            if self._outbox is not None and self._outbox.crowded:
                self._flush()
            if not ready and self._nursery.short and time.monotonic() >= self._spares_from:
                self._add_spare()
            for fd, _event in ready:
                handler = self._handlers.get(fd)
                if handler is not None:
                    self._handle(fd, handler)

    def _patience_s(self) -> float:
        """How long the loop may wait: a missing spare is forked once nobody waits for anything."""
        if self._outbox is not None and self._outbox.crowded:
            return _CROWDED_POLL_S
        if not self._running or not self._nursery.short:
            return self._logs.pause_s
        return max(0.0, self._spares_from - time.monotonic())

    def _add_spare(self) -> None:
        try:
            child = self._nursery.add_spare()
        except OSError as error:
            self._spares_from = time.monotonic() + _FORK_PAUSE_S
            self._complain("spare", f"no worker could be forked ahead: {error}")
            return
        self._look_after(child)

    def _handle(self, fd: int, handler: Callable[[], None]) -> None:
        try:
            handler()
        except Exception as error:  # noqa: BLE001  # it is about one worker or the daemon; the others are served on
            self._complain("handler", f"an event could not be served: {type(error).__name__}: {error}")
            if self._daemon is not None and fd == self._daemon.fileno():
                self._drop_daemon()
            elif fd not in (self._listener.fileno(), self._moves.parking.fileno()):
                # It would be told of again and again.
                self._unwatch(fd)

    def _complain(self, source: str, text: str) -> None:
        """Write a line to the log of this process, if there were not too many about that."""
        self._complaints.error(source, text)

    def _look_after(self, child: Child) -> None:
        self._watch(child.pidfd, functools.partial(self._on_exit, child))
        self._watch(child.link.fileno(), functools.partial(self._on_link, child))
        self._logs.listen(child.log, child.label)

    # ---- the daemon ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._complain("accept", f"a daemon could not connect: {error}")
            # There may be no descriptor left; without a pause it would be tried without end.
            time.sleep(_ACCEPT_PAUSE_S)
            return
        # The lock on the state directory makes a second live daemon impossible: a new connection is the successor.
        if self._daemon is not None:
            self._drop_daemon()
        connection.setblocking(False)
        self._daemon, self._outbox = connection, Outbox(connection)
        self._watch(connection.fileno(), self._on_daemon)

    def _drop_daemon(self) -> None:
        if self._daemon is not None:
            self._unwatch(self._daemon.fileno())
            self._daemon.close()
            self._daemon = None
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
        self._moves.dismiss_all()
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._daemon is None and not self.children and not self._untold and not len(self._moves.parking):
            # Nothing to keep alive and nothing to tell: the next daemon starts a fresh one.
            self._running = False

    def _on_daemon(self) -> None:
        assert self._daemon is not None
        if self._outbox is not None and self._outbox.waiting:
            self._flush()
        if self._daemon is None:
            return
        fds: list[int] = []
        try:
            data, fds = descriptors.receive(self._daemon, MAX_MESSAGE_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            descriptors.close_all(fds)
            self._drop_daemon()
            return
        self._serve(data, fds)

    def _serve(self, data: bytes, fds: list[int]) -> None:
        """Serve a request of the daemon, whose descriptors are closed then."""
        reply = pb.HostReply()
        out: list[int] = []
        try:
            request = pb.HostRequest.FromString(data)
            reply.id = request.id
            out = self._requests[request.WhichOneof("body") or ""](request, fds, reply)
        except Exception as error:  # noqa: BLE001  # whatever is wrong with a request: the answer says so, and all runs on
            if not isinstance(error, (KeyError, OSError, ValueError)):
                self._complain("request", f"a request could not be served: {type(error).__name__}: {error}")
            reply = pb.HostReply(id=reply.id, error=f"{type(error).__name__}: {error}")
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        if reply.id:
            self.send(reply, out)

    @property
    def connected(self) -> bool:
        """Whether there is a daemon."""
        return self._daemon is not None

    def send(self, reply: pb.HostReply, fds: list[int] | None = None) -> None:
        """Tell the daemon, if there is one."""
        if self._outbox is None:
            return
        waited = self._outbox.waiting
        try:
            # Nobody waits for the descriptors of a worker that has ended: they are copies.
            self._outbox.send(reply.SerializeToString(), fds or (), optional=not reply.id)
        except (OSError, UnreadError):
            self._drop_daemon()
            return
        if self._outbox.waiting and not waited:
            self._listen_for_room(wanted=True)

    def _flush(self) -> None:
        assert self._outbox is not None
        try:
            self._outbox.flush()
        except OSError:
            self._drop_daemon()
            return
        self._listen_for_room(wanted=self._outbox.waiting)

    def _listen_for_room(self, *, wanted: bool) -> None:
        """Whether the loop is told when the daemon has room for more."""
        assert self._daemon is not None
        # Where only time helps there is room all the while.
        wanted = wanted and self._outbox is not None and not self._outbox.crowded
        self._epoll.modify(self._daemon.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def _hello(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        reply.hello.protocol, reply.hello.version = PROTOCOL, __version__
        reply.hello.pid, reply.hello.engine_version = os.getpid(), self._tpm.version
        reply.hello.engines.extend(ENGINES)
        reply.hello.exited.extend(self._untold[:_WORKERS_A_MESSAGE])
        self._untold.clear()
        children, parked = list(self.children.values()), list(self._moves.parking.all())
        total = max(len(children), len(parked), 1)
        for start in range(0, total, _WORKERS_A_MESSAGE):
            end = start + _WORKERS_A_MESSAGE
            if start:
                reply.hello.ClearField("exited")
            reply.hello.ClearField("workers")
            reply.hello.ClearField("parked")
            for child in children[start:end]:
                reply.hello.workers.add(instance=child.instance, epoch=child.epoch, pid=child.pid, engine=child.engine)
            reply.hello.parked.extend(parked[start:end])
            reply.hello.more = end < total
            if reply.hello.more:
                self.send(reply)
        return []

    def _spawn(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        order = request.spawn
        engine = order.engine or LIBTPMS
        if engine not in ENGINES:
            raise ValueError("no such engine")
        if order.instance in self.children or order.instance in self._moves.parking:
            raise ValueError("a worker of this instance is running")
        roles = [pb.OPERATIONS, pb.COMMITS, *([pb.DATA_LISTENER, pb.CONTROL_LISTENER] if order.listeners else [])]
        if len(fds) != len(roles):
            raise ValueError("wrong number of descriptors")
        reply.pid = self.employ(order, roles, fds).pid
        return []

    def employ(
        self, order: pb.Spawn, roles: Sequence[pb.Role.ValueType], fds: Sequence[int], zeros: Sequence[int] = ()
    ) -> Child:
        """Give an instance to a worker."""
        child = self.children[order.instance] = self.hire(order, roles, fds, zeros)
        return child

    def hire(self, order: pb.Spawn, roles: Sequence[pb.Role.ValueType], fds: Sequence[int], zeros: Sequence[int] = ()) -> Child:
        """Give descriptors to a worker that waits, or to a new one."""
        while True:
            child, fresh = self._nursery.take(order)
            if fresh:
                self._look_after(child)
            try:
                if order.nice:
                    # Another user's process, without CAP_SYS_NICE: it is no less a worker.
                    with contextlib.suppress(PermissionError):
                        os.setpriority(os.PRIO_PROCESS, child.pid, min(order.nice, _MAX_NICE))
                child.take_over(roles, fds, zeros)
            except OSError:
                # A spare that has died meanwhile, or as good as: its end is told of by its descriptor.
                child.instance = ""
                child.kill()
                if fresh:
                    raise
                continue
            return child

    def _on_link(self, child: Child) -> None:
        if not self._listen(child):
            self._unwatch(child.link.fileno())
        elif child.left is not None:
            # It has hibernated. Whoever waits for that does not wait for its memory to be given back, and from here on it can't
            # run anything, whatever it is (invariant 3).
            child.kill()
            left, child.left = child.left, None
            child.settle()
            self._tell_end(child, EXIT_HIBERNATED, left)
            child.instance = ""

    def _listen(self, child: Child) -> bool:
        """Take one message of a worker; False if there is none, or it must not be heard any more."""
        if child.misbehaved:
            return False
        try:
            return child.listen()
        except ViolationError as violation:
            child.misbehaved = str(violation)
            child.kill()
            self._complain(f"worker {child.pid}", f"worker {child.pid} of {child.instance or 'nobody'} was ended: {violation}")
            return False

    def _on_exit(self, child: Child) -> None:
        self._unwatch(child.pidfd)
        os.close(child.pidfd)
        _, wait_status = os.waitpid(child.pid, 0)
        self._nursery.lost(child)
        self._moves.lost(child)
        for _ in range(_LAST_WORDS):
            if not self._listen(child):
                break
        self._unwatch(child.link.fileno())
        self._logs.end(child.log)
        crashpoints.crash_point("host.after_exit")
        child.link.close()
        status = os.waitstatus_to_exitcode(wait_status)
        parked = child.left if status == EXIT_HIBERNATED else None
        if parked is None and child.left is not None:
            descriptors.close_all(child.left[1])
        if parked is None and child.moving is not None:
            # It died before it went on from the snapshot, so that another can.
            parked = child.moving
            parked[0].woken = True
        if self.children.get(child.instance) is child:
            self._tell_end(child, status, parked)
        # Else it is a spare, which nobody knows of, or its end was told when it hibernated.

    def _tell_end(self, child: Child, status: int, parked: tuple[pb.ParkedInstance, list[int]] | None) -> None:
        """A worker is not its instance's any more; `parked` is what stays of that here."""
        exited = pb.WorkerExited(instance=child.instance, epoch=child.epoch, pid=child.pid, status=status)
        exited.misbehaved = child.misbehaved
        del self.children[child.instance]
        if parked is not None:
            try:
                self._moves.parking.add(*parked)
            except ValueError:
                # Nothing that can be watched: a worker that says so is not to be believed, and is lost.
                descriptors.close_all(parked[1])
                exited.status, parked = -signal.SIGKILL, None
            else:
                exited.parked.CopyFrom(parked[0])
        if self._daemon is not None:
            # With copies of the descriptors, which outlive this process.
            self.send(pb.HostReply(exited=exited), parked[1] if parked else None)
        elif not exited.HasField("parked"):
            self._untold.append(exited)

    # ---- requests about one worker ---------------------------------------------------------------------------------------

    def _attach(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        child = self.children[request.attach.instance]
        if len(fds) != 2:
            raise ValueError("wrong number of descriptors")
        crashpoints.crash_point("host.before_attach")
        child.send(ATTACH, fds)
        crashpoints.crash_point("host.after_attach")
        reply.pid = child.pid
        return []

    def _connect(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        child = self.children[request.connect.instance]
        if len(fds) != 1:
            raise ValueError("wrong number of descriptors")
        child.send(CONNECT, fds)
        return []

    def _hibernate_all(self, _request: pb.HostRequest, _fds: list[int], _reply: pb.HostReply) -> list[int]:
        for child in self.children.values():
            with contextlib.suppress(OSError):
                child.send(HIBERNATE)
        return []

    def _kill(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        order = request.kill
        child = self.children.get(order.instance) if order.instance else self._moves.stocked(order.pid)
        if child is not None:
            child.kill()
        return []

    def _quit(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        if self.children:
            raise ValueError("workers are running")
        self.end()
        return []

    def end(self) -> None:
        """End after what is being served."""
        self._running = False


def main(arguments: list[str]) -> int:
    """Run an engine host on the listening socket given by number: `LISTENER_FD SOCKET_PATH MEMORY_LIMIT LOG_PATH`."""
    listener_fd, path, memory_limit, log_path = int(arguments[0]), Path(arguments[1]), int(arguments[2]), Path(arguments[3])
    sandbox.forbid_dumps()
    sandbox.name_process("vtpm-engine")
    sandbox.raise_descriptor_limit(_DESCRIPTORS)
    # Signals to the daemon's process group are not meant for the VMs' TPMs.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, listener_fd)
    try:
        EngineHost(listener, HostLog(log_path), memory_limit=memory_limit).run()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
