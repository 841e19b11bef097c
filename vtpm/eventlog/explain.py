"""Why a register holds another value than expected, in plain words.

For each difference the value is computed that the log's register would have held without this one difference. With a single
difference that is the expected value, which proves that there is no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog.describe import describe
from vtpm.eventlog.differences import Change, Pair, Subject, pairs, subject_kind, undone
from vtpm.eventlog.reference import Reference, registers_of
from vtpm.eventlog.replay import STARTUP_LOCALITY, replay, replay_events
from vtpm.eventlog.types import EventType, type_name
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog, register_name

# Of each one the register is replayed.
MAX_DIFFERENCES: Final = 64
_WORDY: Final = frozenset({Subject.COMMAND_LINE, Subject.GRUB_COMMAND})


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference in words. `without` is what the register would have held without it; none if nothing had been extended."""

    change: Change
    subject: Subject
    register: int
    text: str
    event: int | None
    without: bytes | None


@dataclass(frozen=True, slots=True)
class RegisterDifference:
    """A register whose value is not the expected one, with every difference that was found.

    `expected` are the allowed values. `explained` says that the first allowed value follows from the log with all differences
    undone. `exact` is false where there were too many differing events to align.
    """

    register: int
    name: str
    value: bytes | None
    expected: tuple[bytes, ...]
    differences: tuple[Difference, ...]
    explained: bool
    exact: bool
    dropped: int = 0


def explain(log: UnverifiedLog, against: UnverifiedLog, bank: int) -> tuple[RegisterDifference, ...]:
    """Return in what `log` differs from `against` in `bank`, register by register; empty where both lead to the same values."""
    expected: dict[int, tuple[bytes, ...]] = {index: (value,) for index, value in replay(against, bank).values.items()}
    starts = [event for event in against.events if is_start(event)]
    return _explain(log, bank, expected, registers_of(against.events, bank), starts, only_named=False)


def explain_reference(log: UnverifiedLog, reference: Reference, bank: int) -> tuple[RegisterDifference, ...]:
    """Return in what `log` differs from reference values; a register that the reference does not name is not compared."""
    events = {register: list(items) for register, items in reference.events.get(bank, {}).items()}
    expected = dict(reference.values.get(bank, {}))
    for register, items in events.items():
        values = replay_events(items, bank, td=log.td).values
        expected.setdefault(register, (values[register],) if register in values else ())
    return _explain(log, bank, expected, events, None, only_named=True)


def _explain(
    log: UnverifiedLog,
    bank: int,
    expected: dict[int, tuple[bytes, ...]],
    theirs: dict[int, list[UnverifiedEvent]],
    their_starts: list[UnverifiedEvent] | None,
    *,
    only_named: bool,
) -> tuple[RegisterDifference, ...]:
    values = replay(log, bank).values
    ours = registers_of(log.events, bank)
    found: list[RegisterDifference] = []
    for register in sorted(set(expected) | (set() if only_named else set(values))):
        value, allowed = values.get(register), expected.get(register, ())
        if value in allowed or (value is None and not allowed):
            continue
        differing: list[Pair] = []
        exact = True
        if register in theirs or not only_named:
            differing, exact = pairs(register, ours.get(register, []), theirs.get(register, []), bank)
        mine = ours.get(register, [])
        starts = [event for event in log.events if is_start(event)] if register == 0 else []
        other_starts = starts if their_starts is None or register else their_starts
        undone_value = _value(other_starts, theirs.get(register, []), bank, register, td=log.td)
        explained = undone_value in allowed or (undone_value is None and not allowed)
        differences = [_difference(log, pair, starts, mine, bank) for pair in differing[:MAX_DIFFERENCES]]
        if [event.data for event in starts] != [event.data for event in other_starts]:
            without = _value(other_starts, mine, bank, register, td=log.td)
            differences.insert(0, _start_difference(starts, other_starts, without))
        name = register_name(register, td=log.td)
        dropped = max(0, len(differing) - MAX_DIFFERENCES)
        found.append(RegisterDifference(register, name, value, allowed, tuple(differences), explained, exact, dropped))
    return tuple(found)


def is_start(event: UnverifiedEvent) -> bool:
    """Return whether an event says from which locality the TPM was started, which is where PCR 0 begins."""
    return event.event_type == EventType.EV_NO_ACTION and event.data.startswith(STARTUP_LOCALITY)


def _start_difference(ours: Sequence[UnverifiedEvent], theirs: Sequence[UnverifiedEvent], without: bytes | None) -> Difference:
    said = [", ".join(map(describe, events)) or "locality 0, without an event" for events in (ours, theirs)]
    text = f"the firmware started the TPM otherwise: {said[0]} instead of {said[1]}"
    return Difference(Change.CHANGED, Subject.FIRMWARE, 0, text, ours[0].number if ours else None, without)


def _value(
    heads: Sequence[UnverifiedEvent], events: Sequence[UnverifiedEvent], bank: int, register: int, *, td: bool
) -> bytes | None:
    return replay_events([*heads, *events], bank, td=td).values.get(register)


def _difference(
    log: UnverifiedLog, pair: Pair, heads: Sequence[UnverifiedEvent], ours: Sequence[UnverifiedEvent], bank: int
) -> Difference:
    event = pair.ours or pair.theirs
    assert event is not None
    without = _value(heads, undone(pair, ours), bank, pair.register, td=log.td)
    return Difference(
        change=pair.change,
        subject=subject_kind(event),
        register=pair.register,
        text=_words(pair),
        event=pair.ours.number if pair.ours is not None else None,
        without=without,
    )


def _changed_words(before: str, after: str) -> str:
    """Return which words of a text are new and which are gone; of texts with the same words, both texts."""
    old, new = Counter(before.split()), Counter(after.split())
    said = []
    for verb, words in (("adds", new - old), ("lacks", old - new)):
        if words:
            said.append(f"{verb} {' '.join(words.elements())!r}")
    return " and ".join(said) or f"{after!r} instead of {before!r}"


def _words(pair: Pair) -> str:
    event = pair.ours or pair.theirs
    assert event is not None
    subject = subject_kind(event)
    one = f"{'an' if subject[0] in 'aei' else 'a'} {subject}"
    match pair.change:
        case Change.CHANGED if pair.theirs is not None and pair.ours is not None:
            before, after = describe(pair.theirs), describe(pair.ours)
            if before == after:
                return f"the {subject} differs: {after or type_name(event.event_type)}"
            if subject in _WORDY:
                return f"the {subject} differs: {_changed_words(before, after)}"
            return f"the {subject} differs: {after!r} instead of {before!r}"
        case Change.MISSING:
            return f"{one} is missing: {describe(event) or type_name(event.event_type)}"
        case Change.EXTRA:
            return f"{one} was not expected: {describe(event) or type_name(event.event_type)}"
        case _:
            return f"{one} comes in another order: {describe(event) or type_name(event.event_type)}"
