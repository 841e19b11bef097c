"""The register values that a log leads to."""

from __future__ import annotations

import hashlib

import pytest

from tests.support.eventlogs import BANK, log_of, names, read, record, separator, sha256
from vtpm.eventlog.hashes import SHA384
from vtpm.eventlog.replay import replay, replay_events
from vtpm.eventlog.types import EventType
from vtpm.tpm.eventlog import parse_event_log
from vtpm.tpm.eventlog import replay as replay_of_the_service
from vtpm.tpm.pcr import PcrBank

BOTH = (PcrBank.SHA256, PcrBank.SHA384)
LOCALITY = b"StartupLocality\0"


def locality(value: int) -> bytes:
    return record(0, EventType.EV_NO_ACTION, LOCALITY + bytes([value]))


@pytest.mark.parametrize("bank", BOTH)
def test_each_bank_replays_as_the_service_replays_its_own_log(bank: PcrBank) -> None:
    events = [record(index % 24, 6, bytes([index]), banks=BOTH) for index in range(60)]
    expected = replay_of_the_service(parse_event_log(log_of(*events, banks=BOTH)), bank)
    assert replay(read(*events, banks=BOTH), bank.alg_id).values == expected


def test_a_log_replays_to_any_prefix() -> None:
    log = read(record(7, 4, b"a"), record(7, 4, b"b"))
    first = sha256(bytes(32) + sha256(b"a"))
    assert replay(log, BANK, 0).values == replay(log, BANK, 1).values == {}
    assert replay(log, BANK, 2).values == {7: first}
    assert replay(log, BANK, 3).values == replay(log, BANK).values == {7: sha256(first + sha256(b"b"))}


@pytest.mark.parametrize("value", [0, 3, 4])
def test_pcr_0_begins_at_the_startup_locality(value: int) -> None:
    made = replay(read(locality(value), record(0, 8, b"v")), BANK)
    assert made.values == {0: sha256(bytes(31) + bytes([value]) + sha256(b"v"))}
    assert not made.findings


@pytest.mark.parametrize(
    ("events", "finding"),
    [
        ([locality(1)], "LOCALITY_INVALID"),
        ([record(0, EventType.EV_NO_ACTION, LOCALITY)], "LOCALITY_INVALID"),
        ([locality(3), locality(4)], "LOCALITY_REPEATED"),
        ([record(0, 8, b"first"), locality(3)], "LOCALITY_REPEATED"),
    ],
)
def test_a_startup_locality_that_cannot_be_is_ignored_with_a_finding(events: list[bytes], finding: str) -> None:
    made = replay(read(*events, record(0, 8, b"v")), BANK)
    assert names(made.findings) == {finding}
    first = 3 if finding == "LOCALITY_REPEATED" and len(events[0]) == len(locality(3)) else 0
    start = bytes(31) + bytes([first])
    begun = sha256(start + sha256(b"first")) if b"first" in events[0] else start
    assert made.values[0] == sha256(begun + sha256(b"v"))


@pytest.mark.parametrize(("register", "first"), [(16, 0), (17, 0xFF), (22, 0xFF), (23, 0)])
def test_the_pcrs_of_a_dynamic_launch_begin_as_ones(register: int, first: int) -> None:
    assert replay(read(record(register, 6, b"x")), BANK).values == {register: sha256(bytes([first]) * 32 + sha256(b"x"))}


def test_rtmrs_begin_as_zeros_and_there_are_four() -> None:
    banks = (PcrBank.SHA384,)
    log = read(record(1, 6, b"x", banks=banks), record(4, 6, b"x", banks=banks), banks=banks)
    expected = hashlib.sha384(bytes(48) + hashlib.sha384(b"x").digest()).digest()
    assert replay(log, SHA384).values == {1: expected, 4: expected}
    assert names(replay_events(read(record(7, 6, b"x")).events, BANK, td=True).findings) == {"REGISTER_UNKNOWN"}


def test_an_event_without_a_digest_of_the_bank_extends_nothing_and_is_a_finding() -> None:
    log = read(record(7, 4, b"a", banks=BOTH), record(7, 4, b"only sha256"), banks=BOTH)
    assert len(log.events) == 3
    made = replay(log, SHA384)
    assert made.values == {7: hashlib.sha384(bytes(48) + hashlib.sha384(b"a").digest()).digest()}
    assert names(made.findings) == {"BANK_MISSING"}


def test_an_event_that_is_not_measured_extends_nothing() -> None:
    assert (
        replay(read(separator(7), record(7, EventType.EV_NO_ACTION, b"x")), BANK).values
        == replay(read(separator(7)), BANK).values
    )


def test_a_register_that_does_not_exist_is_a_finding() -> None:
    made = replay(read(record(24, 6, b"x"), record(0xFFFFFFFE, 6, b"x")), BANK)
    assert (made.values, names(made.findings)) == ({}, {"REGISTER_UNKNOWN"})


def test_a_bank_whose_hash_is_unknown_cannot_be_replayed() -> None:
    assert names(replay(read(separator(7)), 0x99).findings) == {"BANK_NOT_COMPUTABLE"}
