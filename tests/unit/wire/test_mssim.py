"""The mssim ports in front of instances that are only told of: bounds, patience and the end."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import pytest

from tests.support.ports import free_pair
from vtpm.errors import ConfigError, FailedPreconditionError, NotFoundError
from vtpm.store.model import InstanceRecord
from vtpm.tpm.ptm import ControlCommand
from vtpm.wire import mssim
from vtpm.wire.mssim import MssimServers

POWER_ON, POWER_OFF, SEND_COMMAND, RESET, SESSION_END = 1, 2, 8, 17, 20
DONE = bytes(4)
REFUSED = b"\0\0\0\x01"
IGNORED = [3, 4, 9, 10, 11, 12, 13, 14, 30]


class Instances:
    """One instance, `vm`, that answers a command with itself; `calls` is what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.called = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, ref: str) -> InstanceRecord:
        if ref != "vm":
            raise NotFoundError("INSTANCE_NOT_FOUND", "there is no such instance")
        return cast(InstanceRecord, SimpleNamespace(id="the-id", name="vm"))

    async def execute(self, ref: str, command: bytes, locality: int) -> bytes:
        await self._call(f"execute {ref} {locality}")
        return command

    async def start(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        return await self._call(f"start {ref} {startup_clear}")

    async def stop(self, ref: str, *, revision: int | None) -> InstanceRecord:
        return await self._call(f"stop {ref}")

    async def reset(self, ref: str, *, startup_clear: bool, revision: int | None) -> InstanceRecord:
        return await self._call(f"reset {ref} {startup_clear}")

    async def _call(self, what: str) -> InstanceRecord:
        self.calls.append(what)
        self.called.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await self.get("vm")

    async def hash_sequence(self, ref: str, command: ControlCommand, data: bytes) -> None:
        self.calls.append(command.name.lower())
        if self.error is not None:
            raise self.error


class Served:
    """A running pair of ports."""

    def __init__(self, instances: Instances, servers: MssimServers, port: int) -> None:
        self.instances, self.servers, self.port = instances, servers, port

    async def commands(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def platform(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port + 1))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, sent: bytes, size: int) -> bytes:
        self.writer.write(sent)
        return await asyncio.wait_for(self.reader.readexactly(size), 5)

    async def closed(self) -> bytes:
        """Return what comes before the end."""
        try:
            return await asyncio.wait_for(self.reader.read(), 5)
        except ConnectionError:
            return b""


def signal(code: int) -> bytes:
    return struct.pack(">I", code)


def command(body: bytes, locality: int = 0) -> bytes:
    return struct.pack(">IBI", SEND_COMMAND, locality, len(body)) + body


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    instances, port = Instances(), free_pair()
    servers = MssimServers(instances, "127.0.0.1", {"vm": port})
    servers.start()
    yield Served(instances, servers, port)
    instances.gate.set()
    await servers.close(1)


async def test_a_command_goes_to_the_tpm_at_its_locality_and_its_answer_comes_back(served: Served) -> None:
    client = await served.commands()
    assert await client.ask(command(b"what", 3), 12) == b"\0\0\0\x04what" + DONE
    assert served.instances.calls == ["execute the-id 3"]


async def test_a_bare_command_gets_a_bare_answer(served: Served) -> None:
    client, bare = await served.commands(), bytes.fromhex("8001 0000000a 0000017e")
    assert await client.ask(bare, len(bare)) == bare
    assert await client.ask(bare + command(b"x"), len(bare) + 9) == bare + b"\0\0\0\x01x" + DONE


async def test_a_locality_above_four_is_the_tpms_error(served: Served) -> None:
    client = await served.commands()
    assert (await client.ask(command(b"what", 5), 18))[4:14] == bytes.fromhex("8001 0000000a 00000907")
    assert served.instances.calls == []


async def test_requests_that_come_together_are_answered_in_order(served: Served) -> None:
    client = await served.commands()
    answers = await client.ask(b"".join(command(struct.pack(">I", number)) for number in range(500)), 500 * 12)
    assert [answers[at + 4 : at + 8] for at in range(0, len(answers), 12)] == [struct.pack(">I", n) for n in range(500)]


async def test_the_handshake_names_version_one_and_turns_version_nought_away(served: Served) -> None:
    client = await served.commands()
    assert await client.ask(struct.pack(">II", 15, 1), 12) == struct.pack(">III", 1, 5, 0)
    assert await client.ask(struct.pack(">II", 16, 7), 4) == DONE
    client.writer.write(struct.pack(">II", 15, 0))
    assert await client.closed() == b""


async def test_power_signals_do_what_they_say_without_startup(served: Served) -> None:
    client = await served.platform()
    for code in (POWER_ON, POWER_OFF, RESET):
        assert await client.ask(signal(code), 4) == DONE
    assert served.instances.calls == ["start the-id False", "stop the-id", "reset the-id False"]


@pytest.mark.parametrize("code", IGNORED)
async def test_signals_without_a_meaning_are_acknowledged(served: Served, code: int) -> None:
    client = await served.platform()
    assert await client.ask(signal(code), 4) == DONE
    assert served.instances.calls == []


