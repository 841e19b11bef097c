"""Where a drop-in listens: the options `--server`, `--ctrl`, `--fd` and `--port`, checked before anything is opened or made."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vtpm.cli.dropin_fields import Kind, any_number, parse_fields, refused

_ADDRESS: Final = {
    "type": Kind.TEXT,
    "path": Kind.TEXT,
    "port": Kind.NUMBER,
    "bindaddr": Kind.TEXT,
    "ifname": Kind.TEXT,
    "fd": Kind.NUMBER,
    "mode": Kind.MODE,
    "uid": Kind.USER,
    "gid": Kind.GROUP,
}
_SERVER: Final = _ADDRESS | {"disconnect": Kind.FLAG}
# `terminate` is of swtpm 0.8 and later.
_CONTROL: Final = _ADDRESS | {"clientfd": Kind.NUMBER, "terminate": Kind.FLAG}
_MAX_PORT: Final = (1 << 16) - 1
# Of sun_path (unix(7)), without the 0 at its end.
_MAX_PATH: Final = 107


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, or a socket that is there already: `fd` and `client_fd`."""

    path: str = ""
    host: str = "127.0.0.1"
    port: int = -1
    fd: int = -1
    client_fd: int = -1
    mode: int = 0o770
    uid: int = -1
    gid: int = -1
    # Of `fd`: clients connect to it. Otherwise it is connected to the only one there will be.
    listening: bool = False
    disconnect: bool = False
    terminate: bool = False


def server(given: Mapping[str, str]) -> Address | None:
    """Return where the data channel is, out of the options `--server`, `--fd` and `--port`; None without any.

    Raises:
        InvalidArgumentError: USAGE.
    """
    # All that is given must be right, also what another option outdoes.
    port = any_number("socket port number", given["--port"], _MAX_PORT) if "--port" in given else -1
    fd = any_number("socket file descriptor", given["--fd"]) if "--fd" in given else -1
    if "--server" in given:
        return _address("server", parse_fields("server", given["--server"], _SERVER))
    if fd >= 0:
        return _address("server", {"fd": str(fd)})
    if port >= 0:
        # Unlike the port of `--server`, this one serves one command a connection.
        return _address("server", {"port": str(port), "disconnect": "true"})
    return None


def control(given: Mapping[str, str]) -> Address | None:
    """Return where the control channel is, out of the option `--ctrl`; None without it.

    Raises:
        InvalidArgumentError: USAGE.
    """
    if "--ctrl" not in given:
        return None
    return _address("ctrl", parse_fields("ctrl", given["--ctrl"], _CONTROL))


def _address(what: str, fields: Mapping[str, str]) -> Address:
    kind = fields.get("type", "" if what == "ctrl" else "tcp")
    if kind not in ("unixio", "tcp"):
        raise refused(
            f"Unsupport socket type: {kind}" if kind else "Missing type parameter for control channel",
            "give type=unixio or type=tcp",
        )
    address = Address(disconnect="disconnect" in fields, terminate="terminate" in fields)
    # What is open already counts before what would have to be opened.
    if "fd" in fields:
        fd = int(fields["fd"])
        listening = is_listening(fd)
        if what == "ctrl" and not listening:
            raise refused(f"Bad file descriptor {fd}: nobody can connect to it", "give a connected socket as clientfd=")
        return replace(address, fd=fd, listening=listening)
    if "clientfd" in fields and kind == "unixio":
        client_fd = int(fields["clientfd"])
        if is_listening(client_fd):
            raise refused(f"Bad file descriptor {client_fd}: it is not connected", "give a listening socket as fd=")
        return replace(address, client_fd=client_fd)
    if kind == "unixio":
        if "path" not in fields:
            raise refused("Missing path and file descriptor option for UnixIO socket")
        return replace(
            address,
            path=_checked_path(fields["path"]),
            mode=int(fields.get("mode", "770"), 8),
            uid=int(fields.get("uid", -1)),
            gid=int(fields.get("gid", -1)),
        )
    port = fields.get("port", os.environ.get("TPM_PORT", "") if what == "server" else "")
    if not port:
        raise refused("Missing port and file descriptor option for TCP socket")
    return replace(address, port=any_number("TCP socket port", port, _MAX_PORT), host=_checked_host(fields))


def _checked_path(text: str) -> str:
    # Absolute, as a daemon leaves the working directory.
    path = str(Path(text).absolute())
    if len(os.fsencode(path)) > _MAX_PATH:
        raise refused(
            f"Could not open UnixIO socket {path}: a path that clients can use has {_MAX_PATH} bytes at most",
            "name a shorter path",
        )
    return path


def _checked_host(fields: Mapping[str, str]) -> str:
    """Return the address to listen at, with the interface where the address alone does not say which one."""
    host = fields.get("bindaddr", "127.0.0.1")
    plain, _, zone = host.partition("%")
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, plain)
    except OSError:
        raise refused(f"Could not parse the bind address '{host}'", "give an address in numbers") from None
    # fe80::/10.
    if len(packed) == 4 or packed[0] != 0xFE or packed[1] & 0xC0 != 0x80:
        return host
    zone = zone or fields.get("ifname", "")
    if not zone:
        raise refused(f"Missing interface name for link local address {host}", "give ifname=")
    return f"{plain}%{zone}"


def is_listening(fd: int, kinds: tuple[int, ...] = (socket.SOCK_STREAM,)) -> bool:
    """Return whether a descriptor is of a socket that listens, or of one that is connected; refuse everything else.

    Raises:
        InvalidArgumentError: USAGE.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise refused(f"Bad file descriptor {fd}: it is no socket")
        with socket.socket(fileno=os.dup(fd)) as given:
            if given.type not in kinds:
                raise refused(
                    f"Bad file descriptor {fd}: it is a socket of another kind, {given.type.name}", "give a stream socket"
                )
            if given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return True
            given.getpeername()
    except OSError as error:
        raise refused(
            f"Bad file descriptor {fd}: {error.strerror}", "give a stream socket that listens or is connected"
        ) from None
    return False
