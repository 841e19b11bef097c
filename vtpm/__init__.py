"""A TPM 2.0 for every VM: one daemon per host, sealed at rest, over gRPC."""

from __future__ import annotations

__version__ = "0.1.0"
