"""The gRPC API's conventions, against a real daemon."""

from __future__ import annotations

import asyncio
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.support import raw
from tests.support.daemon import DaemonProcess
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2, tpm_pb2_grpc
from vtpm.errors import ErrorKind, VtpmError


def refused(daemon: DaemonProcess, method: object, request: object) -> VtpmError:
    with pytest.raises(VtpmError) as caught:
        daemon.client.call(method, request)
    return caught.value


def test_errors_carry_reason_domain_subject_and_remedy(daemon: DaemonProcess) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        daemon.client.instances.GetInstance(pb.GetInstanceRequest(instance="nobody"))
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INSTANCE_NOT_FOUND", "vtpm")
    assert info.metadata["subject"] == "nobody"
    assert "vtpm instance list" in info.metadata["remedy"]


def test_a_refusal_by_the_tpm_names_its_response_code(daemon: DaemonProcess, name: str) -> None:
    daemon.create(name)
    daemon.power_on(name, pb.STARTUP_NONE)
    error = refused(daemon, daemon.client.tpm.Quote, tpm_pb2.QuoteRequest(instance=name, nonce=b"n", selections=[
        tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0])]))  # fmt: skip
    assert (error.reason, error.metadata["tpm_rc"], error.metadata["tpm_rc_name"]) == (
        "TPM_ERROR",
        "0x100",
        "TPM_RC_INITIALIZE",
    )
    # To a raw command the same is data.
    response = daemon.client.call(daemon.client.tpm.Execute, tpm_pb2.ExecuteRequest(instance=name, command=raw.pcr_read(0)))
    assert raw.rc_of(response.response) == 0x100


def test_creation_is_idempotent_by_request_id(daemon: DaemonProcess, name: str) -> None:
    request_id = str(uuid.uuid4())
    first = daemon.create(name, request_id=request_id)
    assert daemon.create(name, request_id=request_id).id == first.id
    error = refused(daemon, daemon.client.instances.CreateInstance, pb.CreateInstanceRequest(name=name))
    assert error.kind is ErrorKind.ALREADY_EXISTS
    other = pb.CreateInstanceRequest(name=f"{name}-other", request_id=request_id)
    assert refused(daemon, daemon.client.instances.CreateInstance, other).reason == "REQUEST_ID_REUSED"


def test_an_old_etag_changes_nothing(daemon: DaemonProcess, name: str) -> None:
    made = daemon.create(name, labels={"team": "web"})
    update = pb.UpdateInstanceRequest(
        instance=name, labels={"team": "db"}, update_mask=FieldMask(paths=["labels.team"]), etag=made.etag
    )
    changed = daemon.client.call(daemon.client.instances.UpdateInstance, update)
    assert dict(changed.labels) == {"team": "db"}
    assert changed.etag != made.etag
    assert refused(daemon, daemon.client.instances.UpdateInstance, update).reason == "ETAG_MISMATCH"
    for method, request in (
        (daemon.client.instances.StartInstance, pb.StartInstanceRequest(instance=name, etag=made.etag)),
        (daemon.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=name, etag=made.etag)),
    ):
        assert refused(daemon, method, request).reason == "ETAG_MISMATCH"
    assert daemon.get(name).state == pb.OFF


def test_lists_are_paged_filtered_and_complete(daemon: DaemonProcess, name: str) -> None:
    ids = {daemon.create(f"{name}-{number}", labels={"run": name}).id for number in range(7)}
    daemon.power_on(f"{name}-3")
    stub = daemon.client.instances

    def pages(text: str, size: int) -> Iterator[list[pb.Instance]]:
        token = ""
        while True:
            page = stub.ListInstances(pb.ListInstancesRequest(filter=text, page_size=size, page_token=token))
            yield list(page.instances)
            token = page.next_page_token
            if not token:
                return

    found = list(pages(f"labels.run={name}", 3))
    assert [len(page) for page in found] == [3, 3, 1]
    listed = [instance.id for page in found for instance in page]
    assert set(listed) == ids
    assert listed == sorted(listed)
    assert [i.name for page in pages(f"labels.run={name} AND state=ON", 10) for i in page] == [f"{name}-3"]
    assert [i.name for page in pages(f"name={name}-5", 10) for i in page] == [f"{name}-5"]
    for bad in (pb.ListInstancesRequest(page_token="x"), pb.ListInstancesRequest(filter="color=red")):
        assert refused(daemon, stub.ListInstances, bad).kind is ErrorKind.INVALID_ARGUMENT


def test_an_instance_that_is_on_is_not_deleted_and_a_deleted_one_is_gone(daemon: DaemonProcess, running: pb.Instance) -> None:
    stub = daemon.client.instances
    request = pb.DeleteInstanceRequest(instance=running.id)
    assert refused(daemon, stub.DeleteInstance, request).kind is ErrorKind.FAILED_PRECONDITION
    stub.StopInstance(pb.StopInstanceRequest(instance=f"instances/{running.id}"))
    stub.DeleteInstance(request)
    assert refused(daemon, stub.DeleteInstance, request).kind is ErrorKind.NOT_FOUND
    stub.DeleteInstance(pb.DeleteInstanceRequest(instance=running.id, allow_missing=True))
    # The name is free again, and a new instance is another TPM.
    assert daemon.create(running.name).keys != running.keys


