"""What one instance may look like, given what was acknowledged: the model that the torture test checks against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

FRESH_PCR = bytes(32)


class ViolationError(AssertionError):
    """The service has lost something, or made something up."""


@dataclass(slots=True)
class Model:
    """One instance. A command whose answer never came may have happened or not, so there are bounds and candidates."""

    name: str
    # NV counter: acknowledged at least, asked for at most.
    least: int = 0
    most: int = 0
    # PCR values that the TPM may have now.
    pcrs: set[bytes] = field(default_factory=lambda: {FRESH_PCR})
    # The epoch of the power on that these PCRs belong to; 0 while it is off.
    epoch: int = 0
    acknowledged: int = 0

    def begin_increment(self) -> None:
        """An increment is about to be asked for."""
        self.most += 1

    def end_increment(self) -> None:
        """It was acknowledged."""
        self.least += 1
        self.acknowledged += 1

    def saw_counter(self, value: int) -> None:
        """The counter was read."""
        if not self.least <= value <= self.most:
            raise ViolationError(f"{self.name}: the counter is {value}, acknowledged {self.least}, asked for {self.most}")
        self.least = self.most = value
        self.acknowledged += 1

    def begin_extend(self, digest: bytes) -> None:
        """An extend is about to be asked for."""
        self.pcrs |= {extended(value, digest) for value in self.pcrs}

    def end_extend(self, digest: bytes, before: set[bytes]) -> None:
        """It was acknowledged."""
        self.pcrs = {extended(value, digest) for value in before}
        self.acknowledged += 1

    def saw_pcr(self, value: bytes) -> None:
        """The PCR was read."""
        if value not in self.pcrs:
            raise ViolationError(f"{self.name}: the PCR is {value.hex()[:16]}…, none of {len(self.pcrs)} possible values")
        self.pcrs = {value}
        self.acknowledged += 1

    def powered_on(self, epoch: int) -> None:
        """The instance was started or reset on our request."""
        self.epoch, self.pcrs = epoch, {FRESH_PCR}

    def still_on(self, epoch: int) -> None:
        """The instance is ON and nobody asked for a power on since we last knew its epoch."""
        if epoch != self.epoch:
            raise ViolationError(
                f"{self.name}: ON under epoch {epoch}, powered on under {self.epoch}: a TPM in another's place"
            )


def extended(value: bytes, digest: bytes) -> bytes:
    """TPM2_PCR_Extend in the SHA-256 bank."""
    return hashlib.sha256(value + digest).digest()
