"""One daemon for the tests that leave it as they found it; those that stop it start their own."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def daemon() -> Iterator[DaemonProcess]:
    """A daemon that answers."""
    with DaemonProcess() as process:
        yield process


@pytest.fixture
def own_daemon() -> Iterator[DaemonProcess]:
    """A daemon for one test, to stop, kill and start."""
    with DaemonProcess() as process:
        yield process


@pytest.fixture
def name() -> str:
    """An instance name that no other test uses."""
    return f"vm-{next(_numbers)}"


@pytest.fixture
def running(daemon: DaemonProcess, name: str) -> pb.Instance:
    """An instance that is ON, with small keys."""
    return daemon.running(name)


Tool = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def tool(tmp_path: Path) -> Callable[[pb.Instance], Tool]:
    """Give a runner of tpm2-tools against an instance: `tool(instance)("tpm2_getrandom", "4")`; files in tmp_path."""

    def bind(instance: pb.Instance) -> Tool:
        env = os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={instance.tpm_socket}"}

        def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False, timeout=60)
            if check and done.returncode:
                raise AssertionError(f"{' '.join(command)}: {done.stderr.decode()}")
            return done

        return run

    return bind
