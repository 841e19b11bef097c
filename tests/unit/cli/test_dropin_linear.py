"""swtpm's states in one file: any bytes are states or refused by name, and what is kept is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.cli.dropin_linear import StateFile
from vtpm.errors import SealedStateError, VtpmError

MAGIC = bytes.fromhex("6e696c6d707477730100c000")


@settings(deadline=None)
@given(permanent=st.binary(min_size=1, max_size=3000), volatile=st.binary(min_size=1, max_size=3000))
def test_what_is_kept_is_read(permanent: bytes, volatile: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "states"
        states = StateFile(path)
        states.lock()
        states.write(permanent)
        states.write_volatile(volatile)
        assert StateFile(path).read_volatile() == volatile
        assert set(states.sizes()) == {"permall", "volatilestate"}
        states.drop_volatile()
        assert StateFile(path).read_volatile() is None
        assert [entry.name for entry in Path(directory).iterdir()] == ["states"]
        states.write(volatile)
        assert set(StateFile(path).sizes()) == {"permall"}


@settings(deadline=None)
@given(data=st.binary(max_size=400), sound=st.booleans())
def test_any_bytes_are_states_or_refused_by_name(data: bytes, sound: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "states"
        path.write_bytes(MAGIC + data if sound else data)
        try:
            found: int | str = sum(StateFile(path).sizes().values())
        except VtpmError as error:
            found = error.reason
        assert found == "SWTPM_STATE_INVALID" or (isinstance(found, int) and found <= len(data))


def test_a_name_that_points_elsewhere_stays_one(tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to(tmp_path / "states")
    states = StateFile(tmp_path / "name")
    states.lock()
    states.write(b"a state")
    assert (tmp_path / "name").is_symlink()
    assert (tmp_path / "states").is_file()


def test_a_section_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "states"
    states = StateFile(path)
    states.lock()
    states.write(b"a state" * 100)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SealedStateError, match="section 0"):
        StateFile(path).sizes()
