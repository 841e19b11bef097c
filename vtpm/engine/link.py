"""The daemon's ends of the link: to the engine host (SOCK_SEQPACKET with descriptors) and to each worker (framed stream)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import structlog

from vtpm import crashpoints
from vtpm.engine import descriptors
from vtpm.engine.committer import Channel
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.host_log import open_log
from vtpm.engine.identity import TouchedKeys, key_records
from vtpm.engine.interface import PcrValue, PcrValues, Quoted
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, ErrorKind, TpmError, VtpmError
from vtpm.store.model import KeyRecord
from vtpm.tpm.codes import response_code_name
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.ptm import ControlCommand

log: Final = structlog.get_logger("vtpm.engine")

_MAX_MESSAGE_SIZE: Final = 256 << 10
_START_TIMEOUT_S: Final = 20.0
_REQUEST_TIMEOUT_S: Final = 20.0


class HostEvents(Protocol):
    """Who hears from the engine host; called on the event loop."""

    def on_exit(self, exited: pb.WorkerExited, fds: list[int]) -> None:
        """A worker has ended; `fds`, which are the listener's now, are copies of what it left."""

    def on_wake(self, wake: pb.Wake) -> None:
        """Something has come for a parked instance."""

    def on_lost(self) -> None:
        """The engine host is gone."""


