"""Counts and latencies of the commands that a worker ran, by ordinal; kept in the worker, collected by the daemon."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from vtpm.engine.v1 import link_pb2 as pb
from vtpm.tpm.codes import CommandCode

# Upper bounds of the latency buckets in nanoseconds; a last bucket takes the rest.
BUCKETS_NS: Final = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 100_000_000, 1_000_000_000)
_KNOWN: Final = frozenset(int(code) for code in CommandCode)
# A guest chooses ordinals freely: those the standard does not know are counted together, so that the table stays bounded.
UNKNOWN_ORDINAL: Final = 0


class CommandStats:
    """Since the last `drain`: ordinal → [count, nanoseconds, bucket counts…]."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}

    def add(self, ordinal: int, nanos: int) -> None:
        """Count one command that took `nanos`."""
        row = self._rows.get(ordinal) or self._new_row(ordinal)
        row[0] += 1
        row[1] += nanos
        row[2 + bisect_left(BUCKETS_NS, nanos)] += 1

    def _new_row(self, ordinal: int) -> list[int]:
        known = ordinal if ordinal in _KNOWN else UNKNOWN_ORDINAL
        return self._rows.setdefault(known, [0] * (2 + len(BUCKETS_NS) + 1))

    def drain(self, status: pb.Status) -> None:
        """Move the counts into `status` and start anew."""
        for ordinal, (count, nanos, *buckets) in self._rows.items():
            status.ordinals.add(ordinal=ordinal, count=count, nanos=nanos, buckets=buckets)
        self._rows.clear()
