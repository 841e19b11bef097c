"""The command lines of `swtpm socket` and `swtpm chardev`, as libvirt, KubeVirt and scripts write them: whole or refused."""

from __future__ import annotations

import getopt
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vtpm.cli import dropin_addresses
from vtpm.cli.dropin_addresses import Address
from vtpm.cli.dropin_fields import Kind, any_number, parse_fields, refused

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
_KEY: Final = {
    "file": Kind.TEXT,
    "fd": Kind.NUMBER,
    "pwdfile": Kind.TEXT,
    "pwdfd": Kind.NUMBER,
    "mode": Kind.TEXT,
    "format": Kind.TEXT,
    "remove": Kind.FLAG,
    "kdf": Kind.TEXT,
}
_KEY_SOURCES: Final = ("file", "fd", "pwdfile", "pwdfd")
_PID: Final = {"file": Kind.TEXT, "fd": Kind.NUMBER}
_LOG: Final = {
    "file": Kind.TEXT,
    "fd": Kind.NUMBER,
    "level": Kind.NUMBER,
    "prefix": Kind.TEXT,
    "truncate": Kind.FLAG,
}
# A device gives whole commands, and so does a socket that keeps them apart.
_DEVICE_SOCKETS: Final = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
_STATE: Final = {"dir": Kind.TEXT, "mode": Kind.MODE, "backend-uri": Kind.TEXT}
_LOCALITY: Final = {"reject-locality-4": Kind.FLAG, "allow-set-locality": Kind.FLAG}
# The order is swtpm's: of several that are set, the first one counts.
_STARTUPS: Final = ("startup-clear", "startup-state", "startup-deactivated", "startup-none")
_FLAGS: Final = dict.fromkeys(("not-need-init", "disable-auto-shutdown", *_STARTUPS), Kind.FLAG)


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
    flags = parse_fields("flags", given.get("--flags", ""), _FLAGS)
    startup = next((name for name in _STARTUPS if name in flags), "")
    if startup == "startup-deactivated":
        raise refused("TPM 2 does not support startup deactivated.")
    seccomp = parse_fields("seccomp", given.get("--seccomp", ""), {"action": Kind.TEXT}).get("action", "kill")
    if seccomp not in ("kill", "none"):
        raise refused(f"the seccomp action '{seccomp}' is not supported", "give action=kill or action=none")
    locality = parse_fields("locality", given.get("--locality", ""), _LOCALITY)
    place, single_file, state_mode = _state(given.get("--tpmstate"))
    if "--print-states" in given:
        return Options(action="--print-states", directory=place, single_file=single_file)
    pid = _pid(given)
    control = dropin_addresses.control(given)
    device, proxy = _device(given) if form == "chardev" else (None, False)
    server = dropin_addresses.server(given) if form == "socket" else None
    if form == "socket" and server is None and control is None:
        raise refused("nothing to serve", "give --server or --ctrl")
    # The kernel begins to talk at once.
    startup = startup or ("startup-clear" if proxy else "startup-none")
    return Options(
        directory=place,
        single_file=single_file,
        state_mode=state_mode,
        device=device,
        proxy=proxy,
        server=server,
        control=control,
        need_init="not-need-init" not in flags and not proxy and startup == "startup-none",
        startup=startup,
        auto_shutdown="disable-auto-shutdown" not in flags,
        pid_file=str(Path(pid["file"]).absolute()) if "file" in pid else "",
        # The file is the one that counts.
        pid_fd=int(pid.get("fd", -1)) if "file" not in pid else -1,
        log=parse_fields("logging", given.get("--log", ""), _LOG),
        key=_key(given, "key"),
        migration_key=_key(given, "migration-key"),
        daemon="--daemon" in given,
        # What is given connected is the only one there will be.
        terminate="--terminate" in given
        or form == "chardev"
        or (server is not None and server.fd >= 0 and not server.listening),
        run_as=given.get("--runas", ""),
        reject_locality_4="reject-locality-4" in locality,
        # The kernel says so what locality it works at.
        allow_set_locality="allow-set-locality" in locality or proxy,
        filtered=seccomp != "none",
    )


def _pid(given: Mapping[str, str]) -> dict[str, str]:
    if "--pid" not in given:
        return {}
    pid = parse_fields("pid", given["--pid"], _PID)
    if not pid:
        raise refused("The file or fd parameter is required for the pid option.")
    return pid


def _key(given: Mapping[str, str], what: str) -> dict[str, str]:
    if f"--{what}" not in given:
        return {}
    fields = parse_fields(what, given[f"--{what}"], _KEY)
    if len([name for name in _KEY_SOURCES if name in fields]) != 1:
        # Without one, or with one too many, the state would be encrypted with another key than the caller believes.
        raise refused(f"Exactly one of file=, fd=, pwdfile=, and pwdfd= is required for the {what} option")
    return fields


def _state(text: str | None) -> tuple[Path, bool, int]:
    """Return the place, whether it is a file, and the mode."""
    if text is None:
        if "TPM_PATH" not in os.environ:
            raise refused("the directory of the TPM's state is not given", "give --tpmstate dir=…")
        return Path(os.environ["TPM_PATH"]), False, 0o640
    fields = parse_fields("tpmstate", text, _STATE)
    mode = int(fields.get("mode", "640"), 8)
    if "dir" in fields or "backend-uri" not in fields:
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
    fd = any_number("the file descriptor", given["--fd"])
    if fd < 3:
        raise refused("Error: Cannot accept file descriptors with values 0, 1, or 2")
    try:
        kind = os.fstat(fd).st_mode
    except OSError as error:
        raise refused(f"Cannot stat file descriptor {fd}: {error.strerror}") from None
    if not stat.S_ISCHR(kind) and not (stat.S_ISSOCK(kind) and not dropin_addresses.is_listening(fd, _DEVICE_SOCKETS)):
        raise refused(
            f"Given file descriptor type is not supported: {fd} is no character device and no connected socket",
            "give a character device or a connected stream socket",
        )
    return fd, False
