"""Descriptors that travel with messages: when too many are on their way, a sender waits."""

from __future__ import annotations

import os
import subprocess
import sys

# As a user without capabilities, to whom the kernel sets this limit.
_PROGRAM = """
import errno, os, resource, socket, sys, threading, time
from vtpm.engine.descriptors import send_patiently
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    for _ in range(50):
        socket.send_fds(ours, [b"x"], [0] * 20)
except OSError as error:
    assert error.errno == errno.ETOOMANYREFS, error
else:
    raise SystemExit("nothing was refused")
read = []
def drain():
    time.sleep(0.1)
    while not read or read[-1] != b"last":
        data, fds, _, _ = socket.recv_fds(theirs, 10, 20)
        read.append(data)
        for fd in fds:
            os.close(fd)
reader = threading.Thread(target=drain)
reader.start()
send_patiently(ours, b"last", [0] * 20)
reader.join()
assert read.count(b"last") == 1
print("sent", len(read))
"""


def test_a_sender_waits_while_too_many_are_on_their_way() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, timeout=60, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sent")
