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
from dataclasses import dataclass, replace
from typing import Final

import structlog

from vtpm.engine.interface import Loss
from vtpm.errors import AnchorError, FailedPreconditionError, NotFoundError, VtpmError
from vtpm.instance.judgement import Finding, Judgement, Reason, compare, judge
from vtpm.instance.lifecycle import Lifecycle
from vtpm.seal.anchor import RESET_REMEDY, START, Anchor, AnchorContent, Mark
from vtpm.seal.envelope import StateKind
from vtpm.store.freshness import LogKind, LogRow, StateRow
from vtpm.store.model import Failure, InstanceRecord, InstanceState
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.freshness")

_MESSAGES: Final = {
    Reason.ROLLED_BACK: "the store has an older state than the anchor",
    Reason.FORKED: "the state does not come from the anchored one",
    Reason.NOT_ANCHORED: "the anchor does not know this instance, and it was not created since",
    Reason.MISSING: "the anchor knows this instance, and the store does not have it",
}


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
        self._anchor = anchor
        self._interval_s = interval_s
        self._lifecycle: Lifecycle | None = None
        self._content: AnchorContent | None = None
        self._rows: set[StateRow] = set()
        self._findings: dict[uuid.UUID, Finding] = {}
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
        if self._anchor is None:
            return
        async with self._turn:
            await self._open()
        self._task = asyncio.get_running_loop().create_task(self._keep())

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

    async def _open(self) -> None:
        try:
            found = await asyncio.to_thread(self._first)
        except VtpmError as error:
            if self._doubt is None or self._doubt.reason != error.reason:
                log.error("anchor.not_trusted", reason=error.reason, anchor=error.subject, remedy=error.remedy)
            self._doubt = error
            return
        self._doubt = None
        await self._act(found)

    def _first(self) -> dict[uuid.UUID, Finding]:
        """Read the anchor and judge every state; runs in a thread."""
        assert self._anchor is not None
        identity = self._log.identity()
        content = self._anchor.read()
        if content is None:
            if identity is not None and identity[1]:
                raise AnchorError(
                    "ANCHOR_MISSING",
                    "the store had an anchor, and there is none",
                    subject=self._anchor.subject,
                    remedy=f"put it back, or {RESET_REMEDY}",
                )
            self._adopt()
            return {}
        if identity is None or identity[0] != content.store:
            raise AnchorError(
                "ANCHOR_FOREIGN",
                f"the anchor is of the store {content.store}, this one is {identity[0] if identity else 'not known to any'}",
                subject=self._anchor.subject,
                remedy=f"put the right store or the right anchor there; if a backup was restored: {RESET_REMEDY}",
            )
        self._log.use(content.store, self._anchor.keys.log_key)
        self._log.arm()
        self._content = content
        self._rows = set()
        self._findings = {}
        return self._survey(look=True)

    def _adopt(self) -> None:
        """Take the store as it is for fresh, and begin an anchor for it."""
        assert self._anchor is not None
        store = uuid.uuid4()
        content = self._anchor.create(store)
        self._log.identify(store)
        self._log.use(store, self._anchor.keys.log_key)
        with self._log.snapshot() as snapshot:
            rows = snapshot.rows()
            marks = [
                Mark(bytes.fromhex(row.instance), row.kind, row.owner_epoch, row.epoch, row.version, snapshot.digest(row))
                for row in rows
            ]
            end = snapshot.log_after(START, START)
        assert end is not None, "nobody else writes under this key"
        self._content = replace(content, records={mark.key: mark.pack() for mark in marks}, covered=end[1])
        self._rows, self._findings = rows, {}
        self._write()
        self._log.arm()
        log.warning("anchor.created", anchor=self._anchor.subject, states=len(marks))

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
        if self._anchor is None:
            return
        async with self._turn:
            if self._doubt is not None:
                raise self._doubt
            await self._anchored()

    async def _anchored(self, *, force: bool = False) -> None:
        try:
            found = await asyncio.to_thread(self._survey, force=force)
        except VtpmError as error:
            if self._write_trouble is None:
                log.error("anchor.update_failed", reason=error.reason, anchor=error.subject, remedy=error.remedy)
            self._write_trouble = error
            raise
        if self._write_trouble is not None:
            log.info("anchor.update_works_again")
            self._write_trouble = None
        await self._act(found)

    async def _keep(self) -> None:
        assert self._anchor is not None
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), self._interval_s)
            self._soon.clear()
            if self._doubt is not None:
                async with self._turn:
                    await self._open()
            else:
                # Already in the log; it is tried again.
                with contextlib.suppress(VtpmError):
                    await self.update()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), min(self._anchor.spacing_s, self._interval_s))

    def _survey(self, *, look: bool = False, force: bool = False) -> dict[uuid.UUID, Finding]:
        """Judge what changed, and anchor it; return what was found wrong. Runs in a thread, one at a time.

        `look` says to do so even if nothing seems to have changed, `force` to write the anchor in any case.
        """
        content = self._content
        assert content is not None
        if not self._log.changed() and not (look or force or self._write_trouble is not None):
            return {}
        with self._log.snapshot() as snapshot:
            rows = snapshot.rows()
            read = snapshot.log_after(content.covered, content.head)
            judged = self._judge(rows, read[0] if read is not None else None, snapshot.digest)
        if read is None:
            log.error("anchor.log_broken", anchor_sequence=content.head.sequence)
            self._log.go_on_from(content.head)
        covered = read[1] if read is not None else content.head
        events = [row for row in read[0] if row.kind is not LogKind.ROOT] if read is not None else []
        if force or events or read is None or judged.records != content.records:
            self._content = replace(content, records=judged.records, covered=covered)
            try:
                self._write()
            except BaseException:
                # What the anchor has not taken is looked at again.
                self._content = content
                raise
        self._rows = rows
        self._findings |= judged.findings
        return judged.findings

    def _judge(self, rows: set[StateRow], events: Sequence[LogRow] | None, digest) -> Judgement:  # type: ignore[no-untyped-def]
        assert self._content is not None
        known = self._content.records
        gone: set[bytes]
        if self._rows:
            gone = {_key(row) for row in self._rows - rows} - {_key(row) for row in rows - self._rows}
        else:
            gone = set(known) - {_key(row) for row in rows}
        return judge(known, rows - self._rows, gone, events, digest, settled=frozenset(self._findings))

    def _write(self) -> None:
        assert self._anchor is not None
        assert self._content is not None
        head = self._log.append_root(self._content.root(), self._content.covered)
        self._content = self._anchor.write(replace(self._content, head=head))

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
        error = _error(finding, record.name)
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
        if self._anchor is None:
            return
        if self._doubt is not None:
            raise self._doubt
        content = self._content
        assert content is not None
        finding = self._findings.get(record.id)
        if finding is None:
            finding = self._look_at(record, content)
        if finding is not None:
            raise _error(finding, record.name)

    def _look_at(self, record: InstanceRecord, content: AnchorContent) -> Finding | None:
        base = content.records.get(record.id.bytes + bytes((StateKind.PERMANENT,)))
        last = self._log.last_event(record.id, content.covered)
        if last is LogKind.DELETED:
            return Finding(record.id, Reason.NOT_ANCHORED, None, None)
        if base is None:
            if last is not None:
                return None
            # Anchored while this was on its way, or not at all.
            content = self._content or content
            base = content.records.get(record.id.bytes + bytes((StateKind.PERMANENT,)))
            if base is None:
                return Finding(record.id, Reason.NOT_ANCHORED, None, None)
        for row, digest in self._log.present(record.id):
            known = content.records.get(_key(row))
            mark = Mark.unpack(known or base)
            reason = compare(mark, row, same_kind=known is not None)
            same = known is not None and (row.epoch, row.version) == (mark.epoch, mark.version)
            if reason is None and same and digest != mark.digest:
                reason = Reason.FORKED
            if reason is not None:
                return Finding(record.id, reason, row.numbers, mark.numbers)
        return None

    # ---- an operator's decisions -----------------------------------------------------------------------------------------

    async def accept(self, ref: str) -> InstanceRecord | None:
        """Take an instance's state, older as it is, for the right one; None for an instance that is missing and is let go.

        Raises:
            FailedPreconditionError: NOTHING_TO_ACCEPT, INSTANCE_ON or ANCHOR_NOT_CONFIGURED.
            NotFoundError: INSTANCE_NOT_FOUND.
        """
        assert self._lifecycle is not None
        self._configured()
        if self._doubt is not None:
            raise self._doubt
        try:
            record = await asyncio.to_thread(self._store.get, ref)
        except NotFoundError:
            await self._let_go(ref)
            return None
        async with self._lifecycle.lock(record.id):
            record = await asyncio.to_thread(self._store.get, str(record.id))
            finding = self._findings.get(record.id)
            if finding is None and self._content is not None:
                finding = await asyncio.to_thread(self._look_at, record, self._content)
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
            records = self._content.records if self._content is not None else {}
            base = records.get(instance.bytes + bytes((StateKind.PERMANENT,)))
            above = Mark.unpack(base).owner_epoch if base is not None else 0
            await asyncio.to_thread(self._log.accept, instance, above)
            self._findings.pop(instance, None)
            if self._anchor is not None:
                await self._anchored(force=True)

    async def _let_go(self, ref: str) -> None:
        try:
            instance = uuid.UUID(ref.removeprefix("instances/"))
        except ValueError:
            instance = uuid.UUID(int=0)
        finding = self._findings.get(instance)
        if finding is None or finding.reason is not Reason.MISSING:
            raise NotFoundError(
                "INSTANCE_NOT_FOUND",
                "there is no such instance",
                subject=ref[:80],
                remedy="vtpm instance list; vtpm host anchor",
            )
        async with self._turn:
            await asyncio.to_thread(self._log.append, LogKind.DELETED, instance)
            self._findings.pop(instance, None)
            # Its rows are gone since the first look.
            self._rows.add(StateRow(instance.hex, 0, StateKind.PERMANENT, 0, 0))
            await self._anchored(force=True)
        log.warning("freshness.loss_accepted", instance=str(instance), anchored=finding.anchored)

    async def reset(self) -> AnchorStatus:
        """Trust the store as it is, and begin a new anchor for it.

        Raises:
            FailedPreconditionError: ANCHOR_NOT_CONFIGURED.
        """
        anchor = self._configured()
        async with self._turn:
            log.warning("anchor.reset", anchor=anchor.subject, findings=len(self._findings))
            await asyncio.to_thread(self._adopt)
            self._doubt = self._write_trouble = None
        return self.status()

    async def rewrap(self) -> None:
        """Wrap the anchor's secret with the present key-encryption key; called before the earlier one is destroyed."""
        if self._anchor is None:
            return
        async with self._turn:
            if self._doubt is not None:
                raise self._doubt
            self._anchor.keys.rewrap()
            await self._anchored(force=True)

    def _configured(self) -> Anchor:
        if self._anchor is None:
            raise FailedPreconditionError(
                "ANCHOR_NOT_CONFIGURED", "there is no anchor", remedy="set anchor to file or tpm2, see docs/rollback.md"
            )
        return self._anchor

    def status(self) -> AnchorStatus:
        """Return how rollback protection stands."""
        if self._anchor is None:
            return AnchorStatus("none")
        content = self._content
        if content is None:
            return AnchorStatus(self._anchor.name, self._anchor.subject, trouble=self._doubt)
        return AnchorStatus(
            self._anchor.name,
            self._anchor.subject,
            content.update,
            dt.datetime.fromtimestamp(content.time_s, dt.UTC),
            len(content.records),
            tuple(self._findings.values()),
            self._doubt or self._write_trouble,
        )


def _key(row: StateRow) -> bytes:
    return bytes.fromhex(row.instance) + bytes((row.kind,))


def _error(finding: Finding, name: str) -> FailedPreconditionError:
    stored, anchored = (_shown(item) for item in (finding.stored, finding.anchored))
    return FailedPreconditionError(
        finding.reason.value,
        f"{_MESSAGES[finding.reason]}: stored {stored}, anchored {anchored}",
        subject=name,
        remedy="put the right store back, or restore a backup: vtpm backup restore; if this state is the one to go on with: "
        f"vtpm instance accept-rollback {name}",
        metadata={"stored": stored, "anchored": anchored},
    )


def _shown(numbers: tuple[int, int, int] | None) -> str:
    if numbers is None:
        return "nothing"
    owner_epoch, epoch, version = numbers
    return f"version {version} of epoch {epoch}, owned under {owner_epoch}"
