"""Rows and records: how values are written down."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from vtpm.store.macs import MESSAGE, REASON, remedy
from vtpm.store.model import Failure, IdentityState, InstanceRecord, InstanceState, KeyRecord, PlatformRecord, ProfileRecord

_UNKNOWN_TIME: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


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
    """Make a record of a row of `instances` as the database keeps it; its MAC is right. `state` is taken for the row's own."""
    return InstanceRecord(
        id=uuid.UUID(row.id),
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
        created_at=moment_of(row.created_at),
        updated_at=moment_of(row.updated_at),
        platform=_load_platform(row.platform),
        identity=IdentityState(row.identity),
    )


def refused_record(row: Any, labels: Mapping[str, str]) -> InstanceRecord | None:
    """Make a record to look at of a row that the service did not write: FAILED, and nothing in it is believed.

    None for a row that does not even name an instance.
    """
    try:
        identifier = uuid.UUID(row.id)
    except (ValueError, AttributeError, TypeError):
        return None
    name = row.name if isinstance(row.name, str) and row.name.isprintable() else ""
    failure = Failure(REASON, MESSAGE, remedy("instances"), _UNKNOWN_TIME)
    return InstanceRecord(
        id=identifier,
        name=name[:63] or f"vtpm-{identifier.hex[:12]}",
        labels=labels,
        state=InstanceState.FAILED,
        failure=failure,
        profile=ProfileRecord((), "", ()),
        keys=(),
        engine="",
        epoch=0,
        boot_id="",
        revision=0,
        created_at=_UNKNOWN_TIME,
        updated_at=_UNKNOWN_TIME,
    )


def is_refused(record: InstanceRecord) -> bool:
    """Whether this is a record of `refused_record`."""
    return record.failure is not None and record.failure.reason == REASON and record.revision == 0


def moment_of(text: str) -> dt.datetime:
    """Return a time as the database keeps it as an aware one."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)
