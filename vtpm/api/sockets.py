"""Unix sockets of gRPC servers, never open to more than they should be, not for an instant."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path
from typing import Final
from urllib.parse import quote

import grpc.aio

from vtpm import files
from vtpm.errors import ConfigError, UnavailableError

_UMASK_OWNER_ONLY: Final = 0o177


async def serve_on(server: grpc.aio.Server, path: Path, group: int | None = None) -> None:
    """Start `server` on the unix socket `path`: 0600, or 0660 with the group id `group`. An old socket is replaced.

    The socket is bound under a name that nobody looks for and gets its own name when all is ready. So `path` is either
    absent, or an old socket, or this server; and gRPC, which removes the name that it bound when a server ends, can't
    remove a successor's.

    Raises:
        ConfigError: SOCKET_PATH_TAKEN, there is something else than a socket.
        UnavailableError: SOCKET_FAILED.
    """
    bound = path.with_name(f".{path.name[:3]}")
    try:
        _bind(server, path, bound, group)
        await server.start()
        bound.rename(path)
    except (OSError, RuntimeError) as error:
        raise _failed(error, path) from error


async def serve_within(server: grpc.aio.Server, path: Path) -> None:
    """Start `server` on the unix socket `path`, 0600, which only this process connects to and nobody had before.

    Raises:
        UnavailableError: SOCKET_FAILED.
    """
    try:
        _bind(server, path, path, None)
        await server.start()
    except (OSError, RuntimeError) as error:
        raise _failed(error, path) from error


def _failed(error: Exception, path: Path) -> UnavailableError:
    # gRPC's own text says no more than that it failed.
    why = error.strerror if isinstance(error, OSError) else "it can't be bound"
    return UnavailableError(
        "SOCKET_FAILED",
        f"the server can't listen: {why}",
        subject=str(path),
        remedy="check the directory's owner, mode and free space, and the limit of open files",
    )


def _bind(server: grpc.aio.Server, path: Path, bound: Path, group: int | None) -> None:
    if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(
            "SOCKET_PATH_TAKEN", "there is something else than a socket", subject=str(path), remedy="move it away"
        )
    bound.unlink(missing_ok=True)
    previous = os.umask(_UMASK_OWNER_ONLY)
    try:
        server.add_insecure_port(f"unix:{quote(str(bound))}")
    finally:
        os.umask(previous)
    if group is not None:
        with files.open_directory(bound.parent, trusted=True) as directory:
            os.close(directory.give_socket(bound.name, 0o660, gid=group))


def group_id(name: str) -> int | None:
    """Return the id of the group that may use the operators' socket; None for the empty name.

    Raises:
        ConfigError: SOCKET_GROUP_UNKNOWN.
    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            "SOCKET_GROUP_UNKNOWN", f"there is no group {name!r}", subject="socket_group", remedy=f"groupadd --system {name}"
        ) from None


def admit_group(directory: Path, group: int) -> None:
    """Let the members of `group` pass through `directory`, not list it; for others it stays as it is.

    Raises:
        ConfigError: SOCKET_GROUP_REFUSED.
    """
    try:
        with files.open_directory(directory, trusted=True) as held:
            place = f"/proc/self/fd/{held.fd}"
            status = os.fstat(held.fd)
            if status.st_mode & stat.S_IXOTH or (status.st_gid == group and status.st_mode & stat.S_IXGRP):
                return
            os.chown(place, -1, group)
            os.chmod(place, stat.S_IMODE(status.st_mode) & 0o707 | stat.S_IXGRP)  # noqa: PTH101, S103  # by the descriptor's name
    except OSError as error:
        raise ConfigError(
            "SOCKET_GROUP_REFUSED",
            f"the directory can't be opened to the group: {error.strerror}",
            subject=str(directory),
            remedy="run as a member of socket_group, or as root",
        ) from error
