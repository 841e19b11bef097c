"""An in-memory stand-in for the instance room. The TPM is not what is tested here, so it only echoes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from vtpm.errors import ConflictError, FailedPreconditionError, NotFoundError
from vtpm.instance.model import (
    ChangeKind,
    CreateRequest,
    EngineCapabilities,
    HostInfo,
    InstanceChange,
    LabelChanges,
    PcrValue,
    PcrValues,
    QuoteResult,
)
from vtpm.store.filter import parse_filter
from vtpm.store.model import Failure, InstanceRecord, InstanceState, KeyRecord, ProfileRecord
from vtpm.tpm.pcr import PcrBank, PcrSelection

TIME = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
SECRET = "hunter2-data-key-bytes"


def ak_public() -> bytes:
    """A TPMT_PUBLIC of a P-256 signing key (TPM 2.0 Library, Part 2, 12.2.4)."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    point = b"".join(b"\0\x20" + value.to_bytes(32, "big") for value in (numbers.x, numbers.y))
    head = bytes.fromhex("0023000b000504720000")
    return head + bytes.fromhex("00100018000b00030010") + point


AK_PUBLIC = ak_public()


def a_record(name: str = "web-1", **changes: object) -> InstanceRecord:
    record = InstanceRecord(
        id=uuid.uuid4(),
        name=name,
        labels={"team": "web"},
        state=InstanceState.OFF,
        failure=None,
        profile=ProfileRecord(("RSA_2048", "ECC_P384"), "ECC_P256", ("sha256", "sha384")),
        keys=(KeyRecord("AK", "ECC_P256", 0x81800003, AK_PUBLIC),),
        engine="libtpms",
        epoch=0,
        boot_id="",
        revision=1,
        created_at=TIME,
        updated_at=TIME,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


A_FAILURE = Failure("WORKER_LOST", "the worker ended", "vtpm instance reset web-1", TIME)


@dataclass(frozen=True)
class Settings:
    """What the API reads of vtpm.config.Settings."""

    runtime_dir: Path
    socket_group: str = ""
    max_message_size_bytes: int = 4 << 20
    otel_endpoint: str = ""

    @property
    def operator_socket(self) -> Path:
        return self.runtime_dir / "operator.sock"


class RecordedMetrics:
    """Keeps what was observed."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []

    def observe_request(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((method, code))


class FakeInstances:
    """The instance room's door, over a dict. `trouble` is raised by every TPM operation while it is set."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self.records: dict[uuid.UUID, InstanceRecord] = {}
        self.created: list[CreateRequest] = []
        self.executed: list[tuple[str, bytes, int]] = []
        self.measured: list[tuple[str, int, bytes, int, bytes]] = []
        self.label_changes: list[LabelChanges] = []
        self.starts: list[bool] = []
        self.trouble: Exception | None = None
        # Cleared by a test that wants operations to hang until it sets it again.
        self.go = asyncio.Event()
        self.go.set()
        self.entered = asyncio.Event()
        self.finished = 0
        self._callbacks: list[Callable[[InstanceChange], None]] = []
        self._queues: list[asyncio.Queue[InstanceChange]] = []

    def add(self, record: InstanceRecord) -> InstanceRecord:
        self.records[record.id] = record
        return record

    def change(self, record: InstanceRecord, kind: ChangeKind = "UPDATED") -> InstanceRecord:
        """Take over `record` and tell everybody."""
        if kind == "DELETED":
            self.records.pop(record.id, None)
        else:
            self.records[record.id] = record
        if record.state is InstanceState.ON:
            (self._runtime_dir / "instances" / str(record.id)).mkdir(mode=0o700, parents=True, exist_ok=True)
        for callback in self._callbacks:
            callback(InstanceChange(kind, record))
        for queue in self._queues:
            queue.put_nowait(InstanceChange(kind, record))
        return record

    def power(self, record: InstanceRecord, state: InstanceState) -> InstanceRecord:
        record = self.records.get(record.id, record)
        on = state is InstanceState.ON
        return self.change(
            dataclasses.replace(record, state=state, epoch=record.epoch + on, revision=record.revision + 1, failure=None)
        )

    async def _work(self) -> None:
        self.entered.set()
        await self.go.wait()
        if self.trouble is not None:
            raise self.trouble
        self.finished += 1

    async def create(self, request: CreateRequest) -> InstanceRecord:
        self.created.append(request)
        await self._work()
        return self.change(a_record(request.name or "made-up", labels=request.labels), "CREATED")

    async def get(self, ref: str) -> InstanceRecord:
        await self._work()
        for record in self.records.values():
            if ref.removeprefix("instances/") in (str(record.id), record.name):
                return record
        raise NotFoundError("INSTANCE_NOT_FOUND", "there is no such instance", subject=ref, remedy="vtpm instance list")

    async def list(self, filter_text: str, page_size: int, after: uuid.UUID | None) -> Sequence[InstanceRecord]:
        wanted = parse_filter(filter_text)
        records = sorted((r for r in self.records.values() if wanted.matches(r)), key=lambda record: record.id.bytes)
        return [record for record in records if after is None or record.id.bytes > after.bytes][:page_size]

    async def update_labels(self, ref: str, changes: LabelChanges, revision: int | None) -> InstanceRecord:
        record = await self.get(ref)
        if revision not in (None, record.revision):
            raise ConflictError("ETAG_MISMATCH", "the instance was changed meanwhile", subject=record.name)
        self.label_changes.append(changes)
        return self.change(dataclasses.replace(record, labels=changes.set, revision=record.revision + 1))

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        self.starts.append(startup_clear)
        return self.power(await self.get(ref), InstanceState.ON)

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        return self.power(await self.get(ref), InstanceState.OFF)

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        return await self.start(ref, startup_clear=startup_clear, revision=revision)

    async def delete(self, ref: str, *, revision: int | None, allow_missing: bool) -> None:
        self.change(await self.get(ref), "DELETED")

    async def watch(self, filter_text: str) -> AsyncIterator[InstanceChange]:
        queue: asyncio.Queue[InstanceChange] = asyncio.Queue()
        self._queues.append(queue)
        try:
            for record in list(self.records.values()):
                yield InstanceChange("EXISTING", record)
            yield InstanceChange("SYNCED", None)
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)

    @property
    def watchers(self) -> int:
        return len(self._queues)

    def subscribe(self, callback: Callable[[InstanceChange], None]) -> None:
        for record in self.records.values():
            if record.state is InstanceState.ON:
                callback(InstanceChange("EXISTING", record))
        self._callbacks.append(callback)

    async def host(self) -> HostInfo:
        return HostInfo(
            version="0.1.0",
            engines=(EngineCapabilities("libtpms", "0.9.2", True, True),),
            counts={"ON": 1, "OFF": 2},
            key_provider="file",
            key_id="k1",
            start_time=TIME,
            state_dir=Path("/var/lib/vtpm"),
            runtime_dir=self._runtime_dir,
            engine_host_pid=4711,
        )

    async def rotate_key(self) -> tuple[str, int]:
        await self._work()
        return "k2", 3

    def _socket(self, record: InstanceRecord, name: str) -> Path | None:
        return self._runtime_dir / "instances" / str(record.id) / name if record.state is InstanceState.ON else None

    def tpm_socket(self, record: InstanceRecord) -> Path | None:
        return self._socket(record, "tpm.sock")

    def guest_socket(self, record: InstanceRecord) -> Path | None:
        return self._socket(record, "guest.sock")

    async def _on(self, ref: str) -> InstanceRecord:
        record = await self.get(ref)
        if record.state is not InstanceState.ON:
            raise FailedPreconditionError("INSTANCE_NOT_ON", "the instance is OFF", subject=record.name)
        return record

    async def execute(self, ref: str, command: bytes, locality: int) -> bytes:
        record = await self._on(ref)
        self.executed.append((record.name, command, locality))
        return command[::-1]

    async def read_pcrs(self, ref: str, selections: tuple[PcrSelection, ...]) -> PcrValues:
        await self._on(ref)
        return PcrValues(tuple(PcrValue(s.bank, i, bytes(s.bank.digest_size)) for s in selections for i in s.indices), 21)

    async def quote(self, ref: str, selections: tuple[PcrSelection, ...], nonce: bytes) -> QuoteResult:
        record = await self._on(ref)
        return QuoteResult(b"attest of " + record.name.encode() + nonce, b"signature", AK_PUBLIC, ())

    async def measure(self, ref: str, pcr: int, data: bytes, event_type: int, event_data: bytes) -> tuple[PcrValue, ...]:
        record = await self._on(ref)
        self.measured.append((record.name, pcr, data, event_type, event_data))
        return (PcrValue(PcrBank.SHA256, pcr, bytes(32)),)

    async def event_log(self, ref: str) -> bytes:
        return b"log of " + (await self._on(ref)).name.encode()
