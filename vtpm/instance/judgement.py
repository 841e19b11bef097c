"""Which states are fresh: the store as it is now against what the anchor remembers. Pure functions.

A state that is not the anchored one must be a later one: of a higher (epoch, version), and committed under an ownership epoch
no lower than the one at the time of anchoring. An instance that the anchor does not know must have come since, by the log; one
that is gone must have been deleted since, by the log.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vtpm.seal.anchor import NO_DIGEST, Mark
from vtpm.seal.envelope import StateKind
from vtpm.store.freshness import LogKind, LogRow, StateRow


class Reason(enum.StrEnum):
    """What is wrong with an instance."""

    # Its state, or its ownership epoch, is older than the anchored one.
    ROLLED_BACK = "STATE_ROLLED_BACK"
    # Another state under the same epoch and version, or one that can't be shown to come from the anchored one.
    FORKED = "STATE_FORKED"
    # The anchor does not know it, and the log does not say that it came since: deleted and brought back, or put in.
    NOT_ANCHORED = "STATE_NOT_ANCHORED"
    # The anchor knows it, the store does not have it, and the log does not say that it was deleted.
    MISSING = "INSTANCE_MISSING"


class Finding(NamedTuple):
    """What is wrong with which instance: (ownership epoch, epoch, version) in the store and in the anchor."""

    instance: uuid.UUID
    reason: Reason
    stored: tuple[int, int, int] | None
    anchored: tuple[int, int, int] | None


@dataclass(slots=True)
class Judgement:
    """`records` is what the anchor should say now: fresh instances as they are, others as they were."""

    records: dict[bytes, bytes]
    findings: dict[uuid.UUID, Finding] = field(default_factory=dict)


def came_and_went(events: Iterable[LogRow]) -> tuple[set[bytes], set[bytes]]:
    """Return which instances came, and which went, by the log; what happened last to each counts."""
    came: set[bytes] = set()
    went: set[bytes] = set()
    for event in events:
        match event.kind:
            case LogKind.CREATED | LogKind.ACCEPTED:
                came.add(event.instance)
                went.discard(event.instance)
            case LogKind.DELETED:
                went.add(event.instance)
                came.discard(event.instance)
    return came, went


def judge(
    known: Mapping[bytes, bytes],
    changed: Iterable[StateRow],
    gone: Iterable[bytes],
    events: Sequence[LogRow] | None,
    digest: Callable[[StateRow], bytes],
    *,
    settled: frozenset[uuid.UUID] = frozenset(),
) -> Judgement:
    """Judge the states that are not as they were at the last judgement.

    `known` is the anchor's records, `gone` the keys of states that are not there any more, `events` the log since the anchor;
    None: the store's log is not the one that was anchored, and then nothing newer than the anchor can be believed. `settled`
    are instances that were found wrong already. `digest` is asked for states that are new only.
    """
    came, went = came_and_went(events or ())
    accepted = {event.instance for event in events or () if event.kind is LogKind.ACCEPTED} & came
    result = Judgement(dict(known))
    by_instance: dict[str, list[StateRow]] = {}
    for row in changed:
        by_instance.setdefault(row.instance, []).append(row)
    for text, rows in by_instance.items():
        instance = uuid.UUID(text)
        if instance in settled and instance.bytes not in accepted:
            continue
        if instance.bytes in accepted:
            known = {key: record for key, record in known.items() if key[:16] != instance.bytes}
        finding = _judge_rows(known, instance, rows, instance.bytes in came, continuous=events is not None)
        if instance.bytes in went:
            # Deleted, its data key destroyed, and there again.
            finding = Finding(instance, Reason.NOT_ANCHORED, rows[0].numbers, None)
            _drop(result.records, instance.bytes)
        if finding is not None:
            result.findings[instance] = finding
            continue
        if instance.bytes in accepted:
            _drop(result.records, instance.bytes)
        for row in rows:
            mark = _mark_of(row, known, digest)
            result.records[mark.key] = mark.pack()
    missing = frozenset(gone)
    for key in missing:
        _judge_gone(result, key, missing, went, settled)
    return result


def _mark_of(row: StateRow, known: Mapping[bytes, bytes], digest: Callable[[StateRow], bytes]) -> Mark:
    instance = bytes.fromhex(row.instance)
    record = known.get(instance + bytes((row.kind,)))
    old = Mark.unpack(record) if record is not None else None
    if old is not None and (old.epoch, old.version) == (row.epoch, row.version) and row.kind == StateKind.PERMANENT:
        value = old.digest
    else:
        value = digest(row)
    return Mark(instance, row.kind, row.owner_epoch, row.epoch, row.version, value)


def _judge_rows(
    known: Mapping[bytes, bytes], instance: uuid.UUID, rows: Iterable[StateRow], came: bool, *, continuous: bool
) -> Finding | None:
    # A snapshot of volatile state that the anchor does not know is believed by what it says of the permanent one.
    base = known.get(instance.bytes + bytes((StateKind.PERMANENT,)))
    for row in rows:
        record = known.get(instance.bytes + bytes((row.kind,)))
        if record is None and base is None:
            if not came or not continuous:
                return Finding(instance, Reason.NOT_ANCHORED, row.numbers, None)
            continue
        mark = Mark.unpack(record or base or b"")
        reason = compare(mark, row, same_kind=record is not None, continuous=continuous)
        if reason is not None:
            return Finding(instance, reason, row.numbers, mark.numbers)
    return None


def compare(mark: Mark, row: StateRow, *, same_kind: bool = True, continuous: bool = True) -> Reason | None:
    """Return what is wrong with a state by its numbers, None if nothing is. Without `same_kind`: the permanent one's mark."""
    if row.owner_epoch < mark.owner_epoch:
        return Reason.ROLLED_BACK
    if same_kind and (row.epoch, row.version) == (mark.epoch, mark.version):
        # A volatile state that was used up must not be there again.
        used_up = mark.digest == NO_DIGEST and row.kind == StateKind.VOLATILE
        return Reason.ROLLED_BACK if used_up else None
    if same_kind and (row.epoch, row.version) < (mark.epoch, mark.version):
        return Reason.ROLLED_BACK
    # Higher numbers of before the anchoring are of another history, such as that of a store that was restored over it.
    return None if continuous and row.epoch >= mark.owner_epoch else Reason.FORKED


def _judge_gone(result: Judgement, key: bytes, gone: frozenset[bytes], went: set[bytes], settled: frozenset[uuid.UUID]) -> None:
    owner, kind = key[:16], key[16]
    if key not in result.records:
        return
    if owner in went:
        _drop(result.records, owner)
    elif kind == StateKind.VOLATILE:
        if owner + bytes((StateKind.PERMANENT,)) in gone:
            return
        # Used up; remembered, so that it can't be put back.
        result.records[key] = Mark.unpack(result.records[key])._replace(digest=NO_DIGEST).pack()
    elif uuid.UUID(bytes=owner) not in settled:
        mark = Mark.unpack(result.records[key])
        instance = uuid.UUID(bytes=owner)
        result.findings[instance] = Finding(instance, Reason.MISSING, None, mark.numbers)


def _drop(records: dict[bytes, bytes], owner: bytes) -> None:
    for kind in StateKind:
        records.pop(owner + bytes((kind,)), None)
