"""Other users of the host: what they lay in the way of the daemon and of the commands, and the operators who are let in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_users import NOBODY, as_nobody
from tests.support.daemon import ROOT, DaemonProcess
from tests.support.strangers import KINDS, STRANGER, Victim, a_device, a_place, a_server, needs_root

VTPM = [str(Path(sys.executable).with_name("vtpm"))]
SERVER = [sys.executable, str(ROOT / "server.py")]
TIMEOUT_S = 60


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim.of(tmp_path / "victim")


def told(command: list[str], env: dict[str, str] | None = None, **more: object) -> tuple[int, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VTPM_")}
    done = subprocess.run(command, env=clean | (env or {}), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


# ---- where the sockets and the state are ---------------------------------------------------------------------------------


@needs_root
def test_a_command_sends_nothing_to_a_strangers_server() -> None:
    with a_place(mode=0o1777) as tmp:
        (tmp / "vtpm-0").mkdir()
        os.chown(tmp / "vtpm-0", STRANGER, STRANGER)
        with a_server(tmp / "vtpm-0" / "operator.sock", STRANGER) as server:
            status, error = told([*VTPM, "--runtime-dir", str(tmp / "vtpm-0"), "instance", "list"])
            assert status == 7
            assert "SERVER_NOT_TRUSTED" in error
            assert "belongs to uid 65534" in error
            assert server.received() is None


@needs_root
def test_the_drop_in_sends_nothing_to_a_strangers_server(tmp_path: Path) -> None:
    with a_place(mode=0o1777) as tmp:
        (tmp / "run").mkdir()
        os.chown(tmp / "run", STRANGER, STRANGER)
        with a_server(tmp / "run" / "operator.sock", STRANGER) as server:
            command = [sys.executable, "-m", "vtpm.cli.dropin", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}"]
            command += ["--ctrl", f"type=unixio,path={tmp_path / 'ctrl'}"]
            status, error = told(command, {"VTPM_SWTPM_USE_DAEMON": "1", "VTPM_RUNTIME_DIR": str(tmp / "run")})
            assert status == 1
            assert "belongs to uid 65534" in error
            assert server.received() is None


@needs_root
@pytest.mark.parametrize("which", ["state", "run"])
@pytest.mark.parametrize("above", ["a stranger's directory", "a stranger's link", "one that others may write to"])
def test_a_daemon_does_not_start_where_a_stranger_could_put_another_directory(which: str, above: str) -> None:
    with a_place() as place, a_place() as ours:
        way = place / "way"
        if above == "a stranger's link":
            way.symlink_to(ours)
            os.chown(way, STRANGER, STRANGER, follow_symlinks=False)
        else:
            way.mkdir()
            way.chmod(0o777 if above == "one that others may write to" else 0o755)
            os.chown(way, *((STRANGER, STRANGER) if above == "a stranger's directory" else (0, 0)))
        directories = {"state": ours / "state", "run": ours / "run"} | {which: way / "vtpm"}
        env = {"VTPM_STATE_DIR": str(directories["state"]), "VTPM_RUNTIME_DIR": str(directories["run"])}
        status, error = told(SERVER, env)
        assert status == 2
        assert "DIRECTORY_NOT_TRUSTED" in error
        assert str(way) in error
        assert not (way / "vtpm").exists(), "nothing was made there"


@needs_root
@pytest.mark.parametrize("setting", ["key", "anchor", "store", "config"])
def test_a_daemon_takes_no_file_that_a_stranger_could_have_put_there(setting: str) -> None:
    with a_place() as ours, a_place(STRANGER) as theirs:
        (theirs / "file").write_text("")
        os.chown(theirs / "file", STRANGER, STRANGER)
        (ours / "state").mkdir(0o700)
        env = {"VTPM_STATE_DIR": str(ours / "state"), "VTPM_RUNTIME_DIR": str(ours / "run")}
        env |= {
            "key": {"VTPM_KEY_PROVIDER_OPTIONS": f'{{"path": "{theirs / "file"}"}}'},
            "anchor": {"VTPM_ANCHOR": "file", "VTPM_ANCHOR_PATH": str(theirs / "anchor")},
            "store": {"VTPM_STORE_URL": f"sqlite:///{theirs / 'vtpm.db'}"},
            "config": {"VTPM_CONFIG_FILE": str(theirs / "file")},
        }[setting]
        status, error = told([*SERVER, "--log-format", "json"], env) if setting != "anchor" else (2, anchor_trouble(env))
        assert status in (1, 2)
        assert "NOT_TRUSTED" in error
        assert str(theirs) in error
        assert [item.name for item in theirs.iterdir()] == ["file"]


def anchor_trouble(env: dict[str, str]) -> str:
    """An anchor that can't be used stops no daemon: it powers nothing on, and says why."""
    daemon = DaemonProcess(root=Path(env["VTPM_STATE_DIR"]).parent, environment=env)
    try:
        daemon.start()
        return daemon.vtpm("host", "anchor").stdout.decode() + daemon.log_text()
    finally:
        daemon.close()


