"""Between the proto and the domain: records, enums, page tokens, selections. No logic beyond form."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import struct
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.errors import InvalidArgumentError
from vtpm.instance.model import CreateRequest, HostInfo, LabelChanges, PcrValue
from vtpm.store.model import InstanceRecord
from vtpm.tpm.keys import public_pem
from vtpm.tpm.pcr import PCR_COUNT, PcrBank, PcrSelection

_TOKEN: Final = struct.Struct(">B16s8s")
_TOKEN_VERSION: Final = 1
_MAX_SELECTED: Final = 16


def timestamp(moment: dt.datetime) -> Timestamp:
    """Return a protobuf timestamp."""
    result = Timestamp()
    result.FromDatetime(moment)
    return result


def to_instance(record: InstanceRecord, tpm_socket: Path | None, guest_socket: Path | None) -> pb.Instance:
    """Return an instance as the API shows it."""
    message = pb.Instance(
        id=str(record.id),
        name=record.name,
        labels=record.labels,
        state=pb.State.Value(record.state.value),
        profile=pb.Profile(
            ek_algorithms=[pb.KeyAlgorithm.Value(name) for name in record.profile.ek_algorithms],
            ak_algorithm=pb.KeyAlgorithm.Value(record.profile.ak_algorithm),
            pcr_banks=[pb.PcrBank.Value(name.upper()) for name in record.profile.pcr_banks],
        ),
        engine=record.engine,
        etag=str(record.revision),
        create_time=timestamp(record.created_at),
        update_time=timestamp(record.updated_at),
        tpm_socket=str(tpm_socket or ""),
        guest_socket=str(guest_socket or ""),
        epoch=record.epoch,
    )
    for key in record.keys:
        message.keys.add(
            role=pb.KeyRole.Value(key.role),
            algorithm=pb.KeyAlgorithm.Value(key.algorithm),
            handle=key.handle,
            tpmt_public=key.tpmt_public,
            public_pem=public_pem(key.tpmt_public),
        )
    if record.failure is not None:
        failure = record.failure
        message.failure.CopyFrom(
            pb.Failure(reason=failure.reason, message=failure.message, remedy=failure.remedy, time=timestamp(failure.time))
        )
    return message


def to_host(host: HostInfo) -> pb.Host:
    """Return the host as the API shows it."""
    return pb.Host(
        version=host.version,
        engines=[
            pb.EngineCapabilities(
                name=engine.name, version=engine.version, hibernation=engine.hibernation, available=engine.available
            )
            for engine in host.engines
        ],
        instances=dict(host.counts),
        key_provider=host.key_provider,
        key_id=host.key_id,
        start_time=timestamp(host.start_time),
        state_dir=str(host.state_dir),
        runtime_dir=str(host.runtime_dir),
        engine_host_pid=host.engine_host_pid,
    )


def _enum_names(wrapper: type, values: Iterable[int], field: str) -> tuple[str, ...]:
    try:
        return tuple(wrapper.Name(value) for value in values)  # type: ignore[attr-defined]  # protobuf's enum wrappers
    except ValueError:
        raise InvalidArgumentError("ENUM_VALUE_UNKNOWN", f"{field} holds a value that this version does not know") from None


def from_create(request: pb.CreateInstanceRequest) -> CreateRequest:
    """Return what a caller asks a new instance to be.

    Raises:
        InvalidArgumentError: an enum has an unknown value.
    """
    profile = request.profile
    ak = profile.ak_algorithm
    return CreateRequest(
        name=request.name,
        labels=dict(request.labels),
        ek_algorithms=_enum_names(pb.KeyAlgorithm, profile.ek_algorithms, "profile.ek_algorithms"),  # type: ignore[arg-type]
        ak_algorithm=_enum_names(pb.KeyAlgorithm, [ak], "profile.ak_algorithm")[0] if ak else "",  # type: ignore[arg-type]
        pcr_banks=tuple(name.lower() for name in _enum_names(pb.PcrBank, profile.pcr_banks, "profile.pcr_banks")),  # type: ignore[arg-type]
        engine=request.engine,
        request_id=request.request_id,
    )


def from_update(request: pb.UpdateInstanceRequest) -> LabelChanges:
    """Return the label changes that an update mask asks for.

    Raises:
        InvalidArgumentError: UPDATE_MASK_INVALID.
    """
    paths = list(request.update_mask.paths)
    if paths == ["labels"] or paths == ["*"]:
        return LabelChanges(replace=True, set=dict(request.labels))
    keys = [path.removeprefix("labels.") for path in paths if path.startswith("labels.")]
    if not keys or len(keys) != len(paths):
        raise InvalidArgumentError(
            "UPDATE_MASK_INVALID",
            "update_mask names what else than labels",
            subject="update_mask",
            remedy="name `labels` to replace all, or `labels.KEY` for single ones",
        )
    return LabelChanges(
        set={key: request.labels[key] for key in keys if key in request.labels},
        remove=tuple(key for key in keys if key not in request.labels),
    )


def from_etag(etag: str) -> int | None:
    """Return the revision that an etag stands for; None when it is empty.

    Raises:
        InvalidArgumentError: ETAG_INVALID.
    """
    if not etag:
        return None
    if not (etag.isascii() and etag.isdigit() and len(etag) <= 18):
        raise InvalidArgumentError("ETAG_INVALID", "the etag is none that this service gave", remedy="read the instance again")
    return int(etag)


def _filter_digest(filter_text: str) -> bytes:
    return hashlib.sha256(filter_text.encode()).digest()[:8]


def to_page_token(last: uuid.UUID, filter_text: str) -> str:
    """Return the token of the page behind `last`."""
    return base64.urlsafe_b64encode(_TOKEN.pack(_TOKEN_VERSION, last.bytes, _filter_digest(filter_text))).decode()


def from_page_token(token: str, filter_text: str) -> uuid.UUID | None:
    """Return the id behind which a page begins; None for the first page.

    Raises:
        InvalidArgumentError: PAGE_TOKEN_INVALID, also when the filter is another one than the token's.
    """
    if not token:
        return None
    try:
        version, last, digest = _TOKEN.unpack(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, struct.error):
        version, last, digest = 0, b"", b""
    if version != _TOKEN_VERSION or digest != _filter_digest(filter_text):
        raise InvalidArgumentError(
            "PAGE_TOKEN_INVALID",
            "the page token is none that this service gave for this filter",
            remedy="list from the beginning",
        )
    return uuid.UUID(bytes=last)


def from_selections(selections: Sequence[tpm_pb2.PcrSelection]) -> tuple[PcrSelection, ...]:
    """Return the PCR selections of a request.

    Raises:
        InvalidArgumentError: PCR_SELECTION_INVALID, PCR_BANK_UNKNOWN or PCR_INDEX_INVALID.
    """
    if len(selections) > _MAX_SELECTED or any(len(selection.indices) > PCR_COUNT for selection in selections):
        raise InvalidArgumentError("PCR_SELECTION_INVALID", "the selection is too long")
    result = tuple(PcrSelection(PcrBank.from_name(item.hash_algorithm), tuple(item.indices)) for item in selections)
    if len({selection.bank for selection in result}) != len(result) or not all(selection.indices for selection in result):
        raise InvalidArgumentError("PCR_SELECTION_INVALID", "a bank is selected twice, or without indices")
    return result


def to_values(values: Iterable[PcrValue]) -> list[tpm_pb2.PcrValue]:
    """Return PCR values as the API shows them."""
    return [tpm_pb2.PcrValue(hash_algorithm=value.bank.hash_name, index=value.index, digest=value.digest) for value in values]
