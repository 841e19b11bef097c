"""A TPM that was suspended goes on, however it is started and whoever stored it: the same as swtpm, and once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_dropin import BOTH, OURS, PLAIN, READY, VOLATILE, Running, running
from tests.support import raw, vmm
from tests.support.lockout import SU_STATE, shutdown
from tests.support.vmm import Vmm

PCR = 3
NOTHING, RUNNING, SLEEPING = "nothing", "a TPM that runs", "a TPM whose guest is asleep"

# Flags of the start, and what is said on the control channel then.
INIT, INIT_AND_DELETE, IOCTL, NO_WORD = "CMD_INIT", "CMD_INIT with the delete flag", "swtpm_ioctl -i", ""
STARTS = pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("", INIT),
        ("", INIT_AND_DELETE),
        ("", IOCTL),
        ("not-need-init", NO_WORD),
        ("not-need-init", IOCTL),
        ("not-need-init,startup-clear", NO_WORD),
        ("not-need-init,startup-clear", IOCTL),
        ("not-need-init", INIT),
        ("startup-clear", NO_WORD),
    ],
)


def store(program: str, state: Path, what: str) -> None:
    """Leave `what` in the directory."""
    with running(program, state, *READY) as tpm:
        with raw.connect(tpm.data) as sock:
            raw.succeed(sock, raw.pcr_extend(PCR, b"\x07" * 32))
            if what == SLEEPING:
                raw.succeed(sock, shutdown(SU_STATE))
        if what != NOTHING:
            tpm.ioctl("-v")
        tpm.shut_down()
    assert (state / VOLATILE).exists() is (what != NOTHING)


def seen(program: str, state: Path, flags: str, word: str) -> tuple[bytes, bytes]:
    """Start a TPM so; return its first answer to a guest, and what it answers once its guest's firmware has spoken."""
    with running(program, state, *(("--flags", flags) if flags else ())) as tpm:
        say(tpm, word)
        with raw.connect(tpm.data) as sock:
            first = raw.ask(sock, raw.pcr_read(PCR))
            raw.ask(sock, raw.startup_clear())
            return first, raw.ask(sock, raw.pcr_read(PCR))


def say(tpm: Running, word: str) -> None:
    if word == IOCTL:
        tpm.ioctl("-i")
    elif word:
        machine = Vmm(tpm.control)
        assert machine.ask(vmm.INIT, bytes(3) + bytes([word == INIT_AND_DELETE])) == bytes(4)
        machine.close()


@STARTS
@pytest.mark.parametrize("what", [NOTHING, RUNNING, SLEEPING])
@BOTH
def test_whoever_stored_it_and_however_it_is_started(program: str, what: str, flags: str, word: str, tmp_path: Path) -> None:
    answers = {}
    for starter in (OURS, PLAIN):
        store(program, tmp_path / starter, what)
        answers[starter] = seen(starter, tmp_path / starter, flags, word)
    assert answers[OURS] == answers[PLAIN]
    went_on = answers[OURS][0][-32:] not in (bytes(32), b"") and raw.rc_of(answers[OURS][0]) == 0
    assert went_on is (what != NOTHING)
    # Used once, where swtpm leaves it for the next start unless it is told to delete it.
    assert not (tmp_path / OURS / VOLATILE).exists()
    assert seen(OURS, tmp_path / OURS, flags, word)[1][-32:] == bytes(32)


def test_a_state_that_can_not_be_resumed_is_not_lost(tmp_path: Path) -> None:
    store(OURS, tmp_path / "one", RUNNING)
    store(OURS, tmp_path / "other", RUNNING)
    # Of another TPM, which libtpms refuses at the start.
    stored = (tmp_path / "other" / VOLATILE).read_bytes()
    cut = stored[:-40] + bytes(40)
    (tmp_path / "one" / VOLATILE).write_bytes(cut)
    with running(OURS, tmp_path / "one") as tpm:
        machine = Vmm(tpm.control)
        assert machine.ask(vmm.INIT, bytes(4)) != bytes(4)
        machine.close()
    assert (tmp_path / "one" / VOLATILE).read_bytes() == cut
