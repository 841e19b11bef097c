"""What the daemon asks of a worker: manufacture, load, commands, quotes, measurements; each between two guest commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from vtpm.crashpoints import crash_point
from vtpm.engine.events import EventLog, origin_of
from vtpm.engine.exits import EXIT_STOPPED, Exit
from vtpm.engine.provisioning import Provisioning
from vtpm.engine.stats import UNKNOWN_ORDINAL
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, TpmError, VtpmError
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.ptm import ControlCommand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vtpm.engine.channels import DataChannels
    from vtpm.engine.durable import DurableState
    from vtpm.engine.hibernation import Hibernation
    from vtpm.engine.operations import ManufacturedKey, Operations
    from vtpm.engine.software import SoftwareTpm

_NEED_POWER: Final = frozenset(
    ("read_pcrs", "quote", "measure", "get_event_log", "get_keys", "hash_sequence", "write_nv", "read_nv", "prove")
)
_RUN_COMMANDS: Final = _NEED_POWER | {"execute"}
# Change nothing but the clock. A quote is none of them: to libtpms it makes a TPM2_Shutdown void.
_READ: Final = frozenset(("read_pcrs", "get_event_log", "get_keys", "get_status", "read_nv"))


class Power(Protocol):
    """What the duties ask of the worker's loop."""

    @property
    def attached(self) -> bool:
        """Whether a VM's control connection is open."""

    @property
    def imported(self) -> bool:
        """Whether a state was set by the VM's side."""

    # Whether power is taken from the TPM as it is, without a TPM2_Shutdown.
    without_shutdown: bool

    def hash_sequence(self, command: ControlCommand, data: bytes) -> int:
        """A part of an H-CRTM event; a TPM_RESULT."""

    def turn_on(self, permanent: bytes) -> None:
        """_TPM_Init."""

    def go_on(self, permanent: bytes, snapshot: pb.Snapshot) -> None:
        """Take the TPM and the loop to where another worker stopped."""

    def gone_on(self) -> None:
        """The snapshot is used up."""

    def start_up(self, ak_algorithm: KeyAlgorithm | None) -> None:
        """What firmware does after that."""

    def before_power_loss(self) -> None:
        """TPM2_Shutdown, if the TPM has gone on since the last one."""

    def shut_down(self) -> None:
        """The same for good, made durable if the store takes it."""

    def listen(self) -> None:
        """Begin to serve the VM's sockets."""

    def keys_told(self) -> None:
        """The daemon knows the keys of now: what is imported later is told again."""


