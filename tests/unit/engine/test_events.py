"""The event log of one TPM: whose each event is, and what each may fill of it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vtpm.engine.events import MAX_EVENT_LOG_SIZE, QUOTAS, EventLog, Origin, origin_of
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import FailedPreconditionError
from vtpm.tpm.eventlog import EV_EVENT_TAG, EV_NO_ACTION, event2, event2_size, parse_event_log, replay, spec_id_header
from vtpm.tpm.pcr import PcrBank, extend

BANKS = (PcrBank.SHA256, PcrBank.SHA384)
# What a message of the link takes (vtpm.engine.link).
MAX_MESSAGE = 256 << 10
NAMED = [Origin.SERVICE, Origin.OPERATOR, Origin.GUEST, Origin.VMM]
origins = st.sampled_from(NAMED)


def digests_of(data: bytes) -> dict[PcrBank, bytes]:
    return {bank: hashlib.new(bank.hash_name, data).digest() for bank in BANKS}


def measure(log: EventLog, origin: Origin, data: bytes, pcr: int = 16) -> None:
    log.check_room(origin, BANKS, data)
    log.add(origin, pcr, EV_EVENT_TAG, digests_of(data), data)


def fill(log: EventLog, origin: Origin, data: bytes = b"x" * 4096) -> int:
    """Measure until there is no room; return how often."""
    for count in range(100_000):
        try:
            measure(log, origin, data)
        except FailedPreconditionError:
            return count
    raise AssertionError("it takes everything")


def asleep_and_awake(log: EventLog) -> EventLog:
    snapshot = pb.Snapshot()
    log.fill(snapshot)
    awake = EventLog()
    awake.restore(pb.Snapshot.FromString(snapshot.SerializeToString()))
    return awake


@pytest.mark.parametrize("greedy", NAMED)
@pytest.mark.parametrize("data", [b"", b"x" * 3000])
def test_who_fills_its_part_keeps_nobody_else_from_measuring(greedy: Origin, data: bytes) -> None:
    log = EventLog()
    assert fill(log, greedy, data) > 0
    for other in NAMED:
        if other is not greedy:
            measure(log, other, b"still here")
    assert len(parse_event_log(log.bytes_for(BANKS))) == len(log.origins)


def test_all_parts_filled_fit_into_one_message() -> None:
    log = EventLog()
    for origin in NAMED:
        fill(log, origin, b"")
        fill(log, origin)
    reply = pb.WorkerReply(id=1 << 60)
    reply.event_log.event_log = log.bytes_for(BANKS)
    reply.event_log.origins.extend(pb.Origin.ValueType(origin) for origin in log.origins)
    assert len(reply.SerializeToString()) < MAX_MESSAGE
    assert sum(QUOTAS.values()) < MAX_EVENT_LOG_SIZE


@settings(deadline=None)
@given(content=st.lists(st.tuples(origins, st.integers(0, 23), st.binary(max_size=60)), max_size=12), naps=st.integers(0, 2))
def test_the_log_is_what_it_would_be_without_origins(content: list[tuple[Origin, int, bytes]], naps: int) -> None:
    log = EventLog()
    for origin, pcr, data in content:
        measure(log, origin, data, pcr)
    for _ in range(naps):
        log = asleep_and_awake(log)
    plain = spec_id_header(BANKS) + b"".join(event2(pcr, EV_EVENT_TAG, digests_of(data), data) for _, pcr, data in content)
    assert log.bytes_for(BANKS) == plain
    assert log.origins == [origin for origin, _, _ in content]


class Life(RuleBasedStateMachine):
    """A log that is measured into, hibernates and is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.log = EventLog()
        self.model: list[tuple[Origin, bytes]] = []

    @rule(origin=origins, size=st.integers(0, 4096))
    def measure(self, origin: Origin, size: int) -> None:
        data = b"m" * size
        used = sum(event2_size(BANKS, had) for whose, had in self.model if whose is origin)
        if used + event2_size(BANKS, data) <= QUOTAS[origin]:
            measure(self.log, origin, data)
            self.model.append((origin, data))
        else:
            with pytest.raises(FailedPreconditionError):
                measure(self.log, origin, data)

    @rule()
    def sleep(self) -> None:
        self.log = asleep_and_awake(self.log)

    @rule()
    def reset(self) -> None:
        self.log.clear()
        self.model.clear()

    @invariant()
    def is_what_was_measured(self) -> None:
        events = parse_event_log(self.log.bytes_for(BANKS))
        assert list(zip(self.log.origins, (event.data for event in events), strict=True)) == self.model


TestLife = Life.TestCase
TestLife.settings = settings(deadline=None, max_examples=30)


def test_a_snapshot_of_an_earlier_version_still_loads() -> None:
    records = spec_id_header(BANKS) + event2(16, EV_EVENT_TAG, digests_of(b"old"), b"old")
    log = EventLog()
    log.restore(pb.Snapshot(events=records))
    assert log.bytes_for(BANKS) == records
    assert log.origins == [], "not known of any"
    measure(log, Origin.OPERATOR, b"new")
    assert log.origins == [Origin.UNKNOWN, Origin.OPERATOR]
    assert asleep_and_awake(log).origins == [Origin.UNKNOWN, Origin.OPERATOR]
    assert [event.data for event in parse_event_log(log.bytes_for(BANKS))] == [b"old", b"new"]


def test_a_full_log_of_an_earlier_version_still_fits_into_a_message() -> None:
    record = event2(16, EV_EVENT_TAG, {PcrBank.SHA1: bytes(20)}, b"")
    records = spec_id_header((PcrBank.SHA1,))
    records += record * (((256 << 10) - 512 - len(records)) // len(record))
    log = EventLog()
    log.restore(pb.Snapshot(events=records))
    with pytest.raises(FailedPreconditionError) as full:
        log.check_room(Origin.OPERATOR, (PcrBank.SHA1,), b"")
    assert full.value.reason == "EVENT_LOG_FULL"
    reply = pb.EventLog(event_log=log.bytes_for((PcrBank.SHA1,)), origins=[pb.Origin.ValueType(item) for item in log.origins])
    assert len(reply.SerializeToString()) < MAX_MESSAGE


def test_an_earlier_version_finds_its_log_in_a_snapshot() -> None:
    log, snapshot = EventLog(), pb.Snapshot()
    measure(log, Origin.GUEST, b"mine")
    log.fill(snapshot)
    assert snapshot.events == log.bytes_for(BANKS)


def test_what_is_no_origin_is_not_known() -> None:
    assert origin_of(99) is Origin.UNKNOWN
    assert [origin_of(number) for number in range(5)] == [Origin.UNKNOWN, *NAMED]


def test_an_h_crtm_event_is_the_vmms_and_comes_first() -> None:
    log = EventLog()
    for firmware in (b"tried before", b"firmware"):
        log.h_crtm([hashlib.new(bank.hash_name, firmware).digest() for bank in PcrBank])
    log = asleep_and_awake(log)
    measure(log, Origin.OPERATOR, b"later", pcr=0)
    assert log.origins == [Origin.VMM, Origin.VMM, Origin.OPERATOR]
    events = parse_event_log(log.bytes_for(BANKS))
    assert events[0].event_type == EV_NO_ACTION
    for bank in BANKS:
        first = bytes(bank.digest_size - 1) + b"\4"
        value = extend(bank, first, hashlib.new(bank.hash_name, b"firmware").digest())
        assert replay(events, bank)[0] == extend(bank, value, digests_of(b"later")[bank])
