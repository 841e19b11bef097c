"""Stands in for ibmswtpm2's `tpm_server`: the mssim protocol and the NVChip file, with a real libtpms TPM behind them.

As the original: two ports, one client each at a time; NVChip in the working directory, of a fixed size, written whole before a
command that changed it is answered; a new TPM is made when NVChip is missing or of another size; no authentication.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtpm.engine.libtpms import Libtpms

NV_SIZE = 192 << 10
NV_FILE = Path("NVChip")
U32 = struct.Struct(">I")
DONE = U32.pack(0)

POWER_ON, POWER_OFF, SEND_COMMAND, HANDSHAKE, RESET, SESSION_END, STOP = 1, 2, 8, 15, 17, 20, 21
IGNORED = (3, 4, 9, 10, 11, 12)


class Simulator:
    """One TPM; its NV memory is the length of libtpms' permanent state, the state, and 0xff up to `nv_size`."""

    def __init__(self, nv_size: int) -> None:
        self.nv_size = nv_size
        self.tpm = Libtpms()
        self.powered = True
        self.lock = threading.Lock()
        state = self._load()
        if state is None:
            self.tpm.manufacture()
            self._store()
            state = self.tpm.permanent
        assert state is not None
        self.tpm.power_on(state)

    def _load(self) -> bytes | None:
        try:
            nv = NV_FILE.read_bytes()
        except FileNotFoundError:
            return None
        if len(nv) != self.nv_size:
            return None
        (size,) = U32.unpack_from(nv)
        return nv[U32.size : U32.size + size]

    def _store(self) -> None:
        state = self.tpm.permanent
        assert state is not None
        nv = (U32.pack(len(state)) + state).ljust(self.nv_size, b"\xff")
        assert len(nv) == self.nv_size
        # In place, as the original.
        NV_FILE.touch()
        with NV_FILE.open("r+b") as file:
            file.write(nv)
            file.truncate()
        self.tpm.dirty = False

    def run(self, locality: int, command: bytes) -> bytes:
        with self.lock:
            if not self.powered:
                return b""
            self.tpm.locality = locality
            response = self.tpm.process(command)
            if self.tpm.dirty:
                self._store()
            return response

    def signal(self, number: int) -> None:
        with self.lock:
            if number == POWER_OFF:
                self.powered = False
            elif number == RESET or not self.powered:
                assert self.tpm.permanent is not None
                self.tpm.power_on(self.tpm.permanent)
                self.powered = True


def receive(client: socket.socket, size: int) -> bytes:
    data = client.recv(size, socket.MSG_WAITALL)
    if len(data) != size:
        raise EOFError
    return data


def serve_commands(simulator: Simulator, client: socket.socket) -> None:
    while True:
        (number,) = U32.unpack(receive(client, 4))
        if number == SEND_COMMAND:
            locality, size = struct.unpack(">BI", receive(client, 5))
            response = simulator.run(locality, receive(client, size) if size else b"")
            client.sendall(U32.pack(len(response)) + response)
        elif number == HANDSHAKE:
            receive(client, 4)
            client.sendall(struct.pack(">II", 1, 0x0D))
        elif number == STOP:
            os._exit(0)
        else:
            return
        client.sendall(DONE)


def serve_platform(simulator: Simulator, client: socket.socket) -> None:
    while True:
        (number,) = U32.unpack(receive(client, 4))
        if number in (POWER_ON, POWER_OFF, RESET):
            simulator.signal(number)
        elif number == STOP:
            os._exit(0)
        elif number not in IGNORED:
            client.sendall(U32.pack(number != SESSION_END))
            return
        client.sendall(DONE)


def listen(port: int) -> socket.socket:
    # On all interfaces, as the original.
    return socket.create_server(("", port), backlog=3)


def accept(listener: socket.socket, simulator: Simulator, platform: bool) -> None:
    serve = serve_platform if platform else serve_commands
    while True:
        client, _ = listener.accept()
        with client:
            try:
                serve(simulator, client)
            except (EOFError, ConnectionError):
                continue


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-port", type=int, default=2321)
    parser.add_argument("--nv-size", type=int, default=NV_SIZE)
    options = parser.parse_args()
    simulator = Simulator(options.nv_size)
    platform = listen(options.port + 1)
    commands = listen(options.port)
    threading.Thread(target=accept, args=(platform, simulator, True), daemon=True).start()
    accept(commands, simulator, False)


if __name__ == "__main__":
    main()
