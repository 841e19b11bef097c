"""Logs of every kind are read as far as they make sense; any bytes at all give a value and no exception."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.eventlogs import BANK, boot, log_of, names, read, record, separator, sha256
from vtpm.eventlog import tcg
from vtpm.eventlog.bootpath import boot_path
from vtpm.eventlog.checks import check_log
from vtpm.eventlog.describe import describe
from vtpm.eventlog.ima import UnverifiedImaLog, check_ima, replay_ima
from vtpm.eventlog.reading import detect, read_log
from vtpm.eventlog.replay import replay
from vtpm.eventlog.secureboot import secure_boot
from vtpm.eventlog.tcg import MAX_EVENTS, MAX_LOG_SIZE, read_tcg
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import LogFormat, UnverifiedLog
from vtpm.eventlog.wbcl import windows_boot
from vtpm.tpm.eventlog import Event, parse_event_log, spec_id_header
from vtpm.tpm.pcr import PcrBank

BOTH = (PcrBank.SHA256, PcrBank.SHA384)
WHOLE = log_of(
    record(7, EventType.EV_EFI_ACTION, b"one"), record(4, 0x77777777, b"unknown type"), separator(7), record(9, 6, b"x" * 40)
)


def use_everything(data: bytes, form: LogFormat | None = None) -> UnverifiedLog | UnverifiedImaLog:
    """Do with a log what can be done with one."""
    log = read_log(data, form)
    if isinstance(log, UnverifiedImaLog):
        check_ima(log)
        replay_ima(log, BANK)
        assert all(isinstance(entry.path, str) and isinstance(entry.file_digest, tuple) for entry in log.entries)
        return log
    for bank in log.banks:
        replay(log, bank)
        secure_boot(log, bank)
        boot_path(log, bank)
    check_log(log)
    windows_boot(log)
    assert all(isinstance(describe(event), str) for event in log.events)
    assert log.read_bytes <= log.size_bytes == len(data)
    return log


@pytest.mark.parametrize("banks", [(PcrBank.SHA1,), (PcrBank.SHA256,), BOTH, tuple(PcrBank)])
def test_a_log_of_the_service_is_read_as_the_service_reads_it(banks: tuple[PcrBank, ...]) -> None:
    raw = log_of(record(16, 6, b"a", banks=banks), record(9, 13, b"", banks=banks), banks=banks)
    events = read(record(16, 6, b"a", banks=banks), record(9, 13, b"", banks=banks), banks=banks).events
    assert [Event(event.register, event.event_type, event.digests, event.data) for event in events[1:]] == parse_event_log(raw)
    assert [raw[event.offset : event.offset + 4] for event in events[1:]] == [b"\x10\0\0\0", b"\x09\0\0\0"]


def test_of_a_log_that_is_cut_anywhere_the_events_before_the_cut_are_read() -> None:
    whole = read_tcg(WHOLE)
    ends = [event.offset for event in whole.events[1:]]
    for cut in range(len(WHOLE)):
        part = read_tcg(WHOLE[:cut])
        assert part.events == whole.events[: len(part.events)]
        assert len(part.events) == sum(end <= cut for end in ends)
        assert bool(names(part.findings) & {"LOG_CUT", "TRAILING_BYTES", "PADDING"}) != (cut in ends)


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_a_log_with_any_byte_changed_is_read_without_an_exception(value: int) -> None:
    for place in range(len(WHOLE)):
        use_everything(WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :])


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=2000), form=st.sampled_from([None, *LogFormat]))
def test_any_bytes_are_a_log_or_a_finding(data: bytes, form: LogFormat | None) -> None:
    log = use_everything(data, form)
    if form is None and detect(data) is LogFormat.UNKNOWN:
        assert names(log.findings) == {"FORMAT_UNKNOWN"}


@settings(deadline=None, max_examples=200)
@given(tail=st.binary(max_size=400))
def test_any_bytes_behind_a_good_record_leave_that_record_as_it_was(tail: bytes) -> None:
    good = log_of(record(7, EventType.EV_EFI_ACTION, b"good"))
    assert read_tcg(good + tail).events[:2] == read_tcg(good).events


@pytest.mark.parametrize(
    ("record_bytes", "finding"),
    [
        (struct.pack("<III", 0, 1, 0xFFFFFFFF), "RECORD_INVALID"),
        (struct.pack("<III", 0, 1, 17), "RECORD_INVALID"),
        (struct.pack("<IIIH", 0, 1, 1, 0x12) + bytes(32) + bytes(4), "BANK_UNDECLARED"),
        (struct.pack("<IIIH", 0, 1, 1, 0x0B) + bytes(32) + struct.pack("<I", 0xFFFFFFFF), "LOG_CUT"),
        (struct.pack("<IIIH", 0, 1, 1, 0x0B) + bytes(31), "LOG_CUT"),
        (b"\xff" * 64, "PADDING"),
        (bytes(64), "PADDING"),
        (b"odd", "TRAILING_BYTES"),
    ],
)
def test_counts_and_sizes_that_lie_end_the_reading_with_a_finding(record_bytes: bytes, finding: str) -> None:
    log = read_tcg(log_of(record(7, 4, b"before")) + record_bytes)
    assert len(log.events) == 2
    assert finding in names(log.findings)


@pytest.mark.parametrize(
    "algorithms",
    [
        struct.pack("<I", 0),
        struct.pack("<I", 17),
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<IHH", 1, 0x0B, 20),
        struct.pack("<IHH", 1, 0x99, 65),
        struct.pack("<IHH", 1, 0x99, 0),
        struct.pack("<IHHHH", 2, 0x0B, 32, 0x0B, 32),
    ],
)
def test_a_head_whose_algorithms_cannot_be_right_is_a_finding(algorithms: bytes) -> None:
    spec = b"Spec ID Event03\0" + bytes(8) + algorithms + b"\0"
    log = read_tcg(struct.pack("<II20sI", 0, 3, bytes(20), len(spec)) + spec + record(7, 4, b"x"))
    assert names(log.findings) == {"SPEC_ID_INVALID"}
    assert not log.banks


def test_two_digests_of_one_bank_are_a_finding_and_the_first_counts() -> None:
    twice = struct.pack("<III", 7, 4, 2) + struct.pack("<H", 0x0B) + sha256(b"a") + struct.pack("<H", 0x0B) + sha256(b"b")
    log = read_tcg(spec_id_header([PcrBank.SHA256]) + twice + struct.pack("<I", 0))
    assert log.events[1].digests == {BANK: sha256(b"a")}
    assert names(log.findings) == {"BANK_REPEATED"}


def test_more_events_than_are_read_are_a_finding() -> None:
    empty = struct.pack("<IIII", 7, 4, 0, 0)
    log = read_tcg(spec_id_header([PcrBank.SHA256]) + empty * (MAX_EVENTS + 5))
    assert len(log.events) == MAX_EVENTS
    assert names(log.findings) == {"TOO_MANY_EVENTS"}
    old = read_tcg(struct.pack("<II20sI", 7, 4, b"x" * 20, 0) * (MAX_EVENTS + 5))
    assert len(old.events) == MAX_EVENTS
    assert names(old.findings) == {"TOO_MANY_EVENTS"}


def test_of_a_log_larger_than_is_read_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcg, "MAX_LOG_SIZE", len(WHOLE) - 1)
    log = read_tcg(WHOLE)
    assert len(log.events) == 4
    assert names(log.findings) == {"LOG_TOO_LARGE", "LOG_CUT"}


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"A"])
def test_64_megabytes_of_one_byte_behind_a_log_change_nothing(filling: bytes) -> None:
    log = read_tcg(WHOLE + filling * (MAX_LOG_SIZE - len(WHOLE)))
    assert log.events == read_tcg(WHOLE).events
    assert len(log.findings) == 1


def test_64_megabytes_of_the_smallest_events_keep_a_bounded_number_of_them() -> None:
    log = read_tcg(spec_id_header([PcrBank.SHA256]) + struct.pack("<IIII", 99, 0x99, 0, 0) * (4 << 20))
    assert len(log.events) == MAX_EVENTS
    assert len(replay(log, BANK).findings) <= 130
    assert len(check_log(log)) <= 260


def test_a_log_of_registers_1_to_4_in_one_bank_is_a_ccel() -> None:
    events = (record(1, 4, b"\0\0\0\0", banks=(PcrBank.SHA384,)), record(4, 6, b"app", banks=(PcrBank.SHA384,)))
    log = read(*events, banks=(PcrBank.SHA384,))
    assert (log.format, log.td, names(log.findings)) == (LogFormat.CCEL, True, {"FORMAT_GUESSED"})
    assert [log.register_name(index) for index in (0, 1, 4)] == ["MRTD", "RTMR 0", "RTMR 3"]
    tpm = read(*events, record(0, 8, b"v", banks=(PcrBank.SHA384,)), banks=(PcrBank.SHA384,))
    assert (tpm.format, tpm.register_name(4)) == (LogFormat.TCG, "PCR 4")


def test_of_several_boots_in_one_file_the_last_one_is_read() -> None:
    first, last = log_of(record(7, 4, b"old")), log_of(record(7, 4, b"new"))
    log = read_log(first + last)
    assert isinstance(log, UnverifiedLog)
    assert [event.data for event in log.events[1:]] == [b"new"]
    assert "SEVERAL_BOOTS" in names(log.findings)


def test_what_is_unverified_says_so() -> None:
    log = boot()
    assert type(log).__name__ == "UnverifiedLog"
    assert type(log.events[0]).__name__ == "UnverifiedEvent"
