"""What is committed of generated code is current."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vtpm.engine import libtpms_abi

ROOT = Path(__file__).resolve().parents[3]


def test_the_abi_is_that_of_the_header(tmp_path: Path) -> None:
    made = tmp_path / "libtpms_abi.py"
    subprocess.run([ROOT / "script" / "abi", made], check=True, timeout=60)
    assert made.read_text() == Path(libtpms_abi.__file__).read_text()
