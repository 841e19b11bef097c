"""What an instance is certified as: the host's CA and the defaults, in one hand."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from typing import Final, Protocol

from cryptography import x509

from vtpm.instance.certification import Blocking, Certification
from vtpm.pki.authority import Authority
from vtpm.store.model import PlatformRecord, ProfileRecord
from vtpm.tpm.layouts import NvLayout


class IdentityMetrics(Protocol):
    """What is counted (vtpm.metrics.Metrics)."""

    def set_pool_level(self, level: int) -> None:
        """How many TPMs the pool has."""

    def count_creation(self, result: str) -> None:
        """A creation: `pool`, `pool_rewritten` or `cold`."""

    def count_renewal(self, result: str) -> None:
        """A renewal: `written`, `unwritten` or `failed`."""

    def set_overdue(self, count: int) -> None:
        """How many AK certificates of running instances should have been renewed."""

    def count_identity_change(self) -> None:
        """An instance whose guest ended certified keys."""

    def count_activation(self, result: str) -> None:
        """A step of an activation."""


DEFAULT_PLATFORM: Final = PlatformRecord("vTPM", "vTPM VM", "1")


class Identity:
    """`authority` gives the CA that issues now, or None where there is none: then instances are not certified. `issuer` gives
    the certificate of an issuing CA, in force or retired, by its key's id."""

    def __init__(
        self,
        authority: Callable[[], Authority | None],
        issuer: Callable[[bytes], x509.Certificate | None],
        metrics: IdentityMetrics,
        platform: PlatformRecord = DEFAULT_PLATFORM,
    ) -> None:
        self.authority = authority
        self.issuer = issuer
        self.metrics = metrics
        self.platform = platform

    def certification(
        self, instance: uuid.UUID, profile: ProfileRecord, platform: PlatformRecord, blocking: Blocking
    ) -> Certification | None:
        """Return what certifies a TPM that is about to be made; None without a CA."""
        authority = self.authority()
        if authority is None:
            return None
        return Certification(authority, instance, NvLayout(profile.nv_layout), platform, blocking)

    def pool_key(self, engine: str, profile: ProfileRecord) -> str:
        """Return what a pooled TPM is good for: it changes with everything that its making depends on."""
        authority = self.authority()
        platform = self.platform
        content = [
            engine,
            *(profile.ek_algorithms, profile.ak_algorithm, profile.pcr_banks, profile.nv_layout),
            *(platform.manufacturer, platform.model, platform.version),
            authority.key_id.hex() if authority is not None else "",
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
