"""TpmService over the instance room: for operators, or for the one VM behind a guest socket."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from vtpm.api import convert
from vtpm.api.access import Access
from vtpm.api.drain import Drain
from vtpm.api.ports import Instances
from vtpm.api.v1 import tpm_pb2 as pb
from vtpm.api.v1.tpm_pb2_grpc import TpmServiceServicer
from vtpm.errors import InvalidArgumentError
from vtpm.tpm.command import MAX_COMMAND_SIZE

MAX_NONCE_SIZE: Final = 64
MAX_DATA_SIZE: Final = 1 << 20
MAX_EVENT_DATA_SIZE: Final = 4096
# TCG PC Client Platform Firmware Profile, 10.4.1.
EV_NO_ACTION: Final = 3
EV_EVENT_TAG: Final = 6


class TpmServicer(TpmServiceServicer):
    """Speaks to TPMs; `access` says to which."""

    def __init__(self, instances: Instances, drain: Drain, access: Access) -> None:
        self._instances = instances
        self._drain = drain
        self._access = access

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        return await self._execute(request)

    async def ExecuteStream(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        async with aclosing(self._drain.items(request_iterator)) as requests:
            async for request in requests:
                yield await self._execute(request)

    async def _execute(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        ref, locality = self._access.instance(request.instance), self._access.locality(request.locality)
        # Only what no TPM buffer holds is refused here; a command that is malformed gets the TPM's own error.
        _bounded("COMMAND_TOO_LARGE", "a TPM command", request.command, MAX_COMMAND_SIZE)
        return pb.ExecuteResponse(response=await self._instances.execute(ref, request.command, locality))

    async def ReadPcrs(self, request: pb.ReadPcrsRequest, context: Any) -> pb.ReadPcrsResponse:
        ref = self._access.instance(request.instance)
        read = await self._instances.read_pcrs(ref, convert.pcr_selections(request.selections))
        return pb.ReadPcrsResponse(values=convert.pcr_values_to_proto(read.values), update_counter=read.update_counter)

    async def Quote(self, request: pb.QuoteRequest, context: Any) -> pb.QuoteResponse:
        ref = self._access.instance(request.instance)
        _bounded("NONCE_TOO_LARGE", "a nonce", request.nonce, MAX_NONCE_SIZE)
        quote = await self._instances.quote(ref, convert.pcr_selections(request.selections), request.nonce)
        return pb.QuoteResponse(
            attest=quote.attest,
            signature=quote.signature,
            ak_tpmt_public=quote.ak_tpmt_public,
            ak_public_pem=convert.pem(quote.ak_tpmt_public),
            values=convert.pcr_values_to_proto(quote.values),
        )

    async def Measure(self, request: pb.MeasureRequest, context: Any) -> pb.MeasureResponse:
        ref, pcr = self._access.instance(request.instance), self._access.pcr(request.pcr)
        _bounded("DATA_TOO_LARGE", "what is measured", request.data, MAX_DATA_SIZE)
        _bounded("EVENT_DATA_TOO_LARGE", "event data", request.event_data, MAX_EVENT_DATA_SIZE)
        event_type = request.event_type or EV_EVENT_TAG
        if event_type == EV_NO_ACTION:
            # Such events are skipped at replay, so a PCR that was extended with one could never be explained by the log.
            raise InvalidArgumentError("EVENT_TYPE_INVALID", "an EV_NO_ACTION event extends no PCR", remedy="use another type")
        values = await self._drain.complete(
            self._instances.measure(ref, pcr, request.data, event_type, request.event_data, self._access.origin)
        )
        return pb.MeasureResponse(values=convert.pcr_values_to_proto(values))

    async def GetEventLog(self, request: pb.GetEventLogRequest, context: Any) -> pb.GetEventLogResponse:
        return convert.event_log_to_proto(await self._instances.event_log(self._access.instance(request.instance)))


def _bounded(reason: str, what: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise InvalidArgumentError(reason, f"{what} has at most {limit} bytes, here are {len(data)}")
