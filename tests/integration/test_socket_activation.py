"""systemd's part is played by a launcher: it holds the operators' socket and starts daemons with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import ROOT, DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client

# What systemd does between fork and exec: descriptor 3, and the pid that it is meant for.
_LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.executable, [sys.executable, sys.argv[3]])
"""


class Activated(DaemonProcess):
    """A daemon whose operators' socket is held by this process."""

    def __init__(self) -> None:
        super().__init__()
        self.runtime_dir.mkdir(parents=True, mode=0o700)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.runtime_dir / "operator.sock"))
        self.listener.listen(64)
        self.messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.messages.bind(str(self.root / "notify"))
        self.messages.settimeout(30)
        self.environment["NOTIFY_SOCKET"] = str(self.root / "notify")
        self.count = "1"

    def launch(self, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _LAUNCHER, str(self.listener.fileno()), self.count, str(ROOT / "server.py"), *flags]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True, pass_fds=[self.listener.fileno()]
            )
        return self.process

    def close(self) -> None:
        super().close()
        self.listener.close()
        self.messages.close()


@pytest.fixture
def activated() -> Iterator[Activated]:
    """A daemon that answers on a socket that is not its own."""
    daemon = Activated()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def test_the_service_manager_is_told_when_it_is_ready_and_when_it_stops(activated: Activated) -> None:
    assert activated.messages.recv(100) == b"READY=1"
    assert activated.stop() == 0
    assert activated.messages.recv(100) == b"STOPPING=1"


def test_a_call_made_while_the_daemon_is_away_waits_for_the_next_one(activated: Activated) -> None:
    activated.create("web-1")
    path = activated.runtime_dir / "operator.sock"
    inode = path.stat().st_ino
    activated.stop()
    assert path.stat().st_ino == inode, "the socket is not the daemon's to remove"
    answered: list[str] = []

    def call() -> None:
        client = Client(f"unix:{path}")
        answered.append(client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance="web-1")).name)
        client.close()

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive(), "it waits"
    activated.start()
    thread.join(30)
    assert answered == ["web-1"]
    # And once more after kill -9, with the daemon not even told.
    activated.kill()
    thread = threading.Thread(target=call)
    thread.start()
    activated.start()
    thread.join(30)
    assert answered == ["web-1"] * 2
    assert path.stat().st_ino == inode


def test_who_gets_more_than_one_socket_says_so_and_does_not_start() -> None:
    daemon = Activated()
    daemon.count = "2"
    try:
        daemon.launch()
        assert daemon.wait_until_dead() == 2
        assert "ACTIVATION_UNUSABLE" in daemon.log_text()
    finally:
        daemon.close()


def test_a_socket_meant_for_another_process_is_left_alone(tmp_path: Path) -> None:
    daemon = DaemonProcess(environment={"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
    try:
        daemon.start()
        assert daemon.create("web-1").name == "web-1"
        assert (daemon.runtime_dir / "operator.sock").is_socket()
    finally:
        daemon.close()
