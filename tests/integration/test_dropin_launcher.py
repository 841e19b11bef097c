"""The compiled launcher: the same programs, with a path of their own in /proc/PID/exe."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.integration import test_dropin
from tests.integration.test_dropin import OURS, READY, running
from tests.support import raw
from tests.support.daemon import ROOT


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both."""
    directory = tmp_path_factory.mktemp("launchers") / "with a space"
    subprocess.run([ROOT / "script" / "launcher", directory], check=True, capture_output=True, timeout=60)
    return directory


def test_it_is_what_runs(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_dropin.COMMANDS, OURS, [str(programs / "swtpm")])
    state = tmp_path / "ä state"
    state.mkdir()
    setup = subprocess.run(
        [programs / "swtpm_setup", "--tpm2", "--tpmstate", state, "--createek"], capture_output=True, timeout=60
    )
    assert setup.returncode == 0, setup.stderr
    with running(OURS, state, *READY) as tpm:
        assert Path(f"/proc/{tpm.process.pid}/exe").readlink() == programs / "swtpm"
        raw.succeed(raw.connect(tpm.data), raw.pcr_read(0))
        assert "0x81010001" in tpm.tools("tpm2_getcap", "handles-persistent")
        tpm.shut_down()


def test_what_it_refuses_it_refuses_in_a_sentence(programs: Path) -> None:
    # Nothing of the caller's environment changes what Python loads.
    environment = os.environ | {"PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent"}
    ran = subprocess.run([programs / "swtpm", "bogus"], capture_output=True, text=True, timeout=20, env=environment)
    assert ran.returncode == 1
    assert ran.stderr.startswith("swtpm: ")
    assert "bogus" in ran.stderr
    assert "Traceback" not in ran.stderr
