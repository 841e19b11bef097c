"""A real daemon process in directories of its own, with everything that it left behind removed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.errors import VtpmError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


class DaemonProcess:
    """`start` it, talk to it through `client` or `vtpm`, `stop` or `kill` it, start it again: same directories.

    Sockets need short paths, so `root` is made directly under the temporary directory.
    """

    def __init__(self, *, root: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.root = root or Path(tempfile.mkdtemp(prefix="vtpm "))
        self.state_dir = self.root / "state"
        self.runtime_dir = self.root / "run"
        self.log_path = self.root / "daemon.log"
        self.environment = dict(environment or {})
        # The code that is run; a test may have another version of it.
        self.code = ROOT
        # What starts it, in front of its own command.
        self.prefix: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._hosts: set[int] = set()

    def __enter__(self) -> DaemonProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def env(self) -> dict[str, str]:
        """The environment of the daemon and of the CLI."""
        own = {
            "VTPM_STATE_DIR": str(self.state_dir),
            "VTPM_RUNTIME_DIR": str(self.runtime_dir),
            # Crash points are looked at in the test build only.
            "VTPM_TEST_BUILD": "1",
            # No pool: its refilling takes the processor from what is tested.
            "VTPM_POOL_SIZE": "0",
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("VTPM_")}
        return inherited | own | self.environment

    def launch(self, *flags: str) -> subprocess.Popen[bytes]:
        """Start the process and return at once."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, str(self.code / "server.py"), *flags],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def start(self, *flags: str) -> DaemonProcess:
        """Start and wait until it answers."""
        process = self.launch(*flags)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the daemon ended with {process.returncode}:\n{self.log_text()[-3000:]}")
            if (self.runtime_dir / "operator.sock").exists():
                with contextlib.suppress(VtpmError):
                    self.note_host()
                    return self
            time.sleep(0.01)
        raise RuntimeError(f"the daemon does not answer:\n{self.log_text()[-3000:]}")

    def note_host(self) -> None:
        """Have the engine host that there is now ended with everything else."""
        self._hosts.add(self.client.call(self.client.host.GetHost, pb.GetHostRequest()).engine_host_pid)

    @property
    def client(self) -> Client:
        """A client of the operators' socket."""
        if self._client is None:
            self._client = Client(f"unix:{self.runtime_dir / 'operator.sock'}")
        return self._client

    def stop(self) -> int:
        """End it orderly; what is ON runs on. Returns the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9; what is ON runs on."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.process is None:
            return 0
        self.process.send_signal(number)
        status = self.process.wait(STOP_TIMEOUT_S)
        self.process = None
        return status

    def wait_until_dead(self) -> int:
        """Wait for a death that somebody else caused."""
        assert self.process is not None
        status = self.process.wait(STOP_TIMEOUT_S)
        return self._end(0) if self.process is None else self._gone(status)

    def _gone(self, status: int) -> int:
        self.process = None
        if self._client is not None:
            self._client.close()
            self._client = None
        return status

    def close(self) -> None:
        """End everything and remove the directories."""
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self._end(signal.SIGKILL)
        for pid in self._hosts:
            # Its workers die with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)

    def log_text(self) -> str:
        """What the daemon wrote."""
        return self.log_path.read_text(errors="replace")

    # ---- shortcuts -------------------------------------------------------------------------------------------------------

    def vtpm(self, *arguments: str, check: bool = True, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run the vtpm command against this daemon."""
        command = [str(Path(sys.executable).with_name("vtpm")), *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, check=False, input=stdin, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"vtpm {' '.join(arguments)}: {done.returncode}: {done.stderr.decode()}")
        return done

    def create(self, name: str, **fields: Any) -> pb.Instance:
        """Create an instance; fast keys unless a profile is given."""
        fields.setdefault("profile", pb.Profile(ek_algorithms=[pb.ECC_P256]))
        request = pb.CreateInstanceRequest(name=name, **fields)
        made: pb.Instance = self.client.call(self.client.instances.CreateInstance, request)
        return made

    def power_on(self, name: str, startup: pb.Startup.ValueType = pb.STARTUP_CLEAR) -> pb.Instance:
        """Start an instance."""
        request = pb.StartInstanceRequest(instance=name, startup=startup)
        on: pb.Instance = self.client.call(self.client.instances.StartInstance, request)
        return on

    def hibernate(self, name: str, timeout_s: float = 5) -> pb.Instance:
        """Hibernate an instance, as soon as what it is busy with is done."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                request = pb.HibernateInstanceRequest(instance=name)
                asleep: pb.Instance = self.client.call(self.client.instances.HibernateInstance, request)
                return asleep
            except VtpmError as error:
                if error.reason != "INSTANCE_BUSY" or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    def get(self, name: str) -> pb.Instance:
        """Read an instance."""
        found: pb.Instance = self.client.call(self.client.instances.GetInstance, pb.GetInstanceRequest(instance=name))
        return found

    def running(self, name: str, **fields: object) -> pb.Instance:
        """Create and start."""
        self.create(name, **fields)
        return self.power_on(name)

    def until(self, name: str, state: pb.State.ValueType, timeout_s: float = 10) -> pb.Instance:
        """Wait until the instance has `state`."""
        deadline = time.monotonic() + timeout_s
        while (instance := self.get(name)).state != state:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is {pb.State.Name(instance.state)}: {instance.failure}")
            time.sleep(0.01)
        return instance


def worker_pids(host_pid: int) -> list[int]:
    """The processes that an engine host forked for an instance."""
    children = Path(f"/proc/{host_pid}/task/{host_pid}/children")
    return [int(pid) for pid in children.read_text().split() if not is_spare(int(pid))]


def spare_pids(host_pid: int) -> list[int]:
    """The processes that it forked ahead."""
    children = Path(f"/proc/{host_pid}/task/{host_pid}/children")
    return [int(pid) for pid in children.read_text().split() if is_spare(int(pid))]


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL to each; one that has ended since they were counted is dead already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_spare(pid: int) -> bool:
    """Whether a process is a worker without an instance; also one that has just ended, or has just been forked."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return True
    return name in ("vtpm-spare", "vtpm-engine")


@contextlib.contextmanager
def daemon(**environment: str) -> Iterator[DaemonProcess]:
    """A daemon that answers."""
    process = DaemonProcess(environment=environment)
    try:
        yield process.start()
    finally:
        process.close()
