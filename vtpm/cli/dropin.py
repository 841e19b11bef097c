"""`vtpm-swtpm`: takes swtpm's command line and its place, with the TPM in a sandboxed worker of its own.

What a caller waits for is the time until the socket is there, so that modules are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

from vtpm import __version__
from vtpm.cli.dropin_fields import refused
from vtpm.cli.dropin_options import Options, parse
from vtpm.cli.dropin_process import NAME, Log, PidFile, daemonize, detach, run_as
from vtpm.errors import VtpmError

if TYPE_CHECKING:
    from vtpm.cli.dropin_control import Control, Tpm
    from vtpm.cli.dropin_state import StateDirectory
    from vtpm.engine.standalone import StandaloneTpm

# The swtpm whose command line and protocol this is.
SWTPM_VERSION: Final = "0.7.1"
_FEATURES: Final = (
    "tpm-2.0",
    "tpm-send-command-header",
    "flags-opt-startup",
    "flags-opt-disable-auto-shutdown",
    "cmdarg-seccomp",
    "cmdarg-key-fd",
    "cmdarg-pwd-fd",
    "cmdarg-print-states",
    "nvram-backend-dir",
    "nvram-backend-file",
    "rsa-keysize-2048",
    "rsa-keysize-3072",
)
_USAGE: Final = """\
Usage: swtpm socket|chardev [options]

A TPM 2.0 in the place of swtpm's (docs/dropin.md); the options are those of swtpm(8):

Both: --tpm2 --tpmstate dir=<dir>[,mode=0...]|backend-uri=dir://<dir>|backend-uri=file://<file>
--ctrl type=unixio,path=<path>[,mode=0...][,uid=uid][,gid=gid]|type=tcp,port=<port>|fd=<fd>|clientfd=<fd>[,terminate]
--flags [not-need-init][,startup-clear|startup-state|startup-none][,disable-auto-shutdown]
--key file=<path>|fd=<fd>|pwdfile=<path>|pwdfd=<fd>[,mode=aes-128-cbc|aes-256-cbc][,format=hex|binary][,kdf=pbkdf2|sha512]
--migration-key <as --key>
--locality [reject-locality-4][,allow-set-locality]   --seccomp action=none|kill   --runas <user>
--pid file=<path>|fd=<fd>   --log file=<path>|fd=<fd>[,level=n][,prefix=<prefix>][,truncate]
-d|--daemon   --print-capabilities   --print-states   -h|--help

socket: --server type=unixio,path=<path>[,mode=0...][,uid=uid][,gid=gid]|type=tcp,port=<port>[,bindaddr=<address>]|fd=<fd>
[,disconnect]   -t|--terminate   -p|--port <port>   -f|--fd <fd>

