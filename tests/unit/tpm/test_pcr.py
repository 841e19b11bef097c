"""PCR banks, selections and extends; tpm2-tss gives the second opinion."""

from __future__ import annotations

import ctypes
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.types import TPML_PCR_SELECTION

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.pcr import (
    PCR_COUNT,
    PcrBank,
    PcrSelection,
    extend,
    marshal_selections,
    parse_selection,
    pcr_digest,
    to_tpm2_tools_pcrs,
    unmarshal_selections,
)

indices = st.lists(st.integers(0, PCR_COUNT - 1), max_size=30).map(tuple)
selections = st.lists(st.builds(PcrSelection, st.sampled_from(PcrBank), indices), max_size=4).map(tuple)


def written(selection: PcrSelection) -> str:
    return f"{selection.bank.hash_name}:{','.join(map(str, selection.indices))}"


@pytest.mark.parametrize("bank", PcrBank)
def test_a_bank_is_known_by_name_and_by_algorithm(bank: PcrBank) -> None:
    assert PcrBank.from_name(bank.name) is PcrBank.from_name(bank.hash_name) is PcrBank.from_alg(bank.alg_id) is bank
    assert hashlib.new(bank.hash_name).digest_size == bank.digest_size


@pytest.mark.parametrize("name", ["", "md5", "sha256 ", "sm3_256", "x" * 1000])
def test_an_unknown_bank_is_refused_by_name_and_not_echoed_at_length(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        PcrBank.from_name(name)
    assert refused.value.reason == "PCR_BANK_UNKNOWN"
    assert len(str(refused.value)) < 200


def test_an_unknown_algorithm_is_no_bank() -> None:
    with pytest.raises(InvalidArgumentError, match="0x0012") as refused:
        PcrBank.from_alg(0x12)
    assert refused.value.reason == "PCR_BANK_UNKNOWN"


def test_a_selection_is_read_as_tpm2_tools_write_it_and_with_ranges() -> None:
    assert parse_selection("sha256:0-3,10 + SHA1:all") == (
        PcrSelection(PcrBank.SHA256, (0, 1, 2, 3, 10)),
        PcrSelection(PcrBank.SHA1, tuple(range(24))),
    )


def test_a_selection_is_kept_sorted_and_distinct() -> None:
    assert parse_selection("sha384:7,3,3-5")[0].indices == (3, 4, 5, 7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "PCR_SELECTION_INVALID"),
        ("sha256", "PCR_SELECTION_INVALID"),
        ("sha256:", "PCR_SELECTION_INVALID"),
        ("sha256:1,", "PCR_SELECTION_INVALID"),
        ("sha256:5-3", "PCR_SELECTION_INVALID"),
        ("sha256:-1", "PCR_SELECTION_INVALID"),
        ("sha256:1-", "PCR_SELECTION_INVALID"),
        ("sha256:100", "PCR_SELECTION_INVALID"),
        ("sha256:0x1", "PCR_SELECTION_INVALID"),
        ("sha256:0+", "PCR_SELECTION_INVALID"),
        ("sha256:0+sha256:1", "PCR_SELECTION_INVALID"),
        ("+".join(["sha1:0"] * 1000), "PCR_SELECTION_INVALID"),
        ("sha256:24", "PCR_INDEX_INVALID"),
        ("sha256:0-24", "PCR_INDEX_INVALID"),
        ("md5:0", "PCR_BANK_UNKNOWN"),
        (":0", "PCR_BANK_UNKNOWN"),
    ],
)
def test_a_malformed_selection_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_selection(text)
    assert refused.value.reason == reason


