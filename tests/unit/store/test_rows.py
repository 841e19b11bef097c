"""What is written down comes back as it was."""

from __future__ import annotations

import datetime as dt
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.given import KEYS, PROFILE
from vtpm.store.model import Failure, InstanceRecord, InstanceState, KeyRecord, ProfileRecord
from vtpm.store.rows import dump_failure, dump_keys, dump_profile, now, to_record

texts = st.text(max_size=20)
names = st.lists(texts, max_size=3).map(tuple)
public_keys = st.builds(KeyRecord, texts, texts, st.integers(0, 2**32 - 1), st.binary(max_size=40))
times = st.datetimes(timezones=st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=5, minutes=30))]))


def read_back(**values: Any) -> InstanceRecord:
    row = {
        "id": uuid.UUID(int=1).hex,
        "name": "web-1",
        "state": "OFF",
        "failure": "",
        "profile": dump_profile(PROFILE),
        "keys": dump_keys(KEYS),
        "engine": "libtpms",
        "epoch": 3,
        "boot_id": "",
        "revision": 7,
        "created_at": "2026-01-02 00:00:00.000000",
        "updated_at": "2026-01-03 00:00:00.000000",
        "platform": "",
        "identity": "UNCERTIFIED",
    }
    return to_record(SimpleNamespace(**{**row, **values}), {"team": "web"})


def test_a_row_becomes_a_record_in_utc() -> None:
    assert read_back() == InstanceRecord(
        uuid.UUID(int=1),
        "web-1",
        {"team": "web"},
        InstanceState.OFF,
        None,
        PROFILE,
        KEYS,
        "libtpms",
        3,
        "",
        7,
        dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        dt.datetime(2026, 1, 3, tzinfo=dt.UTC),
    )


@settings(deadline=None)
@given(failure=st.none() | st.builds(Failure, texts, texts, texts, times))
def test_a_failure_comes_back_at_the_same_moment(failure: Failure | None) -> None:
    assert read_back(failure=dump_failure(failure)).failure == failure


@settings(deadline=None)
@given(profile=st.builds(ProfileRecord, names, texts, names))
def test_a_profile_comes_back(profile: ProfileRecord) -> None:
    assert read_back(profile=dump_profile(profile)).profile == profile


@settings(deadline=None)
@given(
    keys=st.lists(st.builds(KeyRecord, texts, texts, st.integers(0, 2**32 - 1), st.binary(max_size=40)), max_size=3).map(tuple)
)
def test_public_keys_come_back_to_the_byte(keys: tuple[KeyRecord, ...]) -> None:
    assert read_back(keys=dump_keys(keys)).keys == keys


def test_a_row_in_a_state_that_nobody_wrote_is_no_record() -> None:
    with pytest.raises(ValueError, match="PAUSED"):
        read_back(state="PAUSED")


def test_the_database_keeps_utc_without_a_zone() -> None:
    assert now().tzinfo is None
    assert abs(now().replace(tzinfo=dt.UTC) - dt.datetime.now(dt.UTC)) < dt.timedelta(hours=1)
