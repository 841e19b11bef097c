"""The command line as swtpm reads it: each option, subfield and spelling, taken or refused, and with the same effect."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_dropin import COMMANDS, KEY, OURS, PERMALL, PLAIN
from tests.support import raw, vmm
from tests.support.ports import free_pair

TIMEOUT_S = 30
FIRST_COUNTS = ("=true,{name}=false", "=false,{name}=true")
FLAG = ("", "=true", "=TRUE", "=True", "=1", "=false", "=FALSE", "=0", "=yes", "=2", "=", *FIRST_COUNTS)
NUMBER = ("", "=", "=abc", "=1x", "=0x1", "=1.5", "=-1")
MODE = ("", "=", "=0600", "=600", "=+0660", "=0", "=0o600", "=0x1f", "=8", "=rwx", "=01000", "=-1", "=0777,mode=0600")
ID = ("", "=", "=0", "=00", "=+0", "=-1", "=0x0", "=nobody-here", "=4294967296")
# Option → field → what stands before it in the option's value, and the spellings of the field.
GRAMMAR: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "--flags": {
        "not-need-init": ("", FLAG),
        "startup-clear": ("", FLAG),
        "startup-state": ("startup-clear,", FLAG),
        "startup-none": ("startup-clear,", FLAG),
        "startup-deactivated": ("startup-clear,", FLAG),
        "": ("", ("", ",", ",,not-need-init,", "bogus", "bogus=true", "Not-Need-Init")),
    },
    "--locality": {
        "reject-locality-4": ("", FLAG),
        "allow-set-locality": ("", FLAG),
        "": ("", ("", ",", "bogus")),
    },
    "--key": {
        "remove": ("file=DIR/key,", FLAG),
        "file": ("", ("", "=", "=DIR/key", "=DIR/none", "=DIR/key,file=DIR/none", "=DIR/none,file=DIR/key")),
        "fd": ("", (*NUMBER, "=-1,file=DIR/key")),
        "pwdfile": ("", ("", "=", "=DIR/key", "=DIR/key,remove", "=DIR/key,remove=TRUE", "=DIR/key,remove=0")),
        "pwdfd": ("", NUMBER),
        "mode": (
            "file=DIR/key,",
            ("", "=", "=aes-cbc", "=aes-128-cbc", "=aes-256-cbc", "=AES-CBC", "=aes-128-cbc,mode=bogus", "=bogus,mode=aes-cbc"),
        ),
        "format": ("file=DIR/key,", ("", "=", "=hex", "=binary", "=HEX", "=bogus")),
        "kdf": ("pwdfile=DIR/key,", ("", "=", "=sha512", "=pbkdf2", "=SHA512", "=bogus")),
        "": ("", ("", ",", "mode=aes-cbc", "file=DIR/key,kdf=bogus", "pwdfile=DIR/key,format=bogus", "file=DIR/key,bogus")),
    },
    "--log": {
        "truncate": ("file=DIR/log,", FLAG),
        "level": ("file=DIR/log,", ("", "=", "=1", "=+1", "=abc", "=1x", "=0x1")),
        "fd": ("", (*NUMBER, "=77")),
        "file": ("", ("=", "=DIR/log", "=DIR/none/log", "=-")),
        "prefix": ("file=DIR/log,", ("", "=", "=a", "=a=b")),
        "": ("", ("", ",", "truncate", "bogus")),
    },
    "--pid": {
        "file": ("", ("=", "=DIR/pid", "=DIR/pid,fd=77", "=DIR/none/pid")),
        "fd": ("", (*NUMBER, "=77", "=-1,file=DIR/pid")),
        "": ("", ("", ",", "bogus")),
    },
    "--tpmstate": {
        "mode": ("dir=DIR,", MODE),
        "dir": ("", ("=", "=DIR,dir=/nonexistent")),
        "": ("", ("", ",", "mode=0600", "dir=DIR,bogus", "dir=DIR,backend-uri=file:///nonexistent/x")),
    },
    "--seccomp": {"action": ("", ("", "=", "=none", "=kill", "=KILL", "=bogus", "=none,action=bogus"))},
    "--server": {
        "disconnect": ("type=unixio,path=DIR/data,", FLAG),
        "mode": ("type=unixio,path=DIR/data,", MODE),
        "uid": ("type=unixio,path=DIR/data,", ID),
        "gid": ("type=unixio,path=DIR/data,", ID),
        "port": ("", (*NUMBER, "=+PORT", "=PORT,ifname=lo", "=PORT,bindaddr=localhost", "=PORT,bindaddr=fe80::1", "=65536")),
        "type": ("path=DIR/data,", ("", "=", "=unixio", "=UNIXIO", "=tcp", "=unixio,type=tcp", "=tcp,type=unixio")),
        "path": ("type=unixio,", ("=", "=DIR/data", "=DIR/data,fd=-1", "=DIR/data,path=/nonexistent/x")),
        "fd": ("type=unixio,", (*NUMBER, "=77")),
        "": ("type=unixio,path=DIR/data,", ("", ",", "clientfd=7", "terminate", "bogus")),
    },
    "--ctrl": {
        "mode": ("type=unixio,path=DIR/ctrl,", MODE),
        "uid": ("type=unixio,path=DIR/ctrl,", ID),
        "gid": ("type=unixio,path=DIR/ctrl,", ID),
        "type": ("path=DIR/ctrl,", ("", "=", "=unixio", "=UNIXIO", "=tcp", "=unixio,type=tcp")),
        "port": ("type=tcp,", (*NUMBER, "=PORT", "=65536")),
        "clientfd": ("type=tcp,", ("=3", "=abc")),
        "fd": ("type=unixio,", (*NUMBER, "=77")),
        "": ("", ("", ",", "path=DIR/ctrl", "type=unixio", "type=unixio,path=DIR/ctrl,disconnect")),
    },
    "--port": {"": ("", ("PORT", "+PORT", "abc", "1x", "65536", "-1"))},
    "--fd": {"": ("", ("77", "abc", "0x4d", "1x"))},
    "--tpm2": {"": ("", ("--bogus", "extra", "--flag=not-need-init"))},
}


def spellings() -> Iterator[tuple[str, str]]:
    for option, fields in GRAMMAR.items():
        for name in fields:
            yield option, name


class Conversation:
    """One run with an option's value, and what could be seen of it; it ends by itself or by SHUTDOWN."""

    def __init__(self, program: str, root: Path, option: str, value: str, port: int) -> None:
        self.root = root
        root.mkdir()
        (root / "key").write_text(KEY)
        (root / "log").write_text("of a run before\n")
        self.value = value.replace("DIR", str(root)).replace("PORT", str(port))
        self.port = port
        self.data, data_end = socket.socketpair()
        self.control, control_end = socket.socketpair()
        for end in (self.data, self.control):
            end.settimeout(TIMEOUT_S)
        command = [*COMMANDS[program], "socket", "--tpm2"]
        command += [option, self.value] if option != "--tpm2" else [self.value]
        command += [] if option == "--tpmstate" else ["--tpmstate", f"dir={root}"]
        command += [] if option == "--ctrl" else ["--ctrl", f"type=unixio,clientfd={control_end.fileno()}"]
        command += [] if option in ("--server", "--port", "--fd") else ["--server", f"type=tcp,fd={data_end.fileno()}"]
        command += [] if option in ("--flags", "--tpm2") else ["--flags", "not-need-init,startup-clear"]
        ends = [data_end.fileno(), control_end.fileno()]
        with data_end, control_end:
            # Standard input is no number of a descriptor that a case could mean by accident.
            self.process = subprocess.Popen(
                command,
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Here the state's mode is set whatever this is (docs/dropin.md).
                umask=0,
            )

    def see(self, option: str) -> dict[str, Any]:
        """Return what it does, by what it is called."""
        seen: dict[str, Any] = {}
        try:
            if option == "--ctrl":
                # It answers, so that the control channel's socket is there.
                seen["data"] = raw.ask(self.data, raw.pcr_read(0)).hex()
                self.control = self.connect("ctrl")
            seen["config"] = self._ask(vmm.CONFIG)
            if seen["config"]:
                seen |= self._channels(option)
                self._ask(vmm.SHUTDOWN)
        except OSError:
            # It ended before it could answer: what it was given was refused.
            seen["refused"] = True
        finally:
            for end in (self.data, self.control):
                end.close()
            try:
                self.process.wait(TIMEOUT_S)
            finally:
                self.process.kill()
                self.process.wait()
        seen["status"] = self.process.returncode
        seen["files"] = [name for name in ("key", "pid") if (self.root / name).exists()]
        seen["old log"] = (self.root / "log").read_text().startswith("of a run before\n")
        state = self.root / PERMALL
        seen["state"] = oct(state.stat().st_mode) if state.exists() else ""
        return seen

    def _channels(self, option: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name in ("data", "ctrl"):
            if (self.root / name).exists():
                status = (self.root / name).stat()
                seen[f"{name} socket"] = (oct(status.st_mode), status.st_uid, status.st_gid)
        if option in ("--server", "--port"):
            self.data = self.connect("data")
        if option not in ("--fd", "--ctrl"):
            seen["commands"] = [raw.ask(self.data, raw.pcr_read(0)).hex()]
            # Whether the connection goes on after a command.
            seen["commands"].append(self._second())
        if option == "--locality":
            seen["localities"] = [self._ask(vmm.LOCALITY, bytes((level,))) for level in (3, 4, 0)]
            answer = raw.ask(self.data, bytes.fromhex("80010000000b2000100003"))
            seen["set in the stream"] = raw.rc_of(answer) == 0
        return seen

    def _second(self) -> str:
        try:
            return raw.ask(self.data, raw.pcr_read(0)).hex()
        except OSError:
            return ""

    def _ask(self, command: int, payload: bytes = b"") -> str:
        self.control.sendall(vmm.request(command, payload))
        return self.control.recv(64).hex()

    def connect(self, name: str) -> socket.socket:
        """Connect to its socket, by path or port, once it is there."""
        while True:
            try:
                if (self.root / name).exists():
                    return raw.connect(self.root / name)
                return socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
            except OSError:
                if self.process.poll() is not None:
                    raise
                time.sleep(0.005)


@pytest.mark.parametrize(("option", "name"), spellings())
def test_each_spelling_does_what_it_does_with_swtpm(option: str, name: str, tmp_path: Path) -> None:
    before, ways = GRAMMAR[option][name]
    for number, way in enumerate(ways):
        value = before + name + way.format(name=name)
        seen = {}
        for program in (OURS, PLAIN):
            root = tmp_path / f"{program}{number}"
            seen[program] = Conversation(program, root, option, value, free_pair()).see(option)
            shutil.rmtree(root)
        assert seen[OURS] == seen[PLAIN], (option, value)


# What swtpm 0.7.1 does not have, by the manual of later versions; and what is refused here on purpose (docs/dropin.md).
@pytest.mark.parametrize("way", ["", "=true", "=TRUE", "=1"])
def test_a_later_versions_flag_has_the_same_grammar(way: str, tmp_path: Path) -> None:
    told = Conversation(OURS, tmp_path / "it", "--ctrl", f"type=unixio,path=DIR/ctrl,terminate{way}", free_pair())
    # The end of the control connection is the end, without SHUTDOWN and while the data connection is there.
    raw.succeed(told.data, raw.pcr_read(0))
    told.control = told.connect("ctrl")
    told.control.close()
    assert told.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--key", "file=DIR/key,pwdfile=DIR/key", "Exactly one of"),
        ("--migration-key", "file=DIR/key,fd=0", "Exactly one of"),
        ("--migration-key", "", "Exactly one of"),
        ("--seccomp", "action=log", "log"),
        ("--flags", "startup-deactivated", "deactivated"),
        ("--server", f"type=unixio,path=DIR/{'x' * 108}", "107 bytes"),
        ("--ctrl", f"type=unixio,path=DIR/{'x' * 108}", "107 bytes"),
    ],
)
def test_what_swtpm_would_take_is_refused_before_anything_is_made(option: str, value: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={tmp_path}/c"]
    command += [option, value.replace("DIR", str(tmp_path))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ran.returncode == 1
    assert word in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
