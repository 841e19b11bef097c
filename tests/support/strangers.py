"""Another user of the host, what that user may lay in the way, and a server of that user's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

STRANGER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@contextlib.contextmanager
def a_place(owner: int | None = None, mode: int = 0o755) -> Iterator[Path]:
    """A directory of `owner` in one of ours, directly under /tmp, with a space in its path."""
    root = Path(tempfile.mkdtemp(prefix="vtpm s"))
    root.chmod(0o755)
    place = root / "a b"
    place.mkdir(mode)
    place.chmod(mode)
    if owner is not None:
        os.chown(place, owner, owner)
    try:
        yield place
    finally:
        shutil.rmtree(root, ignore_errors=True)


@dataclass(frozen=True)
class Listening:
    """A server that answers nothing and keeps what it is sent; `received` is that, None if nobody connected."""

    path: Path
    _pid: int
    _kept: Path

    def received(self) -> bytes | None:
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        return self._kept.read_bytes() if self._kept.exists() else None


@contextlib.contextmanager
def a_server(path: Path, uid: int, *, bound_by_root: bool = False) -> Iterator[Listening]:
    """A process of `uid` that listens on `path`; `bound_by_root`: the socket's file is root's all the same."""
    kept = Path(tempfile.mkdtemp(prefix="vtpm k"))
    kept.chmod(0o777)
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            if bound_by_root:
                listener.bind(str(path))
                path.chmod(0o777)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not bound_by_root:
                listener.bind(str(path))
                path.chmod(0o777)
            listener.listen(8)
            os.write(told, b"+")
            while True:
                connection, _ = listener.accept()
                with (kept / "bytes").open("ab", buffering=0) as file:
                    connection.settimeout(2)
                    with contextlib.suppress(OSError):
                        while part := connection.recv(4096):
                            file.write(part)
        os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"+"
    os.close(ready)
    try:
        yield Listening(path, pid, kept / "bytes")
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(kept, ignore_errors=True)


# ---- what may lie in a file's place --------------------------------------------------------------------------------------


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("made through a link"))


def _fifo(path: Path, _victim: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, _victim: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        # By a short name: that of the test's directory may be too long.
        here = os.open(path.parent, os.O_PATH)
        bound.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def _directory(path: Path, _victim: Path) -> None:
    path.mkdir()


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a link": _link,
    "a link to nothing": _dangling,
    "a named pipe": _fifo,
    "a socket": _socket,
    "a directory": _directory,
}


@dataclass(frozen=True)
class Victim:
    """A file that nobody may touch."""

    path: Path
    before: tuple[object, ...]

    @classmethod
    def of(cls, path: Path) -> Victim:
        path.write_bytes(b"nobody else's business\n")
        path.chmod(0o600)
        return cls(path, _looks(path))

    def is_untouched(self) -> bool:
        return _looks(self.path) == self.before and not self.path.with_name("made through a link").exists()


def _looks(path: Path) -> tuple[object, ...]:
    status = path.stat()
    return path.read_bytes(), status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_mtime_ns


def a_device(path: Path) -> Path:
    """A node like /dev/zero, but one that a test may lose; skips where there can be none."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        pytest.skip("no device can be opened in this directory")
    return path


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
