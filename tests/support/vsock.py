"""A gRPC client's way over AF_VSOCK, which gRPC's wheels do not know. Runs inside the test VM too."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

# Module vsock_loopback's: what connects to it comes from it.
LOCAL_CID = 1


@contextlib.contextmanager
def through_vsock(path: Path, port: int) -> Iterator[None]:
    """Stand in for gRPC's missing vsock: what comes on the unix socket `path` goes to `port` by vsock's loopback."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        near, far = [], []

        def copy(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near.append(listener.accept()[0])
                    far.append(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
                    far[-1].connect((LOCAL_CID, port))
                    for ends in ((near[-1], far[-1]), (far[-1], near[-1])):
                        threading.Thread(target=copy, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        for sock in (*near, *far):
            sock.close()
