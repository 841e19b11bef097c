"""The daemon's end of the line to a worker: a framed stream. Nobody sees what comes before vtpm.engine.validate has."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from vtpm.engine import validate
from vtpm.engine.committer import Channel
from vtpm.engine.events import Origin, origin_of
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.identity import Challenge, TouchedKeys, credentials_of, key_records
from vtpm.engine.interface import MeasuredLog, PcrValue, PcrValues, Quoted
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError
from vtpm.errors import EngineError, ErrorKind, TpmError, VtpmError
from vtpm.store.model import KeyRecord
from vtpm.tpm.codes import response_code_name
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.ptm import ControlCommand

# A worker serves one request after the other: these are more than anybody has who waits for them.
_MAX_PENDING: Final = 512
_MAX_UNSENT: Final = 8 << 20
_LOOK_AGAIN_S: Final = 0.01
# How long a request may take beside what it waits for the store: a key by RSA takes seconds on a busy machine.
_TIMEOUT_S: Final = 30.0
_TIMEOUTS_S: Final = {
    "manufacture": 300.0,
    "provision": 120.0,
    "reprovision": 120.0,
    "activate_credentials": 120.0,
    "prove": 120.0,
}
# What a worker may say unasked before it is answered, and how much of that may be saved.
_CREDIT: Final = 1
_MAX_CREDIT: Final = 4
MISBEHAVED_REMEDY: Final = (
    "its guest may have broken into it: look at the VM before you reset the instance together with it: vtpm instance reset {}"
)


class WorkerLink(asyncio.Protocol):
    """Requests to one worker; implements vtpm.engine.interface.RunningTpm. `gone` is set when its end has closed.

    `store_timeout_s`: how long the worker itself waits for the store before it ends.
    """

    def __init__(self, instance: uuid.UUID, store_timeout_s: float) -> None:
        self.instance = instance
        self._store_timeout_s = store_timeout_s
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._ids = 0
        # Requests that are not sent yet.
        self._unsent = 0
        # Outlines of requests without a reply, with those that nobody waits for any more: each gets one, and no other comes. A
        # worker may leave them without one as long as it lives, and a guest may ask for a megabyte each to be measured.
        self._pending: dict[int, tuple[pb.WorkerRequest, asyncio.Future[pb.WorkerReply]]] = {}
        # By kind: how often the worker may say so before it is asked.
        self._credit = dict.fromkeys(validate.UNSOLICITED, _CREDIT)
        self.gone = asyncio.Event()
        # What it sent that no worker sends; who ends it then.
        self.violation: ViolationError | None = None
        self.on_violation: Callable[[ViolationError], object] = lambda _violation: None
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
    async def open(cls, instance: uuid.UUID, sock: socket.socket, store_timeout_s: float) -> WorkerLink:
        """Take over the daemon's end of an operations socket."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(instance, store_timeout_s), sock=sock)
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        if self.violation is not None:
            return
        try:
            self._read(data)
        except ViolationError as violation:
            self.misbehaved(violation)

    def _read(self, data: bytes) -> None:
        asked = {request.WhichOneof("body") or "" for request, _ in self._pending.values()}
        most = len(self._pending) + len(self._credit) * _MAX_CREDIT
        try:
            messages = self._reader.feed(data, limit=validate.largest_reply(asked), most=most)
        except EngineError as error:
            raise ViolationError(error.reason, error.message) from None
        for message in messages:
            reply, kind = validate.parse_reply(message)
            if kind in self._credit:
                self._unasked(kind)
                continue
            if reply.id not in self._pending:
                raise ViolationError("REPLY_UNKNOWN", "a reply to nothing")
            request, future = self._pending[reply.id]
            validate.reply_to(request, reply)
            del self._pending[reply.id]
            if not future.done():
                future.set_result(reply)

    def _unasked(self, kind: str) -> None:
        if not self._credit[kind]:
            raise ViolationError("UNASKED_AGAIN", f"{kind} again before it was answered")
        self._credit[kind] -= 1
        if kind == "imported":
            self.on_imported()
        else:
            self.on_identity_touched()

    def _grant(self, kind: str) -> None:
        self._credit[kind] = min(_MAX_CREDIT, self._credit[kind] + 1)

    def misbehaved(self, violation: ViolationError) -> None:
        """The worker has sent what none sends: hear nothing more of it, and have it ended."""
        if self.violation is not None:
            return
        self.violation = violation
        self._reader = FrameReader()
        if self._transport is not None:
            self._transport.abort()
        self.on_violation(violation)

    def misbehaved_elsewhere(self, violation: ViolationError) -> None:
        """The same, told from another thread."""
        self._loop.call_soon_threadsafe(self.misbehaved, violation)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.gone.set()
        self.on_lost()
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(self._lost())
        self._pending.clear()

    def _lost(self) -> EngineError:
        if self.violation is not None:
            return misbehaved(str(self.instance), self.violation.code, self.violation.text)
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

    async def request(self, request: pb.WorkerRequest, timeout_s: float | None = None) -> pb.WorkerReply:
        """Send one request and return its reply; a fault is raised as the error it stands for.

        Raises:
            EngineError: TPM_LOST, WORKER_MISBEHAVED, WORKER_BUSY, or WORKER_TIMEOUT: no answer in time, by its kind.
        """
        waiting = len(self._pending) + self._unsent
        if waiting >= _MAX_PENDING:
            raise EngineError(
                "WORKER_BUSY",
                f"{waiting} requests wait for the instance's worker",
                subject=str(self.instance),
                remedy="try again later; if it stays so, reset the instance together with its VM",
                kind=ErrorKind.RESOURCE_EXHAUSTED,
            )
        kind = request.WhichOneof("body") or ""
        allowed_s = _TIMEOUTS_S.get(kind, _TIMEOUT_S) + self._store_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(allowed_s):
                await self._room()
                reply = await self._send(request, kind)
        except TimeoutError:
            raise EngineError(
                "WORKER_TIMEOUT",
                f"the instance's worker did not answer {kind} within {allowed_s:g} s",
                subject=str(self.instance),
                remedy="if it stays so, reset the instance together with its VM",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            ) from None
        if reply.HasField("fault"):
            raise _error(reply.fault, str(self.instance))
        return reply

    async def _room(self) -> None:
        """Wait until the worker has taken enough of what it was sent: large requests come faster than it reads."""
        self._unsent += 1
        try:
            while self._transport is not None and self._transport.get_write_buffer_size() > _MAX_UNSENT:
                if self.gone.is_set():
                    break
                await asyncio.sleep(_LOOK_AGAIN_S)
        finally:
            self._unsent -= 1

    def _send(self, request: pb.WorkerRequest, kind: str) -> asyncio.Future[pb.WorkerReply]:
        if self._transport is None or self.gone.is_set():
            raise self._lost()
        self._ids += 1
        request.id = self._ids
        future: asyncio.Future[pb.WorkerReply] = self._loop.create_future()
        # It stays there until its reply comes, even if nobody waits for that any more.
        self._pending[request.id] = validate.outline(request), future
        if kind == "get_keys":
            self._grant("imported")
            if request.get_keys.forget_generation:
                self._grant("identity_touched")
        self._transport.write(frame(request.SerializeToString()))
        return future

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

    async def measure(self, pcr: int, data: bytes, event_type: int, event_data: bytes, origin: Origin) -> tuple[PcrValue, ...]:
        """See RunningTpm."""
        order = pb.Measure(
            pcr=pcr,
            data=data,
            event_type=event_type,
            event_data=event_data,
            origin=pb.Origin.ValueType(origin),
        )
        reply = await self.request(pb.WorkerRequest(measure=order))
        return _values(reply.pcr_values.values)

    async def event_log(self) -> MeasuredLog:
        """See RunningTpm."""
        found = (await self.request(pb.WorkerRequest(get_event_log=pb.GetEventLog()))).event_log
        return MeasuredLog(found.event_log, tuple(origin_of(number) for number in found.origins))

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

    async def prove(self, challenges: Sequence[Challenge]) -> list[bytes]:
        """See RunningTpm."""
        reply = await self.request(pb.WorkerRequest(prove=credentials_of(challenges)))
        return list(reply.activated_credentials.secrets)

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


def misbehaved(subject: str, code: str, text: str) -> EngineError:
    """Return the error of a worker that was ended, as it sent what no worker sends."""
    return EngineError(
        "WORKER_MISBEHAVED",
        f"the worker broke the protocol ({code}: {text}) and was ended; the TPM's volatile state is lost",
        subject=subject,
        remedy=MISBEHAVED_REMEDY.format(subject),
        # A retry is no remedy.
        kind=ErrorKind.INTERNAL,
    )


def _error(fault: pb.Fault, subject: str) -> VtpmError:
    if fault.tpm_rc:
        name = response_code_name(fault.tpm_rc)
        return TpmError(fault.tpm_rc, name, fault.message, subject=subject, remedy=fault.remedy)
    return VtpmError(fault.reason, fault.message, subject=subject, remedy=fault.remedy, kind=ErrorKind(fault.kind))
