"""What surrounds every call: errors, the audit log, metrics, tracing.

One interceptor does all four, as they all need the same thing: how the call ended. It also decodes requests and encodes
responses itself, so that a malformed message is an error like any other and nothing is left to grpc.aio to describe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from vtpm.api.access import Access
from vtpm.api.errors import code_of, status_of, status_of_unexpected
from vtpm.api.limits import Admission
from vtpm.api.ports import RequestMetrics
from vtpm.api.tracing import Tracing
from vtpm.errors import InvalidArgumentError, VtpmError

audit: Final = structlog.get_logger("vtpm.audit")

_Decode = Callable[[bytes], Any]
_Encode = Callable[[Any], bytes]
_MAX_LOGGED_REF: Final = 128
# Asked for all the time, by machines, and of no interest to an auditor.
_QUIET_SERVICES: Final = ("/grpc.health.", "/grpc.reflection.")
_READS: Final = ("Get", "List", "Read", "Quote")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds the calls of one server, whose callers are `access` and come in by `admission`."""

    def __init__(self, access: Access, admission: Admission, metrics: RequestMetrics, tracing: Tracing) -> None:
        self.access = access
        self.admission = admission
        self.metrics = metrics
        self.tracing = tracing
        # The servicers' methods, so bounded by what is registered.
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a method, surrounded; None for an unknown method, which gRPC answers itself."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        decode: _Decode = handler.request_deserializer
        encode: _Encode = handler.response_serializer
        match handler.request_streaming, handler.response_streaming:
            case False, False:
                return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary, decode, encode))
            case True, False:
                return grpc.stream_unary_rpc_method_handler(
                    self._unary(method, handler.stream_unary, decode, encode, stream=True)
                )
            case False, True:
                return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream, decode, encode))
            case _:
                return grpc.stream_stream_rpc_method_handler(
                    self._stream(method, handler.stream_stream, decode, encode, stream=True)
                )

    def _unary(self, method: str, serve: Any, decode: _Decode, encode: _Encode, *, stream: bool = False) -> Any:
        async def unary(raw: Any, context: Any) -> bytes:
            call = _Call(self, method, context)
            try:
                call.enter()
                request = call.requests(raw, decode) if stream else call.request(raw, decode)
                response = encode(await serve(request, context))
                call.code = grpc.StatusCode.OK
                return response
            except BaseException as error:
                await call.failed(error)
                raise
            finally:
                call.end()

        return unary

    def _stream(self, method: str, serve: Any, decode: _Decode, encode: _Encode, *, stream: bool = False) -> Any:
        async def responses(raw: Any, context: Any) -> AsyncIterator[bytes]:
            call = _Call(self, method, context)
            try:
                call.enter()
                request = call.requests(raw, decode) if stream else call.request(raw, decode)
                async with aclosing(serve(request, context)) as messages:
                    async for message in messages:
                        yield encode(message)
                call.code = grpc.StatusCode.OK
            except BaseException as error:
                await call.failed(error)
                raise
            finally:
                call.end()

        return responses


class _Call:
    """One call, from its first byte to its status."""

    __slots__ = ("_admitted", "_begin", "_context", "_instance", "_interceptor", "_method", "_span", "code", "reason")

    def __init__(self, interceptor: CallInterceptor, method: str, context: Any) -> None:
        self._interceptor = interceptor
        self._method = method
        self._context = context
        self._instance = interceptor.access.bound
        self._begin = time.perf_counter()
        self._span = interceptor.tracing.begin(method, context, trust_caller=not interceptor.access.bound)
        # What it is when the server's end comes first.
        self.code = grpc.StatusCode.CANCELLED
        self.reason = ""
        self._admitted = False

    def enter(self) -> None:
        """Be let in, or raise; whether the service is well can be asked at any time."""
        if not self._method.startswith(_QUIET_SERVICES):
            self._interceptor.admission.enter()
            self._admitted = True

    def request(self, raw: bytes, decode: _Decode) -> Any:
        """Decode a request and note which instance it is about."""
        try:
            request = decode(raw)
        except DecodeError:
            raise InvalidArgumentError("REQUEST_MALFORMED", "the request is not a message of the method's type") from None
        if not self._instance:
            named = getattr(request, "instance", "") or getattr(request, "name", "")
            self._instance = named[:_MAX_LOGGED_REF] if isinstance(named, str) else ""
        return request

    async def requests(self, raw: AsyncIterator[bytes], decode: _Decode) -> AsyncIterator[Any]:
        """Decode a stream of requests."""
        async for message in raw:
            yield self.request(message, decode)

    async def failed(self, error: BaseException) -> None:
        """End the call with the status that `error` stands for, or return for the caller to raise it on."""
        match error:
            case VtpmError():
                self.code, self.reason = code_of(error), error.reason
                await self._context.abort_with_status(status_of(error, for_guest=bool(self._interceptor.access.bound)))
            case asyncio.CancelledError() | GeneratorExit():
                self.code = grpc.StatusCode.DEADLINE_EXCEEDED if self._expired() else grpc.StatusCode.CANCELLED
            case grpc.aio.AbortError():
                self.code = self._context.code() or grpc.StatusCode.UNKNOWN
            case Exception():
                self.code, self.reason = grpc.StatusCode.INTERNAL, "INTERNAL"
                await self._context.abort_with_status(status_of_unexpected(error, self._method))

    def _expired(self) -> bool:
        remaining = self._context.time_remaining()
        return remaining is not None and remaining <= 0

    def end(self) -> None:
        """Report how it ended."""
        if self._admitted:
            self._interceptor.admission.leave()
        seconds = time.perf_counter() - self._begin
        code = self.code.name
        interceptor = self._interceptor
        interceptor.metrics.observe_request(self._method, code, seconds)
        if self._span is not None:
            self._span.end(code, self._instance)
        fields = {
            "method": self._method,
            "instance": self._instance,
            "role": interceptor.access.role,
            "code": code,
            "micros": int(seconds * 1e6),
        }
        if self.reason:
            fields["reason"] = self.reason
        # A guest's use of its own TPM is no more of an event here than on its VM's data socket;
        # and what only reads changes nothing.
        harmless = interceptor.access.bound or self._method.rpartition("/")[2].startswith(_READS)
        quiet = self._method.startswith(_QUIET_SERVICES) or (harmless and self.code is grpc.StatusCode.OK)
        (audit.debug if quiet else audit.info)("api.call", **fields)