def test_start_and_stop_are_idempotent(daemon: DaemonProcess, running: pb.Instance) -> None:
    raw.succeed(raw.connect(running.tpm_socket), raw.pcr_extend(16, b"\x01" * 32))
    before = raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(16))
    again = daemon.power_on(running.name)
    assert (again.epoch, again.etag) == (running.epoch, running.etag)
    assert raw.succeed(raw.connect(running.tpm_socket), raw.pcr_read(16)) == before
    for _ in range(2):
        off = daemon.client.instances.StopInstance(pb.StopInstanceRequest(instance=running.name))
        assert off.state == pb.OFF
    assert daemon.power_on(running.name).epoch == running.epoch + 1


async def test_a_watch_tells_what_exists_and_then_every_change(daemon: DaemonProcess, name: str) -> None:
    await asyncio.to_thread(daemon.create, name)
    async with grpc.aio.insecure_channel(daemon.client.address) as channel:
        from vtpm.api.v1.instance_pb2_grpc import InstanceServiceStub

        stub: Any = InstanceServiceStub(channel)
        call = stub.WatchInstances(pb.WatchInstancesRequest(filter=f"name:{name}"), timeout=30)
        events = aiter(call)
        assert [(await anext(events)).type for _ in range(2)] == [pb.InstanceEvent.EXISTING, pb.InstanceEvent.SYNCED]
        await asyncio.to_thread(daemon.create, f"{name}-2")
        event = await anext(events)
        assert (event.type, event.instance.name) == (pb.InstanceEvent.CREATED, f"{name}-2")
        await asyncio.to_thread(daemon.power_on, name)
        event = await anext(events)
        assert (event.type, event.instance.state) == (pb.InstanceEvent.UPDATED, pb.ON)
        await asyncio.to_thread(daemon.client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=f"{name}-2"))
        event = await anext(events)
        assert (event.type, event.instance.name) == (pb.InstanceEvent.DELETED, f"{name}-2")
        call.cancel()


async def test_a_stream_of_commands_is_answered_in_order(daemon: DaemonProcess, running: pb.Instance) -> None:
    async with grpc.aio.insecure_channel(f"unix:{running.guest_socket}") as channel:
        stub = tpm_pb2_grpc.TpmServiceStub(channel)
        requests = [tpm_pb2.ExecuteRequest(command=raw.get_random(size)) for size in range(1, 33)]
        sizes = [len(answer.response) - 12 async for answer in stub.ExecuteStream(iter(requests))]
    assert sizes == list(range(1, 33))


def test_a_guest_socket_speaks_for_its_instance_alone(daemon: DaemonProcess, running: pb.Instance) -> None:
    other = daemon.running(f"{running.name}-other")
    with grpc.insecure_channel(f"unix:{running.guest_socket}") as channel:
        stub = tpm_pb2_grpc.TpmServiceStub(channel)
        selection = [tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0])]
        quoted = stub.Quote(tpm_pb2.QuoteRequest(nonce=b"n", selections=selection))
        assert quoted.ak_public_pem in [key.public_pem for key in running.keys]
        stub.ReadPcrs(tpm_pb2.ReadPcrsRequest(instance=running.id))
        calls: tuple[tuple[Any, Any], ...] = (
            (stub.Quote, tpm_pb2.QuoteRequest(instance=other.id, nonce=b"n", selections=selection)),
            (stub.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance=other.name)),
            (stub.Execute, tpm_pb2.ExecuteRequest(command=raw.pcr_read(0), locality=1)),
        )
        for method, request in calls:
            with pytest.raises(grpc.RpcError) as caught:
                method(request)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        from vtpm.api.v1.instance_pb2_grpc import InstanceServiceStub

        with pytest.raises(grpc.RpcError) as caught:
            InstanceServiceStub(channel).ListInstances(pb.ListInstancesRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_and_reflection(daemon: DaemonProcess, running: pb.Instance) -> None:
    for address, services in (
        (daemon.client.address, {"vtpm.v1.InstanceService", "vtpm.v1.HostService", "vtpm.v1.TpmService"}),
        (f"unix:{running.guest_socket}", {"vtpm.v1.TpmService"}),
    ):
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", *services):
                answer = health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflection.ServerReflectionInfo(iter([request]))
            assert services <= {service.name for service in answer.list_services_response.service}


def test_sockets_are_for_their_user_alone(daemon: DaemonProcess, running: pb.Instance) -> None:
    for path in (daemon.runtime_dir / "operator.sock", running.tpm_socket, running.tpm_socket + ".ctrl", running.guest_socket):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    for path in (daemon.state_dir, daemon.runtime_dir, daemon.runtime_dir / "instances" / running.id):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in daemon.state_dir.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
