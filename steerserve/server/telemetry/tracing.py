"""Traces: one span a request in OpenTelemetry's terms, with `gen_ai.*` attributes where it generates.

OpenTelemetry's SDK is imported only where a collector is named; it is in the extra `otel`.
"""

from typing import TYPE_CHECKING, Any

from steerserve.errors import SteerserveError
from steerserve.extras import install_command
from steerserve.server.telemetry.record import RequestRecord
from steerserve.server.telemetry.trace_context import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_SECONDS = 5.0
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


def exporter_to(endpoint: str) -> "SpanExporter":
    """An exporter to a collector, OTLP over HTTP; raises SteerserveError without the extra."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise SteerserveError(f"--otel-endpoint needs {error.name}: {install_command('otel')}") from error
    path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path, timeout=EXPORT_SECONDS)


class Tracing:
    """A `Report` that makes a span of each request, with its time in the queue and in the engine as children.

    A caller's `traceparent` makes it a part of the caller's trace. Spans are made once a request has ended: the times
    are its own, and a request that is not traced pays nothing.
    """

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "steerserve"})
        self._ids = _span_ids()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, export_timeout_millis=EXPORT_SECONDS * 1000))
        self._tracer = self._provider.get_tracer("steerserve")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, visit: RequestRecord) -> None:
        """Make the spans of a request that has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        trace = visit.trace
        carrier = {"traceparent": f"00-{trace.trace_id}-{trace.parent_id}-{trace.flags}"} if trace.parent_id else {}
        if trace.state is not None:
            carrier["tracestate"] = trace.state
        # Known since the request began, so that what it called could be told.
        self._ids.given = trace
        operation = OPERATIONS.get(visit.route)
        ended = visit.began + visit.seconds
        span = self._tracer.start_span(
            f"{operation} {visit.model}" if operation and visit.model else f"{visit.method} {visit.route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes(visit),
            start_time=_nanoseconds(visit, visit.began),
        )
        if visit.code >= 500 or visit.outcome == "disconnected":
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for name, start, end in (
            ("queue", visit.submitted, visit.started),
            ("denoise", visit.started, ended),
        ):
            if start is not None and end is not None:
                child = self._tracer.start_span(name, context=inside, start_time=_nanoseconds(visit, start))
                child.end(_nanoseconds(visit, end))
        span.end(_nanoseconds(visit, ended))

    def close(self) -> None:
        """Send what has not been sent, for a few seconds at most."""
        self._provider.shutdown()


def _span_ids() -> Any:
    """A generator of ids that gives a request's own span those that its record has, and others random ones."""
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class SpanIds(RandomIdGenerator):
        given: TraceContext | None = None

        def generate_trace_id(self) -> int:
            return super().generate_trace_id() if self.given is None else int(self.given.trace_id, 16)

        def generate_span_id(self) -> int:
            given, self.given = self.given, None
            return super().generate_span_id() if given is None else int(given.span_id, 16)

    return SpanIds()


def attributes(visit: RequestRecord) -> dict[str, Any]:
    """The attributes of a request's span; what is not known is left out."""
    found: dict[str, Any] = {
        "http.request.method": visit.method,
        "http.route": visit.route,
        "http.response.status_code": visit.code,
        "steerserve.request_id": visit.id,
        "steerserve.key": visit.key,
        "steerserve.forwarded_from": visit.forwarded_from,
        "steerserve.forwarded_to": visit.forwarded_to,
        "error.type": visit.reason if visit.reason is not None or visit.code < 500 else visit.outcome,
    }
    params = visit.params
    if params is not None and visit.answer_id is not None:
        first_token = None if visit.first_token is None else visit.first_token - visit.began
        found |= {
            "gen_ai.operation.name": OPERATIONS.get(visit.route, "text_completion"),
            "gen_ai.provider.name": "steerserve",
            "gen_ai.request.model": visit.model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.stop_sequences": params.stop or None,
            "gen_ai.response.id": visit.answer_id,
            "gen_ai.response.model": visit.model,
            "gen_ai.response.finish_reasons": tuple(visit.finish_reasons) or None,
            "gen_ai.response.time_to_first_chunk": first_token,
            "gen_ai.usage.input_tokens": visit.prompt_tokens,
            "gen_ai.usage.output_tokens": visit.tokens,
            "steerserve.rows": visit.rows,
            "steerserve.denoising_steps": visit.steps,
            "steerserve.forward_passes": visit.passes,
            "steerserve.steering_sha256": visit.steering,
            "steerserve.attributes": tuple(sorted(visit.attributes)) or None,
        }
    return {name: value for name, value in found.items() if value is not None}


def _nanoseconds(visit: RequestRecord, moment: float) -> int:
    """A moment of `perf_counter` as nanoseconds since 1970, by the clock as it was when the request began."""
    return visit.began_ns + round((moment - visit.began) * 1e9)
