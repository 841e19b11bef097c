"""Root and not root: where things are kept, and who is let in."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.daemon import ROOT, DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.config import Settings
from vtpm.errors import VtpmError

NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """The home of a user who is not root."""
    root = Path(tempfile.mkdtemp(prefix="vtpm-"))
    # Nobody but root could have given the user this place.
    root.chmod(0o755)
    path = root / "h"
    path.mkdir(0o700)
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(root, ignore_errors=True)


def as_nobody(home: Path) -> tuple[list[str], dict[str, str]]:
    """How to run Python as a user who is not root; skips where that can't be."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    packages = sysconfig.get_paths()["purelib"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": f"{packages}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}"):
        command = [*become, python]
        # Twice: the first step still has root's right to pass through root's directories.
        again = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import grpc, vtpm.daemon'], check=True)"
        tried = subprocess.run([*command, "-c", again], env=env, cwd="/", capture_output=True, check=False)
        if tried.returncode == 0:
            return command, env
    pytest.skip("no Python with these packages that another user may run")


def test_a_user_who_is_not_root_has_a_daemon_in_the_xdg_directories(home: Path) -> None:
    python, env = as_nobody(home)
    env |= {"XDG_RUNTIME_DIR": str(home / "run"), "VTPM_LOG_FORMAT": "json"}
    (home / "run").mkdir(mode=0o700)
    os.chown(home / "run", NOBODY, NOBODY)
    daemon = subprocess.Popen([*python, str(ROOT / "server.py")], env=env, cwd="/", stderr=subprocess.PIPE)
    socket = home / "run" / "vtpm" / "operator.sock"
    host = 0
    try:
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert daemon.poll() is None, daemon.stderr.read() if daemon.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client = Client(f"unix:{socket}")
        client.call(client.instances.CreateInstance, pb.CreateInstanceRequest(name="web-1"))
        web = client.call(client.instances.StartInstance, pb.StartInstanceRequest(instance="web-1"))
        host = client.call(client.host.GetHost, pb.GetHostRequest()).engine_host_pid
        raw.succeed(raw.connect(web.tpm_socket), raw.get_random(8))
        # Its workers can't be users of their own, and that is said.
        said = (home / "run/vtpm/engine-host.log").read_text().splitlines()
        assert [line for line in said if "workers run as the same user" in line and "does not run as root" in line] == said
        assert (home / ".local/state/vtpm/vtpm.db").exists()
        assert (home / ".local/state/vtpm").stat().st_uid == NOBODY
        client.close()
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
        if host:
            os.kill(host, signal.SIGKILL)


def test_another_user_is_kept_out_and_told_so(own_daemon: DaemonProcess, home: Path) -> None:
    python, env = as_nobody(home)
    env |= {"VTPM_STATE_DIR": str(own_daemon.state_dir), "VTPM_RUNTIME_DIR": str(own_daemon.runtime_dir)}
    script = "from vtpm.cli.main import main; import sys; sys.argv = ['vtpm', 'instance', 'list']; main()"
    done = subprocess.run([*python, "-c", script], env=env, cwd="/", capture_output=True, check=False)
    assert done.returncode == 6
    assert b"DAEMON_UNREACHABLE" in done.stderr
    assert b"Traceback" not in done.stderr
    # Nor can another user's daemon take the directories over.
    second = subprocess.run([*python, str(ROOT / "server.py")], env=env, cwd="/", capture_output=True, check=False)
    assert second.returncode == 2
    assert b"DIRECTORY_" in second.stderr
    assert b"Traceback" not in second.stderr


def test_a_group_of_operators_is_let_in() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to any group")
    with DaemonProcess(environment={"VTPM_SOCKET_GROUP": "daemon"}) as daemon:
        socket = daemon.runtime_dir / "operator.sock"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o660
        assert stat.S_IMODE(daemon.runtime_dir.stat().st_mode) == 0o710
        assert socket.stat().st_gid == daemon.runtime_dir.stat().st_gid
        web = daemon.running("web-1")
        assert stat.S_IMODE(Path(web.tpm_socket).stat().st_mode) == 0o600


def test_the_daemons_defaults_are_the_commands_defaults(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("VTPM_STATE_DIR", "VTPM_RUNTIME_DIR", "VTPM_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    settings = Settings.load({})
    assert (settings.state_dir, settings.runtime_dir) == (Path("/var/lib/vtpm"), Path("/run/vtpm"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "s"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "r"))
    settings = Settings.load({})
    assert (settings.state_dir, settings.runtime_dir) == (home / "s/vtpm", home / "r/vtpm")


def test_a_state_directory_that_others_may_write_is_refused(own_daemon: DaemonProcess) -> None:
    own_daemon.stop()
    own_daemon.state_dir.chmod(0o777)
    done = subprocess.run([sys.executable, str(ROOT / "server.py")], env=own_daemon.env, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"DIRECTORY_WRITABLE" in done.stderr
    own_daemon.state_dir.chmod(0o700)
    own_daemon.start()


def test_a_path_too_long_for_sockets_is_refused_with_the_limit(tmp_path: Path) -> None:
    env = os.environ | {"VTPM_STATE_DIR": str(tmp_path), "VTPM_RUNTIME_DIR": str(tmp_path / ("x" * 100))}
    done = subprocess.run([sys.executable, str(ROOT / "server.py")], env=env, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"too long" in done.stderr


def test_a_deleted_instance_is_unknown_in_every_way(daemon: DaemonProcess, name: str) -> None:
    made = daemon.create(name)
    daemon.client.call(daemon.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=name))
    for ref in (name, made.id, f"instances/{made.id}"):
        with pytest.raises(VtpmError) as caught:
            daemon.get(ref)
        assert caught.value.reason == "INSTANCE_NOT_FOUND"
