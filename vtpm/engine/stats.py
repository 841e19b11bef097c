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
# On a data connection, how many commands are not timed between two that are.
UNTIMED: Final = 15


class CommandStats:
    """Since the last `drain`: `counts` of every command by ordinal, and the latencies of those that were timed."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self._drained = 0
        # Ordinal → [nanoseconds, bucket counts…].
        self._times: dict[int, list[int]] = {}

    @property
    def total(self) -> int:
        """How many commands this worker ever ran."""
        return self._drained + sum(self.counts.values())

    def count(self, ordinal: int) -> None:
        """Count one command."""
        known = ordinal if ordinal in _KNOWN else UNKNOWN_ORDINAL
        self.counts[known] = self.counts.get(known, 0) + 1

    def time(self, ordinal: int, nanos: int) -> None:
        """Note that one command took `nanos`."""
        known = ordinal if ordinal in _KNOWN else UNKNOWN_ORDINAL
        row = self._times.setdefault(known, [0] * (1 + len(BUCKETS_NS) + 1))
        row[0] += nanos
        row[1 + bisect_left(BUCKETS_NS, nanos)] += 1

    def drain(self, status: pb.Status) -> None:
        """Move what was counted into `status` and start anew."""
        for ordinal, count in self.counts.items():
            nanos, *buckets = self._times.get(ordinal) or [0] * (1 + len(BUCKETS_NS) + 1)
            status.ordinals.add(ordinal=ordinal, count=count, nanos=nanos, buckets=buckets)
        self._drained += sum(self.counts.values())
        self.counts.clear()
        self._times.clear()
