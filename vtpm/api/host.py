"""HostService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from vtpm.api import convert
from vtpm.api.drain import Drain
from vtpm.api.ports import Instances
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1.instance_pb2_grpc import HostServiceServicer

_DRAIN_TIMEOUT_S: Final = 60


class HostServicer(HostServiceServicer):
    """What runs here, and the keys that seal it."""

    def __init__(self, instances: Instances, drain: Drain) -> None:
        self._instances = instances
        self._drain = drain

    async def GetHost(self, request: pb.GetHostRequest, context: Any) -> pb.Host:
        return convert.host_to_proto(await self._instances.host())

    async def DrainHost(self, request: pb.DrainHostRequest, context: Any) -> AsyncIterator[pb.DrainProgress]:
        steps = self._instances.drain(request.timeout_s or _DRAIN_TIMEOUT_S)
        async with aclosing(self._drain.items(steps)) as items:
            async for step in items:
                yield convert.drain_progress_to_proto(step)

    async def ResumeHost(self, request: pb.ResumeHostRequest, context: Any) -> pb.ResumeHostResponse:
        self._instances.resume()
        return pb.ResumeHostResponse()

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Any) -> pb.RotateKeyResponse:
        key_id, rewrapped = await self._drain.complete(self._instances.rotate_key())
        return pb.RotateKeyResponse(key_id=key_id, rewrapped=rewrapped)
