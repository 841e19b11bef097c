"""`vtpm instance import` and `export`: TPMs between swtpm and the service."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Tool
from tests.support.certs import certificates, revoked_serials
from tests.support.daemon import DaemonProcess
from tests.support.exchange import (
    KEY_256,
    NV_INDEX,
    PERMALL,
    RUNNING,
    VOLATILE,
    Run,
    Swtpm,
    furnish,
    furniture,
    of_swtpm,
)
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.exchange import put_state, take_state
from vtpm.cli.swtpm_files import KeySource, locked, read_state, state_directory
from vtpm.errors import VtpmError
from vtpm.wire import swtpm_state
from vtpm.wire.swtpm_keys import KeyFormat, KeyMode

pytestmark = pytest.mark.skipif(not shutil.which("swtpm"), reason="swtpm is not installed")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Where the tools keep their files."""
    path = tmp_path / "files"
    path.mkdir()
    return path


def names(daemon: DaemonProcess) -> list[str]:
    listed = daemon.client.call(daemon.client.instances.ListInstances, pb.ListInstancesRequest(page_size=1000))
    return sorted(instance.name for instance in listed.instances)


def refused(daemon: DaemonProcess, *arguments: str | Path) -> str:
    """Run a command that must be refused in one line, and leave the instances as they are; return the reason."""
    before = names(daemon)
    done = daemon.vtpm("instance", *map(str, arguments), check=False)
    assert done.returncode
    (line,) = done.stderr.decode().splitlines()
    assert names(daemon) == before
    return line.removeprefix("vtpm: ").partition(":")[0]


@pytest.fixture
def old(tmp_path: Path, files: Path) -> tuple[Path, dict[str, bytes]]:
    """A swtpm's state, and what the TPM has."""
    state = tmp_path / "old"
    return state, of_swtpm(state, files, action=furnish)


def here(daemon: DaemonProcess, tool: Callable[[pb.Instance], Tool], name: str, files: Path) -> dict[str, bytes]:
    """What an instance has; it is OFF afterwards."""
    run = tool(daemon.power_on(name))

    def one(*command: str) -> bytes:
        stdout: bytes = run("env", "-C", str(files), *command).stdout
        run("tpm2_flushcontext", "-t")
        return stdout

    found = furniture(one, files)
    daemon.vtpm("instance", "stop", name)
    return found


