"""The vsock relay in front of a real daemon, with real gRPC clients; AF_VSOCK itself where the kernel gives it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import ParamSpec, cast

import grpc
import grpc.aio
import pytest
import uvloop

from tests.support import raw
from tests.support.daemon import DaemonProcess
from tests.support.quote import verify
from tests.support.vsock import LOCAL_CID, through_vsock
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.api.v1.tpm_pb2_grpc import TpmServiceStub
from vtpm.errors import ConfigError, NotFoundError
from vtpm.store.model import InstanceRecord, InstanceState
from vtpm.wire.listening import accept_forever
from vtpm.wire.vsock import Relay, listen

CIDS = {3: "vsock-a", 4: "vsock-b"}
TIMEOUT_S = 20.0


class Instances:
    """A real daemon's instances, by way of its own API."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._paths: dict[str, str] = {}

    async def get(self, ref: str) -> InstanceRecord:
        try:
            instance = await asyncio.to_thread(self._daemon.get, ref)
        except Exception as error:  # whatever the daemon says: the relay knows this one answer
            raise NotFoundError("INSTANCE_NOT_FOUND", str(error)) from error
        self._paths[instance.id] = instance.guest_socket
        return _record(instance)

    def guest_socket(self, record: InstanceRecord) -> Path:
        return Path(self._paths[str(record.id)])


def _record(instance: pb.Instance) -> InstanceRecord:
    state = InstanceState(pb.State.Name(instance.state))
    return cast(InstanceRecord, SimpleNamespace(id=instance.id, name=instance.name, state=state))


P = ParamSpec("P")


def on_the_daemons_kind_of_loop(test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    """Run a test on uvloop, as the daemon runs."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uvloop.run(test(*args, **kwargs))

    return run


@pytest.fixture(scope="module")
def guests(daemon: DaemonProcess) -> dict[int, pb.Instance]:
    """Two VMs' instances, by CID."""
    return {cid: daemon.running(name) for cid, name in CIDS.items()}


class Vms:
    """Gives gRPC channels to what each CID is let to; a unix socket stands in for each VM's side of vsock."""

    def __init__(self, daemon: DaemonProcess, directory: Path) -> None:
        self.relay = Relay(Instances(daemon), CIDS)
        self._directory = directory
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []
        self.carrying: set[asyncio.Task[None]] = set()

    def channel(self, cid: int) -> grpc.aio.Channel:
        path = self._directory / f"vm-{cid}-{len(self._tasks)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()

        def handle(connection: socket.socket, _: object) -> None:
            task = asyncio.get_running_loop().create_task(self.relay.carry(connection, cid))
            self.carrying.add(task)
            task.add_done_callback(self.carrying.discard)

        self._tasks.append(asyncio.get_running_loop().create_task(accept_forever(listener, handle)))
        self._channels.append(grpc.aio.insecure_channel(f"unix:{path}"))
        return self._channels[-1]

    async def __aenter__(self) -> Vms:
        self._directory.mkdir()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for channel in self._channels:
            await channel.close()
        tasks = [*self._tasks, *self.carrying]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def vms(daemon: DaemonProcess, guests: dict[int, pb.Instance]) -> Vms:
    # Sockets need short paths.
    return Vms(daemon, daemon.root / os.urandom(4).hex())


def pcr_16(read: tpm_pb2.ReadPcrsResponse) -> bytes:
    return next(bytes(value.digest) for value in read.values if value.index == 16 and value.hash_algorithm == "sha256")


@on_the_daemons_kind_of_loop
async def test_a_vm_reads_measures_and_quotes_its_own_tpm(
    vms: Vms, daemon: DaemonProcess, guests: dict[int, pb.Instance]
) -> None:
    async with vms:
        tpm = TpmServiceStub(vms.channel(3))
        await tpm.Measure(tpm_pb2.MeasureRequest(pcr=16, data=b"a kernel", event_type=13), timeout=TIMEOUT_S)
        log = await tpm.GetEventLog(tpm_pb2.GetEventLogRequest(), timeout=TIMEOUT_S)
        assert set(log.origins) == {tpm_pb2.GUEST}
        with pytest.raises(grpc.aio.AioRpcError, match="no PCR below 8"):
            await tpm.Measure(tpm_pb2.MeasureRequest(pcr=0, data=b"a firmware"), timeout=TIMEOUT_S)
        read = await tpm.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S)
        assert read == await asyncio.to_thread(
            daemon.client.call, daemon.client.tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance="vsock-a")
        )
        assert pcr_16(read) != bytes(32)
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[16])
        quote = await tpm.Quote(tpm_pb2.QuoteRequest(selections=[selection], nonce=b"fresh"), timeout=TIMEOUT_S)
        ak = next(key for key in guests[3].keys if key.role == pb.AK)
        verify(quote.attest, quote.signature, ak.public_pem, nonce=b"fresh", pcrs=[pcr_16(read)])


