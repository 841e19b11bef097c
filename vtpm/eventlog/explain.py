"""Why a register holds another value than expected, in plain words.

For each difference the value is computed that the log's register would have held without this one difference. With a single
difference that is the expected value, which proves that there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog.describe import describe
from vtpm.eventlog.differences import Change, Pair, Subject, pairs, subject_kind
from vtpm.eventlog.reference import Reference, registers_of
from vtpm.eventlog.replay import replay, replay_events
from vtpm.eventlog.types import type_name
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog, register_name

MAX_DIFFERENCES: Final = 256


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference in words. `without` is what the register would have held without it; none where that is not known."""

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
    expected = {register: (value,) for register, value in replay(against, bank).values.items()}
    return _explain(log, bank, expected, registers_of(against.events, bank), only_named=False)


def explain_reference(log: UnverifiedLog, reference: Reference, bank: int) -> tuple[RegisterDifference, ...]:
    """Return in what `log` differs from reference values; a register that the reference does not name is not compared."""
    events = {register: list(items) for register, items in reference.events.get(bank, {}).items()}
    expected = dict(reference.values.get(bank, {}))
    for register, items in events.items():
        values = replay_events(items, bank, td=log.td).values
        expected.setdefault(register, (values[register],) if register in values else ())
    return _explain(log, bank, expected, events, only_named=True)


def _explain(
    log: UnverifiedLog,
    bank: int,
    expected: dict[int, tuple[bytes, ...]],
    theirs: dict[int, list[UnverifiedEvent]],
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
        heads = [event for event in log.events if event.event_type == 3 and event.register == register]
        explained = _value(heads, theirs.get(register, []), bank, register, td=log.td) in allowed
        differences = tuple(_difference(log, pair, heads, ours.get(register, []), bank) for pair in differing[:MAX_DIFFERENCES])
        name = register_name(register, td=log.td)
        dropped = len(differing) - len(differences)
        found.append(RegisterDifference(register, name, value, allowed, differences, explained, exact, dropped))
    return tuple(found)


def _value(
    heads: Sequence[UnverifiedEvent], events: Sequence[UnverifiedEvent], bank: int, register: int, *, td: bool
) -> bytes | None:
    return replay_events([*heads, *events], bank, td=td).values.get(register)


def _difference(
    log: UnverifiedLog, pair: Pair, heads: Sequence[UnverifiedEvent], ours: Sequence[UnverifiedEvent], bank: int
) -> Difference:
    event = pair.ours or pair.theirs
    assert event is not None
    without: bytes | None = None
    if pair.change is Change.CHANGED and pair.theirs is not None:
        undone = [pair.theirs if item is pair.ours else item for item in ours]
        without = _value(heads, undone, bank, pair.register, td=log.td)
    elif pair.change is Change.EXTRA:
        undone = [item for item in ours if item is not pair.ours]
        without = _value(heads, undone, bank, pair.register, td=log.td)
    return Difference(
        change=pair.change,
        subject=subject_kind(event),
        register=pair.register,
        text=_words(pair),
        event=pair.ours.number if pair.ours is not None else None,
        without=without,
    )


def _words(pair: Pair) -> str:
    event = pair.ours or pair.theirs
    assert event is not None
    subject = subject_kind(event)
    match pair.change:
        case Change.CHANGED if pair.theirs is not None and pair.ours is not None:
            before, after = describe(pair.theirs), describe(pair.ours)
            if before == after:
                return f"the {subject} differs: {after or type_name(event.event_type)}"
            return f"the {subject} differs: {after!r} instead of {before!r}"
        case Change.MISSING:
            return f"a {subject} is missing: {describe(event) or type_name(event.event_type)}"
        case Change.EXTRA:
            return f"a {subject} was not expected: {describe(event) or type_name(event.event_type)}"
        case _:
            return f"a {subject} comes in another order: {describe(event) or type_name(event.event_type)}"
