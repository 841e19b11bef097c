"""Between the protos and the values of the rooms below. Everything that comes in is bounded here, before it goes further."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2 as tpm_pb
from vtpm.errors import InvalidArgumentError
from vtpm.instance.model import (
    CreateRequest,
    DrainProgress,
    HostInfo,
    InstanceChange,
    LabelChanges,
    MeasuredLog,
    Origin,
    PcrValue,
)
from vtpm.store.model import InstanceRecord, PlatformRecord
from vtpm.tpm.keys import public_pem
from vtpm.tpm.pcr import PCR_COUNT, PcrBank, PcrSelection

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
_MAX_REF_LENGTH: Final = 128
_MAX_FILTER_LENGTH: Final = 4096
_MAX_REPEATED: Final = 16
_ORIGINS: Final = {
    Origin.UNKNOWN: tpm_pb.EVENT_ORIGIN_UNSPECIFIED,
    Origin.SERVICE: tpm_pb.SERVICE,
    Origin.OPERATOR: tpm_pb.OPERATOR,
    Origin.GUEST: tpm_pb.GUEST,
    Origin.VMM: tpm_pb.VMM,
}
_LABELS: Final = "labels"
_LABEL_PREFIX: Final = "labels."


# ---- in ------------------------------------------------------------------------------------------------------------------


def instance_ref(text: str) -> str:
    """Return `text` if it can name an instance.

    Raises:
        InvalidArgumentError: INSTANCE_REQUIRED or INSTANCE_REF_INVALID.
    """
    if not text.removeprefix("instances/"):
        raise InvalidArgumentError("INSTANCE_REQUIRED", "the request names no instance", remedy="give its name or id")
    if len(text) > _MAX_REF_LENGTH or not text.isprintable():
        raise InvalidArgumentError(
            "INSTANCE_REF_INVALID", "this can't name an instance", remedy="give instances/{id}, the id or the name"
        )
    return text


def filter_text(text: str) -> str:
    """Return `text` if it is not too long to be looked at.

    Raises:
        InvalidArgumentError: FILTER_INVALID.
    """
    if len(text) > _MAX_FILTER_LENGTH:
        raise InvalidArgumentError("FILTER_INVALID", f"a filter has at most {_MAX_FILTER_LENGTH} characters")
    return text


def page_size(asked: int) -> int:
    """Return how many instances a page has when `asked` were asked for.

    Raises:
        InvalidArgumentError: PAGE_SIZE_INVALID.
    """
    if asked < 0:
        raise InvalidArgumentError("PAGE_SIZE_INVALID", "page_size is negative", remedy=f"give 1 to {MAX_PAGE_SIZE}")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def etag(record: InstanceRecord) -> str:
    """Return the etag of an instance."""
    return str(record.revision)


def revision(text: str) -> int | None:
    """Return the revision that an etag stands for; None when the change is unconditional.

    Raises:
        InvalidArgumentError: ETAG_INVALID, the service never gave out such an etag.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise InvalidArgumentError("ETAG_INVALID", "the etag is not one of this service", remedy="give it back as it was read")
    return int(text)


def startup_clear(startup: pb.Startup.ValueType) -> bool:
    """Return whether the service sends TPM2_Startup(CLEAR).

    Raises:
        InvalidArgumentError: STARTUP_INVALID.
    """
    if startup not in (pb.STARTUP_CLEAR, pb.STARTUP_NONE):
        raise InvalidArgumentError("STARTUP_INVALID", "startup is neither STARTUP_CLEAR nor STARTUP_NONE")
    return startup == pb.STARTUP_CLEAR


def key_algorithm(value: pb.KeyAlgorithm.ValueType) -> str:
    """Return the name of a key algorithm, as in vtpm.tpm.keys.KeyAlgorithm.

    Raises:
        InvalidArgumentError: PROFILE_INVALID.
    """
    if value == pb.KEY_ALGORITHM_UNSPECIFIED or value not in pb.KeyAlgorithm.values():
        raise _profile_invalid("key algorithm", pb.KeyAlgorithm.keys()[1:])
    return pb.KeyAlgorithm.Name(value)


def pcr_bank(value: pb.PcrBank.ValueType) -> str:
    """Return the name of a PCR bank's hash, such as `sha256`.

    Raises:
        InvalidArgumentError: PROFILE_INVALID.
    """
    if value == pb.PCR_BANK_UNSPECIFIED or value not in pb.PcrBank.values():
        raise _profile_invalid("PCR bank", pb.PcrBank.keys()[1:])
    return pb.PcrBank.Name(value).lower()


