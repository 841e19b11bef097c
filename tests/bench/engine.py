"""How many P-256 quotes the raw engine signs: one libtpms in this process, raw commands, nothing else."""

from __future__ import annotations

import sys
import time

from vtpm.engine.libtpms import Libtpms
from vtpm.engine.operations import Operations, manufacture
from vtpm.tpm.command import HEADER
from vtpm.tpm.keys import AK_HANDLE, KeyAlgorithm
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.service import quote_command


def main(seconds: float) -> int:
    """Sign for `seconds`; return how many."""
    tpm = Libtpms()
    operations = Operations(tpm)
    manufacture(tpm, operations, [KeyAlgorithm.ECC_P256], KeyAlgorithm.ECC_P256, [PcrBank.SHA256])
    permanent = tpm.permanent
    assert permanent is not None
    tpm.power_on(permanent)
    operations.startup_clear()
    command = quote_command(AK_HANDLE, [PcrSelection(PcrBank.SHA256, tuple(range(8)))], b"bench")
    tpm.command[: len(command)] = command
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        response = tpm.process_in_place(len(command))
        assert HEADER.unpack_from(response)[2] == 0
        count += 1
    return count


if __name__ == "__main__":
    sys.stdout.write(str(main(float(sys.argv[1]))))
