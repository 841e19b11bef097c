"""What is fresh and what is not, by the anchor's records, the store's rows and the log."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm.instance.judgement import Judgement, Reason, compare, judge
from vtpm.seal.anchor import NO_DIGEST, Mark
from vtpm.seal.envelope import StateKind
from vtpm.store.freshness import LogKind, LogRow, StateRow

A, B = uuid.UUID(int=1), uuid.UUID(int=2)


def digest(row: StateRow) -> bytes:
    return bytes([row.version % 251]) * 32


def row(instance: uuid.UUID = A, owner: int = 3, epoch: int = 3, version: int = 10, kind: int = 1) -> StateRow:
    return StateRow(instance.hex, owner, kind, epoch, version)


def mark(of: StateRow, value: bytes | None = None) -> Mark:
    numbers = (of.owner_epoch, of.epoch, of.version)
    return Mark(bytes.fromhex(of.instance), of.kind, *numbers, digest(of) if value is None else value)


def known(*marks: Mark) -> dict[bytes, bytes]:
    return {item.key: item.pack() for item in marks}


def event(kind: LogKind, instance: uuid.UUID = A, sequence: int = 9) -> LogRow:
    return LogRow(sequence, kind, instance.bytes)


def reasons(judged: Judgement) -> dict[uuid.UUID, Reason]:
    return {instance: finding.reason for instance, finding in judged.findings.items()}


ANCHORED = row()


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (row(), None),
        (row(version=11), None),
        (row(owner=4), None),
        (row(owner=4, epoch=4, version=11), None),
        (row(version=9), Reason.ROLLED_BACK),
        (row(epoch=2, version=9), Reason.ROLLED_BACK),
        (row(owner=2, epoch=2, version=9), Reason.ROLLED_BACK),
        (row(owner=2), Reason.ROLLED_BACK),
        # A higher version that was committed under an ownership that had ended when the anchor was written.
        (row(epoch=2, version=99), Reason.ROLLED_BACK),
    ],
)
def test_a_state_must_be_the_anchored_one_or_a_later_one(now: StateRow, reason: Reason | None) -> None:
    judged = judge(known(mark(ANCHORED)), [now], (), [], digest)
    assert reasons(judged) == ({A: reason} if reason else {})
    if reason is None:
        assert judged.records == known(mark(now))
    else:
        assert judged.records == known(mark(ANCHORED)), "the anchor remembers the newer one still"
        assert judged.findings[A].stored == now.numbers
        assert judged.findings[A].anchored == ANCHORED.numbers


def test_after_a_rollback_was_accepted_what_was_newer_before_is_no_later_state() -> None:
    """Accepting raises the ownership epoch; the state that was given up has a higher version under a lower one."""
    accepted = row(owner=7, epoch=2, version=5)
    assert compare(mark(accepted), row(owner=7, epoch=3, version=10)) is Reason.FORKED
    assert compare(mark(accepted), row(owner=8, epoch=8, version=6)) is None


def test_with_another_log_nothing_newer_is_believed() -> None:
    records = known(mark(ANCHORED), mark(row(B)))
    judged = judge(records, [row(version=11), row(B)], (), None, digest)
    assert reasons(judged) == {A: Reason.FORKED}
    assert reasons(judge({}, [row()], (), None, digest)) == {A: Reason.NOT_ANCHORED}


def test_an_instance_that_the_anchor_does_not_know_must_have_come_since() -> None:
    assert reasons(judge({}, [row()], (), [], digest)) == {A: Reason.NOT_ANCHORED}
    judged = judge({}, [row()], (), [event(LogKind.CREATED)], digest)
    assert not judged.findings
    assert judged.records == known(mark(row()))
    assert reasons(judge({}, [row()], (), [event(LogKind.CREATED, B)], digest)) == {A: Reason.NOT_ANCHORED}


def test_an_instance_that_is_gone_must_have_been_deleted() -> None:
    records = known(mark(ANCHORED), mark(row(B)))
    deleted = judge(records, [row(B)], [mark(ANCHORED).key], [event(LogKind.DELETED)], digest)
    assert not deleted.findings
    assert deleted.records == known(mark(row(B)))
    lost = judge(records, [row(B)], [mark(ANCHORED).key], [], digest)
    assert reasons(lost) == {A: Reason.MISSING}
    assert lost.records == records, "with the right store back it is fresh again"


def test_what_was_deleted_is_not_brought_back() -> None:
    for events in ([event(LogKind.DELETED)], [event(LogKind.CREATED), event(LogKind.DELETED)]):
        judged = judge(known(mark(ANCHORED)), [row()], (), events, digest)
        assert reasons(judged) == {A: Reason.NOT_ANCHORED}
        assert judged.records == {}


def test_an_operators_word_counts_over_the_anchors() -> None:
    older = row(owner=9, epoch=2, version=4)
    judged = judge(known(mark(ANCHORED)), [older], (), [event(LogKind.ACCEPTED)], digest, settled=frozenset([A]))
    assert not judged.findings
    assert judged.records == known(mark(older))


def test_what_was_found_wrong_stays_wrong_and_is_told_once() -> None:
    records = known(mark(ANCHORED))
    judged = judge(records, [row(version=11)], (), [], digest, settled=frozenset([A]))
    assert not judged.findings
    assert judged.records == records


# ---- volatile states (invariant 2) ---------------------------------------------------------------------------------------


def snapshot(version: int = 1, owner: int = 3, epoch: int = 3) -> StateRow:
    return row(kind=StateKind.VOLATILE, version=version, owner=owner, epoch=epoch)


def test_a_snapshot_that_was_used_up_is_remembered_and_not_believed_again() -> None:
    records = known(mark(ANCHORED))
    hibernated = judge(records, [snapshot()], (), [], digest)
    assert not hibernated.findings
    thawed = judge(hibernated.records, (), [mark(snapshot()).key], [], digest)
    assert not thawed.findings
    assert thawed.records[mark(snapshot()).key] == mark(snapshot(), NO_DIGEST).pack()
    assert reasons(judge(thawed.records, [snapshot()], (), [], digest)) == {A: Reason.ROLLED_BACK}
    assert not judge(thawed.records, [snapshot(2)], (), [], digest).findings


def test_a_snapshot_of_an_earlier_ownership_is_not_believed() -> None:
    assert reasons(judge(known(mark(ANCHORED)), [snapshot(epoch=2)], (), [], digest)) == {A: Reason.FORKED}


def test_a_missing_instance_keeps_its_snapshot() -> None:
    records = known(mark(ANCHORED), mark(snapshot()))
    judged = judge(records, (), list(records), [], digest)
    assert reasons(judged) == {A: Reason.MISSING}
    assert judged.records == records


# ---- properties ----------------------------------------------------------------------------------------------------------

_small = st.integers(0, 4)
_rows = st.builds(StateRow, st.just(A.hex), _small, st.just(1), _small, _small)


@given(anchored=_rows, now=_rows, continuous=st.booleans())
def test_no_state_with_lower_numbers_ever_passes(anchored: StateRow, now: StateRow, continuous: bool) -> None:
    found = compare(mark(anchored), now, continuous=continuous)
    lower = now.owner_epoch < anchored.owner_epoch or (now.epoch, now.version) < (anchored.epoch, anchored.version)
    if lower:
        assert found is Reason.ROLLED_BACK
    if found is None:
        assert now.numbers[1:] == anchored.numbers[1:] or (continuous and now.epoch >= anchored.owner_epoch)


@given(history=st.lists(st.sampled_from(["power", "commit", "anchor"]), max_size=30))
def test_no_honest_history_is_refused(history: list[str]) -> None:
    now = row(owner=0, epoch=0, version=1)
    anchored = known(mark(now))
    for step in history:
        match step:
            case "power":
                now = now._replace(owner_epoch=now.owner_epoch + 1)
            case "commit":
                now = now._replace(epoch=now.owner_epoch, version=now.version + 1)
            case "anchor":
                judged = judge(anchored, [now], (), [], digest)
                assert not judged.findings
                anchored = judged.records
    assert not judge(anchored, [now], (), [], digest).findings


@given(steps=st.lists(st.sampled_from(["power", "commit", "anchor"]), min_size=1, max_size=30), back=st.integers(0, 29))
def test_every_state_older_than_the_anchored_one_is_refused(steps: list[str], back: int) -> None:
    now = row(owner=1, epoch=1, version=1)
    states, anchored, at = [now], mark(now), 0
    for step in steps:
        match step:
            case "power":
                now = now._replace(owner_epoch=now.owner_epoch + 1)
            case "commit":
                now = now._replace(epoch=now.owner_epoch, version=now.version + 1)
            case "anchor":
                anchored, at = mark(now), len(states) - 1
                continue
        states.append(now)
    older = states[back % len(states)]
    refused = compare(anchored, older) is not None
    assert refused == (states.index(older) < at)
