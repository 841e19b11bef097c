"""What the API asks of the rooms below, as seams: the composition root passes the real things, tests pass small ones."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from vtpm.instance.model import (
    CreateRequest,
    DrainProgress,
    HostInfo,
    InstanceChange,
    LabelChanges,
    MeasuredLog,
    Origin,
    PcrValue,
    PcrValues,
    QuoteResult,
)
from vtpm.store.model import InstanceRecord
from vtpm.tpm.pcr import PcrSelection


class Instances(Protocol):
    """The heart's one door (vtpm.instance.manager.InstanceManager). Every method raises VtpmError."""

    async def create(self, request: CreateRequest) -> InstanceRecord:
        """Manufacture a new instance, OFF."""

    async def get(self, ref: str) -> InstanceRecord:
        """Return one instance by id, name or `instances/…`."""

    async def list(self, filter_text: str, page_size: int, after: uuid.UUID | None) -> Sequence[InstanceRecord]:
        """Return up to `page_size` instances that match, ordered by id, from behind `after`."""

    async def update_labels(self, ref: str, changes: LabelChanges, revision: int | None) -> InstanceRecord:
        """Change labels."""

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """Power on."""

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        """Power off."""

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """_TPM_Init."""

    async def hibernate(self, ref: str) -> InstanceRecord:
        """Seal an instance that is ON into the store now."""

    def is_hibernated(self, record: InstanceRecord) -> bool:
        """Whether an instance is ON and has no process."""

    def drain(self, timeout_s: float) -> AsyncIterator[DrainProgress]:
        """Let nothing start or wake, hibernate what is awake, and say how far that is."""

    def resume(self) -> None:
        """Let instances start and wake again."""

    async def delete(self, ref: str, *, revision: int | None, allow_missing: bool) -> None:
        """Delete an instance that is OFF or FAILED."""

    def watch(self, filter_text: str) -> AsyncIterator[InstanceChange]:
        """Yield what exists, then SYNCED, then every change."""

    def subscribe(self, callback: Callable[[InstanceChange], None]) -> None:
        """Call `callback` on the event loop with what runs now as EXISTING, then with every change."""

    def subscribe_hibernation(self, callback: Callable[[uuid.UUID], None]) -> None:
        """Call `callback` on the event loop whenever an instance has hibernated."""

    async def host(self) -> HostInfo:
        """Describe what runs here."""

    async def rotate_key(self) -> tuple[str, int]:
        """Make a new key-encryption key; return its id and how many data keys were wrapped anew."""

    def tpm_socket(self, record: InstanceRecord) -> Path:
        """Where the data socket of the swtpm protocol is while the instance is ON."""

    def guest_socket(self, record: InstanceRecord) -> Path:
        """Where the instance's gRPC socket is while it is ON."""

    def control_socket(self, record: InstanceRecord) -> Path:
        """The socket that a VMM connects to."""

    async def execute(self, ref: str, command: bytes, locality: int) -> bytes:
        """Run one raw command; a TPM_RC other than success is in the response."""

    async def read_pcrs(self, ref: str, selections: tuple[PcrSelection, ...]) -> PcrValues:
        """Read PCRs; an empty selection reads all of every allocated bank."""

    async def quote(self, ref: str, selections: tuple[PcrSelection, ...], nonce: bytes) -> QuoteResult:
        """Sign PCRs and `nonce` with the AK."""

    async def measure(
        self, ref: str, pcr: int, data: bytes, event_type: int, event_data: bytes, origin: Origin
    ) -> tuple[PcrValue, ...]:
        """Extend `pcr` in every bank and record the event and that it is `origin`'s."""

    async def event_log(self, ref: str) -> MeasuredLog:
        """Return what was measured since the last reset."""


class ApiSettings(Protocol):
    """What the API reads of vtpm.config.Settings."""

    @property
    def operator_socket(self) -> Path:
        """Where operators connect."""

    @property
    def socket_group(self) -> str:
        """Group that may use the operators' socket; empty for none."""

    @property
    def max_calls(self) -> int:
        """gRPC calls under way at once; guests have half of them at most."""

    @property
    def max_guest_calls(self) -> int:
        """gRPC calls under way at once on one guest socket."""

    @property
    def max_guest_connections(self) -> int:
        """Connections of one guest socket."""

    @property
    def max_all_guest_connections(self) -> int:
        """Connections of all guest sockets together."""

    @property
    def receive_timeout_s(self) -> float:
        """How long a request may take to be there."""

    @property
    def stream_idle_timeout_s(self) -> float:
        """How long a guest's stream may go without a message; 0 for as long as it likes."""

    @property
    def command_rate(self) -> float:
        """Calls a second of a guest; 0 for no bound."""

    @property
    def command_burst(self) -> int:
        """Calls of a guest at once after a pause."""

    @property
    def max_message_size_bytes(self) -> int:
        """Largest request taken."""

    @property
    def otel_endpoint(self) -> str:
        """OTLP endpoint for traces; empty for none."""


class Admission(Protocol):
    """The door of a server (vtpm.api.limits)."""

    def enter(self) -> None:
        """Let a call in; raises VtpmError."""

    def leave(self) -> None:
        """A call that was let in has ended, its answer sent."""

    def seen(self) -> None:
        """GRPC has come with a call, which is not counted yet."""

    def in_vain(self) -> None:
        """A call was refused, or given up before its answer."""

    def untaken(self) -> None:
        """An answer was not taken in time."""


class RequestMetrics(Protocol):
    """What the API reports (vtpm.metrics.Metrics)."""

    def observe_request(self, method: str, code: str, seconds: float) -> None:
        """Count one gRPC call."""
