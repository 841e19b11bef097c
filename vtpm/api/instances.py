"""InstanceService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from vtpm.api import convert
from vtpm.api.drain import Drain
from vtpm.api.pages import make_page_token, parse_page_token
from vtpm.api.ports import Instances
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1.instance_pb2_grpc import InstanceServiceServicer
from vtpm.store.model import InstanceRecord

if TYPE_CHECKING:
    import uuid

# A page ends early rather than pass the 4 MiB that gRPC clients take by default.
_MAX_PAGE_BYTES: Final = 2 << 20


class InstanceServicer(InstanceServiceServicer):
    """Creates, runs and deletes instances. `settled` waits until an instance's guest socket agrees with its state."""

    def __init__(self, instances: Instances, drain: Drain, settled: Callable[[uuid.UUID], Awaitable[None]]) -> None:
        self._instances = instances
        self._drain = drain
        self._settled = settled

    async def CreateInstance(self, request: pb.CreateInstanceRequest, context: Any) -> pb.Instance:
        return self._shown(await self._drain.complete(self._instances.create(convert.create_request(request))))

    async def GetInstance(self, request: pb.GetInstanceRequest, context: Any) -> pb.Instance:
        return self._shown(await self._instances.get(convert.instance_ref(request.instance)))

    async def ListInstances(self, request: pb.ListInstancesRequest, context: Any) -> pb.ListInstancesResponse:
        wanted = convert.filter_text(request.filter)
        size = convert.page_size(request.page_size)
        after = parse_page_token(request.page_token, wanted)
        # One more than asked for says whether there is another page.
        records = await self._instances.list(wanted, size + 1, after)
        response = pb.ListInstancesResponse()
        total_bytes = 0
        for shown, record in enumerate(records):
            instance = self._shown(record)
            total_bytes += instance.ByteSize()
            if shown == size or (shown and total_bytes > _MAX_PAGE_BYTES):
                response.next_page_token = make_page_token(records[shown - 1].id, wanted)
                break
            response.instances.append(instance)
        return response

    async def UpdateInstance(self, request: pb.UpdateInstanceRequest, context: Any) -> pb.Instance:
        ref, changes = convert.instance_ref(request.instance), convert.label_changes(request)
        operation = self._instances.update_labels(ref, changes, convert.revision(request.etag))
        return self._shown(await self._drain.complete(operation))

    async def StartInstance(self, request: pb.StartInstanceRequest, context: Any) -> pb.Instance:
        operation = self._instances.start(
            convert.instance_ref(request.instance),
            startup_clear=convert.startup_clear(request.startup),
            revision=convert.revision(request.etag),
        )
        return await self._powered(await self._drain.complete(operation))

    async def StopInstance(self, request: pb.StopInstanceRequest, context: Any) -> pb.Instance:
        operation = self._instances.stop(convert.instance_ref(request.instance), revision=convert.revision(request.etag))
        return await self._powered(await self._drain.complete(operation))

    async def ResetInstance(self, request: pb.ResetInstanceRequest, context: Any) -> pb.Instance:
        operation = self._instances.reset(
            convert.instance_ref(request.instance),
            startup_clear=convert.startup_clear(request.startup),
            revision=convert.revision(request.etag),
        )
        return await self._powered(await self._drain.complete(operation))

    async def HibernateInstance(self, request: pb.HibernateInstanceRequest, context: Any) -> pb.Instance:
        operation = self._instances.hibernate(convert.instance_ref(request.instance))
        return self._shown(await self._drain.complete(operation))

    async def DeleteInstance(self, request: pb.DeleteInstanceRequest, context: Any) -> pb.DeleteInstanceResponse:
        operation = self._instances.delete(
            convert.instance_ref(request.instance),
            revision=convert.revision(request.etag),
            allow_missing=request.allow_missing,
        )
        await self._drain.complete(operation)
        return pb.DeleteInstanceResponse()

    async def WatchInstances(self, request: pb.WatchInstancesRequest, context: Any) -> AsyncIterator[pb.InstanceEvent]:
        changes = self._instances.watch(convert.filter_text(request.filter))
        async with aclosing(self._drain.items(changes)) as items:
            async for change in items:
                instance = self._shown(change.record) if change.record is not None else None
                yield pb.InstanceEvent(type=convert.event_type(change), instance=instance)

    async def _powered(self, record: InstanceRecord) -> pb.Instance:
        # Who is told that the instance is ON may connect to its guest socket at once.
        await self._settled(record.id)
        return self._shown(record)

    def _shown(self, record: InstanceRecord) -> pb.Instance:
        instances = self._instances
        return convert.instance_to_proto(
            record,
            instances.tpm_socket(record),
            instances.guest_socket(record),
            instances.control_socket(record),
            hibernated=instances.is_hibernated(record),
        )
