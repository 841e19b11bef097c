"""The heart's one door: everything that the API can ask of instances."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from vtpm import __version__
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import ConflictError, FailedPreconditionError, InvalidArgumentError, NotFoundError, StoreError, VtpmError
from vtpm.instance.authority_key import rewrap_authority_key
from vtpm.instance.creation import Creation, Wanted
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.maintenance import Maintenance
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
from vtpm.instance.pool import InstancePool
from vtpm.instance.quotes import check_signer, unsigned
from vtpm.instance.running import Running
from vtpm.instance.validation import (
    check_labels,
    check_name,
    check_request_id,
    fingerprint,
    make_platform,
    make_profile,
)
from vtpm.instance.watch import read_changes
from vtpm.seal.keys import WrappedKey
from vtpm.store.filter import parse_filter
from vtpm.store.model import Filter, InstanceRecord, InstanceState
from vtpm.store.row_key import rewrap_row_key
from vtpm.store.rows import is_refused
from vtpm.tpm.pcr import PcrSelection
from vtpm.tpm.ptm import ControlCommand

log: Final = structlog.get_logger("vtpm.instance")

_PAGE_SIZE: Final = 500
_COUNTS_TIMEOUT_S: Final = 5.0


class InstanceManager:
    """Creates, finds and changes instances, and speaks to their TPMs. Used from the event loop only."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        creation: Creation,
        *,
        default_engine: str,
        state_dir: Path,
        runtime_dir: Path,
        engine_host_pid: Callable[[], int],
    ) -> None:
        self._lifecycle = lifecycle
        self._store = lifecycle.store
        self._keys = lifecycle.keys
        self._hub = lifecycle.hub
        self._default_engine = default_engine
        self._state_dir = state_dir
        self._runtime_dir = runtime_dir
        self._engine_host_pid = engine_host_pid
        self._start_time = dt.datetime.now(dt.UTC)
        self._creation = creation
        # TPMs made ahead; None: there are none.
        self.pool: InstancePool | None = None
        self._creating: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._rotating = False
        self.maintenance = Maintenance(lifecycle)
        # Wraps the anchor's secret anew (vtpm.instance.freshness), before the old key-encryption key is destroyed.
        self.rewrap_anchor: Callable[[], Awaitable[None]] | None = None

    # ---- resources -------------------------------------------------------------------------------------------------------

    async def create(self, request: CreateRequest) -> InstanceRecord:
        """Manufacture a new instance, OFF. With a `request_id`, a retry returns the instance of the first call.

        Raises:
            InvalidArgumentError: a field is malformed, or the request_id was used for another request.
            AlreadyExistsError: INSTANCE_NAME_TAKEN.
        """
        request_id = check_request_id(request.request_id)
        lock = self._creating.setdefault(request_id, asyncio.Lock()) if request_id else asyncio.Lock()
        async with lock:
            return await self._create(request, request_id)

    async def _create(self, request: CreateRequest, request_id: str) -> InstanceRecord:
        profile = make_profile(request)
        platform = make_platform(request.platform, self._creation.identity.platform)
        wanted = Wanted(
            name=check_name(request.name) if request.name else "",
            labels=check_labels(request.labels),
            engine=request.engine or self._default_engine,
            profile=profile,
            platform=platform,
            request_id=request_id,
            fingerprint=fingerprint(request, profile),
        )
        self._lifecycle.engine(wanted.engine)
        if request_id and (made := await self._lifecycle.blocking(self._store.find_request, request_id)) is not None:
            if made[1] != wanted.fingerprint:
                raise InvalidArgumentError(
                    "REQUEST_ID_REUSED", "this request_id was used for another request", remedy="use a new request_id"
                )
            return await self.get(str(made[0]))
        record = await self.pool.claim(wanted) if self.pool is not None else None
        if record is None:
            record = await self._creation.create(wanted)
            self._creation.identity.metrics.count_creation("cold")
        log.info("instance.created", instance=str(record.id), name=record.name, engine=record.engine)
        self._hub.publish("CREATED", record)
        return record

    async def get(self, ref: str) -> InstanceRecord:
        """Return one instance by id, name or `instances/…`."""
        return await self._lifecycle.blocking(self._store.get, ref)

    async def list(self, filter_text: str, page_size: int, after: uuid.UUID | None) -> list[InstanceRecord]:
        """Return up to `page_size` instances that match, ordered by id, from behind `after`."""
        return await self._lifecycle.blocking(self._store.list, parse_filter(filter_text), page_size, after)

    async def update_labels(self, ref: str, changes: LabelChanges, revision: int | None) -> InstanceRecord:
        """Change labels."""
        record = await self.get(ref)
        async with self._lifecycle.lock(record.id):
            record = await self.get(str(record.id))
            labels = {} if changes.replace else dict(record.labels)
            labels.update(changes.set)
            for key in changes.remove:
                labels.pop(key, None)
            record = await self._lifecycle.blocking(self._store.set_labels, record.id, check_labels(labels), revision)
            self._lifecycle.refresh(record)
            self._hub.publish("UPDATED", record)
            return record

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """See Lifecycle.start."""
        return await self._lifecycle.start(ref, startup_clear=startup_clear, revision=revision)

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        """See Lifecycle.stop."""
        return await self._lifecycle.stop(ref, revision=revision)

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        """See Lifecycle.reset."""
        return await self._lifecycle.reset(ref, startup_clear=startup_clear, revision=revision)

    async def hibernate(self, ref: str) -> InstanceRecord:
        """Seal an instance that is ON into the store now; one that hibernates already is returned as it is.

        Raises:
            FailedPreconditionError: INSTANCE_NOT_ON or INSTANCE_BUSY.
        """
        running = await self._tpm(ref)
        await running.tpm.hibernate()
        return running.record

    def is_hibernated(self, record: InstanceRecord) -> bool:
        """Whether an instance is ON and has no process."""
        running = self._lifecycle.by_id(record.id)
        return running is not None and running.tpm.asleep

    async def delete(self, ref: str, *, revision: int | None, allow_missing: bool) -> None:
        """Delete an instance that is OFF or FAILED; its data key goes first."""
        try:
            record = await self.get(ref)
        except NotFoundError:
            if allow_missing:
                return
            raise
        async with self._lifecycle.lock(record.id):
            await self._lifecycle.settled(record.id)
            if is_refused(record) and self._lifecycle.by_id(record.id) is not None:
                # Its row does not say whether it runs.
                raise FailedPreconditionError(
                    "INSTANCE_ON", "an instance that runs can't be deleted", subject=record.name,
                    remedy=f"vtpm instance stop {record.name}",
                )  # fmt: skip
            try:
                record = await self._lifecycle.blocking(self._store.delete, record.id, revision)
            except StoreError as error:
                if error.reason == "ERASURE_PENDING":
                    self._deleted(record)
                raise
        self._deleted(record)

    def _deleted(self, record: InstanceRecord) -> None:
        self._lifecycle.sockets.delete(record.id)
        log.info("instance.deleted", instance=str(record.id), name=record.name)
        self._hub.publish("DELETED", record)

    async def watch(self, filter_text: str) -> AsyncIterator[InstanceChange]:
        """Yield what exists, then SYNCED, then every change to an instance that matches."""
        wanted = parse_filter(filter_text)
        with self._hub.queue() as queue:
            after: uuid.UUID | None = None
            while page := await self._lifecycle.blocking(self._store.list, wanted, _PAGE_SIZE, after):
                for record in page:
                    yield InstanceChange("EXISTING", record)
                after = page[-1].id
            yield InstanceChange("SYNCED", None)
            async for change in read_changes(queue):
                if change.record is not None and wanted.matches(change.record):
                    yield change

    def subscribe(self, callback: Callable[[InstanceChange], None]) -> None:
        """Call `callback` on the event loop with every change, beginning with what runs now as EXISTING."""
        for running in self._lifecycle.all_running():
            callback(InstanceChange("EXISTING", running.record))
        self._hub.subscribe(callback)

    def subscribe_hibernation(self, callback: Callable[[uuid.UUID], None]) -> None:
        """Call `callback` on the event loop whenever an instance has hibernated."""
        self._lifecycle.thaws.on_hibernated.append(callback)

    # ---- the host --------------------------------------------------------------------------------------------------------

    async def host(self) -> HostInfo:
        """Describe what runs here."""
        counts = await self._lifecycle.blocking(self._store.counts)
        return HostInfo(
            version=__version__,
            engines=tuple(engine.capabilities for engine in self._lifecycle.engines.values()),
            counts={state.value: counts.get(state, 0) for state in InstanceState},
            key_provider=self._keys.name,
            key_id=self._keys.key_id,
            start_time=self._start_time,
            state_dir=self._state_dir,
            runtime_dir=self._runtime_dir,
            engine_host_pid=self._engine_host_pid(),
            awake=sum(not running.tpm.asleep for running in self._lifecycle.all_running()),
            hibernated=sum(running.tpm.asleep for running in self._lifecycle.all_running()),
            drained=self._lifecycle.thaws.held,
        )

    def drain(self, timeout_s: float) -> AsyncIterator[DrainProgress]:
        """See Maintenance.drain."""
        return self.maintenance.drain(timeout_s)

    def resume(self) -> None:
        """See Maintenance.resume."""
        self.maintenance.resume()

    async def rotate_key(self) -> tuple[str, int]:
        """Make a new key-encryption key, wrap every data key with it, destroy the old ones; return its id and the count."""
        lock = self._lifecycle.key_lock
        if self._rotating:
            raise ConflictError("KEY_ROTATION_RUNNING", "a key rotation is running", remedy="wait for it to end")
        self._rotating = True
        try:
            async with lock:
                key_id = await self._lifecycle.blocking(self._keys.begin_rotation)
                rewrapped = await self._rewrap_all(key_id)
                await self._lifecycle.blocking(rewrap_authority_key, self._store.authorities, self._keys, key_id)
                await self._lifecycle.blocking(rewrap_row_key, self._store, self._keys, key_id)
                if self.rewrap_anchor is not None:
                    await self.rewrap_anchor()
                await self._lifecycle.blocking(self._keys.finish_rotation)
        finally:
            self._rotating = False
        log.info("key.rotated", key_id=key_id, rewrapped=rewrapped)
        return key_id, rewrapped

    async def _rewrap_all(self, key_id: str) -> int:
        rewrapped = 0
        after: uuid.UUID | None = None
        while page := await self._lifecycle.blocking(self._store.wrapped_keys, after, _PAGE_SIZE):
            after = page[-1][0]
            rewrapped += await self._lifecycle.blocking(self._rewrap_page, page, key_id)
        return rewrapped

    def _rewrap_page(self, page: Sequence[tuple[uuid.UUID, WrappedKey]], key_id: str) -> int:
        updates = [
            (instance, old, self._keys.wrap(self._keys.unwrap(old, instance), instance))
            for instance, old in page
            if old.key_id != key_id
        ]
        return self._store.rewrap(updates)

    # ---- one instance's TPM ----------------------------------------------------------------------------------------------

    def tpm_socket(self, record: InstanceRecord) -> Path:
        """The instance's data socket, while it is ON."""
        return self._lifecycle.sockets.tpm_socket(record.id)

    def guest_socket(self, record: InstanceRecord) -> Path:
        """The instance's gRPC socket, while it is ON."""
        return self._lifecycle.sockets.guest_socket(record.id)

    def control_socket(self, record: InstanceRecord) -> Path:
        """The socket that a VMM connects to, which powers the instance on."""
        return self._lifecycle.sockets.control_socket(record.id)

    def listen_for_vm(self, record: InstanceRecord) -> socket.socket:
        """Listen on that socket."""
        return self._lifecycle.sockets.listen_for_vm(record.id)

    async def attach(self, ref: str, connection: socket.socket) -> None:
        """Give a VMM's control connection to the instance."""
        await self._lifecycle.attach(ref, connection)

    async def all(self) -> AsyncIterator[InstanceRecord]:
        """Yield every instance."""
        after: uuid.UUID | None = None
        while page := await self._lifecycle.blocking(self._store.list, Filter(), _PAGE_SIZE, after):
            for record in page:
                yield record
            after = page[-1].id

    async def _tpm(self, ref: str) -> Running:
        running = self._lifecycle.running(ref)
        if running is not None:
            return running
        record = await self.get(ref)
        raise FailedPreconditionError(
            "INSTANCE_NOT_ON",
            f"the instance is {record.state.value}",
            subject=record.name,
            remedy=f"vtpm instance {'reset' if record.state is InstanceState.FAILED else 'start'} {record.name}",
        )

    async def execute(self, ref: str, command: bytes, locality: int) -> bytes:
        """Run one raw command; a TPM_RC other than success is in the response."""
        return await (await self._tpm(ref)).tpm.execute(command, locality)

    async def hash_sequence(self, ref: str, command: ControlCommand, data: bytes) -> None:
        """HASH_START, HASH_DATA or HASH_END: a part of an H-CRTM event."""
        await (await self._tpm(ref)).tpm.hash_sequence(command, data)

    async def read_pcrs(self, ref: str, selections: Sequence[PcrSelection]) -> PcrValues:
        """Read PCRs; an empty selection reads all of every allocated bank."""
        return await (await self._tpm(ref)).tpm.read_pcrs(selections)

    async def quote(self, ref: str, selections: Sequence[PcrSelection], nonce: bytes) -> QuoteResult:
        """Sign PCRs and `nonce` (at most 64 bytes) with the AK (TPM2_Quote)."""
        running = await self._tpm(ref)
        try:
            quoted = await running.tpm.quote(selections, nonce)
        except VtpmError as error:
            raise unsigned(running.record, error) from None
        check_signer(running.record, quoted)
        return QuoteResult(quoted.attest, quoted.signature, quoted.ak_tpmt_public, quoted.values)

    async def measure(
        self, ref: str, pcr: int, data: bytes, event_type: int, event_data: bytes, origin: Origin
    ) -> tuple[PcrValue, ...]:
        """Extend `pcr` with the digests of `data` in every bank and record the event and that it is `origin`'s."""
        return await (await self._tpm(ref)).tpm.measure(pcr, data, event_type, event_data, origin)

    async def event_log(self, ref: str) -> MeasuredLog:
        """Return what was measured since the last reset."""
        return await (await self._tpm(ref)).tpm.event_log()

    async def drain_command_counts(self) -> Sequence[pb.OrdinalCount]:
        """Return and clear the command counts of every running TPM."""
        awake = [running for running in self._lifecycle.all_running() if not running.tpm.asleep]
        statuses = await asyncio.gather(
            # Whoever is busy for longer is counted another time.
            *(asyncio.wait_for(running.tpm.status(counts=True), _COUNTS_TIMEOUT_S) for running in awake),
            return_exceptions=True,
        )
        # One that is just dying has no counts to give; its end is reported elsewhere.
        return [row for status in statuses if isinstance(status, pb.Status) for row in status.ordinals]
