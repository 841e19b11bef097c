"""Sealed state opens at its own place with its own key, and nowhere else (invariant 6)."""

from __future__ import annotations

import dataclasses
import traceback
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import ErrorKind, SealedStateError
from vtpm.seal.envelope import MAX_ENVELOPE_SIZE, Place, StateKind, place_of, seal, unseal
from vtpm.seal.keys import new_data_key

# Offsets of the layout: magic 0, format 4, algorithm 5, kind 6, reserved 7, instance 8, epoch 24, version 32, nonce 40.
HEADER_SIZE = 52
TAG_SIZE = 16

SECRET = b"the seed of the endorsement hierarchy"
PLACE = Place(uuid.UUID("0198c0de-0000-7000-8000-0000000000aa"), StateKind.PERMANENT, epoch=7, version=42)
OTHER_INSTANCE = uuid.UUID("0198c0de-0000-7000-8000-0000000000bb")
KEY = new_data_key()

u64 = st.integers(0, 2**64 - 1)
places = st.builds(Place, st.uuids(), st.sampled_from(StateKind), u64, u64)


@pytest.fixture
def sealed() -> bytes:
    return seal(KEY, PLACE, SECRET)


def refusal(place: Place, envelope: bytes, key: bytes = KEY) -> SealedStateError:
    with pytest.raises(SealedStateError) as refused:
        unseal(key, place, envelope)
    assert refused.value.kind is ErrorKind.DATA_LOSS
    assert refused.value.subject == str(place.instance)
    assert refused.value.remedy
    return refused.value


def patched(envelope: bytes, offset: int, replacement: bytes) -> bytes:
    return envelope[:offset] + replacement + envelope[offset + len(replacement) :]


@settings(deadline=None)
@given(place=places, plaintext=st.binary(max_size=300))
def test_what_was_sealed_comes_back_at_its_place(place: Place, plaintext: bytes) -> None:
    assert unseal(KEY, place, seal(KEY, place, plaintext)) == plaintext


def test_the_envelope_has_the_layout_that_is_written_down(sealed: bytes) -> None:
    assert sealed[:8] == b"VTPM\x01\x01\x01\x00"
    assert sealed[8:24] == PLACE.instance.bytes
    assert sealed[24:40] == (7).to_bytes(8, "big") + (42).to_bytes(8, "big")
    assert len(sealed) == HEADER_SIZE + len(SECRET) + TAG_SIZE


def test_the_plaintext_is_not_in_the_envelope(sealed: bytes) -> None:
    assert SECRET not in sealed
    assert SECRET[:8] not in sealed


def test_the_same_state_sealed_twice_looks_different() -> None:
    first, second = seal(KEY, PLACE, SECRET), seal(KEY, PLACE, SECRET)
    assert first[40:HEADER_SIZE] != second[40:HEADER_SIZE]
    assert first[HEADER_SIZE:] != second[HEADER_SIZE:]


@pytest.mark.parametrize(
    ("moved_to", "reason"),
    [
        (dataclasses.replace(PLACE, instance=OTHER_INSTANCE), "ENVELOPE_INSTANCE_MISMATCH"),
        (dataclasses.replace(PLACE, kind=StateKind.VOLATILE), "ENVELOPE_KIND_MISMATCH"),
        (dataclasses.replace(PLACE, epoch=8), "ENVELOPE_EPOCH_MISMATCH"),
        (dataclasses.replace(PLACE, version=41), "ENVELOPE_VERSION_MISMATCH"),
        (dataclasses.replace(PLACE, version=43), "ENVELOPE_VERSION_MISMATCH"),
    ],
    ids=["another instance", "another kind", "a later epoch", "an earlier version", "a later version"],
)
def test_a_blob_moved_to_another_place_is_refused_by_name(sealed: bytes, moved_to: Place, reason: str) -> None:
    assert refusal(moved_to, sealed).reason == reason


@settings(deadline=None)
@given(place=places, other=places)
def test_a_blob_opens_at_no_other_place(place: Place, other: Place) -> None:
    sealed = seal(KEY, place, SECRET)
    if other != place:
        assert refusal(other, sealed).reason.endswith("_MISMATCH")


@pytest.mark.parametrize(
    ("offset", "replacement", "claimed"),
    [
        (6, b"\x02", dataclasses.replace(PLACE, kind=StateKind.VOLATILE)),
        (8, OTHER_INSTANCE.bytes, dataclasses.replace(PLACE, instance=OTHER_INSTANCE)),
        (24, (8).to_bytes(8, "big"), dataclasses.replace(PLACE, epoch=8)),
        (32, (43).to_bytes(8, "big"), dataclasses.replace(PLACE, version=43)),
    ],
    ids=["kind", "instance", "epoch", "version"],
)
def test_a_header_rewritten_to_claim_another_place_is_not_believed(
    sealed: bytes, offset: int, replacement: bytes, claimed: Place
) -> None:
    forged = patched(sealed, offset, replacement)
    assert place_of(forged) == claimed
    assert refusal(claimed, forged).reason == "ENVELOPE_AUTHENTICATION_FAILED"


def test_the_wrong_data_key_is_refused_by_name(sealed: bytes) -> None:
    assert refusal(PLACE, sealed, new_data_key()).reason == "ENVELOPE_AUTHENTICATION_FAILED"


