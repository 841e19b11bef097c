"""DER by hand, read by another implementation."""

from __future__ import annotations

import datetime as dt

import pytest
from asn1crypto import core
from hypothesis import given
from hypothesis import strategies as st

from vtpm.pki import der


@given(st.integers(-(2**200), 2**200))
def test_integers_are_read_back(value: int) -> None:
    encoded = der.integer(value)
    assert core.Integer.load(encoded).native == value
    assert core.Integer(value).dump() == encoded or value < 0


@given(st.lists(st.integers(0, 2**40), min_size=0, max_size=8), st.integers(0, 2), st.integers(0, 39))
def test_object_identifiers_are_read_back(rest: list[int], first: int, second: int) -> None:
    dotted = ".".join(str(arc) for arc in (first, second, *rest))
    assert core.ObjectIdentifier.load(der.oid(dotted)).dotted == dotted


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
def test_text_is_read_back(text: str) -> None:
    assert core.UTF8String.load(der.utf8(text)).native == text


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 20])
def test_lengths_are_the_shortest(size: int) -> None:
    assert der.octets(bytes(size)) == core.OctetString(bytes(size)).dump()


def test_a_set_is_in_ders_order() -> None:
    assert der.set_of(der.integer(300), der.integer(2)) == b"\x31\x07\x02\x01\x02\x02\x02\x01\x2c"


@pytest.mark.parametrize(
    ("moment", "encoded"),
    [
        (dt.datetime(2049, 12, 31, 23, 59, 59, tzinfo=dt.UTC), b"\x17\x0d491231235959Z"),
        (dt.datetime(2050, 1, 1, tzinfo=dt.UTC), b"\x18\x0f20500101000000Z"),
        (dt.datetime(2026, 1, 1, 1, 30, tzinfo=dt.timezone(dt.timedelta(hours=2))), b"\x17\x0d251231233000Z"),
    ],
)
def test_times_change_their_form_in_2050(moment: dt.datetime, encoded: bytes) -> None:
    assert der.time(moment) == encoded