chardev: -c|--chardev <device>   -f|--fd <fd>   --vtpm-proxy
"""
_USE_DAEMON: Final = "VTPM_SWTPM_USE_DAEMON"
_STARTUPS: Final = {"startup-clear": 0, "startup-state": 1}


def main() -> NoReturn:
    """Run with the process's arguments; ends it with swtpm's exit statuses."""
    try:
        status = run(sys.argv[1:])
    except (OSError, VtpmError) as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to do, and the interpreter's own end takes longer than all of it.
    os._exit(status)


def run(arguments: list[str]) -> int:
    """Run with these arguments; return the exit status.

    Raises:
        VtpmError: they were refused, or the TPM could not be started.
    """
    match arguments[:1]:
        case ["socket" | "chardev"]:
            options = parse(arguments[1:], arguments[0])
        case ["-v" | "--version"]:
            sys.stdout.write(f"TPM emulator version {SWTPM_VERSION}, vtpm {__version__}\n")
            return 0
        case ["-h" | "--help"]:
            sys.stdout.write(_USAGE)
            return 0
        case ["cuse"]:
            raise refused("a character device by CUSE is not supported", "use the form: swtpm socket …")
        case []:
            raise refused("Missing TPM interface type.", "use the form: swtpm socket …")
        case _:
            raise refused(f"Unsupported TPM interface type '{arguments[0]}'.", "use the form: swtpm socket …")
    match options.action:
        case "--help":
            sys.stdout.write(_USAGE)
        case "--print-capabilities":
            capabilities = {"type": "swtpm", "features": list(_FEATURES), "version": SWTPM_VERSION}
            sys.stdout.write(_json(capabilities) + "\n")
        case "--print-states":
            sizes = _state(options, None).sizes()
            states = [{"name": name, "size": size} for name, size in sizes.items()]
            sys.stdout.write(_json({"type": "swtpm", "states": states}) + "\n")
        case _:
            return _serve(options)
    return 0


def _json(value: object) -> str:
    import json

    # As swtpm spaces it, for those who look for a text in it.
    text = json.dumps(value)
    return "{ " + text[1:-1].replace('": [', '": [ ').replace("]", " ]").replace("[  ]", "[]") + " }"


def _state(options: Options, key: bytes | None) -> StateDirectory:
    if options.single_file:
        from vtpm.cli.dropin_linear import StateFile

        return StateFile(options.directory, options.state_mode, key)
    from vtpm.cli.dropin_state import StateDirectory

    return StateDirectory(options.directory, options.state_mode, key)


def _serve(options: Options) -> int:
    ready = daemonize() if options.daemon else None
    try:
        return _run_tpm(options, ready)
    except (OSError, VtpmError) as error:
        if ready is not None:
            ready.write(str(error))
            ready.close()
            return 1
        raise


def _run_tpm(options: Options, ready: TextIO | None) -> int:
    from vtpm.cli.dropin_blobs import Blobs
    from vtpm.cli.dropin_control import Control
    from vtpm.cli.dropin_state import read_key
    from vtpm.engine import sandbox

    if options.run_as:
        # Before any file is touched, as swtpm does it, but while the modules can still be read, wherever they are.
        import vtpm.cli.dropin_device
        import vtpm.cli.dropin_linear
        import vtpm.cli.dropin_serve
        import vtpm.engine.standalone  # noqa: F401
        from vtpm.wire.swtpm_state import load_ciphers

        load_ciphers()
        run_as(options.run_as)
    log = Log(options, quiet=options.daemon)
    pid = PidFile(options)

    device = -1
    if options.proxy or options.device is not None:
        from vtpm.cli.dropin_device import open_device

        device = open_device(options)
    key = read_key(options.key)
    blobs = Blobs(key, read_key(options.migration_key, "--migration-key"))
    sandbox.forbid_dumps()
    state = held = _state(options, key)
    state.lock()
    fresh = None
    tpm: Tpm
    if os.environ.get(_USE_DAEMON) == "1":
        from vtpm.cli.dropin_daemon import DaemonTpm, NoFiles, instance_for

        if not options.auto_shutdown:
            raise refused("disable-auto-shutdown is not possible with the daemon", f"leave it out, or unset {_USE_DAEMON}")
        tpm = DaemonTpm(instance_for(options.directory, state).control_socket)
        state = NoFiles(options.directory)
    else:
        tpm, fresh = _alone(options, state, log)
    failures: list[str] = []
    with contextlib.ExitStack() as ending:
        ending.callback(held.unlock)
        ending.callback(_end, tpm, log, failures)
        control = Control(tpm, state, fresh=fresh, blobs=blobs, reject_locality_4=options.reject_locality_4, say=log.line)
        _serve_clients(options, tpm, control, device, pid=pid, log=log, ready=ready, ending=ending, failures=failures)
        if control.failure:
            failures.append(control.failure)
            log.line(control.failure)
    return 1 if failures else 0


def _end(tpm: Tpm, log: Log, failures: list[str]) -> None:
    tpm.stop()
    failure = tpm.wait()
    if failure:
        failures.append(failure)
        log.line(failure)


def _alone(options: Options, state: StateDirectory, log: Log) -> tuple[StandaloneTpm, bytes | None]:
    """Start a worker with the directory's state; return it, and the state of a fresh TPM, which is in no file yet."""
    from vtpm.engine.standalone import StandaloneTpm

    permanent = state.read()
    tpm = StandaloneTpm(state.write, filtered=options.filtered, errors_fd=log.fd, auto_shutdown=options.auto_shutdown)
    fresh = tpm.manufacture() if permanent is None else None
    tpm.start(permanent or fresh or b"")
    return tpm, fresh


def _serve_clients(
    options: Options,
    tpm: Tpm,
    control: Control,
    device: int,
    *,
    pid: PidFile,
    log: Log,
    ready: TextIO | None,
    ending: contextlib.ExitStack,
    failures: list[str],
) -> None:
    from vtpm.cli.dropin_serve import Server

    if not options.need_init:
        _start(options, tpm, control)
    if options.proxy:
        from vtpm.cli.dropin_device import make_proxy

        device, said = make_proxy(device)
        sys.stdout.write(said)
        sys.stdout.flush()

    def finish() -> bool:
        ending.close()
        return not failures

    server = Server(options, tpm, control, device, finish=finish)
    ending.callback(server.close)
    ending.callback(pid.remove)
    server.listen()
    pid.write()
    if ready is not None:
        detach(ready)
    if log.fd != 2 and not ready:
        os.dup2(log.fd, 2)
    server.run()
    control.end()


def _start(options: Options, tpm: Tpm, control: Control) -> None:
    from vtpm.tpm.codes import CommandCode
    from vtpm.tpm.command import HEADER, build

    if not control.initialise():
        raise refused("Error: Could not initialize libtpms: it refuses the state", "take the state from a backup")
    if options.startup in _STARTUPS:
        response = control.start_up(build(CommandCode.Startup, _STARTUPS[options.startup].to_bytes(2, "big")))
        rc = HEADER.unpack_from(response)[2]
        if rc not in (0, 0x100):
            raise refused(f"the TPM answered TPM2_Startup with 0x{rc:x}", "give --flags startup-clear")
    if options.proxy:
        # The kernel asks for it first of all and gives it two seconds, which a busy machine may exceed; what is tested is not
        # tested again. fullTest is NO: what was not tested yet.
        tpm.execute(build(CommandCode.SelfTest, b"\0"))


if __name__ == "__main__":
    main()
