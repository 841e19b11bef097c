"""The vsock relay's core on socket pairs: bytes both ways, half-closed ends, bounds, and who is turned away."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from vtpm.errors import ConfigError, NotFoundError
from vtpm.store.model import InstanceRecord, InstanceState
from vtpm.wire import relay as relaying
from vtpm.wire import vsock
from vtpm.wire.vsock import Relay, VsockServer, listen

CID = 42


class Guest:
    """An instance `vm` whose guest socket is served by the test: it hands out what was accepted."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "guest.sock"
        self.state = InstanceState.ON
        self.accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def get(self, ref: str) -> InstanceRecord:
        if ref != "vm":
            raise NotFoundError("INSTANCE_NOT_FOUND", "there is no such instance")
        return cast(InstanceRecord, SimpleNamespace(id="the-id", name="vm", state=self.state))

    def guest_socket(self, record: InstanceRecord) -> Path:
        return self.path

    async def on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.put_nowait((reader, writer))


class Peer:
    """The far end of a connection that a relay carries."""

    def __init__(self, relay: Relay, cid: int = CID) -> None:
        self.sock, near = socket.socketpair()
        for sock in (self.sock, near):
            sock.setblocking(False)
        self.carrying = asyncio.create_task(relay.carry(near, cid))

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), 5)

    async def receive(self, size: int = 1 << 16) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, size), 5)

    async def closed(self) -> bool:
        await asyncio.wait_for(self.carrying, 5)
        return await self.receive() == b""


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    guest = Guest(tmp_path)
    server = await asyncio.start_unix_server(guest.on_connect, guest.path)
    yield guest
    server.close()


@pytest.fixture
def relay(guest: Guest) -> Relay:
    return Relay(guest, {CID: "vm", 43: "absent"})


async def test_bytes_go_both_ways_untouched(guest: Guest, relay: Relay) -> None:
    peer = Peer(relay)
    reader, writer = await guest.accepted.get()
    question, answer = os.urandom(300_000), os.urandom(300_000)
    sending = asyncio.create_task(peer.send(question))
    assert await reader.readexactly(len(question)) == question
    await sending
    writer.write(answer)
    received = b""
    while len(received) < len(answer):
        received += await peer.receive()
    assert received == answer
    writer.close()
    peer.sock.close()
    await asyncio.wait_for(peer.carrying, 5)


async def test_a_peer_that_has_said_all_still_gets_its_answer(guest: Guest, relay: Relay) -> None:
    peer = Peer(relay)
    await peer.send(b"that is all")
    peer.sock.shutdown(socket.SHUT_WR)
    reader, writer = await guest.accepted.get()
    assert await reader.read() == b"that is all"
    writer.write(b"heard")
    await writer.drain()
    assert await peer.receive() == b"heard"
    writer.close()
    assert await peer.closed()


async def test_an_end_of_the_guest_server_is_seen_by_the_peer_who_may_still_speak(guest: Guest, relay: Relay) -> None:
    peer = Peer(relay)
    reader, writer = await guest.accepted.get()
    writer.write_eof()
    assert await peer.receive() == b""
    await peer.send(b"yet this")
    peer.sock.shutdown(socket.SHUT_WR)
    assert await reader.read() == b"yet this"
    await asyncio.wait_for(peer.carrying, 5)


async def test_the_last_words_of_a_guest_server_that_ends_arrive_though_the_peer_speaks_on(guest: Guest, relay: Relay) -> None:
    peer = Peer(relay)
    _, writer = await guest.accepted.get()
    last_words = os.urandom(150_000)
    writer.write(last_words)
    # Gone with the peer's bytes unread: what the relay writes to it fails from now on.
    await asyncio.wait_for(writer.drain(), 5)
    await peer.send(b"one more thing")
    closing = asyncio.create_task(_close(writer))
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := await peer.receive(1 << 12):
            received += data
            with contextlib.suppress(ConnectionError):
                await peer.send(b"and another")
    assert received == last_words
    await closing


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def test_a_half_closed_connection_does_not_stay_for_ever(
    guest: Guest, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "_HALF_CLOSED_TIMEOUT_S", 0.1)
    peer = Peer(relay)
    reader, _ = await guest.accepted.get()
    peer.sock.shutdown(socket.SHUT_WR)
    assert await reader.read() == b""
    assert await peer.closed()