class HostLink:
    """Requests to the engine host; `events` is told what nobody asked for."""

    def __init__(self, sock: socket.socket, events: HostEvents) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._events = events
        self._ids = 0
        self._pending: dict[
            int, tuple[asyncio.Future[list[tuple[pb.HostReply, list[int]]]], list[tuple[pb.HostReply, list[int]]]]
        ] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @classmethod
    async def connect(cls, path: Path, events: HostEvents, *, memory_limit: int, log_path: Path) -> HostLink:
        """Connect to the engine host that runs at `path`, or start one.

        Raises:
            EngineError: ENGINE_HOST_START_FAILED.
        """
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return cls(_connect(path), events)
        _start_host(path, memory_limit, log_path)
        return cls(_connect(path), events)

    def _on_readable(self) -> None:
        fds: list[int] = []
        try:
            data, fds = descriptors.receive(self._sock, _MAX_MESSAGE_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._events.on_lost()
            return
        reply = pb.HostReply.FromString(data)
        if reply.id not in self._pending:
            if reply.HasField("exited"):
                self._events.on_exit(reply.exited, fds)
                return
            descriptors.close_all(fds)
            if reply.HasField("wake"):
                self._events.on_wake(reply.wake)
            return
        future, parts = self._pending[reply.id]
        parts.append((reply, fds))
        if not reply.hello.more and not reply.handed_over.more:
            del self._pending[reply.id]
            if not future.done():
                future.set_result(parts)

    async def request(self, request: pb.HostRequest, fds: Sequence[int] = ()) -> list[tuple[pb.HostReply, list[int]]]:
        """Send one request; return its replies with their descriptors.

        Raises:
            EngineError: the engine host refused, is gone, or does not answer.
        """
        self._ids += 1
        request.id = self._ids
        future: asyncio.Future[list[tuple[pb.HostReply, list[int]]]] = self._loop.create_future()
        self._pending[request.id] = (future, [])
        try:
            socket.send_fds(self._sock, [request.SerializeToString()], fds)
            replies = await asyncio.wait_for(future, _REQUEST_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise EngineError("ENGINE_HOST_UNREACHABLE", f"the engine host does not answer: {type(error).__name__}") from error
        finally:
            self._pending.pop(request.id, None)
        if replies[-1][0].error:
            raise EngineError("ENGINE_HOST_REFUSED", f"the engine host refused: {replies[-1][0].error}")
        return replies

    def close(self) -> None:
        """Let go of the engine host; its workers run on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for future, _ in self._pending.values():
            if not future.done():
                future.set_exception(
                    EngineError(
                        "ENGINE_HOST_LOST",
                        "the engine host is gone",
                        remedy="engine-host.log in the runtime directory says why",
                    )
                )
        self._pending.clear()


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def _start_host(path: Path, memory_limit: int, log_path: Path) -> None:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # The directory is 0700; the socket's own mode is the second gate.
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(4)
        with _log_file(log_path) as log_file:
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vtpm.engine.host",
                    str(listener.fileno()),
                    str(path),
                    str(memory_limit),
                    str(log_path),
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                cwd="/",
                env={
                    key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")
                }
                | crashpoints.inherited(os.environ),
            )
    except OSError as error:
        raise EngineError("ENGINE_HOST_START_FAILED", f"the engine host can't be started: {error}") from error
    finally:
        listener.close()


def _log_file(path: Path) -> BinaryIO:
    try:
        return os.fdopen(open_log(path), "ab")
    except OSError as error:
        # No VM waits for a log.
        log.warning("engine.host_log_not_writable", path=str(path), error=str(error))
        return Path(os.devnull).open("ab")


class WorkerLink(asyncio.Protocol):
    """Requests to one worker; implements vtpm.engine.interface.RunningTpm. `gone` is set when its end has closed."""

    def __init__(self, instance: uuid.UUID) -> None:
        self.instance = instance
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._ids = 0
        self._pending: dict[int, asyncio.Future[pb.WorkerReply]] = {}
        self.gone = asyncio.Event()
        # The same worker's commit socket, once it runs an instance.
        self.commits: Channel | None = None
        # How the engine stops this worker for good, once it runs an instance.
        self.stopper: Callable[[], Awaitable[None]] = self.ask_to_stop
        # How a control connection gets to this worker, and who hears that its state was replaced.
        self.attacher: Callable[[socket.socket], Awaitable[None]] | None = None
        self.on_imported: Callable[[], None] = lambda: None
        # Called when the worker's end has closed.
        self.on_lost: Callable[[], object] = lambda: None
        self.on_identity_touched: Callable[[], None] = lambda: None

    @classmethod
    async def open(cls, instance: uuid.UUID, sock: socket.socket) -> WorkerLink:
        """Take over the daemon's end of an operations socket."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(instance), sock=sock)
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            replies = [pb.WorkerReply.FromString(message) for message in self._reader.feed(data)]
        except (VtpmError, ValueError):
            self.close()
            return
        for reply in replies:
            if reply.HasField("imported"):
                self.on_imported()
                continue
            if reply.HasField("identity_touched"):
                self.on_identity_touched()
                continue
            future = self._pending.pop(reply.id, None)
            if future is not None and not future.done():
                future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.gone.set()
        self.on_lost()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._lost())
        self._pending.clear()

    def _lost(self) -> EngineError:
        return EngineError(
            "TPM_LOST",
            "the instance's worker is gone",
            subject=str(self.instance),
            remedy="see `vtpm instance show` for the reason",
        )

    def close(self) -> None:
        """Let go of the worker."""
        if self._transport is not None:
            self._transport.close()

    async def request(self, request: pb.WorkerRequest) -> pb.WorkerReply:
        """Send one request and return its reply; a fault is raised as the error it stands for."""
        if self._transport is None or self.gone.is_set():
            raise self._lost()
        self._ids += 1
        request.id = self._ids
        future: asyncio.Future[pb.WorkerReply] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = future
        try:
            self._transport.write(frame(request.SerializeToString()))
            reply = await future
        finally:
            self._pending.pop(request.id, None)
        if reply.HasField("fault"):
            raise _error(reply.fault, str(self.instance))
        return reply

    async def execute(self, command: bytes, locality: int) -> bytes:
        """See RunningTpm."""
        reply = await self.request(pb.WorkerRequest(execute=pb.Execute(command=command, locality=locality)))
        return reply.executed.response

    async def read_pcrs(self, selections: Sequence[PcrSelection]) -> PcrValues:
        """See RunningTpm."""
        reply = await self.request(pb.WorkerRequest(read_pcrs=pb.ReadPcrs(selections=_selections(selections))))
        return PcrValues(_values(reply.pcr_values.values), reply.pcr_values.update_counter)

    async def quote(self, selections: Sequence[PcrSelection], nonce: bytes) -> Quoted:
        """See RunningTpm."""
        reply = await self.request(pb.WorkerRequest(quote=pb.Quote(selections=_selections(selections), nonce=nonce)))
        quoted = reply.quoted
        return Quoted(quoted.attest, quoted.signature, quoted.ak_tpmt_public, _values(quoted.values))

    async def measure(self, pcr: int, data: bytes, event_type: int, event_data: bytes) -> tuple[PcrValue, ...]:
        """See RunningTpm."""
        order = pb.Measure(pcr=pcr, data=data, event_type=event_type, event_data=event_data)
        reply = await self.request(pb.WorkerRequest(measure=order))
        return _values(reply.pcr_values.values)

    async def event_log(self) -> bytes:
        """See RunningTpm."""
        return (await self.request(pb.WorkerRequest(get_event_log=pb.GetEventLog()))).event_log.event_log

    async def reset(self, *, startup_clear: bool) -> None:
        """See RunningTpm."""
        await self.request(pb.WorkerRequest(reset=pb.Reset(startup_clear=startup_clear)))

    async def hash_sequence(self, command: ControlCommand, data: bytes) -> None:
        """See RunningTpm."""
        await self.request(pb.WorkerRequest(hash_sequence=pb.HashSequence(command=command, data=data)))

    async def status(self, *, counts: bool = False) -> pb.Status:
        """See RunningTpm."""
        return (await self.request(pb.WorkerRequest(get_status=pb.GetStatus(counts=counts)))).status

    async def keys(self) -> tuple[tuple[KeyRecord, ...], tuple[str, ...]]:
        """See RunningTpm."""
        found = (await self.request(pb.WorkerRequest(get_keys=pb.GetKeys()))).keys
        keys = tuple(KeyRecord(key.role, key.algorithm, key.handle, key.tpmt_public) for key in found.keys)
        return keys, tuple(found.pcr_banks)

    async def hibernate(self) -> None:
        """See RunningTpm. A worker that hibernates ends without a reply."""
        await self.request(pb.WorkerRequest(hibernate=pb.Hibernate()))

    async def identity(self) -> TouchedKeys:
        """See RunningTpm."""
        found = (await self.request(pb.WorkerRequest(get_keys=pb.GetKeys()))).keys
        return TouchedKeys(key_records(found.keys), tuple(found.identity_ordinals), found.identity_generation)

    async def forget_identity(self, generation: int) -> None:
        """See RunningTpm."""
        await self.request(pb.WorkerRequest(get_keys=pb.GetKeys(forget_generation=generation)))

    async def write_nv(self, index: int, data: bytes) -> None:
        """See RunningTpm."""
        await self.request(pb.WorkerRequest(write_nv=pb.WriteNv(index=index, data=data)))

    async def read_nv(self, index: int, *, secret_auth: bool = False) -> bytes:
        """See RunningTpm."""
        order = pb.ReadNv(index=index, secret_auth=secret_auth)
        return (await self.request(pb.WorkerRequest(read_nv=order))).nv_contents.data

    async def attach(self, connection: socket.socket) -> None:
        """See RunningTpm."""
        assert self.attacher is not None
        await self.attacher(connection)

    async def stop(self) -> None:
        """See RunningTpm."""
        await self.stopper()

    async def ask_to_stop(self) -> None:
        """Tell the worker to stop, and let go of it."""
        with contextlib.suppress(EngineError):
            await self.request(pb.WorkerRequest(stop=pb.Stop()))
        self.close()


def _selections(selections: Sequence[PcrSelection]) -> list[pb.Selection]:
    return [pb.Selection(hash_alg=selection.bank.alg_id, indices=selection.indices) for selection in selections]


def _values(values: Sequence[pb.PcrValue]) -> tuple[PcrValue, ...]:
    return tuple(PcrValue(PcrBank.from_alg(value.hash_alg), value.index, value.digest) for value in values)


def _error(fault: pb.Fault, subject: str) -> VtpmError:
    if fault.tpm_rc:
        name = response_code_name(fault.tpm_rc)
        return TpmError(fault.tpm_rc, name, fault.message, subject=subject, remedy=fault.remedy)
    return VtpmError(fault.reason, fault.message, subject=subject, remedy=fault.remedy, kind=ErrorKind(fault.kind))
