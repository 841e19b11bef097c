"""A worker: one process, one TPM. It serves its VM's data channel, the daemon's operations, and seals what must last.

Everything runs in one thread, one thing at a time: a raw command from gRPC and a command on the VM's socket never interleave.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import sys
import time
import uuid
from typing import TYPE_CHECKING, Final, NoReturn

from vtpm.engine.control import ControlChannel
from vtpm.engine.framing import LENGTH, FrameReader, frame
from vtpm.engine.platform import VmPlatform
from vtpm.engine.stats import UNKNOWN_ORDINAL, UNTIMED, CommandStats
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, TpmError, VtpmError
from vtpm.seal.envelope import Place, StateKind, seal, unseal
from vtpm.tpm.codes import TPM_RC_COMMAND_SIZE, TPM_RC_FAILURE
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE, error_response
from vtpm.tpm.eventlog import event2, spec_id_header
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.ptm import MAX_LOCALITY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vtpm.engine.operations import ManufacturedKey, Operations
    from vtpm.engine.software import Response, SoftwareTpm

EXIT_STOPPED: Final = 0
EXIT_COMMIT_REFUSED: Final = 81
EXIT_COMMIT_TIMEOUT: Final = 82
EXIT_TPM_FAILED: Final = 83
# The VM has ended, as its control channel says.
EXIT_POWERED_OFF: Final = 84

# What the engine host sends along with descriptors: a new daemon's sockets, a VM's control connection.
ATTACH: Final = b"A"
CONNECT: Final = b"C"

MAX_CONTROLS: Final = 8
_CONTROL_SEND_TIMEOUT_S: Final = 5.0
_NEED_POWER: Final = frozenset(("read_pcrs", "quote", "measure", "get_event_log", "get_keys"))
_RUN_COMMANDS: Final = _NEED_POWER | {"execute"}
# swtpm's header of a command: TPM2_SEND_COMMAND, locality, size of the command.
_PREFIX: Final = struct.Struct(">IBI")
_PREFIX_CODE: Final = b"\0\0\0\x08"
MAX_CONNECTIONS: Final = 16
_MAX_EVENTS: Final = 8
MAX_EVENT_LOG_SIZE: Final = 256 << 10
_SYNC_NS: Final = 250_000
# A peer that sends half a command has this long to send the rest.
_HALF_COMMAND_TIMEOUT_S: Final = 10.0


class _Exit(BaseException):
    """Ends the worker with an exit status; never caught on the way."""

    def __init__(self, status: int) -> None:
        self.status = status


class Worker:
    """The loop of one worker process.

    `host` receives new operations and commit sockets when another daemon takes over; `operations` and `commits` go to the
    daemon; `listeners` are the VM's data socket and its control twin, if it has any.
    """

    def __init__(
        self,
        tpm: SoftwareTpm,
        operations: Operations,
        *,
        host: socket.socket,
        operations_socket: socket.socket,
        commits: socket.socket,
        listeners: Sequence[socket.socket],
    ) -> None:
        self._tpm = tpm
        self._operations = operations
        self._host = host
        self._ops = operations_socket
        self._ops_reader = FrameReader()
        self._commits = commits
        self._listeners = listeners
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._connections: dict[int, socket.socket] = {}
        # The connection that the VM's control channel handed over, and the control channels.
        self._vm_data = -1
        self._controls: dict[int, ControlChannel] = {}
        self._platform = VmPlatform(tpm, self)
        self._powered = False
        self._before_next: Callable[[], None] | None = None
        self._partial: dict[int, tuple[bytearray, float]] = {}
        self._stats = CommandStats()
        self._instance = uuid.UUID(int=0)
        self._data_key = b""
        self._epoch = 0
        self._version = 0
        self._commit_timeout_s = 60.0
        self._events = bytearray()
        # What tells that the TPM's program has ended, if the TPM is one.
        self._lifeline = -1
        # Whether the last commit shared its sync with nobody.
        self._alone = False
        # Whether the service sent TPM2_Startup; then it sends TPM2_Shutdown too, so that the TPM goes down orderly.
        self._started_here = False
        self._requests: dict[str, Callable[[pb.WorkerRequest, pb.WorkerReply], None]] = {
            "manufacture": self._manufacture,
            "load": self._load,
            "execute": self._run_command,
            "read_pcrs": self._read_pcrs,
            "quote": self._quote,
            "measure": self._measure,
            "get_event_log": self._get_event_log,
            "reset": self._reset,
            "set_locality": self._set_locality,
            "get_status": self._get_status,
            "get_keys": self._get_keys,
            "stop": self._stop,
        }
        self._watch(host, self._on_host)
        self._watch(operations_socket, self._on_operations)

    def _watch(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _unwatch(self, sock: socket.socket) -> None:
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())
        sock.close()

    def run(self) -> NoReturn:
        """Serve until told to stop; ends the process."""
        status = EXIT_TPM_FAILED
        try:
            poll, handlers, partial = self._epoll.poll, self._handlers, self._partial
            while True:
                for fd, _event in poll(1.0 if partial else None, _MAX_EVENTS):
                    handler = handlers.get(fd)
                    if handler is not None:
                        handler()
                if partial:
                    self._drop_stalled()
        except _Exit as end:
            status = end.status
        except BaseException as error:  # noqa: BLE001  # the last frame of the process: say what it was, never what it held
            with contextlib.suppress(OSError):
                sys.stderr.write(f"worker {self._instance}: {type(error).__name__}\n")
                sys.stderr.flush()
        if self._tpm.lifeline >= 0:
            # Ended here, so that nobody else has to reap it; if this worker is killed, the kernel ends it too.
            with contextlib.suppress(OSError):
                self._tpm.power_off()
        os._exit(status)

    def rehearse_turn(self) -> None:
        """Serve what is ready, for vtpm.engine.rehearsal."""
        for fd, _event in self._epoll.poll(0, _MAX_EVENTS):
            self._handlers[fd]()

    def end_rehearsal(self) -> None:
        """Let go of what a rehearsal opened."""
        self._epoll.close()

    def rehearse_connection(self, connection: socket.socket) -> Callable[[], None]:
        """Return the handler of a data connection, for vtpm.engine.rehearsal."""
        return self._data_handler(connection, connection.fileno())

    # ---- the VM's control channel ----------------------------------------------------------------------------------------

    def _on_control_listener(self) -> None:
        connection = _accept(self._listeners[1])
        if connection is not None:
            self._open_control(connection, attached=False)

    def _open_control(self, connection: socket.socket, *, attached: bool) -> None:
        if len(self._controls) >= MAX_CONTROLS or (attached and self._attached):
            connection.close()
            return
        # A VMM that does not read its answers is waited for no longer than this.
        connection.settimeout(_CONTROL_SEND_TIMEOUT_S)
        channel = ControlChannel(self._platform, connection, attached=attached)
        fd = connection.fileno()
        self._controls[fd] = channel
        self._watch(connection, lambda: self._on_control(fd))

    @property
    def _attached(self) -> bool:
        return any(channel.attached for channel in self._controls.values())

    def _on_control(self, fd: int) -> None:
        channel = self._controls[fd]
        if channel.on_readable():
            return
        self._handlers.pop(fd, None)
        self._epoll.unregister(fd)
        del self._controls[fd]
        channel.close()
        if channel.attached:
            # Its VM is gone, orderly or not.
            self.end()

    # ---- power, for vtpm.engine.platform ---------------------------------------------------------------------------------

    @property
    def powered(self) -> bool:
        """See Power."""
        return self._powered

    def turn_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """See Power."""
        self._powered = True
        try:
            self._tpm.power_on(permanent, volatile)
        finally:
            self._watch_program()
        self._operations.forget()
        self._events.clear()
        self._started_here = False
        self._rebind()

    def turn_off(self) -> None:
        """See Power."""
        if self._powered:
            self._unwatch_program()
            self._tpm.power_off()
            self._powered = False
            self._rebind()

    def end(self) -> None:
        """See Power."""
        self._shut_down()
        raise _Exit(EXIT_POWERED_OFF)

    def settle(self) -> None:
        """See Power."""
        if self._tpm.dirty:
            self._commit()

    def state_imported(self) -> None:
        """See Power."""
        self._commit()
        reply = pb.WorkerReply()
        reply.imported.SetInParent()
        # Without a daemon the next one finds out, as it asks for the keys.
        with contextlib.suppress(OSError):
            self._ops.sendall(frame(reply.SerializeToString()))

    def serve_vm(self, connection: socket.socket) -> bool:
        """See Power."""
        if self._vm_data in self._connections:
            return False
        self._vm_data = connection.fileno()
        self._open_data(connection)
        return True

    def before_next_command(self, action: Callable[[], None]) -> None:
        """See Power."""
        self._before_next = action
        self._rebind()

    def _run_before_next(self) -> None:
        action, self._before_next = self._before_next, None
        if action is not None:
            action()
            self._rebind()

    def _rebind(self) -> None:
        """Give every data connection the handler for what the TPM is now, so that the usual way need not ask."""
        for fd, connection in self._connections.items():
            self._handlers[fd] = self._handler_for(connection, fd)

    def _handler_for(self, connection: socket.socket, fd: int) -> Callable[[], None]:
        if not self._powered:
            return lambda: self._on_data_unpowered(connection, fd)
        handler = self._data_handler(connection, fd)
        if self._before_next is None:
            return handler

        def first() -> None:
            self._run_before_next()
            handler()

        return first

    def _on_data_unpowered(self, connection: socket.socket, fd: int) -> None:
        try:
            data = connection.recv(MAX_COMMAND_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_pieces(connection, fd, data)
        else:
            self._drop(fd)

    # ---- the VM's data channel -------------------------------------------------------------------------------------------

    def _on_listener(self) -> None:
        connection = _accept(self._listeners[0])
        if connection is not None and len(self._connections) < MAX_CONNECTIONS:
            self._open_data(connection)
        elif connection is not None:
            connection.close()

    def _open_data(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        fd = connection.fileno()
        self._connections[fd] = connection
        self._watch(connection, self._handler_for(connection, fd))

    def _data_handler(self, connection: socket.socket, fd: int) -> Callable[[], None]:
        """Return what serves a readable data connection. The way of nearly every command, so names are bound once."""
        tpm, command, partial = self._tpm, self._tpm.command, self._partial
        receive_into, send = connection.recv_into, connection.send
        header_of, process, commit = HEADER.unpack_from, tpm.process_in_place, self._commit
        now, counts, stats = time.perf_counter_ns, self._stats.counts, self._stats
        untimed = 0

        def on_data() -> None:
            nonlocal untimed
            try:
                size = receive_into(command)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size >= HEADER_SIZE and fd not in partial:
                _tag, announced, ordinal = header_of(command)
                if announced == size:
                    # As in _execute, but one command of several is timed: reading the clock and finding the bucket takes as
                    # long as a quarter of a PCR_Read.
                    if untimed:
                        untimed -= 1
                        response = process(size)
                        if tpm.dirty:
                            commit()
                    else:
                        untimed = UNTIMED
                        start = now()
                        response = process(size)
                        if tpm.dirty:
                            commit()
                        stats.time(ordinal, now() - start)
                    if ordinal in counts:
                        counts[ordinal] += 1
                    else:
                        stats.count(ordinal)
                    try:
                        if send(response) == len(response):
                            return
                    except OSError:
                        size = 0
                    # A client that asks and never reads, or is gone; the TPM waits for nobody.
                    self._drop(fd)
                    return
            if size == 0:
                self._drop(fd)
            else:
                self._on_pieces(connection, fd, bytes(memoryview(command)[:size]))

        return on_data

    def _on_pieces(self, connection: socket.socket, fd: int, data: bytes) -> None:
        """The slow way: half commands, several at once, or nonsense. Nothing of a guest's bytes is trusted here."""
        buffer, since = self._partial.pop(fd, (bytearray(), time.monotonic()))
        buffer += data
        while len(buffer) >= HEADER_SIZE and fd in self._connections:
            prefixed = buffer.startswith(_PREFIX_CODE)
            at = _PREFIX.size if prefixed else 0
            if len(buffer) < at + HEADER_SIZE:
                break
            _tag, size, ordinal = HEADER.unpack_from(buffer, at)
            if prefixed and _PREFIX.unpack_from(buffer)[2] != size:
                size = 0
            if not HEADER_SIZE <= size <= MAX_COMMAND_SIZE:
                # The stream can't be framed any more: answer as the TPM would and close.
                self._answer(connection, fd, error_response(TPM_RC_COMMAND_SIZE))
                self._drop(fd)
                return
            if len(buffer) < at + size:
                break
            locality = buffer[4] if prefixed else None
            self._tpm.command[:size] = buffer[at : at + size]
            del buffer[: at + size]
            if locality is None:
                self._answer(connection, fd, self._execute(size, ordinal))
            else:
                self._answer(connection, fd, self._execute_prefixed(size, ordinal, locality))
            since = time.monotonic()
        if buffer and fd in self._connections:
            self._partial[fd] = (buffer, since)

    def _answer(self, connection: socket.socket, fd: int, response: Response) -> None:
        try:
            sent = connection.send(response)
        except OSError:
            sent = -1
        if sent != len(response):
            # A client that asks and never reads; the TPM waits for nobody.
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self._partial.pop(fd, None)
        connection = self._connections.pop(fd, None)
        if connection is not None:
            self._unwatch(connection)

    def _drop_stalled(self) -> None:
        oldest = time.monotonic() - _HALF_COMMAND_TIMEOUT_S
        for fd in [fd for fd, (_, since) in self._partial.items() if since < oldest]:
            self._drop(fd)

    def _execute(self, size: int, ordinal: int) -> Response:
        """Run the command in the TPM's buffer; the response is valid until the next command."""
        tpm = self._tpm
        if not self._powered:
            return error_response(TPM_RC_FAILURE)
        start = time.perf_counter_ns()
        response = tpm.process_in_place(size)
        if tpm.dirty:
            self._commit()
        self._stats.time(ordinal, time.perf_counter_ns() - start)
        self._stats.count(ordinal)
        return response

    def _execute_prefixed(self, size: int, ordinal: int, locality: int) -> bytes:
        """The same behind swtpm's header of a command (PTM_CAP_SEND_COMMAND_HEADER), which names a locality for it."""
        tpm = self._tpm
        before, tpm.locality = tpm.locality, min(locality, MAX_LOCALITY)
        try:
            response = bytes(self._execute(size, ordinal))
        finally:
            tpm.locality = before
        return LENGTH.pack(len(response)) + response + bytes(LENGTH.size)

    # ---- sealed state ----------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        """Seal the permanent state and have it made durable; return only then (invariant 1)."""
        tpm = self._tpm
        assert tpm.permanent is not None
        self._version += 1
        place = Place(self._instance, StateKind.PERMANENT, self._epoch, self._version)
        # Sealed here, where the plaintext is: nothing else on the host ever holds it (invariant 4).
        sealed = seal(self._data_key, place, tpm.permanent)
        tpm.dirty = False
        message = frame(pb.Commit(epoch=self._epoch, version=self._version, sealed=sealed).SerializeToString())
        deadline = time.monotonic() + self._commit_timeout_s
        while not self._try_commit(message, deadline):
            # The daemon is gone. The next one brings new sockets and takes the same commit again.
            self._await_daemon(deadline)

    def _try_commit(self, message: bytes, deadline: float) -> bool:
        reader = FrameReader()
        try:
            self._commits.sendall(message)
            while True:
                data = self._receive_soon(self._commits) if self._alone else None
                if data is None:
                    self._await_readable([self._commits], deadline)
                    data = self._commits.recv(4096)
                if not data:
                    return False
                for reply in reader.feed(data):
                    ack = pb.CommitAck.FromString(reply)
                    if ack.refused:
                        # Somebody else owns this instance now (invariant 3), or the store is not what we left.
                        raise _Exit(EXIT_COMMIT_REFUSED)
                    if ack.version == self._version:
                        self._alone = ack.batch_size == 1
                        return True
        except OSError:
            return False

    @staticmethod
    def _receive_soon(sock: socket.socket) -> bytes | None:
        """Ask again and again for as long as a disk takes to sync; None if nothing came.

        A guest waits for exactly this answer, and to wake a core that has gone to sleep takes a good part of such a time. With
        others committing too, the core is better left to them.
        """
        end = time.perf_counter_ns() + _SYNC_NS
        while time.perf_counter_ns() < end:
            try:
                return sock.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                # Whoever else wants this core comes first, the commit thread among them.
                os.sched_yield()
        return None

    def _await_daemon(self, deadline: float) -> None:
        self._await_readable([self._host], deadline)
        self._on_host()

    def _await_readable(self, sockets: list[socket.socket], deadline: float) -> None:
        poller = select.poll()
        for sock in sockets:
            poller.register(sock, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _Exit(EXIT_COMMIT_TIMEOUT)

    # ---- the engine host -------------------------------------------------------------------------------------------------

    def _on_host(self) -> None:
        fds = array.array("i")
        data, ancillary, _flags, _address = self._host.recvmsg(1, socket.CMSG_LEN(2 * fds.itemsize))
        if not data:
            raise _Exit(EXIT_STOPPED)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if data == CONNECT and len(fds) == 1:
            self._open_control(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds[0]), attached=True)
            return
        if data != ATTACH or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            return
        self._unwatch(self._ops)
        self._commits.close()
        self._ops, self._commits = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in fds)
        self._ops_reader = FrameReader()
        self._watch(self._ops, self._on_operations)

    # ---- operations of the daemon ----------------------------------------------------------------------------------------

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
            request = pb.WorkerRequest.FromString(message)
            reply = pb.WorkerReply(id=request.id)
            kind = request.WhichOneof("body") or ""
            try:
                if kind in _NEED_POWER:
                    self._check_powered()
                if kind in _RUN_COMMANDS:
                    self._run_before_next()
                self._requests[kind](request, reply)
            except VtpmError as error:
                reply = pb.WorkerReply(id=request.id, fault=_fault(error))
            except (KeyError, ValueError) as error:
                reply = pb.WorkerReply(
                    id=request.id,
                    fault=pb.Fault(kind="INTERNAL", reason="WORKER_REQUEST_INVALID", message=type(error).__name__),
                )
            if self._tpm.dirty and self._data_key:
                # Also when the operation failed half-way: what the TPM did is done.
                self._commit()
            try:
                ops.sendall(frame(reply.SerializeToString()))
            except OSError:
                return

    def _check_powered(self) -> None:
        if not self._powered:
            raise FailedPreconditionError(
                "TPM_NOT_POWERED", "the VM has not initialised its TPM yet, or has stopped it", remedy="wait until the VM boots"
            )

    def _manufacture(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        from vtpm.engine.operations import manufacture

        order = request.manufacture
        keys = manufacture(
            self._tpm,
            self._operations,
            [KeyAlgorithm(name) for name in order.ek_algorithms],
            KeyAlgorithm(order.ak_algorithm),
            [PcrBank.from_name(name) for name in order.pcr_banks],
        )
        assert self._tpm.permanent is not None
        self._instance = uuid.UUID(bytes=order.instance)
        place = Place(self._instance, StateKind.PERMANENT, 0, 1)
        reply.manufactured.sealed = seal(order.data_key, place, self._tpm.permanent)
        self._tpm.dirty = False
        _add_keys(reply.manufactured, keys)

    def _load(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.load
        self._instance = uuid.UUID(bytes=order.place.instance)
        place = Place(self._instance, StateKind.PERMANENT, order.place.epoch, order.place.version)
        permanent = unseal(order.data_key, place, order.sealed)
        self._data_key = order.data_key
        self._epoch, self._version = order.epoch, order.place.version
        self._commit_timeout_s = order.commit_timeout_ms / 1000
        reply.loaded.SetInParent()
        if order.without_init:
            self._tpm.permanent = permanent
        else:
            self.turn_on(permanent)
            if order.startup_clear:
                self._start_up(KeyAlgorithm(order.ak_algorithm) if order.ak_algorithm else None)
        for listener, handler in zip(self._listeners, (self._on_listener, self._on_control_listener), strict=False):
            listener.setblocking(False)
            self._watch(listener, handler)

    def _start_up(self, ak_algorithm: KeyAlgorithm | None) -> None:
        """What firmware does: TPM2_Startup, and platform auth that nobody knows."""
        self._operations.startup_clear()
        self._started_here = True
        if ak_algorithm is not None:
            self._operations.ensure_ak(ak_algorithm)
        self._operations.close_platform()

    def _get_keys(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.keys.SetInParent()
        _add_keys(reply.keys, self._operations.keys())

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
            raise _Exit(EXIT_TPM_FAILED)

    def _run_command(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        command, tpm = request.execute.command, self._tpm
        if len(command) > MAX_COMMAND_SIZE:
            raise InvalidArgumentError("COMMAND_TOO_LARGE", f"a command has at most {MAX_COMMAND_SIZE} bytes")
        guest_locality, tpm.locality = tpm.locality, request.execute.locality
        try:
            tpm.command[: len(command)] = command
            ordinal = HEADER.unpack_from(command)[2] if len(command) >= HEADER_SIZE else UNKNOWN_ORDINAL
            reply.executed.response = bytes(self._execute(len(command), ordinal))
        finally:
            tpm.locality = guest_locality

    def _read_pcrs(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        counter, values = self._operations.read_pcrs(_selections(request.read_pcrs.selections))
        reply.pcr_values.update_counter = counter
        for bank, index, digest in values:
            reply.pcr_values.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _quote(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        selections = _selections(request.quote.selections)
        # No guest command can run in between: these are the values that get signed.
        _, values = self._operations.read_pcrs(selections)
        reply.quoted.attest, reply.quoted.signature = self._operations.quote(selections, request.quote.nonce)
        reply.quoted.ak_tpmt_public = self._operations.ak_public()
        for bank, index, digest in values:
            reply.quoted.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _measure(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.measure
        banks = self._operations.banks()
        if len(self._events) + len(order.event_data) + 512 > MAX_EVENT_LOG_SIZE:
            raise FailedPreconditionError(
                "EVENT_LOG_FULL", "the instance's event log is full; nothing was extended", remedy="reset the instance"
            )
        digests = self._operations.extend(order.pcr, order.data)
        if not self._events:
            self._events += spec_id_header(banks)
        self._events += event2(order.pcr, order.event_type, digests, order.event_data)
        _, values = self._operations.read_pcrs([PcrSelection(bank, (order.pcr,)) for bank in banks])
        for bank, index, digest in values:
            reply.pcr_values.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _get_event_log(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.event_log.event_log = bytes(self._events) or spec_id_header(self._operations.banks())

    def _reset(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        assert self._tpm.permanent is not None
        self.turn_on(self._tpm.permanent)
        if request.reset.startup_clear:
            self._start_up(None)
        reply.done.SetInParent()

    def _set_locality(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        self._tpm.locality = request.set_locality.locality
        reply.done.SetInParent()

    def _get_status(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.status.epoch, reply.status.version = self._epoch, self._version
        reply.status.attached = self._attached
        self._stats.drain(reply.status)

    def _stop(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        self._shut_down()
        reply.done.SetInParent()
        self._ops.sendall(frame(reply.SerializeToString()))
        raise _Exit(EXIT_STOPPED)

    def _shut_down(self) -> None:
        """Who started the TPM shuts it down."""
        if self._powered and self._started_here:
            self._operations.shutdown_clear()
            self.settle()


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    return connection


def _add_keys(reply: pb.Keys | pb.Manufactured, keys: Iterable[ManufacturedKey]) -> None:
    for key in keys:
        reply.keys.add(role=key.role, algorithm=key.algorithm.value, handle=key.handle, tpmt_public=key.tpmt_public)


def _selections(selections: Iterable[pb.Selection]) -> tuple[PcrSelection, ...]:
    return tuple(PcrSelection(PcrBank.from_alg(item.hash_alg), tuple(item.indices)) for item in selections)


def _fault(error: VtpmError) -> pb.Fault:
    return pb.Fault(
        kind=error.kind.value,
        reason=error.reason,
        message=error.message,
        remedy=error.remedy,
        tpm_rc=error.rc if isinstance(error, TpmError) else 0,
    )
