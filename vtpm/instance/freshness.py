"""Rollback protection: keeps the anchor up to date, and refuses what is older than it says.

The work is done at anchoring time, over what changed since the last time; a commit costs nothing. What was committed and not
anchored yet when the power fails is simply newer than the anchor, which is fine. The window in which an older store would go
unnoticed is the interval.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from vtpm.engine.interface import Loss
from vtpm.errors import FailedPreconditionError, NotFoundError, VtpmError
from vtpm.instance.anchoring import Anchoring, refusal
from vtpm.instance.judgement import Finding, Reason
from vtpm.instance.lifecycle import Lifecycle
from vtpm.seal.anchor import Anchor
from vtpm.store.model import Failure, InstanceRecord, InstanceState
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.freshness")


@dataclass(frozen=True, slots=True)
class AnchorStatus:
    """How rollback protection stands; `time` is that of the last write, `trouble` why nothing is powered on or written."""

    kind: str
    subject: str = ""
    update: int = 0
    time: dt.datetime | None = None
    states: int = 0
    findings: Sequence[Finding] = ()
    trouble: VtpmError | None = None


class Freshness:
    """One store and its anchor; None for none. Used from the event loop, but for `check`."""

    def __init__(self, store: Store, anchor: Anchor | None, *, interval_s: float) -> None:
        self._store = store
        self._log = store.freshness
        self._anchoring = Anchoring(store.freshness, anchor) if anchor is not None else None
        self._interval_s = interval_s
        self._lifecycle: Lifecycle | None = None
        # Why the anchor can't be trusted; then nothing is powered on (invariant 7).
        self._doubt: VtpmError | None = None
        self._write_trouble: VtpmError | None = None
        self._turn = asyncio.Lock()
        self._soon = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # ---- the daemon's beginning and end ----------------------------------------------------------------------------------

    async def begin(self, lifecycle: Lifecycle) -> None:
        """Compare the store with the anchor, refuse what is stale, and keep the anchor up to date from now on."""
        self._lifecycle = lifecycle
        if self._anchoring is None:
            return
        async with self._turn:
            await self._open(self._anchoring)
        self._task = asyncio.get_running_loop().create_task(self._keep(self._anchoring))

    async def close(self) -> None:
        """Anchor what is there, and end."""
        if self._task is None:
            return
        # Not cancelled: what runs in a thread would run on.
        self._closing.set()
        self._soon.set()
        await self._task
        with contextlib.suppress(VtpmError):
            await self.update()

    async def _open(self, anchoring: Anchoring) -> None:
        try:
            found = await asyncio.to_thread(anchoring.open)
        except VtpmError as error:
            if self._doubt is None or self._doubt.reason != error.reason:
                log.error("anchor.not_trusted", reason=error.reason, anchor=error.subject, remedy=error.remedy)
            self._doubt = error
            return
        self._doubt = None
        await self._act(found)

    # ---- keeping it up to date -------------------------------------------------------------------------------------------

    def soon(self) -> None:
        """Anchor within the anchor's spacing, as after a hibernation."""
        self._soon.set()

    async def update(self) -> None:
        """Anchor what changed, durably.

        Raises:
            AnchorError: it can't be written, or can't be trusted.
            StoreError: the store is in trouble.
        """
        if self._anchoring is None:
            return
        async with self._turn:
            self.require_trust()
            await self._anchored(self._anchoring)

    async def _anchored(self, anchoring: Anchoring, *, force: bool = False) -> None:
        try:
            found = await asyncio.to_thread(anchoring.survey, look=self._write_trouble is not None, force=force)
        except VtpmError as error:
            if self._write_trouble is None:
                log.error("anchor.update_failed", reason=error.reason, anchor=error.subject, remedy=error.remedy)
            self._write_trouble = error
            raise
        if self._write_trouble is not None:
            log.info("anchor.update_works_again")
            self._write_trouble = None
        await self._act(found)

    async def _keep(self, anchoring: Anchoring) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), self._interval_s)
            self._soon.clear()
            try:
                if self._doubt is not None:
                    async with self._turn:
                        await self._open(anchoring)
                else:
                    # Already in the log; it is tried again.
                    with contextlib.suppress(VtpmError):
                        await self.update()
            except Exception as error:  # noqa: BLE001  # without this loop nothing is anchored any more
                log.error("anchor.update_failed", reason="INTERNAL", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), min(anchoring.anchor.spacing_s, self._interval_s))

    # ---- what is found wrong ---------------------------------------------------------------------------------------------

    async def _act(self, found: dict[uuid.UUID, Finding]) -> None:
        for finding in found.values():
            await self._refuse(finding)

    async def _refuse(self, finding: Finding) -> None:
        assert self._lifecycle is not None
        fields = {"reason": finding.reason.value, "stored": finding.stored, "anchored": finding.anchored}
        try:
            record = await asyncio.to_thread(self._store.get, str(finding.instance))
        except NotFoundError:
            log.error("freshness.instance_missing", instance=str(finding.instance), **fields)
            return
        error = refusal(finding, record.name)
        log.error("freshness.refused", instance=str(record.id), name=record.name, **fields)
        running = self._lifecycle.running(str(record.id))
        if running is not None:
            # What it commits would not fit the store, and what it was loaded from can't be trusted.
            self._lifecycle.ended(record.id, record.epoch, Loss(error.reason, error.message, error.remedy))
            with contextlib.suppress(VtpmError):
                await running.tpm.stop()
            return
        if record.failure is not None and record.failure.reason == error.reason:
            return
        failure = Failure(error.reason, error.message, error.remedy, dt.datetime.now(dt.UTC))
        if await asyncio.to_thread(self._log.refuse, record.id, failure):
            self._lifecycle.hub.publish("UPDATED", await asyncio.to_thread(self._store.get, str(record.id)))

    def check(self, record: InstanceRecord) -> None:
        """Refuse to power on what is not fresh; blocks.

        Raises:
            AnchorError: the anchor can't be trusted.
            FailedPreconditionError: STATE_ROLLED_BACK, STATE_FORKED or STATE_NOT_ANCHORED.
        """
        if self._anchoring is None:
            return
        self.require_trust()
        finding = self._anchoring.look_at(record)
        if finding is not None:
            raise refusal(finding, record.name)

    # ---- an operator's decisions -----------------------------------------------------------------------------------------

    async def accept(self, ref: str) -> InstanceRecord | None:
        """Take an instance's state, older as it is, for the right one; None for an instance that is missing and is let go.

        Raises:
            FailedPreconditionError: NOTHING_TO_ACCEPT, INSTANCE_ON or ANCHOR_NOT_CONFIGURED.
            NotFoundError: INSTANCE_NOT_FOUND.
        """
        assert self._lifecycle is not None
        anchoring = self._configured()
        self.require_trust()
        try:
            record = await asyncio.to_thread(self._store.get, ref)
        except NotFoundError:
            await self._let_go(anchoring, ref)
            return None
        async with self._lifecycle.lock(record.id):
            record = await asyncio.to_thread(self._store.get, str(record.id))
            finding = await asyncio.to_thread(anchoring.look_at, record)
            if finding is None:
                raise FailedPreconditionError(
                    "NOTHING_TO_ACCEPT", "the state is no older than the anchor says", subject=record.name
                )
            await self.taken(record.id)
            record = await asyncio.to_thread(self._store.get, str(record.id))
        log.warning(
            "freshness.rollback_accepted",
            instance=str(record.id),
            name=record.name,
            reason=finding.reason.value,
            stored=finding.stored,
            anchored=finding.anchored,
        )
        self._lifecycle.hub.publish("UPDATED", record)
        return record

    def require_trust(self) -> None:
        """Refuse while the anchor can't be trusted.

        Raises:
            AnchorError: why.
        """
        if self._doubt is not None:
            raise self._doubt

    async def taken(self, instance: uuid.UUID) -> None:
        """Anchor an instance that is not ON as it is, whatever the anchor says of it now; its epoch rises."""
        record = await asyncio.to_thread(self._store.get, str(instance))
        if record.state is InstanceState.ON:
            raise FailedPreconditionError(
                "INSTANCE_ON", "the instance is ON", subject=record.name, remedy=f"vtpm instance stop {record.name}"
            )
        async with self._turn:
            self.require_trust()
            anchoring = self._anchoring
            above = anchoring.owner_epoch_of(instance) if anchoring is not None else 0
            await asyncio.to_thread(self._log.accept, instance, above)
            if anchoring is not None:
                anchoring.findings.pop(instance, None)
                await self._anchored(anchoring, force=True)

    async def _let_go(self, anchoring: Anchoring, ref: str) -> None:
        try:
            instance = uuid.UUID(ref.removeprefix("instances/"))
        except ValueError:
            instance = uuid.UUID(int=0)
        finding = anchoring.findings.get(instance)
        if finding is None or finding.reason is not Reason.MISSING:
            raise NotFoundError(
                "INSTANCE_NOT_FOUND",
                "there is no such instance",
                subject=ref[:80],
                remedy="vtpm instance list; vtpm host anchor",
            )
        async with self._turn:
            await asyncio.to_thread(anchoring.let_go, instance)
            await self._anchored(anchoring, force=True)
        log.warning("freshness.loss_accepted", instance=str(instance), anchored=finding.anchored)

    async def reset(self) -> AnchorStatus:
        """Trust the store as it is, and begin a new anchor for it.

        Raises:
            FailedPreconditionError: ANCHOR_NOT_CONFIGURED.
        """
        anchoring = self._configured()
        async with self._turn:
            log.warning("anchor.reset", anchor=anchoring.anchor.subject, findings=len(anchoring.findings))
            await asyncio.to_thread(anchoring.adopt)
            self._doubt = self._write_trouble = None
        return self.status()

    async def rewrap(self) -> None:
        """Wrap the anchor's secret with the present key-encryption key; called before the earlier one is destroyed."""
        if self._anchoring is None:
            return
        async with self._turn:
            self.require_trust()
            await asyncio.to_thread(self._anchoring.anchor.keys.rewrap)
            await self._anchored(self._anchoring, force=True)

    def _configured(self) -> Anchoring:
        if self._anchoring is None:
            raise FailedPreconditionError(
                "ANCHOR_NOT_CONFIGURED", "there is no anchor", remedy="set anchor to file or tpm2, see docs/rollback.md"
            )
        return self._anchoring

    def status(self) -> AnchorStatus:
        """Return how rollback protection stands."""
        if self._anchoring is None:
            return AnchorStatus("none")
        anchor, content = self._anchoring.anchor, self._anchoring.content
        if content is None:
            return AnchorStatus(anchor.name, anchor.subject, trouble=self._doubt)
        return AnchorStatus(
            anchor.name,
            anchor.subject,
            content.update,
            dt.datetime.fromtimestamp(content.time_s, dt.UTC),
            len(content.records),
            tuple(self._anchoring.findings.values()),
            self._doubt or self._write_trouble,
        )
