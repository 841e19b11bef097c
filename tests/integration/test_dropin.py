"""vtpm-swtpm in swtpm's place: the same conversations with both, and each going on with what the other left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw, vmm
from tests.support.ports import free_pair
from tests.support.vmm import CRB_BUFFER, TIS_BUFFER, Vmm

OURS, PLAIN = "ours", "plain"
BOTH = pytest.mark.parametrize("program", [OURS, PLAIN])
PERMALL, VOLATILE = "tpm2-00.permall", "tpm2-00.volatilestate"
COMMANDS = {OURS: [sys.executable, "-m", "vtpm.cli.dropin"], PLAIN: ["swtpm"]}
KEY = "00112233445566778899aabbccddeeff"


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 10
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_until_listening(*paths: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        # Flags, type, state, inode, path; the flag is __SO_ACCEPTCON.
        rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
        listening = {row[7] for row in rows if len(row) > 7 and row[3] == "00010000"}
        if {str(path) for path in paths} <= listening:
            return
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Running:
    """One of the two on a state directory, with its sockets beside it."""

    def __init__(self, program: str, state: Path, *arguments: str, server: bool = True, **popen: Any) -> None:
        state.mkdir(exist_ok=True)
        self.state, self.data, self.control = state, state / "tpm.sock", state / "tpm.sock.ctrl"
        # Of one that was killed.
        for path in (self.data, self.control):
            path.unlink(missing_ok=True)
        command = [*COMMANDS[program], "socket", "--tpm2", "--tpmstate", f"dir={state}"]
        command += ["--ctrl", f"type=unixio,path={self.control}"]
        command += ["--server", f"type=unixio,path={self.data}"] if server else []
        self.process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, **popen)
        wait_for(self.control, *([self.data] if server else []))
        if program == PLAIN:
            # It binds a while before it listens.
            wait_until_listening(self.control, *([self.data] if server else []))

    def ioctl(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["swtpm_ioctl", "--unix", str(self.control), *arguments], check=True, capture_output=True)

    def shut_down(self) -> None:
        self.ioctl("-s")
        assert self.process.wait(10) == 0

    def tools(self, *command: str) -> str:
        tcti = f"swtpm:path={self.data}"
        ran = subprocess.run([*command, "-T", tcti], capture_output=True, text=True, cwd=self.state, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


@contextlib.contextmanager
def running(program: str, state: Path, *arguments: str, **more: Any) -> Iterator[Running]:
    tpm = Running(program, state, *arguments, **more)
    try:
        yield tpm
    finally:
        tpm.process.kill()
        tpm.process.wait()


READY = ("--flags", "not-need-init,startup-clear")


@pytest.mark.parametrize("size", [CRB_BUFFER, TIS_BUFFER])
def test_a_cold_start_byte_for_byte(size: int, tmp_path: Path) -> None:
    answers = {}
    for program in (OURS, PLAIN):
        with running(program, tmp_path / program, server=False) as tpm:
            machine = Vmm(tpm.control)
            got = machine.cold_start(size)
            got += [machine.ask(vmm.ESTABLISHED), machine.ask(vmm.LOCALITY, bytes(4))]
            got += [machine.tpm(bytes.fromhex("00c10000000a000000f1")), machine.tpm(raw.startup_clear())]
            got += [*machine.reset(size), machine.tpm(raw.startup_clear()), machine.ask(vmm.CONFIG), machine.ask(vmm.SHUTDOWN)]
            assert tpm.process.wait(10) == 0
            answers[program] = [answer.hex() for answer in got]
            assert not tpm.control.exists()
    # Bit 16, LOCK_STORAGE, which swtpm has in later versions.
    assert answers[OURS][2] == "000000000001ffff"
    answers[OURS][2] = "000000000000ffff"
    assert answers[OURS] == answers[PLAIN]


def test_a_vm_migrates_between_both(tmp_path: Path) -> None:
    for source, destination in ((OURS, PLAIN), (PLAIN, OURS)):
        root = tmp_path / source
        root.mkdir()
        with running(source, root / "a", server=False) as first, running(destination, root / "b", server=False) as second:
            machine = Vmm(first.control).boot()
            machine.tpm(raw.pcr_extend(3, b"\x07" * 32))
            before = machine.tpm(raw.pcr_read(3))
            states = {kind: machine.get_state(kind) for kind in (vmm.PERMANENT, vmm.VOLATILE)}
            other = Vmm(second.control)
            other.give_data_channel()
            other.ask(vmm.STOP)
            assert [other.set_state(kind, blob) for kind, blob in states.items()] == [0, 0]
            assert other.ask(vmm.INIT, b"\0\0\0\1") == bytes(4)
            # The update counter too, so that it is the same TPM.
            assert other.tpm(raw.pcr_read(3)) == before
            assert (second.state / PERMALL).exists()


def story_of_state(tpm: Running) -> None:
    """What one leaves: a sealed secret, a persistent key, NV data."""
    (tpm.state / "secret").write_text("a secret")
    tpm.tools("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    tpm.tools("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "primary.ctx", "0x81000001")
    tpm.tools("tpm2_flushcontext", "-t")
    create = ["tpm2_create", "-Q", "-C", "0x81000001", "-i", "secret", "-u", "seal.pub", "-r", "seal.priv"]
    tpm.tools(*create)
    tpm.tools("tpm2_flushcontext", "-t")
    tpm.tools("tpm2_nvdefine", "-Q", "0x1500001", "-C", "o", "-s", "8")
    (tpm.state / "nv").write_text("12345678")
    tpm.tools("tpm2_nvwrite", "-Q", "0x1500001", "-C", "o", "-i", "nv")


@pytest.mark.parametrize("key", [(), ("--key", "KEY,format=hex,mode=aes-128-cbc"), ("--key", "PWD,mode=aes-256-cbc")])
@BOTH
def test_each_goes_on_with_the_others_state(program: str, key: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "pwd").write_text("a password")
    places = (("KEY", f"file={tmp_path / 'key'}"), ("PWD", f"pwdfile={tmp_path / 'pwd'}"))
    options = [option.replace(*places[0]).replace(*places[1]) for option in key]
    state = tmp_path / "state"
    with running(program, state, *READY, *options) as tpm:
        story_of_state(tpm)
        tpm.shut_down()
    assert (b"12345678" in (state / PERMALL).read_bytes()) is not bool(key)
    with running(PLAIN if program == OURS else OURS, state, *READY, *options) as tpm:
        assert tpm.tools("tpm2_nvread", "0x1500001", "-C", "o", "-s", "8") == "12345678"
        tpm.tools("tpm2_load", "-Q", "-C", "0x81000001", "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
        assert tpm.tools("tpm2_unseal", "-c", "seal.ctx") == "a secret"


def test_tools_over_tcp(tmp_path: Path) -> None:
    port = free_pair()
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "startup-clear"]
    command += ["--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(3):
                tools = ["tpm2_getrandom", "--hex", "16", "-T", f"swtpm:host=127.0.0.1,port={port}"]
                assert len(subprocess.run(tools, check=True, capture_output=True, timeout=20).stdout) == 32
        finally:
            process.terminate()
        assert process.wait(10) == 0


@BOTH
def test_killed_right_after_an_answer_nothing_is_lost(program: str, tmp_path: Path) -> None:
    for turn in range(1, 6):
        with running(program, tmp_path / "state", *READY) as tpm:
            sock = raw.connect(tpm.data)
            if turn == 1:
                raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False))
            else:
                assert raw.nv_value(raw.succeed(sock, raw.nv_read(raw.ORDINARY))) == (turn - 1).to_bytes(8, "big")
            raw.succeed(sock, raw.nv_write(turn.to_bytes(8, "big")))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other key"])
def test_a_damaged_state_is_refused_and_left_alone(damage: str, tmp_path: Path) -> None:
    with running(OURS, tmp_path, *READY) as tpm:
        tpm.shut_down()
    whole = (tmp_path / PERMALL).read_bytes()
    (tmp_path / PERMALL).write_bytes({"cut": whole[:-7], "empty": b"", "noise": os.urandom(999), "other key": whole}[damage])
    before = (tmp_path / PERMALL).read_bytes()
    (tmp_path / "key").write_text(KEY)
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={tmp_path}/c"]
    command += ["--key", f"file={tmp_path}/key"] if damage == "other key" else []
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 1
    assert ran.stderr.startswith("swtpm: ")
    assert "Traceback" not in ran.stderr
    assert (tmp_path / PERMALL).read_bytes() == before


# Of a state file: its header, and that of its one record.
OLDEST = 10 + 6


def test_a_state_of_the_oldest_format_is_named_and_its_remedy_helps(tmp_path: Path) -> None:
    with running(PLAIN, tmp_path, *READY) as tpm:
        raw.succeed(raw.connect(tpm.data), raw.nv_define(raw.ORDINARY, counter=False))
        raw.succeed(raw.connect(tpm.data), raw.nv_write(b"the old1"))
        tpm.ioctl("-v")
        tpm.shut_down()
    for name in (VOLATILE, PERMALL):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[OLDEST:])
        command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "not-need-init"]
        command += ["--ctrl", f"type=unixio,path={tmp_path}/c"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert ran.returncode == 1
        assert "oldest format" in ran.stderr
        assert "let swtpm write it anew" in ran.stderr
        assert (tmp_path / name).read_bytes() == whole[OLDEST:]
    (tmp_path / VOLATILE).unlink()
    # What the remedy says.
    with running(PLAIN, tmp_path, "--flags", "startup-clear") as tpm:
        tpm.shut_down()
    with running(OURS, tmp_path, *READY) as tpm:
        assert raw.nv_value(raw.succeed(raw.connect(tpm.data), raw.nv_read(raw.ORDINARY))) == b"the old1"


@BOTH
def test_localities(program: str, tmp_path: Path) -> None:
    with running(program, tmp_path, *READY, "--locality", "reject-locality-4,allow-set-locality") as tpm:
        machine = Vmm(tpm.control)
        assert [machine.ask(vmm.LOCALITY, bytes((level, 0, 0, 0))).hex() for level in (3, 4, 0)] == [
            "00000000",
            "0000003d",
            "00000000",
        ]
        sock = raw.connect(tpm.data)
        rcs = [raw.rc_of(raw.ask(sock, bytes.fromhex(f"80010000000b20001000{level:02x}"))) for level in (3, 4, 5)]
        assert rcs == [0, 0x107, 0x107]
        raw.succeed(sock, raw.pcr_read(0))


def test_a_suspended_tpm_goes_on_once(tmp_path: Path) -> None:
    """As swtpm does with STORE_VOLATILE, but that it can't be resumed a second time."""
    with running(OURS, tmp_path, *READY) as tpm:
        raw.succeed(raw.connect(tpm.data), raw.pcr_extend(3, b"\x07" * 32))
        before = raw.succeed(raw.connect(tpm.data), raw.pcr_read(3))
        tpm.ioctl("-v")
        tpm.shut_down()
    with running(OURS, tmp_path, "--flags", "not-need-init") as tpm:
        assert not (tmp_path / VOLATILE).exists()
        assert raw.succeed(raw.connect(tpm.data), raw.pcr_read(3)) == before
        tpm.ioctl("-v")
        raw.succeed(raw.connect(tpm.data), raw.pcr_extend(3, b"\x07" * 32))
        tpm.shut_down()
    # A command came after it.
    assert not (tmp_path / VOLATILE).exists()


def test_what_plain_swtpm_suspended_goes_on(tmp_path: Path) -> None:
    with running(PLAIN, tmp_path, *READY) as tpm:
        raw.succeed(raw.connect(tpm.data), raw.pcr_extend(3, b"\x07" * 32))
        before = raw.succeed(raw.connect(tpm.data), raw.pcr_read(3))
        tpm.ioctl("-v")
        tpm.shut_down()
    with running(OURS, tmp_path, "--flags", "not-need-init") as tpm:
        assert raw.succeed(raw.connect(tpm.data), raw.pcr_read(3)) == before


@BOTH
def test_swtpm_ioctl(program: str, tmp_path: Path) -> None:
    with running(program, tmp_path / "state") as tpm:
        tpm.ioctl("-i")
        assert b"TPM" in tpm.ioctl("--info", "1").stdout
        tpm.ioctl("--save", "permanent", str(tmp_path / "saved"))
        tpm.ioctl("--stop")
        tpm.ioctl("--load", "permanent", str(tmp_path / "saved"))
        tpm.ioctl("-i")
        tpm.shut_down()
