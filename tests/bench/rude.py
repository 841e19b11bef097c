"""Guests that do their worst on their guest sockets, without a pause; each kind is a process of its own with many of them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tests.support import http2
from tests.support.daemon import ROOT

_CONNECTIONS = 8
_STREAMS = 32
_PAUSE_S = 0.001
_LARGE = 4 << 20
_MEASURED = 1 << 20


def _connect(path: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
        sock.send(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
    except OSError:
        sock.close()
        return None
    return sock


class _Peer:
    """One connection, made anew whenever the daemon ends it; `say` gives what is sent next, empty for nothing now."""

    def __init__(self, path: str, say: Callable[[http2.Windows], Iterator[bytes]]) -> None:
        self._path = path
        self._say = say
        self._sock: socket.socket | None = None
        self._words: Iterator[bytes] = iter(())
        self._left = b""
        self._windows = http2.Windows()

    def go_on(self) -> bool:
        """Do the next thing; return whether anything could be done."""
        if self._sock is None:
            self._sock = _connect(self._path)
            self._windows = http2.Windows()
            self._words, self._left = self._say(self._windows), b""
            return self._sock is not None
        try:
            with contextlib.suppress(BlockingIOError):
                if not (data := self._sock.recv(1 << 16)):
                    raise ConnectionResetError
                said = self._windows.heard(data)
                if said and not self._left:
                    self._left = said
            if not self._left:
                self._left = next(self._words, b"")
            if not self._left:
                return False
            self._left = self._left[self._sock.send(self._left) :]
        except BlockingIOError:
            return False
        except OSError:
            self._sock.close()
            self._sock = None
        return True


def _silent(_windows: http2.Windows) -> Iterator[bytes]:
    """As many streams as there can be, on which nothing comes."""
    for stream in range(1, 2 * _STREAMS, 2):
        yield http2.call(stream, http2.EXECUTE_STREAM)


def _large(_windows: http2.Windows) -> Iterator[bytes]:
    """One message after the other that is larger than any may be."""
    for stream in itertools.count(1, 2):
        yield http2.call(stream, http2.MEASURE) + http2.frame(http2.DATA, 0, stream, http2.prefix(_LARGE))
        for _ in range(_LARGE // 16384):
            yield http2.frame(http2.DATA, 0, stream, bytes(16384))


def _slow(windows: http2.Windows) -> Iterator[bytes]:
    """Messages that have all but their last byte, on every stream, as fast as the server takes them."""
    for stream in range(1, 2 * _STREAMS, 2):
        yield http2.call(stream, http2.MEASURE)
        message = http2.prefix(_MEASURED) + bytes(_MEASURED - 1)
        while message:
            size = windows.take(stream, len(message))
            yield http2.frame(http2.DATA, 0, stream, message[:size]) if size else b""
            message = message[size:]


def _calls(_windows: http2.Windows) -> Iterator[bytes]:
    """Call after call, each of which is answered or refused."""
    for stream in itertools.count(1, 2):
        yield http2.call(stream, http2.READ_PCRS) + http2.message(stream, b"")


def _resets(_windows: http2.Windows) -> Iterator[bytes]:
    """Calls that are given up as soon as they are made."""
    for stream in itertools.count(1, 2):
        yield http2.call(stream, http2.READ_PCRS) + http2.frame(http2.RST_STREAM, 0, stream, (8).to_bytes(4, "big"))


_KINDS: dict[str, Callable[[http2.Windows], Iterator[bytes]]] = {
    "silent": _silent,
    "large": _large,
    "slow": _slow,
    "calls": _calls,
    "resets": _resets,
}
KINDS = (*_KINDS, "connections")


def _connect_without_end(paths: Sequence[str]) -> None:
    """Connections on which nothing is said; they are held until the daemon ends them."""
    held: list[socket.socket] = []
    for path in itertools.cycle(paths):
        if (sock := _connect(path)) is not None:
            held.append(sock)
        if len(held) > 1000:
            for old in held[:500]:
                old.close()
            del held[:500]


@contextlib.contextmanager
def rude(kind: str, paths: Sequence[str]) -> Iterator[None]:
    """Have another process do this at all of `paths`."""
    words = [sys.executable, "-m", "tests.bench.rude", kind, *paths]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the rude guests have ended by themselves: {kind}")
        finally:
            process.kill()


def main(kind: str, paths: Sequence[str]) -> None:
    """Do it until killed."""
    sys.stdout.write("at it\n")
    sys.stdout.flush()
    if kind == "connections":
        _connect_without_end(paths)
    peers = [_Peer(path, _KINDS[kind]) for path in paths for _ in range(_CONNECTIONS)]
    while True:
        busy = False
        for peer in peers:
            busy |= peer.go_on()
        if not busy:
            time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
