"""A histogram that is not of our buckets is refused where it comes in; what was counted before is told on."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from vtpm.engine.stats import BUCKETS_NS
from vtpm.metrics import Metrics


@pytest.mark.parametrize("width", [0, 1, len(BUCKETS_NS), len(BUCKETS_NS) + 2])
def test_a_histogram_of_another_length_spoils_no_scrape(width: int) -> None:
    metrics = Metrics(BUCKETS_NS)
    metrics.observe_ordinals(0x17E, 3, 1000, [1] * (len(BUCKETS_NS) + 1))
    for ordinal in (0x17E, 0x144):
        with pytest.raises(ValueError, match="buckets"):
            metrics.observe_ordinals(ordinal, 3, 1000, [1] * width)
    text = generate_latest(metrics.registry).decode()
    assert 'vtpm_tpm_commands_total{ordinal="TPM2_PCR_Read"} 3.0' in text or 'PCR_Read"} 3.0' in text
