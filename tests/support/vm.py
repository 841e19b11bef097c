"""A VM with a TPM: QEMU without KVM, OVMF, and a guest that runs the scripts that a test sends.

The TPM is a peer that speaks the swtpm protocol on a control socket. Times are of emulation: a boot takes 6 to 50 s.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.vmassets import COMMAND_LINE, Assets
from tests.support.vmpeers import Peer

FIRMWARE = Path("/usr/share/OVMF")
BOOT_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 60.0
MEMORY_MIB = 256
# All test processes of this user together; each VM keeps one core busy.
_MOST_VMS = int(os.environ.get("VTPM_E2E_VMS", "2"))
_SLOT_TIMEOUT_S = 900.0


class VmError(Exception):
    """The VM did not do what was asked; the text ends with what it said last."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a script in the guest did."""

    status: int
    out: bytes
    err: str


class Qmp:
    """QEMU's control protocol: `execute` a command, `wait_for` an event."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._events: list[str] = []
        self._message(EXIT_TIMEOUT_S)
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer.

        Raises:
            VmError: QEMU refused it or is gone.
        """
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (message := self._message(RUN_TIMEOUT_S)):
            self._events.append(message["event"])
        if "error" in message:
            raise VmError(f"{command}: {message['error']['desc']}")
        return message["return"]

    def monitor(self, command: str) -> str:
        """Run a command of the monitor for people; what it prints is its only error."""
        return str(self.execute("human-monitor-command", **{"command-line": command}))

    def wait_for(self, event: str, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Wait until `event` has come since the last `forget`."""
        deadline = time.monotonic() + timeout_s
        while event not in self._events:
            message = self._message(deadline - time.monotonic())
            if "event" in message:
                self._events.append(message["event"])

    def forget(self) -> None:
        """Drop the events that came so far."""
        self.execute("query-status")
        self._events.clear()

    def _message(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._data:
            self._data += _receive(self._sock, deadline, "QMP")
        line, _, self._data = self._data.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


class Vm:
    """One virtual machine. `boot` it, `run` scripts in it; what is left of it ends with the `with` block.

    `directory` keeps what outlives a QEMU process: the firmware's variables. With `snapshots` they last as long as the process.
    Only two VMs run at once; one that is not `counted` does not wait for its turn, as it will not run.
    """

    def __init__(
        self,
        assets: Assets,
        tpm: Peer,
        directory: Path,
        *,
        interface: str = "tpm-crb",
        secure_boot: bool = False,
        snapshots: bool = False,
        counted: bool = True,
        command_line: str = COMMAND_LINE,
    ) -> None:
        self.assets = assets
        self.tpm = tpm
        self.directory = directory
        self.interface = interface
        self.secure_boot = secure_boot
        self.snapshots = snapshots
        self.counted = counted
        self.command_line = command_line
        self.process: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._data = b""

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.kill()

    # ---- life ------------------------------------------------------------------------------------------------------------

    def boot(self) -> Vm:
        """Power on and wait for userspace."""
        self.start()
        self.wait_until_ready()
        return self

    def start(self, incoming: Path | None = None) -> None:
        """Start QEMU; with `incoming` it goes on where the VM in that file was, without a boot."""
        assert self.process is None
        if self.counted:
            self._open.enter_context(_slot())
        self.directory.mkdir(exist_ok=True)
        self._serial.write_bytes(b"")
        qmp, guest = self._channel(), self._channel()
        words = self._command(qmp[1].fileno(), guest[1].fileno())
        if incoming is not None:
            words += ["-incoming", f"exec:cat {shlex.quote(str(incoming))}"]
        # QEMU must not outlive a test process that is killed.
        words = ["setpriv", "--pdeathsig", "KILL", "--", *words]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(qmp[1].fileno(), guest[1].fileno())
            )
        qmp[1].close()
        guest[1].close()
        self._guest, self._data = guest[0], b""
        try:
            self.qmp = Qmp(qmp[0])
            if incoming is not None:
                self._until_running()
        except (VmError, OSError) as error:
            self.kill()
            raise self._failure(f"QEMU did not start: {error}") from None

    def wait_until_ready(self) -> None:
        """Wait for a boot to reach userspace."""
        self._expect("ready", BOOT_TIMEOUT_S)

    def reset(self) -> None:
        """The reset button, and a boot."""
        self._data = b""
        self.qmp.execute("system_reset")
        self.wait_until_ready()

    def reboot(self) -> None:
        """The guest restarts the machine."""
        self.begin("reboot -f")
        self.wait_until_ready()

    def power_off(self) -> None:
        """The guest switches the machine off."""
        self.begin("poweroff -f")
        self._wait_for_exit()

    def quit(self) -> None:
        """End QEMU orderly; to the guest a power cut."""
        with contextlib.suppress(VmError, OSError):
            self.qmp.execute("quit")
        self._wait_for_exit()

    def kill(self) -> None:
        """kill -9 QEMU."""
        if self.process is not None:
            self.process.kill()
        self._ended()

    def pause(self) -> None:
        """Stop the guest's processor."""
        self.qmp.execute("stop")

    def go_on(self) -> None:
        """Let it run again."""
        self.qmp.execute("cont")

    def suspend(self) -> None:
        """The guest suspends to RAM; returns when it sleeps. `wake` it."""
        self.qmp.forget()
        self.begin("sync; echo mem >/sys/power/state")
        self.qmp.wait_for("SUSPEND")

    def wake(self) -> Ran:
        """Wake the guest; returns what came of its attempt to sleep."""
        self.qmp.execute("system_wakeup")
        return self.result()

    def save(self, tag: str) -> None:
        """Keep the whole VM's state in a snapshot."""
        self._monitor(f"savevm {tag}")

    def load(self, tag: str) -> None:
        """Go back to a snapshot."""
        self._monitor(f"loadvm {tag}")

    def migrate(self, file: Path) -> None:
        """Write the VM into a file; it is stopped then. `quit` it, or `go_on` as after a destination that was lost."""
        self.qmp.execute("migrate", uri=f"exec:cat >{shlex.quote(str(file))}")
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while (migration := self.qmp.execute("query-migrate")).get("status") != "completed":
            if migration.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
                raise self._failure(f"migration: {migration}")
            time.sleep(0.02)

    # ---- guest -----------------------------------------------------------------------------------------------------------

    def run(self, script: str, timeout_s: float = RUN_TIMEOUT_S) -> bytes:
        """Run a shell script in the guest and return its output.

        Raises:
            VmError: it ended with another status than 0.
        """
        self.begin(script)
        ran = self.result(timeout_s)
        if ran.status:
            raise self._failure(f"{script!r} ended with {ran.status}: {ran.err}{ran.out.decode(errors='replace')}")
        return ran.out

    def attempt(self, script: str) -> Ran:
        """The same, whatever its status."""
        self.begin(script)
        return self.result()

    def put(self, path: str, data: bytes) -> None:
        """Write a small file in the guest."""
        octal = "".join(f"\\0{byte:03o}" for byte in data)
        self.run(f"printf '%b' '{octal}' >{path}")

    def begin(self, script: str) -> None:
        """Send a script and do not wait; `result` follows."""
        data = f"set -e\n{script}\n".encode()
        self._guest.sendall(b"run %d\n" % len(data) + data)

    def result(self, timeout_s: float = RUN_TIMEOUT_S) -> Ran:
        """What became of the script that was begun."""
        status, out_size, err_size = (int(word) for word in self._expect("done ", timeout_s).split())
        deadline = time.monotonic() + timeout_s
        while len(self._data) < out_size + err_size:
            self._fill(deadline)
        out, err = self._data[:out_size], self._data[out_size : out_size + err_size]
        self._data = self._data[out_size + err_size :]
        return Ran(status, out, err.decode(errors="replace"))

    # ---- inside ----------------------------------------------------------------------------------------------------------

    @property
    def _serial(self) -> Path:
        return self.directory / "serial.log"

    @property
    def _log(self) -> Path:
        return self.directory / "qemu.log"

    def _channel(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        return self._open.enter_context(ours), self._open.enter_context(theirs)

    def _command(self, qmp: int, guest: int) -> list[str]:
        code, template = _firmware(self.secure_boot)
        variables = self.directory / "vars.fd"
        if not variables.exists():
            shutil.copyfile(template, variables)
        words = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB)]
        words += ["-machine", f"q35,smm={'on' if self.secure_boot else 'off'}", "-nodefaults", "-display", "none"]
        words += ["-serial", _option("file:", self._serial)]
        words += ["-drive", _option("if=pflash,unit=0,format=raw,readonly=on,file=", code)]
        # A snapshot needs a format that can hold it: QEMU makes one over the variables, for as long as it runs.
        kept = "off" if not self.snapshots else "on"
        words += ["-drive", _option(f"if=pflash,unit=1,format=raw,snapshot={kept},file=", variables)]
        words += ["-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"]
        words += ["-chardev", f"socket,id=agent,fd={guest}", "-device", "virtio-serial-pci"]
        words += ["-device", "virtserialport,chardev=agent,name=vtpm.agent"]
        words += ["-chardev", _option("socket,id=tpm,path=", self.tpm.plug())]
        words += ["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", f"{self.interface},tpmdev=tpm0"]
        if self.secure_boot:
            # With -kernel, OVMF would boot it through a loader that neither verifies nor measures.
            words += ["-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"]
            words += ["-drive", _option("if=none,id=esp,format=raw,read-only=on,file.driver=vvfat,file.dir=", self.assets.esp)]
            return [*words, "-device", "virtio-blk-pci,drive=esp,bootindex=0"]
        return [*words, "-kernel", str(self.assets.kernel), "-initrd", str(self.assets.initrd), "-append", self.command_line]

    def _until_running(self) -> None:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while self.qmp.execute("query-status")["status"] != "running":
            if time.monotonic() > deadline:
                raise VmError("it does not run")
            time.sleep(0.02)

    def _monitor(self, command: str) -> None:
        said = self.qmp.monitor(command)
        if said.strip():
            raise self._failure(f"{command}: {said}")

    def _expect(self, beginning: str, timeout_s: float) -> str:
        """What follows on the next line that begins so."""
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\n" not in self._data:
                self._fill(deadline)
            line, _, self._data = self._data.partition(b"\n")
            text = line.decode(errors="replace").strip("\0\r")
            if text.startswith(beginning):
                return text.removeprefix(beginning)

    def _fill(self, deadline: float) -> None:
        try:
            self._data += _receive(self._guest, deadline, "the guest")
        except VmError as error:
            raise self._failure(str(error)) from None

    def _wait_for_exit(self) -> None:
        assert self.process is not None
        try:
            status = self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._failure("QEMU does not end") from None
        self._ended()
        if status:
            raise self._failure(f"QEMU ended with {status}")

    def _ended(self) -> None:
        if self.process is not None:
            self.process.wait()
            self.process = None
        self._open.close()

    def _failure(self, what: str) -> VmError:
        said = [path.read_text(errors="replace")[-1500:].strip() for path in (self._log, self._serial) if path.exists()]
        return VmError("\n".join([what, *filter(None, said)]))