async def test_a_signal_that_failed_is_not_acknowledged_as_done(served: Served) -> None:
    client = await served.platform()
    served.instances.error = FailedPreconditionError("INSTANCE_FAILED", "the instance is FAILED")
    assert await client.ask(signal(POWER_ON), 4) == REFUSED
    served.instances.error = FailedPreconditionError("INSTANCE_OFF", "an instance that is OFF can't be reset")
    assert await client.ask(signal(RESET), 4) == DONE, "a reset without power is nothing"


@pytest.mark.parametrize("code", [SESSION_END, 21])
async def test_the_end_of_a_session_and_stop_end_the_connection_alone(served: Served, code: int) -> None:
    for client in (await served.commands(), await served.platform()):
        client.writer.write(signal(code))
        assert await client.closed() == b""
    assert served.instances.calls == []
    assert await (await served.platform()).ask(signal(11), 4) == DONE


HASH_PARTS = {"hash_start": signal(5), "hash_data": struct.pack(">II", 6, 3) + b"abc", "hash_end": signal(7)}


async def test_the_parts_of_an_h_crtm_event_reach_the_instance(served: Served) -> None:
    client = await served.commands()
    for part in HASH_PARTS.values():
        assert await client.ask(part, 4) == DONE
    assert served.instances.calls == list(HASH_PARTS)


@pytest.mark.parametrize("part", HASH_PARTS)
async def test_success_of_a_hash_sequence_is_not_pretended(served: Served, part: str) -> None:
    served.instances.error = FailedPreconditionError("HASH_REFUSED", "the TPM refuses")
    client = await served.commands()
    client.writer.write(HASH_PARTS[part])
    assert await client.closed() == b""


async def test_what_is_not_understood_ends_the_connection(served: Served) -> None:
    client = await served.platform()
    client.writer.write(signal(99))
    assert await client.closed() == REFUSED
    client = await served.commands()
    client.writer.write(signal(99))
    assert await client.closed() == b""


async def test_without_power_the_connection_is_closed(served: Served) -> None:
    served.instances.error = FailedPreconditionError("INSTANCE_NOT_ON", "the instance is OFF")
    client = await served.commands()
    client.writer.write(command(b"what"))
    assert await client.closed() == b""


async def test_half_a_request_and_silence_is_closed_and_silence_alone_is_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mssim, "_REQUEST_TIMEOUT_S", 0.2)
    silent, half, dribbling = await served.commands(), await served.commands(), await served.commands()
    half.writer.write(command(b"what")[:-1])
    assert await half.closed() == b""
    for byte in command(bytes(20)):
        dribbling.writer.write(bytes([byte]))
        await asyncio.sleep(0.02)
    assert await dribbling.closed() == b"", "a byte now and then does not win time"
    assert await silent.ask(command(b"what"), 12)


async def test_a_client_that_never_reads_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mssim, "_SEND_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", served.port)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        burst = command(bytes(4096)) * 64

        async def talk() -> None:
            while True:
                await asyncio.get_running_loop().sock_sendall(deaf, burst)

        with pytest.raises((ConnectionError, TimeoutError)) as dropped:
            await asyncio.wait_for(talk(), 20)
    assert not isinstance(dropped.value, TimeoutError)


async def test_sixteen_connections_to_a_port_and_no_more(served: Served) -> None:
    clients = [await served.commands() for _ in range(16)]
    for client in clients:
        await client.ask(command(b""), 8)
    assert await (await served.commands()).closed() == b""
    assert await (await served.platform()).ask(signal(11), 4) == DONE, "the other port has its own"
    clients[0].writer.close()
    await clients[0].closed()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if len(served.servers._connections) < 17:
            break
    assert await (await served.commands()).ask(command(b"x"), 9)


async def test_at_the_end_what_runs_is_answered(served: Served) -> None:
    running, idle = await served.platform(), await served.commands()
    await idle.ask(command(b""), 8)
    served.instances.called.clear()
    served.instances.gate.clear()
    running.writer.write(signal(POWER_OFF))
    await served.instances.called.wait()
    closing = asyncio.create_task(served.servers.close(5))
    assert await idle.closed() == b""
    assert not closing.done()
    served.instances.gate.set()
    assert await running.ask(b"", 4) == DONE
    await closing


async def test_the_end_does_not_wait_longer_than_told(served: Served) -> None:
    running = await served.platform()
    served.instances.gate.clear()
    running.writer.write(signal(POWER_OFF))
    await served.instances.called.wait()
    await asyncio.wait_for(served.servers.close(0.1), 5)
    assert await running.closed() == b""


async def test_a_port_that_is_taken_is_named_and_nothing_listens() -> None:
    first, second = free_pair(), free_pair()
    with socket.create_server(("127.0.0.1", second + 1)):
        servers = MssimServers(Instances(), "127.0.0.1", {"vm": first, "other": second})
        with pytest.raises(ConfigError) as refused:
            servers.start()
    assert (refused.value.reason, refused.value.subject) == ("MSSIM_PORT_UNUSABLE", "other")
    assert f"port {second + 1}" in refused.value.message
    assert "mssim_ports" in refused.value.message
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", first)


async def test_an_address_of_version_six() -> None:
    port = free_pair()
    servers = MssimServers(Instances(), "::1", {"vm": port})
    try:
        servers.start()
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error.message}")
    client = Client(*await asyncio.open_connection("::1", port))
    assert await client.ask(command(b"x"), 9)
    await servers.close(1)
