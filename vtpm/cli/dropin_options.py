"""The command line of `swtpm socket`, as libvirt, KubeVirt and scripts write it; understood whole or refused."""

from __future__ import annotations

import getopt
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vtpm.errors import InvalidArgumentError

_SHORT: Final = "dhp:f:tr:"
_LONG: Final = [
    "daemon",
    "help",
    "port=",
    "fd=",
    "terminate",
    "runas=",
    "locality=",
    "log=",
    "key=",
    "migration-key=",
    "pid=",
    "tpmstate=",
    "ctrl=",
    "flags=",
    "tpm2",
    "server=",
    "seccomp=",
    "print-capabilities",
    "print-states",
]
_SAME: Final = {"-d": "--daemon", "-h": "--help", "-p": "--port", "-f": "--fd", "-t": "--terminate", "-r": "--runas"}
_ADDRESS: Final = ["type", "path", "port", "bindaddr", "ifname", "fd", "clientfd", "mode", "uid", "gid"]
_STARTUPS: Final = ("startup-clear", "startup-state", "startup-none", "startup-deactivated")


def refused(message: str, remedy: str = "") -> InvalidArgumentError:
    """Return the error of a command line that is not taken."""
    return InvalidArgumentError("USAGE", message, remedy=remedy)


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
    disconnect: bool = False
    terminate: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. `keys` holds the fields of --key."""

    action: str = ""
    directory: Path = Path()
    state_mode: int = 0o640
    server: Address | None = None
    control: Address | None = None
    need_init: bool = True
    startup: str = "startup-none"
    pid_file: str = ""
    pid_fd: int = -1
    log: Mapping[str, str] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    daemon: bool = False
    terminate: bool = False
    run_as: str = ""
    reject_locality_4: bool = False
    allow_set_locality: bool = False
    filtered: bool = True


def parse(arguments: Sequence[str]) -> Options:
    """Return the options after `socket`.

    Raises:
        InvalidArgumentError: USAGE.
    """
    try:
        pairs, rest = getopt.gnu_getopt(list(arguments), _SHORT, _LONG)
    except getopt.GetoptError as error:
        raise refused(error.msg) from None
    if rest:
        raise refused(f"unknown argument '{rest[0]}'")
    # As with swtpm, the last of an option given twice is the one that counts.
    given = {_SAME.get(name, name): value for name, value in pairs}
    for action in ("--help", "--print-capabilities"):
        if action in given:
            return Options(action=action)
    if "--tpm2" not in given:
        raise refused("a TPM 1.2 was asked for; only TPM 2.0 is emulated", "give --tpm2")
    if "--migration-key" in given:
        raise refused(
            "--migration-key is not supported: state leaves over the control channel as the TPM holds it",
            "leave it out, and let the migration's transport encrypt (TLS)",
        )
    flags = _fields("flags", given.get("--flags", ""), (), ("not-need-init", *_STARTUPS))
    if "startup-deactivated" in flags:
        raise refused("TPM 2 does not support startup deactivated.")
    startups = [name for name in flags if name in _STARTUPS]
    seccomp = _fields("seccomp", given.get("--seccomp", ""), ("action",)).get("action", "kill")
    if seccomp not in ("kill", "none"):
        raise refused(f"the seccomp action '{seccomp}' is not supported", "give action=kill or action=none")
    locality = _fields("locality", given.get("--locality", ""), (), ("reject-locality-4", "allow-set-locality"))
    directory, state_mode = _state(given.get("--tpmstate"))
    if "--print-states" in given:
        return Options(action="--print-states", directory=directory)
    pid = _fields("pid", given.get("--pid", ""), ("file", "fd"))
    server, control = _server(given), _control(given)
    if server is None and control is None:
        raise refused("nothing to serve", "give --server or --ctrl")
    return Options(
        directory=directory,
        state_mode=state_mode,
        server=server,
        control=control,
        need_init="not-need-init" not in flags and not any(name != "startup-none" for name in startups),
        startup=startups[-1] if startups else "startup-none",
        pid_file=str(Path(pid["file"]).absolute()) if "file" in pid else "",
        pid_fd=_number("pid", pid, "fd"),
        log=_fields("logging", given.get("--log", ""), ("file", "fd", "level", "prefix"), ("truncate",)),
        key=_fields("key", given.get("--key", ""), ("file", "fd", "pwdfile", "pwdfd", "mode", "format", "remove", "kdf")),
        daemon="--daemon" in given,
        # A socket that is given connected is the only one there will be.
        terminate="--terminate" in given or (server is not None and server.fd >= 0),
        run_as=given.get("--runas", ""),
        reject_locality_4="reject-locality-4" in locality,
        allow_set_locality="allow-set-locality" in locality,
        filtered=seccomp != "none",
    )


def _fields(what: str, text: str, names: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str]:
    """Split `a=b,c` and check the names."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in (names if equals else flags):
            raise refused(f"Error parsing {what} options: Unknown option '{part}'")
        found[name] = value
    return found


