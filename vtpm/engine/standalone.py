"""A worker without a daemon: the process that forks it keeps its state, for programs that take swtpm's place.

This process is to the worker what daemon and engine host are together. State goes between them sealed, with a key that both
forget, so that the worker is the same as everywhere else.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vtpm.engine import worker_uids
from vtpm.engine.exits import EXIT_POWERED_OFF, EXIT_STOPPED, last_words
from vtpm.engine.framing import frame, receive_frame
from vtpm.engine.libtpms import Libtpms
from vtpm.engine.log_pipes import WorkerOutput, make_pipe, speak_into
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker import CONNECT, Worker
from vtpm.errors import EngineError, VtpmError
from vtpm.seal.envelope import Place, StateKind, seal, unseal

if TYPE_CHECKING:
    from vtpm.engine.sandbox import Filter

_EPOCH: Final = 1
_COMMIT_TIMEOUT_MS: Final = 60_000
_MEMORY_LIMIT: Final = 256 << 20
# Between two looks at a worker that says too much; and the longest that its last words are waited for.
_PAUSE_S: Final = 1.0
_ENDED_WELL: Final = (EXIT_STOPPED, EXIT_POWERED_OFF)


class _NoOperations:
    """A worker here makes no keys and no quotes, so that the TSS need not be loaded."""

    def forget(self) -> None:
        """See Operations."""

    def started(self) -> bool:
        """See Operations. So an H-CRTM event is not recorded: there is nobody to ask for the log."""
        return True


class StandaloneTpm:
    """One worker and its state. `keep` makes a state durable; what it raises ends the run.

    Without the system call filter if `filtered` is false, for whoever debugs. The worker's last words go to `errors_fd`, which
    it does not have itself (vtpm.engine.log_pipes). Power is taken from the TPM as it is if `auto_shutdown` is false.
    """

    def __init__(
        self, keep: Callable[[bytes], None], *, filtered: bool = True, errors_fd: int = 2, auto_shutdown: bool = True
    ) -> None:
        self._keep = keep
        self._auto_shutdown = auto_shutdown
        self._errors_fd = errors_fd
        self._tpm = Libtpms()
        self._filter: Filter | None = None
        if filtered:
            from vtpm.engine import sandbox

            self._filter = sandbox.make_filter()
        self._own_user = not worker_uids.why_not()
        self._data_key = os.urandom(32)
        self._instance = uuid.uuid4()
        self._requests = 0
        self.pid = 0
        # Readable once the worker has ended.
        self.pidfd = -1
        self.failure = ""

    @property
    def version(self) -> str:
        """libtpms' version."""
        return self._tpm.version

    def manufacture(self) -> bytes:
        """Return the state of a fresh TPM without keys, as swtpm makes one; a process of its own makes it."""
        receiver, sender = socket.socketpair()
        with receiver, sender:
            pid, output = self._fork([sender.fileno()], self._prepare_manufacture)
            sender.close()
            try:
                state = receive_frame(receiver)
            except EOFError:
                state = b""
        _, status = os.waitpid(pid, 0)
        output.end()
        if status or not state:
            raise EngineError("MANUFACTURE_INCOMPLETE", "libtpms made no TPM")
        return state

    def start(self, state: bytes) -> None:
        """Fork the worker and give it its state; the TPM is not initialised yet (`connect`, INIT)."""
        ends = [socket.socketpair() for _ in range(3)]
        self._host, self._ops, self._commits = (ours for ours, _ in ends)
        self.pid, output = self._fork([theirs.fileno() for _, theirs in ends], self._prepare_work)
        self.pidfd = os.pidfd_open(self.pid)
        for _, theirs in ends:
            theirs.close()
        # A thread, as a commit waits for the disk while the loop may wait for the very answer that this commit holds up.
        threading.Thread(target=self._serve_commits, name="vtpm-commit", daemon=True).start()
        # Another, as whoever reads the log may let it wait.
        self._listener = threading.Thread(target=self._listen, args=(output,), name="vtpm-log", daemon=True)
        self._listener.start()
        place = Place(self._instance, StateKind.PERMANENT, 0, 1)
        self._ask(
            pb.WorkerRequest(
                load=pb.Load(
                    data_key=self._data_key,
                    place=pb.Place(instance=self._instance.bytes, epoch=0, version=1),
                    sealed=seal(self._data_key, place, state),
                    epoch=_EPOCH,
                    commit_timeout_ms=_COMMIT_TIMEOUT_MS,
                    without_init=True,
                    without_shutdown=not self._auto_shutdown,
                )
            )
        )

    def _fork(self, keep: list[int], prepare: Callable[[list[int]], Callable[[], None]]) -> tuple[int, WorkerOutput]:
        """Fork; the child keeps these descriptors, prepares, goes behind the wall and runs. Returns its number and its pipe."""
        from vtpm.engine import sandbox

        parent = os.getpid()
        output, output_end = make_pipe()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            os.close(output_end)
            return pid, WorkerOutput(output, lambda: "the TPM's process", self._say)
        status = 1
        try:
            speak_into(output_end)
            if self._own_user:
                worker_uids.become_own()
            sandbox.die_with_parent(parent)
            # A signal to the whole group is for the parent, which ends the worker in order.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 0)
            run = prepare(sandbox.keep_descriptors(keep))
            if self._filter is None:
                sandbox.restrict(memory_limit=_MEMORY_LIMIT)
            else:
                sandbox.enter(self._filter, memory_limit=_MEMORY_LIMIT)
            run()
            status = 0
        except BaseException as error:  # noqa: BLE001  # a forked child must never return into the parent's code
            last_words(f"worker start: {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._errors_fd, f"{line}\n".encode())

    def _listen(self, output: WorkerOutput) -> None:
        """Hand on what the worker says, until its end."""
        poller = select.poll()
        poller.register(output.fd, select.POLLIN)
        more = True
        while more:
            poller.poll()
            more, modest = output.read(time.monotonic())
            if not modest:
                time.sleep(_PAUSE_S)
        output.end()

    def _prepare_manufacture(self, fds: list[int]) -> Callable[[], None]:
        sender = socket.socket(fileno=fds[0])

        def run() -> None:
            self._tpm.manufacture()
            self._tpm.power_off()
            sender.sendall(frame(self._tpm.permanent or b""))

        return run

    def _prepare_work(self, fds: list[int]) -> Callable[[], None]:
        host, operations, commits = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in fds)
        unused: Any = _NoOperations()
        return Worker(self._tpm, unused, host=host, operations_socket=operations, commits=commits).run

    def _serve_commits(self) -> None:
        """Make each state durable, then say so (invariant 1)."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                commit = pb.Commit.FromString(receive_frame(self._commits))
                ack = pb.CommitAck(version=commit.version, batch_size=1)
                try:
                    place = Place(self._instance, StateKind.PERMANENT, commit.epoch, commit.version)
                    self._keep(unseal(self._data_key, place, commit.sealed))
                except (OSError, VtpmError) as error:
                    # Closed on doubt (invariant 7): a TPM whose state can't be kept runs no further.
                    self.failure = f"the state can't be written: {error}"
                    ack.refused = "STATE_NOT_KEPT"
                self._commits.sendall(frame(ack.SerializeToString()))

    def _ask(self, request: pb.WorkerRequest) -> pb.WorkerReply:
        self._requests += 1
        request.id = self._requests
        try:
            self._ops.sendall(frame(request.SerializeToString()))
            while True:
                reply = pb.WorkerReply.FromString(receive_frame(self._ops))
                if reply.id == request.id:
                    break
        except (EOFError, OSError):
            raise EngineError("WORKER_GONE", self.failure or "the TPM's process has ended") from None
        if reply.HasField("fault"):
            raise EngineError(reply.fault.reason, reply.fault.message)
        return reply

    def connect(self) -> socket.socket:
        """Return a control connection to the worker; its end is the end of the run."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._host, [CONNECT], [theirs.fileno()])
        return ours

    def execute(self, command: bytes) -> bytes:
        """Run a TPM command at locality 0; return the response."""
        return self._ask(pb.WorkerRequest(execute=pb.Execute(command=command))).executed.response

    def commands_since(self) -> int:
        """Count the commands that ran on the data channel since the last such question."""
        return sum(item.count for item in self._ask(pb.WorkerRequest(get_status=pb.GetStatus(counts=True))).status.ordinals)

    def stop(self) -> None:
        """End the worker between two commands; nothing if it has ended."""
        with contextlib.suppress(EngineError):
            self._ask(pb.WorkerRequest(stop=pb.Stop()))

    def wait(self, timeout_s: float = 10.0) -> str:
        """Wait for the worker's end; return what went wrong, empty if nothing did."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _, wait_status = os.waitpid(self.pid, 0)
        # Its last words, unless nobody takes them.
        self._listener.join(_PAUSE_S)
        status = os.waitstatus_to_exitcode(wait_status)
        if status in _ENDED_WELL:
            # Set if the state of its orderly end could not be kept.
            return self.failure
        return self.failure or f"the TPM's process ended with status {status}"
