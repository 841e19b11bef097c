"""A worker: one process, one TPM. It serves its VM's channels, the daemon's requests, and seals what must last.

Everything runs in one thread, one thing at a time: a raw command from gRPC and a command on the VM's socket never interleave.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from vtpm.engine import descriptors, sandbox
from vtpm.engine.channels import DataChannels
from vtpm.engine.control import ControlChannel
from vtpm.engine.durable import DurableState, await_readable
from vtpm.engine.duties import Duties
from vtpm.engine.exits import EXIT_POWERED_OFF, EXIT_STOPPED, EXIT_TPM_FAILED, Exit, last_words
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.hibernation import Hibernation
from vtpm.engine.platform import VmPlatform
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError
from vtpm.tpm.service import shutdown_clear_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vtpm.engine.operations import Operations
    from vtpm.engine.software import SoftwareTpm
    from vtpm.tpm.keys import KeyAlgorithm
    from vtpm.tpm.ptm import ControlCommand

# What the engine host sends, along with descriptors: a new daemon's sockets, a VM's control connection; the wish to hibernate.
ATTACH: Final = b"A"
CONNECT: Final = b"C"
HIBERNATE: Final = b"H"
# In front of a TakeOver: the instance that this worker was made for.
TAKE_OVER: Final = b"T"
MAX_ORDER_SIZE: Final = 4096
# What a worker tells the engine host: it has gone on from a snapshot, which nobody else can any more.
GOING_ON: Final = b"G"

MAX_CONTROLS: Final = 8
_CONTROL_SEND_TIMEOUT_S: Final = 5.0
_MAX_EVENTS: Final = 8


VmSocket: TypeAlias = "tuple[pb.Role.ValueType, socket.socket, int]"


class Worker:
    """The loop of one worker process.

    `host` receives new operations and commit sockets when another daemon takes over, and control connections of the VM;
    `operations_socket` and `commits` go to the daemon; `sockets` are the VM's: its data socket and that one's control twin, and
    what an earlier worker of the instance had.
    """

    def __init__(
        self,
        tpm: SoftwareTpm,
        operations: Operations,
        *,
        host: socket.socket,
        operations_socket: socket.socket,
        commits: socket.socket,
        sockets: Sequence[VmSocket] = (),
    ) -> None:
        self._tpm = tpm
        self._operations = operations
        self._host = host
        self._ops = operations_socket
        self._ops_reader = FrameReader()
        # Served from `listen` on.
        self._waiting = list(sockets)
        self._listeners: dict[pb.Role.ValueType, socket.socket] = {}
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._durable = DurableState(tpm, commits, self._await_daemon)
        self._durable.on_identity = self._identity_touched
        self._durable.on_nv_write = self._nv_written
        self._channels = DataChannels(tpm, self._durable, self._watch, self._unwatch, self._mute)
        self._controls: dict[int, ControlChannel] = {}
        self._platform = VmPlatform(tpm, self)
        self._hibernation = Hibernation(tpm, self._durable, self._channels, self._platform, self, host)
        self._duties = Duties(tpm, operations, self._durable, self._channels, self, self._hibernation)
        self.imported = False
        # The daemon was told of that, and has not looked at the keys since.
        self._import_told = False
        # What tells that the TPM's program has ended, if the TPM is one.
        self._lifeline = -1
        # Whether power is taken from the TPM as it is, without a TPM2_Shutdown.
        self.without_shutdown = False
        self._watch(host, self._on_host)
        self._watch(operations_socket, self._on_operations)

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def _watch(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        fd = sock.fileno()
        if fd not in self._handlers:
            self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def _unwatch(self, sock: socket.socket) -> None:
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())
        sock.close()

    def _mute(self, sock: socket.socket) -> None:
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def run(self) -> NoReturn:
        """Serve until told to stop; ends the process."""
        status = EXIT_TPM_FAILED
        try:
            poll, handlers, channels = self._epoll.poll, self._handlers, self._channels
            partial, muted, hibernation = channels.partial, channels.muted, self._hibernation
            while True:
                ready = poll(channels.tick_s() if partial or muted else hibernation.interval_s, _MAX_EVENTS)
                for fd, _event in ready:
                    handler = handlers.get(fd)
                    if handler is not None:
                        handler()
                if partial or muted:
                    channels.tick()
                elif not ready:
                    hibernation.consider()
        except Exit as end:
            status = end.status
        except BaseException as error:  # noqa: BLE001  # the last frame of the process: say what it was, never what it held
            last_words(f"worker {self._durable.instance}: {type(error).__name__}")
        if self._tpm.lifeline >= 0:
            # Ended here, so that nobody else has to reap it; if this worker is killed, the kernel ends it too.
            with contextlib.suppress(OSError):
                self._tpm.power_off()
        os._exit(status)

    def rehearse_turn(self) -> None:
        """Serve what is ready, for vtpm.engine.rehearsal."""
        for fd, _event in self._epoll.poll(0, _MAX_EVENTS):
            self._handlers[fd]()

    def rehearse_connection(self, connection: socket.socket) -> Callable[[], None]:
        """Return the handler of a data connection, for vtpm.engine.rehearsal."""
        return self._channels.handler(connection, connection.fileno())

    def rehearse_control(self, connection: socket.socket) -> None:
        """Serve a control connection, for vtpm.engine.rehearsal."""
        self._open_control(connection, attached=False)

    def rehearse_hibernation(self) -> None:
        """Hibernate, for vtpm.engine.rehearsal."""
        self._hibernation.hibernate()

    def end_rehearsal(self) -> None:
        """Let go of what a rehearsal opened."""
        self._epoll.close()

    # ---- the VM's sockets ------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """See vtpm.engine.duties.Power."""
        waiting, self._waiting = self._waiting, []
        for role, sock, zeros in waiting:
            match role:
                case pb.DATA:
                    self._channels.open(sock)
                case pb.VM_DATA:
                    self._channels.open_for_vm(sock)
                case pb.CONTROL | pb.VM_CONTROL:
                    self._open_control(sock, attached=role == pb.VM_CONTROL, resumed=True, zeros=zeros)
                case pb.DATA_LISTENER:
                    self._listen_on(role, sock, self._channels.open)
                case pb.CONTROL_LISTENER:
                    self._listen_on(role, sock, lambda connection: self._open_control(connection, attached=False))
                case _:
                    sock.close()

    def _listen_on(self, role: pb.Role.ValueType, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        listener.setblocking(False)
        self._listeners[role] = listener

        def on_connection() -> None:
            connection = _accept(listener)
            if connection is not None:
                take(connection)

        self._watch(listener, on_connection)

    def _open_control(self, connection: socket.socket, *, attached: bool, resumed: bool = False, zeros: int = 0) -> None:
        # The limit is for the others: a VM is not to lose its TPM to them.
        if self.attached if attached else len(self._controls) >= MAX_CONTROLS:
            connection.close()
            return
        # A VMM that does not read its answers is waited for no longer than this.
        connection.settimeout(_CONTROL_SEND_TIMEOUT_S)
        channel = ControlChannel(self._platform, connection, attached=attached, resumed=resumed, zeros=zeros)
        fd = connection.fileno()
        self._controls[fd] = channel
        self._watch(connection, lambda: self._on_control(fd))

    @property
    def attached(self) -> bool:
        """See vtpm.engine.duties.Power."""
        return any(channel.attached for channel in self._controls.values())

    def _on_control(self, fd: int) -> None:
        self._hibernation.requests += 1
        channel = self._controls[fd]
        if channel.on_readable():
            return
        del self._controls[fd], self._handlers[fd]
        self._epoll.unregister(fd)
        channel.close()
        if channel.attached:
            # Its VM is gone, orderly or not.
            self.end()

    # ---- for vtpm.engine.hibernation -------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """See Loop."""
        # Without a daemon the snapshot could not be taken, and a guest would wait for it.
        connected = self._ops.fileno() in self._handlers
        controls = all(channel.idle for channel in self._controls.values())
        return not connected or not controls or not self._channels.idle or bool(self._epoll.poll(0, 1))

    def park(self) -> tuple[pb.Park, list[int]]:
        """See Loop."""
        parts = [(role, listener.fileno(), 0) for role, listener in self._listeners.items()]
        for fd, item in self._controls.items():
            parts.append((pb.VM_CONTROL if item.attached else pb.CONTROL, fd, item.zeros or 0))
        parts += [(role, fd, 0) for role, fd in self._channels.descriptors()]
        park = pb.Park(roles=[role for role, _, _ in parts], zeros=[zeros for _, _, zeros in parts])
        return park, [fd for _, fd, _ in parts]

    def fill(self, snapshot: pb.Snapshot) -> None:
        """See Loop."""
        snapshot.needs_shutdown, snapshot.imported = self._durable.needs_shutdown, self.imported
        self._duties.fill(snapshot)

    def gone_on(self) -> None:
        """See vtpm.engine.duties.Power."""
        # Invariant 2: an engine host that has not heard of it may give the snapshot to another worker.
        try:
            self._host.send(GOING_ON)
        except OSError:
            raise Exit(EXIT_STOPPED) from None

    def go_on(self, permanent: bytes, snapshot: pb.Snapshot) -> None:
        """See vtpm.engine.duties.Power."""
        if snapshot.powered:
            self.turn_on(permanent, snapshot.volatile)
        else:
            self._tpm.permanent = permanent
        self._tpm.buffer_size(snapshot.buffer_size)
        self._tpm.locality = snapshot.locality
        self._durable.needs_shutdown, self.imported = snapshot.needs_shutdown, snapshot.imported

    # ---- power, for vtpm.engine.platform and vtpm.engine.duties ----------------------------------------------------------

    @property
    def powered(self) -> bool:
        """See Power."""
        return self._channels.powered

    def turn_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """See Power."""
        try:
            self._tpm.power_on(permanent, volatile)
        except BaseException:
            self._channels.set_powered(False)
            raise
        finally:
            self._watch_program()
        self._duties.forget()
        # One that goes on from elsewhere has run.
        self._durable.needs_shutdown = volatile is not None
        self._channels.set_powered(True)

    def turn_off(self) -> None:
        """See Power."""
        self._unwatch_program()
        self._tpm.power_off()
        self._channels.set_powered(False)

    def start_up(self, ak_algorithm: KeyAlgorithm | None) -> None:
        """See Power: TPM2_Startup, and platform auth that nobody knows."""
        self._operations.startup_clear()
        if ak_algorithm is not None:
            self._operations.ensure_ak(ak_algorithm)
        self._operations.close_platform()

    def before_power_loss(self) -> None:
        """See Power."""
        if not self.powered or not self._durable.needs_shutdown or self.without_shutdown:
            return
        # Never TPM_SU_STATE: a TPM2_Startup(STATE) after it would bring the PCRs back (invariant 2).
        with contextlib.suppress(EngineError):
            # A TPM that fails, or was never started and says so, has nothing that an orderly end would keep.
            self._tpm.process(shutdown_clear_command())
        self._durable.put_off()

    def shut_down(self) -> None:
        """See Power."""
        self.before_power_loss()
        self._durable.part()

    def end(self) -> None:
        """See Power."""
        self.shut_down()
        raise Exit(EXIT_POWERED_OFF)

    def settle(self) -> None:
        """See Power."""
        self._durable.settle()

    def state_imported(self) -> None:
        """See Power."""
        self._durable.commit()
        self.imported = True
        if not self._import_told:
            self._import_told = True
            reply = pb.WorkerReply()
            reply.imported.SetInParent()
            self._tell(reply)

    def keys_told(self) -> None:
        """See vtpm.engine.duties.Power."""
        self._import_told = False

    def _nv_written(self) -> None:
        if self._duties.provisioning.concerns_report():
            # Not now: the response to the guest is still where the TPM has left it.
            self._channels.before_next_command(self._duties.provisioning.follow_user_data)

    def _identity_touched(self) -> None:
        reply = pb.WorkerReply()
        reply.identity_touched.SetInParent()
        self._tell(reply)

    def _tell(self, reply: pb.WorkerReply) -> None:
        """Say what nobody asked for. Without a daemon the next one finds out by the status."""
        with contextlib.suppress(OSError):
            self._ops.sendall(frame(reply.SerializeToString()))

    def hash_sequence(self, command: ControlCommand, data: bytes) -> int:
        """See vtpm.engine.duties.Power."""
        return self._platform.hash_sequence(command, data)

    def hashed(self, digests: Sequence[bytes]) -> None:
        """See vtpm.engine.platform.Power."""
        self._duties.hashed(digests)

    def serve_vm(self, connection: socket.socket) -> bool:
        """See Power."""
        return self._channels.open_for_vm(connection)

    def before_next_command(self, action: Callable[[], None]) -> None:
        """See Power."""
        self._channels.before_next_command(action)

    def _watch_program(self) -> None:
        """Notice the end of a TPM that is a program of its own: each power on starts another."""
        self._unwatch_program()
        self._lifeline = self._tpm.lifeline
        if self._lifeline >= 0:
            self._handlers[self._lifeline] = self._on_program_end
            self._epoll.register(self._lifeline, select.EPOLLIN)

    def _unwatch_program(self) -> None:
        if self._lifeline >= 0:
            # The program before this one; if its descriptor was closed, epoll knows that already.
            del self._handlers[self._lifeline]
            with contextlib.suppress(OSError):
                self._epoll.unregister(self._lifeline)
            self._lifeline = -1

    def _on_program_end(self) -> None:
        # Asked again: the event may have been that of the program before, under the same number.
        if select.select([self._lifeline], [], [], 0)[0]:
            raise Exit(EXIT_TPM_FAILED)

    # ---- the engine host and the daemon ----------------------------------------------------------------------------------

    def _await_daemon(self, deadline: float) -> None:
        await_readable(self._host, deadline)
        self._on_host()

    def _on_host(self) -> None:
        data, fds = descriptors.receive(self._host, MAX_ORDER_SIZE)
        if not data:
            raise Exit(EXIT_STOPPED)
        if data.startswith(TAKE_OVER):
            sandbox.name_process("vtpm-worker")
            self._waiting += vm_sockets(pb.TakeOver.FromString(data[len(TAKE_OVER) :]), fds)
            if self._durable.ready:
                # Its state was faster.
                self.listen()
            return
        if data == CONNECT and len(fds) == 1:
            self._hibernation.requests += 1
            self._open_control(socket.socket(fileno=fds[0]), attached=True)
            return
        if data == HIBERNATE and not fds:
            self._hibernation.demand()
            return
        if data != ATTACH or len(fds) != 2:
            descriptors.close_all(fds)
            return
        self._unwatch(self._ops)
        self._ops, commits = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in fds)
        self._durable.use(commits)
        self._ops_reader = FrameReader()
        self._watch(self._ops, self._on_operations)

    def _on_operations(self) -> None:
        ops = self._ops
        try:
            data = ops.recv(65536)
        except OSError:
            data = b""
        if not data:
            # The daemon is gone; the VM is served on, and the next daemon brings new sockets.
            self._unwatch(ops)
            return
        for message in self._ops_reader.feed(data):
            reply, last = self._duties.serve(message)
            try:
                ops.sendall(frame(reply))
            except OSError:
                if last is None:
                    return
            if last is not None:
                raise Exit(last)


def vm_sockets(order: pb.TakeOver, fds: Sequence[int]) -> list[VmSocket]:
    """What an order brings: the role of each socket, and how many zeros were read from it too many."""
    zeros = list(order.zeros) or [0] * len(fds)
    return [(role, socket.socket(fileno=fd), zero) for role, fd, zero in zip(order.roles, fds, zeros, strict=True)]


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    return connection