@pytest.mark.parametrize(
    ("key", "swtpm_key"),
    [
        ([], []),
        (["--key-file", "{}"], ["--key", "file={},mode=aes-256-cbc,format=hex"]),
        (["--password-file", "{}", "--mode", "aes-128-cbc"], ["--key", "pwdfile={},mode=aes-128-cbc"]),
    ],
    ids=["plain", "key file", "password"],
)
def test_a_tpm_moves_here_and_back(
    daemon: DaemonProcess,
    tool: Callable[[pb.Instance], Tool],
    name: str,
    tmp_path: Path,
    files: Path,
    key: list[str],
    swtpm_key: list[str],
) -> None:
    (tmp_path / "key").write_text(KEY_256.hex())
    ours, theirs = ([item.format(tmp_path / "key") for item in options] for options in (key, swtpm_key))
    before = of_swtpm(tmp_path / "old", files, *theirs, action=furnish)
    file_before = (tmp_path / "old" / PERMALL).read_bytes()

    done = daemon.vtpm("instance", "import", "--from-swtpm", str(tmp_path / "old"), *ours, "-l", "from=swtpm", name)
    assert b"working copy" in done.stderr
    imported = daemon.get(name)
    assert imported.state == pb.OFF
    assert dict(imported.labels) == {"from": "swtpm"}
    assert (tmp_path / "old" / PERMALL).read_bytes() == file_before
    assert here(daemon, tool, name, files) == before

    new = tmp_path / "new"
    done = daemon.vtpm("instance", "export", "--to-swtpm", str(new), *ours, name)
    assert (b"NOT encrypted" in done.stderr) is (not key)
    assert daemon.get(name).state == pb.OFF
    assert (new.stat().st_mode & 0o777, (new / PERMALL).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [path.name for path in new.iterdir()] == [PERMALL]
    assert (swtpm_state.mode_of((new / PERMALL).read_bytes()) is None) is (not key)
    assert of_swtpm(new, files, *theirs, action=furniture) == before
    # What was exported is still here too.
    assert here(daemon, tool, name, files) == before


def test_an_imported_tpm_quotes_like_one_that_was_made_here(
    daemon: DaemonProcess, name: str, tmp_path: Path, old: tuple[Path, dict[str, bytes]]
) -> None:
    daemon.vtpm("instance", "import", "--from-swtpm", str(old[0]), name)
    daemon.power_on(name)
    out = tmp_path / "quote"
    daemon.vtpm("quote", name, "--pcrs", "sha256:0-7", "--nonce", "1234abcd", "--out", str(out))
    check = ["tpm2_checkquote", "-u", "ak.pem", "-m", "quote.msg", "-s", "quote.sig", "-f", "pcrs.bin", "-g", "sha256"]
    subprocess.run([*check, "-q", "1234abcd"], cwd=out, check=True, capture_output=True)
    ak = next(key.public_pem for key in daemon.get(name).keys if key.role == pb.AK)
    assert ak.strip() == (out / "ak.pem").read_text().strip(), "the AK that is listed is the one that signs"
    daemon.vtpm("instance", "stop", name)


def test_what_was_imported_is_the_services_state_and_survives_its_restart(
    own_daemon: DaemonProcess, tool: Callable[[pb.Instance], Tool], files: Path, old: tuple[Path, dict[str, bytes]]
) -> None:
    daemon = own_daemon
    daemon.vtpm("instance", "import", "--from-swtpm", str(old[0]), "web-1")
    shutil.rmtree(old[0])
    daemon.stop()
    daemon.start()
    assert here(daemon, tool, "web-1", files) == old[1]


def test_the_state_never_passes_through_the_daemon(own_daemon: DaemonProcess, tmp_path: Path, files: Path) -> None:
    daemon = own_daemon
    mark = os.urandom(32).hex().encode()

    def put_mark(run: Run, files: Path) -> dict[str, bytes]:
        run("tpm2_nvdefine", NV_INDEX, "-s", "64", "-a", "ownerread|ownerwrite")
        (files / "mark").write_bytes(mark)
        run("tpm2_nvwrite", NV_INDEX, "-C", "o", "-i", "mark")
        return {}

    of_swtpm(tmp_path / "old", files, action=put_mark)
    daemon.vtpm("instance", "import", "--from-swtpm", str(tmp_path / "old"), "web-1")
    daemon.vtpm("instance", "export", "--to-swtpm", str(tmp_path / "new"), "web-1")
    assert mark in (tmp_path / "new" / PERMALL).read_bytes()
    assert daemon.process is not None
    memory = memory_of(daemon.process.pid)
    assert b"web-1" in memory
    assert mark not in memory
    assert all(mark not in path.read_bytes() for path in daemon.root.rglob("*") if path.is_file())


def memory_of(pid: int) -> bytes:
    """All that a process has mapped and can read."""
    found = bytearray()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, *_ = line.split()
            first, last = (int(end, 16) for end in span.split("-"))
            if permissions.startswith("rw"):
                memory.seek(first)
                found += memory.read(last - first) or b""
    return bytes(found)


def test_libvirts_layout_is_known(daemon: DaemonProcess, tmp_path: Path, old: tuple[Path, dict[str, bytes]]) -> None:
    above = tmp_path / "0f9a2c1e-uuid"
    above.mkdir()
    old[0].rename(above / "tpm2")
    (above / "tpm2" / VOLATILE).write_bytes(b"as in a VM that is suspended")
    # It is found: what is refused is the suspended VM.
    assert refused(daemon, "import", "--from-swtpm", above, "x") == "VOLATILE_STATE_PRESENT"
    assert refused(daemon, "import", "--from-swtpm", above / "tpm2", "x") == "VOLATILE_STATE_PRESENT"
    shutil.copy(above / "tpm2" / PERMALL, above / PERMALL)
    assert refused(daemon, "import", "--from-swtpm", above, "x") == "SWTPM_STATE_NOT_FOUND"


def test_a_suspended_vms_tpm_is_imported_only_without_its_volatile_state(
    daemon: DaemonProcess, name: str, tool: Callable[[pb.Instance], Tool], files: Path, tmp_path: Path
) -> None:
    state = tmp_path / "old"
    with Swtpm(state, *RUNNING) as swtpm:
        before = furnish(lambda *command: swtpm.tool(*command, cwd=files), files)
        subprocess.run(["swtpm_ioctl", "--unix", str(swtpm.control), "-v"], check=True, capture_output=True)
    assert (state / VOLATILE).exists()
    assert refused(daemon, "import", "--from-swtpm", state, name) == "VOLATILE_STATE_PRESENT"
    daemon.vtpm("instance", "import", "--from-swtpm", str(state), "--drop-volatile", name)
    assert here(daemon, tool, name, files) == before


def test_a_swtpm_that_runs_is_not_disturbed(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    with Swtpm(tmp_path / "old", *RUNNING):
        assert refused(daemon, "import", "--from-swtpm", tmp_path / "old", name) == "SWTPM_RUNNING"
        (tmp_path / "old" / PERMALL).unlink()
        daemon.create(name)
        assert refused(daemon, "export", "--to-swtpm", tmp_path / "old", name) == "SWTPM_RUNNING"
    assert not (tmp_path / "old" / PERMALL).exists()


def test_state_that_cannot_be_imported_is_refused_by_name(tmp_path: Path, old: tuple[Path, dict[str, bytes]]) -> None:
    state, _ = old
    key, password = tmp_path / "key", tmp_path / "password"
    key.write_text(KEY_256.hex())
    password.write_text("a password")

    def reason(mode: KeyMode | None = None, **source: Any) -> str:
        with pytest.raises(VtpmError) as caught:
            read_state(state_directory(state) / PERMALL, KeySource(**source), mode)
        assert KEY_256.hex() not in str(caught.value)
        return caught.value.reason

    assert reason(key_file=key) == "SWTPM_STATE_NOT_ENCRYPTED"
    assert reason(key_file=key, password_file=password) == "USAGE"
    assert reason(key_file=tmp_path / "missing") == "FILE_UNREADABLE"
    assert reason(key_file=key, key_format=KeyFormat.BINARY) == "SWTPM_KEY_INVALID"
    plain = swtpm_state.parse((state / PERMALL).read_bytes())
    for content, why in (
        (swtpm_state.build(plain)[:-1], "SWTPM_STATE_INVALID"),
        (swtpm_state.build(b"\0" * 100), "SWTPM_STATE_NOT_PERMANENT"),
        (swtpm_state.build(plain, KEY_256), "SWTPM_STATE_ENCRYPTED"),
        (bytes((1 << 20) + 1), "FILE_TOO_LARGE"),
        (b"", "SWTPM_STATE_INVALID"),
    ):
        (state / PERMALL).write_bytes(content)
        assert reason() == why
    (state / PERMALL).write_bytes(swtpm_state.build(plain, bytes(32)))
    assert reason(key_file=key) == "SWTPM_STATE_NOT_AUTHENTIC"
    assert reason(password_file=password) == "SWTPM_STATE_NOT_AUTHENTIC"
    assert reason(KeyMode.AES_128_CBC, key_file=key) == "SWTPM_KEY_INVALID"
    (state / PERMALL).unlink()
    assert reason() == "SWTPM_STATE_NOT_FOUND"
    os.mkfifo(state / PERMALL)
    assert reason() == "FILE_UNREADABLE"
    (state / PERMALL).unlink()
    (state / "tpm-00.permall").write_bytes(b"a TPM 1.2")
    assert reason() == "SWTPM_STATE_NOT_FOUND"
    with pytest.raises(VtpmError, match="this is a file"):
        state_directory(key)


def test_what_is_refused_on_the_command_line_makes_no_instance(
    daemon: DaemonProcess, name: str, tmp_path: Path, old: tuple[Path, dict[str, bytes]]
) -> None:
    (tmp_path / "key").write_text(KEY_256.hex())
    arguments = ("import", "--from-swtpm", old[0], name)
    assert refused(daemon, *arguments, "--key-file", tmp_path / "key") == "SWTPM_STATE_NOT_ENCRYPTED"
    assert refused(daemon, *arguments, "--key-format", "base64") == "USAGE"
    assert refused(daemon, *arguments, "--label", "novalue") == "LABELS_INVALID"


def test_an_import_that_fails_leaves_nothing(daemon: DaemonProcess, name: str, old: tuple[Path, dict[str, bytes]]) -> None:
    state, _ = old
    plain = swtpm_state.parse((state / PERMALL).read_bytes())
    (state / PERMALL).write_bytes(swtpm_state.build(plain[: len(plain) // 2]))
    assert refused(daemon, "import", "--from-swtpm", state, name) == "SWTPM_STATE_REFUSED"
    # The name is free again, and one that is taken is not touched.
    (state / PERMALL).write_bytes(swtpm_state.build(plain))
    daemon.vtpm("instance", "import", "--from-swtpm", str(state), name)
    made = daemon.get(name)
    assert refused(daemon, "import", "--from-swtpm", state, name) == "INSTANCE_NAME_TAKEN"
    assert daemon.get(name) == made


def test_an_import_that_is_interrupted_leaves_nothing(
    daemon: DaemonProcess, name: str, old: tuple[Path, dict[str, bytes]]
) -> None:
    before = names(daemon)
    command = [str(Path(sys.executable).with_name("vtpm")), "instance", "import", "--from-swtpm", str(old[0]), name]
    with subprocess.Popen(command, env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while name not in names(daemon) and process.poll() is None:
            time.sleep(0.001)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert names(daemon) == before


def test_a_tpm_that_was_exported_comes_back_with_its_ak(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    daemon.create(name)
    made = daemon.get(name)
    daemon.vtpm("instance", "export", "--to-swtpm", str(tmp_path / "copy"), name)
    daemon.vtpm("instance", "import", "--from-swtpm", str(tmp_path / "copy"), f"{name}-again")
    assert list(daemon.get(f"{name}-again").keys) == list(made.keys)


def test_only_an_instance_that_is_off_is_exported(daemon: DaemonProcess, running: pb.Instance, tmp_path: Path) -> None:
    assert refused(daemon, "export", "--to-swtpm", tmp_path / "new", running.name) == "INSTANCE_NOT_OFF"
    assert refused(daemon, "export", "--to-swtpm", tmp_path / "new", "nobody") == "INSTANCE_NOT_FOUND"
    assert not (tmp_path / "new").exists()
    assert daemon.get(running.name).state == pb.ON


def test_a_tpm_that_is_there_is_not_overwritten_unasked(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    daemon.create(name)
    for left in (PERMALL, VOLATILE):
        place = tmp_path / left
        place.mkdir()
        (place / left).write_bytes(b"another TPM")
        assert refused(daemon, "export", "--to-swtpm", place, name) == "SWTPM_STATE_EXISTS"
        assert (place / left).read_bytes() == b"another TPM"


def test_force_overwrites_and_leaves_no_volatile_state_of_another_tpm(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    daemon.create(name)
    (tmp_path / "tpm2").mkdir()
    for left in (PERMALL, VOLATILE):
        (tmp_path / "tpm2" / left).write_bytes(b"another TPM")
    daemon.vtpm("instance", "export", "--to-swtpm", str(tmp_path), "--force", name)
    swtpm_state.check_permanent(swtpm_state.parse((tmp_path / "tpm2" / PERMALL).read_bytes()))
    assert [path.name for path in (tmp_path / "tpm2").iterdir()] == [PERMALL]


def test_a_key_may_come_through_a_pipe_and_is_in_no_message(
    daemon: DaemonProcess, name: str, tmp_path: Path, old: tuple[Path, dict[str, bytes]]
) -> None:
    plain = swtpm_state.parse((old[0] / PERMALL).read_bytes())
    (old[0] / PERMALL).write_bytes(swtpm_state.build(plain, KEY_256))
    arguments = ("instance", "import", "--from-swtpm", str(old[0]), "--key-file", "/dev/stdin", name)
    done = daemon.vtpm(*arguments, stdin=KEY_256.hex().encode())
    assert KEY_256.hex().encode() not in done.stdout + done.stderr


def test_the_directory_stays_locked_while_it_is_read(tmp_path: Path, old: tuple[Path, dict[str, bytes]]) -> None:
    with locked(old[0]):
        ask = "import fcntl,sys; fcntl.lockf(open(sys.argv[1],'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", ask, str(old[0] / ".lock")], capture_output=True, check=False)
        assert b"BlockingIOError" in done.stderr


def test_an_imported_tpm_is_not_what_was_certified(
    daemon: DaemonProcess, name: str, old: tuple[Path, dict[str, bytes]]
) -> None:
    """The instance that it went to had certificates; they are revoked as soon as its keys are known to be others."""
    daemon.vtpm("instance", "import", "--from-swtpm", str(old[0]), name)
    imported = daemon.get(name)
    assert imported.identity == pb.CHANGED
    daemon.power_on(name)
    assert daemon.get(name).identity == pb.CHANGED
    revoked = revoked_serials(daemon)
    assert all(int(item.serial, 16) in revoked for item in certificates(daemon, name).values())


def test_its_own_state_brings_an_instance_its_identity_back(daemon: DaemonProcess, name: str) -> None:
    made = daemon.create(name)
    put_state(made.control_socket, take_state(made.control_socket))
    daemon.until(name, pb.OFF)
    daemon.power_on(name)
    assert daemon.get(name).identity == pb.CERTIFIED
    assert not revoked_serials(daemon) & {int(item.serial, 16) for item in certificates(daemon, name).values()}
