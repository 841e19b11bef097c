"""OpenTelemetry spans of gRPC calls, when the operator has configured an endpoint (extra `otel`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from vtpm import __version__
from vtpm.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# W3C Trace Context.
_TRACE_HEADERS: Final = ("traceparent", "tracestate")


class Span(Protocol):
    """One call being traced."""

    def end(self, code: str, instance: str) -> None:
        """Finish with the gRPC status code's name and the instance that was spoken to."""


class Tracing(Protocol):
    """Begins spans."""

    def begin(self, method: str, context: Any, *, trust_caller: bool) -> Span | None:
        """Begin the span of a call; the caller's own trace is continued if the caller is trusted."""

    def close(self) -> None:
        """Send what is left."""


class NoTracing:
    """Tracing that is off."""

    def begin(self, method: str, context: Any, *, trust_caller: bool) -> Span | None:
        """Return nothing to finish."""
        return None

    def close(self) -> None:
        """Nothing is left."""


def open_tracing(endpoint: str, exporter: SpanExporter | None = None) -> Tracing:
    """Return tracing that sends to the OTLP gRPC `endpoint` (`http://host:4317`), or none if it is empty.

    Raises:
        ConfigError: OTEL_NOT_INSTALLED.
    """
    if not endpoint:
        return NoTracing()
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        raise ConfigError(
            "OTEL_NOT_INSTALLED",
            "otel_endpoint is set, but OpenTelemetry is not installed",
            subject=endpoint,
            remedy="pip install 'vtpm[otel]', or unset otel_endpoint",
        ) from None

    provider = TracerProvider(resource=Resource.create({"service.name": "vtpm", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
    tracer = provider.get_tracer("vtpm.api", __version__)
    propagator = TraceContextTextMapPropagator()

    class _Span:
        def __init__(self, span: trace.Span) -> None:
            self._span = span

        def end(self, code: str, instance: str) -> None:
            self._span.set_attribute("rpc.response.status_code", code)
            if instance:
                self._span.set_attribute("vtpm.instance", instance)
            if code != "OK":
                # The code alone: an error's text stays where errors are told.
                self._span.set_status(trace.StatusCode.ERROR, code)
            self._span.end()

    class _Tracing:
        def begin(self, method: str, context: Any, *, trust_caller: bool) -> Span | None:
            parent = None
            if trust_caller:
                headers = {key: value for key, value in context.invocation_metadata() or () if key in _TRACE_HEADERS}
                parent = propagator.extract(headers)
            attributes = {"rpc.system.name": "grpc", "rpc.method": method.removeprefix("/")}
            return _Span(
                tracer.start_span(method.removeprefix("/"), context=parent, kind=trace.SpanKind.SERVER, attributes=attributes)
            )

        def close(self) -> None:
            provider.shutdown()

    return _Tracing()