def test_the_body_of_one_version_under_the_header_of_another_is_refused(sealed: bytes) -> None:
    later = dataclasses.replace(PLACE, version=43)
    spliced = seal(KEY, later, SECRET)[:HEADER_SIZE] + sealed[HEADER_SIZE:]
    assert refusal(later, spliced).reason == "ENVELOPE_AUTHENTICATION_FAILED"


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"v"), (3, b"X"), (4, b"\x00"), (4, b"\x02"), (5, b"\x00"), (5, b"\x02"), (6, b"\x00"), (6, b"\x03"), (7, b"\x01")],
    ids=["magic", "magic's end", "format 0", "format 2", "algorithm 0", "algorithm 2", "kind 0", "kind 3", "reserved"],
)
def test_an_envelope_of_an_unknown_version_is_refused_by_name(sealed: bytes, offset: int, value: bytes) -> None:
    unknown = patched(sealed, offset, value)
    assert refusal(PLACE, unknown).reason == "ENVELOPE_FORMAT_UNKNOWN"
    with pytest.raises(SealedStateError) as refused:
        place_of(unknown)
    assert refused.value.reason == "ENVELOPE_FORMAT_UNKNOWN"


def test_the_refusal_of_an_unknown_format_says_which_one(sealed: bytes) -> None:
    assert "format 9" in refusal(PLACE, patched(sealed, 4, b"\x09")).message


@pytest.mark.parametrize("size", [0, 1, 4, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + TAG_SIZE - 1])
def test_an_envelope_with_no_room_for_header_and_tag_is_truncated(sealed: bytes, size: int) -> None:
    assert refusal(PLACE, sealed[:size]).reason == "ENVELOPE_TRUNCATED"


@settings(deadline=None)
@given(data=st.data())
def test_a_cut_envelope_never_opens(data: st.DataObject) -> None:
    sealed = seal(KEY, PLACE, SECRET)
    cut = data.draw(st.integers(0, len(sealed) - 1))
    reason = "ENVELOPE_TRUNCATED" if cut < HEADER_SIZE + TAG_SIZE else "ENVELOPE_AUTHENTICATION_FAILED"
    assert refusal(PLACE, sealed[:cut]).reason == reason


@settings(deadline=None)
@given(tail=st.binary(min_size=1, max_size=40))
def test_an_envelope_with_more_behind_it_never_opens(tail: bytes) -> None:
    assert refusal(PLACE, seal(KEY, PLACE, SECRET) + tail).reason == "ENVELOPE_AUTHENTICATION_FAILED"


@settings(deadline=None)
@given(bit=st.integers(0, (HEADER_SIZE + len(SECRET) + TAG_SIZE) * 8 - 1))
def test_one_flipped_bit_anywhere_is_refused_with_the_reason_of_its_field(bit: int) -> None:
    flipped = bytearray(seal(KEY, PLACE, SECRET))
    flipped[bit // 8] ^= 1 << bit % 8
    ends = {
        6: "ENVELOPE_FORMAT_UNKNOWN",
        8: "ENVELOPE_FORMAT_UNKNOWN",
        24: "ENVELOPE_INSTANCE_MISMATCH",
        32: "ENVELOPE_EPOCH_MISMATCH",
        40: "ENVELOPE_VERSION_MISMATCH",
        len(flipped): "ENVELOPE_AUTHENTICATION_FAILED",
    }
    assert refusal(PLACE, bytes(flipped)).reason == next(reason for end, reason in ends.items() if bit // 8 < end)


def test_an_envelope_larger_than_any_state_is_refused_before_it_is_opened(sealed: bytes) -> None:
    assert refusal(PLACE, sealed + bytes(MAX_ENVELOPE_SIZE)).reason == "ENVELOPE_TOO_LARGE"


def test_the_largest_state_opens_again() -> None:
    largest = bytes(MAX_ENVELOPE_SIZE - HEADER_SIZE - TAG_SIZE)
    assert unseal(KEY, PLACE, seal(KEY, PLACE, largest)) == largest


@settings(deadline=None)
@given(envelope=st.binary(max_size=120) | st.binary(min_size=60, max_size=120).map(lambda tail: b"VTPM\x01\x01\x01\x00" + tail))
def test_any_bytes_name_a_place_or_are_refused(envelope: bytes) -> None:
    try:
        place = place_of(envelope)
    except SealedStateError as refused:
        reason = refused.reason
    else:
        reason = refusal(place, envelope).reason
    assert reason in {"ENVELOPE_TRUNCATED", "ENVELOPE_FORMAT_UNKNOWN", "ENVELOPE_AUTHENTICATION_FAILED"}


@settings(deadline=None)
@given(envelope=st.binary(max_size=200), key=st.binary(min_size=32, max_size=32))
def test_a_refusal_shows_no_byte_of_key_or_state(envelope: bytes, key: bytes) -> None:
    for damaged in (envelope, seal(key, PLACE, SECRET)[:-1], seal(key, PLACE, SECRET) + envelope[:1] + b"\0"):
        refused = refusal(PLACE, damaged, key)
        shown = "".join(traceback.format_exception(refused)) + repr(refused) + repr(refused.metadata) + str(refused)
        assert SECRET.decode() not in shown
        assert repr(key)[2:-1] not in shown
        assert key.hex() not in shown


def test_what_could_not_be_unsealed_is_not_sealed() -> None:
    place = Place(uuid.uuid4(), StateKind.PERMANENT, 1, 1)
    largest = bytes((4 << 20) - 68)
    assert unseal(bytes(32), place, seal(bytes(32), place, largest)) == largest
    with pytest.raises(SealedStateError) as refused:
        seal(bytes(32), place, largest + b"x")
    assert refused.value.reason == "ENVELOPE_TOO_LARGE"
