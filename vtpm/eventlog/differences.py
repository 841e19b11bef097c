"""What two logs differ in, aligned register by register.

Events that have the same digest are the same event. Between those, what remains on both sides is paired by its subject (the
variable of this name, the image from this path); what can't be paired is missing, extra, or in another order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog.describe import (
    COMMAND_LINE_PREFIXES,
    LINUX_INITRD,
    LINUX_LOAD_OPTIONS,
    plain_text,
    subject_of,
)
from vtpm.eventlog.types import IMAGES, VARIABLES, EventType
from vtpm.eventlog.uefi import parse_tag
from vtpm.eventlog.values import UnverifiedEvent

# An exact alignment costs the product of both lengths; above this only the common beginning and end are aligned.
MAX_ALIGNMENT: Final = 1 << 20


class Change(enum.StrEnum):
    """How the log differs from what it is compared with."""

    CHANGED = "changed"
    MISSING = "missing event"
    EXTRA = "extra event"
    ORDER = "other order"


class Subject(enum.StrEnum):
    """What kind of thing differs."""

    BINARY = "binary"
    VARIABLE = "variable"
    AUTHORITY = "authority"
    COMMAND_LINE = "command line"
    INITRD = "initrd"
    FILE = "file"
    GRUB_COMMAND = "GRUB command"
    UKI_SECTION = "UKI section"
    FIRMWARE = "firmware measurement"
    OTHER = "event"


_FIRMWARE: Final = frozenset(
    {
        EventType.EV_S_CRTM_CONTENTS,
        EventType.EV_S_CRTM_VERSION,
        EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB,
        EventType.EV_EFI_PLATFORM_FIRMWARE_BLOB2,
        EventType.EV_POST_CODE,
        EventType.EV_POST_CODE2,
        EventType.EV_CPU_MICROCODE,
    }
)
_TAGS: Final = {LINUX_INITRD: Subject.INITRD, LINUX_LOAD_OPTIONS: Subject.COMMAND_LINE, 0x49DFFE0F: Subject.INITRD}
_SECTIONS: Final = {".cmdline": Subject.COMMAND_LINE, ".initrd": Subject.INITRD, ".linux": Subject.BINARY}


def subject_kind(event: UnverifiedEvent) -> Subject:
    """Return which kind of thing an event is about."""
    kind = event.event_type
    if kind in IMAGES:
        return Subject.BINARY
    if kind == EventType.EV_EFI_VARIABLE_AUTHORITY:
        return Subject.AUTHORITY
    if kind in VARIABLES:
        return Subject.VARIABLE
    if kind in _FIRMWARE:
        return Subject.FIRMWARE
    if kind == EventType.EV_EVENT_TAG:
        tag = parse_tag(event.data)
        return _TAGS.get(tag[0], Subject.OTHER) if tag else Subject.OTHER
    return _text_kind(event) if kind == EventType.EV_IPL else Subject.OTHER


def _text_kind(event: UnverifiedEvent) -> Subject:
    text = plain_text(event.data) or ""
    if text.startswith("grub_cmd"):
        return Subject.GRUB_COMMAND
    if text.startswith("."):
        return _SECTIONS.get(text, Subject.UKI_SECTION)
    if text.startswith(COMMAND_LINE_PREFIXES) or event.register == 12 or (len(event.data) > 1 and event.data[1] == 0):
        return Subject.COMMAND_LINE
    name = text.rpartition("/")[2].lower()
    return Subject.INITRD if "initr" in name else Subject.FILE


@dataclass(frozen=True, slots=True)
class Pair:
    """One difference: the event of the log, the event of what it is compared with, or both.

    `place` is where the event stands in the log's register, or would stand if it is missing.
    """

    change: Change
    register: int
    ours: UnverifiedEvent | None
    theirs: UnverifiedEvent | None
    place: int


def pairs(
    register: int, ours: Sequence[UnverifiedEvent], theirs: Sequence[UnverifiedEvent], bank: int
) -> tuple[list[Pair], bool]:
    """Return how the events of one register differ, and whether the alignment is exact."""
    mine = [event.digests.get(bank, b"") for event in ours]
    other = [event.digests.get(bank, b"") for event in theirs]
    matched, exact = _align(mine, other)
    found: list[Pair] = []
    gap_ours, gap_theirs = 0, 0
    for at, to in [*matched, (len(ours), len(theirs))]:
        found += _gap(register, gap_ours, ours[gap_ours:at], theirs[gap_theirs:to])
        gap_ours, gap_theirs = at + 1, to + 1
    return list(_reordered(found, bank)), exact


def _align(mine: Sequence[bytes], other: Sequence[bytes]) -> tuple[list[tuple[int, int]], bool]:
    """Return the index pairs of a longest common subsequence, and whether there was room to compute it."""
    low, short = 0, min(len(mine), len(other))
    while low < short and mine[low] == other[low]:
        low += 1
    high = 0
    while high < short - low and mine[-1 - high] == other[-1 - high]:
        high += 1
    head = [(at, at) for at in range(low)]
    tail = [(len(mine) - high + at, len(other) - high + at) for at in range(high)]
    rows, columns = len(mine) - low - high, len(other) - low - high
    if not rows or not columns:
        return head + tail, True
    if rows * columns > MAX_ALIGNMENT:
        return head + tail, False
    middle = _common(mine[low : low + rows], other[low : low + columns])
    return head + [(at + low, to + low) for at, to in middle] + tail, True


def _common(mine: Sequence[bytes], other: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    rows, columns = len(mine), len(other)
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for at in range(rows - 1, -1, -1):
        row, below, digest = best[at], best[at + 1], mine[at]
        for to in range(columns - 1, -1, -1):
            row[to] = below[to + 1] + 1 if digest == other[to] else max(below[to], row[to + 1])
    at = to = 0
    while at < rows and to < columns:
        if mine[at] == other[to]:
            yield at, to
            at, to = at + 1, to + 1
        elif best[at + 1][to] >= best[at][to + 1]:
            at += 1
        else:
            to += 1


def undone(pair: Pair, ours: Sequence[UnverifiedEvent]) -> list[UnverifiedEvent]:
    """Return the log's events of a register as they would be without this one difference."""
    theirs = [pair.theirs] if pair.theirs is not None else []
    if pair.change is Change.MISSING:
        return [*ours[: pair.place], *theirs, *ours[pair.place :]]
    before = [event for event in ours[: pair.place] if event is not pair.ours]
    return [*before, *theirs, *(event for event in ours[pair.place :] if event is not pair.ours)]


