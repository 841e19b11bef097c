"""The process of a drop-in replacement: its log, its user, its life as a daemon, its PID file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from pathlib import Path
from typing import Final, TextIO

from vtpm import files
from vtpm.cli.dropin_fields import refused
from vtpm.cli.dropin_options import Options
from vtpm.errors import InvalidArgumentError
from vtpm.files import Directory

NAME: Final = "swtpm"


class Log:
    """Lines in swtpm's log file, or on standard error."""

    def __init__(self, options: Options, *, quiet: bool) -> None:
        fields = options.log
        self._prefix = fields.get("prefix", "")
        self.fd = 2
        if fields.get("file") == "-" or (quiet and not {"file", "fd"} & fields.keys()):
            self.fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        elif "file" in fields:
            self.fd = open_log(fields["file"], truncate="truncate" in fields)
        elif "fd" in fields:
            self.fd = int(fields["fd"])
            try:
                os.fstat(self.fd)
            except OSError:
                raise refused(f"Error parsing logging options: bad file descriptor '{fields['fd']}'") from None
        if int(fields.get("level", "1")) >= 5:
            self.line("level: what libtpms and the channels do is not logged; only events are")

    def line(self, text: str) -> None:
        """Write a line."""
        with contextlib.suppress(OSError):
            os.write(self.fd, f"{self._prefix}{NAME}: {text}\n".encode(errors="replace"))


def open_log(path: str, *, truncate: bool = False) -> int:
    """Return a descriptor that lines are appended to: of a file that nobody else has another name for, or of the null device.

    Raises:
        InvalidArgumentError: USAGE.
    """
    if path == os.devnull:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        fd = files.open_file(Path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        if os.fstat(fd).st_nlink > 1:
            os.close(fd)
            raise OSError(errno.EMLINK, "it has other names, and may be another file", path)
        if truncate:
            os.ftruncate(fd, 0)
    except OSError as error:
        raise refused(f"Could not open logfile {path}: {error.strerror}") from None
    return fd


def daemonize() -> TextIO:
    """Go on in a daemon; the process that was called ends once the TPM can be used, or says why it can't."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    if os.fork():
        os.close(writer)
        with open(reader, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123  # a descriptor
            word = stream.read()
        if word != "\n":
            sys.stderr.write(f"{NAME}: {word or 'the TPM could not be started'}\n")
            sys.stderr.flush()
        os._exit(0 if word == "\n" else 1)
    os.close(reader)
    os.setsid()
    return open(writer, "w", encoding="utf-8")  # noqa: PTH123  # a descriptor, closed by who is ready


def detach(ready: TextIO) -> None:
    """Let go of the caller's terminal and directory, and tell it that the TPM can be used."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    ready.write("\n")
    ready.close()


def run_as(user: str) -> None:
    """Become `user`, a name or a number, with its groups."""
    import pwd

    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        raise refused(f"User '{user}' does not exist.") from None
    try:
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except OSError as error:
        raise refused(f"Could not become user '{user}': {error.strerror}") from None


class PidFile:
    """Where the PID is asked for: looked for at the start, written when the TPM can be used, removed at the end.

    Raises:
        InvalidArgumentError: USAGE.
    """

    def __init__(self, options: Options) -> None:
        self._fd = options.pid_fd
        self._place: tuple[Directory, str] | None = None
        try:
            if options.pid_file:
                self._place = files.parent_of(Path(options.pid_file))
            if self._fd >= 0 and not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, f"descriptor {self._fd} is of no regular file")
        except OSError as error:
            raise _pid_refused(error) from None
        self._written = -1

    def write(self) -> None:
        """Write it, in the place of an older one."""
        text = str(os.getpid()).encode()
        try:
            if self._place is not None:
                directory, name = self._place
                os.close(directory.put(name, lambda fd: self._fill(fd, text), mode=0o640))
            if self._fd >= 0:
                files.write_all(self._fd, text)
                os.close(self._fd)
        except OSError as error:
            self.remove()
            raise _pid_refused(error) from None

    def _fill(self, fd: int, text: bytes) -> None:
        files.write_all(fd, text)
        # Known from now on, also if the last step to make it durable fails.
        self._written = os.dup(fd)

    def remove(self) -> None:
        """Remove it, if it is still the one that was written."""
        if self._written >= 0 and self._place is not None:
            directory, name = self._place
            with contextlib.suppress(OSError):
                directory.remove(name, self._written)
            self._written = -1


def _pid_refused(error: OSError) -> InvalidArgumentError:
    return refused(f"Could not write the PID file: {error.strerror}", "give --pid a file that can be written")
