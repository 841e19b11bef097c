"""Daemons that are hurt, one for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.daemon import DaemonProcess


@pytest.fixture
def own_daemon() -> Iterator[DaemonProcess]:
    """A daemon that answers."""
    with DaemonProcess() as process:
        yield process
