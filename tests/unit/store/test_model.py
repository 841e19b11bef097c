"""What a filter wants of a record in hand, as a watch asks it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid

import pytest

from tests.unit.store.given import PROFILE
from vtpm.store.model import Filter, InstanceRecord, InstanceState

MOMENT = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
RECORD = InstanceRecord(
    id=uuid.UUID(int=1),
    name="web-1",
    labels={"team": "web", "empty": ""},
    state=InstanceState.ON,
    failure=None,
    profile=PROFILE,
    keys=(),
    engine="libtpms",
    epoch=1,
    boot_id="boot-1",
    revision=2,
    created_at=MOMENT,
    updated_at=MOMENT,
)


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(),
        Filter(state=InstanceState.ON),
        Filter(name="web-1"),
        Filter(name_prefix="web"),
        Filter(name_prefix=""),
        Filter(labels={"team": "web"}),
        Filter(labels={"empty": ""}),
        Filter(InstanceState.ON, "web-1", "w", {"team": "web", "empty": ""}),
    ],
)
def test_a_record_is_wanted_if_all_that_is_set_fits(wanted: Filter) -> None:
    assert wanted.matches(RECORD)


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(state=InstanceState.OFF),
        Filter(name="web"),
        Filter(name=""),
        Filter(name_prefix="eb-1"),
        Filter(name_prefix="web-11"),
        Filter(labels={"team": "db"}),
        Filter(labels={"team": ""}),
        Filter(labels={"tier": ""}),
        Filter(InstanceState.ON, "web-1", "w", {"team": "web", "empty": "no"}),
    ],
)
def test_a_record_is_not_wanted_if_one_thing_does_not_fit(wanted: Filter) -> None:
    assert not wanted.matches(RECORD)


def test_a_record_cannot_be_changed_in_hand() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.epoch = 2  # type: ignore[misc]
