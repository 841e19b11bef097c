"""A VMM's side of swtpm's control protocol: what QEMU was recorded to say, byte for byte."""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import raw

CRB_BUFFER = 3968
TIS_BUFFER = 4096
CAPABILITY, INIT, SHUTDOWN, ESTABLISHED, LOCALITY = 1, 2, 3, 4, 5
HASH_START, HASH_DATA, HASH_END, CANCEL, STORE_VOLATILE, RESET_ESTABLISHED = 6, 7, 8, 9, 10, 11
GET_STATE, SET_STATE, STOP, CONFIG, DATAFD, BUFFER, INFO, LOCK = 12, 13, 14, 15, 16, 17, 18, 19
PERMANENT, VOLATILE, SAVESTATE = 1, 2, 3


def request(command: int, payload: bytes = b"") -> bytes:
    """A control request."""
    return struct.pack(">I", command) + payload


class Vmm:
    """One VM's control connection and data channel."""

    def __init__(self, control: str | Path) -> None:
        deadline = time.monotonic() + 5
        while True:
            self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.control.settimeout(15)
            try:
                self.control.connect(str(control))
                break
            except ConnectionRefusedError:
                # swtpm's socket is there a moment before it listens.
                self.control.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.data: socket.socket | None = None

    def ask(self, command: int, payload: bytes = b"") -> bytes:
        """Send one request; return the answer (at most 64 kB of it, as it comes)."""
        self.control.sendall(request(command, payload))
        return self.control.recv(65536)

    def exactly(self, size: int) -> bytes:
        """Read `size` bytes."""
        data = b""
        while len(data) < size:
            part = self.control.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def until_quiet(self) -> bytes:
        """Read an answer that may come in parts."""
        data = self.control.recv(65536)
        while select.select([self.control], [], [], 0.03)[0]:
            part = self.control.recv(65536)
            if not part:
                break
            data += part
        return data

    def give_data_channel(self) -> bytes:
        """SET_DATAFD."""
        self.data, other = socket.socketpair()
        self.data.settimeout(15)
        socket.send_fds(self.control, [request(DATAFD)], [other.fileno()])
        other.close()
        return self.control.recv(4)

    def tpm(self, command: bytes) -> bytes:
        """Run a command on the data channel."""
        assert self.data is not None
        return raw.ask(self.data, command)

    def reset(self, buffer_size: int = CRB_BUFFER) -> list[bytes]:
        """What QEMU does at power on and at each reset."""
        return [
            self.ask(STOP),
            self.ask(BUFFER, bytes(4)),
            self.ask(STOP),
            self.ask(BUFFER, struct.pack(">I", buffer_size)),
            self.ask(INIT, bytes(4)),
        ]

    def cold_start(self, buffer_size: int = CRB_BUFFER) -> list[bytes]:
        """Steps 1 to 8 of a cold start; the answers in order."""
        answers = [self.give_data_channel(), self.tpm(bytes.fromhex("80010000000a00000181")), self.ask(CAPABILITY)]
        return answers + self.reset(buffer_size)

    def boot(self) -> Vmm:
        """A cold start and the firmware's first words."""
        self.cold_start()
        raw.rc_of(self.tpm(raw.startup_clear()))
        return self

    def get_state(self, kind: int) -> bytes:
        """GET_STATEBLOB, whole, as QEMU reads it: the header, then the blob."""
        self.control.sendall(request(GET_STATE, struct.pack(">III", 1, kind, 0)))
        result, _flags, total, length = struct.unpack(">IIII", self.exactly(16))
        if result:
            raise AssertionError(hex(result))
        assert total == length
        return self.exactly(length)

    def set_state(self, kind: int, blob: bytes) -> int:
        """SET_STATEBLOB in the two pieces that QEMU sends."""
        self.control.sendall(request(SET_STATE, struct.pack(">III", 0, kind, len(blob))))
        self.control.sendall(blob)
        return int.from_bytes(self.exactly(4), "big")

    def close(self) -> None:
        """Vanish without a word."""
        self.control.close()
        if self.data is not None:
            self.data.close()


@contextmanager
def plain_swtpm(state: Path) -> Iterator[Path]:
    """A swtpm on a control socket, as libvirt starts it; its state directory is made if it is not there."""
    if not state.exists():
        state.mkdir()
        subprocess.run(["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--createek"], check=True, capture_output=True)
    with tempfile.TemporaryDirectory(prefix="swtpm-") as directory:
        control = Path(directory) / "ctrl"
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not control.exists():
                time.sleep(0.01)
            yield control
        finally:
            process.kill()
            process.wait()
