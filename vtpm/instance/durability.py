"""What operators decide about lost and older states: accept a rollback, begin a new anchor, restore from a backup."""

from __future__ import annotations

from typing import Final

import structlog

from vtpm.errors import NotFoundError
from vtpm.instance.freshness import AnchorStatus, Freshness
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.validation import check_labels, check_name
from vtpm.store.model import InstanceRecord
from vtpm.store.restore import BackedUpInstance

log: Final = structlog.get_logger("vtpm.instance")


class Durability:
    """Used from the event loop only."""

    def __init__(self, lifecycle: Lifecycle, freshness: Freshness) -> None:
        self._lifecycle = lifecycle
        self._freshness = freshness

    def anchor(self) -> AnchorStatus:
        """Return how rollback protection stands."""
        return self._freshness.status()

    async def reset_anchor(self) -> AnchorStatus:
        """See Freshness.reset."""
        return await self._freshness.reset()

    async def accept_rollback(self, ref: str) -> None:
        """See Freshness.accept."""
        await self._freshness.accept(ref)

    async def restore(self, item: BackedUpInstance) -> InstanceRecord:
        """Put an instance back as a backup has it; what is there is replaced, and OFF.

        Raises:
            FailedPreconditionError: INSTANCE_ON.
            KeyProviderError: its data key was wrapped by a key that is not here.
            VtpmError: see InstanceRestore.put.
        """
        lifecycle = self._lifecycle
        check_name(item.name)
        check_labels(item.labels)
        lifecycle.engine(item.engine)
        self._freshness.require_trust()
        async with lifecycle.lock(item.id):
            await lifecycle.settled(item.id)
            try:
                await lifecycle.blocking(lifecycle.store.get, str(item.id))
                kind = "UPDATED"
            except NotFoundError:
                kind = "CREATED"
            async with lifecycle.key_lock:
                # Refused here rather than at the next power on.
                await lifecycle.blocking(lifecycle.keys.unwrap, item.wrapped_key, item.id)
                await lifecycle.blocking(lifecycle.store.restores.put, item)
            await self._freshness.taken(item.id)
            record = await lifecycle.blocking(lifecycle.store.get, str(item.id))
        log.warning(
            "instance.restored",
            instance=str(record.id),
            name=record.name,
            version=item.state.version,
            state_epoch=item.state.epoch,
        )
        lifecycle.hub.publish("CREATED" if kind == "CREATED" else "UPDATED", record)
        return record
