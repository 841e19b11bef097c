"""A real SQLite store in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.store.given import open_store
from vtpm.store.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vtpm.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Give a store that the examples of one property share."""
    opened = open_store(f"sqlite:///{tmp_path_factory.mktemp('store') / 'vtpm.db'}")
    yield opened
    opened.close()
