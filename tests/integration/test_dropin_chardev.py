"""`swtpm chardev`: both on a character device (a pseudo-terminal is one) and on sockets. /dev/vtpmx is in tests/e2e."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_dropin import BOTH, COMMANDS, OURS, PERMALL, PLAIN, READY, wait_for, wait_until_listening
from tests.support import raw, vmm
from tests.support.vmm import Vmm

SET_LOCALITY_3 = bytes.fromhex("80010000000b2000100003")


def command(program: str, state: Path, *arguments: str) -> list[str]:
    return [*COMMANDS[program], "chardev", "--tpm2", "--tpmstate", f"dir={state}", *arguments]


@contextlib.contextmanager
def running(words: list[str], *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(words, pass_fds=fds) as process:
        try:
            yield process
        finally:
            process.kill()


def control_of(program: str, path: Path) -> Vmm:
    # Ours has listened before the name is there; plain swtpm's name is there before it listens.
    (wait_for if program == OURS else wait_until_listening)(path)
    return Vmm(path)


def exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


def ask(fd: int, request: bytes) -> bytes:
    """Run a TPM command by the device's other end."""
    os.write(fd, request)
    head = exactly(fd, 10)
    return head + exactly(fd, int.from_bytes(head[2:6], "big") - 10)


@pytest.mark.parametrize("way", ["--chardev", "--fd"])
@BOTH
def test_a_character_device(program: str, way: str, tmp_path: Path) -> None:
    other, device = os.openpty()
    tty.setraw(device)
    place = str(device) if way == "--fd" else os.ttyname(device)
    words = command(program, tmp_path, way, place, *READY, "--ctrl", f"type=unixio,path={tmp_path / 'c'}")
    with running(words, *([device] if way == "--fd" else [])) as process:
        if way == "--fd":
            os.close(device)
        assert raw.rc_of(ask(other, raw.pcr_read(0))) == 0
        assert raw.rc_of(ask(other, raw.nv_define(raw.ORDINARY, counter=False))) == 0
        # In two pieces.
        write = raw.nv_write(b"by a tty")
        os.write(other, write[:7])
        assert raw.rc_of(ask(other, write[7:])) == 0
        # The kernel's vendor command, which is not allowed here.
        assert raw.rc_of(ask(other, SET_LOCALITY_3)) != 0
        control = control_of(program, tmp_path / "c")
        assert control.ask(vmm.ESTABLISHED) == bytes(8)
        # There is a data channel already.
        assert control.give_data_channel().hex() == "0000001f"
        if way == "--chardev":
            os.close(device)
        os.close(other)
        assert process.wait(10) == 0
    assert (tmp_path / PERMALL).exists()


@BOTH
def test_a_socket_in_the_place_of_a_device(program: str, tmp_path: Path) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        words = command(program, tmp_path, "--fd", str(theirs.fileno()), *READY)
        with ours, running(words, theirs.fileno()) as process:
            theirs.close()
            ours.settimeout(10)
            raw.succeed(ours, raw.pcr_read(0))
            ours.close()
            assert process.wait(10) == 0


@BOTH
def test_localities_as_the_kernel_sets_them(program: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    arguments = ("--fd", str(theirs.fileno()), *READY, "--locality", "allow-set-locality")
    with ours, running(command(program, tmp_path, *arguments), theirs.fileno()) as process:
        theirs.close()
        ours.settimeout(10)
        raw.succeed(ours, SET_LOCALITY_3)
        # PCR 20 is for locality 2 and above.
        raw.succeed(ours, raw.pcr_extend(20, b"\x07" * 32))
        raw.succeed(ours, SET_LOCALITY_3[:-1] + b"\0")
        assert raw.rc_of(raw.ask(ours, raw.pcr_extend(20, b"\x07" * 32))) == 0x907
        ours.close()
        assert process.wait(10) == 0


@BOTH
def test_power_comes_by_the_control_channel(program: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    arguments = ("--fd", str(theirs.fileno()), "--ctrl", f"type=unixio,path={tmp_path / 'c'}")
    with ours, running(command(program, tmp_path, *arguments), theirs.fileno()) as process:
        theirs.close()
        ours.settimeout(10)
        assert raw.rc_of(raw.ask(ours, raw.startup_clear())) == 0x101
        control = control_of(program, tmp_path / "c")
        assert control.ask(vmm.INIT, bytes(4)) == bytes(4)
        raw.succeed(ours, raw.startup_clear())
        assert control.ask(vmm.SHUTDOWN) == bytes(4)
        assert process.wait(10) == 0


def test_as_a_daemon(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    arguments = ("--fd", str(theirs.fileno()), *READY, "--daemon", "--pid", f"file={tmp_path / 'pid'}")
    with ours:
        subprocess.run(command(OURS, tmp_path, *arguments), pass_fds=[theirs.fileno()], check=True, timeout=20)
        theirs.close()
        ours.settimeout(10)
        raw.succeed(ours, raw.pcr_read(0))
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
    deadline = time.monotonic() + 10
    while (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "Missing character device or file descriptor"),
        (["--fd", "2"], "Cannot accept file descriptors with values 0, 1, or 2"),
        (["--fd", "FILE"], "Given file descriptor type is not supported"),
        (["--fd", "77"], "Cannot stat file descriptor"),
        (["--fd", "x"], "'x'"),
        (["--chardev", "/nonexistent"], "/nonexistent"),
        (["--chardev", "/dev/null", "--vtpm-proxy"], "Cannot use vTPM proxy with a provided device."),
        (["--server", "type=tcp,port=1"], "server"),
    ],
)
def test_what_is_no_device_is_refused(arguments: list[str], word: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        arguments = [argument.replace("FILE", str(file.fileno())) for argument in arguments]
        for program in (OURS, PLAIN):
            words = command(program, tmp_path, *arguments)
            ran = subprocess.run(words, capture_output=True, text=True, timeout=20, pass_fds=[file.fileno()])
            assert ran.returncode == 1
            assert word in ran.stderr or program == PLAIN
            assert "Traceback" not in ran.stderr
            assert not (tmp_path / PERMALL).exists()


@pytest.mark.skipif(Path("/dev/vtpmx").exists(), reason="this host has /dev/vtpmx")
def test_without_the_kernels_proxy(tmp_path: Path) -> None:
    for program in (OURS, PLAIN):
        ran = subprocess.run(command(program, tmp_path, "--vtpm-proxy"), capture_output=True, text=True, timeout=20)
        assert ran.returncode == 1
        assert "Could not open /dev/vtpmx" in ran.stderr
        assert not (tmp_path / PERMALL).exists()
