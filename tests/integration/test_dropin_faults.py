"""Each file operation of vtpm-swtpm fails, one after the other: a named error, an answer, an orderly end, nothing left."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_dropin import OURS, PERMALL, READY, VOLATILE, running
from tests.support import raw, vmm

TIMEOUT_S = 30
FUNCTIONS = ("open", "write", "fsync", "rename", "fchmod", "fstat", "stat", "pread", "lockf")
FAIL = "00000009"
DONE = "00000000"
# TPM_BAD_ORDINAL: there is no power.
OFF = "0000000a"


class Story:
    """A TPM that is initialised, suspended and ended, over a control connection that is given, with the n-th call failing."""

    def __init__(self, root: Path, state: str, function: str, number: int) -> None:
        self.root = root
        root.mkdir()
        self.armed = root / "armed"
        self.control, control_end = socket.socketpair()
        self.control.settimeout(TIMEOUT_S)
        # Who listens as well makes sockets and a PID file.
        listening = ["--server", f"type=unixio,path={root / 'data'}", "--pid", f"file={root / 'pid'}"]
        injected = [sys.executable, "-m", "tests.support.failing_files", function, str(number), str(self.armed)]
        command = [*injected, "socket", "--tpm2", "--tpmstate", state.replace("DIR", str(root)), *listening]
        with control_end:
            self.process = subprocess.Popen(
                [*command, "--ctrl", f"type=unixio,clientfd={control_end.fileno()}"],
                pass_fds=[control_end.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )

    def arm(self) -> None:
        self.armed.write_text("armed")

    @property
    def failed(self) -> bool:
        """Whether there was an n-th call."""
        return self.armed.exists() and not self.armed.read_text()

    def ask(self, command: int, payload: bytes = b"") -> str:
        """Return the answer in hex; empty if there is none."""
        try:
            self.control.sendall(vmm.request(command, payload))
            return self.control.recv(64).hex()
        except ConnectionError:
            return ""

    def wait(self) -> str:
        """Return what it said once it has ended."""
        said = self.process.communicate(timeout=TIMEOUT_S)[1]
        self.control.close()
        return said

    def leftovers(self) -> set[str]:
        names = {path.name for path in self.root.iterdir()}
        return names - {"armed", ".lock", PERMALL, VOLATILE, "states"}


@contextlib.contextmanager
def stories(root: Path, state: str, function: str) -> Iterator[Iterator[Story]]:
    """One story after the other, each with a later call failing, until there is none that could."""
    made: list[Story] = []

    def tell() -> Iterator[Story]:
        while not made or made[-1].failed:
            made.append(Story(root / str(len(made)), state, function, len(made) + 1))
            yield made[-1]
            if len(made) > 1:
                shutil.rmtree(made[-2].root)

    try:
        yield tell()
    finally:
        for story in made:
            story.process.kill()
            story.process.wait()


def kept(function: str) -> set[str]:
    """What may stay: a file that can't be looked at can't be known as one's own."""
    return {"pid", "data"} if function in ("stat", "fstat") else set()


@pytest.mark.parametrize(
    ("end", "state"), [("SHUTDOWN", "dir=DIR"), ("SIGTERM", "dir=DIR"), ("SHUTDOWN", "backend-uri=file://DIR/states")]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_call_that_fails_is_answered_named_and_leaves_nothing(function: str, end: str, state: str, tmp_path: Path) -> None:
    with stories(tmp_path, state, function) as told:
        for story in told:
            assert story.ask(vmm.CONFIG) == "0000000000000000"
            story.arm()
            answers = [story.ask(vmm.INIT, bytes(4)), story.ask(vmm.STORE_VOLATILE)]
            if end == "SHUTDOWN":
                answers.append(story.ask(vmm.SHUTDOWN))
            else:
                story.process.send_signal(signal.SIGTERM)
            said = story.wait()
            # Every one of them was answered, and what could not be done was not said to be done.
            assert set(answers) <= ({DONE, FAIL, OFF} if answers[0] == FAIL else {DONE, FAIL}), (answers, said)
            assert "Traceback" not in said
            if FAIL in answers or story.process.returncode:
                assert "swtpm: " in said
                assert "No space left on device" in said
            elif state == "dir=DIR":
                # All was done: what was suspended can go on.
                assert (story.root / VOLATILE).exists()
            assert story.leftovers() <= kept(function), said


@pytest.mark.parametrize("state", ["dir=DIR", "backend-uri=file://DIR/states"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_call_of_the_start_that_fails_is_named_and_leaves_nothing(function: str, state: str, tmp_path: Path) -> None:
    with stories(tmp_path, state, function) as told:
        for story in told:
            story.arm()
            answered = story.ask(vmm.CONFIG)
            story.ask(vmm.SHUTDOWN)
            said = story.wait()
            assert "Traceback" not in said
            assert story.process.returncode == (0 if answered else 1), said
            if not answered:
                assert said.startswith("swtpm: ")
                assert "No space left on device" in said
            assert story.leftovers() <= kept(function), said


def test_a_directory_that_is_gone_is_told_at_the_command_that_asked(tmp_path: Path) -> None:
    """And no longer by silence: a suspended TPM is believed to be in its file."""
    state = tmp_path / "state"
    with running(OURS, state, *READY) as tpm:
        control = vmm.Vmm(tpm.control)
        raw.succeed(raw.connect(tpm.data), raw.pcr_read(0))
        shutil.rmtree(state)
        assert control.ask(vmm.STORE_VOLATILE).hex() == FAIL
        assert control.ask(vmm.CONFIG).hex() == "0000000000000000"
        # What TPM2_Shutdown changes can't be kept either.
        assert control.ask(vmm.SHUTDOWN).hex() == FAIL
        assert tpm.process.stderr is not None
        said = tpm.process.stderr.read().decode()
        assert tpm.process.wait(TIMEOUT_S) == 1
    assert f"STORE_VOLATILE: {state / VOLATILE}: can't be written: No such file or directory" in said


def test_what_can_be_stored_when_asked_and_not_at_the_end_is_answered_at_the_end(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(OURS, state, *READY) as tpm:
        control = vmm.Vmm(tpm.control)
        assert control.ask(vmm.STORE_VOLATILE).hex() == DONE
        shutil.rmtree(state)
        assert control.ask(vmm.SHUTDOWN).hex() == FAIL
        assert tpm.process.stderr is not None
        said = tpm.process.stderr.read().decode()
        assert tpm.process.wait(TIMEOUT_S) == 1
    assert "the suspended TPM could not be kept" in said
