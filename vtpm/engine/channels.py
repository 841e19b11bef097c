"""The data channels of a worker's TPM: whole commands in, responses out, on any number of connections, one at a time."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from vtpm.engine.framing import LENGTH
from vtpm.engine.limits import Throttle, TokenBucket
from vtpm.engine.stats import UNTIMED, CommandStats
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.tpm.codes import TPM_RC_COMMAND_SIZE, TPM_RC_FAILURE
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE, error_response
from vtpm.tpm.ptm import MAX_LOCALITY

if TYPE_CHECKING:
    from vtpm.engine.durable import DurableState
    from vtpm.engine.software import Response, SoftwareTpm

# As long as nobody has said how many.
_MAX_CONNECTIONS: Final = 16
# A peer that sends half a command has this long to send the rest.
_HALF_COMMAND_TIMEOUT_S: Final = 10.0
_TICK_S: Final = 1.0
# swtpm's header of a command: TPM2_SEND_COMMAND, locality, size of the command.
_PREFIX: Final = struct.Struct(">IBI")
_PREFIX_CODE: Final = b"\0\0\0\x08"

Watch = Callable[[socket.socket, Callable[[], None]], None]
Unwatch = Callable[[socket.socket], None]


class DataChannels:
    """Every connection that carries commands. `watch`, `unwatch` (which closes) and `mute` are the worker's loop."""

    def __init__(self, tpm: SoftwareTpm, durable: DurableState, watch: Watch, unwatch: Unwatch, mute: Unwatch) -> None:
        self._tpm = tpm
        self._durable = durable
        self._watch = watch
        self._unwatch = unwatch
        self._mute = mute
        self._max_connections = _MAX_CONNECTIONS
        self._throttle: Throttle | None = None
        # Connections that wait until the instance may run commands again.
        self.muted: dict[int, socket.socket] = {}
        self._connections: dict[int, socket.socket] = {}
        # The connection that the VM's control channel handed over.
        self._vm = -1
        # Half commands: what has come, and since when.
        self.partial: dict[int, tuple[bytearray, float]] = {}
        self.stats = CommandStats()
        self.powered = False
        self._before_next: Callable[[], None] | None = None

    def limit(self, *, command_rate: float, command_burst: int, max_connections: int) -> None:
        """Keep bounds from now on; a rate of 0 is none, no connections named leaves that bound as it is."""
        self._max_connections = max_connections or self._max_connections
        bucket = TokenBucket(command_rate, max(1, command_burst)) if command_rate > 0 else None
        self._throttle = Throttle(bucket, self._mute, self.muted) if bucket else None
        self._rebind()

    def open(self, connection: socket.socket) -> None:
        """Serve a connection, if there are not too many."""
        if len(self._connections) >= self._max_connections:
            connection.close()
        else:
            self._add(connection)

    def _add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        fd = connection.fileno()
        self._connections[fd] = connection
        self._watch(connection, self._handler_for(connection, fd))
        if self._throttle is not None:
            # Nobody gets ahead by connecting anew.
            self._throttle.pay(0, connection, fd)

    def open_for_vm(self, connection: socket.socket) -> bool:
        """Serve the connection that a control channel handed over; False if there is one already."""
        if self._vm in self._connections:
            return False
        self._vm = connection.fileno()
        # However many others there are: a VM is not to lose its TPM to them.
        self._add(connection)
        return True

    def descriptors(self) -> Iterator[tuple[pb.Role.ValueType, int]]:
        """Every connection, and what it is, for a worker that goes on with them."""
        for fd in self._connections:
            yield (pb.VM_DATA if fd == self._vm else pb.DATA), fd

    @property
    def idle(self) -> bool:
        """Whether no connection has sent half a command, and nothing is to be done before the next one."""
        return not self.partial and not self.muted and self._before_next is None

    def set_powered(self, powered: bool) -> None:
        """Say whether the TPM is initialised; without, commands are answered as a TPM in failure mode would."""
        self.powered = powered
        self._rebind()

    def before_next_command(self, action: Callable[[], None]) -> None:
        """Call `action` once, before the next command runs, after what else is to be done then."""
        earlier = self._before_next

        def both() -> None:
            if earlier is not None:
                earlier()
            action()

        self._before_next = both
        self._rebind()

    def run_before_next(self) -> None:
        """A command is about to run that did not come by a channel."""
        action, self._before_next = self._before_next, None
        if action is not None:
            action()
            self._rebind()

    def _rebind(self) -> None:
        """Give every connection the handler for what the TPM is now, so that the usual way need not ask."""
        for fd, connection in self._connections.items():
            if fd not in self.muted:
                self._watch(connection, self._handler_for(connection, fd))

    def _handler_for(self, connection: socket.socket, fd: int) -> Callable[[], None]:
        if not self.powered:
            return lambda: self._on_data_unpowered(connection, fd)
        handler = self.handler(connection, fd)
        if self._before_next is None:
            return handler

        def first() -> None:
            self.run_before_next()
            handler()

        return first

    def handler(self, connection: socket.socket, fd: int) -> Callable[[], None]:
        """Return what serves a readable connection. The way of nearly every command, so names are bound once."""
        tpm, command, partial = self._tpm, self._tpm.command, self.partial
        receive_into, send = connection.recv_into, connection.send
        header_of, process, commit = HEADER.unpack_from, tpm.process_in_place, self._durable.commit
        now, counts, stats = time.perf_counter_ns, self.stats.counts, self.stats
        untimed, throttle = 0, self._throttle
        block = throttle.bucket.block if throttle else UNTIMED + 1
        if throttle is not None:
            throttle.opened(fd, lambda: untimed)

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
                    # As in `execute`, but one command of several is timed: reading the clock and finding the bucket takes as
                    # long as a quarter of a PCR_Read.
                    if untimed:
                        untimed -= 1
                        response = process(size)
                        if tpm.dirty:
                            commit(ordinal, response)
                    else:
                        untimed = block - 1
                        start = now()
                        response = process(size)
                        if tpm.dirty:
                            commit(ordinal, response)
                        stats.time(ordinal, now() - start)
                        if throttle is not None:
                            # For this one and those that are not timed.
                            throttle.pay(block, connection, fd)
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

    def _on_pieces(self, connection: socket.socket, fd: int, data: bytes) -> None:
        """The slow way: half commands, several at once, or nonsense. Nothing of a guest's bytes is trusted here."""
        buffer, since = self.partial.pop(fd, (bytearray(), time.monotonic()))
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
                self._answer(connection, fd, self.execute(size, ordinal))
            else:
                self._answer(connection, fd, self._execute_prefixed(size, ordinal, locality))
            if self._throttle is not None and fd in self._connections:
                self._throttle.pay(1, connection, fd)
            since = time.monotonic()
        if buffer and fd in self._connections:
            self.partial[fd] = (buffer, since)

    def _answer(self, connection: socket.socket, fd: int, response: Response) -> None:
        try:
            sent = connection.send(response)
        except OSError:
            sent = -1
        if sent != len(response):
            # A client that asks and never reads; the TPM waits for nobody.
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self.partial.pop(fd, None)
        if self._throttle is not None:
            self._throttle.dropped(fd)
        connection = self._connections.pop(fd, None)
        if connection is not None:
            self._unwatch(connection)

    def tick_s(self) -> float:
        """Seconds until `tick` should be called, if nothing comes."""
        if self._throttle is not None and self.muted:
            return min(_TICK_S, self._throttle.bucket.wait_s())
        return _TICK_S

    def tick(self) -> None:
        """Do what time has come for."""
        if self._throttle is not None:
            for fd, connection in self._throttle.due().items():
                self._watch(connection, self._handler_for(connection, fd))
        if self.partial:
            self._drop_stalled()

    def _drop_stalled(self) -> None:
        """Drop who sent half a command and then nothing."""
        oldest = time.monotonic() - _HALF_COMMAND_TIMEOUT_S
        for fd in [fd for fd, (_, since) in self.partial.items() if since < oldest]:
            self._drop(fd)

    def execute(self, size: int, ordinal: int) -> Response:
        """Run the command in the TPM's buffer; the response is valid until the next command."""
        if not self.powered:
            return error_response(TPM_RC_FAILURE)
        start = time.perf_counter_ns()
        response = self._tpm.process_in_place(size)
        if self._tpm.dirty:
            self._durable.commit(ordinal, response)
        self.stats.time(ordinal, time.perf_counter_ns() - start)
        self.stats.count(ordinal)
        return response

    def _execute_prefixed(self, size: int, ordinal: int, locality: int) -> bytes:
        """The same behind swtpm's header of a command (PTM_CAP_SEND_COMMAND_HEADER), which names a locality for it."""
        tpm = self._tpm
        before, tpm.locality = tpm.locality, min(locality, MAX_LOCALITY)
        try:
            response = bytes(self.execute(size, ordinal))
        finally:
            tpm.locality = before
        return LENGTH.pack(len(response)) + response + bytes(LENGTH.size)
