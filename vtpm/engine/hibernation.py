"""Hibernation of a worker: when, and what of it goes into the store so that another worker can go on where this one stopped.

Invariant 2: a snapshot is used once. The worker runs nothing after it was taken, and the one that goes on from it waits until
the store has forgotten it before the first command runs (`DurableState.finish_consume`).
"""

from __future__ import annotations

import time
import zlib
from typing import TYPE_CHECKING, Final, Protocol

from vtpm.engine import descriptors
from vtpm.engine.exits import EXIT_HIBERNATED, Exit
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import FailedPreconditionError, SealedStateError

if TYPE_CHECKING:
    import socket

    from vtpm.engine.channels import DataChannels
    from vtpm.engine.durable import DurableState
    from vtpm.engine.platform import VmPlatform
    from vtpm.engine.software import SoftwareTpm

# How many times within the idle timeout a worker looks whether it is idle.
_LOOKS: Final = 4
# Told to hibernate by the engine host, a worker tries so often until nothing is under way.
_TRY_AGAIN_S: Final = 0.02
# Fast, and nearly as small as the best for what is mostly zeros.
_COMPRESSION: Final = 1
_MAX_SNAPSHOT: Final = 4 << 20


class Loop(Protocol):
    """What this asks of the worker's loop."""

    @property
    def busy(self) -> bool:
        """Whether something is half done, has come and is not served yet, or could not be told to the daemon."""

    @property
    def attached(self) -> bool:
        """Whether a VM's control connection is open."""

    def park(self) -> tuple[pb.Park, list[int]]:
        """What another worker goes on with, and its descriptors."""

    def fill(self, snapshot: pb.Snapshot) -> None:
        """Put into a snapshot what the loop knows."""


class Hibernation:
    """Decides and does it. `host` is the line to the engine host."""

    def __init__(
        self,
        tpm: SoftwareTpm,
        durable: DurableState,
        channels: DataChannels,
        platform: VmPlatform,
        loop: Loop,
        host: socket.socket,
    ) -> None:
        self._tpm = tpm
        self._durable = durable
        self._channels = channels
        self._platform = platform
        self._loop = loop
        self._host = host
        self._timeout_s = 0.0
        self._demanded = False
        # Requests other than for the status, on whatever line.
        self.requests = 0
        self._seen = -1
        self._since = 0.0

    @property
    def interval_s(self) -> float | None:
        """How long the loop may sleep before it calls `consider`; None for ever."""
        if self._demanded:
            return _TRY_AGAIN_S
        return self._timeout_s / _LOOKS if self._timeout_s else None

    def after(self, timeout_s: float) -> None:
        """Hibernate after so long without a command; 0 for never."""
        self._timeout_s = timeout_s

    def demand(self) -> None:
        """Hibernate as soon as nothing is under way: the engine host is to be replaced, or emptied."""
        self._demanded = True

    def consider(self) -> None:
        """Hibernate if it is time."""
        now = time.monotonic()
        activity = self.requests + self._channels.stats.total
        if activity != self._seen:
            self._seen, self._since = activity, now
        if self._demanded or (self._timeout_s and now - self._since >= self._timeout_s):
            self.hibernate()

    def hibernate(self) -> bool:
        """End the worker with EXIT_HIBERNATED; False if it can't now, with nothing changed."""
        if self._platform.quiescent:
            # What was only put off until there is time for it.
            self._channels.run_before_next()
        if self._durable.identity_ordinals:
            # The daemon has not dealt yet with what became of the TPM's keys.
            return False
        if self._loop.busy or not self._durable.ready or self._tpm.lifeline >= 0 or not self._platform.quiescent:
            return False
        self._durable.catch_up()
        if not self._durable.take_snapshot(self._snapshot(), attached=self._loop.attached):
            # The store can't take it now. Nothing is lost, this worker is simply still here.
            self._since = time.monotonic()
            return False
        park, fds = self._loop.park()
        park.snapshot_version = self._durable.snapshot_version
        # Should the engine host be gone, so is this worker at once. Where many hibernate at once, those who read are waited
        # for: nothing is left to do here, and all would be lost.
        descriptors.send_patiently(self._host, park.SerializeToString(), fds)
        raise Exit(EXIT_HIBERNATED)

    def hibernate_now(self) -> None:
        """The same because the daemon asks.

        Raises:
            FailedPreconditionError: INSTANCE_BUSY, or ENGINE_CANNOT_HIBERNATE.
        """
        if self._tpm.lifeline >= 0:
            raise FailedPreconditionError(
                "ENGINE_CANNOT_HIBERNATE",
                "this engine can't save the volatile state of a TPM",
                remedy="stop the instance; or create it with the engine libtpms",
            )
        if not self.hibernate():
            raise FailedPreconditionError(
                "INSTANCE_BUSY",
                "the TPM can't hibernate now: a command or a request of its VM is under way",
                remedy="try again in a moment",
            )

    def _snapshot(self) -> bytes:
        powered = self._channels.powered
        snapshot = pb.Snapshot(
            permanent_version=self._durable.version,
            powered=powered,
            volatile=self._tpm.volatile() if powered else b"",
            locality=self._tpm.locality,
            buffer_size=self._tpm.buffer_size(0)[0],
        )
        self._loop.fill(snapshot)
        return zlib.compress(snapshot.SerializeToString(), _COMPRESSION)

    def wake(self, plain: bytes) -> pb.Snapshot:
        """Return a snapshot as it was taken.

        Raises:
            SealedStateError: SNAPSHOT_STATE_MISMATCH, it belongs to another permanent state than the one that was loaded.
        """
        unpacked = zlib.decompressobj()
        snapshot = pb.Snapshot.FromString(unpacked.decompress(plain, _MAX_SNAPSHOT))
        if snapshot.permanent_version != self._durable.version:
            raise SealedStateError(
                "SNAPSHOT_STATE_MISMATCH",
                f"the volatile state belongs to version {snapshot.permanent_version} of the permanent state, "
                f"the store has version {self._durable.version}",
                remedy="reset the instance together with its VM",
            )
        return snapshot