def nv_layout(value: pb.NvLayout.ValueType) -> str:
    """Return the name of an NV layout, as in vtpm.tpm.layouts.NvLayout.

    Raises:
        InvalidArgumentError: PROFILE_INVALID.
    """
    if value == pb.NV_LAYOUT_UNSPECIFIED or value not in pb.NvLayout.values():
        raise _profile_invalid("NV layout", pb.NvLayout.keys()[1:])
    return pb.NvLayout.Name(value)


def _profile_invalid(what: str, allowed: Iterable[str]) -> InvalidArgumentError:
    return InvalidArgumentError("PROFILE_INVALID", f"there is no such {what}", remedy=f"use {', '.join(allowed)}")


def create_request(request: pb.CreateInstanceRequest) -> CreateRequest:
    """Return what the caller asks a new instance to be; names and labels are checked by the instance room.

    Raises:
        InvalidArgumentError: PROFILE_INVALID.
    """
    profile = request.profile
    if max(len(profile.ek_algorithms), len(profile.pcr_banks)) > _MAX_REPEATED:
        raise InvalidArgumentError("PROFILE_INVALID", "the profile repeats itself")
    return CreateRequest(
        name=request.name,
        labels=dict(request.labels),
        ek_algorithms=tuple(key_algorithm(value) for value in profile.ek_algorithms),
        ak_algorithm=key_algorithm(profile.ak_algorithm) if profile.ak_algorithm else "",
        pcr_banks=tuple(pcr_bank(value) for value in profile.pcr_banks),
        engine=request.engine,
        request_id=request.request_id,
        nv_layout=nv_layout(profile.nv_layout) if profile.nv_layout else "",
        platform=PlatformRecord(request.platform.manufacturer, request.platform.model, request.platform.version),
    )


def label_changes(request: pb.UpdateInstanceRequest) -> LabelChanges:
    """Return what `update_mask` says of `labels`. No mask: labels that are given replace all (AIP-134).

    A key may stand in backquotes, as AIP-161 writes keys with dots in them.

    Raises:
        InvalidArgumentError: UPDATE_MASK_INVALID.
    """
    paths = list(request.update_mask.paths)
    if not paths and not request.labels:
        raise InvalidArgumentError("UPDATE_MASK_INVALID", "the request changes nothing", remedy="name `labels` or `labels.KEY`")
    labels = dict(request.labels)
    if not paths or _LABELS in paths or paths == ["*"]:
        if len(paths) > 1:
            raise InvalidArgumentError("UPDATE_MASK_INVALID", "`labels` and `labels.KEY` can't be changed in one request")
        return LabelChanges(replace=True, set=labels)
    keys = [_masked_key(path) for path in paths]
    return LabelChanges(
        set={key: labels[key] for key in keys if key in labels}, remove=tuple(key for key in keys if key not in labels)
    )


def _masked_key(path: str) -> str:
    key = path.removeprefix(_LABEL_PREFIX)
    if len(key) > 1 and key[0] == key[-1] == "`":
        key = key[1:-1]
    if not path.startswith(_LABEL_PREFIX) or not key:
        raise InvalidArgumentError(
            "UPDATE_MASK_INVALID", "only labels can be changed", subject=path[:80], remedy="name `labels` or `labels.KEY`"
        )
    return key


def pcr_selections(selections: Sequence[tpm_pb.PcrSelection]) -> tuple[PcrSelection, ...]:
    """Return the selections of a request.

    Raises:
        InvalidArgumentError: PCR_SELECTION_INVALID, PCR_BANK_UNKNOWN or PCR_INDEX_INVALID.
    """
    if len(selections) > len(PcrBank):
        raise InvalidArgumentError("PCR_SELECTION_INVALID", "more banks are selected than there are")
    wanted = []
    for selection in selections:
        bank = PcrBank.from_name(selection.hash_algorithm)
        if not 0 < len(selection.indices) <= PCR_COUNT:
            raise InvalidArgumentError(
                "PCR_SELECTION_INVALID", f"a selection names 1 to {PCR_COUNT} PCRs", subject=bank.hash_name
            )
        wanted.append(PcrSelection(bank, tuple(selection.indices)))
    if len({selection.bank for selection in wanted}) != len(wanted):
        raise InvalidArgumentError(
            "PCR_SELECTION_INVALID", "a bank is named twice", remedy="name all its PCRs in one selection"
        )
    return tuple(wanted)


