"""The life of vtpm-swtpm's process: how it is started, given sockets, ended and refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import swtpm as bench_swtpm
from tests.integration.test_dropin import BOTH, COMMANDS, OURS, PERMALL, PLAIN, READY, running, wait_for
from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess
from tests.support.vmm import Vmm, plain_swtpm
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2
from vtpm.engine.worker_uids import FIRST_UID


@pytest.fixture
def path_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swtpm` on PATH is ours."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, ours in (("swtpm", "vtpm-swtpm"), ("swtpm_setup", "vtpm-swtpm-setup")):
        (directory / name).symlink_to(Path(sys.executable).with_name(ours))
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.parametrize(("first", "second"), [(OURS, OURS), (OURS, PLAIN), (PLAIN, OURS)])
def test_two_never_run_on_one_directory(first: str, second: str, tmp_path: Path) -> None:
    with running(first, tmp_path, *READY) as tpm:
        command = [*COMMANDS[second], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", *READY]
        command += ["--server", f"type=unixio,path={tmp_path}/other"]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
        raw.succeed(raw.connect(tpm.data), raw.pcr_read(0))


@BOTH
def test_daemon_pid_log_and_sigterm(program: str, tmp_path: Path) -> None:
    pid, log, control = tmp_path / "pid", tmp_path / "log", tmp_path / "c"
    command = [*COMMANDS[program], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path},mode=0600", *READY, "--daemon"]
    # A path that is relative, which plain swtpm would not find again at its end.
    place = "pid" if program == OURS else pid
    command += ["--ctrl", f"type=unixio,path={control},mode=0660", "--pid", f"file={place}", "--log", f"file={log},level=1"]
    assert subprocess.run(command, timeout=20, capture_output=True, cwd=tmp_path).returncode == 0
    wait_for(pid, control)
    number = int(pid.read_text())
    assert control.stat().st_mode & 0o777 == 0o660
    assert log.exists()
    subprocess.run(["swtpm_ioctl", "--unix", str(control), "-c"], check=True, capture_output=True)
    os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while pid.exists() or control.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (tmp_path / PERMALL).stat().st_mode & 0o777 == 0o600


@BOTH
def test_terminate_ends_with_the_data_connection(program: str, tmp_path: Path) -> None:
    with running(program, tmp_path / "a", "-t", *READY) as tpm:
        sock = raw.connect(tpm.data)
        raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False))
        # Not even waited for: what was sent is done.
        sock.sendall(raw.nv_write(b"the last"))
        sock.close()
        assert tpm.process.wait(10) == 0
    with running(program, tmp_path / "a", *READY) as tpm:
        assert raw.nv_value(raw.succeed(raw.connect(tpm.data), raw.nv_read(raw.ORDINARY))) == b"the last"
    with running(program, tmp_path / "b", "--terminate", server=False) as tpm:
        machine = Vmm(tpm.control).boot()
        machine.control.close()
        time.sleep(0.1)
        assert tpm.process.poll() is None
        assert machine.data is not None
        machine.data.close()
        assert tpm.process.wait(10) == 0


def test_the_end_of_the_control_connection_ends_it_if_asked(tmp_path: Path) -> None:
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}"]
    control = tmp_path / "c"
    with subprocess.Popen([*command, "--ctrl", f"type=unixio,path={control},terminate"]) as process:
        wait_for(control)
        Vmm(control).boot().close()
        assert process.wait(10) == 0


@BOTH
def test_sockets_that_are_given(program: str, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    data, data_end = socket.socketpair()
    command = [*COMMANDS[program], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--flags", "not-need-init"]
    command += ["--ctrl", f"type=unixio,clientfd={theirs.fileno()}", "--server", f"fd={data_end.fileno()}"]
    with subprocess.Popen(command, pass_fds=[theirs.fileno(), data_end.fileno()]) as process:
        theirs.close()
        data_end.close()
        data.settimeout(10)
        ours.settimeout(10)
        raw.succeed(data, raw.startup_clear())
        ours.sendall(vmm.request(vmm.ESTABLISHED))
        assert ours.recv(64) == bytes(8)
        data.close()
        assert process.wait(10) == 0


def test_a_client_whose_bytes_make_no_sense_is_closed(tmp_path: Path) -> None:
    with running(OURS, tmp_path, *READY) as tpm:
        sock = raw.connect(tpm.data)
        sock.sendall(bytes.fromhex("8001ffffffff00000144"))
        assert raw.rc_of(sock.recv(64)) == 0x142
        assert sock.recv(1) == b""
        raw.succeed(raw.connect(tpm.data), raw.pcr_read(0))


def test_the_end_of_the_worker_is_the_end(tmp_path: Path) -> None:
    with running(OURS, tmp_path, *READY) as tpm:
        children = subprocess.run(["pgrep", "-P", str(tpm.process.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        assert tpm.process.wait(10) == 1


def test_the_worker_has_no_log_and_is_a_user_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(OURS, tmp_path, *READY, "--log", f"file={log}") as tpm:
        parent = tpm.process.pid
        (pid,) = (int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        # It has the pipe before it has its filter, and everything else is there then.
        eventually(lambda: "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text())
        kinds = {str(link.readlink()).partition(":")[0] for link in Path(f"/proc/{pid}/fd").iterdir()}
        assert kinds == {"/dev/null", "pipe", "socket", "anon_inode"}
        if os.geteuid() == 0:
            assert f"Uid:\t{FIRST_UID + pid}\t" in Path(f"/proc/{pid}/status").read_text()
            with Path(f"/proc/{pid}/fd/2").open("wb", buffering=0) as voice:
                voice.write(b"\x1b[2Jlast words\n")
            eventually(lambda: "the TPM's process: \\x1b[2Jlast words\n" in log.read_text())
        tpm.shut_down()


def test_a_disk_that_is_full_ends_it_before_the_answer(tmp_path: Path) -> None:
    with running(OURS, tmp_path, *READY) as tpm:
        sock = raw.connect(tpm.data)
        # Nobody can write where a directory stands.
        (tmp_path / f"TMP-{PERMALL}").mkdir()
        sock.sendall(raw.nv_define(raw.ORDINARY, counter=False))
        assert sock.recv(64) == b""
        assert tpm.process.wait(10) == 1


def test_capabilities_and_states_are_told_as_swtpm_tells_them(tmp_path: Path) -> None:
    def tell(program: str, *arguments: str) -> str:
        command = [*COMMANDS[program], "socket", "--tpm2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    ours, plain = (json.loads(tell(program, "--print-capabilities")) for program in (OURS, PLAIN))
    # Of later versions.
    newer = {"flags-opt-disable-auto-shutdown"}
    assert set(ours["features"]) <= set(plain["features"]) | newer
    assert ours.keys() == plain.keys()
    states = ["--tpmstate", f"dir={tmp_path}", "--print-states"]
    assert tell(OURS, *states) == tell(PLAIN, *states)
    with running(OURS, tmp_path, *READY) as tpm:
        tpm.shut_down()
    assert tell(OURS, *states) == tell(PLAIN, *states)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["cuse", "--tpm2"], "CUSE"),
        (["socket", "--tpmstate", "dir=DIR", "--ctrl", "type=unixio,path=DIR/c"], "TPM 1.2"),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--ctrl", "type=unixio,path=DIR/c", "--migration-key", "file=/x"], "/x"),
        (["socket", "--tpm2", "--tpmstate", "backend-uri=iscsi:///x"], "backend"),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--bogus"], "bogus"),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--flags", "bogus"], "bogus"),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--server", "type=foo"], "foo"),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--server", "fd=77"], "77"),
        (["socket", "--tpm2", "--tpmstate", "dir=/nonexistent", "--ctrl", "type=unixio,path=DIR/c"], "/nonexistent"),
        (
            ["socket", "--tpm2", "--tpmstate", "dir=DIR", "--ctrl", "type=unixio,path=DIR/c", "--runas", "nobody-here"],
            "nobody-here",
        ),
        (["socket", "--tpm2", "--tpmstate", "dir=DIR", "--ctrl", "type=unixio,path=DIR/c", "--key", "file=/nokey"], "/nokey"),
        (["bogus"], "bogus"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(arguments: list[str], word: str, tmp_path: Path) -> None:
    command = [*COMMANDS[OURS], *(argument.replace("DIR", str(tmp_path)) for argument in arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 1
    assert word in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / PERMALL).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another")
@pytest.mark.parametrize("kind", ["plain", "encrypted", "in one file"])
def test_run_as(kind: str) -> None:
    """Also where the other user may not read the modules, such as in root's home."""
    import pwd

    nobody = pwd.getpwnam("nobody")
    state = Path("/tmp") / f"vtpm-runas-{os.getpid()}"
    state.mkdir()
    os.chown(state, nobody.pw_uid, nobody.pw_gid)
    (state / "key").write_text("00112233445566778899aabbccddeeff")
    os.chown(state / "key", nobody.pw_uid, nobody.pw_gid)
    arguments, file = {
        "plain": ([], PERMALL),
        "encrypted": (["--key", f"file={state / 'key'}"], PERMALL),
        "in one file": (["--tpmstate", f"backend-uri=file://{state / 'states'}"], "states"),
    }[kind]
    try:
        with running(OURS, state, *READY, "--runas", "nobody", *arguments) as tpm:
            assert (state / file).stat().st_uid == nobody.pw_uid
            tpm.shut_down()
    finally:
        subprocess.run(["rm", "-r", str(state)], check=True)


