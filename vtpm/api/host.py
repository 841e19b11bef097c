"""HostService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

from typing import Any

from vtpm.api import convert
from vtpm.api.drain import Drain
from vtpm.api.ports import Instances
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1.instance_pb2_grpc import HostServiceServicer


class HostServicer(HostServiceServicer):
    """What runs here, and the keys that seal it."""

    def __init__(self, instances: Instances, drain: Drain) -> None:
        self._instances = instances
        self._drain = drain

    async def GetHost(self, request: pb.GetHostRequest, context: Any) -> pb.Host:
        return convert.host_to_proto(await self._instances.host())

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Any) -> pb.RotateKeyResponse:
        key_id, rewrapped = await self._drain.complete(self._instances.rotate_key())
        return pb.RotateKeyResponse(key_id=key_id, rewrapped=rewrapped)
