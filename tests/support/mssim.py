"""The TPM simulator's ports of a daemon, as their clients use them: by hand, with tpm2-tools, with IBM's TSS tools."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from pathlib import Path

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2

SEND_COMMAND = 8
DONE, REFUSED = bytes(4), b"\0\0\0\x01"


class Simulator:
    """An instance as its clients on the ports see it."""

    def __init__(self, daemon: DaemonProcess, name: str, port: int, directory: Path) -> None:
        self.daemon, self.name, self.port = daemon, name, port
        self.directory = directory

    def connect(self, *, platform: bool = False) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port + platform), 20)

    def ask(self, sock: socket.socket, command: bytes, locality: int = 0) -> bytes:
        """Send a TPM command, return the TPM's response."""
        sock.sendall(struct.pack(">IBI", SEND_COMMAND, locality, len(command)) + command)
        (size,) = struct.unpack(">I", receive(sock, 4))
        response = receive(sock, size)
        assert receive(sock, 4) == DONE
        return response

    def signal(self, code: int) -> bytes:
        with self.connect(platform=True) as sock:
            sock.sendall(struct.pack(">I", code))
            return receive(sock, 4)

    def tool(self, *command: str, server_type: str = "mssim", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of the tools; files are in the test's directory."""
        env = os.environ | {
            "TPM2TOOLS_TCTI": f"mssim:host=127.0.0.1,port={self.port}",
            "TPM_INTERFACE_TYPE": "socsim",
            "TPM_SERVER_NAME": "127.0.0.1",
            "TPM_SERVER_TYPE": server_type,
            "TPM_COMMAND_PORT": str(self.port),
            "TPM_PLATFORM_PORT": str(self.port + 1),
            "TPM_DATA_DIR": str(self.directory),
        }
        done = subprocess.run(command, env=env, cwd=self.directory, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done

    def alive(self) -> bool:
        with self.connect() as sock:
            return raw.rc_of(self.ask(sock, raw.get_random(8))) == 0

    def pcr(self, index: int) -> bytes:
        """What the service itself reads."""
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[index])
        request = tpm_pb2.ReadPcrsRequest(instance=self.name, selections=[selection])
        values = self.daemon.client.call(self.daemon.client.tpm.ReadPcrs, request).values
        return bytes(values[0].digest)

    @property
    def state(self) -> pb.State.ValueType:
        return self.daemon.get(self.name).state


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, f"the connection was closed after {len(data)} of {size} bytes"
        data += part
    return data


def rest(sock: socket.socket) -> bytes:
    """What still comes before the connection is closed."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(4096):
            data += part
    return data
