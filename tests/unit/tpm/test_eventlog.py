"""Event logs: written and read, replayed as a verifier does, and hostile ones refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.eventlog import (
    EV_EVENT_TAG,
    EV_NO_ACTION,
    MAX_EVENT_SIZE,
    MAX_EVENTS,
    MAX_LOG_SIZE,
    Event,
    event2,
    parse_event_log,
    replay,
    spec_id_header,
)
from vtpm.tpm.pcr import PcrBank

BANKS = (PcrBank.SHA256, PcrBank.SHA384)
HEADER = spec_id_header(BANKS)
EV_SEPARATOR = 4


def digests_of(data: bytes, banks: tuple[PcrBank, ...] = BANKS) -> Mapping[PcrBank, bytes]:
    return {bank: hashlib.new(bank.hash_name, data).digest() for bank in banks}


def measured(pcr: int, data: bytes, event_type: int = EV_EVENT_TAG) -> bytes:
    return event2(pcr, event_type, digests_of(data), data)


def startup_locality(locality: int) -> bytes:
    return event2(0, EV_NO_ACTION, {bank: bytes(bank.digest_size) for bank in BANKS}, b"StartupLocality\0" + bytes([locality]))


def refusal(log: bytes) -> str:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_event_log(log)
    assert refused.value.reason == "EVENT_LOG_INVALID"
    return refused.value.message


events = st.tuples(st.integers(0, 23), st.integers(0, 0xFFFF_FFFF), st.binary(max_size=80))


@settings(deadline=None)
@given(content=st.lists(events, max_size=12))
def test_a_log_is_read_as_it_was_written(content: list[tuple[int, int, bytes]]) -> None:
    log = HEADER + b"".join(measured(pcr, data, event_type) for pcr, event_type, data in content)
    assert parse_event_log(log) == [
        Event(pcr, event_type, {bank.alg_id: digest for bank, digest in digests_of(data).items()}, data)
        for pcr, event_type, data in content
    ]


def test_the_first_record_is_the_one_of_the_specification() -> None:
    # TCG_PCClientPCREvent with a TCG_EfiSpecIdEvent, field by field (Firmware Profile, 10.2.1 and 10.4.5.1).
    assert spec_id_header([PcrBank.SHA256]) == bytes.fromhex(
        "00000000" "03000000" + "00" * 20 + "21000000"
        "53706563204944204576656e74303300" "00000000" "00" "02" "00" "02" "01000000" "0b00" "2000" "00"
    )  # fmt: skip


def test_a_pcr_replays_to_the_chain_of_its_events() -> None:
    log = HEADER + measured(7, b"first") + measured(4, b"other") + measured(7, b"second")
    value = bytes(32)
    for data in (b"first", b"second"):
        value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    assert replay(parse_event_log(log), PcrBank.SHA256) == {
        7: value,
        4: hashlib.sha256(bytes(32) + hashlib.sha256(b"other").digest()).digest(),
    }


def test_the_order_of_events_matters() -> None:
    forth = parse_event_log(HEADER + measured(7, b"a") + measured(7, b"b"))
    assert replay(forth, PcrBank.SHA384) != replay(forth[::-1], PcrBank.SHA384)


def test_a_no_action_event_is_not_extended() -> None:
    log = HEADER + measured(7, b"a") + measured(7, b"nothing", EV_NO_ACTION)
    assert replay(parse_event_log(log), PcrBank.SHA256) == replay(parse_event_log(HEADER + measured(7, b"a")), PcrBank.SHA256)


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_begins_at_the_startup_locality(locality: int) -> None:
    log = HEADER + startup_locality(locality) + measured(0, b"crtm") + measured(1, b"setup")
    values = replay(parse_event_log(log), PcrBank.SHA384)
    first = bytes(47) + bytes([locality])
    assert values[0] == hashlib.sha384(first + hashlib.sha384(b"crtm").digest()).digest()
    assert values[1] == hashlib.sha384(bytes(48) + hashlib.sha384(b"setup").digest()).digest()


@pytest.mark.parametrize(("pcr", "first"), [(16, 0x00), (17, 0xFF), (22, 0xFF), (23, 0x00)])
def test_the_pcrs_of_a_dynamic_launch_begin_as_ones(pcr: int, first: int) -> None:
    values = replay(parse_event_log(HEADER + measured(pcr, b"x")), PcrBank.SHA256)
    assert values[pcr] == hashlib.sha256(bytes([first]) * 32 + hashlib.sha256(b"x").digest()).digest()


def test_a_bank_that_the_log_does_not_carry_cannot_be_replayed() -> None:
    with pytest.raises(InvalidArgumentError, match="sha1") as refused:
        replay(parse_event_log(HEADER + measured(0, b"x")), PcrBank.SHA1)
    assert refused.value.reason == "EVENT_LOG_INVALID"


@pytest.mark.parametrize("pcr", [24, 0xFFFF_FFFF])
def test_an_event_of_a_pcr_that_no_tpm_has_cannot_be_replayed(pcr: int) -> None:
    with pytest.raises(InvalidArgumentError, match=str(pcr)) as refused:
        replay(parse_event_log(HEADER + measured(pcr, b"x")), PcrBank.SHA256)
    assert refused.value.reason == "EVENT_LOG_INVALID"


def test_a_digest_of_another_hash_than_the_header_names_is_refused() -> None:
    assert "0x0004" in refusal(HEADER + event2(0, EV_SEPARATOR, digests_of(b"", (PcrBank.SHA1,)), b""))


def test_a_log_of_the_old_format_is_refused() -> None:
    assert "Spec ID" in refusal(struct.pack("<II20sI", 0, 8, bytes(20), 4) + b"\0\0\0\0")


def spec_id_of(*algorithms: tuple[int, int], count: int | None = None) -> bytes:
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms) if count is None else count)
    spec += b"".join(struct.pack("<HH", alg_id, size) for alg_id, size in algorithms) + b"\0"
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(spec)) + spec


@pytest.mark.parametrize(
    "header",
    [
        spec_id_of(),
        spec_id_of((0x0B, 32), count=0xFFFF_FFFF),
        spec_id_of((0x0B, 32), count=2),
        spec_id_of((0x0B, 31)),
        spec_id_of((0x0B, 0)),
        spec_id_of((0x12, 65)),
        spec_id_of(*[(0x12, 32)] * 17),
    ],
    ids=["no hash", "four billion hashes", "one of two hashes", "short", "empty", "oversized", "seventeen"],
)
def test_a_header_that_misstates_digest_sizes_is_refused(header: bytes) -> None:
    refusal(header)


def test_a_hash_that_the_service_does_not_know_is_skipped_over() -> None:
    record = struct.pack("<IIIH", 5, EV_SEPARATOR, 1, 0x12) + b"\x77" * 32 + struct.pack("<I", 2) + b"ok"
    assert parse_event_log(spec_id_of((0x12, 32)) + record) == [Event(5, EV_SEPARATOR, {0x12: b"\x77" * 32}, b"ok")]


def test_an_event_with_too_many_digests_is_refused() -> None:
    assert "17 digests" in refusal(HEADER + struct.pack("<III", 0, 0, 17) + bytes(2000))


def test_an_event_larger_than_the_bound_is_refused_before_it_is_taken() -> None:
    head = struct.pack("<III", 0, 0, 0)
    assert parse_event_log(HEADER + head + struct.pack("<I", MAX_EVENT_SIZE) + bytes(MAX_EVENT_SIZE))
    assert str(MAX_EVENT_SIZE + 1) in refusal(HEADER + head + struct.pack("<I", MAX_EVENT_SIZE + 1) + bytes(MAX_EVENT_SIZE + 1))


def test_a_log_larger_than_the_bound_is_refused() -> None:
    assert "16 MiB" in refusal(HEADER + bytes(MAX_LOG_SIZE))


def test_a_log_with_too_many_events_is_refused() -> None:
    empty = struct.pack("<IIII", 0, 0, 0, 0)
    assert len(parse_event_log(HEADER + empty * MAX_EVENTS)) == MAX_EVENTS
    assert "too many" in refusal(HEADER + empty * (MAX_EVENTS + 1))


@settings(deadline=None)
@given(data=st.data())
def test_a_cut_log_is_refused_or_is_a_log_of_fewer_events(data: st.DataObject) -> None:
    records = [measured(pcr, bytes([pcr]) * pcr) for pcr in range(4)]
    log = HEADER + b"".join(records)
    ends = [len(HEADER) + sum(map(len, records[:count])) for count in range(len(records) + 1)]
    cut = data.draw(st.integers(0, len(log)))
    if cut in ends:
        assert len(parse_event_log(log[:cut])) == ends.index(cut)
    else:
        refusal(log[:cut])


@settings(deadline=None)
@given(log=st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: HEADER + tail))
def test_any_bytes_are_a_log_or_are_refused(log: bytes) -> None:
    try:
        found = parse_event_log(log)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert all(len(event.digests.get(PcrBank.SHA256.alg_id, bytes(32))) == 32 for event in found)
    assert reason in {"", "EVENT_LOG_INVALID"}