@pytest.mark.usefixtures("path_with_ours")
def test_programs_that_start_swtpm_start_ours(tmp_path: Path) -> None:
    bench_swtpm.setup(tmp_path / "made")
    with bench_swtpm.running(tmp_path / "made") as (data, pid):
        assert b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
        raw.succeed(raw.connect(data), raw.pcr_read(0))
    with plain_swtpm(tmp_path / "made") as control:
        machine = Vmm(control).boot()
        assert raw.rc_of(machine.tpm(raw.pcr_read(0))) == 0


def test_with_a_daemon_the_state_moves_into_it(daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    with running(PLAIN, state, *READY) as tpm:
        raw.succeed(raw.connect(tpm.data), raw.nv_define(raw.ORDINARY, counter=False))
        raw.succeed(raw.connect(tpm.data), raw.nv_write(b"imported"))
        tpm.shut_down()
    before = (state / PERMALL).read_bytes()
    monkeypatch.setenv("VTPM_RUNTIME_DIR", str(daemon.runtime_dir))
    monkeypatch.setenv("VTPM_SWTPM_USE_DAEMON", "1")
    for expected, written in ((b"imported", b"changed."), (b"changed.", b"and more")):
        with running(OURS, state, *READY) as tpm:
            sock = raw.connect(tpm.data)
            assert raw.nv_value(raw.succeed(sock, raw.nv_read(raw.ORDINARY))) == expected
            raw.succeed(sock, raw.nv_write(written))
            tpm.shut_down()
    with running(OURS, state, "--terminate", server=False) as tpm:
        machine = Vmm(tpm.control).boot()
        assert raw.nv_value(machine.tpm(raw.nv_read(raw.ORDINARY))) == b"and more"
        machine.close()
        assert tpm.process.wait(15) == 0
    assert (state / PERMALL).read_bytes() == before
    found = daemon.client.call(
        daemon.client.instances.ListInstances, instance_pb2.ListInstancesRequest(filter="name:swtpm-")
    ).instances
    assert [instance.labels["swtpm-state"] for instance in found] == [str(state)]


def test_a_daemon_that_does_not_answer_is_no_reason_to_run_alone(tmp_path: Path) -> None:
    command = [*COMMANDS[OURS], "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--ctrl", f"type=unixio,path={tmp_path}/c"]
    environment = os.environ | {"VTPM_SWTPM_USE_DAEMON": "1", "VTPM_RUNTIME_DIR": "/tmp/vtpm-none"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "no daemon answers" in ran.stderr
    assert not (tmp_path / PERMALL).exists()
