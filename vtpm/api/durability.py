"""DurabilityService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

import uuid
from typing import Any, Protocol

from vtpm.api import convert
from vtpm.api.drain import Drain
from vtpm.api.v1 import durability_pb2 as pb
from vtpm.api.v1.durability_pb2_grpc import DurabilityServiceServicer
from vtpm.errors import InvalidArgumentError
from vtpm.instance.freshness import AnchorStatus
from vtpm.seal.keys import WrappedKey
from vtpm.store.model import InstanceRecord, SealedState
from vtpm.store.restore import BackedUpInstance


class Durability(Protocol):
    """What this asks of vtpm.instance.durability.Durability. Every method raises VtpmError."""

    def anchor(self) -> AnchorStatus:
        """Return how rollback protection stands."""

    async def reset_anchor(self) -> AnchorStatus:
        """Trust the store as it is."""

    async def accept_rollback(self, ref: str) -> None:
        """Take an older state for the right one."""

    async def restore(self, item: BackedUpInstance) -> InstanceRecord:
        """Put an instance back as a backup has it."""


class DurabilityServicer(DurabilityServiceServicer):
    """Rollback protection, and restoring an instance."""

    def __init__(self, durability: Durability, drain: Drain) -> None:
        self._durability = durability
        self._drain = drain

    async def GetAnchor(self, request: pb.GetAnchorRequest, context: Any) -> pb.Anchor:
        return anchor_to_proto(self._durability.anchor())

    async def ResetAnchor(self, request: pb.ResetAnchorRequest, context: Any) -> pb.Anchor:
        return anchor_to_proto(await self._drain.complete(self._durability.reset_anchor()))

    async def AcceptRollback(self, request: pb.AcceptRollbackRequest, context: Any) -> pb.AcceptRollbackResponse:
        await self._drain.complete(self._durability.accept_rollback(convert.instance_ref(request.instance)))
        return pb.AcceptRollbackResponse()

    async def RestoreInstance(self, request: pb.RestoreInstanceRequest, context: Any) -> pb.RestoreInstanceResponse:
        record = await self._drain.complete(self._durability.restore(backed_up(request)))
        return pb.RestoreInstanceResponse(instance=str(record.id), name=record.name)


def backed_up(request: pb.RestoreInstanceRequest) -> BackedUpInstance:
    """Return the instance that a request brings.

    Raises:
        InvalidArgumentError: INSTANCE_ID_INVALID.
    """
    try:
        instance = uuid.UUID(request.instance)
    except ValueError:
        raise InvalidArgumentError("INSTANCE_ID_INVALID", "`instance` must be an id", subject=request.instance[:80]) from None
    return BackedUpInstance(
        instance,
        request.name,
        dict(request.labels),
        request.profile,
        request.keys,
        request.engine,
        request.owner_epoch,
        WrappedKey(request.key_provider, request.key_id, request.wrapped_key),
        SealedState(request.epoch, request.version, request.sealed),
    )


def _numbers(numbers: tuple[int, int, int] | None) -> pb.StateNumbers | None:
    return None if numbers is None else pb.StateNumbers(owner_epoch=numbers[0], epoch=numbers[1], version=numbers[2])


def anchor_to_proto(status: AnchorStatus) -> pb.Anchor:
    """Return an anchor as callers see it."""
    trouble = status.trouble
    return pb.Anchor(
        kind=status.kind,
        subject=status.subject,
        update=status.update,
        time=convert.timestamp(status.time) if status.time is not None else None,
        states=status.states,
        findings=[
            pb.Finding(
                instance=str(finding.instance),
                reason=finding.reason.value,
                stored=_numbers(finding.stored),
                anchored=_numbers(finding.anchored),
            )
            for finding in status.findings
        ],
        trouble_reason=trouble.reason if trouble is not None else "",
        trouble=trouble.message if trouble is not None else "",
        remedy=trouble.remedy if trouble is not None else "",
    )
