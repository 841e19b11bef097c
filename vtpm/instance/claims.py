"""What becomes of a hibernated instance whose engine host is gone: the store decides (invariants 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

from vtpm.engine.interface import Claim
from vtpm.errors import NotFoundError, SealedStateError
from vtpm.store.model import InstanceState
from vtpm.store.snapshots import SnapshotUse
from vtpm.store.store import Store


class Claims:
    """Says which snapshots may be gone on from; blocks on the store."""

    def __init__(self, store: Store, boot_id: str) -> None:
        self._store = store
        self._boot_id = boot_id

    def good(self, claims: Sequence[Claim]) -> set[Claim]:
        """Return those whose instance is ON here, under that epoch, with that snapshot and nobody having used it.

        Raises:
            StoreError: the store does not answer.
        """
        return {claim for claim in claims if self._is_good(claim)}

    def reserve(self, claim: Claim, token: bytes) -> bool:
        """Mark a snapshot as used up under `token`, so that nobody else goes on from it; False if it can't be had.

        Raises:
            StoreError: the store does not answer.
        """
        instance, epoch, version = claim
        return self._is_good(claim, token) and self._store.commit([SnapshotUse(instance, epoch, version, token)]) == [""]

    def _is_good(self, claim: Claim, token: bytes = b"") -> bool:
        instance, epoch, version = claim
        try:
            record = self._store.get(str(instance))
            found = self._store.snapshots.load(instance, epoch)
        except (NotFoundError, SealedStateError):
            # Gone, or not as the service wrote it: this claim alone is not good.
            return False
        owned = record.state is InstanceState.ON and record.epoch == epoch and record.boot_id == self._boot_id
        return owned and found.snapshot.version == version and found.used_by in (b"", token)