@on_the_daemons_kind_of_loop
async def test_a_stream_of_commands_is_answered_in_order(vms: Vms) -> None:
    async with vms:
        sizes = [1 + number % 48 for number in range(300)]

        async def requests() -> AsyncIterator[tpm_pb2.ExecuteRequest]:
            for size in sizes:
                yield tpm_pb2.ExecuteRequest(command=raw.get_random(size))

        stream = TpmServiceStub(vms.channel(3)).ExecuteStream(requests(), timeout=60)
        assert [len(answer.response) - 12 async for answer in stream] == sizes


@on_the_daemons_kind_of_loop
async def test_each_vm_has_its_own_tpm_and_no_other(vms: Vms) -> None:
    async with vms:
        a, b = TpmServiceStub(vms.channel(3)), TpmServiceStub(vms.channel(4))
        await b.Measure(tpm_pb2.MeasureRequest(pcr=16, data=b"another kernel", event_type=13), timeout=TIMEOUT_S)
        first, second = await asyncio.gather(
            a.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S), b.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S)
        )
        assert pcr_16(first) != pcr_16(second)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await a.ReadPcrs(tpm_pb2.ReadPcrsRequest(instance="vsock-b"), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        command = tpm_pb2.ExecuteRequest(command=raw.get_random(4), locality=2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await a.Execute(command, timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


@on_the_daemons_kind_of_loop
async def test_a_vm_that_hangs_up_is_forgotten(vms: Vms) -> None:
    async with vms:
        channel = vms.channel(3)
        await TpmServiceStub(channel).ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S)
        (carrying,) = vms.carrying
        await channel.close()
        await asyncio.wait_for(carrying, TIMEOUT_S)


@on_the_daemons_kind_of_loop
async def test_a_cid_that_nobody_assigned_gets_no_answer(vms: Vms) -> None:
    async with vms:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await TpmServiceStub(vms.channel(5)).ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=2)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@on_the_daemons_kind_of_loop
async def test_a_vm_that_is_stopped_is_cut_off_and_served_again_when_it_is_on(vms: Vms, daemon: DaemonProcess) -> None:
    async with vms:
        tpm = TpmServiceStub(vms.channel(4))
        await tpm.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S)
        await asyncio.to_thread(daemon.vtpm, "instance", "stop", "vsock-b")
        with pytest.raises(grpc.aio.AioRpcError):
            await tpm.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=2)
        await asyncio.to_thread(daemon.power_on, "vsock-b")
        read = await tpm.ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
        assert pcr_16(read) == bytes(32)


# ---- AF_VSOCK itself -----------------------------------------------------------------------------------------------------


@pytest.fixture
def vsock_port() -> int:
    """A free AF_VSOCK port."""
    try:
        with listen(socket.VMADDR_PORT_ANY) as listener:
            port: int = listener.getsockname()[1]
            return port
    except ConfigError as error:
        pytest.skip(f"no AF_VSOCK listener can be made here: {error.message}")


def test_the_daemon_listens_and_a_second_one_on_the_port_does_not_start(vsock_port: int) -> None:
    flags = ("--vsock-port", str(vsock_port), "--vsock-cids", '{"3": "vm-a"}')
    first, second = DaemonProcess(), DaemonProcess()
    try:
        first.start(*flags)
        assert "vsock.listening" in first.log_text()
        second.launch(*flags)
        assert second.wait_until_dead() == 2
        assert "VSOCK_PORT_UNUSABLE" in second.log_text()
        assert first.stop() == 0
        second.start(*flags)
    finally:
        first.close()
        second.close()


def test_a_vm_speaks_to_its_tpm_over_vsock(vsock_port: int, tmp_path: Path) -> None:
    """By the kernel's loopback (module vsock_loopback), where there is one; tests/e2e/test_service.py does it in a VM."""
    process = DaemonProcess()
    try:
        process.start("--vsock-port", str(vsock_port), "--vsock-cids", json.dumps({LOCAL_CID: "vm-a"}))
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(3)
            try:
                sock.connect((LOCAL_CID, vsock_port))
            except OSError as error:
                pytest.skip(f"this host has AF_VSOCK but no vsock_loopback ({error}); tests/e2e/test_service.py has both")
        process.running("vm-a")
        path = process.root / "vm"
        with through_vsock(path, vsock_port), grpc.insecure_channel(f"unix:{path}") as channel:
            read = TpmServiceStub(channel).ReadPcrs(tpm_pb2.ReadPcrsRequest(), timeout=TIMEOUT_S)
        assert pcr_16(read) == bytes(32)
    finally:
        process.close()
