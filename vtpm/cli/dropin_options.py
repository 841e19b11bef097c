"""The command lines of `swtpm socket` and `swtpm chardev`, as libvirt, KubeVirt and scripts write them: whole or refused."""

from __future__ import annotations

import getopt
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vtpm.errors import InvalidArgumentError

_BOTH: Final = [
    "daemon",
    "help",
    "fd=",
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
    "seccomp=",
    "print-capabilities",
    "print-states",
]
# By form: short options, and those that the other one does not have.
_FORMS: Final = {
    "socket": ("dhp:f:tr:", ["port=", "terminate", "server="]),
    "chardev": ("dhc:f:r:", ["chardev=", "vtpm-proxy"]),
}
_SAME: Final = {
    "-d": "--daemon",
    "-h": "--help",
    "-p": "--port",
    "-f": "--fd",
    "-t": "--terminate",
    "-r": "--runas",
    "-c": "--chardev",
}
_KEY: Final = ("file", "fd", "pwdfile", "pwdfd", "mode", "format", "remove", "kdf")
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
    """What was asked for. `key`, `migration_key` and `log` hold the fields of their options.

    `device` is the character device of the form `chardev`: a path, a descriptor, or one that the kernel is to make.
    """

    action: str = ""
    directory: Path = Path()
    # `directory` is a file that holds the states.
    single_file: bool = False
    state_mode: int = 0o640
    device: str | int | None = None
    proxy: bool = False
    server: Address | None = None
    control: Address | None = None
    need_init: bool = True
    startup: str = "startup-none"
    # TPM2_Shutdown before power is taken away, if the guest sent none.
    auto_shutdown: bool = True
    pid_file: str = ""
    pid_fd: int = -1
    log: Mapping[str, str] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    migration_key: Mapping[str, str] = field(default_factory=dict)
    daemon: bool = False
    terminate: bool = False
    run_as: str = ""
    reject_locality_4: bool = False
    allow_set_locality: bool = False
    filtered: bool = True


def parse(arguments: Sequence[str], form: str = "socket") -> Options:
    """Return the options after `socket` or `chardev`, which is the `form`.

    Raises:
        InvalidArgumentError: USAGE.
    """
    short, own = _FORMS[form]
    try:
        pairs, rest = getopt.gnu_getopt(list(arguments), short, _BOTH + own)
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
    flags = _fields("flags", given.get("--flags", ""), (), ("not-need-init", "disable-auto-shutdown", *_STARTUPS))
    if "startup-deactivated" in flags:
        raise refused("TPM 2 does not support startup deactivated.")
    startups = [name for name in flags if name in _STARTUPS]
    seccomp = _fields("seccomp", given.get("--seccomp", ""), ("action",)).get("action", "kill")
    if seccomp not in ("kill", "none"):
        raise refused(f"the seccomp action '{seccomp}' is not supported", "give action=kill or action=none")
    locality = _fields("locality", given.get("--locality", ""), (), ("reject-locality-4", "allow-set-locality"))
    place, single_file, state_mode = _state(given.get("--tpmstate"))
    if "--print-states" in given:
        return Options(action="--print-states", directory=place, single_file=single_file)
    pid = _fields("pid", given.get("--pid", ""), ("file", "fd"))
    control = _control(given)
    device, proxy = _device(given) if form == "chardev" else (None, False)
    server = _server(given) if form == "socket" else None
    if form == "socket" and server is None and control is None:
        raise refused("nothing to serve", "give --server or --ctrl")
    # The kernel begins to talk at once.
    startups = startups or (["startup-clear"] if proxy else [])
    return Options(
        directory=place,
        single_file=single_file,
        state_mode=state_mode,
        device=device,
        proxy=proxy,
        server=server,
        control=control,
        need_init="not-need-init" not in flags and not proxy and not any(name != "startup-none" for name in startups),
        startup=startups[-1] if startups else "startup-none",
        auto_shutdown="disable-auto-shutdown" not in flags,
        pid_file=str(Path(pid["file"]).absolute()) if "file" in pid else "",
        pid_fd=_number("pid", pid, "fd"),
        log=_fields("logging", given.get("--log", ""), ("file", "fd", "level", "prefix"), ("truncate",)),
        key=_fields("key", given.get("--key", ""), _KEY),
        migration_key=_fields("migration-key", given.get("--migration-key", ""), _KEY),
        daemon="--daemon" in given,
        # What is given connected is the only one there will be.
        terminate="--terminate" in given or form == "chardev" or (server is not None and server.fd >= 0),
        run_as=given.get("--runas", ""),
        reject_locality_4="reject-locality-4" in locality,
        # The kernel says so what locality it works at.
        allow_set_locality="allow-set-locality" in locality or proxy,
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


def _state(text: str | None) -> tuple[Path, bool, int]:
    """Return the place, whether it is a file, and the mode."""
    if text is None:
        if "TPM_PATH" not in os.environ:
            raise refused("the directory of the TPM's state is not given", "give --tpmstate dir=…")
        return Path(os.environ["TPM_PATH"]), False, 0o640
    fields = _fields("tpmstate", text, ("dir", "mode", "backend-uri"))
    mode = _number("tpmstate", fields, "mode", 8, 0o640)
    if "backend-uri" not in fields:
        place, single_file = fields.get("dir", ""), False
    else:
        place, single_file = state_place(fields["backend-uri"])
    if not place:
        raise refused("the directory of the TPM's state is not given", "give --tpmstate dir=…")
    # Absolute, as a daemon leaves the working directory.
    return Path(place).absolute(), single_file, mode


def state_place(uri: str) -> tuple[str, bool]:
    """Return the path in a URI of swtpm's state backends, and whether it is a file's.

    Raises:
        InvalidArgumentError: USAGE.
    """
    for scheme, single_file in (("dir://", False), ("file://", True)):
        if uri.startswith(scheme):
            return uri.removeprefix(scheme), single_file
    raise refused(f"the state backend '{uri}' is not supported", "give backend-uri=dir://… or backend-uri=file://…")


def _device(given: Mapping[str, str]) -> tuple[str | int | None, bool]:
    """Return the character device, and whether the kernel is to make it."""
    if "--vtpm-proxy" in given:
        if "--chardev" in given or "--fd" in given:
            raise refused("Cannot use vTPM proxy with a provided device.")
        return None, True
    if "--chardev" in given:
        return str(Path(given["--chardev"]).absolute()), False
    if "--fd" not in given:
        raise refused("Error: Missing character device or file descriptor", "give --chardev, --fd or --vtpm-proxy")
    fd = _number("fd", given, "--fd")
    if fd < 3:
        raise refused("Error: Cannot accept file descriptors with values 0, 1, or 2")
    try:
        kind = os.fstat(fd).st_mode
    except OSError as error:
        raise refused(f"Cannot stat file descriptor {fd}: {error.strerror}") from None
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISBLK(kind):
        raise refused(f"Given file descriptor type is not supported: {fd} is a file, a directory or a block device")
    return fd, False


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
