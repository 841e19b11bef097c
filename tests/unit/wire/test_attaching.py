"""Connections to a control socket that wait to be attached have a bound, each instance's its own."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from vtpm.instance.model import InstanceChange
from vtpm.store.model import InstanceRecord
from vtpm.wire import swtpm
from vtpm.wire.doors import listen_at
from vtpm.wire.swtpm import ControlSockets


class Port:
    """A manager of which nothing is attached before `free` is set."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.free = asyncio.Event()
        self.attaching = 0

    def all(self) -> AsyncIterator[InstanceRecord]:
        raise NotImplementedError

    def listen_for_vm(self, record: InstanceRecord) -> socket.socket:
        return listen_at(self._directory / record.name)

    async def attach(self, ref: str, connection: socket.socket) -> None:
        self.attaching += 1
        await self.free.wait()


def record(name: str) -> InstanceRecord:
    made = object.__new__(InstanceRecord)
    object.__setattr__(made, "id", uuid.uuid4())
    object.__setattr__(made, "name", name)
    return made


async def test_only_so_many_wait_to_be_attached(tmp_path: Path) -> None:
    port = Port(tmp_path)
    control = ControlSockets(port)
    for name in ("one", "other"):
        control.on_change(InstanceChange("CREATED", record(name)))
    held = []
    for name, count in (("one", 3 * swtpm._MAX_ATTACHING), ("other", 1)):
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(tmp_path / name))
            held.append(sock)
    for _ in range(2000):
        if port.attaching > swtpm._MAX_ATTACHING and sum(map(_is_closed, held)) >= 2 * swtpm._MAX_ATTACHING:
            break
        await asyncio.sleep(0.01)
    assert sum(map(_is_closed, held)) == 2 * swtpm._MAX_ATTACHING
    assert port.attaching == swtpm._MAX_ATTACHING + 1
    port.free.set()
    await control.close()
    for sock in held:
        sock.close()


def _is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
