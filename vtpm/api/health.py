"""grpc.health.v1 and reflection. Both end their streams at a drain, which the stock servicers would hold up.

Unlike the stock servicer, nothing is kept here for a service name that a caller made up.
"""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Final

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer as HealthServicerBase
from grpc_reflection.v1alpha._async import ReflectionServicer as ReflectionServicerBase

from vtpm.api.drain import Drain
from vtpm.errors import NotFoundError, UnavailableError

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"


class HealthServicer(HealthServicerBase):  # type: ignore[misc]
    """SERVING until the drain begins."""

    def __init__(self, services: Iterable[str], drain: Drain) -> None:
        self._services = frozenset(("", *services))
        self._drain = drain

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            raise NotFoundError("SERVICE_UNKNOWN", "this server has no such service", subject=request.service[:80])
        return self._status(request.service)

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncIterator[pb.HealthCheckResponse]:
        yield self._status(request.service)
        try:
            async with aclosing(self._drain.items(_nothing())) as items:
                async for _ in items:
                    pass
        except UnavailableError:
            yield self._status(request.service)

    def _status(self, service: str) -> pb.HealthCheckResponse:
        if service not in self._services:
            return pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
        serving = pb.HealthCheckResponse.NOT_SERVING if self._drain.begun else pb.HealthCheckResponse.SERVING
        return pb.HealthCheckResponse(status=serving)


class ReflectionServicer(ReflectionServicerBase):  # type: ignore[misc]
    """Tells clients such as grpcurl what there is to call."""

    def __init__(self, services: Iterable[str], drain: Drain) -> None:
        super().__init__(service_names=sorted(services))
        self._drain = drain

    async def ServerReflectionInfo(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._drain.items(request_iterator)) as requests:
            async for response in super().ServerReflectionInfo(requests, context):
                yield response


async def _nothing() -> AsyncIterator[None]:
    await asyncio.get_running_loop().create_future()
    yield
