"""A stand-in for the service manager: it keeps descriptors by name, and starts daemons with them, as systemd does."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from tests.support.daemon import ROOT, DaemonProcess
from tests.support.waiting import eventually

# What systemd does between fork and exec: descriptors from 3 on, and the pid that they are meant for.
_LAUNCHER = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
high = [os.dup2(fd, 1000 + number) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number, inheritable=True)
# And nothing else of theirs, which would keep connections open.
os.closerange(3 + len(fds), 1000 + len(fds))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


class ManagedDaemon(DaemonProcess):
    """A daemon whose operators' socket and descriptor store are held by this process."""

    def __init__(self, *, most: int = 1000, abstract: bool = False) -> None:
        super().__init__()
        self.runtime_dir.mkdir(parents=True, mode=0o700)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.runtime_dir / "operator.sock"))
        self.listener.listen(64)
        self._messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"@vtpm-test-{os.getpid()}-{id(self)}" if abstract else str(self.root / "notify")
        self._messages.bind("\0" + address[1:] if abstract else address)
        self.environment |= {"NOTIFY_SOCKET": address, "FDSTORE": str(most)}
        # What is in the store, in the order in which it came.
        self.stored: list[tuple[str, int]] = []
        self.removed: list[str] = []
        self.refusing = False
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(253 * 4)
        while True:
            text, ancillary, _, _ = self._messages.recvmsg(4096, space)
            if text == b"END":
                return
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            fields = dict(line.split("=", 1) for line in text.decode().splitlines())
            name = fields.get("FDNAME", "stored")
            if fields.get("FDSTORE") == "1" and fields.get("FDPOLL") == "0" and not self.refusing:
                self.stored += [(name, fd) for fd in fds]
                continue
            for fd in fds:
                os.close(fd)
            if fields.get("FDSTOREREMOVE") == "1":
                self.removed.append(name)
                for item in [item for item in self.stored if item[0] == name]:
                    self.stored.remove(item)
                    os.close(item[1])

    def launch(self, *flags: str) -> subprocess.Popen[bytes]:
        fds = [self.listener.fileno(), *(fd for _, fd in self.stored)]
        names = ":".join(["vtpm.socket", *(name for name, _ in self.stored)])
        command = [sys.executable, "-c", _LAUNCHER, ",".join(map(str, fds)), names, str(ROOT / "server.py"), *flags]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True, pass_fds=fds)
        return self.process

    def eventually(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until something holds."""
        eventually(condition, timeout_s, told=lambda: f"{self.stored}\n{self.log_text()[-3000:]}")

    def leave(self) -> None:
        """Listen to nobody any more."""
        if self._messages.fileno() >= 0:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
                own.sendto(b"END", self._messages.getsockname())
            self._thread.join(5)
            self._messages.close()

    def close(self) -> None:
        self.leave()
        super().close()
        for _, fd in self.stored:
            os.close(fd)
        self.listener.close()
