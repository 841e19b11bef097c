"""What surrounds every call: errors, the audit log, metrics, tracing.

One interceptor does all four, as they all need the same thing: how the call ended. It also decodes requests and encodes
responses itself, so that a malformed message is an error like any other and nothing is left to grpc.aio to describe.

To gRPC every method's requests are a stream. Of a unary method's it would read the message first and call us then; of a stream
it reads when it is asked to. So a call is let in or refused when its headers are there, and its message has a time to come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from vtpm.api.access import Access
from vtpm.api.errors import code_of, status_of, status_of_unexpected
from vtpm.api.limits import AnswerRoom
from vtpm.api.ports import Admission, RequestMetrics
from vtpm.api.tracing import Tracing
from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError
from vtpm.wire.listening import QuietLog

audit: Final = structlog.get_logger("vtpm.audit")

_Decode = Callable[[bytes], Any]
_Encode = Callable[[Any], bytes]
_MAX_LOGGED_REF: Final = 128
# Asked for all the time, by machines, and of no interest to an auditor.
_QUIET_SERVICES: Final = ("/grpc.health.", "/grpc.reflection.")
# All others of a guest's are a few KiB.
_LARGE_ANSWERS: Final = ("GetEventLog",)
_READS: Final = ("Get", "List", "Read", "Quote")


def _name(method: str) -> str:
    return method.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """What the messages of a server's callers are held to.

    `receive_timeout_s`: how long a request may take to be there; `idle_timeout_s`: how long a stream may go without a message,
    0 for as long as it likes; `sizes`: the largest request in bytes by method name, `size` for all others, 0 for what gRPC
    takes; `answers`: room for large answers, None for as many as there are calls.
    """

    receive_timeout_s: float
    idle_timeout_s: float = 0
    size: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    answers: AnswerRoom | None = None

    def large_answer(self, method: str) -> AnswerRoom | None:
        """Where a method's answers wait that are larger than others'."""
        return self.answers if _name(method) in _LARGE_ANSWERS else None

    def large(self, method: str) -> bool:
        """Whether requests of a method may be larger than those of others."""
        return _name(method) in self.sizes

    def check(self, method: str, raw: bytes) -> None:
        """Refuse a request that no caller needs.

        Raises:
            InvalidArgumentError: REQUEST_TOO_LARGE.
        """
        limit = self.sizes.get(_name(method), self.size)
        if limit and len(raw) > limit:
            raise InvalidArgumentError("REQUEST_TOO_LARGE", f"a request of this method has at most {limit} bytes")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds the calls of one server, whose callers are `access` and come in by `admission`."""

    def __init__(
        self, access: Access, admission: Admission, messages: MessageLimits, metrics: RequestMetrics, tracing: Tracing
    ) -> None:
        self.access = access
        self.admission = admission
        self.messages = messages
        self.metrics = metrics
        self.tracing = tracing
        self.quiet = QuietLog()
        # Of the large requests one is received at a time: gRPC makes room for each whose receiver waits.
        self.large = asyncio.Lock()
        # The servicers' methods, so bounded by what is registered.
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a method, surrounded; None for an unknown method, which gRPC answers itself."""
        self.admission.seen()
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                self.admission.in_vain()
                return None
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler))
        return grpc.stream_unary_rpc_method_handler(self._unary(method, handler))

    def _unary(self, method: str, handler: Any) -> Any:
        decode: _Decode = handler.request_deserializer
        encode: _Encode = handler.response_serializer
        stream = handler.request_streaming
        serve = handler.stream_unary if stream else handler.unary_unary

        async def unary(_requests: Any, context: Any) -> bytes:
            call = _Call(self, method, context)
            try:
                call.enter()
                request = call.requests(decode, None) if stream else await call.request(decode)
                await call.room()
                response = encode(await serve(request, context))
                call.code = grpc.StatusCode.OK
                return response
            except BaseException as error:
                await call.failed(error)
                raise
            finally:
                call.end()

        return unary

    def _stream(self, method: str, handler: Any) -> Any:
        decode: _Decode = handler.request_deserializer
        encode: _Encode = handler.response_serializer
        stream = handler.request_streaming
        serve = handler.stream_stream if stream else handler.unary_stream

        async def responses(_requests: Any, context: Any) -> None:
            call = _Call(self, method, context)
            try:
                call.enter()
                async with call.patience() as patience:
                    request = call.requests(decode, patience) if stream else await call.request(decode)
                    async with aclosing(serve(request, context)) as messages:
                        async for message in messages:
                            await call.write(encode(message))
                            call.heard(patience)
                call.code = grpc.StatusCode.OK
            except BaseException as error:
                await call.failed(error)
                raise
            finally:
                call.end()

        return responses


class _Call:
    """One call, from its headers to its status."""

    __slots__ = (
        "_admitted",
        "_begin",
        "_context",
        "_instance",
        "_interceptor",
        "_method",
        "_span",
        "_untaken",
        "code",
        "reason",
    )

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
        self._untaken: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        """Be let in, or raise; operators may ask at any time whether the service is well."""
        if self._interceptor.access.bound or not self._method.startswith(_QUIET_SERVICES):
            self._interceptor.admission.enter()
            self._admitted = True
            # It counts until the answer has been taken, not only until there is one.
            self._context.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        self._interceptor.admission.leave()
        if self._untaken is not None:
            self._untaken.cancel()

    async def room(self) -> None:
        """Wait for room for the answer, if it is a large one; it is had until the answer has been taken."""
        if (answers := self._interceptor.messages.large_answer(self._method)) is not None:
            await answers.enter()
            self._context.add_done_callback(lambda _: answers.leave())

    def _not_taken(self) -> None:
        fields = {"method": self._method, "instance": self._instance}
        self._interceptor.quiet.warning("api.answer_not_taken", self._method, **fields)
        self._interceptor.admission.untaken()

    async def request(self, decode: _Decode) -> Any:
        """Receive the one request of a call."""
        messages = self._interceptor.messages
        async with self._interceptor.large if messages.large(self._method) else nullcontext():
            raw = await self._receive(messages.receive_timeout_s)
        if raw is None:
            raise InvalidArgumentError("REQUEST_MISSING", "the call ended without a request")
        return self._decoded(raw, decode)

    async def requests(self, decode: _Decode, patience: asyncio.Timeout | None) -> AsyncIterator[Any]:
        """Receive a stream of requests."""
        while (raw := await self._receive(None)) is not None:
            if patience is not None:
                self.heard(patience)
            yield self._decoded(raw, decode)

    async def _receive(self, timeout_s: float | None) -> bytes | None:
        """Return the next message, None at the end."""
        try:
            async with asyncio.timeout(timeout_s):
                raw = await self._context.read()
        except TimeoutError:
            raise VtpmError(
                "REQUEST_LATE",
                f"the request was not there after {timeout_s:g} s; nothing was done",
                remedy="call again, and send the request at once",
                kind=ErrorKind.DEADLINE_EXCEEDED,
            ) from None
        return None if raw is grpc.aio.EOF else raw

    def _decoded(self, raw: bytes, decode: _Decode) -> Any:
        """Decode a request and note which instance it is about."""
        self._interceptor.messages.check(self._method, raw)
        try:
            request = decode(raw)
        except DecodeError:
            raise InvalidArgumentError("REQUEST_MALFORMED", "the request is not a message of the method's type") from None
        if not self._instance:
            named = getattr(request, "instance", "") or getattr(request, "name", "")
            self._instance = named[:_MAX_LOGGED_REF] if isinstance(named, str) else ""
        return request

    @asynccontextmanager
    async def patience(self) -> AsyncIterator[asyncio.Timeout]:
        """End a stream that goes without a message for too long."""
        idle_s = self._interceptor.messages.idle_timeout_s
        timeout = asyncio.timeout(idle_s or None)
        try:
            async with timeout:
                yield timeout
        except TimeoutError:
            if not timeout.expired():
                raise
            raise VtpmError(
                "STREAM_IDLE",
                f"no message has come or gone for {idle_s:g} s",
                remedy="call again when there is something to ask",
                kind=ErrorKind.ABORTED,
            ) from None

    def heard(self, patience: asyncio.Timeout) -> None:
        """A message went one way or the other."""
        if (idle_s := self._interceptor.messages.idle_timeout_s) and not patience.expired():
            patience.reschedule(asyncio.get_running_loop().time() + idle_s)

    async def write(self, message: bytes) -> None:
        """Send a message of a stream."""
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            # The client has gone, and gRPC is about to say so.
            raise asyncio.CancelledError from None

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
        if not self._admitted or self.code is grpc.StatusCode.CANCELLED:
            self._interceptor.admission.in_vain()
        if self._admitted and self._interceptor.access.bound:
            # Its window may be shut: gRPC then keeps the answer, and the call counts, for as long as the guest likes.
            timeout_s = self._interceptor.messages.receive_timeout_s
            self._untaken = asyncio.get_running_loop().call_later(timeout_s, self._not_taken)
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
        harmless = interceptor.access.bound or _name(self._method).startswith(_READS)
        quiet = self._method.startswith(_QUIET_SERVICES) or (harmless and self.code is grpc.StatusCode.OK)
        if harmless and not quiet:
            # A guest can fail as often as it likes, but not fill the log with it.
            omitted = interceptor.quiet.due(self._method, self.reason or code)
            if omitted is None:
                quiet = True
            elif omitted:
                fields["omitted"] = omitted
        (audit.debug if quiet else audit.info)("api.call", **fields)
