"""What lies in the place of the drop-in's files: links, pipes, sockets, devices, files without an end."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_dropin import KEY, OURS, PERMALL, READY, VOLATILE, running
from tests.support.strangers import KINDS, STRANGER, Victim, a_device, a_place, needs_root, until

SETUP = [sys.executable, "-m", "vtpm.cli.dropin_setup"]
SOCKET = [sys.executable, "-m", "vtpm.cli.dropin", "socket", "--tpm2"]
CHARDEV = [sys.executable, "-m", "vtpm.cli.dropin", "chardev", "--tpm2", "--tpmstate"]
# Long enough for a busy machine; what hangs hangs for ever.
TIMEOUT_S = 30


def state_in(root: Path) -> Path:
    state = root / "state of it"
    state.mkdir(exist_ok=True)
    return state


def serve(root: Path, *arguments: str, state: str = "") -> list[str]:
    place = state or f"dir={state_in(root)}"
    return [*SOCKET, "--tpmstate", place, "--ctrl", f"type=unixio,path={root / 'ctrl'}", *READY, *arguments]


def setup(root: Path, *arguments: str, state: str = "") -> list[str]:
    return [*SETUP, "--tpm2", "--tpmstate", state or str(state_in(root)), *arguments]


# What is named in a command line → the name of the file in question, and the command.
PLACES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "the lock": ("state of it/.lock", serve),
    "the state": (f"state of it/{PERMALL}", serve),
    "the suspended state": (f"state of it/{VOLATILE}", lambda root: serve(root, "--flags", "startup-state")),
    "the PID": ("pid", lambda root: serve(root, "--pid", f"file={root / 'pid'}")),
    "the log": ("log", lambda root: serve(root, "--log", f"file={root / 'log'}")),
    "the log, cut": ("log", lambda root: serve(root, "--log", f"file={root / 'log'},truncate")),
    "the key": ("key", lambda root: serve(root, "--key", f"file={root / 'key'},format=hex")),
    "the password": ("key", lambda root: serve(root, "--key", f"pwdfile={root / 'key'}")),
    "the migration key": ("key", lambda root: serve(root, "--migration-key", f"file={root / 'key'}")),
    "the states in one": ("one", lambda root: serve(root, state=f"backend-uri=file://{root / 'one'}")),
    "a device": ("dev", lambda root: [*CHARDEV, f"dir={state_in(root)}", "-c", str(root / "dev")]),
    "setup's lock": ("state of it/.lock", setup),
    "setup's log": ("log", lambda root: setup(root, "--logfile", str(root / "log"))),
    "setup's key": ("key", lambda root: setup(root, "--keyfile", str(root / "key"))),
    "setup's configuration": ("conf", lambda root: setup(root, "--config", str(root / "conf"))),
    "setup's states in one": ("one", lambda root: setup(root, state=f"file://{root / 'one'}")),
}
# A link that the caller made is followed to what is only read, as the caller could read that as well.
READ_BY_LINK = ("the key", "the password", "the migration key", "setup's key", "setup's configuration")
NOT_READ = {"the lock", "the PID", "the log", "the log, cut", "setup's lock", "setup's log"}
MADE_BY_LINK = ("the states in one", "setup's states in one")


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim.of(tmp_path / "victim")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_in_a_sentence_and_nothing_is_touched(place: str, kind: str, tmp_path: Path, victim: Victim) -> None:
    if (kind == "a link to nothing" and place in MADE_BY_LINK) or (kind == "a link" and place in READ_BY_LINK):
        pytest.skip("the caller's own link")
    name, command = PLACES[place]
    arguments = command(tmp_path)
    state_in(tmp_path)
    KINDS[kind](tmp_path / name, victim.path)
    before = os.lstat(tmp_path / name)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    after = os.lstat(tmp_path / name)
    assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
    assert victim.is_untouched()
    assert not (tmp_path / "ctrl").exists()


@pytest.mark.parametrize("place", sorted(PLACES.keys() - NOT_READ))
def test_a_file_without_an_end_is_not_read_whole(place: str, tmp_path: Path) -> None:
    name, command = PLACES[place]
    arguments = command(tmp_path)
    state_in(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.write(b"x")
        file.truncate(1 << 40)
    # Were it read whole, this would be too little.
    limited = ["prlimit", f"--data={512 << 20}", *arguments]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Memory" not in done.stderr
    assert (tmp_path / name).stat().st_size == 1 << 40


@needs_root
@pytest.mark.parametrize("place", [*PLACES, "the socket"])
def test_a_device_is_left_as_it_is(place: str, tmp_path: Path) -> None:
    if place == "a device":
        pytest.skip("there it belongs")
    name, command = PLACES.get(place, ("ctrl", serve))
    arguments = command(tmp_path)
    state_in(tmp_path)
    device = a_device(tmp_path / name)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert device.is_char_device()


def test_the_log_may_be_the_null_device(tmp_path: Path) -> None:
    with running(OURS, tmp_path / "s", "--log", "file=/dev/null") as tpm:
        tpm.shut_down()
    assert Path("/dev/null").is_char_device()


def test_a_log_with_another_name_is_not_cut(tmp_path: Path, victim: Victim) -> None:
    (tmp_path / "log").hardlink_to(victim.path)
    command = serve(tmp_path, "--log", f"file={tmp_path / 'log'},truncate")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1
    assert "other names" in done.stderr
    assert victim.is_untouched()


def test_a_pid_file_with_another_name_is_replaced_not_written_into(tmp_path: Path, victim: Victim) -> None:
    (tmp_path / "pid").hardlink_to(victim.path)
    with running(OURS, tmp_path / "s", "--pid", f"file={tmp_path / 'pid'}") as tpm:
        until(lambda: (tmp_path / "pid").read_text() == str(tpm.process.pid))
        tpm.shut_down()
    assert not (tmp_path / "pid").exists()
    assert victim.is_untouched()


@needs_root
def test_mode_and_owner_are_the_sockets_and_nobody_elses(tmp_path: Path, victim: Victim) -> None:
    with a_place(STRANGER) as place:
        paths = [place / name for name in ("ctrl", "data")]
        for path in paths:
            path.symlink_to(victim.path)
        options = [f"type=unixio,path={path},mode=0666,uid={STRANGER},gid={STRANGER}" for path in paths]
        command = [*SOCKET, "--tpmstate", f"dir={state_in(tmp_path)}", "--ctrl", options[0], "--server", options[1], *READY]
        with subprocess.Popen(command) as process:
            for path in paths:
                until(lambda path=path: stat.S_ISSOCK(path.lstat().st_mode))  # type: ignore[misc]
                status = path.lstat()
                assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o666, STRANGER, STRANGER)
            # Once it answers it serves, and ends in order.
            with socket.socket(socket.AF_UNIX) as control:
                control.settimeout(TIMEOUT_S)
                control.connect(str(paths[0]))
                control.sendall((1).to_bytes(4, "big"))
                assert control.recv(8)
            process.terminate()
            assert process.wait(10) == 0
        assert not any(os.path.lexists(path) for path in paths)
    assert victim.is_untouched()


@needs_root
@pytest.mark.parametrize("name", ["tpmstate", "ctrl", "pid", "log", "key"])
def test_root_does_not_go_by_a_strangers_link(name: str, tmp_path: Path, victim: Victim) -> None:
    """The directory on the way is a stranger's link, to one of root's."""
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "key").write_text(KEY)
    with a_place(STRANGER) as place:
        link = place / "link"
        link.symlink_to(tmp_path / "roots")
        os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
        where = {
            "tpmstate": f"dir={link}",
            "ctrl": f"type=unixio,path={link / 'ctrl'}",
            "pid": f"file={link / 'pid'}",
            "log": f"file={link / 'log'}",
            "key": f"file={link / 'key'}",
        }
        command = [*serve(tmp_path), f"--{name}", where[name]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1
    assert "symbolic link of uid 65534" in done.stderr
    assert [item.name for item in (tmp_path / "roots").iterdir()] == ["key"]
    assert victim.is_untouched()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a directory"}))
def test_certificates_are_not_written_through_what_lies_there(kind: str, tmp_path: Path, victim: Victim) -> None:
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\nwhile [ "$1" != --dir ]; do shift; done\necho certificate > "$2/ek.cert"\n')
    tool.chmod(0o755)
    (tmp_path / "conf").write_text(f"create_certs_tool = {tool}\n")
    KINDS[kind](tmp_path / "ek-rsa2048.crt", victim.path)
    before = os.lstat(tmp_path / "ek-rsa2048.crt").st_ino
    command = setup(tmp_path, "--config", str(tmp_path / "conf"), "--create-ek-cert", "--write-ek-cert-files", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1
    assert "Could not write" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.lstat(tmp_path / "ek-rsa2048.crt").st_ino == before
    assert victim.is_untouched()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a directory"}))
def test_what_lies_in_the_place_of_the_file_that_is_to_become_the_state(kind: str, tmp_path: Path, victim: Victim) -> None:
    KINDS[kind](state_in(tmp_path) / f"TMP-{PERMALL}", victim.path)
    done = subprocess.run(setup(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert (state_in(tmp_path) / PERMALL).is_file()
    assert not (state_in(tmp_path) / PERMALL).is_symlink()
    assert victim.is_untouched()


def test_a_key_may_come_by_a_link_of_ones_own_and_by_a_pipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "real key").write_text(KEY)
    (tmp_path / "key").symlink_to("real key")
    with running(OURS, tmp_path / "a", "--key", f"file={tmp_path / 'key'},format=hex") as tpm:
        tpm.shut_down()
    reader, writer = os.pipe()
    os.write(writer, KEY.encode())
    os.close(writer)
    with running(OURS, tmp_path / "b", "--key", f"file=/dev/fd/{reader},format=hex", pass_fds=[reader]) as tpm:
        tpm.shut_down()
    os.close(reader)