# ---- out -----------------------------------------------------------------------------------------------------------------


def timestamp(time: dt.datetime) -> Timestamp:
    """Return `time`, which has a time zone, as a proto."""
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


@functools.lru_cache(maxsize=8192)
def pem(tpmt_public: bytes) -> str:
    """Return a TPMT_PUBLIC as SubjectPublicKeyInfo in PEM.

    Kept, because a listing shows the same keys again and again, and each costs a walk through the key's ASN.1.
    """
    return public_pem(tpmt_public)


def instance_to_proto(
    record: InstanceRecord, tpm_socket: Path, guest_socket: Path, control_socket: Path, *, hibernated: bool = False
) -> pb.Instance:
    """Return an instance as callers see it; the sockets are None unless it is ON."""
    instance = pb.Instance(
        id=str(record.id),
        name=record.name,
        labels=record.labels,
        state=pb.State.Value(record.state.value),
        profile=pb.Profile(
            ek_algorithms=[pb.KeyAlgorithm.Value(name) for name in record.profile.ek_algorithms],
            # Not known of an instance whose row is refused.
            ak_algorithm=pb.KeyAlgorithm.Value(record.profile.ak_algorithm or "KEY_ALGORITHM_UNSPECIFIED"),
            pcr_banks=[pb.PcrBank.Value(name.upper()) for name in record.profile.pcr_banks],
            nv_layout=pb.NvLayout.Value(record.profile.nv_layout),
        ),
        keys=[
            pb.Key(
                role=pb.KeyRole.Value(key.role),
                algorithm=pb.KeyAlgorithm.Value(key.algorithm),
                handle=key.handle,
                tpmt_public=key.tpmt_public,
                public_pem=pem(key.tpmt_public),
            )
            for key in record.keys
        ],
        engine=record.engine,
        etag=etag(record),
        create_time=timestamp(record.created_at),
        update_time=timestamp(record.updated_at),
        tpm_socket=str(tpm_socket),
        guest_socket=str(guest_socket),
        control_socket=str(control_socket),
        epoch=record.epoch,
        hibernated=hibernated,
        platform=pb.Platform(
            manufacturer=record.platform.manufacturer, model=record.platform.model, version=record.platform.version
        ),
        identity=pb.Identity.Value(record.identity.value),
    )
    if record.failure is not None:
        failure = record.failure
        instance.failure.CopyFrom(
            pb.Failure(reason=failure.reason, message=failure.message, remedy=failure.remedy, time=timestamp(failure.time))
        )
    return instance


def event_type(change: InstanceChange) -> pb.InstanceEvent.Type.ValueType:
    """Return the type of a watch's message."""
    return pb.InstanceEvent.Type.Value(change.kind)


def host_to_proto(host: HostInfo) -> pb.Host:
    """Return the host as callers see it."""
    return pb.Host(
        version=host.version,
        engines=[
            pb.EngineCapabilities(
                name=engine.name, version=engine.version, hibernation=engine.hibernation, available=engine.available
            )
            for engine in host.engines
        ],
        instances=host.counts,
        key_provider=host.key_provider,
        key_id=host.key_id,
        start_time=timestamp(host.start_time),
        state_dir=str(host.state_dir),
        runtime_dir=str(host.runtime_dir),
        engine_host_pid=host.engine_host_pid,
        awake=host.awake,
        hibernated=host.hibernated,
        drained=host.drained,
    )


def drain_progress_to_proto(progress: DrainProgress) -> pb.DrainProgress:
    """Return how far a drain is as callers see it."""
    failures = [pb.DrainFailure(instance=item.instance, reason=item.reason, message=item.message) for item in progress.failures]
    return pb.DrainProgress(total=progress.total, hibernated=progress.hibernated, failures=failures)


def pcr_values_to_proto(values: Iterable[PcrValue]) -> list[tpm_pb.PcrValue]:
    """Return PCR values as callers see them."""
    return [tpm_pb.PcrValue(hash_algorithm=value.bank.hash_name, index=value.index, digest=value.digest) for value in values]


def event_log_to_proto(log: MeasuredLog) -> tpm_pb.GetEventLogResponse:
    """Return an event log as callers see it."""
    return tpm_pb.GetEventLogResponse(event_log=log.event_log, origins=[_ORIGINS[origin] for origin in log.origins])
