"""A minute of everything at once; `./script/torture` runs it for longer, and with other seeds."""

from __future__ import annotations

import secrets

import pytest

from tests.torture.run import torture

_SECONDS = 60.0
_INSTANCES = 6


@pytest.mark.timeout(400)
def test_a_minute_of_kills_loses_nothing_that_was_acknowledged() -> None:
    report = torture(_SECONDS, secrets.randbelow(1 << 32), _INSTANCES)
    # Says the seed, should it fail.
    assert not report.violations, str(report)
    assert report.acknowledged
    assert sum(count for name, count in report.counts.items() if "killed" in name or "crash point" in name)