def test_a_user_without_a_runtime_directory_has_none_in_tmp() -> None:
    script = "import os; os.geteuid = lambda: 4242; from vtpm.config import default_runtime_dir as d; print(d())"
    env = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")} | {"HOME": "/home/me"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "/home/me/.local/state/vtpm/run"


# ---- who is let in -------------------------------------------------------------------------------------------------------


@needs_root
def test_an_operator_of_the_group_speaks_to_the_daemon_of_another_user() -> None:
    """The daemon is `daemon`'s, in a directory that root gave that user; the operator is nobody, of the group `nogroup`."""
    with a_place(STRANGER) as home:
        python, env = as_nobody(home)
        with DaemonProcess(environment={"VTPM_SOCKET_GROUP": "nogroup"}) as daemon:
            daemon.root.chmod(0o755)
            env |= {"VTPM_RUNTIME_DIR": str(daemon.runtime_dir), "VTPM_STATE_DIR": str(daemon.state_dir)}
            script = "from vtpm.cli.main import main; import sys; sys.argv = ['vtpm', 'instance', 'list']; main()"
            done = subprocess.run([*python, "-c", script], env=env, cwd="/", capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "NAME" in done.stdout


@needs_root
def test_root_speaks_to_the_daemon_of_the_user_whom_it_gave_the_directory(tmp_path: Path) -> None:
    with a_place(NOBODY, mode=0o700) as home:
        python, env = as_nobody(home)
        env |= {"VTPM_RUNTIME_DIR": str(home / "run"), "VTPM_STATE_DIR": str(home / "state"), "VTPM_POOL_SIZE": "0"}
        daemon = DaemonProcess(root=home)
        daemon.process = subprocess.Popen([*python, str(ROOT / "server.py")], env=env, cwd="/", stderr=subprocess.PIPE)
        try:
            wait_for_socket(daemon, home / "run" / "operator.sock")
            daemon._hosts.add(json.loads(daemon.vtpm("host", "show", "-o", "json").stdout)["engine_host_pid"])
            daemon.vtpm("instance", "create", "web-1")
            assert b"web-1" in daemon.vtpm("instance", "list").stdout
        finally:
            daemon.close()


def wait_for_socket(daemon: DaemonProcess, path: Path) -> None:
    from tests.support.strangers import until

    def there() -> bool:
        assert daemon.process is not None
        assert daemon.process.poll() is None, daemon.process.stderr.read() if daemon.process.stderr else ""
        return path.exists()

    until(there, 30)


# ---- files of the commands -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """Give a daemon with an instance `strangers` that is ON."""
    daemon.running("strangers")
    yield daemon
    daemon.vtpm("instance", "stop", "strangers")
    daemon.vtpm("instance", "delete", "--yes", "strangers", check=False)


READ: dict[str, Callable[[str], list[str]]] = {
    "measure": lambda path: ["measure", "strangers", "16", path],
    "ca import": lambda path: ["ca", "import", "--cert", path],
    "a backup": lambda path: ["backup", "verify", path, "-i", path],
    "recipients": lambda path: ["backup", "create", "/nowhere/x.age", "-R", path],
    "import": lambda path: ["instance", "import", "--from-swtpm", str(Path(path).parent), "web-9"],
    "import's key": lambda path: ["instance", "export", "--to-swtpm", "/nowhere", "--key-file", path, "strangers"],
    "settings": lambda path: ["config", "check", "--config-file", path],
}


def named(what: str, root: Path) -> Path:
    return root / ("tpm2-00.permall" if what == "import" else "in put")


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a link"}))
def test_what_a_command_reads_is_a_file_and_nothing_is_waited_for(
    web: DaemonProcess, what: str, kind: str, tmp_path: Path, victim: Victim
) -> None:
    path = named(what, tmp_path)
    KINDS[kind](path, victim.path)
    done = web.vtpm(*READ[what](str(path)), check=False)
    assert done.returncode not in (0, -9)
    assert done.stderr.startswith(b"vtpm: ")
    assert b"Traceback" not in done.stderr
    assert victim.is_untouched()


@needs_root
@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("kind", ["a device", "a file without an end"])
def test_what_a_command_reads_has_an_end(web: DaemonProcess, what: str, kind: str, tmp_path: Path) -> None:
    path = named(what, tmp_path)
    if kind == "a device":
        a_device(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    done = web.vtpm(*READ[what](str(path)), check=False)
    assert done.returncode not in (0, -9)
    assert done.stderr.startswith(b"vtpm: ")
    assert b"Traceback" not in done.stderr


WRITTEN: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "quote": ("quote.msg", lambda root: ["quote", "strangers", "--out", root]),
    "eventlog": ("log", lambda root: ["eventlog", "get", "strangers", "--out", f"{root}/log"]),
    "ca show": ("root.pem", lambda root: ["ca", "show", "--out", root]),
    "ca crl": ("crl", lambda root: ["ca", "crl", "--out", f"{root}/crl"]),
    "cert": ("ak", lambda root: ["instance", "cert", "strangers", "--kind", "ak", "--out", f"{root}/ak"]),
}


@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("kind", ["a link", "a named pipe"])
def test_what_a_command_writes_is_a_new_file_and_nothing_else_is_written_to(
    web: DaemonProcess, what: str, kind: str, tmp_path: Path, victim: Victim
) -> None:
    name, command = WRITTEN[what]
    (tmp_path / "out put").mkdir()
    path = tmp_path / "out put" / name
    KINDS[kind](path, victim.path)
    before = os.lstat(path)
    done = web.vtpm(*command(str(path.parent)), check=False)
    assert done.returncode == 2, done.stderr
    assert b"FILE_UNWRITABLE" in done.stderr
    assert os.lstat(path).st_ino == before.st_ino
    assert victim.is_untouched()
    if kind == "a directory":
        path.rmdir()
    else:
        path.unlink()
    web.vtpm(*command(str(path.parent)))
    assert path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_goes_to_no_place_that_is_taken(web: DaemonProcess, kind: str, tmp_path: Path, victim: Victim) -> None:
    recipient = "age1966wtx0d74u0wlras70sutmm4cqc9dwc52afks25kzzlnvdkrvpqhwz6lr"
    KINDS[kind](tmp_path / "b.age", victim.path)
    done = web.vtpm("backup", "create", str(tmp_path / "b.age"), "-r", recipient, check=False)
    assert done.returncode != 0
    assert b"BACKUP_EXISTS" in done.stderr
    assert victim.is_untouched()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a directory"}))
def test_an_export_replaces_no_link(web: DaemonProcess, kind: str, tmp_path: Path, victim: Victim) -> None:
    web.create("strangers-off")
    (tmp_path / "swtpm").mkdir()
    path = tmp_path / "swtpm" / "tpm2-00.permall"
    KINDS[kind](path, victim.path)
    try:
        done = web.vtpm("instance", "export", "--to-swtpm", str(path.parent), "--force", "strangers-off", check=False)
        assert done.returncode != 0
        assert b"Traceback" not in done.stderr
        assert victim.is_untouched()
        path.unlink()
        web.vtpm("instance", "export", "--to-swtpm", str(path.parent), "strangers-off")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        web.vtpm("instance", "delete", "--yes", "strangers-off", check=False)
