"""The seam: what the instance room asks of a software TPM. libtpms workers and `tpm_server` stand behind it."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vtpm.engine.events import Origin
from vtpm.engine.identity import Certify, Challenge, ExtraKey, Recertify, TouchedKeys
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.store.commits import AnyCommit
from vtpm.store.model import KeyRecord, ProfileRecord, SealedState
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.ptm import ControlCommand

# Makes state commits durable together; one answer each, empty or the reason of the refusal (vtpm.store.Store.commit).
CommitFunction = Callable[[Sequence[AnyCommit]], Sequence[str]]
# An instance, an epoch, and the version of a snapshot that was taken under it.
Claim = tuple[uuid.UUID, int, int]


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine can do; `available` says whether it can serve on this host."""

    name: str
    version: str
    hibernation: bool
    available: bool


@dataclass(frozen=True, slots=True)
class Manufactured:
    """A new TPM: its permanent state, sealed for epoch 0 and version 1, and the keys made in it."""

    sealed: bytes
    keys: tuple[KeyRecord, ...]


@dataclass(frozen=True, slots=True)
class PowerOn:
    """What an engine needs to run an instance. `data_key` opens `state` and seals what follows it, under `epoch`."""

    instance: uuid.UUID
    epoch: int
    state: SealedState
    data_key: bytes
    startup_clear: bool
    listeners: Listeners | None
    # Leave _TPM_Init to the VM's control channel.
    without_init: bool = False
    # With `startup_clear`: the AK that is made if the TPM has none.
    ak_algorithm: str = ""
    # Without a command for so long the TPM hibernates; 0: never by itself.
    idle_timeout_s: float = 0


@dataclass(frozen=True, slots=True)
class Thaw:
    """What an engine needs to go on with a hibernated instance: its permanent state and the snapshot of it, both sealed.

    `token`, 16 bytes: who goes on from the snapshot. With the same token another worker may, until one has run a command.
    """

    instance: uuid.UUID
    epoch: int
    state: SealedState
    snapshot: SealedState = field(repr=False)
    token: bytes = field(repr=False)
    data_key: bytes = field(repr=False)
    idle_timeout_s: float = 0


@dataclass(frozen=True, slots=True)
class Parked:
    """A hibernated instance whose sockets and connections the engine keeps.

    `attached`: a VM's control connection is among them; `woken`: something has come on them already.
    """

    instance: uuid.UUID
    epoch: int
    attached: bool
    woken: bool = False


@dataclass(frozen=True, slots=True)
class Listeners:
    """The VM's listening sockets: the data socket of the swtpm protocol and its control twin; the engine takes both."""

    data: socket.socket
    control: socket.socket


@dataclass(frozen=True, slots=True)
class Adopted:
    """A TPM that ran on while there was no daemon."""

    instance: uuid.UUID
    epoch: int
    tpm: RunningTpm


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an engine found at its start: TPMs that ran on, hibernated ones, and (instance, epoch) of those that their VMs
    powered off."""

    adopted: Sequence[Adopted]
    powered_off: frozenset[tuple[uuid.UUID, int]]
    parked: Sequence[Parked] = ()


@dataclass(frozen=True, slots=True)
class PcrValue:
    """One PCR of one bank; `digest` has the bank's digest size in bytes."""

    bank: PcrBank
    index: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class PcrValues:
    """PCR values read in one go, with the TPM's PCR update counter."""

    values: tuple[PcrValue, ...]
    update_counter: int


@dataclass(frozen=True, slots=True)
class Quoted:
    """TPMS_ATTEST, TPMT_SIGNATURE, the signing key's TPMT_PUBLIC, and the PCR values that were signed."""

    attest: bytes
    signature: bytes
    ak_tpmt_public: bytes
    values: tuple[PcrValue, ...]


@dataclass(frozen=True, slots=True)
class MeasuredLog:
    """A crypto-agile event log, and whose each event in it is: in its order, without the Spec ID record.

    Both are the worker's word. What the log says of a PCR is proven by a quote; whose the events are is not.
    """

    event_log: bytes
    origins: tuple[Origin, ...]


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a TPM is gone that was not told to stop; for InstanceRecord.failure."""

    reason: str
    message: str
    remedy: str


class EngineEvents(Protocol):
    """Whom an engine tells what nobody asked for; called on the event loop."""

    def ended(self, instance: uuid.UUID, epoch: int, loss: Loss | None) -> None:
        """A TPM is gone that was not told to stop; without a `loss` its VM has powered it off."""

    def imported(self, instance: uuid.UUID, epoch: int) -> None:
        """The VM's side has put another TPM's state in the place of the instance's."""

    def hibernated(self, parked: Parked) -> None:
        """A TPM has gone into the store; nothing of it runs."""

    def wanted(self, instance: uuid.UUID, epoch: int) -> None:
        """Something has come for a hibernated TPM."""

    def parking_lost(self, instance: uuid.UUID, epoch: int) -> None:
        """The connections of a hibernated TPM are gone with the engine host; its state is in the store."""

    def identity_touched(self, instance: uuid.UUID, epoch: int) -> None:
        """The VM's side has run a command that may end a key's life; `RunningTpm.identity` says which."""


