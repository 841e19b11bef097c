"""The engine host: a small process that outlives the daemon, forks workers and owns them.

It has imported everything once and then only forks. It never parses guest bytes and never sees a data key: those go from the
daemon to the worker over sockets that it only passes on.
"""

from __future__ import annotations

import array
import contextlib
import gc
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vtpm import __version__
from vtpm.engine import sandbox
from vtpm.engine.libtpms import Libtpms
from vtpm.engine.operations import Operations
from vtpm.engine.rehearsal import rehearse
from vtpm.engine.software import ENGINES, LIBTPMS, TPM_SERVER
from vtpm.engine.tpm_server import in_new_worker
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker import ATTACH, CONNECT, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtpm.engine.software import SoftwareTpm

# Rises when the messages between daemon, engine host and worker change in a way that an older peer can't follow.
PROTOCOL: Final = 2
MAX_MESSAGE_SIZE: Final = 64 << 10
_WORKERS_A_MESSAGE: Final = 500
_MAX_DESCRIPTORS: Final = 4
_MAX_NICE: Final = 19


@dataclass(slots=True)
class _Child:
    """A running worker as the engine host knows it."""

    instance: str
    epoch: int
    engine: str
    pid: int
    pidfd: int
    link: socket.socket


class EngineHost:
    """The loop of the engine host; one daemon at a time is connected to `listener`, a SOCK_SEQPACKET socket."""

    def __init__(self, listener: socket.socket, *, memory_limit: int) -> None:
        self._listener = listener
        self._memory_limit = memory_limit
        self._tpm = Libtpms()
        self._operations = Operations(self._tpm)
        self._filter = sandbox.make_filter()
        self._children: dict[str, _Child] = {}
        # Ends that no daemon has been told of.
        self._untold: list[pb.WorkerExited] = []
        self._daemon: socket.socket | None = None
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._requests: dict[str, Callable[[pb.HostRequest, list[int], pb.HostReply], list[int]]] = {
            "hello": self._hello,
            "spawn": self._spawn,
            "attach": self._attach,
            "connect": self._connect,
            "kill": self._kill,
            "quit": self._quit,
        }
        self._running = True
        self._watch(listener.fileno(), self._accept)

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(self) -> None:
        """Serve until a daemon says Quit."""
        rehearse(self._tpm, self._operations)
        # What is here now is shared by all workers: keep the collector from touching, and so copying, those pages.
        gc.collect()
        gc.freeze()
        while self._running:
            for fd, _event in self._epoll.poll(-1, 64):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()

    # ---- the daemon ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        # The lock on the state directory makes a second live daemon impossible: a new connection is the successor.
        if self._daemon is not None:
            self._drop_daemon()
        connection.settimeout(5)
        self._daemon = connection
        self._watch(connection.fileno(), self._on_daemon)

    def _drop_daemon(self) -> None:
        if self._daemon is not None:
            self._unwatch(self._daemon.fileno())
            self._daemon.close()
            self._daemon = None
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._daemon is None and not self._children and not self._untold:
            # Nothing to keep alive and nothing to tell: the next daemon starts a fresh one.
            self._running = False

    def _on_daemon(self) -> None:
        assert self._daemon is not None
        fds = array.array("i")
        try:
            data, ancillary, _flags, _address = self._daemon.recvmsg(
                MAX_MESSAGE_SIZE, socket.CMSG_LEN(_MAX_DESCRIPTORS * fds.itemsize)
            )
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._drop_daemon()
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        request = pb.HostRequest.FromString(data)
        reply = pb.HostReply(id=request.id)
        out: list[int] = []
        try:
            out = self._requests[request.WhichOneof("body") or ""](request, list(fds), reply)
        except (KeyError, OSError, ValueError) as error:
            reply = pb.HostReply(id=request.id, error=f"{type(error).__name__}: {error}")
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._send(reply, out)

    def _send(self, reply: pb.HostReply, fds: list[int] | None = None) -> None:
        if self._daemon is None:
            return
        try:
            if fds:
                socket.send_fds(self._daemon, [reply.SerializeToString()], fds)
            else:
                self._daemon.sendall(reply.SerializeToString())
        except OSError:
            self._drop_daemon()

    def _hello(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        reply.hello.protocol, reply.hello.version = PROTOCOL, __version__
        reply.hello.pid, reply.hello.engine_version = os.getpid(), self._tpm.version
        reply.hello.engines.extend(ENGINES)
        reply.hello.exited.extend(self._untold[:_WORKERS_A_MESSAGE])
        self._untold.clear()
        children = list(self._children.values())
        for start in range(0, max(len(children), 1), _WORKERS_A_MESSAGE):
            part = children[start : start + _WORKERS_A_MESSAGE]
            if start:
                reply.hello.ClearField("exited")
            reply.hello.ClearField("workers")
            for child in part:
                reply.hello.workers.add(instance=child.instance, epoch=child.epoch, pid=child.pid, engine=child.engine)
            reply.hello.more = start + _WORKERS_A_MESSAGE < len(children)
            if reply.hello.more:
                self._send(reply)
        return []

    def _spawn(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        order = request.spawn
        engine = order.engine or LIBTPMS
        if engine not in ENGINES:
            raise ValueError("no such engine")
        if order.instance in self._children:
            raise ValueError("a worker of this instance is running")
        if len(fds) != (4 if order.listeners else 2):
            raise ValueError("wrong number of descriptors")
        link, worker_end = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.nice(min(order.nice, _MAX_NICE))
            self._become_worker(parent, [worker_end.fileno(), *fds], order if engine == TPM_SERVER else None)
        worker_end.close()
        child = _Child(order.instance, order.epoch, engine, pid, os.pidfd_open(pid), link)
        self._children[order.instance] = child
        self._watch(child.pidfd, lambda: self._on_exit(child))
        reply.pid = pid
        return []

    def _become_worker(self, parent: int, fds: list[int], program: pb.Spawn | None) -> None:
        """Never returns. `program` is the order of a worker whose TPM is a program."""
        status = 1
        try:
            sandbox.die_with_parent(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            host, operations, commits, *listeners = (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in sandbox.keep_descriptors(fds)
            )
            tpm, operations_of_tpm = self._make_tpm(parent, program) if program else (self._tpm, self._operations)
            worker = Worker(
                tpm,
                operations_of_tpm,
                host=host,
                operations_socket=operations,
                commits=commits,
                listeners=listeners,
            )
            if program is None:
                sandbox.enter(self._filter, memory_limit=self._memory_limit)
            worker.run()
        except BaseException as error:  # noqa: BLE001  # a forked child must never return into the host's loop
            sys.stderr.write(f"worker start: {type(error).__name__}: {error}\n")
        finally:
            os._exit(status)

    def _make_tpm(self, parent: int, order: pb.Spawn) -> tuple[SoftwareTpm, Operations]:
        sandbox.restrict(memory_limit=self._memory_limit)
        tpm = in_new_worker(order.program, order.hidden)
        # Again: a change of credentials, as on entering a user namespace, may clear it.
        sandbox.die_with_parent(parent)
        return tpm, Operations(tpm)

    def _on_exit(self, child: _Child) -> None:
        self._unwatch(child.pidfd)
        os.close(child.pidfd)
        _, wait_status = os.waitpid(child.pid, 0)
        child.link.close()
        if self._children.get(child.instance) is child:
            del self._children[child.instance]
        exited = pb.WorkerExited(
            instance=child.instance, epoch=child.epoch, pid=child.pid, status=os.waitstatus_to_exitcode(wait_status)
        )
        if self._daemon is None:
            self._untold.append(exited)
        else:
            self._send(pb.HostReply(exited=exited))

    def _attach(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        child = self._children[request.attach.instance]
        if len(fds) != 2:
            raise ValueError("wrong number of descriptors")
        socket.send_fds(child.link, [ATTACH], fds)
        reply.pid = child.pid
        return []

    def _connect(self, request: pb.HostRequest, fds: list[int], reply: pb.HostReply) -> list[int]:
        child = self._children[request.connect.instance]
        if len(fds) != 1:
            raise ValueError("wrong number of descriptors")
        socket.send_fds(child.link, [CONNECT], fds)
        return []

    def _kill(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        child = self._children.get(request.kill.instance)
        if child is not None:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        return []

    def _quit(self, request: pb.HostRequest, _fds: list[int], reply: pb.HostReply) -> list[int]:
        if self._children:
            raise ValueError("workers are running")
        self._running = False
        return []


def main(arguments: list[str]) -> int:
    """Run an engine host on the listening socket given by number: `LISTENER_FD SOCKET_PATH MEMORY_LIMIT`."""
    listener_fd, path, memory_limit = int(arguments[0]), Path(arguments[1]), int(arguments[2])
    sandbox.forbid_dumps()
    # Signals to the daemon's process group are not meant for the VMs' TPMs.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, listener_fd)
    try:
        EngineHost(listener, memory_limit=memory_limit).run()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
