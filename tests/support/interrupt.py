"""A hibernation before every command: a go-between on the sockets of an instance, for clients that know nothing of it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb


def listen_in(directory: Path) -> tuple[Path, list[socket.socket]]:
    """A data socket and its control twin; give its path to a client."""
    path = directory / "t.sock"
    listeners = []
    for suffix in ("", ".ctrl"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{path}{suffix}")
        listener.listen(16)
        listeners.append(listener)
    return path, listeners


class Interrupter:
    """Serves `listeners`, the data socket and its control twin; what a client sends goes on to a TPM that has just been made to
    hibernate. `count` says how often."""

    def __init__(self, daemon: DaemonProcess, instance: pb.Instance, listeners: Sequence[socket.socket]) -> None:
        self._daemon = daemon
        self._name = instance.name
        self.count = 0
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        for listener, suffix in zip(listeners, ("", ".ctrl"), strict=True):
            self._begin(self._accept, listener, f"{instance.tpm_socket}{suffix}")

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket, target: str) -> None:
        with listener:
            while not self._ending.is_set():
                if select.select([listener], [], [], 0.1)[0]:
                    client, _ = listener.accept()
                    upstream = socket.socket(socket.AF_UNIX)
                    upstream.connect(target)
                    self._begin(self._carry, client, upstream)

    def _carry(self, client: socket.socket, upstream: socket.socket) -> None:
        with client, upstream, contextlib.suppress(OSError):
            while not self._ending.is_set():
                for sock in select.select([client, upstream], [], [], 0.1)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    if sock is client:
                        with self._lock:
                            self._daemon.hibernate(self._name)
                            self.count += 1
                    (upstream if sock is client else client).sendall(data)

    def __enter__(self) -> Interrupter:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(5)
