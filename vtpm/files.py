"""The one way to files and directories that somebody else may have had a hand in.

Rules for every path that is opened here:

- Only regular files. A named pipe, device or socket is refused without waiting for anybody. What comes through a pipe is taken
  only from a descriptor of this process (`/dev/fd/3`), as shells write `<(…)`: nobody else can put something there.
- A symbolic link on the way is followed only if root or this process's user made it. The last name is no link at all, unless
  `follow` says so: `follow` is for what the user of a command names to be read, with that user's own rights. State that lies in
  a directory (swtpm's files, key file, anchor) and everything that is written is never reached by a link.
- Directories are held by descriptors while they are passed through, so that nobody can swap one in between.
- `trusted` is for what this service relies on (state and runtime directory, key file, anchor, configuration, PIN): every
  directory on the way belongs to root or this process's user and nobody else may write to it; a sticky one such as /tmp may be
  written by others, as what is ours in it stays ours. Without `trusted` the directory may belong to somebody else, who can
  spoil that file and nothing beside it. `service` takes a third owner: whoever has a directory that root alone could make (the
  daemon's user and /run/vtpm); from there on that user's word counts, and this process's no more.
- What is written is a new file that takes the old one's place as one step, durably; an old one is never written into.

Whatever is wrong is an OSError whose `strerror` says so, so that every caller puts its own reason and remedy to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_MAX_LINKS: Final = 40
_OTHERS_WRITE: Final = 0o022
_STEP: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OWN_DESCRIPTOR: Final = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/(\d{1,9})")
_NO_FILE: Final = "it is no regular file"
_A_LINK: Final = "it is a symbolic link"


class UnsafePathError(OSError):
    """A directory, link or file is another user's, or can be changed by one.

    `reason` is OWNER, WRITABLE or LINK, `place` is which it is, `remedy` what to do.
    """

    def __init__(self, reason: str, message: str, place: str, remedy: str) -> None:
        super().__init__(errno.EPERM, f"{place} {message}", place)
        self.reason = reason
        self.place = place
        self.remedy = remedy


class Directory:
    """A directory that is held open; names in it are single names. `owners` are the users whose word counts there."""

    def __init__(self, fd: int, shown: str, owners: frozenset[int]) -> None:
        self.fd = fd
        self.shown = shown
        self.owners = owners

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    def path(self, name: str) -> str:
        """The name as it is shown to people."""
        return os.path.join(self.shown, name)  # noqa: PTH118  # for people, of a text

    def reach(self, name: str) -> str:
        """A path to the name through the descriptor, for calls that take no descriptor of a directory (bind, connect)."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def status(self, name: str) -> os.stat_result | None:
        """What the name stands for, no link followed; None if there is nothing."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """Open a regular file in it; return the descriptor."""
        try:
            fd = os.open(name, flags | _OPEN, mode, dir_fd=self.fd)
        except OSError as error:
            # A link; a pipe that nobody reads, or a socket.
            told = {errno.ELOOP: _A_LINK, errno.ENXIO: _NO_FILE}.get(error.errno or 0)
            raise OSError(error.errno, told or error.strerror, self.path(name)) from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, _NO_FILE, self.path(name))
        except BaseException:
            os.close(fd)
            if flags & os.O_EXCL:
                # It was made just now, and nobody gets it.
                self.unlink(name)
            raise
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """Return a regular file's content, of at most `limit` bytes."""
        return read_descriptor(self.open(name), limit, self.path(name))

    def put(
        self,
        name: str,
        write: Callable[[int], object],
        *,
        mode: int = 0o600,
        exact: bool = False,
        replaces: bool = True,
        temporary: str = "",
        before: Callable[[], object] | None = None,
    ) -> int:
        """Put a new file in the place of `name`, durably and as one step; return its open descriptor.

        `write` fills the descriptor of the new file. `exact`: the mode is set whatever the umask is. Without `replaces` there
        must be nothing (FileExistsError). `temporary` is its name until then, for places where a crash is to leave one such
        file at most and nobody else writes; `before` is called when all is written and the name is yet to change.
        """
        old = self.status(name)
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL if replaces else errno.EEXIST, f"{_NO_FILE}, and is left as it is", self.path(name))
        new = temporary or f".{name[:200]}.{os.urandom(8).hex()}"
        if temporary:
            self.unlink(new)
        fd = self.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            if exact:
                os.fchmod(fd, mode)
            write(fd)
            os.fsync(fd)
            if before is not None:
                before()
            if replaces:
                os.rename(new, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            else:
                # Unlike a rename a link does not replace what has come there meanwhile.
                os.link(new, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
                self.unlink(new)
            self.sync()
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self.unlink(new)
            raise
        return fd

    def give_socket(self, name: str, mode: int, *, uid: int = -1, gid: int = -1) -> int:
        """Set mode and owner of a socket that this process has just bound in it, and of nothing else.

        Returns a descriptor of the socket's file. It takes neither itself; its name in /proc stands for that very file.
        """
        fd = os.open(name, _STEP, dir_fd=self.fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
                raise OSError(errno.EPERM, "it is not the socket that was made here", self.path(name))
            if uid >= 0 or gid >= 0:
                os.chown(f"/proc/self/fd/{fd}", uid, gid)
            os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101  # by the descriptor's name
        except BaseException:
            os.close(fd)
            raise
        return fd

    def unlink(self, name: str) -> None:
        """Remove a name, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove(self, name: str, fd: int) -> None:
        """Remove a name that was made here, if it still stands for what `fd` is a descriptor of."""
        status = self.status(name)
        if status is not None and os.path.samestat(status, os.fstat(fd)):
            self.unlink(name)

    def sync(self) -> None:
        """Make its names durable."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---- the way to a name ---------------------------------------------------------------------------------------------------


def open_directory(path: Path, *, trusted: bool = False, service: bool = False, make: int | None = None) -> Directory:
    """Hold a directory; with `make` it is made with that mode if it is missing, and those above it."""
    return _walk(path, trusted=trusted, service=service, make=make, follow=True, whole=True)[0]


def parent_of(
    path: Path, *, follow: bool = False, trusted: bool = False, service: bool = False, make: int | None = None
) -> tuple[Directory, str]:
    """Hold the directory that `path` is in, or with `follow` the one that its links lead to; return it and the name there."""
    return _walk(path, trusted=trusted, service=service, make=make, follow=follow, whole=False)


def check_parents(path: Path, *, service: bool = False) -> None:
    """Raise UnsafePathError if somebody else could put another thing at `path`. Nothing need be there.

    Above what is missing the directories are looked at: those that are yet to be made will be ours.
    """
    try:
        parent_of(path, follow=True, trusted=True, service=service)[0].close()
    except FileNotFoundError:
        if path.parent != path:
            check_parents(path.parent, service=service)


def _walk(path: Path, *, trusted: bool, service: bool, make: int | None, follow: bool, whole: bool) -> tuple[Directory, str]:
    names = deque((path if path.is_absolute() else Path.cwd() / path).parts[1:])
    here = Directory(os.open("/", _STEP | os.O_DIRECTORY), "/", frozenset((0, os.geteuid())))
    links = 0
    try:
        while names:
            status = os.fstat(here.fd)
            if trusted:
                _check_writers(status, here.shown)
            name, last = names.popleft(), not names
            found = here.status(name)
            if found is None and make is not None and (whole or not last):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, make, dir_fd=here.fd)
                found = here.status(name)
            if found is not None and stat.S_ISLNK(found.st_mode):
                if last and not follow:
                    raise OSError(errno.ELOOP, _A_LINK, here.path(name))
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, "too many symbolic links", str(path))
                target = _target(here, name)
                names.extendleft(reversed(Path(target).parts[1:] if target.startswith("/") else Path(target).parts))
                if target.startswith("/"):
                    here = _step(here, "/", trusted=False, roots=False)
                continue
            if last and not whole:
                return here, name
            roots = service and status.st_uid == 0 and not status.st_mode & _OTHERS_WRITE
            before = here.owners
            here = _step(here, name, trusted=trusted, roots=roots)
            service = service and here.owners == before
        if not whole:
            raise OSError(errno.EISDIR, _NO_FILE, str(path))
        if trusted:
            _check_writers(os.fstat(here.fd), here.shown)
    except BaseException:
        here.close()
        raise
    return here, ""


def _target(here: Directory, name: str) -> str:
    link = os.open(name, _STEP, dir_fd=here.fd)
    try:
        owner = os.fstat(link).st_uid
        if owner not in here.owners:
            raise UnsafePathError(
                "LINK", f"is a symbolic link of uid {owner}", here.path(name), "name the place that is meant, without that link"
            )
        # An empty name reads the link that the descriptor is of, even if another has taken its name.
        return os.readlink("", dir_fd=link)
    finally:
        os.close(link)


def _step(here: Directory, name: str, *, trusted: bool, roots: bool) -> Directory:
    """Go on to a directory, whose owner counts if root alone could make it (`roots`); `here` is closed if that succeeds."""
    fd = os.open(name, _STEP | os.O_DIRECTORY, dir_fd=here.fd)
    shown, owners = here.path(name), here.owners
    if trusted and (owner := os.fstat(fd).st_uid) not in owners:
        if not roots:
            os.close(fd)
            raise UnsafePathError(
                "OWNER", f"belongs to uid {owner}", shown, "use a directory that root or you alone can change"
            )
        owners = frozenset((0, owner))
    here.close()
    return Directory(fd, shown, owners)


def _check_writers(status: os.stat_result, shown: str) -> None:
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        raise UnsafePathError("WRITABLE", "can be written by others", shown, f"chmod go-w '{shown}', or use another directory")


# ---- files by their paths ------------------------------------------------------------------------------------------------


def open_file(
    path: Path,
    flags: int = os.O_RDONLY,
    mode: int = 0o600,
    *,
    follow: bool = False,
    trusted: bool = False,
    owned: bool = False,
) -> int:
    """Open a regular file; return its descriptor. `owned`: it belongs to root or to us, and nobody else may write to it."""
    directory, name = parent_of(path, follow=follow, trusted=trusted)
    with directory:
        fd = directory.open(name, flags, mode)
        if owned:
            try:
                _check_owner(os.fstat(fd), directory.path(name), directory.owners)
            except BaseException:
                os.close(fd)
                raise
        return fd


def _check_owner(status: os.stat_result, shown: str, owners: frozenset[int]) -> None:
    if status.st_uid not in owners:
        raise UnsafePathError("OWNER", f"belongs to uid {status.st_uid}", shown, f"chown {os.geteuid()} '{shown}'")
    _check_writers(status, shown)


def read(path: Path, limit: int, *, follow: bool = False, trusted: bool = False, owned: bool = False) -> bytes:
    """Return a file's content, of at most `limit` bytes (EFBIG). With `follow` also from a descriptor of ours (`/dev/fd/3`)."""
    if follow and (own := _OWN_DESCRIPTOR.fullmatch(str(path))):
        return read_descriptor(os.dup(int(own[1] or 0)), limit, str(path))
    return read_descriptor(open_file(path, follow=follow, trusted=trusted, owned=owned), limit, str(path))


def read_descriptor(fd: int, limit: int, shown: str) -> bytes:
    """Return what a descriptor gives, of at most `limit` bytes, and close it."""
    with open(fd, "rb") as file:  # by descriptor: what was checked is what is read
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", shown)
    return data


def replace(
    path: Path,
    data: bytes,
    *,
    mode: int = 0o600,
    trusted: bool = False,
    replaces: bool = True,
    temporary: str = "",
    make: int | None = None,
    before: Callable[[], object] | None = None,
) -> None:
    """Write a whole file; see Directory.put."""
    directory, name = parent_of(path, trusted=trusted, make=make)
    with directory:
        fill = lambda fd: write_all(fd, data)  # noqa: E731
        os.close(directory.put(name, fill, mode=mode, replaces=replaces, temporary=temporary, before=before))


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory, 0700, in a parent where nobody else can put another in its place; it goes with what is in it.

    Raises:
        UnsafePathError: somebody else can.
    """
    import tempfile

    open_directory(parent, trusted=True).close()
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        yield Path(name)
