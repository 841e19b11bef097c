"""Clients that keep TPMs busy: many sockets from one process, each with a command under way all the time."""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support import raw
from tests.support.daemon import ROOT
from vtpm.tpm.codes import CommandCode, Tag
from vtpm.tpm.command import build

# TPM2_CreatePrimary of an RSA-2048 storage key in the null hierarchy: the most that one short command makes a TPM calculate.
_RH_NULL = 0x40000007
_RSA_STORAGE_KEY = bytes.fromhex("0001000b00030472000000060080004300100800000000000000")
CREATE_PRIMARY = build(
    CommandCode.CreatePrimary,
    _RH_NULL.to_bytes(4, "big")
    + raw.EMPTY_PASSWORD_AREA
    + bytes.fromhex("000400000000")
    + len(_RSA_STORAGE_KEY).to_bytes(2, "big")
    + _RSA_STORAGE_KEY
    + bytes(2 + 4),
    Tag.SESSIONS,
)
COMMANDS: Mapping[str, bytes] = {
    "PCR_Read": raw.pcr_read(0),
    "NV_Increment": raw.nv_increment(),
    "CreatePrimary": CREATE_PRIMARY,
}


def flood(sockets: Sequence[socket.socket], command: bytes, seconds: float) -> int:
    """Keep a command under way on every socket for `seconds`; return how many were answered."""
    count = 0
    with selectors.EpollSelector() as selector:
        for sock in sockets:
            sock.sendall(command)
            selector.register(sock, selectors.EVENT_READ)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for key, _ in selector.select(0.1):
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                if not peer.recv(4096):
                    raise RuntimeError("a TPM closed its connection")
                count += 1
                peer.send(command)
        for sock in sockets:
            sock.recv(4096)
    return count


@contextmanager
def flooding(path: str, command: str, connections: int) -> Iterator[None]:
    """Have another process flood a VM's socket."""
    words = [sys.executable, "-m", "tests.bench.flood", path, command, str(connections)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
            if process.poll() is not None:
                raise RuntimeError("the flood has ended by itself")
        finally:
            process.kill()


def main(path: str, command: str, connections: int) -> None:
    """Flood until killed."""
    sockets = [raw.connect(path) for _ in range(connections)]
    for sock in sockets:
        raw.ask(sock, COMMANDS[command])
    sys.stdout.write("flooding\n")
    sys.stdout.flush()
    flood(sockets, COMMANDS[command], 3600)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
