"""Rows and records: how values are written down."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

from vtpm.store.model import Failure, IdentityState, InstanceRecord, InstanceState, KeyRecord, PlatformRecord, ProfileRecord


def now() -> dt.datetime:
    """The present time in UTC, without a zone, as the database keeps it."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)


def utc(moment: dt.datetime) -> dt.datetime:
    """Return a time of the database as an aware one."""
    return moment.replace(tzinfo=dt.UTC)


def dump_failure(failure: Failure | None) -> str:
    """Write a failure down; none is empty."""
    if failure is None:
        return ""
    return json.dumps([failure.reason, failure.message, failure.remedy, failure.time.astimezone(dt.UTC).isoformat()])


def _load_failure(text: str) -> Failure | None:
    if not text:
        return None
    reason, message, remedy, time = json.loads(text)
    return Failure(reason, message, remedy, dt.datetime.fromisoformat(time))


def dump_profile(profile: ProfileRecord) -> str:
    """Write a profile down."""
    return json.dumps([profile.ek_algorithms, profile.ak_algorithm, profile.pcr_banks, profile.nv_layout])


def _load_profile(text: str) -> ProfileRecord:
    # Earlier versions knew no layouts.
    ek_algorithms, ak_algorithm, banks, *layout = json.loads(text)
    return ProfileRecord(tuple(ek_algorithms), ak_algorithm, tuple(banks), *layout)


def dump_platform(platform: PlatformRecord) -> str:
    """Write a platform down; none is empty."""
    return json.dumps([platform.manufacturer, platform.model, platform.version]) if platform != PlatformRecord() else ""


def _load_platform(text: str) -> PlatformRecord:
    return PlatformRecord(*json.loads(text)) if text else PlatformRecord()


def dump_keys(keys: tuple[KeyRecord, ...]) -> str:
    """Write public keys down."""
    return json.dumps([[key.role, key.algorithm, key.handle, key.tpmt_public.hex()] for key in keys])


def _load_keys(text: str) -> tuple[KeyRecord, ...]:
    return tuple(
        KeyRecord(role, algorithm, handle, bytes.fromhex(public)) for role, algorithm, handle, public in json.loads(text)
    )


def check_written(profile: str, keys: str) -> None:
    """Raise ValueError or TypeError unless these are a profile and keys as they are written down here."""
    _load_profile(profile)
    _load_keys(keys)


def to_record(row: Any, labels: Mapping[str, str], state: InstanceState | None = None) -> InstanceRecord:
    """Make a record of a row of `instances` and its labels; `state` is taken for the row's own."""
    return InstanceRecord(
        id=row.id,
        name=row.name,
        labels=labels,
        state=state or InstanceState(row.state),
        failure=_load_failure(row.failure),
        profile=_load_profile(row.profile),
        keys=_load_keys(row.keys),
        engine=row.engine,
        epoch=row.epoch,
        boot_id=row.boot_id,
        revision=row.revision,
        created_at=row.created_at.replace(tzinfo=dt.UTC),
        updated_at=row.updated_at.replace(tzinfo=dt.UTC),
        platform=_load_platform(row.platform),
        identity=IdentityState(row.identity),
    )