def firmware_is_small() -> bool:
    """Whether this Debian has the 2 MiB build of OVMF, which spends 3 s less on measuring itself."""
    return (FIRMWARE / "OVMF_CODE.fd").exists()


def _firmware(secure_boot: bool) -> tuple[Path, Path]:
    if secure_boot:
        return FIRMWARE / "OVMF_CODE_4M.secboot.fd", FIRMWARE / "OVMF_VARS_4M.snakeoil.fd"
    size = "" if firmware_is_small() else "_4M"
    return FIRMWARE / f"OVMF_CODE{size}.fd", FIRMWARE / f"OVMF_VARS{size}.fd"


def _option(head: str, path: str | Path) -> str:
    # A comma ends an option's value; two stand for one.
    return head + str(path).replace(",", ",,")


def _receive(sock: socket.socket, deadline: float, whose: str) -> bytes:
    readable, _, _ = select.select([sock], [], [], max(0.0, deadline - time.monotonic()))
    if not readable:
        raise VmError(f"{whose} said nothing in time")
    try:
        data = sock.recv(1 << 20)
    except ConnectionError:
        data = b""
    if not data:
        raise VmError(f"{whose} is gone")
    return data


@contextlib.contextmanager
def _slot() -> Iterator[None]:
    """One of the places for VMs on this machine, kept by a file lock, so that a killed process gives its back."""
    files = [Path(tempfile.gettempdir()) / f"vtpm-e2e-{os.getuid()}-{number}.lock" for number in range(_MOST_VMS)]
    deadline = time.monotonic() + _SLOT_TIMEOUT_S
    with contextlib.ExitStack() as stack:
        while True:
            for path in files:
                file = path.open("w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.close()
                    continue
                stack.enter_context(file)
                yield
                return
            if time.monotonic() > deadline:
                raise VmError(f"{_MOST_VMS} other VMs run")
            time.sleep(0.1)