class Duties:
    """Serves one request after the other."""

    def __init__(
        self,
        tpm: SoftwareTpm,
        operations: Operations,
        durable: DurableState,
        channels: DataChannels,
        power: Power,
        hibernation: Hibernation,
    ) -> None:
        self._tpm = tpm
        self._operations = operations
        self._durable = durable
        self._channels = channels
        self._power = power
        self._hibernation = hibernation
        self._events = EventLog()
        # The AK that a TPM without one gets when the service starts it.
        self._ak_algorithm: KeyAlgorithm | None = None
        self._requests: dict[str, Callable[[pb.WorkerRequest, pb.WorkerReply], None]] = {
            "manufacture": self._manufacture,
            "load": self._load,
            "execute": self._execute,
            "read_pcrs": self._read_pcrs,
            "quote": self._quote,
            "measure": self._measure,
            "get_event_log": self._get_event_log,
            "reset": self._reset,
            "hash_sequence": self._hash_sequence,
            "get_status": self._get_status,
            "get_keys": self._get_keys,
            "stop": self._stop,
            "hibernate": self._hibernate,
        }
        self.provisioning = Provisioning(tpm, operations, durable)
        self._requests |= self.provisioning.requests

    def forget(self) -> None:
        """Forget what was measured; PCRs are fresh after each power on."""
        self._operations.forget()
        self._events.clear()

    def fill(self, snapshot: pb.Snapshot) -> None:
        """Put into a snapshot what was measured."""
        self._events.fill(snapshot)
        snapshot.ak_algorithm, snapshot.ak_rc = self._ak_algorithm or "", self._operations.ak_rc

    def hashed(self, digests: Sequence[bytes]) -> None:
        """Record an H-CRTM event; after TPM2_Startup it is a dynamic launch, which is no part of the boot."""
        if not self._operations.started():
            self._events.h_crtm(digests)

    def serve(self, message: bytes) -> tuple[bytes, int | None]:
        """Serve one request; return the reply, and the exit status if it was the last."""
        request = pb.WorkerRequest.FromString(message)
        reply = pb.WorkerReply(id=request.id)
        kind = request.WhichOneof("body") or ""
        if kind == "get_keys":
            # Also if it can't be answered yet: who asks knows that there is something to ask for.
            self._power.keys_told()
        last: int | None = None
        if kind == "get_status":
            # Asked for again and again, and no sign of life; a good moment to see whether there was any.
            self._hibernation.consider()
        else:
            self._hibernation.requests += 1
        try:
            if kind in _NEED_POWER:
                self._check_powered()
            if kind in _RUN_COMMANDS:
                self._channels.run_before_next()
            self._requests[kind](request, reply)
        except Exit as end:
            if end.status != EXIT_STOPPED:
                raise
            last = end.status
        except VtpmError as error:
            reply = pb.WorkerReply(id=request.id, fault=_fault(error))
        except (KeyError, ValueError) as error:
            fault = pb.Fault(kind="INTERNAL", reason="WORKER_REQUEST_INVALID", message=type(error).__name__)
            reply = pb.WorkerReply(id=request.id, fault=fault)
        # Also when the operation failed half-way: what the TPM did is done.
        self._durable.settle(reading=kind in _READ)
        return reply.SerializeToString(), last

    def _check_powered(self) -> None:
        if not self._channels.powered:
            raise FailedPreconditionError(
                "TPM_NOT_POWERED", "the VM has not initialised its TPM yet, or has stopped it", remedy="wait until the VM boots"
            )

    # ---- life ------------------------------------------------------------------------------------------------------------

    def _manufacture(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        from vtpm.engine.operations import manufacture

        order = request.manufacture
        keys = manufacture(
            self._tpm,
            self._operations,
            [KeyAlgorithm(name) for name in order.ek_algorithms],
            KeyAlgorithm(order.ak_algorithm),
            [PcrBank.from_name(name) for name in order.pcr_banks],
            hold=order.hold,
        )
        keys += [self._operations.make_extra_key(KeyAlgorithm(key.algorithm), key.handle) for key in order.extra_keys]
        if order.hold:
            reply.manufactured.properties.CopyFrom(self.provisioning.properties())
        else:
            reply.manufactured.sealed = self._durable.seal_first(order)
        crash_point("worker.after_manufacture")
        _add_keys(reply.manufactured, keys)

    def _load(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.load
        permanent = self._durable.open(order)
        crash_point("worker.after_unseal")
        self._channels.limit(
            command_rate=order.command_rate, command_burst=order.command_burst, max_connections=order.max_connections
        )
        self._hibernation.after(order.idle_timeout_ms / 1000)
        reply.loaded.SetInParent()
        self._power.without_shutdown = order.without_shutdown
        self._ak_algorithm = KeyAlgorithm(order.ak_algorithm) if order.ak_algorithm else None
        if order.snapshot:
            snapshot = self._hibernation.wake(self._durable.open_snapshot(order))
            self._power.go_on(permanent, snapshot)
            self._events.restore(snapshot)
            self._ak_algorithm = KeyAlgorithm(snapshot.ak_algorithm) if snapshot.ak_algorithm else None
            self._operations.ak_rc = snapshot.ak_rc
            # Invariant 2: forgotten durably before the first command runs.
            self._durable.finish_consume(order.snapshot_token)
            self._power.gone_on()
        elif order.without_init:
            self._tpm.permanent = permanent
        else:
            self._power.turn_on(permanent)
            if order.startup_clear:
                self._power.start_up(self._ak_algorithm)
        self._power.listen()

    def _reset(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        self._power.before_power_loss()
        assert self._tpm.permanent is not None
        self._power.turn_on(self._tpm.permanent)
        if request.reset.startup_clear:
            self._power.start_up(self._ak_algorithm)
        reply.done.SetInParent()

    def _stop(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        self._power.shut_down()
        reply.done.SetInParent()
        raise Exit(EXIT_STOPPED)

    def _hibernate(self, _request: pb.WorkerRequest, _reply: pb.WorkerReply) -> None:
        self._hibernation.hibernate_now()

    def _get_status(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.status.epoch, reply.status.version = self._durable.epoch, self._durable.version
        reply.status.attached = self._power.attached
        reply.status.imported = self._power.imported
        reply.status.loaded = self._durable.ready
        reply.status.identity_touched = bool(self._durable.identity_ordinals)
        if request.get_status.counts:
            self._channels.stats.drain(reply.status)

    # ---- the TPM ---------------------------------------------------------------------------------------------------------

    def _execute(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        command, tpm = request.execute.command, self._tpm
        if len(command) > MAX_COMMAND_SIZE:
            raise InvalidArgumentError("COMMAND_TOO_LARGE", f"a command has at most {MAX_COMMAND_SIZE} bytes")
        guest_locality, tpm.locality = tpm.locality, request.execute.locality
        try:
            tpm.command[: len(command)] = command
            ordinal = HEADER.unpack_from(command)[2] if len(command) >= HEADER_SIZE else UNKNOWN_ORDINAL
            reply.executed.response = bytes(self._channels.execute(len(command), ordinal))
        finally:
            tpm.locality = guest_locality

    def _hash_sequence(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        if self._power.attached:
            raise FailedPreconditionError(
                "INSTANCE_IN_USE", "the H-CRTM event of a VM that runs is that VM's alone", remedy="end the VM"
            )
        order = request.hash_sequence
        if result := self._power.hash_sequence(ControlCommand(order.command), order.data):
            raise FailedPreconditionError("HASH_REFUSED", f"the TPM refuses the H-CRTM event with TPM_RESULT 0x{result:x}")
        reply.done.SetInParent()

    def _get_keys(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.keys.SetInParent()
        _add_keys(reply.keys, self._operations.keys())
        if request.get_keys.forget_generation:
            self._durable.forget_identity(request.get_keys.forget_generation)
        reply.keys.identity_ordinals.extend(sorted(self._durable.identity_ordinals))
        reply.keys.identity_generation = self._durable.identity_generation
        reply.keys.pcr_banks.extend(bank.hash_name for bank in self._operations.banks())

    def _read_pcrs(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        counter, values = self._operations.read_pcrs(_selections(request.read_pcrs.selections))
        reply.pcr_values.update_counter = counter
        for bank, index, digest in values:
            reply.pcr_values.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _quote(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        selections = _selections(request.quote.selections)
        # No guest command can run in between: these are the values that get signed.
        _, values = self._operations.read_pcrs(selections)
        attest, signature, public = self._operations.quote(selections, request.quote.nonce, from_elsewhere=self._power.imported)
        reply.quoted.attest, reply.quoted.signature, reply.quoted.ak_tpmt_public = attest, signature, public
        for bank, index, digest in values:
            reply.quoted.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _measure(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.measure
        banks = self._operations.banks()
        origin = origin_of(order.origin)
        self._events.check_room(origin, banks, order.event_data)
        digests = self._operations.extend(order.pcr, order.data)
        self._events.add(origin, order.pcr, order.event_type, digests, order.event_data)
        _, values = self._operations.read_pcrs([PcrSelection(bank, (order.pcr,)) for bank in banks])
        for bank, index, digest in values:
            reply.pcr_values.values.add(hash_alg=bank.alg_id, index=index, digest=digest)

    def _get_event_log(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.event_log.event_log = self._events.bytes_for(self._operations.banks())
        reply.event_log.origins.extend(pb.Origin.ValueType(origin) for origin in self._events.origins)


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
