"""A whole ApiServer on real sockets, over a small instance room."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.unit.api.fakes import FakeInstances, RecordedMetrics, Settings, a_record
from vtpm.api.server import ApiServer
from vtpm.api.v1.instance_pb2_grpc import HostServiceStub, InstanceServiceStub
from vtpm.api.v1.tpm_pb2_grpc import TpmServiceStub
from vtpm.store.model import InstanceRecord, InstanceState


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    # Not tmp_path, which is too long for the name of a unix socket.
    path = Path(tempfile.mkdtemp(prefix="vtpm-api-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def instances(runtime_dir: Path) -> FakeInstances:
    return FakeInstances(runtime_dir)


@pytest.fixture
def metrics() -> RecordedMetrics:
    return RecordedMetrics()


@pytest.fixture
def settings(runtime_dir: Path) -> Settings:
    return Settings(runtime_dir)


@pytest.fixture
async def server(instances: FakeInstances, settings: Settings, metrics: RecordedMetrics) -> AsyncIterator[ApiServer]:
    api = ApiServer(instances, settings, metrics)
    await api.start()
    yield api
    await api.stop()


@contextlib.asynccontextmanager
async def connected(path: Path | None) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        yield channel


@pytest.fixture
async def operator(server: ApiServer, settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    async with connected(settings.operator_socket) as channel:
        yield channel


@pytest.fixture
def operators_instances(operator: grpc.aio.Channel) -> Any:
    return InstanceServiceStub(operator)


@pytest.fixture
def operators_host(operator: grpc.aio.Channel) -> Any:
    return HostServiceStub(operator)


@pytest.fixture
def operators_tpm(operator: grpc.aio.Channel) -> Any:
    return TpmServiceStub(operator)


@pytest.fixture
async def web(server: ApiServer, instances: FakeInstances) -> InstanceRecord:
    """An instance that is ON, its guest socket there."""
    record = instances.power(a_record("web"), InstanceState.ON)
    await server._guests.settled(record.id)
    return record


@pytest.fixture
async def webs_tpm(web: InstanceRecord, instances: FakeInstances) -> AsyncIterator[Any]:
    """TpmService on the guest socket of `web`."""
    async with connected(instances.guest_socket(web)) as channel:
        yield TpmServiceStub(channel)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


class Refusal:
    """What a refused caller saw: code, sentence, ErrorInfo."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.error = error
        self.code = error.code()
        self.message = error.details() or ""
        self.reason = self.domain = ""
        self.metadata: dict[str, str] = {}
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            assert detail.Unpack(info)
            self.reason, self.domain, self.metadata = info.reason, info.domain, dict(info.metadata)

    @property
    def everything(self) -> str:
        """All that came over the wire, as text."""
        trailers = self.error.trailing_metadata() or ()
        return f"{self.error} {self.message} {self.metadata} {[(key, value) for key, value in trailers]}"


async def refusal(call: Any) -> Refusal:
    """Await `call`, which must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read") and not hasattr(call, "__await__"):
            async for _ in call:
                pass
        else:
            await call
    return Refusal(caught.value)
