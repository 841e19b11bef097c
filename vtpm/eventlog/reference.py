"""Reference values: what registers should hold, and optionally which events should lead there.

As a mapping (of a YAML or JSON file):

    pcrs: {sha256: {0: HEX, 4: [HEX, HEX]}}
    events: {sha256: {4: [{digest: HEX, what: TEXT, type: EV_…, data: HEX}, …]}}

Only `pcrs` or `events` must be there. `what` is for people, `type` and `data` let a difference be named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vtpm.errors import InvalidArgumentError
from vtpm.eventlog.describe import describe
from vtpm.eventlog.hashes import SIZES, by_name, name
from vtpm.eventlog.replay import replay
from vtpm.eventlog.types import EventType, type_name
from vtpm.eventlog.values import UnverifiedEvent, UnverifiedLog
from vtpm.tpm.pcr import PCR_COUNT

MAX_VALUES: Final = 256
MAX_EVENTS: Final = 65536


@dataclass(frozen=True, slots=True)
class Reference:
    """Reference values by bank: the allowed values of each register, and the events that lead there where they are given."""

    values: Mapping[int, Mapping[int, tuple[bytes, ...]]]
    events: Mapping[int, Mapping[int, tuple[UnverifiedEvent, ...]]]


def reference_of(log: UnverifiedLog, bank: int) -> dict[str, Any]:
    """Return what a log leads to, as reference values for a person to read and edit."""
    values = replay(log, bank).values
    events: dict[int, list[dict[str, str]]] = {}
    for event in log.events:
        if event.event_type != EventType.EV_NO_ACTION and bank in event.digests and event.register in values:
            item = {"digest": event.digests[bank].hex(), "what": describe(event)[:200], "type": type_name(event.event_type)}
            if len(event.data) <= MAX_VALUES:
                item["data"] = event.data.hex()
            events.setdefault(event.register, []).append(item)
    bank_name = name(bank)
    return {
        "pcrs": {bank_name: {index: value.hex() for index, value in sorted(values.items())}},
        "events": {bank_name: dict(sorted(events.items()))},
    }


def parse_reference(value: Any) -> Reference:
    """Read reference values from the mapping that a YAML or JSON file is.

    Raises:
        InvalidArgumentError: REFERENCE_INVALID.
    """
    if not isinstance(value, Mapping) or not set(value) <= {"pcrs", "events"} or not value:
        raise _invalid("has other entries than pcrs and events")
    values = {bank: _values(bank, item) for bank, item in _banks(value.get("pcrs", {}))}
    events = {bank: _events(bank, item) for bank, item in _banks(value.get("events", {}))}
    return Reference(values, events)


def _banks(value: Any) -> list[tuple[int, Mapping[Any, Any]]]:
    found = []
    for text, item in value.items() if isinstance(value, Mapping) else ((value, None),):
        bank = by_name(text) if isinstance(text, str) else None
        if bank is None or not isinstance(item, Mapping):
            raise _invalid(f"names no hash with registers under {text!r:.40}")
        found.append((bank, item))
    return found


def _register(value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or len(text) > 2 or int(text) >= PCR_COUNT:
        raise _invalid(f"names the register {value!r:.40}")
    return int(text)


def _digest(bank: int, value: Any) -> bytes:
    try:
        digest = bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != SIZES[bank]:
        raise _invalid(f"has {value!r:.80} where a {name(bank)} digest should be; write digests in quotes")
    return digest


def _values(bank: int, registers: Mapping[Any, Any]) -> dict[int, tuple[bytes, ...]]:
    found: dict[int, tuple[bytes, ...]] = {}
    for register, value in registers.items():
        allowed = value if isinstance(value, list) else [value]
        if not 0 < len(allowed) <= MAX_VALUES:
            raise _invalid(f"has {len(allowed)} values for register {register!r:.40}")
        found[_register(register)] = tuple(_digest(bank, item) for item in allowed)
    return found


def _events(bank: int, registers: Mapping[Any, Any]) -> dict[int, tuple[UnverifiedEvent, ...]]:
    found: dict[int, tuple[UnverifiedEvent, ...]] = {}
    for register, items in registers.items():
        if not isinstance(items, list) or len(items) > MAX_EVENTS:
            raise _invalid(f"has no list of events for register {register!r:.40}")
        found[_register(register)] = tuple(_event(bank, _register(register), at, item) for at, item in enumerate(items))
    return found


def _event(bank: int, register: int, number: int, item: Any) -> UnverifiedEvent:
    if not isinstance(item, Mapping) or not set(item) <= {"digest", "what", "type", "data"}:
        raise _invalid(f"has an event of register {register} that is no digest with its words")
    kind = item.get("type", "")
    event_type = EventType[kind] if kind in EventType.__members__ else EventType.EV_UNUSED
    data = item.get("data")
    try:
        body = bytes.fromhex(data) if isinstance(data, str) else str(item.get("what", "")).encode()
    except ValueError:
        raise _invalid(f"has an event of register {register} whose data are not hexadecimal") from None
    return UnverifiedEvent(number, register, event_type, {bank: _digest(bank, item.get("digest"))}, body, 0)


def registers_of(events: Sequence[UnverifiedEvent], bank: int) -> dict[int, list[UnverifiedEvent]]:
    """Return the events that are extended in `bank`, by register, in order."""
    found: dict[int, list[UnverifiedEvent]] = {}
    for event in events:
        if event.event_type != EventType.EV_NO_ACTION and bank in event.digests:
            found.setdefault(event.register, []).append(event)
    return found


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "REFERENCE_INVALID", f"the file of reference values {what}", remedy="see docs/eventlog.md, Reference values"
    )