async def test_a_peer_that_never_reads_is_dropped_and_slows_the_other_end_down_until_then(
    guest: Guest, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "_STALL_TIMEOUT_S", 0.3)
    peer = Peer(relay)
    _, writer = await guest.accepted.get()
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 << 20:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16
    assert sent < 8 << 20, "no more than what sockets hold"
    await asyncio.wait_for(peer.carrying, 5)


async def test_a_cid_without_an_instance_is_turned_away(guest: Guest, relay: Relay) -> None:
    for cid in (0, 1, 41, 2**32 - 1):
        assert await Peer(relay, cid).closed()
    assert guest.accepted.empty()


async def test_an_instance_that_is_absent_or_not_on_is_not_reached(guest: Guest, relay: Relay) -> None:
    assert await Peer(relay, 43).closed()
    for guest.state in (InstanceState.OFF, InstanceState.FAILED):
        assert await Peer(relay).closed()
    assert guest.accepted.empty()
    guest.state = InstanceState.ON
    Peer(relay)
    await asyncio.wait_for(guest.accepted.get(), 5)


async def test_a_guest_socket_that_is_not_there_yet_closes_the_connection(guest: Guest, relay: Relay) -> None:
    guest.path = guest.path.with_name("not yet")
    assert await Peer(relay).closed()


async def test_a_cid_has_sixteen_connections_and_gets_room_when_one_ends(guest: Guest, relay: Relay) -> None:
    peers = [Peer(relay) for _ in range(16)]
    for _ in peers:
        await asyncio.wait_for(guest.accepted.get(), 5)
    assert await Peer(relay).closed()
    peers[0].sock.close()
    peers[1].sock.close()
    for peer in peers[:2]:
        peer.carrying.cancel()
        await asyncio.gather(peer.carrying, return_exceptions=True)
    Peer(relay)
    await asyncio.wait_for(guest.accepted.get(), 5)


async def test_a_connection_that_is_cut_leaves_nothing_open(guest: Guest, relay: Relay) -> None:
    peer = Peer(relay)
    reader, _ = await guest.accepted.get()
    peer.carrying.cancel()
    assert await reader.read() == b""
    assert await peer.receive() == b""


# ---- the listener --------------------------------------------------------------------------------------------------------


def failing(number: int) -> type:
    class Failing:
        def __init__(self, *arguments: object) -> None:
            raise OSError(number, os.strerror(number))

    return Failing


def test_a_kernel_without_vsock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", failing(errno.EAFNOSUPPORT))
    with pytest.raises(ConfigError) as refused:
        listen(7000)
    assert (refused.value.reason, refused.value.subject) == ("VSOCK_UNSUPPORTED", "vsock_port")
    assert "vsock_port = 0" in refused.value.remedy


def test_a_port_that_is_taken_is_named() -> None:
    try:
        first = listen(socket.VMADDR_PORT_ANY)
    except ConfigError as error:
        pytest.skip(f"no AF_VSOCK listener can be made here: {error.message}")
    with first, pytest.raises(ConfigError) as refused:
        listen(first.getsockname()[1])
    assert (refused.value.reason, refused.value.subject) == ("VSOCK_PORT_UNUSABLE", "vsock_port")


async def test_the_server_takes_the_peers_cid_from_the_kernel(
    guest: Guest, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a unix listener in place of vsock's; what accept says of the peer is put in by hand."""
    path = tmp_path / "vsock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    monkeypatch.setattr(vsock, "listen", lambda port: listener)
    server = VsockServer(relay, 7000)
    monkeypatch.setattr(server, "_handle", lambda sock, peer: VsockServer._handle(server, sock, (CID, 1023)))
    server.start()
    _, peer_writer = await asyncio.open_unix_connection(path)
    peer_writer.write(b"hello")
    reader, _ = await asyncio.wait_for(guest.accepted.get(), 5)
    assert await reader.readexactly(5) == b"hello"
    await asyncio.wait_for(server.close(), 5)
    assert await reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_unix_connection(path)
