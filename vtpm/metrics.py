"""Prometheus metrics of the daemon; their names are documented in docs/operations.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from vtpm.tpm.codes import command_name

_MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_COMMIT_BUCKETS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_RPC_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)


class _CommandCollector(Collector):
    """Commands by ordinal: the workers count, the daemon adds up what they hand in."""

    def __init__(self, bounds_ns: Sequence[int]) -> None:
        self._bounds = [f"{bound / 1e9:g}" for bound in bounds_ns] + ["+Inf"]
        self.buckets = len(self._bounds)
        self.rows: dict[int, tuple[int, int, list[int]]] = {}

    def collect(self) -> list[HistogramMetricFamily | CounterMetricFamily]:
        total = CounterMetricFamily("vtpm_tpm_commands", "TPM commands run for VMs, by ordinal.", labels=["ordinal"])
        seconds = HistogramMetricFamily(
            "vtpm_tpm_command_seconds", "Time in the TPM, commit included; of one in 16 on sockets.", labels=["ordinal"]
        )
        for ordinal, (count, nanos, buckets) in list(self.rows.items()):
            name = command_name(ordinal) if ordinal else "unknown"
            total.add_metric([name], count)
            cumulative, running = [], 0
            for bound, value in zip(self._bounds, buckets, strict=True):
                running += value
                cumulative.append((bound, running))
            seconds.add_metric([name], cumulative, nanos / 1e9)
        return [total, seconds]


class Metrics:
    """Every metric of one daemon, in a registry of its own."""

    def __init__(self, command_bounds_ns: Sequence[int]) -> None:
        self.registry = CollectorRegistry()
        self._instances = Gauge("vtpm_instances", "Instances by state.", ["state"], registry=self.registry)
        self._workers = Gauge("vtpm_workers", "Worker processes that run an instance.", registry=self.registry)
        self._hibernated = Gauge("vtpm_hibernated", "Instances that are ON and have no process.", registry=self.registry)
        self._thaw_seconds = Histogram(
            "vtpm_thaw_seconds",
            "Time to bring a hibernated instance back, until its worker runs commands.",
            registry=self.registry,
            buckets=_RPC_BUCKETS,
        )
        self._commits = Counter("vtpm_commits", "Sealed states by outcome.", ["result"], registry=self.registry)
        self._commit_seconds = Histogram(
            "vtpm_commit_seconds", "Time of one store transaction.", registry=self.registry, buckets=_COMMIT_BUCKETS
        )
        self._batch_size = Histogram(
            "vtpm_commit_batch_size",
            "States in one store transaction.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self._requests = Counter("vtpm_grpc_requests", "gRPC calls.", ["method", "code"], registry=self.registry)
        self._request_seconds = Histogram(
            "vtpm_grpc_request_seconds", "Time of one gRPC call.", ["method"], registry=self.registry, buckets=_RPC_BUCKETS
        )
        self._commands = _CommandCollector(command_bounds_ns)
        self.registry.register(self._commands)

        self._pool_level = Gauge("vtpm_pool_level", "TPMs made ahead, for instances to come.", registry=self.registry)
        self._pool_claims = Counter(
            "vtpm_pool_claims", "Creations by where their TPM came from.", ["result"], registry=self.registry
        )
        self._ak_renewals = Counter("vtpm_ak_renewals", "Renewals of AK certificates.", ["result"], registry=self.registry)
        self._ak_overdue = Gauge(
            "vtpm_ak_renewals_overdue", "AK certificates of instances that are ON and past renewal.", registry=self.registry
        )
        self._identity_changes = Counter(
            "vtpm_identity_changes", "Instances whose certified keys were ended by their guest.", registry=self.registry
        )
        self._activations = Counter(
            "vtpm_activations", "Credential activations for AKs that guests made.", ["result"], registry=self.registry
        )

    def set_pool_level(self, level: int) -> None:
        """Take over how many TPMs the pool has."""
        self._pool_level.set(level)

    def count_creation(self, result: str) -> None:
        """Count a creation: `pool`, `pool_rewritten` or `cold`."""
        self._pool_claims.labels(result).inc()

    def count_renewal(self, result: str) -> None:
        """Count a renewal of an AK certificate: `written`, `unwritten` (not to NV) or `failed`."""
        self._ak_renewals.labels(result).inc()

    def set_overdue(self, count: int) -> None:
        """Take over how many AK certificates of running instances should have been renewed."""
        self._ak_overdue.set(count)

    def count_identity_change(self) -> None:
        """Count an instance whose guest ended certified keys."""
        self._identity_changes.inc()

    def count_activation(self, result: str) -> None:
        """Count a step of an activation: `begun`, `certified`, `refused` or `limited`."""
        self._activations.labels(result).inc()

    def observe_ordinals(self, ordinal: int, count: int, nanos: int, buckets: Sequence[int]) -> None:
        """Add what a worker counted of one ordinal since it was last asked.

        Raises:
            ValueError: its histogram has another number of buckets than this daemon's.
        """
        if len(buckets) != self._commands.buckets:
            raise ValueError(f"a histogram of {len(buckets)} buckets")
        old_count, old_nanos, old_buckets = self._commands.rows.get(ordinal, (0, 0, [0] * len(buckets)))
        merged = [old + new for old, new in zip(old_buckets, buckets, strict=True)]
        self._commands.rows[ordinal] = (old_count + count, old_nanos + nanos, merged)

    def observe_commit(self, batch_size: int, refused: int, seconds: float) -> None:
        """Count one store transaction."""
        self._commits.labels("durable").inc(batch_size - refused)
        self._commits.labels("refused").inc(refused)
        self._commit_seconds.observe(seconds)
        self._batch_size.observe(batch_size)

    def observe_request(self, method: str, code: str, seconds: float) -> None:
        """Count one gRPC call."""
        self._requests.labels(method, code).inc()
        self._request_seconds.labels(method).observe(seconds)

    def set_instances(self, counts: Mapping[str, int], *, awake: int, hibernated: int) -> None:
        """Take over instance counts by state, and how many of those that are ON have a process."""
        for state, count in counts.items():
            self._instances.labels(state).set(count)
        self._workers.set(awake)
        self._hibernated.set(hibernated)

    def observe_thaw(self, seconds: float) -> None:
        """Count one thaw."""
        self._thaw_seconds.observe(seconds)

    def published(self, path: str) -> tuple[str, bytes] | None:
        """What there is at a path of the metrics' HTTP server: the metrics in Prometheus' text format, media type first."""
        return (_MEDIA_TYPE, generate_latest(self.registry)) if path in ("/metrics", "/") else None