def _number(what: str, fields: Mapping[str, str], name: str, base: int = 10, default: int = -1) -> int:
    if name not in fields:
        return default
    try:
        value = int(fields[name], base)
    except ValueError:
        value = -1
    if value < 0:
        raise refused(f"Error parsing {what} options: '{fields[name]}' is no value of {name}")
    return value


def _state(text: str | None) -> tuple[Path, int]:
    if text is None:
        if "TPM_PATH" not in os.environ:
            raise refused("the directory of the TPM's state is not given", "give --tpmstate dir=…")
        return Path(os.environ["TPM_PATH"]), 0o640
    fields = _fields("tpmstate", text, ("dir", "mode", "backend-uri"))
    mode = _number("tpmstate", fields, "mode", 8, 0o640)
    if "backend-uri" not in fields:
        place = fields.get("dir", "")
    elif fields["backend-uri"].startswith("dir://"):
        place = fields["backend-uri"].removeprefix("dir://")
    else:
        raise refused(f"the state backend '{fields['backend-uri']}' is not supported", "give dir=… or backend-uri=dir://…")
    if not place:
        raise refused("the directory of the TPM's state is not given", "give --tpmstate dir=…")
    # Absolute, as a daemon leaves the working directory.
    return Path(place).absolute(), mode


def _server(given: Mapping[str, str]) -> Address | None:
    if "--server" in given:
        return _address("server", _fields("server", given["--server"], _ADDRESS, ("disconnect",)))
    if "--fd" in given:
        return _address("server", {"fd": given["--fd"]})
    if "--port" in given:
        return _address("server", {"type": "tcp", "port": given["--port"]})
    return None


def _control(given: Mapping[str, str]) -> Address | None:
    if "--ctrl" not in given:
        return None
    return _address("ctrl", _fields("ctrl", given["--ctrl"], _ADDRESS, ("terminate",)))


def _address(what: str, fields: Mapping[str, str]) -> Address:
    kind = fields.get("type", "" if what == "ctrl" else "tcp")
    if kind not in ("unixio", "tcp"):
        raise refused(f"Unsupport socket type: {kind}", "give type=unixio or type=tcp")
    if "ifname" in fields:
        raise refused("ifname= is not supported", "give a link-local address as bindaddr=fe80::1%eth0")
    address = Address(
        path=str(Path(fields["path"]).absolute()) if "path" in fields else "",
        host=fields.get("bindaddr", "127.0.0.1"),
        port=_number(what, fields, "port"),
        fd=_number(what, fields, "fd"),
        client_fd=_number(what, fields, "clientfd"),
        mode=_number(what, fields, "mode", 8, 0o770),
        uid=_number(what, fields, "uid"),
        gid=_number(what, fields, "gid"),
        disconnect="disconnect" in fields,
        terminate="terminate" in fields,
    )
    given = [name for name in ("fd", "clientfd") if name in fields]
    for name in given:
        _check_socket(_number(what, fields, name))
    if len(given) > 1 or (what == "server" and "clientfd" in fields):
        raise refused("clientfd is only for --ctrl, and not together with fd")
    if not given and kind == "unixio" and not address.path:
        raise refused("Missing path and file descriptor option for UnixIO socket")
    if not given and kind == "tcp" and not 0 < address.port < 1 << 16:
        raise refused("Missing port and file descriptor option for TCP socket")
    return address


def _check_socket(fd: int) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise refused(f"Bad file descriptor {fd}: it is no open socket")
