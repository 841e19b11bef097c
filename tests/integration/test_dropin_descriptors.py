"""Descriptors that vtpm-swtpm is given, of each kind; and what is gone when SHUTDOWN is answered."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_dropin import COMMANDS, OURS, READY, running, wait_for
from tests.support import raw, vmm

TIMEOUT_S = 30
KINDS = ("datagram", "seqpacket", "udp", "unconnected", "pipe", "file", "pty")
PLACES = ("--fd N", "--server type=unixio,fd=N", "--server fd=N", "--ctrl type=unixio,fd=N", "--ctrl type=unixio,clientfd=N")


def descriptors(kind: str, root: Path) -> list[int]:
    """Descriptors of that kind; the first one is given to the program."""
    match kind:
        case "datagram":
            return [sock.detach() for sock in socket.socketpair(type=socket.SOCK_DGRAM)]
        case "seqpacket":
            return [sock.detach() for sock in socket.socketpair(type=socket.SOCK_SEQPACKET)]
        case "udp":
            return [socket.socket(type=socket.SOCK_DGRAM).detach()]
        case "unconnected":
            return [socket.socket(socket.AF_UNIX).detach()]
        case "pipe":
            return list(os.pipe())
        case "file":
            return [os.open(root / "file", os.O_RDWR | os.O_CREAT)]
        case _:
            return list(pty.openpty())


def refuse(arguments: list[str], fds: list[int]) -> str:
    """Run it; return what it says to being refused."""
    ran = subprocess.run(
        [*COMMANDS[OURS], *arguments], pass_fds=fds[:1], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    for fd in fds:
        os.close(fd)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_served_is_refused_at_once_by_name(kind: str, place: str, tmp_path: Path) -> None:
    fds = descriptors(kind, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    said = refuse(
        ["socket", "--tpm2", "--tpmstate", f"dir={state}", *READY, *place.replace("N", str(fds[0])).split()],
        fds,
    )
    assert f"Bad file descriptor {fds[0]}: " in said
    assert not list(state.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pty", "seqpacket")])
def test_what_is_no_device_is_refused_as_one(kind: str, tmp_path: Path) -> None:
    fds = descriptors(kind, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    assert "descriptor" in refuse(["chardev", "--tpm2", "--tpmstate", f"dir={state}", "--fd", str(fds[0])], fds)
    assert not list(state.iterdir())


@pytest.mark.parametrize("kind", [*KINDS, "listening"])
def test_what_is_no_data_channel_is_refused_as_one(kind: str, tmp_path: Path) -> None:
    if kind == "listening":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "listener"))
        listener.listen()
        fds = [listener.detach()]
    else:
        fds = descriptors(kind, tmp_path)
    with running(OURS, tmp_path / "state", server=False) as tpm:
        machine = vmm.Vmm(tpm.control)
        if kind != "unconnected":
            socket.send_fds(machine.control, [vmm.request(vmm.DATAFD)], fds[:1])
            # TPM_BAD_PARAMETER.
            assert machine.exactly(4).hex() == "00000003"
        # And the next one has its place.
        machine.boot()
        assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("place", ["--fd N", "--server type=unixio,fd=N"])
def test_a_listening_socket_has_one_client_after_the_other(place: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "data"))
        listener.listen()
        command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", *READY]
        command += place.replace("N", str(listener.fileno())).split()
        with subprocess.Popen(command, pass_fds=[listener.fileno()]) as process:
            for _ in range(2):
                with raw.connect(tmp_path / "data") as client:
                    raw.succeed(client, raw.pcr_read(0))
            assert process.poll() is None
            process.terminate()
            assert process.wait(TIMEOUT_S) == 0


def test_everything_is_gone_when_shutdown_is_answered(tmp_path: Path) -> None:
    """So that a script may start the next one at once, with the same files, and take no old process for it."""
    state, pid = tmp_path / "state", tmp_path / "pid"
    options = (*READY, "--pid", f"file={pid}")
    with running(OURS, state, *options) as first:
        wait_for(pid)
        control = vmm.Vmm(first.control)
        assert control.ask(vmm.SHUTDOWN).hex() == "00000000"
        assert not pid.exists()
        assert not first.control.exists()
        assert not first.data.exists()
        # The state's lock too, and the worker.
        with running(OURS, state, *options) as second:
            wait_for(pid)
            assert int(pid.read_text()) == second.process.pid
            raw.succeed(raw.connect(second.data), raw.pcr_read(0))
            assert first.process.wait(TIMEOUT_S) == 0
            assert pid.exists()
            assert second.control.exists()