class RunningTpm(Protocol):
    """A powered-on TPM. Every method raises EngineError when the TPM is gone and TpmError when it refuses."""

    async def execute(self, command: bytes, locality: int) -> bytes:
        """Run one raw command; a TPM_RC other than success is in the response."""

    async def read_pcrs(self, selections: Sequence[PcrSelection]) -> PcrValues:
        """Read PCRs; an empty selection reads all of every allocated bank."""

    async def quote(self, selections: Sequence[PcrSelection], nonce: bytes) -> Quoted:
        """Sign PCRs and `nonce` (at most 64 bytes) with the AK."""

    async def measure(self, pcr: int, data: bytes, event_type: int, event_data: bytes, origin: Origin) -> tuple[PcrValue, ...]:
        """Extend `pcr` with the digests of `data`, record the event and that it is `origin`'s, return the new values."""

    async def event_log(self) -> MeasuredLog:
        """Return what was measured since the last reset."""

    async def reset(self, *, startup_clear: bool) -> None:
        """_TPM_Init: volatile state is dropped."""

    async def hash_sequence(self, command: ControlCommand, data: bytes) -> None:
        """HASH_START, HASH_DATA or HASH_END: a part of an H-CRTM event."""

    async def status(self, *, counts: bool = False) -> pb.Status:
        """Say whether a VM's control connection is open; with `counts`, return and clear the command counts."""

    async def keys(self) -> tuple[tuple[KeyRecord, ...], tuple[str, ...]]:
        """Return the persistent EKs and the AK, and the names of the PCR banks, as the TPM has them now."""

    async def identity(self) -> TouchedKeys:
        """Return the keys, and the commands that may have changed them."""

    async def forget_identity(self, generation: int) -> None:
        """What `identity` gave with this generation is dealt with; what came since is told anew."""

    async def write_nv(self, index: int, data: bytes) -> None:
        """Write an index that has an auth value of the service's, between two guest commands; zeros follow `data`."""

    async def read_nv(self, index: int, *, secret_auth: bool = False) -> bytes:
        """Read an index by its own auth, which is empty or the service's."""

    async def prove(self, challenges: Sequence[Challenge]) -> list[bytes]:
        """Return the secret of each credential, as the TPM opens it between two guest commands (invariant 5)."""

    async def attach(self, connection: socket.socket) -> None:
        """Serve a control connection of the VM, whose end powers the TPM off."""

    async def hibernate(self) -> None:
        """Go into the store now. Raises INSTANCE_BUSY if it can't; else the TPM is gone, as EngineEvents.hibernated says."""

    async def stop(self) -> None:
        """Power off; returns when the TPM is gone."""


class Engine(Protocol):
    """Makes and runs TPMs."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do."""

    async def start(self, events: EngineEvents) -> Recovered:
        """Begin; return what happened without a daemon."""

    async def manufacture(
        self,
        instance: uuid.UUID,
        profile: ProfileRecord,
        data_key: bytes,
        *,
        certify: Certify | None = None,
        extra_keys: Sequence[ExtraKey] = (),
        nice: int = 0,
    ) -> Manufactured:
        """Make a new TPM and return it sealed; nothing of it runs on. `certify` is asked what its NV holds."""

    async def reprovision(self, instance: uuid.UUID, state: SealedState, data_key: bytes, certify: Recertify) -> SealedState:
        """Define and write NV indices anew in a TPM that does not run; return its state at the next version of its epoch.

        `certify` is asked which, and may have the TPM prove its keys before it says so.
        """

    async def power_on(self, order: PowerOn) -> RunningTpm:
        """Run a TPM from its sealed state.

        Raises:
            SealedStateError: the state can't be opened; nothing was made in its place.
            EngineError: the engine failed.
        """

    async def thaw(self, order: Thaw) -> RunningTpm:
        """Go on with a hibernated TPM, with the connections that it had.

        Raises:
            SealedStateError: the state or the snapshot can't be opened; nothing was made in their place.
            EngineError: the engine failed.
        """

    async def park(self, parked: Parked, listeners: Listeners) -> None:
        """Watch new listening sockets of a hibernated TPM whose connections were lost."""

    async def forget(self, instance: uuid.UUID) -> None:
        """Close what is kept of a hibernated TPM."""

    async def hold(self) -> None:
        """Have nothing ready for TPMs that wake, until `release`."""

    def release(self) -> None:
        """End `hold`."""

    async def close(self) -> None:
        """Let go: what runs, runs on."""
