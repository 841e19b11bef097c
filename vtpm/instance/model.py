"""Values that cross the border of the instance room: requests in, results out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vtpm.engine.events import Origin
from vtpm.engine.interface import EngineCapabilities, MeasuredLog, PcrValue, PcrValues
from vtpm.store.model import InstanceRecord, PlatformRecord

__all__ = [
    "ChangeKind",
    "CreateRequest",
    "DrainFailure",
    "DrainProgress",
    "EngineCapabilities",
    "HostInfo",
    "InstanceChange",
    "LabelChanges",
    "MeasuredLog",
    "Origin",
    "PcrValue",
    "PcrValues",
    "QuoteResult",
]


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What a caller asks a new instance to be; empty fields take the defaults."""

    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ek_algorithms: tuple[str, ...] = ()
    ak_algorithm: str = ""
    pcr_banks: tuple[str, ...] = ()
    engine: str = ""
    request_id: str = ""
    nv_layout: str = ""
    platform: PlatformRecord = field(default_factory=PlatformRecord)


@dataclass(frozen=True, slots=True)
class LabelChanges:
    """`replace` takes `set` as the whole new set; otherwise `set` is laid over what is there and `remove` taken out."""

    replace: bool = False
    set: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()


ChangeKind = Literal["EXISTING", "SYNCED", "CREATED", "UPDATED", "DELETED"]


@dataclass(frozen=True, slots=True)
class InstanceChange:
    """One message of a watch; `record` is None for SYNCED and the last known record for DELETED."""

    kind: ChangeKind
    record: InstanceRecord | None


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What runs here."""

    version: str
    engines: tuple[EngineCapabilities, ...]
    counts: Mapping[str, int]
    key_provider: str
    key_id: str
    start_time: dt.datetime
    state_dir: Path
    runtime_dir: Path
    engine_host_pid: int
    awake: int
    hibernated: int
    drained: bool


@dataclass(frozen=True, slots=True)
class DrainFailure:
    """An instance, by name, that stays awake though the host is drained."""

    instance: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """How many of the `total` instances that were awake hibernate now."""

    total: int
    hibernated: int
    failures: tuple[DrainFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class QuoteResult:
    """TPMS_ATTEST, TPMT_SIGNATURE, the AK's TPMT_PUBLIC, and the PCR values that were signed."""

    attest: bytes
    signature: bytes
    ak_tpmt_public: bytes
    values: tuple[PcrValue, ...]