@settings(deadline=None)
@given(text=st.text(alphabet="sha1256384:+,-0123456789al ", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_selection_or_is_refused(text: str) -> None:
    try:
        found = parse_selection(text)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert parse_selection("+".join(map(written, found))) == found
    assert reason in {"", "PCR_SELECTION_INVALID", "PCR_BANK_UNKNOWN", "PCR_INDEX_INVALID"}


@pytest.mark.parametrize("index", [-1, 24, 1 << 40])
def test_a_pcr_that_no_tpm_has_cannot_be_selected(index: int) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        PcrSelection(PcrBank.SHA256, (0, index))
    assert refused.value.reason == "PCR_INDEX_INVALID"


@settings(deadline=None)
@given(bank=st.sampled_from(PcrBank), chosen=st.sets(st.integers(0, 23), min_size=1))
def test_a_marshalled_selection_is_that_of_tpm2_tss(bank: PcrBank, chosen: set[int]) -> None:
    selection = PcrSelection(bank, tuple(chosen))
    assert marshal_selections(parse_selection(written(selection))) == TPML_PCR_SELECTION.parse(written(selection)).marshal()


@settings(deadline=None)
@given(chosen=selections, tail=st.binary(max_size=8))
def test_a_marshalled_selection_comes_back_with_its_size(chosen: tuple[PcrSelection, ...], tail: bytes) -> None:
    data = marshal_selections(chosen)
    assert unmarshal_selections(data + tail) == (chosen, len(data))


@settings(deadline=None)
@given(chosen=selections, data=st.data())
def test_a_cut_selection_is_refused(chosen: tuple[PcrSelection, ...], data: st.DataObject) -> None:
    whole = marshal_selections(chosen)
    with pytest.raises(InvalidArgumentError) as refused:
        unmarshal_selections(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert refused.value.reason == "PCR_SELECTION_INVALID"


@settings(deadline=None)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_a_selection_or_are_refused(data: bytes) -> None:
    try:
        found, size = unmarshal_selections(data)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert size <= len(data)
        assert unmarshal_selections(marshal_selections(found))[0] == found
    assert reason in {"", "PCR_SELECTION_INVALID", "PCR_BANK_UNKNOWN"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("00000011" + "000b0300000000" * 17, "PCR_SELECTION_INVALID"),
        ("ffffffff", "PCR_SELECTION_INVALID"),
        ("00000001000b0400000001", "PCR_SELECTION_INVALID"),
        ("00000001000b00", "PCR_SELECTION_INVALID"),
        ("00000001000b030000", "PCR_SELECTION_INVALID"),
        ("00000001000a03000001", "PCR_BANK_UNKNOWN"),
    ],
    ids=["seventeen banks", "four billion banks", "four octets", "no octets", "octets cut", "no such hash"],
)
def test_a_hostile_selection_is_refused_by_name(data: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        unmarshal_selections(bytes.fromhex(data))
    assert refused.value.reason == reason


@pytest.mark.parametrize("bank", PcrBank)
def test_an_extend_hashes_the_old_value_and_then_the_digest(bank: PcrBank) -> None:
    old, digest = b"\x01" * bank.digest_size, b"\x02" * bank.digest_size
    assert extend(bank, old, digest) == hashlib.new(bank.hash_name, old + digest).digest() != extend(bank, digest, old)


@pytest.mark.parametrize(("old", "digest"), [(32, 31), (31, 32), (32, 48), (0, 32), (31, 33)])
def test_a_digest_of_another_size_is_refused(old: int, digest: int) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        extend(PcrBank.SHA256, bytes(old), bytes(digest))
    assert refused.value.reason == "DIGEST_SIZE_INVALID"


def test_the_pcr_digest_depends_on_the_order_of_values() -> None:
    first, second = bytes(32), b"\xff" * 32
    assert pcr_digest("sha256", iter([first, second])) == hashlib.sha256(first + second).digest()
    assert pcr_digest("sha256", [first, second]) != pcr_digest("sha256", [second, first])


class ToolsSelection(ctypes.LittleEndianStructure):
    _fields_ = (("hash", ctypes.c_uint16), ("size", ctypes.c_uint8), ("bits", ctypes.c_uint8 * 4))


class ToolsDigest(ctypes.LittleEndianStructure):
    _fields_ = (("size", ctypes.c_uint16), ("buffer", ctypes.c_uint8 * 64))


class ToolsDigests(ctypes.LittleEndianStructure):
    _fields_ = (("count", ctypes.c_uint32), ("digests", ToolsDigest * 8))


class ToolsSelections(ctypes.LittleEndianStructure):
    _fields_ = (("count", ctypes.c_uint32), ("selections", ToolsSelection * 16))


@settings(deadline=None)
@given(chosen=selections.filter(lambda every: any(one.indices for one in every)))
def test_the_tools_file_has_the_layout_of_the_c_structs(chosen: tuple[PcrSelection, ...]) -> None:
    values = [bytes([index]) * one.bank.digest_size for one in chosen for index in one.indices]
    data = to_tpm2_tools_pcrs(chosen, values)

    head = ToolsSelections.from_buffer_copy(data)
    offset = ctypes.sizeof(ToolsSelections)
    lists = int.from_bytes(data[offset : offset + 4], "little")
    parts = [ToolsDigests.from_buffer_copy(data, offset + 4 + number * ctypes.sizeof(ToolsDigests)) for number in range(lists)]

    found = [(one.hash, one.size, bytes(one.bits)) for one in head.selections[: head.count]]
    assert found == [(one.bank.alg_id, 3, sum(1 << i for i in one.indices).to_bytes(4, "little")) for one in chosen]
    assert [bytes(one.buffer)[: one.size] for part in parts for one in part.digests[: part.count]] == values
    assert len(data) == offset + 4 + lists * ctypes.sizeof(ToolsDigests)
