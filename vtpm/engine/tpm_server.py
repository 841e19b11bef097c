"""IBM's TPM simulator, the program `tpm_server` of ibmswtpm2, as the software TPM of a worker.

It runs as a child of the worker and is spoken to over the mssim protocol, through tpm2-pytss' TCTI of that name. Its permanent
state is the file NVChip in its working directory, all of which it writes before it answers a command that changed NV; the file
is in memory only (vtpm.engine.isolation; invariant 4). Volatile state can't be saved.

A worker with this TPM has no system call filter, as it starts and talks to a program; the rest of its sandbox is in force, for
the program too.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.TSS2_Exception import TSS2_Exception

from vtpm.engine import sandbox
from vtpm.engine.isolation import PRIVATE_DIR, isolate
from vtpm.errors import EngineError, ErrorKind
from vtpm.tpm import ptm
from vtpm.tpm.codes import TPM_RC_COMMAND_SIZE
from vtpm.tpm.command import HEADER, HEADER_SIZE, MAX_COMMAND_SIZE, error_response

_ADDRESS: Final = "127.0.0.1"
_COMMAND_PORT: Final = 2321
_PLATFORM_PORT: Final = 2322
# A question for each port that changes nothing, and the size of its answer: TPM_REMOTE_HANDSHAKE with version 1, and
# TPM_SIGNAL_CANCEL_OFF.
_PROBES: Final = ((_COMMAND_PORT, struct.pack(">II", 15, 1), 12), (_PLATFORM_PORT, struct.pack(">I", 10), 4))
_NV_FILE: Final = "NVChip"
_MAX_STATE_SIZE: Final = 4 << 20
_START_TIMEOUT_S: Final = 10.0
# Longer than a slow processor takes for an RSA key.
_COMMAND_TIMEOUT_S: Final = 120.0
_REMEDY: Final = "check that tpm_server_path names ibmswtpm2's tpm_server and that it starts; reset the instance"


def in_new_worker(program: str, hidden: Sequence[str], *, owner: int | None = None) -> TpmServer:
    """Isolate this process and return its TPM; one that says why and refuses to start if the host does not allow that.

    `owner` is the user that the process will be, this one's if it is None.
    """
    try:
        isolate(hidden, owner=owner)
    except EngineError as error:
        return TpmServer(program, PRIVATE_DIR, refusal=error)
    return TpmServer(program, PRIVATE_DIR)


class TpmServer:
    """Implements vtpm.engine.software.SoftwareTpm; `directory` is where the program keeps its state."""

    # A VMM that sees that states are neither given nor taken does not try to migrate its VM.
    control_capabilities: Final = ptm.CAPABILITIES & ~(
        ptm.CAP_STORE_VOLATILE | ptm.CAP_GET_STATEBLOB | ptm.CAP_SET_STATEBLOB | ptm.CAP_HASHING
    )

    def __init__(self, program: str, directory: Path, *, refusal: EngineError | None = None) -> None:
        self._program = program
        self._directory = directory
        self._refusal = refusal
        self.permanent: bytes | None = None
        self.dirty = False
        self.command = bytearray(MAX_COMMAND_SIZE)
        self._locality = 0
        self._pid = 0
        self._pidfd = -1
        self._tcti: Any = None
        # The TCTI's connection, for what the TCTI does not do with it.
        self._connection: socket.socket | None = None

    @property
    def lifeline(self) -> int:
        """See SoftwareTpm."""
        return self._pidfd

    @property
    def locality(self) -> int:
        """The locality of the commands to come, 0 to 4."""
        return self._locality

    @locality.setter
    def locality(self, value: int) -> None:
        self._locality = value
        if self._tcti is not None:
            self._tcti.set_locality(value)

    # ---- life ------------------------------------------------------------------------------------------------------------

    def manufacture(self) -> None:
        """See SoftwareTpm. Without NVChip the program makes a new TPM.

        Raises:
            EngineError: there is a TPM already, or the program failed.
        """
        if self.permanent is not None or self._pid:
            raise EngineError("TPM_EXISTS", "this process already has a TPM")
        self._start()
        self.permanent, self.dirty = self._read_state(), True

    def power_on(self, permanent: bytes, volatile: bytes | None = None) -> None:
        """See SoftwareTpm.

        Raises:
            EngineError: ENGINE_CANNOT, there is a volatile state to go on from.
            EngineError: ENGINE_STATE_REFUSED, or the program failed.
        """
        if volatile is not None:
            raise _cannot("take a volatile state")
        self.power_off()
        if self._refusal is None:
            self._write_state(permanent)
        self._start()
        # Invariant 7: a state of another size than it was built for, it overwrites with that of a new TPM and says nothing.
        if self._read_state() != permanent:
            self.power_off()
            raise EngineError(
                "ENGINE_STATE_REFUSED",
                "tpm_server does not take the instance's state; what it made in its place was thrown away",
                remedy="install the build of tpm_server that the instance was created with; its state is unchanged",
                kind=ErrorKind.DATA_LOSS,
            )
        self.permanent = permanent

    def forget(self) -> None:
        """See SoftwareTpm."""
        self.power_off()
        self.permanent, self.dirty, self.locality = None, False, 0

    def power_off(self) -> None:
        """See SoftwareTpm."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._tcti is not None:
            self._tcti.close()
            self._tcti = None
        if self._pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        (self._directory / _NV_FILE).unlink(missing_ok=True)

    def _start(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if not os.access(self._program, os.X_OK):
            raise EngineError(
                "TPM_SERVER_START_FAILED",
                f"the worker's user {os.getuid()} has no program that it may run at {self._program}",
                remedy="let all users run the program and pass through its directories: each worker is a user of its own",
            )
        self._spawn()
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            for port, question, answer_size in _PROBES:
                self._probe(port, question, answer_size, deadline)
            self._tcti = TCTILdr("mssim", f"host={_ADDRESS},port={_COMMAND_PORT}")
            self._tcti.set_locality(self._locality)
            self._connection = socket.socket(fileno=os.dup(self._tcti.get_poll_handles()[0].fd))
            # Both sides write a message in pieces, which would wait for each other's delayed acknowledgements.
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, TSS2_Exception) as error:
            self.power_off()
            raise EngineError("TPM_SERVER_START_FAILED", f"tpm_server does not serve: {error}", remedy=_REMEDY) from error

    def _spawn(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_program(parent)
        self._pid, self._pidfd = pid, os.pidfd_open(pid)

    def _become_program(self, parent: int) -> NoReturn:
        try:
            sandbox.die_with_parent(parent)
            # The engine host ignores these, and a program would inherit that: it must end when nobody reads its answers.
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(self._directory)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.execv(self._program, [self._program])  # noqa: S606  # no shell is wanted
        finally:
            os._exit(127)

    def _probe(self, port: int, question: bytes, answer_size: int, deadline: float) -> None:
        """Wait until the program answers on `port`."""
        while True:
            if select.select([self._pidfd], [], [], 0)[0]:
                raise ConnectionError("the program ended at once")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nothing listens on port {port}")
            try:
                # Not create_connection, which has Python load the codec for names: this user may have no right to its files.
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                    sock.settimeout(left)
                    sock.connect((_ADDRESS, port))
                    sock.sendall(question)
                    while answer_size > 0:
                        part = sock.recv(answer_size)
                        if not part:
                            raise ConnectionError(f"port {port} speaks another protocol")
                        answer_size -= len(part)
                    return
            except ConnectionRefusedError:
                time.sleep(0.002)

    # ---- state -----------------------------------------------------------------------------------------------------------

    def _write_state(self, permanent: bytes) -> None:
        with (self._directory / _NV_FILE).open("xb") as file:
            file.write(permanent)

    def _read_state(self) -> bytes:
        # By its name each time, and without following links: whatever the program does to the file, this is what it left.
        try:
            fd = os.open(self._directory / _NV_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise self._lost("its state is no regular file")
                state = file.read(_MAX_STATE_SIZE + 1)
        except OSError as error:
            raise self._lost(f"its state can't be read: {error.strerror}") from error
        if not 0 < len(state) <= _MAX_STATE_SIZE:
            raise self._lost(f"its state has {len(state)} bytes")
        return state

    def _lost(self, why: str) -> EngineError:
        """End the program: after a failure nothing that it says is of use. The worker ends by `lifeline`."""
        self.power_off()
        return EngineError("TPM_SERVER_LOST", f"tpm_server failed: {why}", remedy=_REMEDY)

    # ---- platform: what the program's protocol has no word for --------------------------------------------------------------

    def volatile(self) -> bytes:
        """See SoftwareTpm."""
        raise _cannot("save its volatile state")

    def check_permanent(self, state: bytes) -> None:
        """See SoftwareTpm; only a power on tells."""

    def check_volatile(self, state: bytes, permanent: bytes) -> None:
        """See SoftwareTpm."""
        raise _cannot("take a volatile state")

    def buffer_size(self, wanted: int) -> tuple[int, int, int]:
        """See SoftwareTpm; it is fixed."""
        return MAX_COMMAND_SIZE, MAX_COMMAND_SIZE, MAX_COMMAND_SIZE

    def info(self, flags: int) -> bytes:
        """See SoftwareTpm."""
        return b"{}"

    def hash_start(self) -> int:
        """See SoftwareTpm."""
        raise _cannot("take an H-CRTM event")

    def hash_data(self, data: bytes) -> int:
        """See SoftwareTpm."""
        raise _cannot("take an H-CRTM event")

    def hash_end(self) -> int:
        """See SoftwareTpm."""
        raise _cannot("take an H-CRTM event")

    def established(self) -> bool:
        """See SoftwareTpm."""
        return False

    def reset_established(self) -> int:
        """See SoftwareTpm."""
        raise _cannot("reset the TPM established flag")

    # ---- commands --------------------------------------------------------------------------------------------------------

    def process_in_place(self, size: int) -> bytes:
        """See SoftwareTpm."""
        command = bytes(memoryview(self.command)[:size])
        if size < HEADER_SIZE or HEADER.unpack_from(command)[1] != size:
            # The TCTI hands on whole commands only.
            return error_response(TPM_RC_COMMAND_SIZE)
        response = self._transact(command)
        state = self._read_state()
        if state != self.permanent:
            if self.permanent is not None and len(state) != len(self.permanent):
                raise self._lost(f"its state had {len(self.permanent)} bytes and has {len(state)}")
            self.permanent, self.dirty = state, True
        return response

    def _transact(self, command: bytes) -> bytes:
        tcti, connection = self._tcti, self._connection
        if tcti is None or connection is None:
            raise EngineError("TPM_OFF", "the TPM is off", remedy=_REMEDY)
        try:
            tcti.transmit(command)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if not select.select([connection], [], [], _COMMAND_TIMEOUT_S)[0]:
                raise self._lost(f"it gave no answer within {_COMMAND_TIMEOUT_S:g} s")
            response: bytes = tcti.receive(MAX_COMMAND_SIZE)
        except (OSError, TSS2_Exception) as error:
            raise self._lost(str(error)) from error
        if len(response) < HEADER_SIZE:
            # What it answers when it has no power.
            raise self._lost(f"its answer has {len(response)} bytes")
        return response

    def process(self, command: bytes) -> bytes:
        """See SoftwareTpm."""
        self.command[: len(command)] = command
        return self.process_in_place(len(command))


def _cannot(what: str) -> EngineError:
    return EngineError("ENGINE_CANNOT", f"the engine tpm_server can't {what}", kind=ErrorKind.UNIMPLEMENTED)
