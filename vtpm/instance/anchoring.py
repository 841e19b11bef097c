"""One store and its anchor: what the anchor says, judged against what the store has, and written anew.

Everything here blocks and is called by one thread at a time, but for `look_at`, which any thread may call.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from vtpm.errors import AnchorError, FailedPreconditionError
from vtpm.instance.judgement import Finding, Judgement, Reason, compare, judge
from vtpm.seal.anchor import RESET_REMEDY, START, Anchor, AnchorContent, Mark
from vtpm.seal.envelope import StateKind
from vtpm.store.freshness import FreshnessLog, LogKind, LogRow, StateRow
from vtpm.store.model import InstanceRecord

log: Final = structlog.get_logger("vtpm.freshness")

_MESSAGES: Final = {
    Reason.ROLLED_BACK: "the store has an older state than the anchor",
    Reason.FORKED: "the state does not come from the anchored one",
    Reason.NOT_ANCHORED: "the anchor does not know this instance, and it was not created since",
    Reason.MISSING: "the anchor knows this instance, and the store does not have it",
}


class Anchoring:
    """`content` is what the anchor says, None until it was read; `findings` are the instances that are refused."""

    def __init__(self, store_log: FreshnessLog, anchor: Anchor) -> None:
        self._log = store_log
        self.anchor = anchor
        self.content: AnchorContent | None = None
        self.findings: dict[uuid.UUID, Finding] = {}
        self._rows: set[StateRow] = set()

    def open(self) -> dict[uuid.UUID, Finding]:
        """Read the anchor and judge every state; runs in a thread."""
        identity = self._log.identity()
        content = self.anchor.read()
        if content is None:
            if identity is not None and identity[1]:
                raise AnchorError(
                    "ANCHOR_MISSING",
                    "the store had an anchor, and there is none",
                    subject=self.anchor.subject,
                    remedy=f"put it back, or {RESET_REMEDY}",
                )
            self.adopt()
            return {}
        if identity is None or identity[0] != content.store:
            raise AnchorError(
                "ANCHOR_FOREIGN",
                f"the anchor is of the store {content.store}, this one is {identity[0] if identity else 'not known to any'}",
                subject=self.anchor.subject,
                remedy=f"put the right store or the right anchor there; if a backup was restored: {RESET_REMEDY}",
            )
        self._log.use(content.store, self.anchor.keys.log_key)
        self._log.arm()
        self.content = content
        self._rows = set()
        self.findings = {}
        return self.survey(look=True)

    def owner_epoch_of(self, instance: uuid.UUID) -> int:
        """Return the ownership epoch that the anchor knows of an instance; 0 for none."""
        record = self.content.records.get(instance.bytes + bytes((StateKind.PERMANENT,))) if self.content is not None else None
        return Mark.unpack(record).owner_epoch if record is not None else 0

    def let_go(self, instance: uuid.UUID) -> None:
        """Forget an instance that is missing; the next survey does."""
        self._log.append(LogKind.DELETED, instance)
        self.findings.pop(instance, None)
        # Gone since the first look, and judged as one that is gone now.
        self._rows.add(StateRow(instance.hex, 0, StateKind.PERMANENT, 0, 0))

    def adopt(self) -> None:
        """Take the store as it is for fresh, and begin an anchor for it."""
        store = uuid.uuid4()
        content = self.anchor.create(store)
        self._log.identify(store, self.anchor.keys.log_key)
        with self._log.snapshot() as snapshot:
            rows = snapshot.rows()
            marks = [
                Mark(bytes.fromhex(row.instance), row.kind, row.owner_epoch, row.epoch, row.version, snapshot.digest(row))
                for row in rows
            ]
            end = snapshot.log_after(START, START)
        assert end is not None, "nobody else writes under this key"
        self.content = replace(content, records={mark.key: mark.pack() for mark in marks}, covered=end[1])
        self._rows, self.findings = rows, {}
        self._write()
        self._log.arm()
        log.warning("anchor.created", anchor=self.anchor.subject, states=len(marks))

    def survey(self, *, look: bool = False, force: bool = False) -> dict[uuid.UUID, Finding]:
        """Judge what changed, and anchor it; return what was found wrong. Runs in a thread, one at a time.

        `look` says to do so even if nothing seems to have changed, `force` to write the anchor in any case.
        """
        content = self.content
        assert content is not None
        if not self._log.changed() and not (look or force):
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
            self.content = replace(content, records=judged.records, covered=covered)
            try:
                self._write()
            except BaseException:
                # What the anchor has not taken is looked at again.
                self.content = content
                raise
        self._rows = rows
        self.findings |= judged.findings
        return judged.findings

    def _judge(self, rows: set[StateRow], events: Sequence[LogRow] | None, digest: Callable[[StateRow], bytes]) -> Judgement:
        assert self.content is not None
        known = self.content.records
        gone: set[bytes]
        if self._rows:
            gone = {_key(row) for row in self._rows - rows} - {_key(row) for row in rows - self._rows}
        else:
            gone = set(known) - {_key(row) for row in rows}
        return judge(known, rows - self._rows, gone, events, digest, settled=frozenset(self.findings))

    def _write(self) -> None:
        assert self.content is not None
        head = self._log.append_root(self.content.root(), self.content.covered)
        self.content = self.anchor.write(replace(self.content, head=head))

    def look_at(self, record: InstanceRecord) -> Finding | None:
        """Return what is wrong with an instance as the store has it now, digests too; None if it is fresh."""
        content = self.content
        assert content is not None, "there is no doubt about it"
        if record.id in self.findings:
            return self.findings[record.id]
        base = content.records.get(record.id.bytes + bytes((StateKind.PERMANENT,)))
        last = self._log.last_event(record.id, content.covered)
        if last is LogKind.DELETED:
            return Finding(record.id, Reason.NOT_ANCHORED, None, None)
        if base is None:
            if last is not None:
                return None
            # Anchored while this was on its way, or not at all.
            content = self.content or content
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


def _key(row: StateRow) -> bytes:
    return bytes.fromhex(row.instance) + bytes((row.kind,))


def refusal(finding: Finding, name: str) -> FailedPreconditionError:
    """Return the error that refuses the instance called `name`, with both versions."""
    stored, anchored = (_shown(item) for item in (finding.stored, finding.anchored))
    return FailedPreconditionError(
        finding.reason.value,
        f"{_MESSAGES[finding.reason]}: stored {stored}, anchored {anchored}",
        subject=name,
        remedy=f"put the right store back; or vtpm backup restore FILE --instance {name}; or, if this state is the one to go on"
        f" with, vtpm instance accept-rollback {name}",
        metadata={"stored": stored, "anchored": anchored},
    )


def _shown(numbers: tuple[int, int, int] | None) -> str:
    if numbers is None:
        return "nothing"
    owner_epoch, epoch, version = numbers
    return f"version {version} of epoch {epoch}, owned under {owner_epoch}"