def _gap(register: int, start: int, ours: Sequence[UnverifiedEvent], theirs: Sequence[UnverifiedEvent]) -> Iterator[Pair]:
    """Pair what stands between two events that are the same: first by the very subject, then by the kind of it."""
    left: list[UnverifiedEvent | None] = list(theirs)
    partner: dict[int, int] = {}
    for name in (subject_of, lambda event: (event.event_type, subject_kind(event))):
        waiting: dict[object, list[int]] = {}
        for index, event in reversed(list(enumerate(left))):
            if event is not None:
                waiting.setdefault(name(event), []).append(index)
        for at, event in enumerate(ours):
            if at not in partner and waiting.get(name(event)):
                index = partner[at] = waiting[name(event)].pop()
                left[index] = None
    for at, event in enumerate(ours):
        if at in partner:
            yield Pair(Change.CHANGED, register, event, theirs[partner[at]], start + at)
        else:
            yield Pair(Change.EXTRA, register, event, None, start + at)
    mine = {index: at for at, index in partner.items()}
    place = start
    for index, rest in enumerate(left):
        if index in mine:
            place = start + mine[index] + 1
        elif rest is not None:
            yield Pair(Change.MISSING, register, None, rest, place)


def _reordered(found: Sequence[Pair], bank: int) -> Iterator[Pair]:
    """Turn events that are missing in one place and extra in another into events in another order."""
    missing: dict[bytes, list[int]] = {}
    for index, pair in enumerate(found):
        if pair.theirs is not None:
            missing.setdefault(pair.theirs.digests.get(bank, b""), []).append(index)
    moved: dict[int, int] = {}
    for index, pair in enumerate(found):
        if pair.ours is not None:
            places = missing.get(pair.ours.digests.get(bank, b""))
            if places:
                moved[index] = places.pop(0)
    gone = set(moved.values())
    for index, pair in enumerate(found):
        if index in moved:
            other = found[moved[index]]
            yield Pair(Change.ORDER, pair.register, pair.ours, other.theirs, other.place)
            if pair.theirs is not None and index not in gone:
                yield Pair(Change.MISSING, pair.register, None, pair.theirs, pair.place)
        elif index not in gone:
            yield pair
        elif pair.ours is not None:
            yield Pair(Change.EXTRA, pair.register, pair.ours, None, pair.place)
