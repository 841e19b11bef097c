"""Test suites of others, run against instances of a daemon that hibernate before every command.

A suite starts `swtpm` for itself; here that is a shell script which leaves its command line in a directory and waits, and
`Suite` serves the ports that it names.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from importlib.metadata import version
from pathlib import Path

from tests.support.daemon import DaemonProcess
from tests.support.interrupt import Interrupter
from tests.support.vmassets import cache_directory
from vtpm.api.v1 import instance_pb2 as pb

_SWTPM = """#!/bin/sh
trap 'touch "$SPOOL/$$.end"; exit 0' TERM INT
echo "$*" >"$SPOOL/$$.new"
mv "$SPOOL/$$.new" "$SPOOL/$$.start"
while :; do sleep 60 & wait; done
"""
_DOWNLOAD_TIMEOUT_S = 300


class SuiteUnavailableError(Exception):
    """The suite is not cached and can't be downloaded."""


def tpm2_pytss() -> Path:
    """The tests of tpm2-pytss, of the version that is installed; from its source distribution.

    Raises:
        SuiteUnavailableError: it can't be had.
    """
    directory = cache_directory() / "suites"
    name = f"tpm2_pytss-{version('tpm2-pytss')}"
    if not (directory / name).is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        wanted = f"tpm2-pytss=={version('tpm2-pytss')}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            "tpm2-pytss",
            "-d",
            str(directory),
        ]
        try:
            subprocess.run([*command, wanted], check=True, capture_output=True, timeout=_DOWNLOAD_TIMEOUT_S)
            with tarfile.open(next(directory.glob(f"{name}*.tar.gz"))) as archive:
                archive.extractall(directory, filter="data")
        except (OSError, subprocess.SubprocessError, StopIteration) as error:
            raise SuiteUnavailableError(f"the source of {wanted} can't be downloaded: {type(error).__name__}") from error
    return directory / name / "test"


class Suite:
    """Runs a suite; `interruptions` says how many hibernations it went through."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._spool = daemon.root / "spool"
        self._bin = daemon.root / "bin"
        self._served: dict[str, tuple[Interrupter, str]] = {}
        self.interruptions = 0
        for directory in (self._spool, self._bin):
            directory.mkdir()
        program = self._bin / "swtpm"
        program.write_text(_SWTPM)
        program.chmod(0o755)

    def run(self, directory: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run pytest in `directory`."""
        ended = threading.Event()
        server = threading.Thread(target=self._serve, args=(ended,))
        server.start()
        paths = {"PATH": f"{self._bin}:{os.environ['PATH']}", "SPOOL": str(self._spool), "TSS2_LOG": "all+none"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
        try:
            return subprocess.run(command, cwd=directory, env=self._daemon.env | paths, capture_output=True, check=False)
        finally:
            ended.set()
            server.join()
            for key in list(self._served):
                self._end(key)

    def _serve(self, ended: threading.Event) -> None:
        while not ended.is_set():
            for path in self._spool.iterdir():
                if path.suffix == ".start":
                    text = path.read_text()
                    path.unlink()
                    self._begin(path.stem, text)
                elif path.suffix == ".end":
                    path.unlink()
                    self._end(path.stem)
            time.sleep(0.005)

    def _begin(self, key: str, text: str) -> None:
        ports = [re.search(rf"--{option} \S*?port=(\d+)", text) for option in ("server", "ctrl")]
        listeners: list[socket.socket] = []
        try:
            listeners += [_listen(int(port[1])) for port in ports if port is not None]
        except OSError:
            # As swtpm: it ends where a port is taken, and the suite tries others.
            os.kill(int(key), signal.SIGTERM)
            return
        name = f"suite-{uuid.uuid4().hex[:12]}"
        # The banks that swtpm has.
        banks = [pb.SHA1, pb.SHA256, pb.SHA384, pb.SHA512]
        self._daemon.create(name, profile=pb.Profile(ek_algorithms=[pb.ECC_P256], pcr_banks=banks))
        # Its owner sends TPM2_Startup.
        instance = self._daemon.power_on(name, pb.STARTUP_NONE)
        self._served[key] = Interrupter(self._daemon, instance, listeners), name

    def _end(self, key: str) -> None:
        if key in self._served:
            between, name = self._served.pop(key)
            between.__exit__()
            self.interruptions += between.count
            client = self._daemon.client
            client.call(client.instances.StopInstance, pb.StopInstanceRequest(instance=name))


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(16)
    return listener
