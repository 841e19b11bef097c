"""What workers say: each has a pipe for its standard output and error, which the process that forked it reads.

A worker has no log file that it could overwrite or fill. Its pipe does not block: when nobody reads, or too slowly, what the
worker says is lost, and the worker goes on. What is read is bounded in lines and bytes for each worker, and is text of one line
each, so that no worker can write another's words, or talk to a terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from time import monotonic
from typing import Final

# Of a pipe. A write of up to this size is there whole, or not at all (PIPE_BUF).
_PIPE_SIZE: Final = 4096
_MAX_LINE_SIZE: Final = 512
# Of one worker in a window.
_MAX_LINES: Final = 100
_MAX_BYTES: Final = 16 << 10
# The same, with what is cut off its lines: a line need not end.
_MAX_READ: Final = 64 << 10
_WINDOW_S: Final = 3600.0
# Until the pipe of one that says too much is looked at again.
_PAUSE_S: Final = 1.0


def make_pipe() -> tuple[int, int]:
    """Return the end that is read and the end that a worker has; neither blocks, as flags belong to the open file itself.

    Raises:
        OSError: there are too many descriptors.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.suppress(OSError):
        # So that the pipes of many workers stay below what the kernel gives a user (pipe(7), pipe-user-pages-soft).
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return read_end, write_end


def speak_into(write_end: int) -> None:
    """Have this process write its standard output and error to the pipe."""
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)


def printable(data: bytes) -> str:
    """Return one line as ASCII text, with everything else escaped."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)


class WorkerOutput:
    """What comes out of one pipe: `say` is given its lines. `name` says whose they are, empty if that has no name any more."""

    def __init__(self, fd: int, name: Callable[[], str], say: Callable[[str], None]) -> None:
        self.fd = fd
        self._name = name
        self._say = say
        self._named = ""
        self._line = bytearray()
        self._cut = False
        self._window_end = 0.0
        self._lines = 0
        self._bytes = 0
        self._read = 0
        self._withheld = 0

    def read(self, now: float) -> tuple[bool, bool]:
        """Take what is there; return whether more may come, and whether it is within the limits."""
        try:
            data = os.read(self.fd, _PIPE_SIZE)
        except BlockingIOError:
            return True, True
        except OSError:
            data = b""
        if now >= self._window_end:
            self._tell_withheld()
            self._window_end, self._lines, self._bytes, self._read = now + _WINDOW_S, 0, 0, 0
        self._read += len(data)
        *complete, rest = data.split(b"\n")
        for part in complete:
            self._extend(part)
            self._end_line()
        self._extend(rest)
        return bool(data), not self._withheld and self._read <= _MAX_READ

    def end(self) -> None:
        """Take what is left of one that has ended, and close the pipe."""
        # Twice its size: another process that has the other end may go on writing, and is not waited for.
        for _ in range(2):
            more, _ = self.read(monotonic())
            if not more:
                break
        if self._line:
            self._end_line()
        self._tell_withheld()
        os.close(self.fd)

    def _extend(self, part: bytes) -> None:
        room = _MAX_LINE_SIZE - len(self._line)
        self._line += part[:room]
        self._cut = self._cut or len(part) > room

    def _end_line(self) -> None:
        self._lines += 1
        self._bytes += len(self._line)
        if self._lines > _MAX_LINES or self._bytes > _MAX_BYTES:
            self._withheld += 1
        else:
            self._say(f"{self._who()}: {printable(bytes(self._line))}{' (cut)' if self._cut else ''}")
        self._line.clear()
        self._cut = False

    def _tell_withheld(self) -> None:
        if self._withheld:
            self._say(f"{self._who()}: {self._withheld} more lines withheld, and what it said when its pipe was full")
            self._withheld = 0

    def _who(self) -> str:
        self._named = self._name() or self._named
        return self._named or "a spare worker"


class WorkerLogs:
    """The pipes of all workers, in the loop of the process that forks them: `watch` and `unwatch` are that loop's."""

    def __init__(
        self, say: Callable[[str], None], watch: Callable[[int, Callable[[], None]], None], unwatch: Callable[[int], None]
    ) -> None:
        self._say = say
        self._watch = watch
        self._unwatch = unwatch
        self._outputs: dict[int, WorkerOutput] = {}
        # Not looked at until then: a worker that floods its pipe waits for nobody, and takes nobody's time.
        self._paused: dict[int, float] = {}

    def listen(self, fd: int, name: Callable[[], str]) -> None:
        """Read a pipe from now on; it is this object's."""
        self._outputs[fd] = WorkerOutput(fd, name, self._say)
        self._watch(fd, lambda: self._on_readable(fd))

    def _on_readable(self, fd: int) -> None:
        more, modest = self._outputs[fd].read(monotonic())
        if not more:
            # Nobody has the other end; `end` follows.
            self._unwatch(fd)
        elif not modest:
            self._unwatch(fd)
            self._paused[fd] = monotonic() + _PAUSE_S

    def end(self, fd: int) -> None:
        """The worker has ended: take its last words."""
        output = self._outputs.pop(fd, None)
        if output is not None:
            self._paused.pop(fd, None)
            self._unwatch(fd)
            output.end()

    @property
    def pause_s(self) -> float:
        """How long the loop may wait for events: until a paused pipe is due, -1 if there is none."""
        return max(0.0, min(self._paused.values()) - monotonic()) if self._paused else -1

    def resume(self) -> None:
        """Look again at the pipes whose pause is over."""
        if self._paused:
            now = monotonic()
            for fd in [fd for fd, due in self._paused.items() if due <= now]:
                del self._paused[fd]
                self._watch(fd, lambda fd=fd: self._on_readable(fd))  # type: ignore[misc]
